"""Batches for a private loop of your own: gathered with their mask, charged as they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.dp import seeds
from dpjax.dp.ledger import Ledger
from dpjax.dp.sampling import chunks

__all__ = ["Steps", "take"]

PyTree = Any
Parts = Iterator[tuple[PyTree, np.ndarray]]


def take(data: PyTree, indices: np.ndarray) -> tuple[PyTree, np.ndarray]:
    """Gathers examples, and the mask that says which of them are padding.

    Plain indexing would take -1, which pads a chunk, for the last example: unsampled, it would be
    counted once for every row of padding.

    Args:
        data: arrays `[examples, ...]`, all with the same number of examples.
        indices: integers `[chunk]`, each in [-1, examples); -1 is padding, as in `chunks`.

    Returns:
        The rows, zeros at padding, and bool `[chunk]`, False at padding: what `clipped_sum` takes.

    Raises:
        ValueError: an index is out of range, or the arrays disagree in length.

    >>> take({"x": np.array([5, 6, 7])}, np.array([2, 0, -1]))
    ({'x': array([7, 5, 0])}, array([ True,  True, False]))
    """
    indices = np.asarray(indices)
    size = _length(data)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"indices of {indices.dtype} {indices.shape} must be integers [chunk].")
    wrong = indices[(indices < -1) | (indices >= size)]
    if wrong.size:  # jax would clamp it
        raise ValueError(f"index={int(wrong[0])} must be in [-1, {size}).")
    mask = indices >= 0
    rows = np.where(mask, indices, 0)

    def gather(leaf: Any) -> Any:
        numpy: Any = jnp if isinstance(leaf, jax.Array) else np
        leaf = numpy.asarray(leaf)
        keep = mask.reshape(-1, *[1] * (leaf.ndim - 1))
        return numpy.where(keep, leaf[rows], numpy.zeros((1,) * leaf.ndim, leaf.dtype))

    return jax.tree.map(gather, data), mask


class Steps:
    """The steps of a phase that are left: each is charged to the ledger before it is yielded.

    Iterating yields `(step, parts)`, where `parts` iterates once over the `(batch, mask)` of the
    step's physical chunks, each for one call of a `clipped_sum`; an empty batch has one chunk of
    padding. The number of the step counts over all phases.

    Args:
        ledger: of the run. To resume, one that was charged for the steps that ran: iteration goes
            on after them.
        data: arrays `[examples, ...]` of the private examples.
        private_seed: secret integer of 256 bits, see `seeds.draw_private_seed`.
        chunk_size: examples at once.
        phase: number of the phase in the ledger.

    Attributes:
        ledger: charged for all steps that were yielded; `statement` takes it.

    Guarantees:
        No step is yielded that the ledger does not cover, and no two steps share a draw.

    Raises:
        ValueError: the number of examples is not the mechanism's, or an argument is out of range.
    """

    def __init__(
        self, ledger: Ledger, data: PyTree, *, private_seed: int, chunk_size: int, phase: int = 0
    ) -> None:
        self.ledger = ledger
        if not 0 <= phase < len(ledger.phases):
            raise ValueError(f"phase={phase} must be in 0..{len(ledger.phases) - 1}.")
        self._data, self._phase, self._size = data, phase, chunk_size
        self._seed = seeds.sampler_seed(private_seed)
        self._first = sum(p.mechanism.steps for p in ledger.phases[:phase])
        planned = ledger.phases[phase].mechanism.num_examples
        if _length(data) != planned:
            raise ValueError(
                f"{_length(data)} examples of data must be num_examples={planned}, for which the "
                "mechanism was planned."
            )
        chunks(np.arange(0), chunk_size)  # raises

    def __iter__(self) -> Iterator[tuple[int, Parts]]:
        return self

    def __next__(self) -> tuple[int, Parts]:
        phase = self.ledger.phases[self._phase]
        if phase.steps_done == phase.mechanism.steps:
            raise StopIteration
        step = self._first + phase.steps_done
        drawn = phase.mechanism.indices(self._seed, step, first=self._first)
        self.ledger = self.ledger.charge(self._phase)
        return step, (take(self._data, chunk) for chunk in chunks(drawn, self._size))

    def __len__(self) -> int:
        phase = self.ledger.phases[self._phase]
        return phase.mechanism.steps - phase.steps_done


def _length(data: PyTree) -> int:
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1:
        raise ValueError(f"arrays of lengths {sorted(lengths)} must have one number of examples.")
    return int(lengths.pop())
