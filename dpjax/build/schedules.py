"""Batch size and clip bound over the epochs, and the phases into which they cut a run.

A schedule is a tuple of (fraction of the epochs at which a value begins, value). A step reads B
examples on average, so a stage that covers a share f of the epochs E at batch size B has about
f E N / B steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpjax.build import planner
from dpjax.build.optimizer import optimizer
from dpjax.build.privacy import with_noise
from dpjax.build.run import TrainingPhase
from dpjax.dp.sampling import whole_steps
from dpjax.models import Params, finetune

__all__ = ["Schedule", "Stage", "batch_sizes", "bounds", "check", "phases", "stages", "values"]

Schedule = Sequence[tuple[float, Any]]


class Stage(NamedTuple):
    """A stretch of constant batch size and clip bound.

    Attributes:
        begin: fraction of the epochs at which it begins.
        steps: number of steps, at least 1.
        batch_size: expected batch size B.
        bound: clip bound C.
    """

    begin: float
    steps: int
    batch_size: int
    bound: float


def values(field: str, schedule: Any) -> Schedule:
    """Checks a schedule and returns it.

    Raises:
        ValueError: it is not one, naming the field.
    """
    try:
        pairs = tuple((float(begin), value) for begin, value in schedule)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{field}={schedule!r} must hold pairs (fraction of the epochs, value)."
        ) from error
    begins = [begin for begin, _ in pairs]
    rising = all(a < b for a, b in itertools.pairwise(begins))
    if not pairs or begins[0] != 0 or not rising or not begins[-1] < 1:
        raise ValueError(f"{field}={schedule!r} must begin at 0.0 and rise within [0, 1).")
    for _, value in pairs:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{field}={schedule!r} must have values > 0.")
    return pairs


def stages(
    *,
    num_examples: int,
    epochs: float,
    batch_sizes: Schedule,
    bounds: Schedule,
    cuts: Sequence[float] = (),
    whole_epochs: bool = False,
) -> tuple[Stage, ...]:
    """Cuts a run wherever its batch size or its bound changes, and at `cuts`.

    Args:
        num_examples: N.
        epochs: E, over all stages.
        batch_sizes: schedule of B.
        bounds: schedule of C.
        cuts: further fractions of the epochs at which a stage ends.
        whole_epochs: an epoch has round(N / B) steps in place of N / B, as random allocation does.

    Returns:
        The stages that have a step, in order. Ends are rounded to whole steps, not lengths, so the
        number of steps is that of the whole run: with a constant B, T = round(E N / B), at least 1.

    Raises:
        ValueError: a value of a schedule lasts less than one step.

    >>> [s.steps for s in stages(num_examples=1000, epochs=10, batch_sizes=((0.0, 50), (0.5, 100)),
    ...                          bounds=((0.0, 1.0),))]
    [100, 50]
    """

    def at(schedule: Schedule, fraction: float) -> Any:
        return [value for begin, value in schedule if begin <= fraction][-1]

    begins = sorted({begin for begin, _ in [*batch_sizes, *bounds]} | {c for c in cuts if c < 1})
    made: list[Stage] = []
    passed, end = 0.0, 0
    for begin, until in zip(begins, [*begins[1:], 1.0]):
        size = at(batch_sizes, begin)
        per_epoch = whole_steps(num_examples, size) if whole_epochs else num_examples / size
        passed += (until - begin) * epochs * per_epoch
        start, end = end, round(passed)
        if until == 1.0:
            end = max(end, 1)
        if end > start:
            made.append(Stage(begin, end - start, size, at(bounds, begin)))
    for field, schedule in (("batch_size_schedule", batch_sizes), ("dp.bound_schedule", bounds)):
        for (begin, value), until in zip(schedule, [*[b for b, _ in schedule[1:]], 1.0]):
            if not any(begin <= stage.begin < until for stage in made):
                raise ValueError(
                    f"{field}={tuple(schedule)}: {value} lasts less than one step, from "
                    f"{begin:g} to {until:g} of {epochs:g} epochs."
                )
    return tuple(made)


def bounds(config: ConfigDict) -> Schedule:
    """Returns the schedule of the clip bound; without privacy there is none, and it is 1."""
    return ((0.0, 1.0),) if config.dp is None else _schedule("dp.bound", config.dp)


def batch_sizes(
    config: ConfigDict, num_examples: int | None
) -> tuple[Schedule, planner.Plan | None]:
    """Returns the schedule of B, and the plan it comes from if the config says "auto".

    Args:
        config: of the run.
        num_examples: N; None before the data is opened, to check what does not depend on it.
    """
    plan, sizes = None, _schedule("batch_size", config)
    if config.batch_size == "auto":
        if config.batch_size_schedule:
            raise ValueError("batch_size='auto' and batch_size_schedule exclude each other.")
        if config.dp is None:
            raise ValueError("batch_size='auto' plans for a privacy budget, but dp=None has none.")
        if config.dp.sampler not in planner.SAMPLERS:
            raise ValueError(
                f"batch_size='auto' plans for dp.sampler in {planner.SAMPLERS}, got "
                f"{config.dp.sampler!r}."
            )
        if num_examples is None:
            return sizes, None
        budget = (config.epochs, config.dp.epsilon, config.dp.delta)
        plan = planner.plan(num_examples, *budget, samplers=(config.dp.sampler,))
        sizes = ((0.0, plan.batch_size),)
    for _, size in sizes:
        whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not whole or not 1 <= size <= (num_examples or math.inf):
            raise ValueError(
                f"batch_size={size!r} must be 'auto' or a whole number in 1..{num_examples or 'N'}"
                ", the training examples."
            )
    return sizes, plan


def _schedule(field: str, config: ConfigDict) -> Schedule:
    name = field.split(".")[-1]
    if not config[f"{name}_schedule"]:
        return ((0.0, config[name]),)
    return values(f"{field}_schedule", config[f"{name}_schedule"])


def check(config: ConfigDict, num_examples: int | None) -> None:
    """Refuses schedules, probing and a warm-up that so many examples, or fewer, leave no steps for.

    Args:
        config: of the run.
        num_examples: as many as there can be; None: that is not known yet.
    """
    sizes, _ = batch_sizes(config, None)
    if num_examples is None or config.batch_size == "auto":
        return
    batch_sizes(config, num_examples)
    for training in _two_trainings(config, sizes, num_examples):
        if training:
            steps = sum(stage.steps for stage in training)
            optimizer(config.optimizer, steps, private=config.dp is not None)


def _two_trainings(
    config: ConfigDict, sizes: Schedule, num_examples: int
) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Cuts a run into the stages that probe the head and those that train after it."""
    cut = stages(
        num_examples=num_examples,
        epochs=config.epochs,
        batch_sizes=sizes,
        bounds=bounds(config),
        cuts=[config.lp.fraction],
        whole_epochs=config.dp is not None and config.dp.sampler == "random_allocation",
    )
    probing = tuple(stage for stage in cut if stage.begin < config.lp.fraction)
    fraction, steps = config.lp.fraction, sum(stage.steps for stage in cut)
    if (fraction > 0 and not probing) or (fraction < 1 and len(probing) == len(cut)):
        raise ValueError(
            f"lp.fraction={fraction} of {steps} steps leaves none to "
            f"{'the head' if not probing else 'finetune'}: take more steps, or another fraction."
        )
    return probing, cut[len(probing) :]


