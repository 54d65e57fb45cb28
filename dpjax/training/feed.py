"""Batches of a run: which examples each step draws, and which of them this host reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp, metrics
from dpjax.build import Phase, Run
from dpjax.models import Params
from dpjax.runtime import sharding
from dpjax.step import draws, eval_step

__all__ = ["Chunk", "chunks", "evaluator"]


class Chunk(NamedTuple):
    """One physical chunk, ready for the devices.

    Attributes:
        batch: this host's rows.
        rows: rows of the step so far, over all hosts, padding included.
        last: whether this is the last chunk of its step.
    """

    batch: dict[str, np.ndarray]
    rows: int
    last: bool


def chunks(run: Run, phase: Phase, *, seed: int, size: int, steps: range) -> Iterator[Chunk]:
    """Yields this host's rows of every physical chunk of some steps.

    Args:
        run: provides the training data, and the layout that determines which rows this host reads.
        phase: its mechanism draws the batches.
        seed: the sampler's secret seed.
        size: rows of a chunk, over all hosts.
        steps: step numbers, counted over all phases, so that no two phases share a draw.
    """
    local_rows = sharding.local_rows(size, run.layout.mesh)
    draw = draws(phase.mechanism, seed, num_examples=len(run.train), batch_size=phase.batch_size)
    for step in steps:
        # Every host draws the whole batch, from the same seed, and reads its own rows only.
        step_chunks = dp.chunks(draw(step), size)
        for number, chunk in enumerate(step_chunks, start=1):
            indices = chunk[local_rows]
            batch = run.train.get(indices)
            batch["identity"] = run.train.identities(indices)
            batch["mask"] = indices >= 0  # -1 is padding
            yield Chunk(batch, rows=number * size, last=number == len(step_chunks))


def evaluator(run: Run, size: int) -> Callable[[Params], metrics.EvalSums]:
    """Returns a function that sums metrics over the held-out set, `size` rows at a time."""
    step = eval_step(run.apply, run.train.num_classes, run.layout)
    local_rows = sharding.local_rows(size, run.layout.mesh)

    def evaluate(params: Params) -> metrics.EvalSums:
        total = None
        for chunk in dp.chunks(np.arange(len(run.test)), size):
            indices = chunk[local_rows]
            inputs = {**run.test.get(indices), "mask": indices >= 0}
            batch = sharding.to_mesh(inputs, run.layout.mesh)
            sums = step(params, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise ValueError("the held-out set is empty.")
        return jax.device_get(total)

    return evaluate
