"""Networks in NNX, Equinox and Haiku, tiny: each library's own layers and its usual idioms."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import cross_entropy, normal, random_like, rows
from flax import nnx


def _nnx_case(module, batch, loss):
    """A case of an NNX module; `loss(module, example)`."""
    graph, shapes, rest = nnx.split(module, nnx.Param, ...)

    def loss_fn(params, example):
        return loss(nnx.merge(graph, params, rest), example)

    return loss_fn, random_like(shapes), batch


def nnx_transformer(n=4):
    """An encoder block and an embedding, in NNX."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(13, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=8, decode=False, rngs=rngs
            )
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(self.norm(x))
            x = x + self.down(nnx.gelu(self.up(x)))
            return self.head(x.mean(0))

    loss = lambda net, example: cross_entropy(net(example["x"]), example["y"])  # noqa: E731
    return _nnx_case(Net(nnx.Rngs(0)), {"x": rows(13, n, 6), "y": rows(3, n)}, loss)


def nnx_cnn(n=4):
    """Convolutions with GroupNorm and dropout by the example's key, in NNX."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(2, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.GroupNorm(8, 4, rngs=rngs)
            self.second = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
            self.dropout = nnx.Dropout(0.3)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x, rngs):
            x = self.second(nnx.relu(self.norm(self.first(x))))
            return self.head(self.dropout(nnx.relu(x).mean((0, 1)), rngs=rngs))

    def loss(net, example):
        return cross_entropy(net(example["x"], nnx.Rngs(example["key"])), example["y"])

    keys = jax.random.split(jax.random.key(0), n)
    batch = {"x": normal(n, 6, 6, 2), "y": rows(3, n), "key": keys}
    return _nnx_case(Net(nnx.Rngs(0)), batch, loss)


def nnx_scan(n=4):
    """Layers made by `nnx.vmap` and run by `nnx.scan` under `nnx.remat`."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(6, rngs=rngs)
            self.up, self.down = nnx.Linear(6, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.silu(self.up(self.norm(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
            self.blocks = make(rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def run(x, block):
                return block(x)

            return self.head(run(x, self.blocks))

    loss = lambda net, example: cross_entropy(net(example["x"]), example["y"])  # noqa: E731
    return _nnx_case(Net(nnx.Rngs(0)), {"x": normal(n, 5, 6), "y": rows(3, n, 5)}, loss)


def _eqx_case(module, batch, loss):
    """A case of an Equinox module; `loss(module, example)`."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)

    def loss_fn(params, example):
        return loss(eqx.combine(params, static), example)

    return loss_fn, random_like(params), batch


def eqx_transformer(n=4):
    """Layers of one token, vmapped over tokens: embedding, attention, norm and MLP, in Equinox."""
    import equinox as eqx

    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.embed = eqx.nn.Embedding(13, 8, key=keys[0])
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
            self.norm = eqx.nn.LayerNorm(8)
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=keys[2])
            self.head = eqx.nn.Linear(8, 3, key=keys[3])

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens)
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y)
            x = x + jax.vmap(self.mlp)(x)
            return self.head(x.mean(0))

    loss = lambda net, example: cross_entropy(net(example["x"]), example["y"])  # noqa: E731
    return _eqx_case(Net(jax.random.key(0)), {"x": rows(13, n, 6), "y": rows(3, n)}, loss)


def eqx_cnn(n=4):
    """Convolutions, pooling and a weight-normed head, in Equinox."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 8, 3, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(4, 8),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.ConvTranspose2d(8, 4, 2, stride=2, key=keys[1]),
            eqx.nn.AdaptiveAvgPool2d(2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.WeightNorm(eqx.nn.Linear(16, 3, key=keys[2])),
        ]
    )
    loss = lambda net, example: cross_entropy(net(example["x"]), example["y"])  # noqa: E731
    return _eqx_case(net, {"x": normal(n, 2, 6, 6), "y": rows(3, n)}, loss)


def eqx_gru(n=4):
    """A GRU cell in a scan, and a spectral readout, in Equinox."""
    import equinox as eqx

    class Net(eqx.Module):
        cell: eqx.nn.GRUCell
        start: jax.Array
        head: eqx.nn.Linear

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.cell = eqx.nn.GRUCell(3, 6, key=first)
            self.start = jnp.zeros(6)
            self.head = eqx.nn.Linear(6, 3, key=second)

        def __call__(self, xs):
            last, states = jax.lax.scan(lambda s, x: (self.cell(x, s),) * 2, self.start, xs)
            return self.head(last + jnp.abs(jnp.fft.rfft(states, axis=0))[1])

    loss = lambda net, example: cross_entropy(net(example["x"]), example["y"])  # noqa: E731
    return _eqx_case(Net(jax.random.key(0)), {"x": normal(n, 6, 3), "y": rows(3, n)}, loss)


def _hk_case(forward, batch, loss):
    """A case of a Haiku function of inputs; `loss(apply, example)`."""
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(forward))

    def loss_fn(params, example):
        return loss(lambda *inputs: net.apply(params, *inputs), example)

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(net.init, jax.random.key(0), first["x"])
    return loss_fn, random_like(shapes), batch


def hk_resnet(n=4):
    """A residual block of convolutions with GroupNorm, in Haiku."""
    import haiku as hk

    def forward(x):
        x = hk.Conv2D(8, 3)(x)
        y = jax.nn.relu(hk.GroupNorm(4)(x[None])[0])
        x = x + hk.Conv2D(8, 3, with_bias=False)(y)
        x = hk.DepthwiseConv2D(1, (3, 3))(x[None])[0]
        return hk.nets.MLP([8, 3])(x.mean((0, 1)))

    loss = lambda apply, example: cross_entropy(apply(example["x"]), example["y"])  # noqa: E731
    return _hk_case(forward, {"x": normal(n, 6, 6, 2), "y": rows(3, n)}, loss)


def hk_transformer(n=4):
    """Attention and a tied output layer, in Haiku."""
    import haiku as hk

    def forward(tokens):
        embed = hk.Embed(13, 8)
        x = embed(tokens)
        norm = lambda: hk.LayerNorm(-1, True, True)  # noqa: E731
        start = hk.initializers.VarianceScaling(1.0)
        y = norm()(x)
        mask = np.tri(len(tokens), dtype=bool)[None]
        x = x + hk.MultiHeadAttention(2, 4, w_init=start)(y, y, y, mask=mask)
        x = x + hk.nets.MLP([16, 8], activation=jax.nn.gelu)(norm()(x))
        return norm()(x) @ embed.embeddings.T

    def loss(apply, example):
        return cross_entropy(apply(example["x"]), example["y"])

    words = rows(13, n, 7)
    return _hk_case(forward, {"x": words[:, :-1], "y": words[:, 1:]}, loss)


def hk_lstm(n=4):
    """A deep LSTM unrolled by Haiku's own scan, with a skip of its inputs."""
    import haiku as hk

    def forward(x):
        core = hk.DeepRNN([hk.LSTM(5), jnp.tanh, hk.GRU(4)])
        y, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
        return hk.Linear(3)(jnp.concatenate([x, y], -1))

    loss = lambda apply, example: cross_entropy(apply(example["x"]), example["y"])  # noqa: E731
    return _hk_case(forward, {"x": normal(n, 6, 3), "y": rows(3, n, 6)}, loss)
