"""The law of the samplers, random access, and the cut into physical chunks."""

import numpy as np
import pytest
from scipy import stats

from dpjax.dp import sampling

ALPHA = 1e-6


def poisson(step, n=200, q=0.1, seed=7):
    return sampling.poisson(seed, step, num_examples=n, sampling_prob=q)


def test_poisson_law():
    """Sizes are binomial; inclusion is equal for all examples and independent in pairs."""
    n, q, steps = 200, 0.1, 4000
    member = np.zeros((steps, n))
    for step in range(steps):
        member[step, poisson(step, n, q)] = 1
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() - n * q) < 5 * np.sqrt(n * q * (1 - q) / steps)
    variance = n * q * (1 - q)
    assert abs(sizes.var() / variance - 1) < 5 * np.sqrt(2 / steps)
    counts = member.sum(axis=0)
    statistic = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert stats.chi2.sf(statistic, n) > ALPHA
    pair = (member[:, :-1] * member[:, 1:]).mean(axis=0)
    assert np.abs(pair - q * q).max() < 6 * np.sqrt(q * q / steps)


def test_the_law_check_sees_a_shuffled_epoch():
    """Disjoint batches of one permutation: right frequency, but sizes never vary."""
    order = np.random.default_rng(0).permutation(200).reshape(10, 20)
    sizes = np.array([len(order[t % 10]) for t in range(4000)])
    assert abs(sizes.var() / (200 * 0.1 * 0.9) - 1) > 5 * np.sqrt(2 / 4000)


def test_random_access_and_secrecy():
    np.testing.assert_array_equal(poisson(5), poisson(5))
    assert not np.array_equal(poisson(5), poisson(6))
    assert not np.array_equal(poisson(5, seed=2**127), poisson(5, seed=2**127 + 1))


def test_indices_are_sorted_and_distinct():
    for step in range(50):
        indices = poisson(step)
        assert (np.diff(indices) > 0).all()
        assert indices.dtype == np.int64


def test_empty_and_full_draws():
    sizes = [len(poisson(step, n=5, q=0.1)) for step in range(100)]
    assert min(sizes) == 0
    assert max(sizes) > 1
    np.testing.assert_array_equal(poisson(0, n=5, q=1.0), np.arange(5))


def test_large_sets_are_fast_enough_to_draw_per_step():
    """O(batch), not O(N): a billion examples would not fit in memory otherwise."""
    indices = sampling.poisson(1, 2, num_examples=10**9, sampling_prob=1e-6)
    assert 700 < len(indices) < 1300


def test_fixed_size():
    batches = [sampling.fixed_size(3, t, num_examples=50, batch_size=10) for t in range(2000)]
    assert all(len(set(b)) == 10 for b in batches)
    counts = np.bincount(np.concatenate(batches), minlength=50)
    # A hypergeometric count has a smaller variance than the chi-square's; the bound is safe.
    assert stats.chi2.sf(((counts - 400) ** 2 / 400).sum(), 49) > ALPHA


def test_truncated_poisson_never_exceeds_and_is_poisson_below():
    law = {"num_examples": 200, "sampling_prob": 0.1}
    sizes = [len(sampling.truncated_poisson(1, t, **law, max_batch_size=22)) for t in range(500)]
    full = [len(poisson(t, seed=1)) for t in range(500)]
    assert max(sizes) == 22
    assert sizes == [min(s, 22) for s in full]


def cut_short(q=0.5, most=3):
    return sampling.truncated_poisson(0, 0, num_examples=5, sampling_prob=q, max_batch_size=most)


def test_the_ends_of_the_ranges():
    assert len(cut_short(q=1.0)) == 3
    assert len(cut_short(q=1.0, most=1)) == 1
    assert len(sampling.fixed_size(0, 0, num_examples=5, batch_size=1)) == 1
    assert len(sampling.fixed_size(0, 0, num_examples=5, batch_size=5)) == 5
    assert sampling.chunks(np.arange(3), 1).tolist() == [[0], [1], [2]]


def test_batches_are_those_of_every_version():
    """A run that is resumed after an upgrade must draw the batches that it would have drawn."""
    few = {"num_examples": 50, "sampling_prob": 0.2}
    assert sampling.poisson(3, 5, **few).tolist() == [0, 17, 23, 43, 46]
    cut = sampling.truncated_poisson(3, 5, **few, max_batch_size=4)
    assert cut.tolist() == [0, 17, 23, 47]
    fixed = sampling.fixed_size(3, 5, num_examples=50, batch_size=5)
    assert fixed.tolist() == [0, 1, 18, 20, 24]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_chunks_hold_every_index_once(size):
    cut = sampling.chunks(np.arange(size), 8)
    assert cut.shape == (max(1, -(-size // 8)), 8)
    np.testing.assert_array_equal(cut[cut >= 0], np.arange(size))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: poisson(0, q=0.0), "sampling_prob=0.0"),
        (lambda: poisson(0, q=1.1), "sampling_prob=1.1"),
        (lambda: poisson(0, n=0), "num_examples=0"),
        (lambda: poisson(-1), "step=-1"),
        (lambda: poisson(0, seed=-1), "seed=-1"),
        (lambda: poisson(0, seed=2**128), "seed="),
        (lambda: sampling.fixed_size(0, 0, num_examples=5, batch_size=6), "batch_size=6"),
        (lambda: sampling.fixed_size(0, 0, num_examples=5, batch_size=0), "batch_size=0"),
        (lambda: sampling.chunks(np.arange(3), 0), "size=0"),
        (lambda: cut_short(q=0.0), "sampling_prob=0.0"),
        (lambda: cut_short(q=1.5), "sampling_prob=1.5"),
        (
            lambda: sampling.truncated_poisson(
                0, 0, num_examples=5, sampling_prob=0.5, max_batch_size=0
            ),
            "max_batch_size=0",
        ),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_one_example_is_enough():
    assert len(poisson(0, n=1, q=1.0)) == 1
