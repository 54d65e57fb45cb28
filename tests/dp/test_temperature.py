"""The private temperature: what it finds, what it costs, and where it ends up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp, models
from dpjax.dp.temperature import LARGEST_TEMPERATURE, _derivatives
from dpjax.training import results

N = 4000


def problem(true=3.0, n=N, seed=0):
    """Labels drawn from softmax(logits / true): the best temperature is `true`."""
    rng = np.random.default_rng(seed)
    logits = true * 2 * rng.normal(size=(n, 10))
    chances = np.exp(logits / true)
    chances /= chances.sum(axis=1, keepdims=True)
    labels = (rng.random((n, 1)) > np.cumsum(chances, axis=1)).sum(axis=1)
    return logits.astype(np.float32), labels.clip(0, 9)


def mechanism(sigma=None, n=N, steps=10, epsilon=1.0):
    made = dp.calibrated(epsilon=epsilon, delta=1e-5, num_examples=n, batch_size=n, steps=steps)
    return made if sigma is None else dataclasses.replace(made, noise_multiplier=sigma)


def fit(logits, labels, mechanism, bound=5.0, key=0):
    return dp.fit_temperature(
        logits, labels, mechanism=mechanism, bound=bound, key=jax.random.key(key)
    )


@pytest.mark.parametrize("true", [0.3, 1.0, 3.0])
def test_it_finds_the_temperature(true):
    logits, labels = problem(true)
    assert fit(logits, labels, mechanism(1e-9, steps=14)) == pytest.approx(true, rel=0.07)
    private = [fit(logits, labels, mechanism(), key=key) for key in range(5)]
    assert np.median(private) == pytest.approx(true, rel=0.15)


def test_derivatives_are_those_of_the_loss():
    logits, labels = problem(n=20)

    def loss(u, z, y):
        return -jax.nn.log_softmax(z * jnp.exp(-u))[y]

    want = jax.vmap(jax.grad(loss), (None, 0, 0))(0.4, logits, labels)
    np.testing.assert_allclose(_derivatives(logits, labels, 0.4), want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -1e30, 0.0])
def test_one_example_moves_the_sum_by_no_more_than_the_bound(value):
    """Without noise, the outcome changes only through signs that one bound can turn."""
    logits, labels = problem(n=500)
    logits[0], logits[0, 3] = 0.0, value
    with np.errstate(over="raise", invalid="raise"):
        clipped = np.clip(_derivatives(np.float64(logits), labels, -2.9), -5.0, 5.0)
    assert abs(clipped[0]) <= 5
    fitted = fit(logits, labels, mechanism(1e-9, n=500))
    assert fitted == pytest.approx(fit(*problem(n=500), mechanism(1e-9, n=500)), rel=0.05)


def test_logits_that_overflow_when_scaled_count_for_nothing():
    logits, labels = problem(n=500)
    logits = np.float64(logits)
    logits[0, 3] = 1e308
    assert _derivatives(logits, labels, -2.9)[0] == 0
    assert np.isfinite(_derivatives(logits, labels, 2.9)).all()


def test_noise_decides_where_there_are_no_facts():
    """Equal logits have no derivative: each halving is a coin, of noise alone."""
    logits, labels = np.zeros((50, 3), np.float32), np.zeros(50, int)
    found = {fit(logits, labels, mechanism(n=50), key=key) for key in range(40)}
    assert len(found) > 30
    assert 1 / LARGEST_TEMPERATURE < min(found) < 1 < max(found) < LARGEST_TEMPERATURE


def test_the_noise_is_that_of_the_mechanism():
    """All clipped derivatives are -bound: a sign turns with the chance that noise exceeds n."""
    logits, labels = np.zeros((4, 2), np.float32), np.zeros(4, int)
    logits[:, 1] = 1e6
    sigma, keys = 8.0, 400
    turned = [fit(logits, labels, mechanism(sigma, n=4, steps=1), key=k) < 1 for k in range(keys)]
    want = 0.3085  # P(N(0, 8^2) > 4)
    assert abs(np.mean(turned) - want) < 5 * np.sqrt(want * (1 - want) / keys)


def test_mechanisms_of_other_batches_are_refused():
    logits, labels = problem(n=100)
    for wrong in (
        mechanism(n=99),
        dp.calibrated(epsilon=1.0, delta=1e-5, num_examples=100, batch_size=10, steps=4),
    ):
        with pytest.raises(ValueError, match="the number of labels, 100"):
            fit(logits, labels, wrong)
    for bound in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"bound={bound}"):
            fit(logits, labels, mechanism(n=100), bound=bound)


def test_a_scaled_head_divides_the_logits():
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=(6, 3))), "bias": jnp.arange(3.0)}
    params = {"body": {"w": jnp.ones(2)}, "head": head}
    made = results.scale_head(params, "head", 2.5)
    features = jnp.asarray(rng.normal(size=(4, 6)))
    want = models.dense_head(head, features) / 2.5
    np.testing.assert_allclose(models.dense_head(made["head"], features), want, rtol=1e-5)
    assert made["body"] is params["body"]


def test_a_small_bound_is_a_bound():
    logits, labels = problem(1.0)
    assert fit(logits, labels, mechanism(1e-9, steps=14), bound=0.5) > 0
