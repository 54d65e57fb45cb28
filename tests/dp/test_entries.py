"""Weights that take a leaf's numbers one by one: recognized, measured as vmap does, and bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree, set_apart
from test_engine_bound import check, check_cancelling_penalty, convolve

from dpjax import dp
from dpjax.dp.engines import bookkeeping, entries, products

D, P = 6, 5
MASK = np.tril(np.ones((D, P), np.float32))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def masked(p):
    return p["w"] * MASK


def pruned(p):
    return jnp.where(MASK > 0, p["w"], 0.0)


def positive(p):
    return jax.nn.softplus(p["w"])


def of_a_rule(p):
    return jax.nn.relu(p["w"]) + 0.1 * jax.nn.silu(p["w"])


def of_two_leaves(p):
    return jnp.tanh(p["w"]) * jax.nn.sigmoid(p["m"])


def of_powers(p):
    return (p["w"] ** 3 - 2 * p["w"]) / (1 + jnp.square(p["w"]))


def turned(p):
    return jnp.exp(p["v"].T) * MASK


def of_a_part(p):
    return jnp.sin(p["long"][1 : 1 + D, ::2].reshape(P, D).T)


def with_constant_rows(p):
    return jnp.concatenate([jnp.cos(p["short"]), jnp.ones((2, P))])


@jax.jit
def in_a_function(p):
    return positive(p)


def through_a_checkpoint(p):
    return jax.checkpoint(positive)(p)


KERNELS = [
    masked, pruned, positive, of_a_rule, of_two_leaves, of_powers, turned, of_a_part,
    in_a_function, through_a_checkpoint,
]  # fmt: skip
SHAPES = {"w": (D, P), "m": (D, P), "v": (P, D), "long": (8, 10), "short": (D - 2, P)}


def parameters(kernel):
    """Those that the kernel reads."""
    every = {k: normal(*v, seed=i) for i, (k, v) in enumerate(SHAPES.items())}
    closed = jax.make_jaxpr(kernel)(every)
    used = jax.tree.map(
        lambda x: bool(np.any(x)), jax.jacobian(lambda p: jnp.sum(kernel(p)))(every)
    )
    assert closed.out_avals[0].shape == (D, P)
    return {k: v for k, v in every.items() if used[k]}


def through(kernel):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x @ kernel(params)) @ jnp.arange(1.0, 1 + P))

    return loss_fn


def by_entries(loss_fn, params, batch):
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    return all("by entries" in leaf.reason for leaf in plan)


@pytest.fixture(autouse=True)
def never_kept(monkeypatch):
    """Small kernels have small gradients, which would be kept."""
    monkeypatch.setattr(products, "can_keep", lambda form, times=1: False)


@pytest.mark.parametrize("tokens", [None, 4, 12])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.one_in(5)
def test_numbers_one_by_one(kernel, tokens, without_margins):
    """Once, for pairs of tokens, and for so many that the gradient is formed."""
    params = parameters(kernel)
    batch = normal(4, D, seed=9) if tokens is None else normal(4, tokens, D, seed=9)
    assert by_entries(through(kernel), params, batch)
    agree(through(kernel), params, batch, tolerance=3e-5)


@pytest.mark.parametrize(
    "kernel",
    [
        with_constant_rows,
        lambda p: p["w"] * p["m"] + jnp.mean(p["w"]),
        lambda p: jnp.cumsum(p["w"], 0),
        lambda p: p["w"] * MASK + p["w"][::-1],
        lambda p: jnp.sin(p["short"][:1]) * MASK,
        lambda p: jax.nn.softmax(p["w"], 0),
    ],
)
def test_other_functions(kernel):
    params, batch = parameters(kernel), normal(4, 3, D, seed=9)
    assert not by_entries(through(kernel), params, batch)
    agree(through(kernel), params, batch, tolerance=1e-3)


def test_a_rule_that_mixes_numbers():
    """What a custom derivative does decides, not what the function looks like."""

    @jax.custom_jvp
    def own(w):
        return 2 * w

    own.defjvp(lambda primals, tangents: (own(*primals), tangents[0] - jnp.mean(tangents[0])))
    loss_fn = through(lambda p: own(p["w"]))
    params, batch = {"w": normal(D, P)}, normal(4, 3, D, seed=9)
    assert not by_entries(loss_fn, params, batch)
    agree(loss_fn, params, batch, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.one_in(2)
def test_kernels_of_all_kinds(dtype, without_margins):
    """Convolutions, experts side by side, two uses of one kernel, and products of 16 bits."""

    def loss_fn(params, x):
        low = lambda name: jax.nn.softplus(params[name]).astype(dtype)  # noqa: E731
        x = jnp.sin(convolve(x.astype(dtype), low("conv")))
        twice = low("twice")
        x = jnp.sin(jnp.sin(x @ twice) @ twice)
        x = jnp.einsum("etd,edp->etp", x.reshape(2, -1, D), low("experts"))
        return jnp.sum(jnp.sin(x).astype(jnp.float32))

    shapes = {"conv": (3, D, D), "twice": (D, D), "experts": (2, D, 3)}
    params = {k: normal(*v, seed=i) for i, (k, v) in enumerate(shapes.items())}
    batch = normal(4, 8, D, seed=9)
    assert by_entries(loss_fn, params, batch)
    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    agree(loss_fn, params, batch, tolerance=tolerance, slack=tolerance)


def linear(params, e):
    return jnp.sum((e["x"] @ (jnp.exp(params["w"]) * MASK)) * e["g"])


def odd_examples(tokens):
    """What the mask takes out, tokens that cancel or repeat, and extreme scales."""
    x, g = normal(9, tokens, D, seed=1), normal(9, tokens, P, seed=2)
    x[0], g[0] = 0, 0
    x[0, :, 0], g[0, :, 1:] = 1, 1  # above the diagonal
    x[1, :, 0] += 1e4
    g[1, :, 1:] += 1e4
    x[2:4, 1::2], g[2:4, 1::2] = x[2:4, :1], -g[2:4, :1]
    x[2:4, ::2], g[2:4, ::2] = x[2:4, :1], g[2:4, :1]
    x[3] += 1e-3 * normal(tokens, D, seed=3)
    for i, scale in enumerate((1e15, 1e-15, 1e30, 1e-30)):
        x[4 + i] *= np.float32(scale)
    x[8], g[8] = x[8, :1], g[8, :1]
    return {"x": x, "g": 100 * g}


@pytest.mark.parametrize("tokens", [None, 4, 12])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.one_in(7)
def test_penalties_of_their_leaves(kernel, tokens, without_margins):
    """One for all examples, and one that each takes by a number of its own."""
    params = parameters(kernel)
    batch = normal(4, D, seed=9) if tokens is None else normal(4, tokens, D, seed=9)

    def loss_fn(params, x):
        squares, sines = (
            sum(jnp.sum(f(p)) for p in params.values()) for f in (jnp.square, jnp.sin)
        )
        return through(kernel)(params, x) + 0.1 * squares + x.reshape(-1)[0] * sines

    assert by_entries(loss_fn, params, batch)
    agree(loss_fn, params, batch, tolerance=3e-5)


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_a_penalty_that_cancels_the_gradient(tokens):
    params = {"w": normal(D, P)}
    check_cancelling_penalty(linear, params, normal(tokens, D), normal(tokens, P, seed=5))


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_the_bound(tokens):
    params = {"w": normal(D, P)}
    ordinary = {"x": normal(tokens, D), "g": normal(tokens, P, seed=5)}
    rtol = np.float32([1e-3, 0.05] + [1e9 if tokens > 1 else 1e-3, 0.05] + [1e-3] * 5)
    check(linear, params, ordinary, odd_examples(tokens), route="derived", rtol=rtol)


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("spread", [0.0, 8.0])
@pytest.mark.parametrize("scale", [-80.0, -30.0, 0.0, 30.0, 60.0, np.inf, np.nan])
@pytest.mark.one_in(8)
def test_slopes_far_from_one_and_from_each_other(scale, spread, tokens):
    params = {"w": np.float32(scale) + np.float32(spread) * normal(D, P)}
    batch = {"x": normal(3, tokens, D), "g": normal(3, tokens, P, seed=5)}
    check(linear, params, None, batch, route="derived")


@pytest.mark.parametrize("rule", [dp.flat(1.0), dp.per_layer(1.0)])
@pytest.mark.parametrize(
    "function",
    [
        jnp.sqrt,
        lambda w: jnp.where(w > 0, jnp.log(w), 0.0),
        lambda w: jnp.concatenate([jnp.sqrt(w)[2:], jnp.ones((2, P))]),
        lambda w: jnp.where(w > 0, w, jnp.exp(jnp.where(w > 0, w, 200.0)) * 0),
    ],
)
@pytest.mark.one_in(3)
def test_a_number_without_a_finite_slope(function, rule):
    """As by vmap, no example is summed, and the sum is zero; also where it is not used."""
    loss_fn = through(lambda p: function(p["w"]))
    w = np.abs(normal(D, P))
    w[1, 2] = 0.0
    for method in ("vmap", "bookkeeping"):
        engine = jax.jit(dp.clipped_sum(loss_fn, rule, method=method))
        total, facts = engine({"w": w}, normal(3, D), np.ones(3, bool))
        np.testing.assert_array_equal(facts.factors, 0)
        np.testing.assert_array_equal(total.value["w"], 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: (p["s"] * jnp.tanh(p["v"])).T,
        lambda p: jnp.tanh(p["v"] / p["s"]).T,
        lambda p: (p["s"] * p["v"].reshape(-1)).reshape(D, P),
    ],
)
def test_a_number_times_a_leaf(function):
    params = {"v": normal(P, D), "s": np.float32(0.3)}
    batch = normal(4, 3, D, seed=9)
    assert not by_entries(through(function), params, batch)
    agree(through(function), params, batch, tolerance=1e-3)


def test_a_rule_of_few_bits():
    """Its numbers leave the range of float16, in which it computes."""

    @jax.custom_jvp
    def twice(w):
        return 2 * w

    twice.defjvp(lambda w, t: (twice(*w), (t[0].astype(jnp.float16) * 2).astype(jnp.float32)))
    loss_fn = lambda p, x: 1e5 * jnp.sum(x @ twice(p["w"]))  # noqa: E731
    params, batch = {"w": normal(D, P)}, normal(4, 3, D, seed=9)
    assert not by_entries(loss_fn, params, batch)
    for method in ("vmap", "bookkeeping"):
        _, facts = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))(
            params, batch, np.ones(4, bool)
        )
        np.testing.assert_array_equal(facts.factors, 0)


@pytest.mark.parametrize("tokens", [2, 10])
@pytest.mark.parametrize("slope", [2.0**30, 2.0**9])
def test_squares_below_the_range_at_large_slopes(slope, tokens):
    """Nothing that is lost in a square may be multiplied with the slopes' squares."""
    width = 64
    w = np.full((width, width), np.log(slope) - 1e-4, np.float32)
    x, g = np.zeros((1, tokens, width), np.float32), np.zeros((1, tokens, width), np.float32)
    x[:, 0], g[:, 0], x[:, 1, 0], g[:, 1, 0] = 1, 1e-19, 1, 2.5e-17
    loss_fn = lambda p, e: jnp.sum((e["x"] @ jnp.exp(p["w"])) * e["g"])  # noqa: E731
    for rule in (dp.automatic(1.0, gamma=0.0), dp.flat(1e-9)):
        engine = jax.jit(dp.clipped_sum(loss_fn, rule))
        total, _ = engine({"w": w}, {"x": x, "g": g}, np.ones(1, bool))
        size = np.linalg.norm(np.float64(total.value["w"]))
        assert size <= (1 + 1e-6) * float(rule.sensitivity())


