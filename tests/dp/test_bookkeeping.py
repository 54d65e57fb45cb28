"""The book-keeping engine against the vmap engine: layers, rules, geometries, poisoned examples."""

import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_clipping import RULES

from dpjax import dp, models
from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.dp.engines import bookkeeping, forms
from dpjax.dp.engines import products as site_products
from dpjax.runtime.sharding import AXIS, make_mesh


@pytest.fixture(autouse=True)
def without_margins(monkeypatch):
    """The engines are compared to rounding; what margins add is tested in test_engine_bound."""
    monkeypatch.setattr(site_products, "_UNIT", 0.0)


SIZE = 4
MASK = np.arange(SIZE) != 1


def both(loss_fn, rule, params, batch, mask=MASK, **kwargs):
    """The results of the vmap engine and of the book-keeping engine."""

    def run(params, batch, mask):
        return [
            dp.clipped_sum(loss_fn, rule, method=method, **kwargs)(params, batch, mask)
            for method in ("vmap", "bookkeeping")
        ]

    return jax.jit(run)(params, batch, mask)


def assert_close(expected, found, tolerance=1e-5, slack=1e-6):
    """Norms, factors and sums agree; a sum relative to its own leaf's size."""
    (want, facts), (have, other) = expected, found
    np.testing.assert_allclose(other.loss, facts.loss, rtol=tolerance, atol=slack)
    largest = float(np.max(facts.norms, where=np.isfinite(facts.norms), initial=0.0))
    for a, b in ((facts.norms, other.norms), (facts.factors, other.factors)):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=slack * largest)
    np.testing.assert_array_equal(other.real, facts.real)
    assert have.sensitivity == want.sensitivity
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want.value))
    for a, b in zip(jax.tree.leaves(want.value), jax.tree.leaves(have.value), strict=True):
        assert b.dtype == jnp.float32
        bound = tolerance * float(jnp.max(jnp.abs(a))) + slack * scale
        np.testing.assert_allclose(b, a, rtol=0, atol=bound)


def agree(loss_fn, params, batch, rule=None, mask=MASK, **kwargs):
    """By default clips every leaf on its own, so that each leaf's norm is compared."""
    rule = per_layer(0.5, grouping=by_leaf) if rule is None else rule
    assert_close(*both(loss_fn, rule, params, batch, mask), **kwargs)


def as_loss(module, inputs):
    """Random parameters of a Flax module, and a loss in which all outputs take part."""
    with jax.numpy_rank_promotion("allow"):
        out, shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), inputs[0])
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda p: 0.5 * numbers.standard_normal(p.shape, np.float32), shapes)
    target = numbers.standard_normal(out.shape, np.float32)

    def loss_fn(params, x):
        with jax.numpy_rank_promotion("allow"):
            return jnp.mean(jnp.square(module.apply(params, x) - target))

    return loss_fn, params


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((SIZE, *shape), np.float32)


class Fn(nn.Module):
    """A module written as one function of (module, x)."""

    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


def shared_twice(module, x):
    layer = nn.Dense(6)
    return layer(nn.tanh(layer(x))) * 3


def bare(module, x):
    token = module.param("cls", nn.initializers.normal(1.0), (x.shape[-1],))
    x = jnp.concatenate([jnp.broadcast_to(token, (1, x.shape[-1])), x])
    x = x + module.param("position", nn.initializers.normal(1.0), x.shape)
    scale = module.param("scale", nn.initializers.ones, (x.shape[-1],))
    return x + jnp.broadcast_to(scale, x.shape) * nn.tanh(nn.Dense(x.shape[-1])(x))


def lora(module, x):
    a = module.param("a", nn.initializers.normal(0.5), (x.shape[-1], 2))
    b = module.param("b", nn.initializers.normal(0.5), (2, 5))
    return jnp.sin((x @ a) @ b) * 0.5


def merged_lora(module, x):
    a = module.param("a", nn.initializers.normal(0.5), (x.shape[-1], 2))
    b = module.param("b", nn.initializers.normal(0.5), (2, x.shape[-1]))
    return jnp.sin(x @ (jnp.eye(x.shape[-1]) + a @ b))


def standardised(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, 3, x.shape[-1], 4))
    gain = module.param("gain", nn.initializers.ones, (4,))
    kernel = (kernel - kernel.mean((0, 1, 2), keepdims=True)) / kernel.std((0, 1, 2), keepdims=True)
    out = jax.lax.conv_general_dilated(
        x[None], kernel * gain, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out[0]


def transposed(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (7, x.shape[-1]))
    return jnp.einsum("od,td->ot", kernel, x) * (kernel.T * 0.5).shape[0]


def scaled_view(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (2, x.shape[-1], 3))
    kernel = jnp.transpose(kernel * 0.25, (1, 0, 2)).reshape(-1, 6).astype(jnp.float32) / 3.0
    return x @ kernel


def two_forms(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 4))
    return x @ kernel + jnp.sin(x) @ jnp.cos(kernel)


def stacked_experts(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, x.shape[-1], 4))
    return jnp.einsum("etd,edp->tep", jnp.stack([x, jnp.sin(x), x**2]), kernel)


