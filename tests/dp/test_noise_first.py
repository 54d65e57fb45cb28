"""Wrappers and transforms: refused before the noise, with a reason, and at work after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dpjax import dp


def clipped():
    value = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(())}
    return dp.ClippedSum(value, jnp.asarray(1.0)), {"w": jnp.zeros(2), "b": jnp.zeros(())}


def noise(sigma=1.0):
    return dp.gaussian(sigma, 4, key=jax.random.key(0))


FIRST = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.set_to_zero()}, {"w": "on", "b": "off"}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "scale": lambda tx: optax.chain(optax.scale(0.5), tx),
    "scale by a whole number": lambda tx: optax.chain(optax.scale(3), tx),
    "clip": lambda tx: optax.chain(optax.clip(0.1), tx),
    "momentum": lambda tx: optax.chain(optax.trace(0.9), tx),
    "decay": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
    "no noise": lambda tx: optax.adam(0.1),
}


@pytest.mark.parametrize("name", FIRST)
def test_what_stands_before_the_noise_is_refused(name):
    """Its factor could depend on private data, and shrink sum, sensitivity and noise alike."""
    total, params = clipped()
    tx = FIRST[name](optax.chain(noise(), optax.adam(0.1)))
    with pytest.raises((TypeError, ValueError), match="noise comes first"):
        jax.jit(tx.update)(total, tx.init(params), params)


def test_clipping_by_the_global_norm_before_the_noise_is_refused():
    total, params = clipped()
    tx = optax.chain(optax.clip_by_global_norm(1.0), noise())
    with pytest.raises(TypeError):  # optax's own words: it meets a seal that is no float
        tx.update(total, tx.init(params), params)


@pytest.mark.parametrize("name", ["MultiSteps", "masked", "partition", "apply_if_finite", "clip"])
def test_after_the_noise_it_does_its_work(name):
    total, params = clipped()
    tx = optax.chain(noise(), FIRST[name](optax.sgd(0.1)))
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(total, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert np.all(np.asarray(updates["w"]) != 0)


def test_numbers_of_a_private_optimizer_can_be_injected():
    total, params = clipped()
    for make in (dp.adam, dp.sgd, dp.lamb):
        numbers = {"learning_rate": 0.1, "noise_multiplier": 1.0, "expected_batch_size": 4}
        key = jax.random.key(0)
        tx = optax.inject_hyperparams(make, static_args="key")(**numbers, key=key)
        state = tx.init(params)
        assert "key" not in state.hyperparams
        got, _ = jax.jit(tx.update)(total, state, params)
        plain = make(**numbers, key=key)
        want, _ = plain.update(total, plain.init(params), params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), got, want)
        state.hyperparams["learning_rate"] = jnp.asarray(0.2)
        twice, _ = tx.update(total, state, params)
        np.testing.assert_allclose(twice["w"], 2 * got["w"], rtol=1e-5)


def test_flax_takes_the_noisy_mean():
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(3))

    net = Net()
    _, params = nnx.split(net)
    grad = dp.clipped_sum(lambda p, x: jnp.sum((p["w"][...] - x) ** 2), dp.flat(1.0))
    total, _ = grad(params, jnp.ones((4, 3)), jnp.ones(4, bool))
    wrong = nnx.Optimizer(net, optax.chain(noise(), optax.sgd(0.1)), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"nnx\.Optimizer"):
        wrong.update(net, total)
    optimizer, first = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param), noise(0.0)
    mean, _ = first.update(total, first.init(params))
    optimizer.update(net, mean)
    np.testing.assert_allclose(net.w[...], 0.1 / np.sqrt(3), rtol=1e-4)
