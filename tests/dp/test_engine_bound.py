"""The clipping bound on inputs made to break it: every route, far from ordinary numbers.

Each case is a smallest input that once broke the bound, or another member of its kind. Both engines
run on it, alone and beside ordinary examples. No contribution may exceed the bound, no sum may move
by more than the bound when the example leaves, and the book-keeping engine gives vmap's numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp
from dpjax.dp.engines import bookkeeping, forms, products

BOUND = 1.0
# What float32 may add: the reserve of the rule covers a contribution's own rounding; a sum of a
# hundred contributions is rounded in units of its size.
ALONE, IN_A_SUM = 1e-6, 1e-4


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(tree)))


@functools.cache
def program(loss_fn):
    """Both engines on one batch under each of several masks, compiled once for all of them."""

    def run(rule, params, batch, masks):
        engines = {
            method: dp.clipped_sum(loss_fn, rule, method=method)
            for method in ("vmap", "bookkeeping")
        }
        return jax.lax.map(
            lambda mask: {name: engine(params, batch, mask) for name, engine in engines.items()},
            masks,
        )

    return jax.jit(run)


def beside(ordinary, odd, crowd):
    """The odd examples and a crowd of ordinary ones as one batch, and masks of who takes part.

    Returns:
        The batch; masks of each odd example alone; pairs of masks with and without an odd example.
    """
    n = jax.tree.leaves(odd)[0].shape[0]
    if ordinary is None:
        return odd, np.eye(n, dtype=bool), np.zeros((0, 2, n), bool)
    batch = jax.tree.map(
        lambda xs, y: np.concatenate([xs, np.broadcast_to(y, (crowd, *np.shape(y)))]), odd, ordinary
    )
    alone = np.eye(n, n + crowd, dtype=bool)
    only = np.arange(n + crowd) >= n
    pairs = [(only | one, only) for one in alone] + [(one | True, ~one) for one in alone]
    return batch, alone, np.array(pairs)


def check(loss_fn, params, ordinary, odd, *, rule=None, route=None, crowd=100, rtol=1e-3):
    """Runs `odd` examples alone and beside a crowd; the engines may differ by `rtol` of the bound.

    Returns:
        The facts of both engines on each odd example alone, `{method: (norms, factors)}`.
    """
    rule = dp.flat(BOUND) if rule is None else rule
    bound = float(rule.sensitivity())
    if route is not None:
        plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], odd))
        assert route in {leaf.route for leaf in plan}
    batch, alone, pairs = beside(ordinary, odd, crowd)
    n = len(alone)
    masks = np.concatenate([alone, pairs.reshape(-1, alone.shape[1])])
    found = jax.device_get(program(loss_fn)(rule, params, batch, masks))
    contributions, facts = {}, {}
    for method, (total, seen) in found.items():
        value = [np.float64(leaf) for leaf in jax.tree.leaves(total.value)]
        contributions[method] = [[leaf[i] for leaf in value] for i in range(n)]
        own = np.arange(n)
        facts[method] = seen.norms[own, own], seen.factors[own, own]
        for i, contribution in enumerate(contributions[method]):
            assert np.isfinite(norm(contribution)), (method, i)
            assert norm(contribution) <= bound * (1 + ALONE), (method, i, norm(contribution))
        for i in range(len(pairs)):
            moved = norm([leaf[n + 2 * i] - leaf[n + 2 * i + 1] for leaf in value])
            assert moved <= bound * (1 + IN_A_SUM), (method, i % n, moved)
    rtol = np.broadcast_to(rtol, n)
    for i, (a, b) in enumerate(zip(contributions["vmap"], contributions["bookkeeping"])):
        difference = norm([x - y for x, y in zip(a, b)])
        assert difference <= rtol[i] * bound, (i, difference, norm(a), norm(b))
        norms, others = facts["vmap"][0][i], facts["bookkeeping"][0][i]
        np.testing.assert_allclose(others, norms, rtol=rtol[i], atol=1e-6 * bound)
    return facts


def check_cancelling_penalty(linear, params, x, g):
    """Checks a derived weight "w" under a penalty whose gradient nearly cancels the example's.

    Args:
        linear: `(params, {"x", "g"}) -> ` the sum of products with "w" times "g".
        params: its parameters.
        x: inputs of one example.
        g: cotangents.
    """
    gradient = jax.grad(linear)(params, {"x": x, "g": g})["w"]

    def loss_fn(params, e):
        return linear(params, e) + e["c"] * jnp.sum(params["w"] * gradient)

    share = np.repeat(np.float32([0, 1e-6, 1e-3, -1e-3]), 3)
    scale = np.tile(np.float32([1, 1e4, 1e-6]), 4)
    odd = {"x": np.tile(x, (12, 1, 1)), "g": g * scale[:, None, None], "c": -scale * (1 + share)}
    ordinary = {"x": x, "g": g[::-1] + 1, "c": np.float32(0.5)}
    check(loss_fn, params, ordinary, odd, route="derived", rtol=0.05)


def linear(params, e):
    """The gradient is x^T g."""
    return jnp.sum((e["x"] @ params["w"]) * e["g"])


def convolve(x, w):
    dims = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=dims)[0]


# A0: two uses of one derived kernel, in two layouts


def standardized(kernel):
    mean = kernel.mean((0, 1, 2), keepdims=True)
    return (kernel - mean) / kernel.std((0, 1, 2), keepdims=True)


def cosine_bases(kernel):
    return kernel + jax.lax.stop_gradient(kernel)


@pytest.mark.parametrize("make", [standardized, cosine_bases])
@pytest.mark.parametrize("size", [2, 6])
def test_one_derived_kernel_in_two_layouts(make, size):
    numbers = np.random.default_rng(0)
    kernel = numbers.standard_normal((3, 3, 8, 8), np.float32)

    def loss_fn(params, e):
        w = make(params["kernel"])
        out = [
            jax.lax.conv_general_dilated(
                e["x"][None], w, (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC")
            )
            for layout in ("HWIO", "HWOI")
        ]
        return jnp.sum(out[0][0] * e["g"]) + e["sign"] * jnp.sum(out[1][0] * e["g"])

    odd = {k: 30 * numbers.standard_normal((4, size, size, 8), np.float32) for k in ("x", "g")}
    odd["sign"] = np.float32([-1, 1, -1, 1])
    check(loss_fn, {"kernel": kernel}, None, odd)


@pytest.mark.parametrize(("order", "layout"), [((0, 1, 3, 2), "HWOI"), ((3, 2, 0, 1), "OIHW")])
def test_one_kernel_convolved_in_two_orders_of_its_axes(order, layout):
    """One set of numbers to the engine, but each convolution has its own way to the leaf."""
    numbers = np.random.default_rng(0)

    def loss_fn(params, e):
        w, out = params["w"], e["x"][None]
        for kernel, axes in ((w, "HWIO"), (w.transpose(order), layout)):
            dims = ("NHWC", axes, "NHWC")
            out = jnp.tanh(
                jax.lax.conv_general_dilated(out, kernel, (1, 1), "SAME", dimension_numbers=dims)
            )
        return jnp.sum(out[0] * e["g"])

    params = {"w": numbers.standard_normal((3, 3, 4, 4)).astype(np.float32)}
    odd = {k: numbers.standard_normal((3, 5, 5, 4), np.float32) for k in "xg"}
    check(loss_fn, params, None, odd, route="conv")


@pytest.mark.parametrize("rank", [1, 2])
def test_one_kernel_inside_and_outside_of_a_scan(rank):
    numbers = np.random.default_rng(0)
    spec = ("NWC", "WIO", "NWC") if rank == 1 else ("NHWC", "HWIO", "NHWC")

    def conv(x, w):
        return jax.lax.conv_general_dilated(x[None], w, (1,) * rank, "SAME", dimension_numbers=spec)

    def loss_fn(params, x):
        y = conv(x, params["w"])[0]
        y, _ = jax.lax.scan(lambda s, _: (jnp.tanh(conv(s, params["w"])[0]), None), y, length=2)
        return jnp.sum(y)

    params = {"w": numbers.standard_normal((3,) * rank + (2, 2), np.float32)}
    odd = numbers.standard_normal((2, *(5,) * rank, 2), np.float32)
    check(loss_fn, params, None, odd)


def depthwise(x, w):
    return jax.lax.conv_general_dilated(
        x[None], w[:, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=3,
    )[0]  # fmt: skip


@pytest.mark.parametrize("use", [depthwise, lambda x, w: x @ w, lambda x, w: x * w[:1]])
def test_one_weight_of_another_kind_inside_and_outside_of_a_scan(use):
    def loss_fn(params, x):
        step = lambda s, _: (jnp.tanh(use(s, params["w"])), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, use(x, params["w"]), length=2)[0])

    numbers = np.random.default_rng(0)
    params = {"w": numbers.standard_normal((3, 3), np.float32)}
    check(loss_fn, params, None, numbers.standard_normal((2, 5, 3), np.float32))


# N1: tokens of one example that cancel must not enter the shared sum


def test_lookups_that_cancel():
    def loss_fn(params, e):
        return jnp.sum(e["s"][:, None] * params["w"][e["i"]])

    sizes = np.float32([1e3, 1e8, 1e18, 1e30])
    odd = {"i": np.ones((4, 2), int), "s": np.stack([sizes, -sizes], 1)}
    ordinary = {"i": np.array([1, 1]), "s": np.float32([1, 0])}
    check(loss_fn, {"w": np.zeros((4, 2), np.float32)}, ordinary, odd, route="embed")


@pytest.mark.parametrize(
    ("tokens", "d", "p", "route"),
    [(2, 3, 2, "gram"), (32, 64, 256, "gram"), (100, 32, 16, "outer")],
)
def test_tokens_that_cancel(tokens, d, p, route):
    """On the routes whose sum is another product than the norm's."""
    sizes = [1e3, 1e8, 1e15, 1e30]
    x = np.zeros((4, tokens, d), np.float32)
    x[:, :, 0] = 1
    g = np.zeros((4, tokens, p), np.float32)
    g[:, 0, 0], g[:, 1, 0] = sizes, np.negative(sizes)
    one = np.zeros_like(g[0])
    one[0, 0] = 1
    params = {"w": np.zeros((d, p), np.float32)}
    check(linear, params, {"x": x[0], "g": one}, {"x": x, "g": g}, crowd=20, route=route)


