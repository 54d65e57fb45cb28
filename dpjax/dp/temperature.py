"""A private softmax temperature, which corrects a model's confidence, fitted on reserved examples.

Dividing all logits by a temperature changes no prediction, only its confidence.
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
"""Temperatures are searched between its inverse and it."""


def fit_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    mechanism: Mechanism,
    bound: float,
    key: jax.Array,
) -> float:
    """Bisects a range of log-temperatures by the noisy sign of the loss's derivative.

    The negative log-likelihood is convex in the inverse temperature, so the sign of its derivative
    with respect to the log-temperature u,
        sum over examples of e^-u (z_label - sum_j softmax(z e^-u)_j z_j),
    shows on which side of the middle the best temperature lies. Each example contributes one
    number, clipped to [-bound, bound], and noise is added to the sum. Noise flips a sign only where
    the derivative is small, that is near the optimum.

    Args:
        logits: `[examples, classes]`. An example with a non-finite logit contributes zero.
        labels: integers `[examples]`.
        mechanism: full batches over these examples; its steps are the number of bisections.
        bound: bound on one example's derivative, in nats per unit of log-temperature.
        key: secret; step t uses `fold_in(key, t)`.

    Returns:
        The temperature by which to divide the logits.

    Guarantees:
        The temperature is released under `mechanism.event()`: every bisection is a Gaussian
        mechanism of sensitivity `bound`, and the temperature depends on their outcomes alone.

    Raises:
        ValueError: the mechanism samples, or is for another number of examples, or the bound is not
            > 0 and finite.

    Source: Guo et al. 2017 (arXiv 1706.04599) fit this scalar without noise, Zhang et al. 2022
        (arXiv 2210.08248) with DP-SGD; bisection needs no learning rate.
    """
    if mechanism.sampler != FullBatch(num_examples=len(labels)):
        raise ValueError(
            f"sampler={mechanism.sampler} must be FullBatch, with num_examples equal to the number "
            f"of labels, {len(labels)}."
        )
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
    """Derivatives of each example's negative log-likelihood, `[examples]`; 0 if not finite."""
    finite = np.isfinite(logits).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.where(finite[:, None], logits, 0.0) * math.exp(-log_temperature)
        # The largest logit is subtracted first, so that the exponential cannot overflow.
        probs = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        derivatives = scaled[np.arange(len(labels)), labels] - np.sum(probs * scaled, axis=1)
    return np.where(np.isfinite(derivatives), derivatives, 0.0)  # finite logits can overflow
