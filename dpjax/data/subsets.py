"""Seeded choices of examples: stratified subsets, shots per class, held-out shares.

A subset is a function of the labels and a seed, so it is a choice that depends on all examples; a
share is one of each example by itself. Random order comes from the raw bits of a Philox
generator, whose stream NumPy promises to keep, so a choice is the same on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

from dpjax.data.dataset import Dataset

__all__ = ["holdout", "random_share", "stratified_indices", "subset"]

# Separate streams: a held-out split is not the start of a subset.
_SUBSET, _HOLDOUT, _SHARE = 1, 2, 3


def stratified_indices(
    labels: np.ndarray, amount: float | int, *, seed: int, stream: int = 0
) -> np.ndarray:
    """Chooses the same share, or the same number, of every class.

    Args:
      labels: integers [examples].
      amount: a float in (0, 1] is a fraction; an int >= 1 is shots per class present.
      seed: choices with one seed are nested: a larger amount holds the smaller one's examples
        (for shots always; for fractions up to rounding).
      stream: distinguishes independent uses of one seed.

    Returns:
      Ascending indices into `labels`. For a fraction f, round(f * examples) of them, and every
      class has f * (its size) rounded up or down.

    Raises:
      ValueError: on an amount out of range, more shots than some class has, or nothing chosen.
      TypeError: if amount is neither int nor float.
    """
    labels = np.asarray(labels)
    if isinstance(amount, (bool, np.bool_)) or not isinstance(
        amount, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"amount={amount!r} must be a fraction (float) or shots per class (int).")
    classes, counts = np.unique(labels, return_counts=True)
    if isinstance(amount, (int, np.integer)):
        if amount < 1:
            raise ValueError(f"amount={amount} shots per class must be >= 1.")
        short = np.flatnonzero(counts < amount)
        if short.size:
            raise ValueError(
                f"amount={amount} shots per class must be <= {counts[short[0]]}, all that class "
                f"{classes[short[0]]} has."
            )
        take = np.full(len(classes), int(amount))
    else:
        if not 0 < amount <= 1:
            raise ValueError(f"amount={amount} as a fraction must be in (0, 1].")
        take = _apportion(counts, float(amount))
        if take.sum() == 0:
            raise ValueError(f"amount={amount} of {len(labels)} examples must choose at least one.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0.")
    # One random number per example, ordered within its class.
    bits = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(len(labels))
    chosen = []
    for label, number in zip(classes, take, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(bits[members], kind="stable")[:number]])
    return np.sort(np.concatenate(chosen))


def subset(dataset: Dataset, amount: float | int, *, seed: int) -> Dataset:
    """A stratified part of a data set.

    Args:
      dataset: to choose from.
      amount: a float in (0, 1] is a fraction, an int is shots per class (so 1.0 is everything
        and 1 is one example of each class).
      seed: of the choice; the choice does not look at the inputs.

    Guarantees:
      None about the whole data set: adding one example to it may change the choice of all others.

    Returns:
      The chosen examples, in the data set's order; `rows` tells which they are.

    Raises:
      ValueError: on an amount out of range or more shots than some class has.
    """
    missing = dataset.num_classes - len(np.unique(dataset.labels))
    if isinstance(amount, int) and missing:
        raise ValueError(
            f"amount={amount} shots per class: {missing} of {dataset.num_classes} classes of "
            f"{dataset.name!r} have no example."
        )
    chosen = stratified_indices(dataset.labels, amount, seed=seed, stream=_SUBSET)
    return dataset.select(chosen)


def holdout(dataset: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Splits a training set for tuning: `random_share`, with a stream of its own.

    Args:
      dataset: to split.
      share: held out, in (0, 1), the probability of each example.
      seed: of the choice.

    Returns:
      (rest, held): disjoint, together the whole data set; `rows` of each tells which.

    Guarantees:
      Adding or removing an example moves no other one, so a guarantee for the rest is one for the
      whole data set.

    Raises:
      ValueError: on a share out of range, or if either part is empty.
    """
    return _each_by_itself(dataset, share, seed, _HOLDOUT)


def random_share(dataset: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Splits a data set by chance alone, so that privacy is paid for either part on its own.

    Where an example goes depends on its own input and the seed, and on nothing else: not on its
    label, nor on its place in the split. So adding or removing an example moves no other one to
    the other part, as parallel composition needs.

    Args:
      dataset: to split.
      share: in (0, 1), the probability of each example to be in the share.
      seed: of the choice.

    Returns:
      (rest, share): disjoint, together the whole data set.

    Raises:
      ValueError: on a share out of range, or if either part is empty.
    """
    return _each_by_itself(dataset, share, seed, _SHARE)


def _each_by_itself(
    dataset: Dataset, share: float, seed: int, stream: int
) -> tuple[Dataset, Dataset]:
    if isinstance(share, bool) or not isinstance(share, (int, float, np.integer, np.floating)):
        raise TypeError(f"share={share!r} must be a number.")
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be in (0, 1).")
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0.")
    salt = np.random.SeedSequence([seed, stream]).generate_state(4).tobytes()
    keys = dataset.source.keys[dataset.rows]
    drawn = [int.from_bytes(hashlib.sha256(salt + key.tobytes()).digest()[:8]) for key in keys]
    chosen = np.array(drawn, np.uint64) * 2.0**-64 < share
    if chosen.all() or not chosen.any():
        raise ValueError(f"share={share} of {len(dataset)} examples leaves a part empty.")
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def _apportion(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Whole numbers near fraction * counts with sum round(fraction * sum): largest remainders."""
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    left = int(round(fraction * counts.sum())) - int(take.sum())
    order = np.argsort(-(exact - take), kind="stable")
    take[order[: max(left, 0)]] += 1
    return np.minimum(take, counts)
