"""Stratified subsets and held-out splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax import data
from dpjax.data.subsets import stratified_indices


def toy(labels, classes):
    labels = np.asarray(labels)
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return data.from_arrays("toy", pixels, labels, class_names=[str(c) for c in range(classes)])


DATASET = toy(np.repeat([0, 1, 2], [10, 20, 30])[np.random.RandomState(0).permutation(60)], 3)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_fraction_takes_the_share_of_every_class(counts, fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    total = round(fraction * len(labels))
    if total == 0:
        with pytest.raises(ValueError, match="at least one"):
            stratified_indices(labels, fraction, seed=seed)
        return
    chosen = stratified_indices(labels, fraction, seed=seed)
    assert len(chosen) == total == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    taken = np.bincount(labels[chosen], minlength=len(counts))
    assert (np.abs(taken - fraction * np.array(counts)) < 1 + 1e-9).all()


def test_shots_are_exact_nested_and_seeded():
    few = data.subset(DATASET, 3, seed=1)
    more = data.subset(DATASET, 9, seed=1)
    np.testing.assert_array_equal(np.bincount(few.labels), [3, 3, 3])
    assert set(few.rows) < set(more.rows)
    np.testing.assert_array_equal(few.rows, data.subset(DATASET, 3, seed=1).rows)
    assert set(few.rows) != set(data.subset(DATASET, 3, seed=2).rows)


def test_choice_is_the_same_everywhere():
    labels = np.repeat([0, 1], 8)
    np.testing.assert_array_equal(stratified_indices(labels, 2, seed=0), GOLDEN)


GOLDEN = [0, 3, 8, 9]  # pinned: prepared splits and studies depend on it


def test_choice_is_uniform_within_the_class():
    labels = np.zeros(10, int)
    hits = np.zeros(10)
    for seed in range(2000):
        hits[stratified_indices(labels, 3, seed=seed)] += 1
    # Binomial(2000, 0.3): standard deviation 20.5.
    assert np.abs(hits - 600).max() < 5 * 20.5


@pytest.mark.parametrize("amount", [0.0, -0.1, 1.1, float("nan")])
def test_fraction_out_of_range(amount):
    with pytest.raises(ValueError, match=r"amount=.* must be in \(0, 1\]"):
        data.subset(DATASET, amount, seed=0)


def test_shots_out_of_range():
    with pytest.raises(ValueError, match="amount=0 shots"):
        data.subset(DATASET, 0, seed=0)
    with pytest.raises(
        ValueError,
        match="amount=11 shots per class must be <= 10, the number of examples of class 0",
    ):
        data.subset(DATASET, 11, seed=0)
    with pytest.raises(ValueError, match="1 of 4 classes"):
        data.subset(toy([0, 1, 2], 4), 1, seed=0)


def test_seed_is_not_negative():
    with pytest.raises(ValueError, match="seed=-1 must be >= 0"):
        data.holdout(DATASET, 0.5, seed=-1)


@pytest.mark.parametrize("amount", [True, "0.1", None])
def test_amount_of_a_wrong_type(amount):
    with pytest.raises(TypeError, match="amount="):
        data.subset(DATASET, amount, seed=0)


def test_whole_fraction_is_everything():
    np.testing.assert_array_equal(data.subset(DATASET, 1.0, seed=3).rows, np.arange(60))


def test_holdout_is_disjoint_and_complete():
    rest, held = data.holdout(DATASET, 0.2, seed=5)
    assert not set(rest.rows) & set(held.rows)
    assert set(rest.rows) | set(held.rows) == set(range(60))


def test_holdout_differs_from_a_share_of_the_same_seed_and_must_leave_something():
    held = data.holdout(DATASET, 0.3, seed=0)[1]
    assert set(held.rows) != set(data.random_share(DATASET, 0.3, seed=0)[1].rows)
    for share in (1.0, 5):
        with pytest.raises(ValueError, match="share="):
            data.holdout(DATASET, share, seed=0)


def test_holdout_of_a_subset_reports_rows_of_the_split():
    part = data.subset(DATASET, 6, seed=0)
    rest, held = data.holdout(part, 0.4, seed=0)
    assert set(held.rows) | set(rest.rows) == set(part.rows)


def numbered(numbers, labels):
    """Images that show their number."""
    pixels = np.asarray(numbers, np.uint16).view(np.uint8).reshape(-1, 1, 2, 1)
    return data.from_arrays("toy", pixels, np.asarray(labels), class_names=["0", "1", "2"])


def numbers(dataset):
    pixels = dataset.get(np.arange(len(dataset)))["input"]
    return set(np.ascontiguousarray(pixels).reshape(-1, 2).view(np.uint16).ravel().tolist())


@pytest.mark.parametrize("split", [data.random_share, data.holdout])
def test_where_an_example_goes_depends_on_itself_alone(split):
    """Parallel composition: a data set without an example splits like the one with it."""
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    rest, share = split(numbered(range(1000), labels), 0.2, seed=1)
    assert numbers(rest) | numbers(share) == set(range(1000))
    assert abs(len(share) - 200) < 5 * np.sqrt(1000 * 0.2 * 0.8)
    kept = np.setdiff1d(np.arange(1000), [0, 3, 999])  # read anew: all rows move up
    fewer = split(numbered(kept, labels[kept]), 0.2, seed=1)[1]
    assert numbers(fewer) == numbers(share) - {0, 3, 999}
    other = numbered(np.arange(1000)[::-1], np.roll(labels, 37))  # another order, other labels
    assert numbers(split(other, 0.2, seed=1)[1]) == numbers(share)
    again = split(numbered(range(1000), labels), 0.2, seed=2)[1]
    assert numbers(again) != numbers(share)


def test_a_choice_that_depends_on_others_is_seen():
    """A stratified subset is one, and is said not to be charged."""
    chosen, fewer = (
        numbers(data.subset(numbered(rows, np.zeros(len(rows), int)), 0.2, seed=1))
        for rows in (np.arange(1000), np.arange(1, 1000))
    )
    assert len(chosen & fewer) < 0.4 * len(chosen)


def test_a_share_is_a_number():
    for share in (True, "0.1", None):
        with pytest.raises(TypeError, match="share="):
            data.holdout(DATASET, share, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 1e-9])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="share="):
        data.random_share(toy(np.zeros(5, int), 1), share, seed=0)
