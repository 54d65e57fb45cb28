"""Batches of a run: which examples, in which order, and which of them this host reads."""

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
from dpjax.runtime.sharding import Layout
from dpjax.step import eval_step

__all__ = ["Chunk", "chunks", "evaluator"]


class Chunk(NamedTuple):
    """One physical chunk, ready for the devices.

    Attributes:
        batch: this host's rows.
        rows: rows of the whole step so far, padding included.
        last: whether it is the last of its step.
    """

    batch: dict[str, np.ndarray]
    rows: int
    last: bool


def chunks(
    run: Run, phase: Phase, layout: Layout, *, seed: int, size: int, steps: range
) -> Iterator[Chunk]:
    """Reads this host's rows of every physical chunk of some steps.

    Args:
        run: its data.
        phase: its mechanism draws the batches.
        layout: says which rows are this host's.
        seed: of the sampler, secret.
        size: examples in a chunk, over all hosts.
        steps: numbers of the steps, counted over all phases: no two phases share a draw.
    """
    mine = sharding.local_rows(size, layout.mesh)
    for step in steps:
        cut = dp.chunks(_indices(run, phase, seed, step), size)
        for number, chunk in enumerate(cut, start=1):
            indices = chunk[mine]
            batch = run.train.get(indices)
            batch["identity"] = run.train.identities(indices)
            batch["mask"] = indices >= 0
            yield Chunk(batch, rows=number * size, last=number == len(cut))


def _indices(run: Run, phase: Phase, seed: int, step: int) -> np.ndarray:
    if phase.mechanism is not None:
        return phase.mechanism.indices(seed, step)
    prob = phase.batch_size / len(run.train)
    return dp.sampling.poisson(seed, step, num_examples=len(run.train), sampling_prob=prob)


def evaluator(run: Run, layout: Layout, size: int) -> Callable[[Params], metrics.EvalSums]:
    """Returns the function that sums metrics over the whole held-out set, `size` rows at a time."""
    step = eval_step(run.apply, run.train.num_classes, layout)
    rows = sharding.local_rows(size, layout.mesh)

    def evaluate(params: Params) -> metrics.EvalSums:
        total = None
        for chunk in dp.chunks(np.arange(len(run.test)), size):
            mine = chunk[rows]
            batch = sharding.to_mesh({**run.test.get(mine), "mask": mine >= 0}, layout.mesh)
            sums = step(params, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise ValueError("the held-out set is empty.")
        return jax.device_get(total)

    return evaluate