def test_gradients_that_are_formed_twice(monkeypatch):
    """Route "outer again": too large to keep, and cancelling by degrees."""
    numbers = np.random.default_rng(0)
    T, d, p = 24, 256, 256
    x = numbers.standard_normal((4, T, d), np.float32)
    g = numbers.standard_normal((4, T, p), np.float32)
    for i, share in enumerate((0.0, 1e-2, 1e-5, 0.0)):  # the second half takes back the first
        x[i, 12:], g[i, 12:] = x[i, :12] * (1 + share), -g[i, :12]
    g[3] *= 1e20
    plan = bookkeeping.plan(linear, {"w": jnp.zeros((d, p))}, {"x": x[0], "g": g[0]})
    ordinary = {"x": x[1, ::-1], "g": np.abs(g[1])}
    for force in (plan[0].route, "outer again"):
        monkeypatch.setattr(bookkeeping.products, "cheapest", lambda form, force=force: force)
        loss_fn = functools.partial(linear)  # a program of its own
        check(loss_fn, {"w": np.zeros((d, p), np.float32)}, ordinary, {"x": x, "g": g}, crowd=4)


@pytest.mark.parametrize("keep", [4, 0])
def test_a_derivative_that_cancels(keep, monkeypatch):
    """Of `w - mean(w)`, for an image that is constant."""
    monkeypatch.setattr(bookkeeping.products, "_KEEP", keep)

    def loss_fn(params, e):
        w = params["w"] - jnp.mean(params["w"], (0, 1), keepdims=True)
        return jnp.sum(convolve(e["x"], w) * e["g"])

    params = {"w": np.random.default_rng(0).standard_normal((3, 2, 4), np.float32)}
    ordinary = {"x": np.eye(9, 2, dtype=np.float32), "g": np.ones((9, 4), np.float32)}
    sizes = np.float32([1.0, 2.0**30, 1e30])
    x = np.broadcast_to(sizes[:, None, None], (3, 9, 2))
    odd = {"x": x, "g": np.ones((3, 9, 4), np.float32)}
    check(loss_fn, params, ordinary, odd, route="conv", rtol=[1e-3, 2e-3, 2e-3])


