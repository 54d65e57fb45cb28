"""Resamples a square grid in the ways in which other libraries resize position embeddings."""

from __future__ import annotations

import numpy as np

__all__ = ["RESAMPLINGS", "resample_grid"]

RESAMPLINGS = ("cubic_antialiased", "cubic", "linear")


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter `a`, of support 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


def _matrix(old: int, new: int, method: str) -> np.ndarray:
    """Returns the weights `[new, old]` of one axis."""
    centers = (np.arange(new) + 0.5) * (old / new) - 0.5
    if method == "cubic_antialiased":
        # When shrinking, the kernel is widened (antialiasing). At the border it is truncated, and
        # its weights are renormalized.
        width = max(old / new, 1.0)
        weights = _cubic((np.arange(old)[None] - centers[:, None]) / width, -0.5)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(centers).astype(int) + tap
        offset = index - centers
        weight = _triangle(offset) if method == "linear" else _cubic(offset, -0.75)
        # Beyond the border, the last value is repeated.
        np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1)), weight)
    return weights


def resample_grid(grid: np.ndarray, size: int, method: str) -> np.ndarray:
    """Resamples `[old, old, width]` to `[size, size, width]` with half-pixel centers.

    Args:
        grid: the values.
        size: side of the new grid.
        method: one of `RESAMPLINGS`: "cubic_antialiased" (torch's antialiased bicubic, as timm
            resizes its own weights), "cubic" (torch's bicubic, as Hugging Face does) or "linear"
            (torch's bilinear, as timm resizes AugReg's).

    Returns:
        float32 `[size, size, width]`; unchanged values if the size does not change.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in RESAMPLINGS:
        raise ValueError(f"method={method!r} must be one of {', '.join(RESAMPLINGS)}.")
    if grid.shape[0] == size:
        return np.asarray(grid, np.float32)
    weights = _matrix(grid.shape[0], size, method)
    out = np.einsum("ip,jq,pqd->ijd", weights, weights, grid.astype(np.float64), optimize=True)
    return out.astype(np.float32)
