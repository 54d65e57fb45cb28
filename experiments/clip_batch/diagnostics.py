"""Diagnostics of clipping from per-example gradients (Rehn et al. 2025, arXiv 2510.20616).

NOT private: everything here reads raw gradients of private examples. It may explain a result; using
it to choose a bound, or any other setting of a released run, is not private.

Only inner products of gradients are needed, so the Gram matrix `[n, n]` describes a sample of n
examples, whatever the number of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["Error", "best_bound", "class_weights", "error", "gram", "norms"]

PyTree = Any


class Error(NamedTuple):
    """Parts of the mean squared error of one step's noised mean gradient, each >= 0 in expectation.

    Attributes:
        noise: of the Gaussian noise.
        clipping: squared bias of the clipped mean.
        sampling: of drawing the batch.
    """

    noise: float
    clipping: float
    sampling: float

    @property
    def total(self) -> float:
        return self.noise + self.clipping + self.sampling


def gram(
    loss_fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batch: PyTree
) -> np.ndarray:
    """Returns the inner products of all pairs of per-example gradients, float64 `[n, n]`.

    Args:
        loss_fn: `(params, example) -> loss` of one example.
        params: what trains; memory is n times its size.
        batch: leaves `[n, ...]`.
    """
    grads = _gradients(loss_fn)(params, batch)
    total: np.ndarray | None = None
    for leaf in jax.tree.leaves(grads):
        flat = np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1)
        part = flat @ flat.T
        total = part if total is None else total + part
    if total is None:
        raise ValueError("params has no leaves: nothing trains.")
    return total


@functools.lru_cache(maxsize=4)  # one function, one compilation
def _gradients(loss_fn: Callable[[PyTree, PyTree], jax.Array]) -> Callable[..., PyTree]:
    return jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))


def norms(products: np.ndarray) -> np.ndarray:
    """Returns the gradient norms `[n]` of a Gram matrix."""
    return np.sqrt(np.diag(products))


def class_weights(
    grad_norms: np.ndarray, labels: np.ndarray, bound: float, num_classes: int
) -> np.ndarray:
    """Returns w_y(C), the mean of min(1, C/|g|) over each class, `[num_classes]`; nan for none.

    Clipping is re-weighting: a class with large gradients takes part with a small weight
    (arXiv 2510.20616).
    """
    factors = np.minimum(1.0, bound / np.maximum(grad_norms, 1e-30))
    sums = np.bincount(labels, factors, minlength=num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def error(
    products: np.ndarray,
    bound: float,
    *,
    noise_multiplier: float,
    dimension: int,
    sampling_prob: float = 1.0,
    num_examples: int | None = None,
) -> Error:
    """Splits the mean squared error of a step into noise, clipping and sampling.

    The step estimates the mean gradient over N examples by (sum over a Poisson batch of clip(g) +
    C sigma z) / (q N). Its mean squared error is
        C^2 sigma^2 d / (q N)^2 + |sum (g - clip(g))|^2 / N^2 + (1 - q)/q sum |clip(g)|^2 / N^2,
    which at q = 1 is N^-2 times the MSE(C) of arXiv 2510.20616.

    Args:
        products: of a uniform sample of n of the N examples.
        bound: C.
        noise_multiplier: sigma.
        dimension: d, number of trained parameters.
        sampling_prob: q.
        num_examples: N; None if the sample is everything.

    Returns:
        The parts, unbiased for the whole data where n < N; the clipping part can then come out
        below 0.
    """
    total = len(products) if num_examples is None else num_examples
    lengths = norms(products)
    lost = np.where(lengths > bound, 1 - bound / np.maximum(lengths, 1e-30), 0.0)
    scaled = _for_all(products, total)
    kept = total / len(products) * np.sum(np.minimum(lengths, bound) ** 2)
    odds = (1 - sampling_prob) / sampling_prob
    noise = (bound * noise_multiplier / sampling_prob) ** 2 * dimension
    return Error(*(float(x) / total**2 for x in (noise, lost @ scaled @ lost, odds * kept)))


def best_bound(
    products: np.ndarray,
    *,
    noise_multiplier: float,
    dimension: int,
    sampling_prob: float = 1.0,
    num_examples: int | None = None,
) -> float:
    """Returns the bound C* of least total `error`; arguments as there.

    Between two neighboring norms the error is quadratic in C, with its stationary point at
        C = <N,G> / (<N,N> + (sigma/q)^2 d + k (1 - q)/q),
    G = sum g and N = sum g/|g| over the k clipped examples; at q = 1 this is the paper's fixed
    point. The least of all stationary points and norms is the minimum.
    """
    total = len(products) if num_examples is None else num_examples
    order = np.argsort(norms(products))
    lengths = norms(products)[order]
    scaled = _for_all(products, total)[np.ix_(order, order)]
    inverse = np.where(lengths > 0, 1 / np.maximum(lengths, 1e-30), 0.0)
    both = _tails(scaled * inverse[:, None] * inverse)  # <N,N> with k, k+1, ... clipped
    mixed = _tails(scaled * inverse)
    plain = _tails(scaled)
    size = total / len(lengths)
    odds = (1 - sampling_prob) / sampling_prob * size
    noise = (noise_multiplier / sampling_prob) ** 2 * dimension
    clipped = np.arange(len(lengths), -1, -1)
    square = both + noise + odds * clipped
    kept = odds * np.concatenate([[0.0], np.cumsum(lengths**2)])
    low = np.concatenate([[0.0], lengths])
    high = np.concatenate([lengths, lengths[-1:]])
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.where(square > 0, mixed / square, high)
    candidates = np.stack([np.clip(inner, low, high), low, high])
    values = square * candidates**2 - 2 * mixed * candidates + plain + kept
    values = np.where(candidates > 0, values, np.inf)
    return float(candidates.flat[np.argmin(values)])


def _for_all(products: np.ndarray, total: int) -> np.ndarray:
    """Scales a sample's products so that w' products w is unbiased for |sum of w g|^2 over all."""
    size = len(products)
    if total == size:
        return products
    if size < 2 or total < size:
        raise ValueError(
            f"num_examples={total} must be >= the sample of {size}, which must be > 1."
        )
    pairs = total * (total - 1) / (size * (size - 1))
    return pairs * products + (total / size - pairs) * np.diag(np.diag(products))


def _tails(matrix: np.ndarray) -> np.ndarray:
    """Sums of the square blocks `matrix[k:, k:]`, `[n + 1]`."""
    sums = matrix[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)
    return np.concatenate([np.diag(sums)[::-1], [0.0]])