# The same, for weights with several uses, parts or penalties

SIZES = np.float32([1e3, 1e8, 1e15, 1e30])
SHARES = np.float32([0.0, 1e-2, 1e-5])  # by which the second use differs from the first


@pytest.mark.parametrize("force", ["gram", "outer", "outer again"])
def test_a_tied_table_whose_uses_cancel(force, monkeypatch):
    """The gradient is e_i h^T + g z^T, with g = s e_i and h = -s z (1 + share)."""
    monkeypatch.setattr(bookkeeping.products, "cheapest", lambda form: force)

    def loss_fn(params, e):
        lookup = jnp.sum(params["w"][e["i"]] * e["h"])
        return lookup + jnp.sum((e["z"] @ params["w"].T) * e["g"])

    numbers = np.random.default_rng(0)
    z = numbers.standard_normal((12, 3, 5)).astype(np.float32)
    i = numbers.integers(0, 7, (12, 3))
    by = np.repeat(SIZES, 3)[:, None, None]
    # Uses that are opposed to the last bit leave rounding, which no two engines share.
    share = np.tile(np.float32([1e-6, 1e-2, 1e-5]), 4)[:, None, None]
    odd = {"i": i, "z": z, "h": -by * z * (1 + share), "g": by * np.eye(7, dtype=np.float32)[i]}
    ordinary = {k: np.abs(v[1] / (SIZES[0] if k in "hg" else 1)) for k, v in odd.items()}
    ordinary["i"] = i[1]
    rounding = 64 * 2.0**-24 / share[:, 0, 0]
    params = {"w": np.zeros((7, 5), np.float32)}
    check(loss_fn, params, ordinary, odd, crowd=20, rtol=np.maximum(1e-3, rounding))


