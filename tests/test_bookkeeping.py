"""The book-keeping engine against the vmap engine: layers, rules, geometries, poisoned examples."""

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
from dpjax.dp import bookkeeping, site_algebra, site_products
from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.sharding import AXIS, make_mesh

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
    largest = float(jnp.max(facts.norms))
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


def routes(loss_fn, params, batch):
    example = jax.tree.map(lambda x: x[0], batch)
    return {leaf.path: leaf.route for leaf in bookkeeping.plan(loss_fn, params, example)}


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
    return (x @ a) @ b * 0.5 + x @ (a @ b)


def standardised(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, 3, x.shape[-1], 4))
    gain = module.param("gain", nn.initializers.ones, (4,))
    kernel = (kernel - kernel.mean((0, 1, 2), keepdims=True)) / kernel.std(
        (0, 1, 2), keepdims=True
    )
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


def experts(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, x.shape[-1], 4))
    return jnp.einsum("td,edp->tep", x, kernel) + jnp.einsum("etd,edp->tep", x[None] * jnp.arange(3.0)[:, None, None], jnp.cos(kernel))


def stacked_experts(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (3, x.shape[-1], 4))
    return jnp.einsum("etd,edp->tep", jnp.stack([x, jnp.sin(x), x**2]), kernel)


def tied(module, x):
    embed = nn.Embed(11, 5)
    return embed.attend(nn.tanh(embed(x)))


def twice_embedded(module, x):
    embed = nn.Embed(11, 5)
    return nn.tanh(embed(x)) * embed(x[::-1])


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
    filters = module.param("filters", nn.initializers.normal(0.5), (3, 3, 1, x.shape[-1]))

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
    "weight standardisation": (Fn(standardised), normal(6, 6, 2)),
    "weight standardisation, few positions": (Fn(standardised), normal(2, 3, 2)),
    "weight first": (Fn(transposed), normal(7, 5)),
    "scaled view": (Fn(scaled_view), normal(7, 5)),
    "two forms": (Fn(experts), normal(7, 5)),
    "batched weights": (Fn(stacked_experts), normal(7, 5)),
    "called twice": (Fn(shared_twice), normal(7, 6)),
    "tied": (Fn(tied), TOKENS),
    "embedded twice": (Fn(twice_embedded), TOKENS),
    "constant lookup": (Fn(positions), normal(7, 5)),
    "regularised": (Fn(regularised), normal(7, 5)),
    "unused": (Fn(unused), normal(7, 5)),
    "custom vjp": (Fn(custom), normal(7, 5)),
    "cond": (Fn(branches), normal(7, 5)),
    "scan of slices and constants": (Fn(python_scan), normal(7, 5)),
    "nn.scan": (scanned(), normal(7, 5)),
    "nn.scan of nn.remat": (scanned(remat=True), normal(7, 5)),
    "nn.remat": (nn.remat(nn.Dense)(3), normal(7, 5)),
    "views": (Fn(views), normal(6, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    module, inputs = LAYERS[name]
    agree(*as_loss(module, inputs), inputs)
