"""A noised vote: what one example can do, the law of its noise, and what it refuses."""

import jax
import numpy as np
import pytest
from scipy import stats

from dpjax import dp


def mechanism(n, sigma=5.0, steps=1):
    return dp.Mechanism(sampler=dp.FullBatch(num_examples=n), steps=steps, noise_multiplier=sigma)


def sums(votes, seed=3, sigma=5.0):
    key = jax.random.key(seed)
    return dp.noisy_vote(votes, mechanism=mechanism(len(votes), sigma), key=key)


def test_one_example_moves_the_sum_by_at_most_one():
    """With the same noise on both sides, the difference of two neighbors is the example's row."""
    rng = np.random.default_rng(0)
    votes = rng.normal(size=(60, 4)) * 10.0 ** rng.integers(-150, 150, (60, 1))
    votes[0], votes[1], votes[2], votes[3] = 0.0, np.nan, np.inf, 1.7e308
    votes[4], votes[5] = (1, 0, 0, 0), (0.6, 0.0, -0.8, 0.0)
    moved = np.array([sums(votes) - sums(np.delete(votes, row, axis=0)) for row in range(60)])
    lengths = np.linalg.norm(moved, axis=1)
    assert lengths.max() <= 1 + 1e-12
    assert (lengths[:3] == 0).all()  # nothing to say, and nothing that is finite
    assert (lengths[6:] > 1 - 1e-9).sum() == (np.linalg.norm(votes[6:], axis=1) > 1).sum()
    np.testing.assert_allclose(moved[4:6], votes[4:6], atol=1e-12)  # short rows stay as they are


def test_the_noise_is_gaussian_and_independent():
    drawn = np.array([sums(np.zeros((9, 600)), n, sigma=3.0) for n in range(10)])
    assert stats.kstest(drawn.ravel() / 3.0, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(drawn)[np.triu_indices(10, 1)]).max() < 0.2  # from one vote to another
    neighbors = np.corrcoef(drawn[:, ::2].ravel(), drawn[:, 1::2].ravel())[0, 1]
    assert abs(neighbors) < 0.1  # from one candidate to the next


def test_a_mechanism_of_other_releases_is_refused():
    votes = np.zeros((10, 2))
    sampled = dp.Mechanism(
        sampler=dp.Poisson(num_examples=10, sampling_prob=0.5), steps=1, noise_multiplier=1.0
    )
    for wrong in (mechanism(9), mechanism(10, steps=2), sampled):
        with pytest.raises(ValueError, match="must be FullBatch of the 10 votes, for 1 step"):
            dp.noisy_vote(votes, mechanism=wrong, key=jax.random.key(0))
