"""Features and labels in memory, and what may be done to the features of one example.

Every operation here maps each example on its own, so none of them touches privacy.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dpjax.data import distinct_rows

__all__ = ["FeatureSet", "average", "concatenate", "normalize"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureSet:
    """Features and labels of a data set, in memory and in its order.

    Attributes:
        values: float32 `[examples, width]`. An example of which one is not finite contributes zero
            to every clipped sum.
        labels: int32 `[examples]`, each in [0, num_classes).
        num_classes: number of classes, whether or not each has an example.
        name: of the data set.

    Raises:
        ValueError: shapes that do not fit, no example, or a label out of range.
    """

    values: np.ndarray
    labels: np.ndarray
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float32)
        labels = np.asarray(self.labels, np.int32)
        if values.ndim != 2 or labels.shape != values.shape[:1] or 0 in values.shape:
            raise ValueError(
                f"values of shape {values.shape} and labels of shape {labels.shape} must be "
                "[examples, width] and [examples], with at least one of each."
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels from {labels.min()} to {labels.max()} must be in [0, {self.num_classes})."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"FeatureSet({self.name!r}, examples={len(self)}, width={self.width})"

    @property
    def width(self) -> int:
        """Number of features of an example."""
        return int(self.values.shape[1])

    def select(self, indices: np.ndarray) -> FeatureSet:
        """The feature set of some different examples, in the order given.

        Raises:
            ValueError: an index is out of range or repeated: an example that occurred twice would
                contribute up to twice the clip bound.
        """
        indices = distinct_rows(indices, len(self))
        return dataclasses.replace(self, values=self.values[indices], labels=self.labels[indices])


def normalize(features: FeatureSet, *, center: bool = False, scale: float = 1.0) -> FeatureSet:
    """Gives the features of every example the same L2 norm (a zero vector stays zero).

    What happens to one example depends on that example alone, so privacy is not touched.

    Args:
        features: of any norm.
        center: subtract from each example the mean of its own features first, as layer
            normalization does. It removes most of the large mean that features after a ReLU share.
        scale: the norm. The gradient of a head's bias is that of a constant feature 1, so a scale
            well above 1 leaves nearly all of the clip bound to the kernel.

    Raises:
        ValueError: `scale` is not > 0.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be > 0 and finite.")
    values = features.values
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite becomes NaN
        if center:
            values = values - values.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        values = scale * (values / np.where(norms > 0, norms, 1.0))
    return dataclasses.replace(features, values=values)


def average(*sets: FeatureSet) -> FeatureSet:
    """The mean of several features of each example, such as those of an image and its mirror image.

    Raises:
        ValueError: they are not features of the same labeled examples, or differ in width.
    """
    _check_same(sets)
    if len({s.width for s in sets}) > 1:
        raise ValueError(f"widths {[s.width for s in sets]} must be equal.")
    return dataclasses.replace(sets[0], values=np.mean([s.values for s in sets], axis=0))


def concatenate(*sets: FeatureSet) -> FeatureSet:
    """Puts the features of several backbones side by side, example by example.

    Raises:
        ValueError: they are not features of the same labeled examples.
    """
    _check_same(sets)
    return dataclasses.replace(sets[0], values=np.concatenate([s.values for s in sets], axis=1))


def _check_same(sets: tuple[FeatureSet, ...]) -> None:
    if not sets:
        raise ValueError("at least one feature set is needed.")
    for other in sets[1:]:
        if not np.array_equal(sets[0].labels, other.labels):
            raise ValueError(f"{sets[0]} and {other} must be of the same examples in one order.")
