"""`config.dp` becomes the clipping rule, the mechanism of every phase and the ledger."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from dpjax import data, dp
from dpjax.build.model import vote_count
from dpjax.build.run import Temperature, TrainingPhase, Vote
from dpjax.data import Dataset, Units
from dpjax.files import choose, resolve, returned
from dpjax.models import Params, finetune

__all__ = [
    "adaptive_bound",
    "check",
    "check_vote",
    "clip_rule",
    "ledger",
    "sampler",
    "temperature",
    "vote",
    "with_noise",
]

_TWO_PARTS = (
    "dp.temperature.share={share} needs a guarantee for adding or removing an example, but "
    "dp.sampler={sampler!r} is accounted for replacing one."
)


def check(config: ConfigDict) -> None:
    """Refuses a name or a budget in `config.dp` that suits no data."""
    choose("dp.method", config.method, dict.fromkeys(dp.METHODS))
    choose("dp.noise", config.noise, dict.fromkeys(("gaussian", "secure")))
    if config.noise == "secure":
        _check_secure(config)
    try:
        dp.accounting.check_budget(config.epsilon, config.delta)
    except ValueError as error:
        raise ValueError(f"dp.{error}") from error
    sampler(config)
    if (config.sampler == "truncated_poisson") != (config.max_batch_size is not None):
        raise ValueError(
            f"dp.max_batch_size={config.max_batch_size} must be given for "
            f"dp.sampler='truncated_poisson' and for no other, got {config.sampler!r}."
        )
    if config.max_batch_size is not None and config.max_batch_size < 1:
        raise ValueError(f"dp.max_batch_size={config.max_batch_size} must be >= 1.")
    fitted, counts = config.temperature, config.adaptive.count_noise
    if not 0 <= fitted.share < 1:
        raise ValueError(f"dp.temperature.share={fitted.share} must be in [0, 1).")
    if not 0 < fitted.bound < math.inf:
        raise ValueError(f"dp.temperature.bound={fitted.bound} must be > 0 and finite.")
    if fitted.steps < 1:
        raise ValueError(f"dp.temperature.steps={fitted.steps} must be >= 1.")
    if fitted.share and config.sampler == "fixed_size":
        raise ValueError(_TWO_PARTS.format(share=fitted.share, sampler=config.sampler))
    if counts is not None and not 0 < counts < math.inf:
        raise ValueError(f"dp.adaptive.count_noise={counts} must be > 0 and finite.")


def _check_secure(config: ConfigDict) -> None:
    for name, value, wanted in (
        ("method", config.method != "bookkeeping", "'auto' or 'vmap', which sums exactly"),
        ("temperature.share", not config.temperature.share, "0: its noise is float32"),
        ("adaptive.quantile", config.adaptive.quantile is None, "None: its noise is float32"),
    ):  # fmt: skip
        if not value:
            section, _, field = name.rpartition(".")
            found = config[section][field] if section else config[field]
            raise ValueError(f"dp.{name}={found!r} must be {wanted}, with dp.noise='secure'.")


def sampler(config: ConfigDict) -> str | dp.sampling.Factory:
    """Returns what makes the sampler of `config.dp`: a name of ours, or the user's function."""
    factory: str | dp.sampling.Factory = resolve(
        "dp.sampler", config.sampler, {name: name for name in dp.sampling.SAMPLERS}
    )
    if not isinstance(factory, str):
        try:
            inspect.signature(factory).bind(num_examples=2, batch_size=1)
        except TypeError as error:
            raise ValueError(
                f"dp.sampler={config.sampler!r} must take num_examples and batch_size: {error}."
            ) from error
    return factory


