"""Weights that contain a product of two small ones: two sites each, with vmap's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree
from test_engine_bound import check

from dpjax.dp.engines import bookkeeping

D, P, RANK = 12, 10, 2
NUMBERS = np.random.default_rng(0)
FROZEN = NUMBERS.standard_normal((D, P), np.float32)
PARAMS = {
    "a": NUMBERS.standard_normal((D, RANK), np.float32),
    "b": NUMBERS.standard_normal((RANK, P), np.float32),
}
BATCH = NUMBERS.standard_normal((5, 7, D), np.float32)


def merged(p):
    return FROZEN + 0.5 * (p["a"] @ p["b"])


def taken_away(p):
    return 2.0 * (FROZEN - p["a"] @ p["b"] / 3.0)


def turned_factors(p):
    return jnp.einsum("ir,rj->ij", p["a"].T.reshape(RANK, D).T, -p["b"]) + FROZEN


def of_one_leaf(p):
    """Both factors are parts of one leaf."""
    joined = jnp.concatenate([p["a"], p["b"].T])
    return FROZEN + joined[:D] @ joined[D:].T


def on_a_derived_base(p):
    """The base is a function of a trained leaf: it is no constant."""
    return jnp.sin(p["c"]) + p["a"] @ p["b"]


def less_a_derived_base(p):
    return p["a"] @ p["b"] - jnp.tanh(p["c"])


def on_a_repeated_row(p):
    return jnp.broadcast_to(p["c"][:1], (D, P)) + p["a"] @ p["b"]


def on_a_trained_base(p):
    return p["c"] + p["a"] @ p["b"]


def on_a_stopped_base(p):
    return jax.lax.stop_gradient(p["c"]) + p["a"] @ p["b"]


def of_a_stopped_factor(p):
    return FROZEN + jax.lax.stop_gradient(p["a"]) @ p["b"]


def of_a_factor_with_a_stopped_part(p):
    return FROZEN + (p["a"] + jax.lax.stop_gradient(p["c"][:, :RANK])) @ p["b"]


def routes(loss_fn, params, batch):
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    return {leaf.path: (leaf.route, leaf.reason) for leaf in plan}


WEIGHTS = [merged, taken_away, turned_factors, of_one_leaf]
BASES = [
    on_a_derived_base, less_a_derived_base, on_a_repeated_row, on_a_trained_base, on_a_stopped_base,
    of_a_stopped_factor, of_a_factor_with_a_stopped_part,
]  # fmt: skip


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "use",
    [lambda x, w: x @ w, lambda x, w: w.T @ x.T, lambda x, w: jnp.einsum("ij,ti->jt", w, x),
     lambda x, w: jnp.einsum("tsi,ij->stj", x.reshape(1, 7, D), w),
     lambda x, w: (w @ jnp.sin(x[:, :P]).T).T, lambda x, w: x[0] @ w],
)  # fmt: skip
@pytest.mark.one_in(5)
def test_factors_of_a_weight(weight, use):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(use(x, weight(params))))

    agree(loss_fn, PARAMS, BATCH, tolerance=1e-4, mask=np.arange(5) != 1)


@pytest.mark.parametrize("weight", BASES)
def test_bases_that_are_no_constants(weight):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ weight(params)))

    params = PARAMS | {"c": FROZEN}
    agree(loss_fn, params, BATCH, tolerance=1e-4, mask=np.arange(5) != 1)
    unused = {path for path, (route, _) in routes(loss_fn, params, BATCH).items()
              if route == "unused"}  # fmt: skip
    gradient = jax.grad(lambda p: sum(loss_fn(p, x) for x in BATCH))(params)
    assert unused == {key for key, g in gradient.items() if not np.any(g)}


@pytest.mark.parametrize(
    ("x", "g", "a", "b"),
    [(1e-30, 1e30, 1, 1e10), (1e37, 1e-33, 1, 1e-5), (1e30, 1e-30, 1e10, 1), (1e-36, 1e36, 1e3, 1)],
)
def test_products_that_leave_the_range_of_float32(x, g, a, b):
    """x a or g b^T would be infinite or zero, where x^T g is an ordinary number."""
    batch = {"x": np.float32(x) * BATCH, "g": np.float32(g) * BATCH[:, :, :P]}
    params = {"a": np.float32(a) * PARAMS["a"], "b": np.float32(b) * PARAMS["b"]}

    def loss_fn(params, e):
        return jnp.sum((e["x"] @ merged(params)) * e["g"])

    agree(loss_fn, params, batch, tolerance=1e-3, mask=np.arange(5) != 1)


def test_leaves_of_64_bits():
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, PARAMS)

        def loss_fn(params, x):
            return jnp.sum(jnp.sin(x @ merged(params).astype(jnp.float32)))

        agree(loss_fn, params, jnp.float32(BATCH), tolerance=1e-4, mask=np.arange(5) != 1)


def test_the_factors_are_sites():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ merged(params)))

    found = routes(loss_fn, PARAMS, BATCH)
    assert found["a"][1].startswith("T=7 d=12 p=2")
    assert found["b"][1].startswith("T=7 d=2 p=10")
    assert "derived" not in {route for route, _ in found.values()}
    # Of a large rank, products with both factors would take longer.
    wide = {"a": FROZEN[:, :8], "b": FROZEN[:8]}
    assert {route for route, _ in routes(loss_fn, wide, BATCH).values()} == {"derived"}


def test_factors_that_are_used_elsewhere():
    """The first factor is an input's weight too; the second has a penalty; the product is twice."""

    def loss_fn(params, x):
        w = merged(params)
        y = jnp.tanh(x @ w) @ w.T
        y = y + jnp.sin(x @ params["a"]) @ params["a"].T
        return jnp.sum(jnp.sin(y)) + 0.1 * jnp.sum(params["b"] ** 2)

    agree(loss_fn, PARAMS, BATCH, tolerance=1e-3, mask=np.arange(5) != 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fewer_bits(dtype):
    """A merged weight that is converted is formed, in the precision of the leaves."""

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x.astype(dtype) @ merged(params).astype(dtype)), dtype=jnp.float32)

    agree(loss_fn, PARAMS, BATCH, tolerance=3e-2, slack=3e-2, mask=np.arange(5) != 1)


