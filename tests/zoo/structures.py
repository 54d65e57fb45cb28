"""Networks on tables, graphs, sets and functions, tiny, in Flax Linen and in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import classifier, cross_entropy, linen, normal, random_like, regression, rows
from flax import linen as nn


class _Dlrm(nn.Module):
    @nn.compact
    def __call__(self, user, items, dense):
        bottom = nn.relu(nn.Dense(4)(dense))
        user = nn.Embed(17, 4, name="users")(user)
        bag = nn.Embed(11, 4, name="items")(items).sum(0)
        parts = jnp.stack([bottom, user, bag])
        cross = (parts @ parts.T)[np.triu_indices(3, 1)]
        x = jnp.concatenate([bottom, cross])
        return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))[0]


def dlrm(n=4):
    """Tables of users and items beside dense features (arXiv:1906.00091)."""

    def loss(apply, example):
        logit = apply(example["user"], example["items"], example["dense"])
        return jnp.logaddexp(0.0, jnp.where(example["clicked"], -logit, logit))

    batch = {
        "user": rows(17, n),
        "items": rows(11, n, 3),
        "dense": normal(n, 5),
        "clicked": np.arange(n) % 2 == 0,
    }
    return linen(_Dlrm(), batch, loss)


class _GraphNet(nn.Module):
    @nn.compact
    def __call__(self, nodes, senders, receivers):
        count = len(nodes)
        x = nn.Dense(6)(nodes)
        for _ in range(2):
            message = nn.relu(nn.Dense(6)(jnp.concatenate([x[senders], x[receivers]], -1)))
            score = nn.Dense(1)(message)[:, 0]
            score = jnp.exp(score - jax.ops.segment_max(score, receivers, count)[receivers])
            share = score / jax.ops.segment_sum(score, receivers, count)[receivers]
            heard = jax.ops.segment_sum(share[:, None] * message, receivers, count)
            x = x + nn.Dense(6)(nn.relu(nn.Dense(8)(jnp.concatenate([x, heard], -1))))
        return nn.Dense(3)(x.sum(0))


def graph_network(n=4, nodes=5, edges=9):
    """Messages over edges with attention (arXiv:1806.01261, arXiv:1710.10903); one graph each."""

    def loss(apply, example):
        graph = example["nodes"], example["senders"], example["receivers"]
        return cross_entropy(apply(*graph), example["y"])

    batch = {
        "nodes": normal(n, nodes, 3),
        "senders": rows(nodes, n, edges),
        "receivers": rows(nodes, n, edges, seed=3),
        "y": rows(3, n),
    }
    return linen(_GraphNet(), batch, loss)


class _Fno(nn.Module):
    @nn.compact
    def __call__(self, x):
        width, modes = 4, 3
        x = nn.Dense(width)(x)
        for index in range(2):
            start, shape = nn.initializers.normal(0.3), (modes, width, width)
            real = self.param(f"real_{index}", start, shape)
            imaginary = self.param(f"imaginary_{index}", start, shape)
            waves = jnp.fft.rfft(x, axis=0)[:modes]
            waves = jnp.einsum("mi,mio->mo", waves, real + 1j * imaginary)
            waves = jnp.pad(waves, ((0, len(x) // 2 + 1 - modes), (0, 0)))
            x = nn.gelu(jnp.fft.irfft(waves, len(x), axis=0) + nn.Dense(width)(x))
        return nn.Dense(1)(x)


def fno(n=4, points=8):
    """A Fourier neural operator (arXiv:2010.08895); its complex weights have two real parts."""
    return regression(_Fno(), normal(n, points, 2), normal(n, points, 1))


class _DeepSets(nn.Module):
    @nn.compact
    def __call__(self, x):
        each = nn.relu(nn.Dense(6)(nn.relu(nn.Dense(8)(x))))
        return nn.Dense(3)(nn.relu(nn.Dense(8)(each.sum(0))))


def deep_sets(n=4):
    """Sums over a set (arXiv:1703.06114)."""
    return classifier(_DeepSets(), normal(n, 6, 3))


def weight_normed(n=4):
    """Normalized columns times gains (arXiv:1602.07868), in plain JAX."""
    shapes = {"a": (5, 6), "b": (6, 3), "gain_a": (6,), "gain_b": (3,)}
    params = random_like({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})

    def loss_fn(params, example):
        unit = lambda w: w / jnp.linalg.norm(w, axis=0)  # noqa: E731
        x = jnp.tanh(example["x"] @ (unit(params["a"]) * params["gain_a"]))
        return cross_entropy(x @ (unit(params["b"]) * params["gain_b"]), example["y"])

    return loss_fn, params, {"x": normal(n, 7, 5), "y": rows(3, n, 7)}


class _HyperNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        code = self.param("codes", nn.initializers.normal(1.0), (2, 3))
        make = nn.Dense(6 * 6)
        x = nn.Dense(6)(x)
        for index in range(2):
            x = nn.tanh(x @ make(code[index]).reshape(6, 6))
        return nn.Dense(3)(x)


def hypernetwork(n=4):
    """A small network makes the layers of another from a code of each (arXiv:1609.09106)."""
    return classifier(_HyperNetwork(), normal(n, 5, 4), rows(3, n, 5))


class _Film(nn.Module):
    @nn.compact
    def __call__(self, image, task):
        scale, shift = jnp.split(nn.Dense(12)(nn.Embed(3, 4)(task)), 2)
        x = nn.relu(nn.Conv(6, (3, 3))(image) * scale + shift)
        kernel = nn.Dense(6 * 3)(task * jnp.ones(1)).reshape(6, 3)  # of this example
        return x.mean((0, 1)) @ kernel


def conditioned(n=4):
    """Layers scaled, and a head made, from the example itself (arXiv:1709.07871)."""

    def loss(apply, example):
        return cross_entropy(apply(example["x"], example["task"]), example["y"])

    batch = {"x": normal(n, 5, 5, 2), "task": rows(3, n), "y": rows(3, n, seed=3)}
    return linen(_Film(), batch, loss)


class _Siren(nn.Module):
    @nn.compact
    def __call__(self, points):
        x = jnp.sin(30.0 * nn.Dense(12)(points))
        return nn.Dense(1)(jnp.sin(nn.Dense(12)(x)))


def siren(n=4):
    """A signal and its slope (arXiv:2006.09661): the loss differentiates the network itself."""

    def loss(apply, example):
        value = apply(example["x"])[:, 0]
        slope = jax.grad(lambda x: apply(x).sum())(example["x"])
        fit = jnp.mean(jnp.square(value - example["y"]))
        return fit + 1e-3 * jnp.mean(jnp.square(slope - example["slope"]))

    batch = {"x": normal(n, 6, 2), "y": normal(n, 6, seed=3), "slope": normal(n, 6, 2, seed=4)}
    return linen(_Siren(), batch, loss)


def splines(n=4):
    """A network of learned functions on its edges, from a basis of bumps (arXiv:2404.19756)."""
    shapes = {"first": (3, 5, 6), "second": (6, 5, 2), "base": (3, 6)}
    params = random_like({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})
    centers = np.linspace(-1, 1, 5, dtype=np.float32)

    def loss_fn(params, example):
        bumps = lambda x: jnp.exp(-jnp.square(4 * (x[:, None] - centers)))  # noqa: E731
        x = jnp.einsum("ib,ibo->o", bumps(example["x"]), params["first"])
        x = x + jax.nn.silu(example["x"]) @ params["base"]
        out = jnp.einsum("ib,ibo->o", bumps(jnp.tanh(x)), params["second"])
        return jnp.sum(jnp.square(out - example["y"]))

    return loss_fn, params, {"x": normal(n, 3), "y": normal(n, 2)}


def meta_learning(n=4):
    """An inner step of gradient descent on the example's own support set (arXiv:1703.03400)."""
    shapes = {"first": (3, 6), "second": (6, 1)}
    params = random_like({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})

    def fit(params, x, y):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["first"]) @ params["second"] - y))

    def loss_fn(params, example):
        slopes = jax.grad(fit)(params, example["x"], example["y"])
        adapted = jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes)
        return fit(adapted, example["query"], example["answer"])

    batch = {"x": normal(n, 5, 3), "y": normal(n, 5, 1)}
    batch |= {"query": normal(n, 4, 3, seed=3), "answer": normal(n, 4, 1, seed=4)}
    return loss_fn, params, batch
