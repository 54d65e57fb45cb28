"""Measures of how far fine-tuning has moved features, on public or test inputs.

They belong to the study of Ke et al. (arXiv 2402.18905), who ask whether a head that does not fit
the backbone distorts it. The measures are our own: the paper's were not available to us.
"""

from __future__ import annotations

import numpy as np

__all__ = ["alignment", "linear_cka", "relative_shift"]


def relative_shift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over examples of |after - before| / |before|, for features `[examples, width]`."""
    norms = np.linalg.norm(before, axis=1)
    moved = np.linalg.norm(after - before, axis=1)
    return float(np.mean(moved / np.where(norms > 0, norms, 1.0)))


def linear_cka(before: np.ndarray, after: np.ndarray) -> float:
    """Linear centered kernel alignment, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414, eq. 5).

    It is 1 if the features differ by a rotation and a scale only. Unlike `relative_shift`, it shows
    whether the geometry has changed.
    """
    x, y = (values - values.mean(axis=0) for values in (before, after))
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


def alignment(features: np.ndarray, labels: np.ndarray, kernel: np.ndarray) -> float:
    """Mean cosine between the head's columns and the class means of the features.

    Args:
        features: `[examples, width]`.
        labels: `[examples]`; classes without an example are left out.
        kernel: of the head, `[width, classes]`. Means over classes are subtracted from both: they
            change no prediction.

    Returns:
        A number in [-1, 1]; 0 for a head of zeros.
    """
    present = np.unique(labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in present])
    columns = kernel.T[present]
    means, columns = means - means.mean(axis=0), columns - columns.mean(axis=0)
    scale = np.linalg.norm(means, axis=1) * np.linalg.norm(columns, axis=1)
    cosines = np.sum(means * columns, axis=1) / np.where(scale > 0, scale, 1.0)
    return float(np.mean(cosines))