def pruned(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 4))
    return x @ (kernel * (np.arange(4 * x.shape[-1]) % 3 > 0).reshape(-1, 4))


def dense_after_scan(module, x):
    stack = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return nn.Dense(3, name="last")(stack()(x, None)[0])


def tied(module, x):
    embed = nn.Embed(11, 5)
    return embed.attend(nn.tanh(embed(x)))


def twice_embedded(module, x):
    embed = nn.Embed(11, 5)
    return nn.tanh(embed(x)) * embed(x[::-1])


def embed_inside_scan(module, x):
    table = module.param("table", nn.initializers.normal(1.0), (11, 5))

    def step(state, rows):
        return jnp.tanh(state + table[rows].sum(0)), state

    state, _ = jax.lax.scan(step, jnp.zeros(5), x.reshape(3, 2))
    return state


def positions(module, x):
    return x + nn.Embed(8, x.shape[-1])(jnp.arange(x.shape[0]))


def regularised(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 3))
    return x @ kernel + jnp.sum(jnp.square(kernel))


def unused(module, x):
    module.param("unused", nn.initializers.ones, (3,))
    return nn.Dense(2)(x)


def custom(module, x):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 2.0 * r[0].T @ g))
    return product(x, module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 3)))


def branches(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 3))
    return jax.lax.cond(x[0, 0] > 0, lambda k: x @ k, lambda k: -x @ k, kernel)


def python_scan(module, x):
    kernel = module.param("kernel", nn.initializers.normal(0.5), (x.shape[-1], x.shape[-1]))
    gate = module.param("gate", nn.initializers.normal(0.5), (3, x.shape[-1], x.shape[-1]))
    filters = module.param("filters", nn.initializers.normal(0.5), (3, 2, 1, x.shape[-1]))

    def step(x, own):
        gate, taps = own
        y = nn.tanh(x @ kernel) + x @ gate
        y = y + jax.lax.conv_general_dilated(
            y[None], taps, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=y.shape[-1],
        )[0]  # fmt: skip
        return nn.tanh(y), y.sum()

    x, sums = jax.lax.scan(step, x, (gate, filters))
    return x + sums.sum()


def nested_scans(module, x):
    width = x.shape[-1]
    own = module.param("own", nn.initializers.normal(0.5), (2, 3, width, width))
    inner = module.param("inner", nn.initializers.normal(0.5), (3, width, width))
    outer = module.param("outer", nn.initializers.normal(0.5), (2, width, width))

    def turn(x, both):
        own, outer = both

        def step(x, both):
            own, inner = both
            return nn.tanh(x @ own + jnp.sin(x) @ inner + jnp.cos(x) @ outer), None

        return jax.lax.scan(step, x, (own, inner))

    return jax.lax.scan(turn, x, (own, outer))[0]


def convolutions_in_nested_scans(module, x):
    shapes = {
        "own": (2, 3, 2, 3, 3),
        "inner": (3, 2, 3, 3),
        "outer": (2, 2, 3, 3),
        "one": (2, 3, 3),
    }
    own, inner, outer, one = (
        module.param(name, nn.initializers.normal(0.3), shape) for name, shape in shapes.items()
    )

    def conv(x, kernel):
        dims = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=dims)[
            0
        ]

    def turn(x, both):
        own, outer = both

        def step(x, both):
            y = conv(x, both[0]) + conv(jnp.sin(x), both[1]) + conv(jnp.cos(x), outer)
            return nn.tanh(y + conv(x**2, one)), None

        return jax.lax.scan(step, x, (own, inner))

    return jax.lax.scan(turn, x, (own, outer))[0]


def weight_under_the_kernel(module, x):
    """The example is the kernel, the parameter what it slides over."""
    image = module.param("image", nn.initializers.normal(1.0), (1, 9, 2))
    dims = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(image, x, (1,), "VALID", dimension_numbers=dims)


def batch_groups(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, 2, 4))
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
    )


def lookups_in_slices(module, x):
    tables = module.param("tables", nn.initializers.normal(1.0), (3, 11, 5))
    lookup = lambda state, both: (jnp.tanh(state + both[0][both[1]].sum(0)), None)  # noqa: E731
    state, _ = jax.lax.scan(lookup, jnp.zeros(5), (tables, x.reshape(3, 2)))
    return state


def batched_lookups(module, x):
    tables = module.param("tables", nn.initializers.normal(1.0), (3, 11, 5))
    return jnp.sin(jax.vmap(lambda table, rows: table[rows])(tables, x.reshape(3, 2)))


@jax.jit
def standard_conv(kernel, x):
    """One jaxpr however often it is called, the variable of its weight included."""
    dims = ("NHWC", "HWIO", "NHWC")
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=dims)[0]


def two_derived_weights(module, x):
    shape = (3, 3, x.shape[-1], x.shape[-1])
    first, second = (
        module.param(name, nn.initializers.normal(1.0), shape) for name in ("first", "second")
    )

    @jax.jit
    def both(first, second, x):
        return nn.tanh(standard_conv(second, nn.tanh(standard_conv(first, x))))

    return both(first, second, x)


def learned_initial_state(module, x):
    state = module.param("state", nn.initializers.normal(1.0), (x.shape[-1],))
    return jax.lax.scan(lambda s, row: (jnp.tanh(s + row), s), state, x)[1]


