"""What the devices are fed: batches of training, and the held-out set of an evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp, metrics
from dpjax.build import Phase
from dpjax.data import Dataset
from dpjax.models import Params
from dpjax.runtime import sharding
from dpjax.runtime.sharding import Layout
from dpjax.step import Batch, eval_step

__all__ = ["Chunk", "Evaluator", "physical_chunks"]


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


def physical_chunks(
    train: Dataset, phase: Phase, layout: Layout, *, seed: int, size: int, steps: range
) -> Iterator[Chunk]:
    """Reads this host's rows of every physical chunk of some steps.

    Args:
        train: the training data.
        phase: its mechanism draws the batches.
        layout: says which rows are this host's.
        seed: of the sampler, secret.
        size: examples in a chunk, over all hosts.
        steps: numbers of the steps, counted over all phases: no two phases share a draw.
    """
    local_rows = sharding.local_rows(size, layout.mesh)
    for step in steps:
        cut = dp.chunks(_indices(phase, len(train), seed, step), size)
        for number, chunk in enumerate(cut, start=1):
            indices = chunk[local_rows]
            batch = train.get(indices)
            batch["identity"] = train.identities(indices)
            batch["mask"] = indices >= 0
            yield Chunk(batch, rows=number * size, last=number == len(cut))


def _indices(phase: Phase, num_examples: int, seed: int, step: int) -> np.ndarray:
    if phase.mechanism is not None:
        return phase.mechanism.indices(seed, step)
    prob = phase.batch_size / num_examples
    return dp.sampling.poisson(seed, step, num_examples=num_examples, sampling_prob=prob)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Sums metrics over the whole held-out set.

    Attributes:
        apply: `(params, inputs) -> logits`.
        test: the held-out set.
        num_classes: of the labels.
        layout: says which rows are this host's.
        size: rows at a time, over all hosts.
    """

    apply: Callable[[Params, jax.Array], jax.Array]
    test: Dataset
    num_classes: int
    layout: Layout
    size: int

    @functools.cached_property
    def _step(self) -> Callable[[Params, Batch], metrics.EvalSums]:
        return eval_step(self.apply, self.num_classes, self.layout)

    def __call__(self, params: Params) -> metrics.EvalSums:
        mesh, total = self.layout.mesh, None
        rows = sharding.local_rows(self.size, mesh)
        for chunk in dp.chunks(np.arange(len(self.test)), self.size):
            indices = chunk[rows]
            batch = sharding.to_mesh({**self.test.get(indices), "mask": indices >= 0}, mesh)
            sums = self._step(params, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise ValueError("the held-out set is empty.")
        return jax.device_get(total)
