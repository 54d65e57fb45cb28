"""From a config to the phases of a run, and what each of them pays of the one budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict

from dpjax import data, dp, finetune, names, planner, schedules
from dpjax.schedules import Schedule
from dpjax.step import Hyper

__all__ = ["Phase", "Temperature", "batch_sizes", "bounds", "ledger", "phases", "temperature"]


class Phase(NamedTuple):
    """One stretch of training: what trains, for how long, under which mechanism.

    Attributes:
        name: "linear-probe" or "train"; with its number, where a training has several phases.
        training: number of the training that it belongs to. The phases of one training are stages
            of a schedule: what is in the train state goes on as if they were one.
        trainable: predicate on parameter paths.
        steps: number of updates.
        batch_size: expected batch size B.
        bound: clip bound C; where it adapts, that of the run's first step.
        mechanism: None without privacy.
        optimizer: makes the transform from traced values; one object for all of a training.
        learning_rate: base learning rate.
        keep_optimizer: whether optimiser state of leaves that the training before trained goes on.
    """

    name: str
    training: int
    trainable: Callable[[str], bool]
    steps: int
    batch_size: int
    bound: float
    mechanism: dp.Mechanism | None
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    learning_rate: float
    keep_optimizer: bool = False


class Temperature(NamedTuple):
    """How the softmax temperature is fitted after training.

    Attributes:
        data: examples that no phase reads.
        mechanism: of full batches of them.
        bound: on an example's derivative.
    """

    data: data.Dataset
    mechanism: dp.Mechanism
    bound: float


def bounds(config: ConfigDict) -> Schedule:
    """Returns the schedule of the clip bound; without privacy there is none, and it is 1."""
    return ((0.0, 1.0),) if config.dp is None else _schedule("dp.bound", config.dp)


def batch_sizes(config: ConfigDict, num_examples: int) -> tuple[Schedule, planner.Plan | None]:
    """Returns the schedule of B, and the plan it comes from if the config says "auto"."""
    plan, sizes = None, _schedule("batch_size", config)
    if config.batch_size == "auto":
        if config.batch_size_schedule:
            raise ValueError("batch_size='auto' and batch_size_schedule exclude each other.")
        if config.dp is None:
            raise ValueError("batch_size='auto' plans for a privacy budget, but dp=None has none.")
        if config.dp.sampler != "poisson":
            raise ValueError(
                f"batch_size='auto' plans for dp.sampler='poisson', got {config.dp.sampler!r}."
            )
        plan = planner.plan(num_examples, config.epochs, config.dp.epsilon, config.dp.delta)
        sizes = ((0.0, plan.batch_size),)
    for _, size in sizes:
        whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not whole or not 1 <= size <= num_examples:
            raise ValueError(
                f"batch_size={size!r} must be 'auto' or a whole number in 1..{num_examples}, the "
                "training examples."
            )
    return sizes, plan


def _schedule(field: str, config: ConfigDict) -> Schedule:
    name = field.split(".")[-1]
    if not config[f"{name}_schedule"]:
        return ((0.0, config[name]),)
    return schedules.values(f"{field}_schedule", config[f"{name}_schedule"])


def temperature(config: ConfigDict, train: data.Dataset) -> tuple[data.Dataset, Temperature | None]:
    """Splits off the examples that a temperature is fitted on, if one is; they do not train."""
    if config.dp is None or not config.dp.temperature.share:
        return train, None
    chosen = config.dp.temperature
    if not 0 < chosen.bound < math.inf:
        raise ValueError(f"dp.temperature.bound={chosen.bound} must be > 0 and finite.")
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
    return rest, Temperature(share, mechanism, chosen.bound)


def phases(
    config: ConfigDict, tuning: finetune.FineTuning, sizes: Schedule, num_examples: int
) -> tuple[Phase, ...]:
    """Returns the phases of a run; those of a private one compose to no more than its budget.

    Args:
        config: of the run.
        tuning: what trains after linear probing.
        sizes: the schedule of the batch size.
        num_examples: N.
    """
    stages = schedules.stages(
        num_examples=num_examples,
        epochs=config.epochs,
        batch_sizes=sizes,
        bounds=bounds(config),
        cuts=[config.lp.fraction],
    )
    rate = config.lp.learning_rate or config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"lp.learning_rate={rate} must be > 0 and finite.")
    probing = [stage for stage in stages if stage.begin < config.lp.fraction]
    in_head = finetune.head()(tuning.model).trainable
    keep = config.lp.keep_optimizer
    planned = [
        ("linear-probe", in_head, probing, rate, False),
        ("train", tuning.trainable, stages[len(probing) :], config.optimizer.learning_rate, keep),
    ]
    made: list[Phase] = []
    for name, trainable, mine, base, keeps in planned:
        if not mine:
            continue
        total = sum(stage.steps for stage in mine)
        optimizer = names.optimizer(config.optimizer, total, private=config.dp is not None)
        training = made[-1].training + 1 if made else 0
        made += [
            Phase(
                name=name if len(mine) == 1 else f"{name} {number}",
                training=training,
                trainable=trainable,
                steps=stage.steps,
                batch_size=stage.batch_size,
                bound=stage.bound,
                mechanism=None,
                optimizer=optimizer,
                learning_rate=base,
                keep_optimizer=keeps,
            )
            for number, stage in enumerate(mine, start=1)
        ]
    return tuple(made) if config.dp is None else _with_noise(config, made, num_examples)


def _with_noise(config: ConfigDict, made: list[Phase], num_examples: int) -> tuple[Phase, ...]:
    """Gives every phase a mechanism, so that their composition meets the one budget."""
    if not 0 < config.lp.noise_ratio < math.inf:
        raise ValueError(f"lp.noise_ratio={config.lp.noise_ratio} must be > 0 and finite.")
    sizes = [phase.batch_size for phase in made]
    adaptive, counts = config.dp.adaptive, None
    if adaptive.quantile is not None:
        given = adaptive.count_noise
        counts = [size / 20 if given is None else given for size in sizes]
    last, cut = made[-1].training, config.dp.max_batch_size
    mechanisms = dp.calibrated_phases(
        epsilon=config.dp.epsilon,
        delta=config.dp.delta,
        num_examples=num_examples,
        batch_size=sizes,
        steps=[phase.steps for phase in made],
        noise_ratios=[1.0 if p.training == last else config.lp.noise_ratio for p in made],
        sampler=names.sampler(config.dp),
        count_noises=counts,
        **({} if cut is None else {"max_batch_size": cut}),
    )
    return tuple(p._replace(mechanism=m) for p, m in zip(made, mechanisms, strict=True))


def ledger(
    config: ConfigDict, made: tuple[Phase, ...], fitted: Temperature | None
) -> dp.Ledger | None:
    """Returns the empty ledger of a run; None without privacy."""
    if config.dp is None:
        return None
    paid = [dp.Phase(p.name, p.mechanism) for p in made if p.mechanism is not None]
    if fitted is not None:
        if paid[0].mechanism.relation != fitted.mechanism.relation:
            raise ValueError(
                f"dp.temperature.share={config.dp.temperature.share} needs a guarantee for adding "
                f"or removing an example, but dp.sampler={config.dp.sampler!r} is accounted for "
                "replacing one."
            )
        paid.append(dp.Phase("temperature", fitted.mechanism, part="temperature"))
    return dp.Ledger(tuple(paid), epsilon=config.dp.epsilon, delta=config.dp.delta)
