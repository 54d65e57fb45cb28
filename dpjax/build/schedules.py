"""Piecewise constant values over a run, cut into stages in which nothing changes.

A schedule is a tuple of (fraction of the epochs at which a value begins, value). A step reads B
examples on average, so a stage that covers a share f of the epochs E at batch size B has about
f E N / B steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Schedule", "Stage", "stages", "values"]

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
) -> tuple[Stage, ...]:
    """Cuts a run wherever its batch size or its bound changes, and at `cuts`.

    Args:
        num_examples: N.
        epochs: E, over all stages.
        batch_sizes: schedule of B.
        bounds: schedule of C.
        cuts: further fractions of the epochs at which a stage ends.

    Returns:
        The stages that have a step, in order. Ends are rounded to whole steps, not lengths, so the
        number of steps is that of the whole run: with a constant B, T = round(E N / B), at least 1.

    Raises:
        ValueError: a value of a schedule would not see a single step.

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
        passed += (until - begin) * epochs * num_examples / size
        start, end = end, round(passed)
        if until == 1.0:
            end = max(end, 1)
        if end > start:
            made.append(Stage(begin, end - start, size, at(bounds, begin)))
    for field, schedule in (("batch_size_schedule", batch_sizes), ("dp.bound_schedule", bounds)):
        for (begin, value), until in zip(schedule, [*[b for b, _ in schedule[1:]], 1.0]):
            if not any(begin <= stage.begin < until for stage in made):
                raise ValueError(
                    f"{field}={tuple(schedule)}: {value} would not see a single step, from "
                    f"{begin:g} to {until:g} of {epochs:g} epochs."
                )
    return tuple(made)
