"""What a clipped gradient takes beside the plain one: programs of equal blocks, and memory."""

import jax
import jax.numpy as jnp

from dpjax import dp

TOKENS, WIDTH, SIZE = 16, 32, 8


def loss_fn(params, x):
    for w in params["layers"]:
        x = jnp.tanh(x @ w)
    return jnp.sum(x * params["scale"][None])


def plain(params, batch):
    return jax.grad(lambda p: jnp.mean(jax.vmap(lambda x: loss_fn(p, x))(batch)))(params)


def clipped(params, batch):
    summed = dp.clipped_sum(loss_fn, dp.flat(1.0))
    return summed(params, batch, jnp.ones(SIZE, bool))[0].value


def lowered(function, depth):
    number = jax.ShapeDtypeStruct
    params = {
        "layers": [number((WIDTH, WIDTH), jnp.float32)] * depth,
        "scale": number((WIDTH,), jnp.float32),
    }
    return jax.jit(function).lower(params, number((SIZE, TOKENS, WIDTH), jnp.float32))


def products(function, depth):
    return lowered(function, depth).as_text().count("stablehlo.dot_general")


def test_a_further_block_adds_one_product_and_no_gram_matrix():
    """The gradient of an example that is set apart; the norms of all blocks share one program."""
    more = {f: products(f, 6) - products(f, 4) for f in (plain, clipped)}
    assert more[clipped] == more[plain] + 2


def test_recorded_arrays_are_not_copied_to_be_cleared():
    """Eight inputs and eight cotangents are recorded; beside them a few of their size are held."""
    layer = 4 * SIZE * TOKENS * WIDTH
    more = [lowered(f, 8).compile().memory_analysis().temp_size_in_bytes for f in (plain, clipped)]
    assert more[1] - more[0] < 20 * layer
