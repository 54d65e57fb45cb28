"""Closed-form heads: sensitivity on neighboring data, distribution of the noise, the solution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax import dp
from dpjax.dp import accounting, least_squares

WIDTH, CLASSES, BATCH = 5, 3, 12


def sums_of(features, labels, mask=None, bound=1.5):
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    return least_squares.moments(features, labels, mask, num_classes=CLASSES, bound=bound)


@pytest.fixture
def case():
    features = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    return features, jnp.arange(BATCH) % CLASSES


@pytest.mark.parametrize("scale", [1.0, 0.1])  # where squares are above 1, and below
def test_sums(case, scale):
    features, labels = np.asarray(case[0], np.float64) * scale, np.asarray(case[1])
    norms, bound = np.linalg.norm(features, axis=1, keepdims=True), 1.5 * scale
    assert (norms > bound).any()
    assert (norms < bound).any()
    clipped = features * np.minimum(1, bound / norms)
    targets = np.eye(CLASSES)[labels] - 1 / CLASSES
    got = sums_of(case[0] * scale, case[1], bound=bound)
    np.testing.assert_allclose(got.covariance, clipped.T @ clipped, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.cross, clipped.T @ targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [float, int, np.float32, np.float64, jnp.float32])
def test_any_number_is_a_bound_inside_and_outside_of_jit(case, kind):
    mask = jnp.ones(BATCH, bool)

    def sums(bound):
        return lambda x, y: least_squares.moments(x, y, mask, num_classes=CLASSES, bound=bound)

    want = sums(2.0)(*case)
    jax.tree.map(np.testing.assert_array_equal, sums(kind(2))(*case), want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (jax.jit(sums(kind(2)))(*case), jax.jit(lambda b: sums(b)(*case))(kind(2))),
        (want, want),
    )


def test_disjoint_chunks_add(case):
    features, labels = case
    parts = [sums_of(features[i], labels[i]) for i in (slice(0, 5), slice(5, None))]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        parts[0] + parts[1],
        sums_of(features, labels),
    )


@given(
    scale=st.floats(1e-30, 1e30),
    bound=st.floats(1e-3, 1e3),
    seed=st.integers(0, 100),
    label=st.integers(0, CLASSES - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_example_moves_the_sums_by_at_most_the_sensitivity(scale, bound, seed, label):
    x = np.random.default_rng(seed).normal(size=(1, WIDTH)) * scale
    alone = sums_of(jnp.asarray(x, jnp.float32), jnp.array([label]), bound=bound)
    first, second = (float(s) for s in alone.sensitivities())
    # Its own rounding apart: each entry is one rounded product.
    slack = 1 + 2.0**-22
    assert np.linalg.norm(np.asarray(alone.covariance, np.float64)) <= first * slack
    assert np.linalg.norm(np.asarray(alone.cross, np.float64)) <= second * slack


def test_the_sensitivity_is_attained():
    x = jnp.array([[100.0, 0, 0, 0, 0]])
    alone = sums_of(x, jnp.array([1]))
    first, second = alone.sensitivities()
    assert np.linalg.norm(alone.covariance) == pytest.approx(float(first), rel=1e-5)
    assert np.linalg.norm(alone.cross) == pytest.approx(float(second), rel=1e-5)
    assert float(first) == pytest.approx(1.5**2)
    assert float(second) == pytest.approx(1.5 * math.sqrt(2 / 3))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_padding_and_non_finite_examples_contribute_nothing(bad, case):
    features, labels = case
    mask = jnp.arange(BATCH) != 3
    want = sums_of(features, labels, mask)
    jax.tree.map(
        np.testing.assert_array_equal, sums_of(features.at[3].set(99.0), labels, mask), want
    )
    jax.tree.map(np.testing.assert_array_equal, sums_of(features.at[3, 1].set(bad), labels), want)
    jax.tree.map(np.testing.assert_array_equal, sums_of(features.at[3].set(0.0), labels), want)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_noise(share):
    zero = jnp.zeros((1, 60))
    sums = sums_of(zero, jnp.array([0]), jnp.zeros(1, bool), bound=2.0)
    noisy = least_squares.release(sums, 3.0, covariance_share=share, key=jax.random.key(0))
    # z_A R^2 and z_B R Y with 1/z^2 = 1/z_A^2 + 1/z_B^2.
    first = 3.0 / math.sqrt(share) * 4.0
    second = 3.0 / math.sqrt(1 - share) * 2.0 * math.sqrt(2 / 3)
    assert float(noisy.covariance_std) == pytest.approx(first)
    assert float(noisy.cross_std) == pytest.approx(second)
    np.testing.assert_array_equal(noisy.covariance, noisy.covariance.T)
    diagonal = np.diagonal(noisy.covariance)
    upper = np.asarray(noisy.covariance)[np.triu_indices(60, 1)]
    assert np.std(upper) == pytest.approx(first / math.sqrt(2), rel=0.06)
    assert np.std(diagonal) == pytest.approx(first, rel=0.35)
    assert np.std(noisy.cross) == pytest.approx(second, rel=0.2)
    for wrong in (1.5, 2 / 3):
        assert np.std(upper) != pytest.approx(wrong * first / math.sqrt(2), rel=0.06)
        assert np.std(noisy.cross) != pytest.approx(wrong * second, rel=0.2)
    spectrum = np.abs(np.linalg.eigvalsh(noisy.covariance)).max()
    assert spectrum == pytest.approx(least_squares.noise_floor(noisy), rel=0.15)


def test_accounting_is_one_gaussian_event():
    mechanism = dp.calibrated(epsilon=1.0, delta=1e-5, num_examples=5000, batch_size=5000, steps=1)
    joint = mechanism.epsilon(1e-5)
    assert 0.99 < joint <= 1.0
    parts = [
        accounting.full_batch(mechanism.noise_multiplier / math.sqrt(share), 1)
        for share in (0.3, 0.7)
    ]
    assert accounting.epsilon(parts, 1e-5) == pytest.approx(joint, rel=1e-3)


def test_solution(case):
    features, labels = case
    sums = sums_of(features, labels, bound=100.0)
    noisy = least_squares.release(sums, 0.0, key=jax.random.key(0))
    targets = np.eye(CLASSES)[labels] - 1 / CLASSES
    x = np.asarray(features, np.float64)
    for ridge, kernel in zip((0.1, 10.0), least_squares.solve(noisy, [0.1, 10.0])):
        want = np.linalg.solve(x.T @ x + ridge * np.eye(WIDTH), x.T @ targets)
        np.testing.assert_allclose(kernel, want, rtol=1e-3, atol=1e-4)


def test_mistakes(case):
    with pytest.raises(ValueError, match="bound=-1 must be > 0"):
        sums_of(*case, bound=-1)
    for bound in (jnp.inf, 0):
        with pytest.raises(ValueError, match=f"bound={bound} must be > 0"):
            sums_of(*case, bound=bound)
    with pytest.raises(ValueError, match=r"shape \(12, 5\), labels \(11,\)"):
        sums_of(case[0], case[1][1:])
    with pytest.raises(ValueError, match="num_classes=1 must be >= 2"):
        least_squares.moments(*case, jnp.ones(BATCH, bool), num_classes=1, bound=1.0)
    sums = sums_of(*case)
    for share in (0, 1):
        with pytest.raises(ValueError, match=f"covariance_share={share}"):
            least_squares.release(sums, 1.0, covariance_share=share, key=jax.random.key(0))
    for sigma in (-1, math.inf):
        with pytest.raises(ValueError, match=f"noise_multiplier={sigma}"):
            least_squares.release(sums, sigma, key=jax.random.key(0))
    with pytest.raises(TypeError, match="takes a MomentSum"):
        least_squares.release(case[0], 1.0, key=jax.random.key(0))
    noisy = least_squares.release(sums, 1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="ridge=0"):
        least_squares.solve(noisy, [0])


def test_negative_eigenvalues_count_as_zero():
    noisy = least_squares.NoisyMoments(
        covariance=jnp.diag(jnp.array([2.0, -0.5, -9.0])), cross=jnp.ones((3, 2)),
        covariance_std=jnp.ones(()), cross_std=jnp.ones(()),
    )  # fmt: skip
    (kernel,) = least_squares.solve(noisy, [0.25])
    np.testing.assert_allclose(kernel, np.outer([1 / 2.25, 4.0, 4.0], [1, 1]), rtol=1e-5)
    with pytest.raises(ValueError, match="ridge=inf"):
        least_squares.solve(noisy, [1.0, math.inf])
