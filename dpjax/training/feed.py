"""Batches of a run: which examples each step draws, and which of them this host reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp, metrics
from dpjax.build import TrainingPhase
from dpjax.data import Dataset, Units
from dpjax.models import Params
from dpjax.runtime import sharding
from dpjax.runtime.sharding import Layout
from dpjax.step import Batch, draws, eval_step

__all__ = ["Chunk", "Evaluator", "physical_chunks"]


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


def physical_chunks(
    train: Dataset | Units,
    phase: TrainingPhase,
    layout: Layout,
    *,
    seed: int,
    size: int,
    steps: range,
    first: int = 0,
) -> Iterator[Chunk]:
    """Yields this host's rows of every physical chunk of some steps.

    Args:
        train: the training data.
        layout: determines which rows this host reads.
        phase: its mechanism draws the batches.
        seed: the sampler's secret seed.
        size: rows of a chunk, over all hosts.
        steps: step numbers, counted over all phases, so that no two phases share a draw.
        first: number of the phase's first step.
    """
    local_rows = sharding.local_rows(size, layout.mesh)
    draw = draws(
        phase.mechanism, seed, num_examples=len(train), batch_size=phase.batch_size, first=first
    )
    for step in steps:
        # Every host draws the whole batch, from the same seed, and reads its own rows only.
        step_chunks = dp.chunks(draw(step), size)
        for number, chunk in enumerate(step_chunks, start=1):
            indices = chunk[local_rows]
            batch = train.batch(indices, seed=seed, step=step)
            batch["mask"] = indices >= 0  # -1 is padding
            yield Chunk(batch, rows=number * size, last=number == len(step_chunks))


_eval_step = functools.lru_cache(maxsize=2)(eval_step)  # runs of one study share it


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Sums metrics over the whole held-out set.

    Attributes:
        apply: `(params, inputs) -> logits`, or `metrics.TokenFacts`.
        test: the held-out set.
        num_classes: number of classes of the labels.
        layout: determines which rows this host reads.
        size: rows at a time, over all hosts.
    """

    apply: Callable[[Params, jax.Array], Any]
    test: Dataset
    num_classes: int
    layout: Layout
    size: int

    @functools.cached_property
    def _step(self) -> Callable[[Params, Batch], Any]:
        return _eval_step(self.apply, self.num_classes, self.layout)

    def __call__(self, params: Params) -> metrics.EvalSums | metrics.TokenSums:
        mesh, total = self.layout.mesh, None  # of the chunks, of which there is one at least
        local_rows = sharding.local_rows(self.size, mesh)
        for chunk in dp.chunks(np.arange(len(self.test)), self.size):
            indices = chunk[local_rows]
            batch = sharding.to_mesh({**self.test.get(indices), "mask": indices >= 0}, mesh)
            sums = self._step(params, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return jax.device_get(total)
