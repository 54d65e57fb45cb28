"""Weights that are scaled by a number: products with a scalar behind them, with vmap's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree, both
from test_engine_bound import check

from dpjax import dp
from dpjax.dp.engines import bookkeeping

D, P, RANK = 12, 10, 2
NUMBERS = np.random.default_rng(0)
FROZEN = NUMBERS.standard_normal((D, P), np.float32)
PARAMS = {
    "w": NUMBERS.standard_normal((D, P), np.float32),
    "gain": np.float32(0.7),
    "gains": NUMBERS.standard_normal(P, np.float32),
    "a": NUMBERS.standard_normal((D, RANK), np.float32),
    "b": NUMBERS.standard_normal((RANK, P), np.float32),
}
U = NUMBERS.standard_normal(P, np.float32)
BATCH = NUMBERS.standard_normal((5, 7, D), np.float32)
MASK = np.arange(5) != 1


def unit(v):
    return v / jnp.linalg.norm(v)


def spectral(p, w=None):
    w = p["w"] if w is None else w
    v = jax.lax.stop_gradient(unit(w @ U))
    u = jax.lax.stop_gradient(unit(v @ w))
    return w / (v @ w @ u)


def power_iteration(p):
    """The vectors have gradients too."""
    w = p["w"]
    v = unit(w @ U)
    return w / (v @ w @ unit(v @ w))


def mean_size(p):
    return p["w"] / jnp.mean(jnp.abs(p["w"]), keepdims=True)


def length(p):
    return jnp.broadcast_to(1 / jnp.linalg.norm(p["w"]), (D, P)) * p["w"] * p["gain"]


def gate(p):
    return 3.0 * (jnp.tanh(p["gain"]) * p["w"])


def gains(p):
    return p["w"] * jnp.exp(p["gains"])[None]


def moved(p):
    """Scaled as a vector, turned, cut and negated."""
    flat = jnp.concatenate([p["w"].reshape(-1), jnp.ones(4)]) * p["gain"]
    return -flat[: D * P].reshape(D, P).T.T


def turned(p):
    return (p["gains"][:, None] * p["w"].T / p["gain"]).T


def dora(p):
    merged = FROZEN + p["a"] @ p["b"]
    norm = jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=0))
    return merged * (p["gains"] / norm)[None]


def lora_gate(p):
    return p["gain"] * (FROZEN + 0.5 * p["a"] @ p["b"])


def rows(p):
    """A number for each row stays where it is."""
    return p["w"] * p["b"].sum(1)[0] * p["a"][:, :1]


def own_norms(p):
    """So do numbers that depend on the weight."""
    return p["w"] * (p["gains"] / jnp.linalg.norm(p["w"], axis=0))[None]


def used(params, weight):
    names = {name for name in params if name in weight.__code__.co_consts}
    names |= {"w"} if weight in (spectral, gains) else set()
    return {name: params[name] for name in sorted(names)}


def routes(loss_fn, params, batch=BATCH):
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    return {leaf.path: leaf.route for leaf in plan}


TAKEN = [
    spectral, power_iteration, mean_size, length, gate, gains, moved, turned, dora, lora_gate,
]  # fmt: skip


def right(x, w):
    return x @ w


def left(x, w):
    return (w.T @ x.T).T


def convolved(x, w):
    return jax.lax.conv_general_dilated(
        x.T[None], w.T[:, :, None], (1,), "VALID", dimension_numbers=("NCH", "OIH", "NCH")
    )[0].T


def twice(x, w):
    return jnp.tanh(x @ w) @ w.T @ w


def jitted(x, w):
    return jax.jit(jnp.matmul)(x, w)


@pytest.mark.parametrize("use", [right, left, convolved, twice, jitted])
@pytest.mark.parametrize("weight", [*TAKEN, rows, own_norms])
@pytest.mark.one_in(3)
def test_scaled_weights(weight, use):
    params = used(PARAMS, weight)

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(use(x, weight(params))))

    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    if weight in TAKEN and use is not twice and "a" not in params:
        found = routes(loss_fn, params)
        direct = {name for name in ("gain", "gains") if name in params}
        assert {name for name, route in found.items() if route == "direct"} == direct
        assert "derived" not in found.values()


@pytest.mark.parametrize("weight", [dora, lora_gate])
def test_scaled_products_of_two_weights(weight):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ weight(params)))

    found = routes(loss_fn, used(PARAMS, weight))
    assert found.pop("a") == found.pop("b") == "gram"
    assert list(found.values()) == ["direct"]


@pytest.mark.parametrize("function", [jax.checkpoint, jax.jit])
def test_inside_of_calls(function):
    """The norm and the product are both inside; inside of a scan they stay as they are."""

    @function
    def layer(x, params):
        return jnp.tanh(x @ spectral(params)) @ FROZEN.T

    def loss_fn(params, x):
        y = layer(layer(x, params), {"w": params["c"]})
        turn = lambda y, _: (jnp.sin(y @ spectral(None, params["in"]) @ FROZEN.T), None)  # noqa: E731
        return jnp.sum(jnp.sin(jax.lax.scan(turn, y, length=2)[0]))

    params = {name: (1 + i) * PARAMS["w"] for i, name in enumerate(("w", "c", "in"))}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    found = routes(loss_fn, params)
    assert found["w"] == found["c"] != "derived"


@pytest.mark.parametrize("one", [False, True])
def test_rows_of_a_scaled_table(one):
    def loss_fn(params, x):
        table = params["w"] / jnp.max(jnp.abs(params["w"]))
        rows, g = (x["rows"][0], x["g"][0]) if one else (x["rows"], x["g"])
        return jnp.sum(jnp.sin(table[rows] * g))

    batch = {"rows": NUMBERS.integers(0, D, (5, 7)), "g": BATCH[:, :, :P]}
    params = {"w": PARAMS["w"]}
    agree(loss_fn, params, batch, mask=MASK, tolerance=1e-4)
    assert routes(loss_fn, params, batch) == {"w": "embed"}


@pytest.mark.parametrize("fill", [None, 0.0, 2.0, -np.inf])
def test_rows_that_are_filled_have_no_scale(fill):
    def loss_fn(params, rows):
        table = params["w"] * params["gain"]
        x = jnp.take(table, rows, axis=0, mode="fill", fill_value=fill)
        return jnp.sum(jnp.exp(-jnp.square(x)) @ U)

    params = {"w": PARAMS["w"], "gain": np.float32(-2)}
    agree(loss_fn, params, np.array([[0, 3], [D, 1], [2, 2], [5, D + 1], [7, 8]]), mask=MASK,
          tolerance=1e-4)  # fmt: skip


def test_a_loss_that_reads_an_array_in_place():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(jax.new_ref(x)[...] @ gate(params)))

    agree(loss_fn, used(PARAMS, gate), BATCH, mask=MASK, tolerance=1e-4)


@pytest.mark.parametrize("times", [2, 6])
def test_one_scale_of_a_weight_that_is_used_often(times):
    """It meets the example several times, and is one scalar."""

    def loss_fn(params, x):
        w, c = spectral(params), params["c"] / jnp.linalg.norm(params["c"])
        for _ in range(times):
            x = jnp.tanh(x @ w @ c.T)
        return jnp.sum(jnp.sin(x))

    params = {"w": PARAMS["w"], "c": FROZEN}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    assert not {"derived", "direct"} & set(routes(loss_fn, params).values())


def test_a_recurrent_layer_that_starts_with_zeros():
    """Its first product is one of parameters alone."""

    def loss_fn(params, x):
        h, w = jnp.zeros(P), params["h"] / jnp.linalg.norm(params["h"])
        for row in x:
            h = jnp.tanh(h @ w + row @ params["w"])
        return jnp.sum(jnp.sin(h))

    params = {"w": PARAMS["w"], "h": FROZEN[:P]}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    assert not {"derived", "direct"} & set(routes(loss_fn, params).values())


def test_parts_of_a_scaled_weight_that_has_a_penalty():
    """Each part has its share of the gradients of both scalars."""

    def loss_fn(params, x):
        q, k, v = jnp.split(params["w"] / jnp.linalg.norm(params["w"]), [3, 6], axis=1)
        y = jnp.tanh(x @ q) @ jnp.sin(x @ k).T @ (x @ v)
        return jnp.sum(y) + 0.1 * jnp.sum(params["w"] ** 2) + x[0, 0] * jnp.sum(params["w"])

    params = {"w": PARAMS["w"]}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    assert routes(loss_fn, params) == {"w": "gram"}


def test_a_scale_for_each_of_a_batch_of_kernels():
    params = {"w": np.stack([PARAMS["w"]] * 3), "gains": PARAMS["gains"][:3]}

    def loss_fn(params, x):
        w = params["w"] * params["gains"][:, None, None]
        return jnp.sum(jnp.sin(jnp.einsum("td,kdp->tkp", x, w)))

    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)
    assert routes(loss_fn, params) == {"w": "gram", "gains": "direct"}


def test_kernels_that_share_a_gain_and_have_a_penalty():
    def loss_fn(params, x):
        y = jnp.tanh(x @ (params["w"] * params["gain"])) @ (params["c"] * params["gain"]).T
        return jnp.sum(jnp.sin(y)) + 0.1 * jnp.sum(params["w"] ** 2) + jnp.sum(x @ params["c"])

    params = {name: PARAMS[name] for name in ("w", "gain")} | {"c": FROZEN}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fewer_bits(dtype):
    """Kernels that are converted, or leaves of few bits, stay as they are."""

    def loss_fn(params, x):
        w = spectral(params).astype(dtype)
        few = (params["few"] / jnp.linalg.norm(params["few"])).astype(dtype)
        return jnp.sum(jnp.sin(x.astype(dtype) @ (w + few)), dtype=jnp.float32)

    params = {"w": PARAMS["w"], "few": PARAMS["w"].astype(dtype)}
    agree(loss_fn, params, BATCH, mask=MASK, tolerance=3e-2, slack=3e-2)


@pytest.mark.parametrize("gain", [0.0, 1e-12, 1e12])
def test_gains_far_from_one(gain):
    def loss_fn(params, x):
        return jnp.sum((x["x"] @ (params["gain"] * params["w"])) * x["g"])

    params = {"w": PARAMS["w"], "gain": np.float32(gain)}
    agree(loss_fn, params, {"x": BATCH, "g": BATCH[:, :, :P]}, mask=MASK, tolerance=1e-4)


def test_products_that_leave_the_range_without_their_scale_are_left_out():
    """The one difference: vmap keeps such an example."""

    def loss_fn(params, x):
        scale = jax.lax.stop_gradient(params["gain"])
        return jnp.sum(x["x"] @ (params["w"] * scale) * x["g"])

    params = {"w": 1e15 * PARAMS["w"], "gain": np.float32(1e-15)}
    batch = {"x": BATCH.copy(), "g": BATCH[:, :, :P].copy()}
    batch["x"][2] *= np.float32(1e28)
    batch["g"][2] *= np.float32(1e-28)
    (_, facts), (total, found) = both(loss_fn, dp.flat(1.0), params, batch, np.ones(5, bool))
    assert facts.factors[2, 0] > 0 == found.factors[2, 0]
    others = np.arange(5) != 2
    np.testing.assert_allclose(found.factors[others], facts.factors[others], rtol=1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(total.value))


def test_scalars_that_cancel_one_another():
    """Two terms of up to 1e4 times the product's gradient, whose sum is smaller than that."""

    def loss_fn(params, e):
        penalty = jnp.sum(params["w"] * FROZEN)
        one, other = e["c"] * penalty, e["k"] * jnp.sum(params["w"] * FROZEN * 2)
        return jnp.sum((e["x"] @ params["w"]) * e["g"]) + one + other

    share = np.repeat(np.float32([0, 1e-7, 1e-4, 1e-2]), 3)
    size = np.tile(np.float32([1, 1e2, 1e4]), 4)
    x, g = np.tile(BATCH[:1], (12, 1, 1)), np.tile(BATCH[1:2, :, :P], (12, 1, 1))
    odd = {"x": x, "g": g, "c": size, "k": -size * (1 + share) / 2}
    ordinary = {"x": BATCH[2], "g": g[0], "c": np.float32(0.5), "k": np.float32(0.1)}
    check(loss_fn, {"w": PARAMS["w"]}, ordinary, odd, rtol=0.02, crowd=20)
    example = jax.tree.map(lambda leaf: leaf[0], odd)
    (leaf,) = bookkeeping.plan(loss_fn, {"w": PARAMS["w"]}, example)
    assert leaf.route in ("gram", "outer")


def test_the_bound():
    """Gradients whose part along the norm cancels the rest, tokens that cancel, other scales."""

    def loss_fn(params, e):
        return jnp.sum((e["x"] @ spectral(params)) * e["g"])

    x, g = BATCH[:1].repeat(6, 0), NUMBERS.standard_normal((6, 7, P)).astype(np.float32)
    # Along the first singular vectors the kernel over its norm does not change.
    left, _, right = np.linalg.svd(PARAMS["w"])
    x[0], g[0] = left[:, 0], right[0]
    x[1:3, 1::2], g[1:3, 1::2] = x[1:3, :1], -g[1:3, :1]
    x[1:3, ::2], g[1:3, ::2] = x[1:3, :1], g[1:3, :1]
    for i, scale in enumerate((1e18, 1e-18, 1e36)):
        x[3 + i] *= np.float32(scale)
    check(loss_fn, {"w": PARAMS["w"]}, {"x": BATCH[1], "g": g[3]}, {"x": x, "g": g})
