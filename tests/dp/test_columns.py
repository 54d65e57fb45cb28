"""Weights whose columns are scaled and shifted: recognized, measured as vmap does, and bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree, set_apart
from test_engine_bound import check, check_cancelling_penalty, convolve

from dpjax import dp
from dpjax.dp.engines import bookkeeping, plans, products

D, P, TOKENS = 6, 4, 7


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight_norm(p):
    norm = jnp.sqrt(jnp.sum(jnp.square(p["w"]), 0, keepdims=True))
    return p["w"] / norm * p["gain"][None]


def of_linalg(p):
    return p["w"] / jnp.linalg.norm(p["w"], axis=0) * jnp.exp(p["gain"])


def standardized(p):
    centered = p["w"] - jnp.mean(p["w"], 0, keepdims=True)
    variance = jnp.mean(jnp.square(centered), 0)
    return centered * (jax.lax.rsqrt(jnp.maximum(D * variance, 1e-4)) * p["gain"])[None] + 0.1


def of_the_other_side(p):
    """A weight of outputs times inputs, turned."""
    norm = jnp.linalg.norm(p["v"].reshape(P, -1), axis=1, keepdims=True)
    return (p["v"] / norm).T * p["gain"]


def along_rows(p):
    """Norms over outputs: the product that is of this form is the transposed one."""
    return p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2, 1, keepdims=True)) * p["rows"][:, None]


def triangular(p):
    """Behind a mask that the function itself makes."""
    return jnp.tril(p["w"]) * p["gain"] / jnp.linalg.norm(p["w"], axis=0)


def shifted(p):
    """The mean taken out, and put in again at half."""
    mean = p["w"].mean(0, keepdims=True)
    return (p["w"] - mean) + 0.5 * mean * p["gain"][None]


@jax.jit
def in_a_function(p):
    return weight_norm(p)


KERNELS = [
    weight_norm, of_linalg, standardized, of_the_other_side, along_rows,
    shifted, in_a_function,
]  # fmt: skip
SHAPES = {"w": (D, P), "v": (P, D), "gain": (P,), "rows": (D,), "scale": ()}


def parameters(kernel, shapes=SHAPES):
    """Those that the kernel reads."""
    used, every = set(), {k: normal(*v, seed=i) for i, (k, v) in enumerate(shapes.items())}

    class Noted(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    with jax.numpy_rank_promotion("allow"):
        getattr(kernel, "__wrapped__", kernel)(Noted(every))
    return {k: every[k] for k in used}


def through(kernel):
    def loss_fn(params, x):
        with jax.numpy_rank_promotion("allow"):  # models do
            return jnp.sum(jnp.sin(x @ kernel(params)) * jnp.arange(1.0, 1 + P))

    return loss_fn


def by_columns(loss_fn, params, batch):
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    return all("by columns" in leaf.reason for leaf in plan)


@pytest.fixture(params=["gram", "outer again", "outer"])
def way(request, monkeypatch):
    """How norms are computed, whatever is cheapest."""
    norm = "gram" if request.param == "gram" else "outer again"
    monkeypatch.setattr(plans.products, "cheapest", lambda form: norm)
    if request.param != "outer":
        monkeypatch.setattr(products, "can_keep", lambda form, times=1: False)
    return request.param


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.one_in(5)
def test_functions_of_columns(kernel, way):
    tokens = 1 if kernel is in_a_function else TOKENS
    params, batch = parameters(kernel), normal(5, tokens, D, seed=9)
    assert by_columns(through(kernel), params, batch)
    agree(through(kernel), params, batch, mask=np.arange(5) != 1, tolerance=1e-3)


def clipped_columns(p):
    return p["w"] / jnp.max(jnp.abs(p["w"]), 0, keepdims=True)


def masked(p):
    return weight_norm(p) * (np.arange(D * P).reshape(D, P) % 3 > 0)


def nonlinear(p):
    return jnp.tanh(weight_norm(p))


def of_rows_and_columns(p):
    return weight_norm(p) - p["w"].mean(1, keepdims=True)


def of_cubes(p):
    return p["w"] / jnp.sum(p["w"] ** 3, 0, keepdims=True)


def of_two_leaves(p):
    return weight_norm({"w": p["w"] + p["v"].T, "gain": p["gain"]})


def of_a_part_of_a_column(p):
    return p["w"] / jnp.linalg.norm(p["w"][: D // 2], axis=0)


@pytest.mark.parametrize(
    "kernel",
    [clipped_columns, masked, triangular, nonlinear, of_rows_and_columns, of_cubes, of_two_leaves,
     of_a_part_of_a_column],
)  # fmt: skip
def test_other_functions(kernel):
    params, batch = parameters(kernel), normal(5, TOKENS, D, seed=9)
    assert not by_columns(through(kernel), params, batch)
    agree(through(kernel), params, batch, mask=np.arange(5) != 1, tolerance=1e-3)


@pytest.mark.parametrize(
    ("shape", "spec", "groups", "dtype"),
    [((3, 3, 4, 6), "HWIO", 1, jnp.float16), ((3, 3, 4, 6), "HWIO", 1, jnp.bfloat16),
     ((6, 4, 3, 1), "OIHW", 1, jnp.float32), ((3, 2, 2, 6), "HWIO", 2, jnp.float32)],
)  # fmt: skip
@pytest.mark.one_in(3)
def test_standardized_kernels(shape, spec, groups, dtype, way):
    axes = tuple(spec.index(axis) for axis in "HWI")
    gains = tuple(6 if axis == "O" else 1 for axis in spec)

    def loss_fn(params, x):
        w = params["w"] - params["w"].mean(axes, keepdims=True)
        w = w / (params["w"].std(axes, keepdims=True) + 1e-5) * params["gain"].reshape(gains)
        out = jax.lax.conv_general_dilated(
            x.astype(dtype)[None], w.astype(dtype), (1, 1), "SAME",
            dimension_numbers=("NHWC", spec, "NHWC"), feature_group_count=groups,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    params, batch = {"w": normal(*shape), "gain": normal(6)}, normal(5, 5, 4, 4, seed=9)
    assert by_columns(loss_fn, params, batch)
    tolerance = 1e-3 if dtype == jnp.float32 else 2e-2
    agree(loss_fn, params, batch, mask=np.arange(5) != 1, tolerance=tolerance, slack=tolerance)


def test_gains_that_weights_share(way):
    """One leaf of gains for all layers; one kernel that is used twice; experts side by side."""

    def loss_fn(params, x):
        for name, gain in zip("abb", params["gain"]):
            w = params[name] / jnp.linalg.norm(params[name], axis=0, keepdims=True)
            x = jnp.tanh(x @ (w * gain[None] if name == "a" else w))
        own = params["experts"] / jnp.linalg.norm(params["experts"], axis=1, keepdims=True)
        return jnp.sum(jnp.einsum("etd,edp->etp", x.reshape(2, -1, D), own * params["gain"][0, 0]))

    params = {k: normal(D, D, seed=i) for i, k in enumerate("ab")}
    params |= {"gain": normal(2, D), "experts": normal(2, D, 3)}
    batch = normal(5, 8, D, seed=9)
    agree(loss_fn, params, batch, mask=np.arange(5) != 1, tolerance=1e-3)


def linear(params, e):
    return jnp.sum((e["x"] @ weight_norm(params)) * e["g"])


def odd_examples():
    """Gradients that weight norm takes out, tokens that cancel, and extreme scales."""
    x, g = normal(8, TOKENS, D, seed=1), normal(8, TOKENS, P, seed=2)
    w = normal(D, P)
    x[0], g[0] = w[:, :1].T, np.eye(P)[0]  # along the first column: no gradient at all
    x[1] = w[:, :1].T + 1e-4 * x[1]
    x[2:4, 1::2], g[2:4, 1::2] = x[2:4, :1], -g[2:4, :1]
    x[2:4, ::2], g[2:4, ::2] = x[2:4, :1], g[2:4, :1]
    x[3] += 1e-3 * normal(TOKENS, D, seed=3)
    for i, scale in enumerate((1e15, 1e-15, 1e30, 1e-30)):
        x[4 + i] *= np.float32(scale)
    return {"x": x, "g": 100 * g}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.one_in(5)
def test_penalties_of_their_leaves(kernel, way):
    """One for all examples, and one that each takes by a number of its own."""
    params, batch = parameters(kernel), normal(5, TOKENS, D, seed=9)

    def loss_fn(params, x):
        squares, sines = (
            sum(jnp.sum(f(p)) for p in params.values()) for f in (jnp.square, jnp.sin)
        )
        return through(kernel)(params, x) + 0.1 * squares + x[0, 0] * sines

    assert by_columns(loss_fn, params, batch)
    agree(loss_fn, params, batch, mask=np.arange(5) != 1, tolerance=1e-3)


def test_a_penalty_that_cancels_the_gradient(way):
    params = {"w": normal(D, P), "gain": normal(P, seed=2)}
    check_cancelling_penalty(linear, params, normal(TOKENS, D), normal(TOKENS, P, seed=5))


def test_the_bound(way):
    params = {"w": normal(D, P), "gain": normal(P, seed=2)}
    ordinary = {"x": normal(TOKENS, D), "g": normal(TOKENS, P, seed=5)}
    rtol = np.float32([1e9, 0.05] + [1e9, 0.05] + [1e-3] * 4)  # of a gradient that is rounding
    check(linear, params, ordinary, odd_examples(), route="derived", rtol=rtol)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30, np.inf, np.nan])
@pytest.mark.one_in(4)
def test_kernels_far_from_one(scale, way):
    params = {"w": normal(D, P), "gain": np.float32(scale) * normal(P, seed=2)}
    batch = {"x": normal(3, TOKENS, D), "g": normal(3, TOKENS, P, seed=5)}
    check(linear, params, None, batch, route="derived")


def test_small_kernels_of_half_precision_products(way):
    """The leaf's gradient is 1e6 times that of the kernel, which alone is of few bits."""

    def loss_fn(params, x):
        w = params["w"] / jnp.linalg.norm(params["w"], axis=0, keepdims=True)
        out = x.astype(jnp.float16) @ w.astype(jnp.float16)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    params, batch = {"w": 1e-6 * normal(D, D)}, normal(3, TOKENS, D, seed=9)
    assert by_columns(loss_fn, params, batch)
    agree(loss_fn, params, batch, mask=np.ones(3, bool), tolerance=1e-2, slack=1e-2)
    facts = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0)))(params, batch, np.ones(3, bool))[1]
    assert np.all(facts.factors > 0)