@pytest.mark.parametrize("tokens", [8, 1, 64])
@pytest.mark.one_in(3)
def test_ordinary_examples_are_trusted(tokens, monkeypatch):
    """Otherwise each is taken by itself, which is slow: bounds are loose by less than a percent."""
    width = 128
    mask = np.tril(np.ones((width, width), np.float32))

    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ (params["a"] * mask)) @ jax.nn.softplus(params["b"])))

    params = {name: normal(width, width, seed=i) / 11 for i, name in enumerate("ab")}
    batch = normal(4, tokens, width)
    assert by_entries(loss_fn, params, batch)
    _, facts = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1e-3)))(params, batch, np.ones(4, bool))
    assert np.all(facts.factors[:, 0] * facts.norms[:, 0] > 1e-3 * 0.995)
    assert set_apart(monkeypatch, loss_fn, params, batch) == 0
    assert set_apart(monkeypatch, linear, {"w": normal(D, P)}, odd_examples(8)) > 0


@pytest.mark.parametrize("fault", ["pairs", "bounds"])
def test_a_wrong_norm_is_seen(fault, monkeypatch):
    """Pairs of different tokens are left out, or what the square may be off by."""
    right = entries._paired

    def wrong(x, g, squares):
        square, error, lengths = right(x, g, squares)
        if fault == "pairs":
            return jnp.sum(jnp.square(lengths), (1, 2)), error, lengths
        return square, 0 * error, 0 * lengths

    monkeypatch.setattr(entries, "_paired", wrong)
    params = {"w": normal(D, P)}
    batch = odd_examples(4)
    ordinary = {"x": normal(4, D), "g": normal(4, P, seed=5)}
    with pytest.raises(AssertionError):
        check(lambda p, e: linear(p, e), params, ordinary, batch)