def weights_out_of_a_scan(module, x):
    kernels = module.param("kernels", nn.initializers.normal(1.0), (x.shape[0], 3))
    step = lambda carry, both: (carry + both[0].sum(), jnp.sin(both[1]))  # noqa: E731
    total, turned = jax.lax.scan(step, 0.0, (x, kernels))
    return x.T @ turned + total


class Residual(nn.Module):
    """A block in the form that nn.scan takes."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1])(nn.tanh(nn.Dense(8)(y))), None


def scanned(length=3, remat=False):
    block = nn.remat(Residual) if remat else Residual
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
    return Fn(lambda module, x: stack()(x, None)[0])


def views(module, x):
    layer = nn.Conv(3, (3,))
    return jax.vmap(layer)(jnp.stack([x, jnp.sin(x)])).mean(0)


TOKENS = np.array([[3, 3, 1, 0, 10, 3], [1, 2, 3, 4, 5, 6], [7] * 6, [0, 9, 0, 9, 9, 0]])

LAYERS = {
    "dense": (nn.Dense(3), normal(5)),
    "dense of tokens": (nn.Dense(3), normal(7, 5)),
    "dense of one feature": (nn.Dense(3), normal(2, 1)),
    "dense of two axes": (nn.Dense(30), normal(2, 3, 40)),
    "dense of many tokens": (nn.Dense(3), normal(60, 5)),
    "dense without bias": (nn.Dense(3, use_bias=False), normal(7, 5)),
    "dense general out": (nn.DenseGeneral((2, 3)), normal(7, 5)),
    "dense general in": (nn.DenseGeneral(4, axis=(-2, -1)), normal(7, 2, 3)),
    "dense general batch": (nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), normal(3, 7, 5)),
    "dense general odd axes": (nn.DenseGeneral((2, 3), axis=(0, -1)), normal(4, 7, 5)),
    "conv": (nn.Conv(4, (3, 3)), normal(6, 6, 3)),
    "conv large": (nn.Conv(2, (3, 3)), normal(16, 16, 2)),
    "conv stride": (nn.Conv(4, (3, 2), strides=(2, 1)), normal(7, 6, 3)),
    "conv padding": (nn.Conv(4, (2, 3), padding=((2, 0), (1, 3))), normal(5, 6, 3)),
    "conv dilation": (nn.Conv(4, (3, 2), kernel_dilation=(2, 3)), normal(7, 9, 2)),
    "conv input dilation": (
        nn.Conv(2, (3, 3), input_dilation=(2, 1), padding=((1, 2), (0, 1))),
        normal(4, 5, 2),
    ),
    "conv groups": (nn.Conv(6, (3, 3), feature_group_count=2), normal(5, 5, 4)),
    "conv depthwise": (nn.Conv(8, (3,), feature_group_count=4), normal(9, 4)),
    "conv patches": (nn.Conv(5, (2, 2), strides=(2, 2), padding="VALID"), normal(6, 5, 3)),
    "conv patches with gaps": (
        nn.Conv(5, (2, 2), strides=(2, 2), kernel_dilation=(2, 2)),
        normal(6, 5, 3),
    ),
    "conv pointwise": (nn.Conv(5, (1, 1), strides=(2, 2)), normal(6, 5, 3)),
    "conv 3d": (nn.Conv(3, (2, 2, 3)), normal(3, 4, 4, 2)),
    "conv batch inside": (nn.Conv(3, (3, 3)), normal(2, 5, 5, 2)),
    "conv transpose": (nn.ConvTranspose(3, (3, 3), strides=(2, 2)), normal(4, 4, 2)),
    "conv local": (nn.ConvLocal(3, (2, 2)), normal(4, 4, 2)),
    "embed": (nn.Embed(11, 5), TOKENS),
    "embed of two axes": (nn.Embed(11, 5), TOKENS.reshape(SIZE, 2, 3)),
    "layer norm": (nn.LayerNorm(), normal(7, 5)),
    "group norm": (nn.GroupNorm(2), normal(5, 5, 4)),
    "rms norm": (nn.RMSNorm(), normal(7, 5)),
    "attention": (nn.MultiHeadDotProductAttention(2), normal(7, 6)),
    "lstm": (nn.RNN(nn.LSTMCell(3)), normal(5, 4)),
    "bare parameters": (Fn(bare), normal(6, 5)),
    "lora": (Fn(lora), normal(7, 6)),
    "merged lora": (Fn(merged_lora), normal(7, 6)),
    "weight standardisation": (Fn(standardised), normal(6, 6, 2)),
    "weight standardisation, twice": (Fn(two_derived_weights), normal(4, 4, 2)),
    "weight standardisation, few positions": (Fn(standardised), normal(2, 3, 2)),
    "weight first": (Fn(transposed), normal(7, 5)),
    "scaled view": (Fn(scaled_view), normal(7, 5)),
    "two forms": (Fn(two_forms), normal(7, 5)),
    "batched weights": (Fn(stacked_experts), normal(7, 5)),
    "pruned": (Fn(pruned), normal(7, 5)),
    "called twice": (Fn(shared_twice), normal(7, 6)),
    "tied": (Fn(tied), TOKENS),
    "embedded twice": (Fn(twice_embedded), TOKENS),
    "embedded inside a scan": (Fn(embed_inside_scan), TOKENS),
    "constant lookup": (Fn(positions), normal(7, 5)),
    "regularised": (Fn(regularised), normal(7, 5)),
    "unused": (Fn(unused), normal(7, 5)),
    "custom vjp": (Fn(custom), normal(7, 5)),
    "cond": (Fn(branches), normal(7, 5)),
    "scan of slices and constants": (Fn(python_scan), normal(7, 5)),
    "nested scans": (Fn(nested_scans), normal(7, 5)),
    "convolutions in nested scans": (Fn(convolutions_in_nested_scans), normal(5, 3)),
    "weight under the kernel": (Fn(weight_under_the_kernel), normal(3, 2, 4)),
    "learned initial state": (Fn(learned_initial_state), normal(7, 5)),
    "weights out of a scan": (Fn(weights_out_of_a_scan), normal(7, 5)),
    "batch groups": (Fn(batch_groups), normal(2, 6, 2)),
    "lookups in slices": (Fn(lookups_in_slices), TOKENS),
    "batched lookups": (Fn(batched_lookups), TOKENS),
    "nn.scan": (scanned(), normal(7, 5)),
    "nn.scan of nn.remat": (scanned(remat=True), normal(7, 5)),
    "dense after nn.scan": (Fn(dense_after_scan), normal(7, 5)),
    "nn.remat": (nn.remat(nn.Dense)(3), normal(7, 5)),
    "views": (Fn(views), normal(6, 2)),
}


# What must not quietly fall back; every leaf that is not named is direct.
ROUTES = {
    "dense of many tokens": {"kernel": "outer"},
    "dense general odd axes": {"kernel": "gram"},
    "conv groups": {"kernel": "conv"},
    "embed of two axes": {"embedding": "embed"},
    "attention": {f"{name}/kernel": "gram" for name in ("query", "key", "value", "out")},
    "lora": {"a": "gram", "b": "outer"},
    "weight standardisation": {"kernel": "conv", "gain": "conv"},
    "weight standardisation, twice": {"first": "conv", "second": "conv"},
    "nested scans": {"own": "gram", "inner": "outer", "outer": "outer"},
    "convolutions in nested scans": dict.fromkeys(("own", "inner", "outer", "one"), "conv"),
    "weight under the kernel": {},
    "learned initial state": {},
    "weights out of a scan": {},
    "batch groups": {},
    "lookups in slices": {},
    "batched lookups": {},
    "scaled view": {"kernel": "gram"},
    "batched weights": {"kernel": "gram"},
    "called twice": {"Dense_0/kernel": "outer"},
    "dense of one feature": {"kernel": "gram"},
    "embedded inside a scan": {"table": "embed"},
    "embedded twice": {"Embed_0/embedding": "embed"},
    "unused": {"Dense_0/kernel": "outer", "unused": "unused"},
    "scan of slices and constants": {"kernel": "outer", "gate": "gram", "filters": "conv"},
    "nn.scan of nn.remat": {"Dense_0/kernel": "gram", "Dense_1/kernel": "gram"},
    "dense after nn.scan": {
        "Dense_0/kernel": "gram",
        "Dense_1/kernel": "gram",
        "last/kernel": "gram",
    },
    "lstm": {f"{side}{gate}/kernel": "gram" for side in "hi" for gate in "fgio"},
    "nn.remat": {"kernel": "gram"},
    "views": {"Conv_0/kernel": "conv"},
    "two forms": {},
    "tied": {},
    "merged lora": {},
    "custom vjp": {},
    "cond": {},
    "regularised": {},
}


def routes(loss_fn, params, batch):
    """The leaves that are not direct."""
    example = jax.tree.map(lambda x: x[0], batch)
    plan = bookkeeping.plan(loss_fn, params, example)
    return {leaf.path: leaf.route for leaf in plan if leaf.route != "direct"}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    module, inputs = LAYERS[name]
    agree(*as_loss(module, inputs), inputs)


@pytest.mark.parametrize("name", ROUTES)
def test_route(name):
    module, inputs = LAYERS[name]
    found = routes(*as_loss(module, inputs), inputs)
    short = {"/".join(path.split("/")[-2:]): route for path, route in found.items()}
    assert {path.removeprefix("params/"): route for path, route in short.items()} == ROUTES[name]


def small(size=SIZE, seed=0):
    """Tokens -> rows -> dense over few tokens -> scalar loss; three leaves, three routes."""
    numbers = np.random.default_rng(seed)

    def draw(*shape):
        return numbers.standard_normal(shape, np.float32)

    params = {"bias": draw(4), "kernel": draw(5, 4), "rows": draw(9, 5)}
    batch = {"tokens": numbers.integers(0, 9, (size, 6)), "scale": draw(size, 6, 5)}

    def loss_fn(params, example):
        x = jnp.sin(params["rows"][example["tokens"]]) * example["scale"]
        return jnp.sum(jnp.square(x @ params["kernel"] + params["bias"][None]))

    return loss_fn, params, batch


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    loss_fn, params, batch = small()
    assert sorted(routes(loss_fn, params, batch).values()) == ["embed", "gram"]
    agree(loss_fn, params, batch, RULES[name])


@pytest.mark.parametrize("mask", [[True] * 4, [False] * 4, [False, True, False, False]])
def test_mask(mask):
    agree(*small(), mask=np.array(mask))


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_microbatches(micro):
    mask = np.arange(6) != 4
    assert_close(*both(small()[0], dp.flat(0.7), *small(6)[1:], mask, microbatch_size=micro))


def test_rule_is_traced():
    """A new bound compiles nothing."""
    loss_fn, params, batch = small()
    run = jax.jit(lambda rule: bookkeeping.microbatch_sum(loss_fn, rule, params, batch, MASK))
    for bound in (0.1, 1.0, 10.0):
        run(dp.flat(jnp.float32(bound)))
    assert run._cache_size() == 1


def poisonable():
    """A loss that an example can poison in its inputs, its loss, or its gradient alone."""
    numbers = np.random.default_rng(0)
    names = {
        "embed": (9, 16),
        "dense": (16, 48),
        "conv": (3, 3, 48),
        "wide": (48, 40),
        "bias": (40,),
    }
    params = {k: 0.3 * numbers.standard_normal(v, np.float32) for k, v in names.items()}
    params["conv"] = 0.3 * numbers.standard_normal((3, 48, 48), np.float32)
    size, tokens = 6, 40
    batch = {
        "tokens": numbers.integers(0, 9, (size, tokens)),
        "add": numbers.standard_normal((size, tokens, 16), np.float32),
        "late": numbers.standard_normal((size, tokens, 48), np.float32),
        "weight": np.ones((size,), np.float32),
    }

    def loss_fn(params, example):
        x = params["embed"][example["tokens"]] + example["add"]
        x = jnp.tanh(x @ params["dense"])
        x = (
            x
            + jax.lax.conv_general_dilated(
                x[None], params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )[0]
        )
        x = (x * example["late"]) @ params["wide"] + params["bias"][None]
        return example["weight"] * jnp.sum(jnp.square(jnp.tanh(x)))

    return loss_fn, params, batch


POISONS = {
    "nan input": ("add", np.nan),
    "inf input": ("add", np.inf),
    "nan late": ("late", np.nan),
    "inf late": ("late", np.inf),
    "infinite weight": ("weight", np.inf),
    "nan weight": ("weight", np.nan),
    "huge weight": ("weight", 1e30),
}


@pytest.fixture(scope="module")
def poisoned_sum():
    loss_fn, params, batch = poisonable()
    rule = per_layer(0.5, grouping=by_leaf)

    @jax.jit
    def run(batch, mask):
        return bookkeeping.microbatch_sum(loss_fn, rule, params, batch, mask)

    assert sorted(routes(loss_fn, params, batch)) == ["conv", "dense", "embed", "wide"]
    return run, batch


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("rows", [[0], [2, 5]])
def test_poisoned_example_leaves_the_others_unchanged(poisoned_sum, poison, rows):
    run, batch = poisoned_sum
    name, value = POISONS[poison]
    bad = {k: np.copy(v) for k, v in batch.items()}
    if name == "weight":
        bad[name][rows] = value
    else:
        bad[name][rows, 3, 1] = value
    clean, facts = run(batch, ~np.isin(np.arange(6), rows))
    total, other = run(bad, np.ones(6, bool))
    assert (other.factors[np.array(rows)] == 0).all()
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(total), strict=True):
        np.testing.assert_array_equal(a, b)
    masked, _ = run(bad, ~np.isin(np.arange(6), rows))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(a, b)
    rest = ~np.isin(np.arange(6), rows)
    np.testing.assert_array_equal(facts.norms[rest], other.norms[rest])


def test_infinite_input_whose_cotangent_is_zero():
    """The loss and the other leaf's gradient are finite; 0 * inf is not."""

    def loss_fn(params, x):
        return jnp.sum(jnp.where(x > 1e9, 0.0, x @ params["a"])) + jnp.sum(params["b"])

    batch = np.array([[1.0], [np.inf]], np.float32)
    params = {"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32)}
    agree(loss_fn, params, batch[:, None], dp.flat(10.0), mask=np.array([True, True]))


def mlp(dtype):
    def loss_fn(params, example):
        x, y = example
        x = x.astype(dtype)
        for name in ("a", "b"):
            x = jax.nn.gelu(x @ params[name].astype(dtype) + params[name + "0"].astype(dtype)[None])
        return jnp.mean(jnp.square(x.astype(params["a"].dtype) - y))

    return loss_fn


@pytest.mark.parametrize("tokens", [3, 24, 400], ids=["few", "some", "many"])
def test_bfloat16_is_as_exact_as_vmap(tokens):
    """Against float64: norms to 1%, sums to 2% of the largest entry, and no worse than vmap."""
    numbers = np.random.default_rng(0)
    shapes = {"a": (16, 32), "a0": (32,), "b": (32, 8), "b0": (8,)}
    params = {k: 0.3 * numbers.standard_normal(v) for k, v in shapes.items()}
    batch = (
        numbers.standard_normal((SIZE, tokens, 16)),
        numbers.standard_normal((SIZE, tokens, 8)),
    )
    rule = per_layer(0.02, grouping=by_leaf)
    single = jax.tree.map(np.float32, (params, batch))
    with jax.enable_x64(True):
        exact = dp.clipped_sum(mlp(jnp.float64), rule, method="vmap")
        (want, facts) = jax.tree.map(np.asarray, jax.jit(exact)(params, batch, MASK))
    errors = []
    for total, found in both(mlp(jnp.bfloat16), rule, *single):
        real = np.asarray(found.real)
        norm = np.max(np.abs(found.norms[real] / facts.norms[real] - 1))
        pairs = zip(jax.tree.leaves(want.value), jax.tree.leaves(total.value), strict=True)
        errors.append((norm, max(np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs)))
    (vmap_norm, vmap_sum), (norm, total) = errors
    assert norm < 0.01
    assert total < 0.02
    assert norm < 1.5 * vmap_norm + 1e-3
    assert total < 1.5 * vmap_sum + 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_summed_gradients_are_those_that_were_measured(dtype):
    """One example's clipped sum has the norm that its factor promises, in low precision too."""
    loss_fn, params, batch = poisonable()
    batch = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, batch)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    rule = dp.flat(1e-2)
    run = jax.jit(lambda mask: bookkeeping.microbatch_sum(loss_fn, rule, params, batch, mask))
    for i in range(3):
        total, facts = run(np.arange(6) == i)
        assert facts.norms[i, 0] > 1
        norm = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(total)))
        # Lower by the margin for numbers that are cut in two parts of 16 bits, never higher.
        assert 1e-2 * (1 - 1e-4) < norm <= 1e-2


