"""Batch sampling as a pure function of (seed, step): numpy only, O(batch), random access.

Each sampler returns the sorted indices of ONE logical batch; `chunks` cuts it into equal physical
chunks. A resumed run asks for the next step and replays nothing; every host can compute the batch
of every step.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "PADDING",
    "chunks",
    "fixed_size",
    "full_batch",
    "generator",
    "poisson",
    "truncated_poisson",
]

PADDING = -1
"""Index of a padding row; never an example."""

# Counter domain of the sampler within the seed's Philox stream. Anything else that draws from the
# same seed takes another one.
_SAMPLER_DOMAIN = 1


def generator(seed: int, step: int, *, domain: int = _SAMPLER_DOMAIN) -> np.random.Generator:
    """Returns the random generator of one step.

    Args:
        seed: 128-bit integer. Amplification by sampling holds only while it is secret.
        step: step index >= 0. Steps use disjoint blocks of Philox's counter, 2**128 draws apart.
        domain: separates uses of one seed.

    Returns:
        A generator whose stream depends on the arguments alone (and on numpy's documented
        stream compatibility for the distributions drawn from it).
    """
    if not 0 <= seed < 2**128:
        raise ValueError(f"seed={seed} must be in [0, 2**128).")
    if step < 0:
        raise ValueError(f"step={step} must be >= 0.")
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, domain]))


def poisson(seed: int, step: int, *, num_examples: int, sampling_prob: float) -> np.ndarray:
    """Draws every example independently with probability q.

    The size is Binomial(N, q) and, given the size, all subsets are equally likely, which is
    exactly independent Bernoulli sampling at O(batch) cost.

    Args:
        seed: secret 128-bit integer.
        step: step index >= 0.
        num_examples: N >= 1.
        sampling_prob: q in (0, 1].

    Returns:
        Sorted int64 indices `[size]`; the size varies from step to step and may be 0.

    Source: Poisson subsampling as in arXiv 1908.10530.

    >>> poisson(0, 3, num_examples=5, sampling_prob=1.0)
    array([0, 1, 2, 3, 4])
    """
    _check_examples(num_examples)
    if not 0 < sampling_prob <= 1:
        raise ValueError(f"sampling_prob={sampling_prob} must be in (0, 1].")
    rng = generator(seed, step)
    return _subset(rng, num_examples, int(rng.binomial(num_examples, sampling_prob)))


def truncated_poisson(
    seed: int, step: int, *, num_examples: int, sampling_prob: float, max_batch_size: int
) -> np.ndarray:
    """Draws a Poisson batch and keeps a uniform subset if it exceeds `max_batch_size`.

    Never account it as plain Poisson sampling: it has an event of its own (arXiv 2508.15089).

    Args:
        seed: secret 128-bit integer.
        step: step index >= 0.
        num_examples: N >= 1.
        sampling_prob: q in (0, 1], before truncation.
        max_batch_size: largest size, >= 1.

    Returns:
        Sorted int64 indices `[size]` with size <= max_batch_size, possibly 0.

    Raises:
        ValueError: an argument out of range.
    """
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size={max_batch_size} must be >= 1.")
    _check_examples(num_examples)
    if not 0 < sampling_prob <= 1:
        raise ValueError(f"sampling_prob={sampling_prob} must be in (0, 1].")
    rng = generator(seed, step)
    # A uniform subset of a uniform subset is a uniform subset: truncating the size is enough.
    size = min(int(rng.binomial(num_examples, sampling_prob)), max_batch_size)
    return _subset(rng, num_examples, size)


def fixed_size(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """Draws `batch_size` distinct examples uniformly, independently at every step.

    Args:
        seed: secret 128-bit integer.
        step: step index >= 0.
        num_examples: N >= 1.
        batch_size: B in [1, N].

    Returns:
        Sorted int64 indices `[batch_size]`.

    Raises:
        ValueError: an argument out of range.
    """
    _check_examples(num_examples)
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"batch_size={batch_size} must be in [1, num_examples={num_examples}].")
    return _subset(generator(seed, step), num_examples, batch_size)


def full_batch(*, num_examples: int) -> np.ndarray:
    """Returns all indices, `[num_examples]`."""
    _check_examples(num_examples)
    return np.arange(num_examples)


def chunks(indices: np.ndarray, size: int) -> np.ndarray:
    """Cuts one logical batch into equal physical chunks.

    Args:
        indices: `[batch]` indices, possibly none.
        size: physical batch size >= 1.

    Returns:
        `[max(1, ceil(batch / size)), size]` indices, `PADDING` at the end of the last chunk. An
        empty batch gives one chunk of padding: the step is then noise alone, and counts.

    Guarantees:
        Every index is in exactly one chunk, in the given order; nothing is dropped or repeated.

    Raises:
        ValueError: `size` is below 1.

    >>> chunks(np.arange(3), 2)
    array([[ 0,  1],
           [ 2, -1]])
    """
    if size < 1:
        raise ValueError(f"size={size} must be >= 1.")
    padded = np.full(max(1, -(-len(indices) // size)) * size, PADDING, np.int64)
    padded[: len(indices)] = indices
    return padded.reshape(-1, size)


def _subset(rng: np.random.Generator, num_examples: int, size: int) -> np.ndarray:
    return np.sort(rng.choice(num_examples, size, replace=False, shuffle=False))


def _check_examples(num_examples: int) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be >= 1.")
