"""One private scalar that mends confidence: the softmax temperature, fitted on examples of its own.

Dividing all logits by a temperature changes no prediction, only how sure it is.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from dpjax.dp.mechanism import Mechanism
from dpjax.dp.noise import standard_normal
from dpjax.dp.sampling import FullBatch

__all__ = ["LARGEST_TEMPERATURE", "fit_temperature"]

LARGEST_TEMPERATURE = 20.0
"""Temperatures between its inverse and it are searched."""


def fit_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    mechanism: Mechanism,
    bound: float,
    key: jax.Array,
) -> float:
    """Halves a range of log-temperatures by the noised sign of the loss's derivative.

    The negative log-likelihood is convex in the inverse temperature, so the sign of its derivative
    with respect to the log-temperature u,
        sum over examples of e^-u (z_label - sum_j softmax(z e^-u)_j z_j),
    says on which side of the middle the best temperature is. Per example it is one number, clipped
    to [-bound, bound]; the sum is noised. A sign that the noise has turned is one of a derivative
    that hardly mattered. (Guo et al. 2017, 1706.04599, fit the same scalar without noise, and
    Zhang et al. 2022, 2210.08248, with DP-SGD; halving has no learning rate to tune.)

    Args:
        logits: `[examples, classes]`. An example that is not finite contributes zero.
        labels: integers `[examples]`.
        mechanism: of full batches over these examples; its steps are the number of halvings.
        bound: on one example's derivative, in nats per unit of log-temperature.
        key: secret; step t uses `fold_in(key, t)`.

    Returns:
        The temperature, to divide logits by.

    Guarantees:
        It is released under `mechanism.event()`: every halving is a Gaussian mechanism of
        sensitivity `bound`, and the temperature follows from their outcomes alone.

    Raises:
        ValueError: a mechanism of other batches, or a bound that is not > 0.
    """
    if mechanism.sampler != FullBatch(num_examples=len(labels)):
        raise ValueError(f"{mechanism} must be of full batches of the {len(labels)} examples.")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound={bound} must be > 0 and finite.")
    scores = np.asarray(logits, np.float64)
    low, high = -math.log(LARGEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    for step in range(mechanism.steps):
        middle = (low + high) / 2
        derivatives = np.clip(_derivatives(scores, labels, middle), -bound, bound)
        noise = float(standard_normal(jax.random.fold_in(key, step)))
        if np.sum(derivatives) + mechanism.noise_multiplier * bound * noise > 0:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def _derivatives(logits: np.ndarray, labels: np.ndarray, log_temperature: float) -> np.ndarray:
    """Of each example's negative log-likelihood, `[examples]`; 0 where it is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.where(finite[:, None], logits, 0.0) * math.exp(-log_temperature)
        likely = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        derivatives = scaled[np.arange(len(labels)), labels] - np.sum(likely * scaled, axis=1)
    return np.where(np.isfinite(derivatives), derivatives, 0.0)  # finite logits can overflow