def in_half(kernel, dtype):
    """A kernel that is standardised in float32 and converted, and one that is not."""
    kernel = kernel - jnp.broadcast_to(kernel.mean((0, 1, 2), keepdims=True), kernel.shape)
    return kernel.astype(dtype)


def all_in_half(kernel, dtype):
    return in_half(kernel.astype(dtype), dtype)


def half_way(kernel, dtype):
    return jnp.sin(in_half(kernel, dtype)).astype(jnp.float32)


def hidden(kernel, dtype):
    """In a loop of one turn, which shows float32 to those outside."""
    turn = lambda _, w: half_way(w, dtype)  # noqa: E731
    return jax.lax.fori_loop(0, 1, turn, kernel)


@pytest.mark.parametrize("method", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", [in_half, all_in_half, half_way, hidden])
def test_many_examples_move_no_sum_by_more_than_the_bound(make, dtype, method):
    """A sum that is rounded to few bits moves by its own rounding, which grows with its size."""
    numbers = np.random.default_rng(0)
    kernel = numbers.standard_normal((3, 3, 2, 4), np.float32)
    batch = 1.0 + 0.1 * numbers.standard_normal((512, 4, 4, 2), np.float32)

    def loss_fn(params, x):
        weight = make(params["kernel"], dtype)
        out = jax.lax.conv_general_dilated(
            x[None].astype(weight.dtype), weight, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return 100 * jnp.sum(jnp.sin(out.astype(jnp.float32)))

    params = {"kernel": jnp.asarray(kernel)}
    clip = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))
    whole = clip(params, batch, np.ones(512, bool))[0].value["kernel"]
    assert jnp.linalg.norm(whole) > 100
    moved = [
        np.linalg.norm(whole - clip(params, batch, np.arange(512) != out)[0].value["kernel"])
        for out in range(0, 512, 64)
    ]
    assert max(moved) < 1.001