def test_inside_of_other_functions():
    """In a jitted layer and a checkpoint; inside of a scan it is left to JAX."""

    @jax.checkpoint
    @jax.jit
    def layer(x, p):
        return jnp.tanh(x @ merged(p))

    def loss_fn(params, x):
        y = layer(x, params)
        z, _ = jax.lax.scan(
            lambda c, _: (jnp.sin(c @ merged(params) @ FROZEN.T), None), x, length=2
        )
        return jnp.sum(y) + jnp.sum(z)

    agree(loss_fn, PARAMS, BATCH, tolerance=1e-4, mask=np.arange(5) != 1)


def test_the_bound():
    """Cotangents that the second factor takes out, tokens that cancel, and extreme scales."""

    def loss_fn(params, e):
        return jnp.sum((e["x"] @ merged(params)) * e["g"])

    x, g = BATCH[:1].repeat(6, 0), NUMBERS.standard_normal((6, 7, P)).astype(np.float32)
    kernel = np.linalg.svd(PARAMS["b"])[2][RANK:]
    g[0] = kernel[:7]
    x[1:3, 1::2], g[1:3, 1::2] = x[1:3, :1], -g[1:3, :1]
    x[1:3, ::2], g[1:3, ::2] = x[1:3, :1], g[1:3, :1]
    for i, scale in enumerate((1e18, 1e-18, 1e36)):
        x[3 + i] *= np.float32(scale)
    ordinary = {"x": BATCH[1], "g": g[3]}
    check(loss_fn, PARAMS, ordinary, {"x": x, "g": 100 * g}, rtol=np.float32([5e-2] + [1e-3] * 5))


def of_a_leaf_without_numbers(p):
    return FROZEN + p["a"] @ jnp.concatenate([p["none"], p["b"]], 1)


@pytest.mark.parametrize("function", [merged, on_a_derived_base, of_a_leaf_without_numbers])
def test_checkpointed_functions_of_weights(function):
    """`jax.checkpoint` around what depends on parameters alone changes nothing."""
    params = PARAMS | {"c": FROZEN, "none": np.zeros((RANK, 0), np.float32)}

    def loss_fn(params, x):
        decay = jax.checkpoint(lambda a: jnp.tanh(jnp.sum(a**2)))(params["a"])
        return jnp.sum(jnp.tanh(x @ jax.checkpoint(function)(params))) + decay * x[0, 0]

    agree(loss_fn, params, BATCH[:4], tolerance=3e-5)
    plan = bookkeeping.plan(loss_fn, params, BATCH[0])
    assert "direct" not in {leaf.route for leaf in plan}