def clip_rule(config: ConfigDict, bound: float | None = None) -> dp.ClipRule:
    """Makes the clipping rule of `config.dp`, at its bound or at another."""
    make = resolve(
        "dp.clipping",
        config.clipping,
        {
            "flat": dp.flat,
            "per_layer": dp.per_layer,
            "automatic": functools.partial(dp.automatic, gamma=config.gamma),
            "global": dp.global_,
        },
    )
    try:
        rule = make(config.bound if bound is None else bound, normalized=config.normalized)
    except TypeError as error:  # a user's function that takes other arguments
        raise ValueError(f"dp.clipping={config.clipping!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"dp.{error}") from error
    return returned("dp.clipping", config.clipping, rule, dp.ClipRule)


def adaptive_bound(config: ConfigDict) -> dp.QuantileBound | None:
    """Makes the rule by which the bound of `config.dp` follows a quantile; None: it does not."""
    adaptive = config.adaptive
    if adaptive.quantile is None:
        return None
    if config.clipping != "flat":
        raise ValueError(f"dp.adaptive.quantile needs dp.clipping='flat', got {config.clipping!r}.")
    if config.bound_schedule:
        raise ValueError("dp.adaptive.quantile and dp.bound_schedule exclude each other.")
    try:
        made = dp.quantile_bound(
            adaptive.quantile, rate=adaptive.rate, lower_bound=adaptive.lower_bound
        )
    except ValueError as error:
        raise ValueError(f"dp.adaptive.{error}") from error
    if config.bound < adaptive.lower_bound:
        raise ValueError(
            f"dp.bound={config.bound} must be >= dp.adaptive.lower_bound={adaptive.lower_bound}."
        )
    return made


def temperature(
    config: ConfigDict, train: Dataset | Units
) -> tuple[Dataset | Units, Temperature | None]:
    """Splits off the examples that a temperature is fitted on, if one is; they do not train."""
    if config.dp is None or not config.dp.temperature.share:
        return train, None
    chosen = config.dp.temperature
    try:
        rest, share = data.random_share(train, chosen.share, seed=config.seed)
        mechanism = dp.calibrated(
            epsilon=config.dp.epsilon,
            delta=config.dp.delta,
            num_examples=len(share),
            batch_size=len(share),
            steps=chosen.steps,
        )
    except ValueError as error:
        raise ValueError(f"dp.temperature: {error}") from error
    if isinstance(share, Units):
        # One record stands for its unit, chosen by the unit's own key: adding or removing a unit
        # adds or removes one example.
        rows = dataclasses.replace(share, limit=1).rows(
            np.arange(len(share)), seed=config.seed, step=0
        )
        share = share.records.select(rows[:, 0])
    return rest, Temperature(share, mechanism, chosen.bound)


def check_vote(config: ConfigDict) -> None:
    """Refuses what a vote for the blocks that train does not go with."""
    if vote_count(config.finetune) is None:
        return
    given = f"finetune={config.finetune!r}"
    if config.dp is None:
        raise ValueError(f"{given} is a noised vote, but dp=None: name the blocks instead.")
    if not 0 < config.dp.vote < 1:
        raise ValueError(f"dp.vote={config.dp.vote} must be in (0, 1).")
    for wrong, what in (
        (config.task != "classification", f"task={config.task!r}"),
        (config.dp.sampler == "fixed_size", "dp.sampler='fixed_size'"),
        (config.dp.noise == "secure", "dp.noise='secure'"),
        (config.data.unit is not None, f"data.unit={config.data.unit!r}"),
        (config.lp.fraction == 1, "lp.fraction=1.0, which trains no block"),
        (config.audit.count > 0, f"audit.count={config.audit.count}"),
    ):
        if wrong:
            raise ValueError(f"{given} does not go with {what}.")


def vote(config: ConfigDict, num_examples: int) -> Vote | None:
    """Makes the mechanism of the vote for the blocks that train; None: there is no vote."""
    count = vote_count(config.finetune)
    if count is None or config.dp is None:
        return None
    mechanism = dp.calibrated(
        epsilon=config.dp.vote * config.dp.epsilon,
        delta=config.dp.delta,
        num_examples=num_examples,
        batch_size=num_examples,
        steps=1,
    )
    return Vote(mechanism, count)


def with_noise(
    config: ConfigDict,
    made: Sequence[TrainingPhase],
    num_examples: int,
    params: Params | None = None,
) -> tuple[TrainingPhase, ...]:
    """Gives every phase a mechanism, so that their composition meets the one budget.

    Args:
        config: of the run.
        made: the phases.
        num_examples: N.
        params: all parameters, whose number secure noise depends on.
    """
    secure_sizes = None
    if config.dp.noise == "secure":
        if params is None:
            raise ValueError("dp.noise='secure' is not for heads on cached features.")
        secure_sizes = [finetune.count(finetune.split(params, p.trainable)[0]) for p in made]
    sizes = [phase.batch_size for phase in made]
    adaptive, counts = config.dp.adaptive, None
    if adaptive.quantile is not None:
        given = adaptive.count_noise
        counts = [size / 20 if given is None else given for size in sizes]
    last, cut = made[-1].training, config.dp.max_batch_size
    held = vote(config, num_examples)
    mechanisms = dp.calibrated_phases(
        epsilon=config.dp.epsilon,
        delta=config.dp.delta,
        num_examples=num_examples,
        batch_size=sizes,
        steps=[phase.steps for phase in made],
        noise_ratios=[1.0 if p.training == last else config.lp.noise_ratio for p in made],
        sampler=sampler(config.dp),
        count_noises=counts,
        before=() if held is None else (held.mechanism,),
        secure_sizes=secure_sizes,
        **({} if cut is None else {"max_batch_size": cut}),
    )
    return tuple(p._replace(mechanism=m) for p, m in zip(made, mechanisms, strict=True))


def ledger(
    config: ConfigDict,
    made: tuple[TrainingPhase, ...],
    fitted: Temperature | None,
    held: Vote | None = None,
) -> dp.Ledger | None:
    """Returns the empty ledger of a run; None without privacy."""
    if config.dp is None:
        return None
    paid = [] if held is None else [dp.Phase("vote", held.mechanism)]
    paid += [dp.Phase(p.name, p.mechanism) for p in made if p.mechanism is not None]
    if fitted is not None:
        if paid[0].mechanism.relation != fitted.mechanism.relation:
            share, name = config.dp.temperature.share, config.dp.sampler
            raise ValueError(_TWO_PARTS.format(share=share, sampler=name))
        paid.append(dp.Phase("temperature", fitted.mechanism, part="temperature"))
    return dp.Ledger(tuple(paid), epsilon=config.dp.epsilon, delta=config.dp.delta)