def test_a_kernel_that_is_converted_at_the_end_keeps_its_route():
    def loss_fn(make):
        def loss(params, x):
            out = jax.lax.conv_general_dilated(
                x[None], make(params["kernel"], jnp.bfloat16).astype(x.dtype), (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return loss

    params = {"kernel": jnp.ones((3, 3, 2, 4))}
    example = jnp.ones((4, 4, 2), jnp.bfloat16)
    routes = {
        make.__name__: bookkeeping.plan(loss_fn(make), params, example)[0].route
        for make in (in_half, all_in_half, half_way, hidden)
    }
    assert routes.pop("in_half") == "conv"
    assert set(routes.values()) == {"direct"}


def test_augmentations_are_averaged_before_clipping():
    module = Fn(lambda module, x: nn.Dense(3)(jnp.tanh(nn.Conv(4, (3,))(x))))
    loss_fn, params = as_loss(module, normal(6, 2))
    inputs = normal(5, 6, 2)
    agree(lambda p, views: jnp.mean(jax.vmap(lambda v: loss_fn(p, v))(views)), params, inputs)


def test_dropout_keys_inside_the_example():
    module = Fn(lambda m, x: nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x))))
    inputs = normal(7, 5)
    params = jax.jit(module.init)(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs[0]
    )

    def loss_fn(params, example):
        x, key = example
        return jnp.sum(jnp.square(module.apply(params, x, rngs={"dropout": key})))

    agree(loss_fn, params, (inputs, jax.random.split(jax.random.key(2), SIZE)))


