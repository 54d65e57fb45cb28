"""What the models of the zoo share: random data, random parameters, and usual losses.

A case is `(loss_fn, params, batch)`: the loss of ONE example, parameters away from their initial
values (a zero head would hide the rest), and a batch of `n` examples. Functions that make a case
take sizes as keywords; the defaults are tiny.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rows(most, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, most, shape, dtype=np.int32)


def random_like(shapes, seed=2):
    """Normal numbers for a tree of shapes, smaller where a product sums over more of them."""
    numbers = np.random.default_rng(seed)

    def leaf(like):
        fan_in = max(1, int(np.prod(like.shape[:-1])))
        return numbers.standard_normal(like.shape, np.float32) * np.float32(fan_in**-0.5)

    return jax.tree.map(leaf, shapes)


def cross_entropy(logits, labels):
    """Mean over all positions of one example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen(module, batch, loss):
    """A case of a Linen module; `loss(apply, example)` calls `apply(*inputs)`."""

    def loss_fn(params, example):
        return loss(lambda *inputs: module.apply({"params": params}, *inputs), example)

    def init(example):
        made = {}

        def apply(*inputs):
            made.update(module.init(jax.random.key(0), *inputs))
            return module.apply(made, *inputs)

        loss(apply, example)
        return made["params"]

    first = jax.tree.map(lambda x: x[0], batch)
    return loss_fn, random_like(jax.eval_shape(init, first)), batch


def classifier(module, x, labels=None, classes=3):
    """A case of a Linen module that maps one input to logits, of each position or of all."""
    labels = np.arange(len(x), dtype=np.int32) % classes if labels is None else labels
    loss = lambda apply, example: cross_entropy(apply(example["x"]), example["y"])  # noqa: E731
    return linen(module, {"x": x, "y": labels}, loss)


def regression(module, x, y):
    """A case of a Linen module with the mean squared error."""
    loss = lambda apply, example: jnp.mean(jnp.square(apply(example["x"]) - example["y"]))  # noqa: E731
    return linen(module, {"x": x, "y": y}, loss)
