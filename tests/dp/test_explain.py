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


def test_a_scale_of_every_weight_leaves_the_gram_route_and_one_of_every_row_does_not():
    """What scale-then-privatize (arXiv 2507.01129) does to a kernel, as a change of variables."""
    base, scales = jnp.ones((64, 32)), jnp.linspace(0.1, 1.0, 2048).reshape(64, 32)
    routes = {
        "plain": lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])),
        "of every weight": lambda p, x: jnp.sum(jnp.tanh(x @ (base + scales * p["w"]))),
        "of every row": lambda p, x: jnp.sum(jnp.tanh(x @ base + (x * scales[:, :1].T) @ p["w"])),
    }
    params, x = {"w": jnp.zeros((64, 32))}, jnp.ones((16, 64))
    found = {name: dp.bookkeeping.plan(f, params, x)[0].route for name, f in routes.items()}
    assert found == {"plain": "gram", "of every weight": "derived", "of every row": "gram"}


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


def test_no_parameters():
    assert dp.explain(lambda params, x: jnp.sum(x), {}, jnp.ones(3)).startswith("route")


def test_what_is_formed_for_each_example_is_listed():
    params = {
        "small": jnp.ones((40, 40)),
        "mixed": jnp.ones((80, 80)),
        "masked": jnp.ones((40, 40)),
    }
    mask = jnp.tril(jnp.ones((40, 40)))

    def loss(params, x):
        x = jnp.tanh(x @ (params["masked"] * mask) @ params["small"])
        return jnp.sum(jnp.concatenate([x, x]) @ (params["mixed"] @ jnp.sin(params["mixed"])))

    text = dp.explain(loss, params, jnp.ones(40))
    _, listed = text.split("formed for each example")
    assert "mixed [80, 80]" in listed
    assert "to the output of the product" in listed
    assert not any(name in listed for name in ("masked", "small"))


@pytest.mark.parametrize(
    ("kernel", "advice"),
    [
        (lambda w: jax.lax.fori_loop(0, 2, lambda _, w: jnp.sin(w), w), "without loops"),
        (lambda w: jnp.linalg.solve(jnp.eye(4) + w, jnp.eye(4)), "or solvers"),
        (lambda w: jnp.sin(w.astype(jnp.bfloat16)), "in float32"),
        (None, "before the loop"),
    ],
)
def test_weights_whose_function_is_not_known(kernel, advice):
    def loss(params, x):
        if kernel is not None:
            return jnp.sum(x @ kernel(params["w"]))
        turn = lambda x, _: (x @ jnp.sin(params["w"]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(turn, x, None, length=2)[0])

    assert advice in dp.explain(loss, {"w": jnp.ones((4, 4))}, jnp.ones(4))
