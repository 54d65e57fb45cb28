"""A run in words: its plan, its privacy statement, and what must not change when it is resumed."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dpjax import dp, models
from dpjax.build.model import model_title
from dpjax.build.run import Run, TrainingPhase
from dpjax.config import MAY_CHANGE
from dpjax.data import Units
from dpjax.dp import seeds
from dpjax.models import Params, finetune, locate, sha256
from dpjax.runtime import code_digest

__all__ = ["describe", "identity", "ledger_after", "run_statement"]

_LARGE_SHARE = 0.1  # of the parameters; on the route "direct" they cost time and memory


def describe(run: Run) -> str:
    """Returns the plan of a run as aligned text, one fact a line."""
    config, phase = run.config, run.phases[-1]
    trainable, frozen = finetune.split(run.params, phase.trainable)
    rows: dict[str, Any] = {
        "data set": f"{run.train.name}, split {run.train.split} (held out: {run.test.split})",
        "examples N": _size(run),
        **_kind(run),
        "model": f"{model_title(config.model)}, weights {config.model.weights}",
        "parameters": _parameters(run, trainable, frozen),
        "steps T": f"{sum(p.steps for p in run.phases):,} ({config.epochs:g} epochs"
        + "".join(f", {p.name} {p.steps:,}" for p in run.phases if len(run.phases) > 1)
        + ")",
        "batch": f"{_each(run, lambda p: f'{p.expected_batch_size:,.7g}')} expected, "
        f"{config.physical_batch} physical",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
    }
    if run.batch_plan is not None:
        rows["batch chosen"] = f"by the planner, from public facts. {run.batch_plan.reason}"
    if config.ema:
        rows["average"] = f"of the parameters, decay {config.ema:g}; evaluated as eval/ema"
    mechanism = phase.mechanism
    if mechanism is None:
        rows["privacy"] = "NONE: dp=None trains without privacy"
    else:
        rows |= {
            "budget": f"epsilon {config.dp.epsilon:g}, delta {config.dp.delta:g}",
            "neighboring": mechanism.relation,
            "sampler": _each(run, lambda p: p.mechanism.sampler.title if p.mechanism else "")
            + f", q = {_each(run, lambda p: f'{p.expected_batch_size / len(run.train):.6g}')}",
            "accountant": mechanism.accountant,
            "noise sigma": _each(
                run, lambda p: f"{p.mechanism.noise_multiplier:.4f}" if p.mechanism else ""
            ),
            "sigma sqrt(T)": f"{_cumulative_noise(run):.2f}",
            "clipping": _clipping(run),
            "clipping engine": _engine(run, trainable, frozen),
            "seed": "OS entropy" if config.private_seed is None else dp.SEED_POLICIES["fixed"],
        }
        if run.vote is not None:
            rows["vote"] = (
                f"picks {run.vote.number} of the blocks first, which alone train with the head; "
                f"sigma {run.vote.mechanism.noise_multiplier:.4f}, within the same budget"
            )
        if run.temperature is not None:
            rows["temperature"] = (
                f"fitted on {len(run.temperature.data):,} examples that do not train, "
                f"sigma {run.temperature.mechanism.noise_multiplier:.4f}, within the same budget"
            )
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _parameters(run: Run, trainable: Params, frozen: Params) -> str:
    """How many parameters train; before a vote, the head and the largest blocks it can pick."""
    trains, stays, most = finetune.count(trainable), finetune.count(frozen), ""
    if run.vote is not None:
        blocks = (finetune.count(trainable[name]) for name in finetune.block_names(run.model))
        unpicked = sum(sorted(blocks)[: -run.vote.number])
        trains, stays, most = trains - unpicked, stays + unpicked, "at most "
    return f"{most}{trains:,} trainable ({run.config.finetune}), {stays:,} frozen"


def _kind(run: Run) -> dict[str, Any]:
    spec = run.model.input
    if run.config.task == "causal_lm" and isinstance(spec, models.TextSpec):
        long = "windows of" if run.config.data.long_records == "split" else "cut to"
        return {"task": f"next token: {long} {spec.max_length:,} tokens of {spec.vocab_size:,}"}
    return {"classes": run.train.num_classes}


def _size(run: Run) -> str:
    train = run.train
    size = f"{len(train):,} (held out {len(run.test):,})"
    if isinstance(train, Units):
        parts = "records" if run.config.data.unit else "windows"
        size += (
            f": units by {run.config.data.unit or 'record'!r}, with {len(train.records):,} "
            f"{parts}, of which a step reads at most {train.limit} each"
        )
    return size


def _each(run: Run, fact: Callable[[TrainingPhase], str]) -> str:
    """A fact of every phase, where it differs from the phase before."""
    facts = [fact(phase) for phase in run.phases]
    return " then ".join(now for now, before in zip(facts, ["", *facts]) if now != before)


def _clipping(run: Run) -> str:
    """The clipping rule in words."""
    config, mechanism = run.config.dp, run.phases[0].mechanism
    words = f"{config.clipping}, bound {_each(run, lambda p: f'{p.bound:g}')}"
    if run.adaptive is not None and mechanism is not None:
        counts = _each(run, lambda p: f"{p.mechanism.count_noise:g}" if p.mechanism else "")
        words += (
            f" at first, then following the {run.adaptive.quantile:g} quantile of the norms, never "
            f"below {run.adaptive.lower_bound:g} (its count query, of noise {counts}, is accounted)"
        )
    return words + (", normalized to sensitivity 1" if config.normalized else ", not normalized")


def _cumulative_noise(run: Run) -> float:
    """sigma sqrt(T) over all phases."""
    squares = [p.mechanism.cumulative_noise**2 for p in run.phases if p.mechanism is not None]
    return math.sqrt(sum(squares))


def _engine(run: Run, trainable: Params, frozen: Params) -> str:
    """Says which engine clips, and how many of the parameters take which route through it."""
    one = run.train.batch(np.array([-1]), seed=0, step=0)  # padding: its shapes are enough
    one.pop("identity")
    example = {name: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for name, v in one.items()}
    example["key"] = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        return run.loss_fn(finetune.join(params, frozen), example)

    if run.config.dp.method == "vmap":
        return "vmap, as asked"
    shares = dp.route_shares(dp.bookkeeping.plan(loss, trainable, example), trainable)
    text = "bookkeeping, parameters by route: " + ", ".join(
        f"{route} {100 * share:.1f} %" for route, share in shares.items()
    )
    text += f"; memory {dp.estimate_memory(loss, trainable, example)}"
    if shares.get("direct", 0.0) > _LARGE_SHARE:
        text += " (direct is slow and takes memory for each example: see dp.explain)"
    return text


def _unit(run: Run) -> str:
    """Whom the guarantee protects, in words."""
    if not isinstance(run.train, Units):
        return "one training example"
    if run.config.data.unit is None:
        return "one training record, with all of its windows"
    return f"all training records of one unit, which data.unit={run.config.data.unit!r} names"


def ledger_after(run: Run, steps: int) -> dp.Ledger:
    """Returns the ledger of a run that has executed `steps` steps, phase after phase.

    What is beyond the last phase was spent on fitting the temperature. A vote comes before all
    steps, and is charged even if there are none.

    Raises:
        dp.BudgetExceeded: the budget does not cover them.
    """
    ledger = run.ledger
    if ledger is None:
        raise ValueError("a run without privacy has no ledger.")
    if run.vote is not None:
        ledger = ledger.charge(0)
    for index, planned in enumerate(ledger.phases):
        if run.vote is not None and index == 0:
            continue
        last = index == len(ledger.phases) - 1  # which refuses steps that nobody planned
        if now := steps if last else min(steps, planned.mechanism.steps):
            ledger = ledger.charge(index, now)
            steps -= now
    return ledger


def run_statement(run: Run, ledger: dp.Ledger) -> dict[str, Any]:
    """Returns the privacy statement of a run whose executed steps are in `ledger`."""
    config, private_evaluation = run.config, run.evaluates_on_private_data
    return dp.statement(
        ledger,
        clipping=_clipping(run),
        seed_policy="os_entropy" if config.private_seed is None else "fixed",
        unit=_unit(run),
        released=[
            "the trained parameters in weights.safetensors and in every checkpoint",
            "the number of executed steps"
            + ("" if private_evaluation else ", and every evaluation on public held-out data"),
            *(["the average of the parameters, in weights_ema.safetensors"] if config.ema else []),
            *(
                ["the clip bound of every step, clip_bound in metrics.jsonl"]
                if run.adaptive is not None
                else []
            ),
            *(
                ["the blocks that train and the noised votes for all of them, in vote.json"]
                if run.vote is not None
                else []
            ),
            *(
                ["the temperature in eval.json, fitted on a part of the data of its own"]
                if run.temperature is not None
                else []
            ),
        ],
        not_charged=[
            "rows named nonprivate/... in metrics.jsonl: losses, norms and sizes of private "
            "batches",
            "the choice of hyperparameters, if private data was used to make it",
            "the number of training examples, and what classes there are: both are taken as public",
            *(
                [
                    "the evaluations, and which checkpoints keep_best keeps by them: they are made "
                    "on a part of the private training split"
                ]
                if private_evaluation
                else []
            ),
            *(
                [
                    f"the choice of the training data, {run.train.split!r} with data.subset="
                    f"{config.data.subset}, which depends on more than each example by itself: "
                    "the guarantee is about the examples that were chosen"
                ]
                if config.data.subset is not None or "[" in run.train.split
                else []
            ),
            *(
                [
                    f"the weights that the run starts from, {config.model.weights}, which are "
                    "taken as public: if they were trained on this data, what that cost comes "
                    "on top"
                ]
                if config.model.weights is not None
                else []
            ),
            "private_seed.json: its readers can undo the noise. Keep it as secret as the data"
            if config.private_seed is None
            else "the private seed in config.json: anyone who reads it can undo the noise",
        ],
    )


def identity(run: Run, private_seed: int) -> dict[str, Any]:
    """Returns what this run may only be resumed with, as JSON values.

    Whatever decides batches, gradients or noise is in it: the same noise must never meet another
    sum. `config.MAY_CHANGE` lists the fields that are left out, and why. The code is compared too,
    but a difference only warns.
    """
    config = run.config.to_dict()
    weights, own = config["model"]["weights"], list(_modules(config))
    facts: dict[str, Any] = {
        "config": _without(config, {*MAY_CHANGE, "private_seed"}),
        # Keyed: a plain digest would show whether somebody's guess of the data is right.
        "data": seeds.fingerprint(private_seed, run.train.digest),
        "weights": weights and seeds.fingerprint(private_seed, sha256(locate(weights))),
        "code": code_digest(own),
        "num_examples": len(run.train),
        "phases": {
            f"{index}_{phase.name}": {
                "steps": phase.steps,
                "batch_size": phase.batch_size,
                "bound": phase.bound,
                "training": phase.training,
                "keep_optimizer": phase.keep_optimizer,
                **_law(phase.mechanism),
            }
            for index, phase in enumerate(run.phases)
        },
    }
    if run.vote is not None:
        facts["vote"] = {**_law(run.vote.mechanism), "number": run.vote.number}
    if run.temperature is not None:
        facts["temperature"] = {
            **_law(run.temperature.mechanism),
            "bound": run.temperature.bound,
            "data": seeds.fingerprint(private_seed, run.temperature.data.digest),
        }
    if run.rule is not None and run.ledger is not None:
        facts |= {
            "epsilon": run.ledger.epsilon,
            "delta": run.ledger.delta,
            "private_seed": seeds.fingerprint(private_seed),
            "clipping": {
                "function": "{0.__module__}:{0.__qualname__}".format(_named(run.rule.function)),
                "grouping": _named(run.rule.grouping).__name__,
                "adaptive": None if run.adaptive is None else run.adaptive._asdict(),
                "parameters": jax.tree.map(
                    lambda value: np.asarray(value).tolist(), run.rule.parameters
                ),
                "normalized": run.rule.normalized,
            },
        }
    return facts


def _named(function: Any) -> Any:
    """What gives a callable its name: below a `functools.partial`, and else perhaps its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def _without(section: Mapping[str, Any], fields: set[str], above: str = "") -> dict[str, Any]:
    """A section of a config without some fields, given by their dotted names."""
    return {
        name: _without(value, fields, f"{above}{name}.") if isinstance(value, dict) else value
        for name, value in section.items()
        if f"{above}{name}" not in fields
    }


def _modules(section: Mapping[str, Any]) -> Iterator[str]:
    """The modules of the user's that a config names, as in "module:function"."""
    for value in section.values():
        if isinstance(value, dict):
            yield from _modules(value)
        elif isinstance(value, str) and value.partition(":")[0] in sys.modules and ":" in value:
            yield value.partition(":")[0]


def _law(mechanism: dp.Mechanism | None) -> dict[str, Any]:
    """The fields of a mechanism as JSON values; the title separates samplers of equal fields."""
    if mechanism is None:
        return {}
    facts = dataclasses.asdict(mechanism)
    return {**facts, "sampler": {**facts["sampler"], "title": mechanism.sampler.title}}