def test_frozen_parameters_cost_nothing():
    """The engine's work on a subset is that of an ordinary gradient of the same subset."""
    loss_fn, params, batch = poisonable()

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def costs(names):
        frozen = {k: jnp.asarray(v) for k, v in params.items() if k not in names}
        own = {k: params[k] for k in names}

        def subset(own, example):
            return loss_fn({**frozen, **own}, example)

        def mean(own, batch):
            return jnp.mean(jax.vmap(lambda e: subset(own, e))(batch))

        clipped = dp.clipped_sum(subset, dp.flat(1.0), method="bookkeeping")
        return flops(clipped, own, batch, np.ones(6, bool)), flops(jax.grad(mean), own, batch)

    ours, plain = costs(["bias"])
    assert ours < 1.05 * plain
    assert ours < 0.5 * costs(list(params))[1]


def test_sharded_over_devices():
    """Inside shard_map, on eight devices, as on one."""
    loss_fn, params, batch = small(16)
    mask = np.arange(16) != 3
    rule = dp.flat(0.7)
    clipped = dp.clipped_sum(loss_fn, rule, method="bookkeeping")
    rows, everywhere = PartitionSpec(AXIS), PartitionSpec()

    def local(params, batch, mask):
        total, facts = clipped(params, batch, mask)
        return jax.tree.map(lambda x: jax.lax.psum(x, AXIS), total.value), facts

    run = jax.jit(
        jax.shard_map(
            local,
            mesh=make_mesh(),
            in_specs=(everywhere, rows, rows),
            out_specs=(everywhere, rows),
            check_vma=False,
        )
    )
    value, facts = run(params, batch, mask)
    want, expected = dp.clipped_sum(loss_fn, rule, method="vmap")(params, batch, mask)
    assert_close((want, expected), (dp.ClippedSum(value, want.sensitivity), facts))


