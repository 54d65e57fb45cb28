"""A random-access data set: labels in memory, inputs read by index."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Dataset", "Source", "distinct_rows", "from_arrays"]


class Source(NamedTuple):
    """Where the inputs of a split come from.

    Attributes:
        read: maps positions [n] in the split, possibly repeated, to inputs [n, ...]; raises a
            ValueError that names the position of an unreadable input.
        keys: a digest of each input, uint8 [examples, 16].
        dtype: of the inputs, uint8 for images and int32 for tokens.
    """

    read: Callable[[np.ndarray], np.ndarray]
    keys: np.ndarray
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labeled examples with random access; immutable.

    Attributes:
        name: the data set's name.
        split: the split expression it was read from, e.g. "train+validation".
        labels: int32 [examples], each in [0, num_classes).
        class_names: one name per class.
        shape: of one input, (H, W, C) for images and (L,) for tokens.
        rows: int64 [examples], positions in the split as read: 0, 1, 2, ... unless examples were
            selected, for example by `subset` or `holdout`.
        source: where the inputs come from.
        units: whose data each example is, [examples] names or numbers; None if it was not stored.

    Raises:
        ValueError: if a label is no integer or outside [0, num_classes), or lengths disagree.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: np.ndarray
    source: Source
    units: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.labels.shape != self.rows.shape:
            raise ValueError(
                f"labels of shape {self.labels.shape} must be one per example, {self.rows.shape}."
            )
        if self.units is not None and self.units.shape != self.rows.shape:
            raise ValueError(f"units of shape {self.units.shape} must be {self.rows.shape}.")
        if self.labels.size == 0:
            raise ValueError(f"split={self.split!r} of {self.name!r} has no examples.")
        if self.labels.dtype.kind not in "iu":  # a cast would cut 0.9, and NaN is nothing
            raise ValueError(f"labels of dtype {self.labels.dtype} must be integers.")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if wrong.size:
            first = int(wrong[0])
            raise ValueError(
                f"label={int(self.labels[first])} of example {int(self.rows[first])} in "
                f"{self.name!r} split {self.split!r} must be in [0, {self.num_classes}); "
                f"{wrong.size} labels are out of range."
            )
        for field, dtype in (("labels", np.int32), ("rows", np.int64)):
            value = np.array(getattr(self, field), dtype)
            value.setflags(write=False)
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, split={self.split!r}, examples={len(self)}, "
            f"classes={self.num_classes}, shape={self.shape})"
        )

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has an example here."""
        return len(self.class_names)

    @property
    def keys(self) -> np.ndarray:
        """A digest of each input, uint8 [examples, 16]."""
        return self.source.keys[self.rows]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the labels and stored inputs, in order; it does not depend on their path."""
        digest = hashlib.sha256(repr((self.shape, self.num_classes)).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(np.ascontiguousarray(self.keys).tobytes())
        return digest.hexdigest()

    def identities(self, indices: np.ndarray) -> np.ndarray:
        """Returns 32 bits of each input's digest, uint32: the same at any position.

        Args:
            indices: integers [n], each in [-1, num_examples); -1 is padding.
        """
        keys = self.source.keys[self.rows[np.maximum(indices, 0)]]
        return np.ascontiguousarray(keys[:, :4]).view("<u4")[:, 0].astype(np.uint32)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples by index; -1 is padding.

        Args:
            indices: integers of any shape, each in [-1, num_examples).

        Returns:
            {"input": [*indices.shape, *shape], "label": int32 [*indices.shape]}; zeros at padding.

        Raises:
            ValueError: an index is out of range, or an input is unreadable (the message names it).
        """
        indices = np.asarray(indices)
        if indices.dtype.kind not in "iu":
            raise ValueError(f"indices of dtype {indices.dtype} must be integers.")
        flat = indices.reshape(-1).astype(np.int64)
        wrong = flat[(flat < -1) | (flat >= len(self))]
        if wrong.size:
            raise ValueError(f"index={int(wrong[0])} must be in [-1, {len(self)}).")
        real = np.flatnonzero(flat >= 0)
        inputs = np.zeros((flat.size, *self.shape), self.source.dtype)
        labels = np.zeros(flat.size, np.int32)
        if real.size:
            inputs[real] = self.source.read(self.rows[flat[real]])
            labels[real] = self.labels[flat[real]]
        return {
            "input": inputs.reshape(*indices.shape, *self.shape),
            "label": labels.reshape(indices.shape),
        }

    def batch(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """Reads examples for one step: those of `get`, and their `identity`, uint32 [n].

        Args:
            indices: integers [n], each in [-1, num_examples); -1 is padding.
            seed: not used: an example is the same in every step. `Units` choose records with it.
            step: not used either.
        """
        return {**self.get(indices), "identity": self.identities(indices)}

    def select(self, indices: np.ndarray) -> Dataset:
        """Returns a data set of some of the examples, in the given order.

        Args:
            indices: integers [n], each in [0, num_examples), all different: an example that
                occurs twice would be clipped twice and could contribute twice the bound.

        Raises:
            ValueError: an index is out of range or repeated.
        """
        indices = distinct_rows(indices, len(self))
        return dataclasses.replace(
            self,
            labels=self.labels[indices],
            rows=self.rows[indices],
            units=None if self.units is None else self.units[indices],
        )


def splits_overlap(one: str, other: str) -> bool:
    """Whether two split expressions, such as "train[:80%]", may share an example.

    It compares names only: "train[:50%]" and "train[50%:]" are reported as overlapping.
    """
    parts = (re.sub(r"\[.*?\]", "", split).split("+") for split in (one, other))
    first, second = ({part.strip() for part in some} for some in parts)
    return bool(first & second) or "all" in first | second


def from_arrays(
    name: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    split: str = "train",
    units: np.ndarray | None = None,
) -> Dataset:
    """Returns a data set of arrays in memory.

    Args:
        name: name of the data set.
        inputs: uint8 [examples, H, W, C] or int32 [examples, L].
        labels: integers [examples].
        class_names: one name per class.
        split: name of the split. Data sets of one name whose splits share a name count as one
            split: evaluations on it are then logged as `nonprivate/...`.
        units: whose data each example is, [examples] names or numbers.

    Raises:
        ValueError: a wrong dtype or rank, or a label out of range.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if (inputs.dtype, inputs.ndim) not in ((np.dtype(np.uint8), 4), (np.dtype(np.int32), 2)):
        raise ValueError(
            f"inputs of dtype {inputs.dtype} and shape {inputs.shape} must be uint8 [n, H, W, C] "
            "or int32 [n, L]."
        )
    if len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels must be equal in number.")
    digests = [hashlib.sha256(np.ascontiguousarray(item).tobytes()).digest() for item in inputs]
    keys = np.frombuffer(b"".join(d[:16] for d in digests), np.uint8).reshape(-1, 16)
    return Dataset(
        name=name,
        split=split,
        labels=labels,
        class_names=tuple(class_names),
        shape=tuple(inputs.shape[1:]),
        rows=np.arange(len(labels)),
        source=Source(lambda rows: inputs[rows], keys, inputs.dtype),
        units=None if units is None else np.asarray(units),
    )


def distinct_rows(indices: np.ndarray, length: int) -> np.ndarray:
    """Returns indices as int64, each in [0, length) and all different.

    Raises:
        ValueError: an index is out of range or repeated. An example that occurs twice would be
            clipped twice and could contribute twice the bound.
    """
    indices = np.asarray(indices, np.int64)
    wrong = indices[(indices < 0) | (indices >= length)]
    if wrong.size:
        raise ValueError(f"index={int(wrong[0])} must be in [0, {length}).")
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices must all be different; an example is repeated.")
    return indices
