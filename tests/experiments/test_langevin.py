"""Two-layer networks under Langevin dynamics: the bounds against simulation."""

import jax
import numpy as np
import pytest

from experiments.lp_ft import langevin, two_layer
from experiments.lp_ft.two_layer import EVERY, Theta

TIME, STEP, PATHS = 4.0, 0.01, 80


def start(relu, head, seed=3):
    task, body = two_layer.problem(jax.random.key(seed), relu=relu)
    width = len(body)
    random = np.asarray(jax.random.normal(jax.random.key(5), (width,))) / width**0.5
    return Theta(body, random if head == "random" else np.zeros(width)), task


def simulated(theta, task, noise, share, paths=PATHS):
    runs = two_layer.simulate(
        theta, task, noise, time=TIME, step=STEP, share=share, paths=paths, key=jax.random.key(2)
    )
    error = runs.loss.std(axis=0, ddof=1) / paths**0.5
    return runs, runs.loss.mean(axis=0), error


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("head", ["random", "zero"])
@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_bounds_bound(relu, head, noise, share):
    theta, task = start(relu, head)
    bounds = langevin.split_bounds(theta, task, noise, time=TIME, step=STEP, share=share)
    runs, mean, error = simulated(theta, task, noise, share)
    slack = 3 * error + 0.01 * mean  # sampling, and Euler steps against the flow
    assert np.all(mean <= bounds.upper[::EVERY] + slack)
    assert np.all(mean >= bounds.lower[::EVERY] - slack)
    left = langevin.left_tube(runs, theta, task, noise, step=STEP, share=share)
    assert left == 0  # assumption (A3)
    # Not vacuous: the lower bound feels the noise, and the upper one the descent where it is mild.
    assert bounds.lower[-1] > 0
    if not relu and noise < 0.1:
        assert bounds.upper[-1] < 0.6 * bounds.upper[0]


def test_the_bounds_can_fail():
    """With the noise left out of them, they are crossed."""
    theta, task = start(False, "zero")
    bounds = langevin.split_bounds(theta, task, 1e-6, time=TIME, step=STEP, share=0.0)
    _, mean, error = simulated(theta, task, 0.3, 0.0)
    assert np.any(mean > bounds.upper[::EVERY] + 3 * error)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_linearized_prediction(relu, share):
    theta, task = start(relu, "random")
    bounds = langevin.split_bounds(theta, task, 0.1, time=TIME, step=STEP, share=share)
    _, mean, error = simulated(theta, task, 0.1, share)
    assert abs(bounds.linearized[-1] - mean[-1]) < 3 * error[-1] + 0.15 * mean[-1]


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_probing_is_exact(relu):
    theta, task = start(relu, "random")
    _, mean, error = simulated(theta, task, 0.3, 1.0)
    times = STEP * EVERY * np.arange(len(mean))
    law = langevin.probe(theta, task, 0.3, times)
    assert np.all(np.abs(law.loss - mean) <= 4 * error + 0.02 * mean)
    lower, upper = langevin.probe_bounds(theta, task, 0.3, times)
    assert np.all(lower <= law.loss * (1 + 1e-9))
    assert np.all(law.loss <= upper * (1 + 1e-9))
    assert lower[-1] < law.loss[-1] < upper[-1]
    np.testing.assert_allclose(law.loss[0], float(two_layer.loss(theta, task)), rtol=1e-5)
    # The noise floor: r s^2 / 4 above the best head's loss.
    late = langevin.probe(theta, task, 0.3, np.array([1e9]))
    best = langevin.probe(theta, task, 0.0, np.array([1e9]))
    modes = np.linalg.matrix_rank(np.maximum(task.inputs @ theta.body.T, 0 if relu else -np.inf))
    np.testing.assert_allclose(late.loss - best.loss, modes * 0.3**2 / 4, rtol=1e-2)


def test_more_noise_wants_more_probing():
    """The paper's claim on the budget, for the prediction and for its shape in between."""
    theta, task = start(False, "random")
    shares = np.linspace(0, 1, 11)

    def best(noise):
        found = [
            langevin.split_bounds(theta, task, noise, time=TIME, step=STEP, share=s).linearized[-1]
            for s in shares
        ]
        return shares[int(np.argmin(found))]

    assert best(0.01) < best(0.5)
