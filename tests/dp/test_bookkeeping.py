"""The book-keeping engine against the vmap engine: layers, rules, geometries, models."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import MASK, agree, assert_close, both, routes
from jax.sharding import PartitionSpec
from losses import LAYERS, SIZE, Fn, as_loss, classify, normal, shared_twice, small
from test_clipping import RULES

from dpjax import dp
from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.dp.engines import bookkeeping, forms
from dpjax.dp.engines import products as site_products
from dpjax.runtime.sharding import AXIS, make_mesh

pytestmark = pytest.mark.usefixtures("without_margins")


TOGETHER = 6  # layers of one program, which takes less time to compile than six programs
PROGRAMS = [list(LAYERS)[i : i + TOGETHER] for i in range(0, len(LAYERS), TOGETHER)]


@pytest.mark.parametrize("names", PROGRAMS, ids=lambda names: names[0])
@pytest.mark.one_in(4)
def test_layers(names):
    """Every leaf is clipped on its own, so that each is compared in a loss of several layers."""
    losses, params = zip(*(as_loss(*LAYERS[name]) for name in names))

    def loss_fn(params, inputs):
        return sum(loss(p, x) for loss, p, x in zip(losses, params, inputs, strict=True))

    agree(loss_fn, params, tuple(LAYERS[name][1] for name in names))


# Whether the sum is normalized is decided when it is scaled: one such rule shows it.
@pytest.mark.parametrize(
    "name", [name for name in RULES if "/" not in name or name == "auto_s_per_layer/normalized"]
)
@pytest.mark.one_in(2)
def test_rule(name):
    loss_fn, params, batch = small()
    assert sorted(routes(loss_fn, params, batch).values()) == ["embed", "gram"]
    agree(loss_fn, params, batch, RULES[name])


def test_mask():
    loss_fn, params, batch = small()
    rule = per_layer(0.5, grouping=by_leaf)
    engines = [
        jax.jit(dp.clipped_sum(loss_fn, rule, method=method)) for method in ("vmap", "bookkeeping")
    ]
    for mask in ([True] * 4, [False] * 4, [False, True, False, False]):
        assert_close(*(engine(params, batch, np.array(mask)) for engine in engines))


@pytest.mark.parametrize("micro", [1, 3])
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


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_gradients_that_jax_adds_up_before_they_are_clipped_are_refused(method):
    """With `check_vma`, JAX's default, each device's gradient is that of all devices' examples."""
    clipped = dp.clipped_sum(lambda w, x: jnp.sum(w * x), dp.flat(1.0), method=method)
    rows, everywhere = PartitionSpec(AXIS), PartitionSpec()

    def local(w, x, mask):
        return clipped(w, x, mask)[1].norms

    run = jax.shard_map(local, mesh=make_mesh(), in_specs=(everywhere, rows, rows), out_specs=rows)
    with pytest.raises(ValueError, match="needs check_vma=False"):
        jax.jit(run)(jnp.ones(2), jnp.ones((8, 2)), jnp.ones(8, bool))


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


@pytest.mark.slow  # the random programs of every day have convolutions of all kinds, too
@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
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


@pytest.mark.slow  # the zoo's models of every day are made of the same layers
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
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


def wrong_gram(t):
    """The norm of a sum over tokens is not the sum of the tokens' norms."""
    square = jnp.sum(jnp.sum(jnp.square(t.x), 3) * jnp.sum(jnp.square(t.g), 3), (1, 2))
    return GRAM(t)._replace(square=square)


def wrong_lookup(t):
    """Forgets that a row can be looked up twice."""
    return LOOKUP(t)._replace(square=jnp.sum(jnp.square(t.h), (1, 2, 3)))


def wrong_restore(site, w):
    """A dense layer's gradient, laid out in the wrong order."""
    return jnp.reshape(jnp.swapaxes(w, 1, 2), site.shape)


def wrong_patches(site, x):
    """The kernel's positions in the wrong order."""
    return PATCHES(site, x)[..., ::-1, :]


def wrong_pair(t):
    """Forgets that a row that is looked up is multiplied as well."""
    same = (t.rows == jnp.swapaxes(t.rows, 2, 3)).astype(jnp.float32)
    gram, length = INPUTS(t)[0], same.shape[2]
    both = gram.at[:, :, :length, length:].set(0).at[:, :, length:, :length].set(0)
    return both, 1


def wrong_product(t, constant, slopes=None):
    """Forgets the cross term of a penalty."""
    return jnp.zeros(t.g.shape[0])


GRAM, LOOKUP = site_products.gram_measure, site_products.lookup_measure
PATCHES, INPUTS = forms._patches, site_products._input_gram


@pytest.mark.parametrize(
    "layer, patch",
    [
        ("dense of tokens", (site_products, "gram_measure", wrong_gram)),
        ("attention", (site_products, "gram_measure", wrong_gram)),
        ("embed", (site_products, "lookup_measure", wrong_lookup)),
        ("scaled view", (forms, "restore", wrong_restore)),
        ("conv large", (forms, "_patches", wrong_patches)),
        ("weight standardization", (forms, "_patches", wrong_patches)),
        ("tied", (site_products, "_input_gram", wrong_pair)),
        ("penalty", (site_products, "inner_product", wrong_product)),
    ],
)
@pytest.mark.one_in(2)
def test_battery_catches_a_wrong_rule(monkeypatch, layer, patch):
    if layer in ("tied", "penalty"):  # as it is chosen for large models
        monkeypatch.setattr(site_products, "cheapest", lambda form: "gram")
        test_layers([layer])
    monkeypatch.setattr(*patch)
    with pytest.raises(AssertionError):
        test_layers([layer])


@pytest.mark.parametrize("name", ["vit", "text", pytest.param("resnet", marks=pytest.mark.slow)])
def test_models(name):
    agree(*classify(name), tolerance=3e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3,)])
def test_products_without_tokens_have_no_gradient(shape):
    """Beside one that has; no example of an empty sequence is lost."""

    def loss_fn(params, x):
        empty = jnp.sum(jnp.sin(x["none"] @ params["w"]))
        return empty + jnp.sum(jnp.sin(x["some"] @ params["v"]))

    params = {"w": normal(3, 2)[0], "v": normal(5, 2)[0]}
    agree(loss_fn, params, {"none": jnp.ones((SIZE, *shape)), "some": normal(4, 5)})


def test_the_loss_is_traced_at_the_shape_of_one_example():
    def loss_fn(params, x):
        assert x.shape == (3,)
        return jnp.sum(jnp.sin(x @ params["w"]))

    agree(loss_fn, {"w": normal(3, 2)[0]}, normal(3))


@pytest.mark.parametrize("tokens", [1, 256])
def test_a_head_beside_what_is_far_larger_is_kept(tokens):
    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["body"])
        return jnp.sum(jnp.sin(jnp.mean(hidden, 0) @ params["head"]))

    params = {"body": 0.1 * jnp.ones((16, 16)), "head": jnp.ones((16, 2))}
    x = normal(tokens, 16)
    agree(loss_fn, params, x)
    assert routes(loss_fn, params, x)["head"] == ("gram" if tokens == 1 else "outer")