KERNEL = st.integers(1, 3)


@st.composite
def conv_geometry(draw):
    """A convolution of any geometry over one or two axes, and an input shape."""
    axes = draw(st.integers(1, 2))
    several = lambda strategy: tuple(draw(strategy) for _ in range(axes))  # noqa: E731
    groups = draw(st.integers(1, 2))
    kernel, dilation = several(KERNEL), several(KERNEL)
    layer = nn.Conv(
        groups * draw(KERNEL),
        kernel,
        strides=several(KERNEL),
        padding=draw(
            st.sampled_from(
                ["SAME", "VALID", "CIRCULAR", tuple((i % 3, 2 - i) for i in range(axes))]
            )
        ),
        kernel_dilation=dilation,
        input_dilation=several(st.just(1)),
        feature_group_count=groups,
        use_bias=draw(st.booleans()),
    )
    sizes = tuple((k - 1) * d + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation))
    return layer, normal(*sizes, groups * draw(KERNEL), seed=draw(st.integers(0, 9)))


@hypothesis.settings(deadline=None, max_examples=10, derandomize=True)
@hypothesis.given(conv_geometry())
def test_any_convolution(case):
    layer, inputs = case
    loss_fn, params = as_loss(layer, inputs)
    assert "conv" in routes(loss_fn, params, inputs).values()
    agree(loss_fn, params, inputs)


PIECES = {
    "dense": lambda m, x: nn.Dense(6)(x),
    "bottleneck": lambda m, x: nn.Dense(x.shape[-1])(nn.Dense(2, use_bias=False)(x)),
    "shared": shared_twice,
    "norm": lambda m, x: nn.LayerNorm()(x),
    "rms": lambda m, x: nn.RMSNorm()(x),
    "groups": lambda m, x: nn.GroupNorm(2, reduction_axes=(-2, -1))(x),
    "conv": lambda m, x: nn.Conv(x.shape[-1], (3,), feature_group_count=2)(x),
    "attention": lambda m, x: nn.SelfAttention(2)(x),
    "remat": lambda m, x: nn.remat(nn.Dense)(6)(x),
    "gelu": lambda m, x: nn.gelu(x),
    "residual": lambda m, x: x + nn.tanh(nn.Dense(x.shape[-1])(x)),
    "bare": lambda m, x: x * jnp.broadcast_to(
        m.param("gain", nn.initializers.ones, (x.shape[-1],)), x.shape
    ),
}  # fmt: skip


@hypothesis.settings(deadline=None, max_examples=8, derandomize=True)
@hypothesis.given(
    st.lists(st.sampled_from(sorted(PIECES.items())), min_size=1, max_size=4, unique=True),
    st.integers(1, 30),
    st.sampled_from(sorted(RULES)),
)
def test_any_model(pieces, tokens, rule):
    def body(module, x):
        for _, piece in pieces:
            x = piece(module, x)
        return nn.Dense(2)(x)

    if rule.startswith("per_layer_bounds"):
        rule = "per_layer"
    inputs = normal(tokens, 4)
    agree(*as_loss(Fn(body), inputs), inputs, RULES[rule], tolerance=3e-5)


def wrong_gram(x, g):
    """The norm of a sum over tokens is not the sum of the tokens' norms."""
    square = jnp.sum(jnp.sum(jnp.square(x), 3) * jnp.sum(jnp.square(g), 3), (1, 2))
    return GRAM(x, g)._replace(square=square)


