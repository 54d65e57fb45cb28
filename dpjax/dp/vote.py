"""A choice among candidates by a noised vote of all examples, charged like a step."""

from __future__ import annotations

import jax
import numpy as np

from dpjax.dp.mechanism import Mechanism
from dpjax.dp.noise import standard_normal
from dpjax.dp.sampling import FullBatch

__all__ = ["noisy_vote"]


def noisy_vote(votes: np.ndarray, *, mechanism: Mechanism, key: jax.Array) -> np.ndarray:
    """Sums a vote of every example over the candidates, and adds noise once.

    Each example has one vote: a row of at most L2 norm 1, which it may give to one candidate or
    divide. A longer row is shortened to norm 1, and one that is not finite counts as zeros.

    The row of an example must be a function of that example alone. Adding or removing one example
    then adds or removes one row, so the sum moves by at most 1 in L2 norm: its sensitivity is 1,
    whatever the number of candidates. Noise of standard deviation sigma on every entry makes it
    the Gaussian mechanism of noise multiplier sigma. Whatever is computed from the noised sums and
    nothing else, such as which candidate has most or the order of all, is post-processing and free.

    Args:
        votes: `[examples, candidates]`.
        mechanism: full batches over these examples, of one step.
        key: secret, and used for nothing else.

    Returns:
        The noised sums, float64 `[candidates]`.

    Guarantees:
        The sums are released under `mechanism.event()`.

    Raises:
        ValueError: the mechanism samples, takes several steps, or is for another number of
            examples.

    Source: the lead is a noised vote for layers in arXiv 2605.30312, of which we had no text. The
        rule and its proof, above, are ours.

    >>> from dpjax.dp import calibrated
    >>> one = calibrated(epsilon=1, delta=1e-5, num_examples=900, batch_size=900, steps=1)
    >>> votes = np.eye(3)[np.arange(900) // 500]  # 500 for the first, 400 for the second
    >>> int(noisy_vote(votes, mechanism=one, key=jax.random.key(0)).argmax())
    0
    """
    votes = np.asarray(votes, np.float64)
    if mechanism.sampler != FullBatch(num_examples=len(votes)) or mechanism.steps != 1:
        raise ValueError(
            f"sampler={mechanism.sampler}, steps={mechanism.steps} must be FullBatch of the "
            f"{len(votes)} votes, for 1 step."
        )
    finite = np.isfinite(votes).all(axis=1, keepdims=True)
    rows = np.where(finite, votes, 0.0)
    # Scaled by the largest entry first: the squares of large or small ones would leave the range.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    rows = rows / np.where(largest > 1, largest, 1.0)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
    noise = np.asarray(standard_normal(key, votes.shape[1:]), np.float64)
    noised: np.ndarray = rows.sum(axis=0) + mechanism.noise_multiplier * noise
    return noised
