"""User-level privacy: a data set whose examples are units, each with many records.

A *unit* is what the guarantee protects as a whole, such as a person with all their photos. A
batch is a sample of units. In a step, a unit is represented by at most `limit` of its records; its
loss is their mean, and its gradient is clipped once, so that all its records together have the
influence of one example. With one record per unit this is the ordinary record-level run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from dpjax.data.dataset import Dataset, distinct_rows

__all__ = ["Units"]

_RECORDS = 0x7265636F  # no sampler's stream begins with this word after its step


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Units:
    """Units with random access: like a `Dataset` of which each example is a unit.

    Attributes:
        records: the labeled records of all units; `records.units` names the unit of each.
        limit: the most records of a unit that one step reads, >= 1.

    Guarantees:
        What a step reads of a unit depends on the seed, the step and that unit's own records alone:
        adding or removing a unit changes nothing about any other.

    Raises:
        ValueError: `limit` is below 1, or the records do not say whose they are.
    """

    records: Dataset
    limit: int

    def __post_init__(self) -> None:
        whole = isinstance(self.limit, (int, np.integer)) and not isinstance(self.limit, bool)
        if not whole or self.limit < 1:
            raise ValueError(f"unit_records={self.limit!r} must be a whole number >= 1.")
        if self.records.units is None:
            raise ValueError(f"{self.records!r} does not say whose data a record is.")

    @functools.cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records ordered by unit, [records]; where each unit begins, [units + 1]; unit digests."""
        names, inverse, counts = np.unique(
            np.asarray(self.records.units).astype(str), return_inverse=True, return_counts=True
        )
        order = np.argsort(inverse.reshape(-1), kind="stable")
        digests = [hashlib.sha256(b"unit " + name.encode()).digest()[:16] for name in names]
        keys = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        return order, np.concatenate([[0], np.cumsum(counts)]), keys

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Units({len(self)} of at most {self.limit} records a step, of {self.records!r})"

    name = property(lambda self: self.records.name)
    split = property(lambda self: self.records.split)
    class_names = property(lambda self: self.records.class_names)
    num_classes = property(lambda self: self.records.num_classes)
    shape = property(lambda self: self.records.shape)
    source = property(lambda self: self.records.source)

    @property
    def num_examples(self) -> int:
        """Number of units."""
        return len(self)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the records, of whose each is, and of the limit."""
        order, starts, keys = self._groups
        digest = hashlib.sha256(f"{self.limit} {self.records.digest}".encode())
        for part in (order.astype("<i8"), starts.astype("<i8"), keys):
            digest.update(part.tobytes())
        return digest.hexdigest()

    @property
    def keys(self) -> np.ndarray:
        """A digest of each unit's name, uint8 [units, 16]."""
        return self._groups[2]

    def identities(self, indices: np.ndarray) -> np.ndarray:
        """Returns 32 bits of each unit's key, uint32 [n]; -1 is padding."""
        keys = self.keys[np.maximum(indices, 0)]
        return np.ascontiguousarray(keys[:, :4]).view("<u4")[:, 0].astype(np.uint32)

    def counts(self) -> np.ndarray:
        """Returns the number of records of each unit, int64 [units]."""
        return np.diff(self._groups[1])

    def select(self, indices: np.ndarray) -> Units:
        """Returns some of the units, with all their records.

        Args:
            indices: integers [n], each in [0, units), all different.

        Raises:
            ValueError: an index is out of range or repeated.
        """
        order, starts, _ = self._groups
        indices = distinct_rows(indices, len(self))
        rows = np.sort(np.concatenate([order[starts[i] : starts[i + 1]] for i in indices]))
        return Units(self.records.select(rows), self.limit)

    def rows(self, indices: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """Chooses the records that represent units in a step.

        Args:
            indices: units [n], each in [-1, units); -1 is padding.
            seed: of the choice.
            step: number of the step.

        Returns:
            int64 [n, limit], -1 where a unit has no more records. Of a unit with more than `limit`,
            they are a uniform choice without replacement.
        """
        order, starts, keys = self._groups
        chosen_rows = np.full((len(indices), self.limit), -1, np.int64)
        for place, unit in enumerate(np.asarray(indices)):
            if unit < 0:
                continue
            members = order[starts[unit] : starts[unit + 1]]
            if len(members) > self.limit:
                # A generator of the unit's own: with a shared one, another unit's draw would shift
                # this one's choice, and a removed unit would change other gradients.
                words = np.frombuffer(keys[unit].tobytes(), np.uint32).tolist()
                draw = np.random.Generator(
                    np.random.Philox(np.random.SeedSequence([seed, step, _RECORDS, *words]))
                )
                members = members[np.sort(draw.choice(len(members), self.limit, replace=False))]
            chosen_rows[place, : len(members)] = members
        return chosen_rows

    def batch(self, indices: np.ndarray, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """Reads units for one step.

        Args:
            indices: units [n], each in [-1, units); -1 is padding.
            seed: of the choice of records.
            step: number of the step.

        Returns:
            {"input": [n, limit, *shape], "label": int32 [n, limit], "record": bool [n, limit],
            "identity": uint32 [n]}; `record` is False where a unit has no more records.
        """
        rows = self.rows(indices, seed=seed, step=step)
        return {
            **self.records.get(rows),
            "record": rows >= 0,
            "identity": self.identities(indices),
        }
