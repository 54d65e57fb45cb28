"""What a clipped gradient takes beside the plain one: programs of equal blocks, and memory."""

import jax
import jax.numpy as jnp
import numpy as np

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


def test_microbatches_are_added_up_in_place():
    """Beside the sum there is one array for each parameter: of an example that is in doubt."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.standard_normal((128, 128), np.float32) * 0.1 for i in range(6)}
    batch = rng.standard_normal((8, 4, 128), np.float32)

    def loss_fn(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    clipped = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), microbatch_size=2))
    sizes = clipped.lower(params, batch, np.ones(8, bool)).compile().memory_analysis()
    size = sum(w.nbytes for w in params.values())
    assert size < sizes.temp_size_in_bytes < 1.8 * size
    whole = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0)))(params, batch, np.ones(8, bool))[0]
    found = clipped(params, batch, np.ones(8, bool))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, found)
