"""Seeded selections of examples: stratified subsets, shots per class, held-out shares.

There are two kinds, with different consequences for privacy. A *subset* is stratified: which
examples it contains depends on the labels of all of them, so adding one example may exchange
others, and the guarantee is about the selected examples only. A *share* decides about each example
from that example and the seed alone, so the guarantee carries over to the whole data set.

A selection is the same on every machine: it uses the raw bits of a Philox generator, which NumPy
promises not to change (unlike the numbers its `Generator` methods derive from them), and SHA-256.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np

from dpjax.data.dataset import Dataset
from dpjax.data.units import Units

__all__ = ["holdout", "random_share", "stratified_indices", "subset"]

Data = TypeVar("Data", Dataset, Units, Dataset | Units)

# One stream for each use. With a common one, a held-out split would be the first examples of a
# subset with the same seed, and no longer independent of it.
_SUBSET, _HOLDOUT, _SHARE = 1, 2, 3


def stratified_indices(
    labels: np.ndarray, amount: float | int, *, seed: int, stream: int = 0
) -> np.ndarray:
    """Selects the same fraction, or the same number, of every class.

    Args:
        labels: integers [examples].
        amount: a float in (0, 1] is a fraction; an int >= 1 is the number of shots for each class
            that occurs.
        seed: selections with one seed are nested: a larger amount contains the examples of a
            smaller one (always for shots; for fractions up to rounding).
        stream: distinguishes independent uses of one seed.

    Returns:
        Ascending indices into `labels`. For a fraction f, round(f * examples) of them, and from
        every class f * (its size), rounded up or down.

    Raises:
        ValueError: the amount is out of range, a class has too few examples, or nothing is
            selected.
        TypeError: the amount is neither int nor float.
    """
    labels = np.asarray(labels)
    # bool is a subclass of int: True would mean one shot per class.
    if isinstance(amount, (bool, np.bool_)) or not isinstance(
        amount, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"amount={amount!r} must be a fraction (float) or shots per class (int).")
    classes, counts = np.unique(labels, return_counts=True)
    if isinstance(amount, (int, np.integer)):
        if amount < 1:
            raise ValueError(f"amount={amount} shots per class must be >= 1.")
        too_small = np.flatnonzero(counts < amount)
        if too_small.size:
            raise ValueError(
                f"amount={amount} shots per class must be <= {counts[too_small[0]]}, the number of "
                f"examples of class {classes[too_small[0]]}."
            )
        take = np.full(len(classes), int(amount))
    else:
        if not 0 < amount <= 1:
            raise ValueError(f"amount={amount} as a fraction must be in (0, 1].")
        take = _apportion(counts, float(amount))
        if take.sum() == 0:
            raise ValueError(f"amount={amount} of {len(labels)} examples must select at least one.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0.")
    # One random number per example. The smallest `number` of a class are selected: a uniform choice
    # without replacement, and nested, because a larger number only extends the list.
    bits = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(len(labels))
    selected = []
    for label, number in zip(classes, take, strict=True):
        members = np.flatnonzero(labels == label)
        # "stable", so that a tie, however unlikely, is broken alike on every machine.
        selected.append(members[np.argsort(bits[members], kind="stable")[:number]])
    # Ascending: a subset keeps the data set's order, and reads from disk are sequential.
    return np.sort(np.concatenate(selected))


def subset(dataset: Data, amount: float | int, *, seed: int) -> Data:
    """Returns a stratified part of a data set.

    Args:
        dataset: the data set to select from. Of `Units`, whole units are selected, not by class.
        amount: a float in (0, 1] is a fraction, an int is shots per class (so 1.0 selects
            everything, and 1 selects one example of each class).
        seed: seed of the selection, which depends on it and on the labels, not on the inputs.

    Guarantees:
        None about the whole data set: adding one example may change which others are selected. A
        private run on a subset protects the selected examples.

    Returns:
        The selected examples, in the data set's order; `rows` has their positions.

    Raises:
        ValueError: the amount is out of range, or a class has too few examples.
    """
    if isinstance(dataset, Units):
        if isinstance(amount, int):
            raise ValueError(
                f"amount={amount} shots per class would divide units: give a fraction."
            )
        alike = np.zeros(len(dataset), np.int64)
        return dataset.select(stratified_indices(alike, amount, seed=seed, stream=_SUBSET))
    # `stratified_indices` only sees classes that occur; shots are promised for every class.
    missing = dataset.num_classes - len(np.unique(dataset.labels))
    if isinstance(amount, int) and missing:
        raise ValueError(
            f"amount={amount} shots per class: {missing} of {dataset.num_classes} classes of "
            f"{dataset.name!r} have no example."
        )
    return dataset.select(stratified_indices(dataset.labels, amount, seed=seed, stream=_SUBSET))


def holdout(dataset: Data, share: float, *, seed: int) -> tuple[Data, Data]:
    """Splits a training set for tuning; like `random_share`, with a stream of its own.

    Args:
        dataset: the data set to split.
        share: probability of each example to be held out, in (0, 1).
        seed: seed of the split.

    Returns:
        (rest, held out): disjoint, together the whole data set; `rows` has their positions.

    Guarantees:
        Adding or removing an example moves no other example, so a guarantee for the rest is one for
        the whole data set.

    Raises:
        ValueError: the share is out of range, or a part is empty.
    """
    return _split_independently(dataset, share, seed, _HOLDOUT)


def random_share(dataset: Data, share: float, *, seed: int) -> tuple[Data, Data]:
    """Splits a data set at random into two parts whose privacy costs do not add up.

    The part of an example depends on its own input and the seed only (of a unit, on its name): not
    on its label, nor on its position. Adding or removing an example therefore moves no other
    example to the other part, as parallel composition requires: the cost of both parts together is
    that of the more expensive one.

    Args:
        dataset: the data set to split.
        share: probability of each example to be in the share, in (0, 1).
        seed: seed of the split.

    Returns:
        (rest, share): disjoint, together the whole data set.

    Raises:
        ValueError: the share is out of range, or a part is empty.
    """
    return _split_independently(dataset, share, seed, _SHARE)


def _split_independently(dataset: Data, share: float, seed: int, stream: int) -> tuple[Data, Data]:
    if isinstance(share, bool) or not isinstance(share, (int, float, np.integer, np.floating)):
        raise TypeError(f"share={share!r} must be a number.")
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be in (0, 1).")
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0.")
    # Hash the example's digest with the seed, read 64 bits of the hash as a number in [0, 1), and
    # compare it with the share. A random generator would deal its numbers out by position, and an
    # added example would shift those of all later ones. Equal inputs land in the same part.
    salt = np.random.SeedSequence([seed, stream]).generate_state(4).tobytes()
    hashes = [
        int.from_bytes(hashlib.sha256(salt + key.tobytes()).digest()[:8]) for key in dataset.keys
    ]
    in_share = np.array(hashes, np.uint64) * 2.0**-64 < share
    if in_share.all() or not in_share.any():
        raise ValueError(f"share={share} of {len(dataset)} leaves a part empty.")
    return dataset.select(np.flatnonzero(~in_share)), dataset.select(np.flatnonzero(in_share))


def _apportion(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Returns integers near fraction * counts that sum to round(fraction * sum of counts).

    Rounding each class by itself would miss the total by up to half an example per class. This is
    the method of largest remainders: round all down, then give the missing examples to the classes
    that lost most.
    """
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    missing = int(round(fraction * counts.sum())) - int(take.sum())
    by_remainder = np.argsort(-(exact - take), kind="stable")
    # Float rounding may lift a product to the next integer. `max` and `minimum` then keep the
    # numbers valid.
    take[by_remainder[: max(missing, 0)]] += 1
    return np.minimum(take, counts)
