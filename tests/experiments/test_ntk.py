"""Kernels of clipped gradient flow: the paper's table with numbers, and predicted training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp
from experiments.calibration import ntk
from experiments.calibration import theory as calibration_theory


@functools.cache
def network(width, examples, dims, seed):
    of_data, of_net = jax.random.split(jax.random.key(seed))
    return ntk.problem(of_data, examples, dims), ntk.init(of_net, dims, width)


def residual(data, params):
    found = jax.vmap(ntk.outputs, (None, 0))(params, data.inputs)
    return np.asarray(found, np.float64) - np.asarray(data.targets)


@pytest.fixture(scope="module")
def table():
    found = {kind: [] for kind in ntk.KINDS}
    for seed in range(12):
        data, params = network(4, 8, 3, seed)
        each = ntk.layer_kernels(params, data.inputs)
        for kind, kernel in ntk.kernels(each, residual(data, params)).items():
            found[kind].append(ntk.properties(kernel))
    return {row["clipping"]: row for row in calibration_theory.kernel_table(found)}


@pytest.mark.parametrize(
    ("kind", "verdicts"),  # Bu et al., arXiv 2106.07830: symmetric, quadratic form, eigenvalues
    [
        ("none", "yes yes yes"),
        ("flat", "no no yes"),
        ("layerwise", "no no no"),
        ("global, flat", "yes yes yes"),
        ("global, layerwise", "yes yes yes"),
        ("global, flat, dropping", "no no yes"),  # ours: what dropping does
    ],
)
def test_table_of_the_paper(table, kind, verdicts):
    row = table[kind]
    columns = ("symmetric", "quadratic form >= 0", "eigenvalues >= 0")
    assert " ".join(row[name] for name in columns) == verdicts


def test_the_noes_are_not_rounding(table):
    assert table["flat"]["largest asymmetry"] > 0.1
    assert table["flat"]["least quadratic form"] < -1e-2
    assert table["layerwise"]["least real part"] < -1e-4


@pytest.mark.slow
def test_the_kernel_is_the_one_of_the_clipped_gradients():
    """-K (f - y) / n is what the library's clipped sum does to the outputs, to first order."""
    data, params = network(16, 8, 3, 0)
    each = ntk.layer_kernels(params, data.inputs)
    error = residual(data, params)
    jacobians = np.concatenate(ntk.jacobians(params, data.inputs), axis=1)
    for rule in (dp.flat(0.4), dp.per_layer([0.2, 0.3, 0.1]), dp.global_(1.0)):
        clipped, _ = dp.clipped_sum(ntk._loss, rule)(params, data, jnp.ones(8, bool))
        step = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(clipped.value)])
        want = ntk.clipped_kernel(each, error, rule) @ error
        np.testing.assert_allclose(jacobians @ step, want, rtol=2e-4, atol=1e-5)
        assert np.abs(want - sum(each) @ error).max() > 0.05  # something is clipped


@pytest.mark.slow
@pytest.mark.parametrize("rule", [dp.flat(0.5), dp.per_layer(0.5)], ids=["flat", "layerwise"])
def test_predicted_loss_is_the_measured_one(rule):
    data, params = network(64, 12, 4, 3)
    flow = ntk.predict(params, data, rule, time=6.0, points=60)
    excess = []
    for rate in (0.4, 0.1):
        keys = jax.random.split(jax.random.key(round(10 * rate)), 16)
        quiet, noisy = ntk.measure(
            params, data, rule, learning_rate=rate, steps=round(6 / rate), noise_multiplier=1.5,
            keys=keys,
        )  # fmt: skip
        want = np.interp(rate * np.arange(len(quiet)), flow.times, flow.loss)
        assert quiet[-1] < 0.75 * quiet[0]
        np.testing.assert_allclose(quiet, want, atol=0.03 * quiet[0])
        more = noisy - quiet
        excess.append(more[:, -1].mean())
        error = more[:, -1].std(ddof=1) / len(keys) ** 0.5
        predicted = rate * 1.5**2 * flow.excess[-1]
        assert abs(excess[-1] - predicted) < 3 * error + 0.3 * predicted
    # It fades with eta: 4 to first order, of two means that are noisy by a third each.
    assert 1.5 < excess[0] / excess[1] < 8


def test_without_clipping_the_flow_is_a_matrix_exponential():
    data, params = network(16, 8, 3, 1)
    whole, error = sum(ntk.layer_kernels(params, data.inputs)), residual(data, params)
    flow = ntk.predict(params, data, None, time=3.0, points=60)
    values, vectors = np.linalg.eigh(whole / 8)
    want = vectors @ (np.exp(-3.0 * values) * (vectors.T @ error))
    np.testing.assert_allclose(flow.loss[-1], np.mean(want**2) / 2, rtol=1e-5)
    assert not flow.excess.any()  # without a bound there is no noise