@pytest.mark.parametrize("how", ["scalar", "vmap", "two axes"])
def test_lookups_by_scalars_that_cancel(how):
    def loss_fn(params, e):
        w = params["w"].reshape(2, 2, 2) if how == "two axes" else params["w"]
        look_up = {
            "scalar": lambda i: w[i],
            "vmap": lambda i: jax.vmap(lambda k: w[k])(i[None])[0],
            "two axes": lambda i: w[i // 2, i % 2],
        }[how]
        return jnp.sum(e["s"] * jnp.stack([look_up(e["i"][k]) for k in range(2)]).sum(1))

    odd = {"i": np.ones((4, 2), np.int32), "s": np.stack([SIZES, -SIZES], 1)}
    ordinary = {"i": np.int32([1, 1]), "s": np.float32([1, 0])}
    check(loss_fn, {"w": np.zeros((4, 2), np.float32)}, ordinary, odd, route="embed")


@pytest.mark.parametrize("force", ["gram", "outer", "outer again"])
def test_a_penalty_that_cancels_the_gradient(force, monkeypatch):
    """The gradient is x^T g + c R, with x = R, g = -c (1 + share)."""
    monkeypatch.setattr(bookkeeping.products, "cheapest", lambda form: force)

    def loss_fn(params, e):
        penalty = jnp.sum(params["w"] * jnp.arange(1.0, 9.0)[:, None])
        return jnp.sum((e["x"] @ params["w"]) * e["g"]) + e["c"] * penalty

    x = np.zeros((12, 2, 8), np.float32)
    x[:, 0] = np.arange(1, 9)
    c = np.repeat(np.float32([1.0, 1e3, 1e8, 1e25]), 3)
    share = np.tile(SHARES, 4)
    g = np.zeros((12, 2, 3), np.float32)
    g[:, 0] = (-c * (1 + share))[:, None]
    ordinary = {"x": x[0], "g": np.abs(g[0]), "c": np.float32(0.5)}
    rounding = 64 * 2.0**-24 / np.maximum(share, 1e-5)
    params = {"w": np.zeros((8, 3), np.float32)}
    check(loss_fn, params, ordinary, {"x": x, "g": g, "c": c}, crowd=20,
          rtol=np.maximum(1e-3, rounding))  # fmt: skip


@pytest.mark.parametrize("ratio", [11, 12])
def test_a_penalty_that_cancels_a_row_looked_up_often(ratio):
    """The lookups' cotangents are 1 and many too small to change 1, one by one, in float32."""
    tokens = 2048
    h = np.full((1, tokens), 0.99 * 2.0**-25, np.float32)
    h[:, 0] = 1

    def loss_fn(params, e):
        looked_up = params["w"][e["i"]][:, 0]
        return 1000 * (jnp.sum(looked_up * e["h"]) - e["c"] * jnp.sum(params["w"] ** 2) / 2)

    params = {"w": np.zeros((tokens + 100, 1), np.float32)}
    params["w"][0] = 1
    odd = {"i": np.zeros((1, tokens), np.int32), "h": h, "c": np.float32([1 - 1 / ratio])}
    check(loss_fn, params, None, odd, route="embed", rtol=0.05)


PARTS = {
    "concatenated": lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1),
    "stacked": lambda p, x: jnp.einsum("td,kdp->tkp", x, jnp.stack([p["a"], -p["b"]])).reshape(
        -1, 6
    ),
    "overlapping": lambda p, x: jnp.concatenate([x[:, :3] @ p["a"][:3], x[:, 1:] @ p["a"][1:]], 1),
    "turned": lambda p, x: jnp.concatenate(
        [x[:, :3] @ p["a"][:3], x[:, :3] @ p["a"][:3].T + x @ p["b"]], 1
    ),
    "summed": lambda p, x: jnp.tile(x @ (p["a"] - p["b"]), (1, 2)),
    "branch": lambda p, x: jax.lax.cond(
        x[0, 0] > -5, lambda: x @ jnp.tile(p["a"], (1, 2)), lambda: jnp.tile(x @ p["b"], (1, 2))
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_weights_that_cancel(name):
    """Tokens, and where a leaf has two uses, these too."""
    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((12, 4, 4)).astype(np.float32)
    g = numbers.standard_normal((12, 4, 6)).astype(np.float32)
    x[:, 2:] = x[:, :2] * (1 + np.tile(SHARES, 4)[:, None, None])
    g[:, 2:] = -g[:, :2]
    g *= np.repeat(SIZES, 3)[:, None, None]
    params = {k: numbers.standard_normal((4, 3)).astype(np.float32) for k in "ab"}
    ordinary = {"x": x[1, ::-1], "g": np.abs(g[1] / SIZES[0])}
    rounding = 256 * 2.0**-24 / np.maximum(np.tile(SHARES, 4), 1e-5)

    def loss_fn(params, e):
        return jnp.sum(PARTS[name](params, e["x"]) * e["g"])

    check(loss_fn, params, ordinary, {"x": x, "g": g}, crowd=20, rtol=np.maximum(1e-3, rounding))


# N2: Gram matrices cancel


@pytest.mark.parametrize("tokens", [32, 256])
def test_repeated_tokens_that_nearly_cancel(tokens, monkeypatch):
    monkeypatch.setattr(bookkeeping.products, "cheapest", lambda form: "gram")
    shares = np.array([1e-2, 1e-4, 1e-6])
    numbers = np.random.default_rng(0)
    d = p = 512
    a = numbers.standard_normal(d).astype(np.float32)
    noise = numbers.standard_normal(d)
    c = [np.float32(a * (1 + share * noise)) for share in shares]
    x = np.stack([np.tile(np.stack([a, c_i]), (tokens // 2, 1)) for c_i in c])
    g = numbers.standard_normal(p).astype(np.float32) * np.tile([1, -1], tokens // 2)[:, None]
    odd = {"x": x, "g": np.stack([np.float32(g)] * 3)}
    params = {"w": np.zeros((d, p), np.float32)}
    # The gradient is the difference of sums over tokens: its own rounding grows as they cancel.
    rounding = 4 * tokens * 2.0**-24 / shares
    loss_fn = functools.partial(linear)  # a program of its own
    check(loss_fn, params, None, odd, route="gram", rtol=np.maximum(1e-3, rounding))


# N3: indices out of range


@pytest.mark.parametrize("mode", [None, "clip", "fill", "drop", "promise_in_bounds"])
def test_rows_out_of_range(mode):
    def loss_fn(params, i):
        found = params["w"][i] if mode is None else params["w"].at[i].get(mode=mode)
        return jnp.sum(found)

    params = {"w": np.ones((8, 2), np.float32)}
    indices = np.array([[-1, -9], [7, 8], [-8, -17], [0, 1000], [-1000, 3]])
    for bound in (100.0, 1.0):
        check(loss_fn, params, None, indices, rule=dp.flat(bound))


# N4: weights scaled by constants


def test_a_row_beyond_int32():
    def loss_fn(params, e):
        start = (e["i"], jnp.zeros_like(e["i"]))
        return jnp.sum(jax.lax.dynamic_slice(params["w"], start, (1, 3))[0] * e["g"])

    odd = {"i": np.uint32([1, 4_000_000_000]), "g": np.ones((2, 3), np.float32)}
    check(loss_fn, {"w": np.zeros((9, 3), np.float32)}, None, odd, route="embed")


@pytest.mark.parametrize(
    ("scale", "divide"),
    [(scale, False) for scale in (0.0, 1e-38, 1e-23, 1e-12, 3.0, 1e12, 1e18, 1e30)]
    + [(scale, True) for scale in (0.0, 1e-38, 1e-23, 3.0, 1e30)],
)
@pytest.mark.one_in(2)
def test_weights_scaled_by_constants(scale, divide):
    def loss_fn(params, e):
        w = params["w"] / scale if divide else params["w"] * scale
        return jnp.sum(jnp.where(jnp.isfinite(w).all(), e["x"] @ w, 0.0) * e["g"])

    for tokens in (1, 3):
        x = np.random.default_rng(0).standard_normal((3, tokens, 4)).astype(np.float32)
        x *= np.float32([1e-15, 1.0, 1e15])[:, None, None]
        odd = {"x": x, "g": np.ones((3, tokens, 2), np.float32)}
        check(loss_fn, {"w": np.zeros((4, 2), np.float32)}, None, odd)


# N5: half precision


@pytest.mark.parametrize("tokens", [1, 4, 16, 60])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.one_in(3)
def test_half_precision(tokens, dtype):
    def loss_fn(params, e):
        return jnp.sum((e["x"] @ params["w"]) * e["g"], dtype=jnp.float32)

    numbers = np.random.default_rng(0)
    x, g = (jnp.asarray(1 + numbers.random((20, tokens, 6)), dtype) for _ in range(2))
    # Each of vmap's gradients is rounded to the weight's dtype.
    unit = float(jnp.finfo(dtype).eps)
    check(loss_fn, {"w": jnp.zeros((6, 6), dtype)}, None, {"x": x, "g": g}, rtol=4 * unit)


# N6: a derivative that is not a number


@pytest.mark.parametrize("keep", [4, 0])
def test_weight_norm_of_a_zero_channel(keep, monkeypatch):
    monkeypatch.setattr(bookkeeping.products, "_KEEP", keep)

    def loss_fn(params, x):
        w = params["w"] / jnp.sqrt(jnp.sum(jnp.square(params["w"]), (0, 1), keepdims=True))
        return jnp.sum(jnp.sin(convolve(x, w)))

    w = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    w[..., 1] = 0
    x = np.ones((4, 5, 2), np.float32)
    masks = np.stack([np.zeros(4, bool), np.ones(4, bool)])
    for total, facts in program(loss_fn)(dp.flat(1.0), {"w": w}, x, masks).values():
        assert not np.any(facts.factors)
        np.testing.assert_array_equal(total.value["w"], 0)


# N7, N8: the ends of float32


EXTREME_RULES = [
    dp.flat(1.0), dp.flat(1e-9), dp.automatic(1e4), dp.automatic(1e4, gamma=0.0),
    dp.flat(1e4, normalized=True),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_the_ends_of_float32(tokens):
    pairs = np.float32([(1e20, 1e-3), (1e-25, 1e25), (2e-38, 1e36), (1e36, 2e-38), (1e-3, 1e20),
                        (1e-30, 1e-8), (1e19, 1e19), (1e-20, 1.0), (3e38, 0.0), (0.0, 3e38),
                        (1e-19, 1e-19)])  # fmt: skip
    x, g = (
        np.broadcast_to(pairs[:, i, None, None], (len(pairs), tokens, size))
        for i, size in enumerate((3, 2))
    )
    ordinary = {"x": np.ones((tokens, 3), np.float32), "g": np.ones((tokens, 2), np.float32)}
    params = {"w": np.zeros((3, 2), np.float32)}
    for rule in EXTREME_RULES:
        check(linear, params, ordinary, {"x": x, "g": g}, rule=rule, crowd=5)


# N9: what vmap's half precision drops


@pytest.mark.parametrize("force", ["gram", "outer", "outer again"])
def test_half_precision_overflows_as_vmap_does(force, monkeypatch):
    monkeypatch.setattr(bookkeeping.products, "cheapest", lambda form: force)

    def loss_fn(params, e):
        return jnp.sum((e["x"] @ params["w"].astype(jnp.float16)) * e["g"], dtype=jnp.float32)

    x = np.float16([[[300.0], [1.0]], [[3.0], [1.0]]])
    g = np.float16([[[300.0], [1.0]], [[3.0], [1.0]]])
    found = check(loss_fn, {"w": np.zeros((1, 1), np.float32)}, None, {"x": x, "g": g})
    for _, factors in found.values():
        assert factors[0] == 0
        assert factors[1] > 0


# A14: an input that no gradient reaches


@pytest.mark.parametrize(
    ("layer", "huge"),
    [(jnp.tanh, 3e38), (jax.nn.sigmoid, -3e38), (jax.nn.relu, -3e38),
     (lambda y: jnp.clip(y, -2.0, 2.0), 1e38)],
)  # fmt: skip
def test_a_huge_input_behind_a_saturated_layer(layer, huge):
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(layer(x @ params["a"] + 1.0) @ params["b"]))

    x = np.zeros((2, 3, 4), np.float32)
    x[0, 0, 0], x[1] = huge, 1.0
    params = {"a": np.ones((4, 4), np.float32), "b": 0.1 * np.ones((4, 2), np.float32)}
    _, factors = check(loss_fn, params, None, x)["bookkeeping"]
    assert factors[0] > 0


# A2: complex products


@pytest.mark.parametrize("loss", [
    lambda p, x: jnp.sum(jnp.abs(jnp.fft.fft(x) @ p) ** 2),
    lambda p, x: jnp.sum(jnp.abs(p.T @ jnp.fft.fft(x).T) ** 2),
    lambda p, x: jnp.sum(jnp.abs(jnp.einsum("td,dp->tp", x, p * (1 + 2j))) ** 2),
    lambda p, x: jnp.sum(jnp.real((x @ p) @ jnp.exp(1j * jnp.arange(2.0)))),
    lambda p, x: jnp.sum(x @ p) + jnp.real(jnp.exp(1j * jnp.sum(p)) * x[0, 0]),
])  # fmt: skip
def test_complex_products(loss):
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    check(loss, np.ones((4, 2), np.float32), None, x)


# A batched gradient in which one example's NaN reaches all others


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.one_in(2)
def test_a_poisoned_example_of_a_grouped_convolution(groups, direct):
    def loss_fn(params, x):
        out = jax.lax.conv_general_dilated(
            x[None], params["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip
        extra = jnp.sum(jnp.sin(params["w"]) * x[0, 0]) if direct else 0.0
        return jnp.sum(jnp.square(out)) + extra

    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((4, 5, 4)).astype(np.float32)
    params = {"w": numbers.standard_normal((2, 4 // groups, 8)).astype(np.float32)}
    rest = np.array([0, 2, 3])
    masks = np.stack([np.arange(4) != 1, np.ones(4, bool)])
    clean = program(loss_fn)(dp.flat(1.0), params, x, masks)
    for poison in (np.nan, np.inf, 3e38):
        bad = x.copy()
        bad[1] = poison
        for method, (found, other) in program(loss_fn)(dp.flat(1.0), params, bad, masks).items():
            want, facts = clean[method]
            for i in range(2):
                norms, others = facts.norms[0, rest], other.norms[i, rest]
                np.testing.assert_allclose(others, norms, rtol=1e-5)
                assert other.factors[i, 1] == 0
                a, b = found.value["w"][i], want.value["w"][0]
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_convolution_with_an_empty_output():
    def loss_fn(params, x):
        out = jax.lax.conv_general_dilated(
            x[None], params["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.sum(out) + jnp.sum(x) * params["b"]

    params = {"w": np.ones((4, 4, 2), np.float32), "b": np.float32(1.0)}
    check(loss_fn, params, None, np.ones((2, 2, 4), np.float32))


def test_leaves_without_numbers():
    def loss_fn(params, x):
        w = jnp.concatenate([params["none"].reshape(0, 2), params["w"]])
        return jnp.sum(jnp.tanh(x @ w)) + jnp.sum(x[:, :0] @ params["none"].reshape(0, 2))

    params = {"none": np.zeros((2, 0), np.float32), "w": np.ones((4, 2), np.float32)}
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    check(loss_fn, params, None, x, route="gram")


def test_values_that_are_printed(capsys):
    def loss_fn(params, x):
        jax.debug.print("{}", jnp.sum(params["w"]) * jnp.sum(x))
        return jnp.sum(jnp.tanh(x @ params["w"]))

    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    check(loss_fn, {"w": np.ones((4, 2), np.float32)}, None, x, route="gram")
    jax.effects_barrier()
    assert capsys.readouterr().out


def test_ordinary_examples_are_never_handed_on():
    """Of a thousand examples at random, at many sizes."""
    numbers = np.random.default_rng(0)
    for T, d, p in ((1, 7, 5), (3, 16, 8), (16, 256, 64), (64, 96, 200), (197, 192, 192)):
        x = numbers.standard_normal((32, 1, T, d)).astype(np.float32)
        g = numbers.standard_normal((32, 1, T, p)).astype(np.float32)
        for measure in (
            lambda t: products.gram_measure(products.gram(t)),
            lambda t: products.outer_measure(products.outer(t)[0]),
        ):
            found = measure(forms.Tokens(x, g, d=d))
            root = np.sqrt(found.square)
            assert np.all(
                np.sqrt(found.square + found.error) + found.spread
                < root * (1 + bookkeeping._MARGIN / 2)
            )
            assert np.all(found.mass < root * bookkeeping._cancellation(T) / 1.5)
