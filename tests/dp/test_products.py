"""The engine's products: norms no smaller than the exact ones, sums of full precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import normal

from dpjax.dp.engines import products as site_products
from dpjax.dp.engines import summation
from dpjax.dp.engines.forms import Tokens


def tokens_of(x, g):
    return Tokens(x, g, d=x.shape[3])


def squared_norms(x, g):
    """Of the products x_i^T g_i, in float64."""
    return np.sum(np.square(np.einsum("nbtd,nbtp->nbdp", np.float64(x), np.float64(g))), (1, 2, 3))


def test_cancelling_gradients_are_not_measured_too_small():
    """Tokens that are nearly alike, with cotangents that sum to zero: Gram matrices cancel."""
    numbers = np.random.default_rng(0)
    x = np.float32(100.0 + 1e-2 * numbers.standard_normal((50, 1, 32, 24)))
    g = numbers.standard_normal((50, 1, 32, 16))
    g = np.float32(g - g.mean(2, keepdims=True))
    found = site_products.gram_measure(site_products.gram(tokens_of(x, g)))
    upper = np.float64(found.square) + found.error
    assert np.all(upper > squared_norms(x, g))
    for i in range(5):
        x_i, g_i = x[i, None], g[i, None]
        total = summation.weighted_sum(tokens_of(x_i, g_i), jnp.ones(1), jnp.ones(1, bool))
        assert np.linalg.norm(np.float64(total)) < np.sqrt(upper[i]) + found.spread[i]


@pytest.mark.parametrize("size", [7, 2**20, 2**31 - 1])
@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_rows_that_are_looked_up_several_times(tokens, size):
    """Few are compared with each other, many sorted, together with their places if both fit."""
    numbers = np.random.default_rng(tokens)
    few = numbers.integers(0, size, 40)
    rows = few[numbers.integers(0, 40, (3, tokens))].astype(np.int32)
    values = numbers.integers(-50, 50, (3, tokens, 2)).astype(np.float32)
    want = np.zeros_like(values)
    for i, t in np.ndindex(rows.shape):
        want[i, np.argmax(rows[i] == rows[i, t])] += values[i, t]
    t = Tokens(None, None, rows[:, None, :, None], values[:, None], d=size)
    found = jax.jit(lambda values: summation.row_sums(t, values))(values)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "sizes", [(1e-21, 1e18), (1e18, 1e-21), (1e10, 0.99 * 2.0**-63), (0.99 * 2.0**-63, 1e10)]
)
def test_underflowing_gradients_are_not_measured_too_small(tokens, sizes):
    x = np.full((1, 1, tokens, 3), sizes[0], np.float32)
    g = np.full((1, 1, tokens, 4), sizes[1], np.float32)
    found = site_products.gram_measure(site_products.gram(tokens_of(x, g)))
    assert found.square[0] + found.error[0] >= squared_norms(x, g)[0]


DTYPES = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16),
          (jnp.bfloat16, jnp.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("products", [1, 2, 3])
@pytest.mark.one_in(5)
def test_products_are_those_of_exact_arithmetic(products, dtypes):
    """Also of several products an example, on both sides and of numbers of 16 bits."""
    x = jnp.asarray(normal(products, 6, 5), dtypes[0])
    g = jnp.asarray(normal(products, 6, 4, seed=1), dtypes[1])
    factors, usable = jnp.array([0.3, 0.0, 1.0, 0.7]), jnp.array([True, False, True, True])
    exact = np.einsum("nbtd,nbtp->nbdp", np.float64(x), np.float64(g))
    np.testing.assert_allclose(summation.materialize(tokens_of(x, g)), exact, rtol=0, atol=1e-5)
    for found in (
        site_products.gram_measure(site_products.gram(tokens_of(x, g))),
        site_products.outer_measure(site_products.outer(tokens_of(x, g))[0]),
    ):
        want = np.sum(exact**2, (1, 2, 3))
        np.testing.assert_allclose(found.square, want, rtol=1e-5)
        assert np.all(np.abs(found.square - want) <= found.error + 1e-6 * want)
        assert np.all(found.mass >= np.sqrt(want) * (1 - 1e-6))
    want = np.einsum("n,nbdp->bdp", np.float64(factors), exact)
    bits = 16 if dtypes == DTYPES[-1] else 22
    for a, b, wanted in ((x, g, want), (g, x, want.swapaxes(1, 2))):
        found = summation.weighted_sum(tokens_of(a, b), factors, usable)
        assert np.max(np.abs(found - wanted)) < 2.0**-bits * np.max(np.abs(exact)) * 24


@pytest.mark.parametrize("dtypes", DTYPES)
def test_no_product_is_rounded_to_less_than_float32(dtypes):
    # Large enough for `weigh` to take a product; few numbers are multiplied and added.
    x, g = jnp.zeros((4, 2, 6, 128), dtypes[0]), jnp.zeros((4, 2, 6, 70), dtypes[1])
    assert 2 * 128 * 70 > summation.BIAS
    factors = jnp.ones(4)

    def everything(x, g):
        gradients = summation.flat(summation.materialize(tokens_of(x, g)))
        return (
            site_products.gram_measure(site_products.gram(tokens_of(x, g))),
            summation.weigh(gradients, factors, factors > 0),
            summation.weighted_sum(tokens_of(x, g), factors, factors > 0),
        )  # fmt: skip

    found = [e for e in jax.make_jaxpr(everything)(x, g).eqns if e.primitive.name == "dot_general"]
    assert len(found) >= 5
    for eqn in found:
        kinds = {str(atom.aval.dtype) for atom in eqn.invars}
        assert len(kinds) == 1
        highest = (jax.lax.Precision.HIGHEST,) * 2
        assert eqn.params["precision"] == (None if kinds == {"bfloat16"} else highest)
        assert eqn.params["preferred_element_type"] == jnp.float32


def test_diagonals():
    matrices = normal(2, 3, 3)
    want = np.diagonal(matrices, axis1=2, axis2=3)
    np.testing.assert_array_equal(site_products._diagonals(matrices), want)


@pytest.mark.parametrize(
    ("margin", "test"),
    [
        ("UNIT", test_cancelling_gradients_are_not_measured_too_small),
        (
            "TINY",
            lambda: test_underflowing_gradients_are_not_measured_too_small(5, (1e-21, 1e18)),
        ),
    ],
)
def test_a_norm_without_its_margin_is_seen(monkeypatch, margin, test):
    monkeypatch.setattr(site_products, margin, 0.0)
    with pytest.raises(AssertionError):
        test()
