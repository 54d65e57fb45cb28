"""`dp.explain`: shares of parameters, not of leaves, and the largest direct leaves with advice."""

import jax
import jax.numpy as jnp
import pytest

from dpjax import dp

PARAMS = {
    "kernel": jnp.ones((8, 4)),
    "scale": jnp.ones(8),
    "big": jnp.ones((6, 10)),
    "bias": jnp.float32(1.0),
}


def loss(params, x):
    out = jnp.tanh((x * params["scale"]) @ params["kernel"]) + params["bias"]
    return jnp.sum(out) + jnp.sum(params["big"] ** 2)


def test_shares_are_of_parameters_and_add_up_to_one():
    params = {"kernel": jnp.ones((8, 4)), "scale": jnp.ones(8)}
    simple = lambda p, x: jnp.sum(jnp.tanh((x * p["scale"]) @ p["kernel"]))  # noqa: E731
    plan = dp.bookkeeping.plan(simple, params, jnp.ones(8))
    shares = dp.route_shares(plan, params)
    assert shares["direct"] == pytest.approx(0.2)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_the_largest_direct_leaf_comes_first_with_reason_and_advice():
    text = dp.explain(loss, PARAMS, jax.ShapeDtypeStruct((8,), jnp.float32))
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    sizes = [jnp.size(PARAMS[name]) for name in listed]
    assert listed
    assert sizes == sorted(sizes, reverse=True)
    direct = {leaf.path: leaf for leaf in dp.bookkeeping.plan(loss, PARAMS, jnp.ones(8))}
    for name in listed:
        assert direct[name].route == "direct"
        assert direct[name].reason in text


def test_a_model_without_direct_leaves_has_no_advice():
    text = dp.explain(lambda p, x: jnp.sum(x @ p), jnp.ones((8, 4)), jnp.ones((5, 8)))
    assert "direct" not in text
    assert "100.0 %" in text
