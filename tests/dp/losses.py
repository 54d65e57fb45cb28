"""A table of losses: Flax modules and plain functions, with a batch of inputs for each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpjax import models

SIZE = 4


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
    layer = nn.Dense(x.shape[-1])
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


def standardized(module, x):
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


def regularized(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 3))
    return x @ kernel + jnp.sum(jnp.square(kernel))


def penalized(module, x):
    kernel = module.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 3))
    table = module.param("table", nn.initializers.normal(1.0), (4, 3))
    out = x @ kernel + table[(x[:, 0] > 0).astype(int)]
    return jnp.sum(jnp.sin(out)) + 0.3 * jnp.sum(jnp.square(kernel)) + jnp.sum(table)


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


TOKENS = np.array([[3, 3, 1, 0, 10, 3], [1, 2, 3, 4, 5, 6], [7] * 6, [0, 9, 0, 9, 9, 0]], np.int32)

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
    "weight standardization": (Fn(standardized), normal(6, 6, 2)),
    "weight standardization, twice": (Fn(two_derived_weights), normal(4, 4, 2)),
    "weight standardization, few positions": (Fn(standardized), normal(2, 3, 2)),
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
    "regularized": (Fn(regularized), normal(7, 5)),
    "penalty": (Fn(penalized), normal(2, 5)),
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


def small(size=SIZE, seed=0):
    """Tokens -> rows -> dense over few tokens -> scalar loss; three leaves, three routes."""
    numbers = np.random.default_rng(seed)

    def draw(*shape):
        return numbers.standard_normal(shape, np.float32)

    params = {"bias": draw(4), "kernel": draw(5, 4), "rows": draw(9, 5)}
    batch = {
        "tokens": numbers.integers(0, 9, (size, 6)).astype(np.int32),
        "scale": draw(size, 6, 5),
    }

    def loss_fn(params, example):
        x = jnp.sin(params["rows"][example["tokens"]]) * example["scale"]
        return jnp.sum(jnp.square(x @ params["kernel"] + params["bias"][None]))

    return loss_fn, params, batch


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
        "tokens": numbers.integers(0, 9, (size, tokens)).astype(np.int32),
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


def mlp(dtype):
    def loss_fn(params, example):
        x, y = example
        x = x.astype(dtype)
        for name in ("a", "b"):
            x = jax.nn.gelu(x @ params[name].astype(dtype) + params[name + "0"].astype(dtype)[None])
        return jnp.mean(jnp.square(x.astype(params["a"].dtype) - y))

    return loss_fn


def in_half(kernel, dtype):
    """A kernel that is standardized in float32 and converted, and one that is not."""
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


def tokens_batch():
    return np.random.default_rng(0).integers(1, 40, (SIZE, 12)).astype(np.int32)


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