def phases(
    config: ConfigDict,
    tuning: finetune.FineTuning,
    sizes: Schedule,
    num_examples: int,
    params: Params | None = None,
) -> tuple[TrainingPhase, ...]:
    """Returns the phases of a run; those of a private one compose to no more than its budget.

    Args:
        config: of the run.
        tuning: what trains after linear probing.
        sizes: the schedule of the batch size.
        num_examples: N.
        params: all parameters; only secure noise needs them.
    """
    probing, tuning_stages = _two_trainings(config, sizes, num_examples)
    rate = config.lp.learning_rate or config.optimizer.learning_rate
    in_head = finetune.head()(tuning.model).trainable
    keep = config.lp.keep_optimizer and bool(probing and tuning_stages)
    planned = [
        ("linear-probe", in_head, probing, rate, False),
        ("train", tuning.trainable, tuning_stages, config.optimizer.learning_rate, keep),
    ]
    made: list[TrainingPhase] = []
    for name, trainable, mine, base, keeps in planned:
        if not mine:
            continue
        total = sum(stage.steps for stage in mine)
        factory = optimizer(
            config.optimizer, total, private=config.dp is not None, kept=in_head if keep else None
        )
        training = made[-1].training + 1 if made else 0
        made += [
            TrainingPhase(
                name=name if len(mine) == 1 else f"{name} {number}",
                training=training,
                trainable=trainable,
                steps=stage.steps,
                batch_size=stage.batch_size,
                bound=stage.bound,
                mechanism=None,
                optimizer=factory,
                learning_rate=base,
                keep_optimizer=keeps,
            )
            for number, stage in enumerate(mine, start=1)
        ]
    return tuple(made) if config.dp is None else with_noise(config, made, num_examples, params)
