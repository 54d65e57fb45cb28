"""Two-layer networks: kernel and gradient against autodiff, and the diffusion itself."""

import jax
import numpy as np
import pytest

from experiments.lp_ft import two_layer
from experiments.lp_ft.two_layer import EVERY, Theta


def start(relu, head):
    task, body = two_layer.problem(jax.random.key(3), relu=relu)
    random = np.asarray(jax.random.normal(jax.random.key(5), (len(body),)))
    return Theta(body, random if head == "random" else np.zeros(len(body))), task


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_kernel_is_that_of_the_gradients(relu):
    theta, task = start(relu, "random")

    def outputs(theta):
        hidden = task.inputs @ theta.body.T
        return (jax.nn.relu(hidden) if relu else hidden) @ theta.head

    theta = Theta(*(jax.numpy.asarray(x, jax.numpy.float32) for x in theta))
    parts = jax.tree.leaves(jax.jacobian(outputs)(theta))
    whole = np.concatenate([np.reshape(p, (len(task.targets), -1)) for p in parts], axis=1)
    np.testing.assert_allclose(
        two_layer.kernel(theta, task), whole @ whole.T / len(whole), rtol=1e-4, atol=1e-5
    )
    grads = jax.grad(two_layer.loss)(theta, task)
    for got, want in zip(two_layer.gradient(theta, task)[1], grads):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_without_noise_it_is_gradient_descent_on_the_head_then_on_all():
    theta, task = start(True, "random")
    runs = two_layer.simulate(
        theta, task, 0.0, time=0.4, step=0.02, share=0.5, paths=1, key=jax.random.key(0)
    )
    losses = []
    for number in range(21):
        value, slope = two_layer.gradient(theta, task)
        losses.append(value)
        body = theta.body if number < 10 else theta.body - 0.02 * slope.body
        theta = Theta(body, theta.head - 0.02 * slope.head)
    np.testing.assert_allclose(runs.loss[0], losses[::EVERY], rtol=1e-4)


def test_noise_has_the_stated_size():
    """From a flat start (zero head and body: no gradient), |theta| grows as a random walk."""
    task, body = two_layer.problem(jax.random.key(3), relu=False)
    theta = Theta(0 * body, np.zeros(len(body)))
    runs = two_layer.simulate(
        theta, task, 1e-3, time=0.02, step=0.001, share=0.0, paths=400, key=jax.random.key(0)
    )
    # tr K = |B|^2 + d |v|^2 for whitened inputs, with k d and k entries of variance s^2 t.
    want = 2 * body.size * 1e-6 * 0.02
    np.testing.assert_allclose(runs.trace[:, -1].mean(), want, rtol=0.1)
    assert runs.trace[:, 0].max() == 0


def test_noise_level():
    level = two_layer.noise_level(
        learning_rate=0.04, noise_multiplier=3.0, bound=2.0, batch_size=12
    )
    assert level == pytest.approx(0.2 * 3 * 2 / 12)


def test_steps_are_whole_records():
    theta, task = start(False, "zero")
    with pytest.raises(ValueError, match=r"time / step = 7 must be a multiple of 10"):
        two_layer.simulate(
            theta, task, 0.1, time=0.07, step=0.01, share=0.0, paths=2, key=jax.random.key(0)
        )