def test_gains_without_a_gradient():
    """A leaf behind `stop_gradient` is read for the weight all the same."""

    def loss_fn(params, x):
        w = weight_norm({"w": params["w"], "gain": jax.lax.stop_gradient(params["gain"])})
        return jnp.sum(jnp.sin(x @ w)) * jnp.sum(jax.lax.stop_gradient(w))

    params = {"w": normal(D, P), "gain": normal(P, seed=2)}
    agree(loss_fn, params, normal(5, TOKENS, D, seed=9), mask=np.arange(5) != 1)


def test_a_column_without_spread(way):
    """Standardization of a constant column divides by nearly nothing: vmap's numbers, or none."""

    def loss_fn(params, x):
        w = params["w"] - params["w"].mean((0, 1), keepdims=True)
        w = w * jax.lax.rsqrt(jnp.square(w).mean((0, 1), keepdims=True) + 1e-10)
        return jnp.sum(jnp.sin(convolve(x, w)))

    w = normal(3, 2, 4)
    w[..., 1] = 0.5
    check(loss_fn, {"w": w}, normal(5, 2), normal(3, 5, 2, seed=2), route="conv")


def test_ordinary_examples_are_trusted(monkeypatch):
    """Otherwise each is taken by itself, which is slow: bounds are loose by less than a percent."""
    width, tokens = 256, 64

    def loss_fn(params, x):
        for w in params["w"]:
            w = w - w.mean(0, keepdims=True)
            x = jax.nn.relu(x @ (w * jax.lax.rsqrt(width * jnp.square(w).mean(0) + 1e-6)[None]))
        return jnp.sum(x)

    params = {"w": [normal(width, width, seed=i) for i in range(2)]}
    batch = normal(4, tokens, width)
    assert by_columns(loss_fn, params, batch)
    assert set_apart(monkeypatch, loss_fn, params, batch) == 0
    _, facts = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1e-3)))(params, batch, np.ones(4, bool))
    assert np.all(facts.factors[:, 0] * facts.norms[:, 0] > 1e-3 * 0.995)
