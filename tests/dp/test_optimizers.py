"""Ready optimizers are the noise followed by optax's, and the corrected one removes the bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import dp

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 50), "b": jnp.zeros(3)}


def clipped(step):
    return dp.ClippedSum({"w": 4.0 + jnp.arange(50.0) + step, "b": jnp.ones(3)}, jnp.asarray(1.0))


def run(tx, steps=3):
    state, params = tx.init(PARAMS), PARAMS
    for step in range(steps):
        updates, state = tx.update(clipped(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"), [(dp.adam, optax.adam), (dp.sgd, optax.sgd), (dp.lamb, optax.lamb)]
)
def test_is_noise_then_optax(ours, theirs):
    made = ours(0.1, 0.7, 16, key=jax.random.key(3))
    chained = optax.chain(dp.gaussian(0.7, 16, key=jax.random.key(3)), theirs(0.1))
    jax.tree.map(np.testing.assert_array_equal, run(made), run(chained))


def test_arguments_pass_through():
    tx = dp.sgd(0.1, 0.0, 1, key=jax.random.key(0), momentum=0.9)
    plain = dp.sgd(0.1, 0.0, 1, key=jax.random.key(0))
    assert not np.allclose(run(tx)["w"], run(plain)["w"])


def second_moment_step(tx, gradient, steps=400):
    """Mean size of late updates for a constant gradient under heavy noise."""
    params = {"w": jnp.zeros(2000)}
    total = dp.ClippedSum({"w": jnp.full(2000, gradient)}, jnp.asarray(1.0))
    state, sizes = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(total, state, params)
        sizes.append(float(jnp.mean(updates["w"])))
    return np.mean(sizes[-100:])


def test_corrected_second_moment_is_that_of_the_signal():
    """With gradient g and noise s, Adam moves by g/sqrt(g^2+s^2); corrected, by about 1."""
    shared = {"b2": 0.99, "key": jax.random.key(0)}
    adam = second_moment_step(dp.adam(1.0, 1.0, 1, **shared), 0.5)
    corrected = second_moment_step(
        dp.adam_corrected(1.0, 1.0, 1, sensitivity=1.0, eps=0.05, **shared), 0.5
    )
    assert abs(-adam - 0.5 / np.sqrt(1.25)) < 0.05
    assert -corrected > 0.8


def test_corrected_without_noise_is_adam():
    key = jax.random.key(0)
    with_floor = run(dp.adam_corrected(0.1, 0.0, 1, key=key, sensitivity=1.0, eps=1e-16))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        with_floor,
        run(dp.adam(0.1, 0.0, 1, key=key)),
    )


def test_a_sweep_over_values_does_not_recompile():
    traces = []

    @jax.jit
    def step(rate, sigma, rule, key, grads):
        traces.append(1)
        summed = dp.ClippedSum(grads, rule.sensitivity())
        tx = dp.adam(rate, sigma, 8, key=key)
        return tx.update(summed, tx.init(PARAMS), PARAMS)[0]

    for rate, sigma, bound in ((0.1, 1.0, 1.0), (0.2, 0.5, 3.0), (0.3, 2.0, 0.1)):
        step(rate, sigma, dp.flat(bound), jax.random.key(1), PARAMS)
    assert len(traces) == 1


@pytest.mark.parametrize(("sensitivity", "size"), [(1.0, 8), (2.0, 1), (3.0, 16)])
def test_the_correction_is_that_of_the_noise_of_the_mean(sensitivity, size):
    """Where mean and noise grow alike, and the floor with their square, no update changes."""

    def late(sensitivity, size):
        tx = dp.adam_corrected(
            1.0, 0.5 * size, size, key=jax.random.key(0), sensitivity=sensitivity,
            b2=0.99, eps=1e-4 * sensitivity**2,
        )  # fmt: skip
        total = {"w": jnp.full(500, 0.5 * sensitivity * size)}
        state = tx.init(total)
        for _ in range(5):
            summed = dp.ClippedSum(total, jnp.asarray(sensitivity))
            updates, state = tx.update(summed, state, total)
        return updates["w"]

    alone = late(1.0, 1)
    assert jnp.std(alone) > 0
    np.testing.assert_allclose(late(sensitivity, size), alone, rtol=1e-3)


def test_the_second_moment_has_a_floor_of_5e_8():
    tx = dp.scale_by_adam_corrected(0.0)
    updates, _ = tx.update({"w": jnp.full(3, 1e-5)}, tx.init({"w": jnp.zeros(3)}))
    np.testing.assert_allclose(updates["w"], 1e-5 / 5e-8**0.5, rtol=1e-5)