def wrong_lookup(rows, g):
    """Forgets that a row can be looked up twice."""
    return LOOKUP(rows, g)._replace(square=jnp.sum(jnp.square(g), (1, 2, 3)))


def wrong_restore(site, w):
    """A dense layer's gradient, laid out in the wrong order."""
    return jnp.reshape(jnp.swapaxes(w, 1, 2), site.shape)


def wrong_patches(site, x):
    """The kernel's positions in the wrong order."""
    return PATCHES(site, x)[..., ::-1, :]


GRAM, LOOKUP = site_products.gram_measure, site_products.lookup_measure
PATCHES = forms._patches
DOT = forms.KINDS["dot"]


@pytest.mark.parametrize(
    "layer, patch",
    [
        ("dense of tokens", (site_products, "gram_measure", wrong_gram)),
        ("attention", (site_products, "gram_measure", wrong_gram)),
        ("embed", (site_products, "lookup_measure", wrong_lookup)),
        ("lora", (forms, "KINDS", {"dot": DOT._replace(restore=wrong_restore)})),
        ("conv large", (forms, "_patches", wrong_patches)),
        ("weight standardisation", (forms, "_patches", wrong_patches)),
    ],
)
def test_battery_catches_a_wrong_rule(monkeypatch, layer, patch):
    module, name, value = patch
    if isinstance(value, dict):
        value = {**getattr(module, name), **value}
        monkeypatch.setattr(bookkeeping, name, value)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError):
        test_layer(layer)


def tokens_batch():
    return np.random.default_rng(0).integers(1, 40, (SIZE, 12))


MODELS = {
    "vit": (
        lambda: models.vision_transformer(
            models.ViTConfig(width=16, depth=2, heads=2, mlp=24, image_size=14), num_classes=3
        ),
        lambda: normal(14, 14, 1),
        r"kernel",
        {"gram", "outer"},
    ),
    "resnet": (
        lambda: models.wide_resnet(
            models.WideResNetConfig(depth=10, widen=1, groups=4, image_size=8), num_classes=3
        ),
        lambda: normal(8, 8, 3),
        r"kernel|gain",
        {"conv", "gram"},
    ),
    "text": (
        lambda: models.text_encoder(
            models.TextConfig(40, 16, 2, 2, 24, positions=12, max_length=12), num_classes=3
        ),
        tokens_batch,
        r"kernel|word",
        {"gram", "outer", "embed"},
    ),
}


def classify(name):
    make, inputs, _, _ = MODELS[name]
    model, batch = make(), (inputs(), np.arange(SIZE) % 3)

    def loss_fn(params, example):
        image, label = example
        return -jax.nn.log_softmax(model.apply(params, image))[label]

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    numbers = np.random.default_rng(2)
    params = jax.tree.map(lambda p: 0.3 * numbers.standard_normal(p.shape, np.float32), shapes)
    return loss_fn, params, batch


@pytest.mark.parametrize("name", ["vit", "text", pytest.param("resnet", marks=pytest.mark.slow)])
def test_models(name):
    agree(*classify(name), tolerance=3e-5)


@pytest.mark.parametrize("name", MODELS)
def test_leaves_of_models(name):
    """All large leaves are products; only biases, norms, class token and positions are direct."""
    loss_fn, params, batch = classify(name)
    _, _, products, allowed = MODELS[name]
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    assert len(plan) == len(jax.tree.leaves(params))
    for leaf in plan:
        if re.search(products, leaf.path):
            assert leaf.route in allowed, leaf
        else:
            assert leaf.route == "direct", leaf
            assert re.search(r"bias|scale|cls|pos|token_type", leaf.path), leaf


def test_the_loss_is_traced_at_the_shape_of_one_example():
    def loss_fn(params, x):
        assert x.shape == (3,)
        return jnp.sum(jnp.sin(x @ params["w"]))

    agree(loss_fn, {"w": normal(3, 2)[0]}, normal(3))


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from all_equations(inner.jaxpr)


CHUNKED = {
    "patches": (nn.Conv(5, (3, 3)), normal(6, 6, 2), 36 * 18),
    "patches and kept gradients": (
        nn.Conv(6, (3, 3), feature_group_count=2),
        normal(9, 9, 4),
        2 * 81 * 18,
    ),
    "gradients": (nn.Dense(16), normal(50, 16), 16 * 16),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_of_examples(monkeypatch, name, chunk):
    """What is too large for all examples at once is done a few at a time, with the same result."""
    layer, inputs, size = CHUNKED[name]
    loss_fn, params = as_loss(layer, inputs)
    whole = both(loss_fn, dp.flat(0.5), params, inputs)
    monkeypatch.setitem(bookkeeping._CHUNK, "cpu", chunk * size)
    agree(loss_fn, params, inputs)
    assert_close(whole[0], both(loss_fn, dp.flat(0.5), params, inputs)[1])

    def run(params):
        return bookkeeping.microbatch_sum(loss_fn, dp.flat(0.5), params, inputs, MASK)

    lengths = [e.params["length"] for e in all_equations(jax.make_jaxpr(run)(params).jaxpr)
               if e.primitive.name == "scan"]  # fmt: skip
    assert lengths == ([] if chunk == SIZE else [SIZE // chunk])
