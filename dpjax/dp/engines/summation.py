"""Products x_i^T g_i of recorded inputs and cotangents: formed, applied, and summed over examples.

Canonical forms only: x `[n, B, T, d]`, g `[n, B, T, p]`, see `forms`. All results are float32. Sums
of many products are computed in blocks; `products` says how far all this is off, and why a norm
bounds what is summed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dpjax.dp.engines.arithmetic import Contract, dot, full_dot, halves, roundings
from dpjax.dp.engines.forms import Form, Tokens

__all__ = [
    "BIAS", "LARGEST", "applied", "blocks_of", "capped", "chain", "chain_of", "combined", "flat",
    "in_blocks", "materialize", "row_sums", "scaled", "scales_x", "token_blocks", "weigh",
    "weighted_sum",
]  # fmt: skip

_FEW = 256  # rows, which a product adds up in less time than a scatter does one by one
_PAIRS = 64  # lookups of an example, of which all pairs are compared in less time than they sort

# Numbers of a small gradient: programs of its own take longer to compile than they save in time.
BIAS = 2**14

_BLOCK = 256  # numbers of a long vector that are summed in one go

LARGEST = float(jnp.finfo(jnp.float32).max)


def in_blocks(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], blocks: int, contract: Contract, batch: int
) -> jax.Array:
    """`dot`, one block after the other along an axis of each operand that is contracted."""
    if not blocks:
        return dot(a, b, contract, batch)
    pairs = tuple(zip((a, b), axes))

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        x, y = (jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, axis) for x, axis in pairs)
        return total + dot(x, y, contract, batch), None

    x, y = (jax.lax.slice_in_dim(x, blocks * _BLOCK, x.shape[axis], axis=axis) for x, axis in pairs)
    return jax.lax.scan(add, dot(x, y, contract, batch), jnp.arange(blocks))[0]


def blocks_of(size: int, most: int = 4 * _BLOCK) -> int:
    """The number of blocks that a sum of `size` products is cut into; 0 for one sum."""
    return size // _BLOCK if size >= most else 0


def token_blocks(tokens: int) -> int:
    # So few that ordinary examples are trusted: see the margins in `bookkeeping`.
    return blocks_of(tokens, (6 if roundings(1) == 1 else 2) * _BLOCK)


def chain_of(size: int, blocks: int, *operands: jax.Array) -> int:
    """How many units roundoff such a sum may be off by."""
    return int(roundings(_BLOCK if blocks else size, *operands)) + blocks


def chain(size: int) -> int:
    """How many units roundoff a sum of products may be off by, in blocks where it is long."""
    return chain_of(size, blocks_of(size))


def applied(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Inputs `[n, B, T, d]` times a weight `[B, d, p]`, off by the units of `chain(d)`."""
    n, B, T, d = x.shape
    rows = jnp.swapaxes(x, 0, 1).reshape(B, n * T, d)
    if B == 1:  # without a batch of one, which a CPU takes longer for
        product = in_blocks(rows[0], weight[0], (1, 0), blocks_of(d), ((1,), (0,)), 0)
    else:
        product = in_blocks(rows, weight, (2, 1), blocks_of(d), ((2,), (1,)), 1)
    return jnp.swapaxes(product.reshape(B, n, T, -1), 0, 1)


def flat(gradients: jax.Array) -> jax.Array:
    """Per-example gradients as float32 `[n, entries]`.

    Flat, because XLA adds up an array of many short axes number by number, and a long axis in a
    tree: in the first case the sum of 16,384 squares can be off by 5e-4.
    """
    return gradients.astype(jnp.float32).reshape(gradients.shape[0], -1)


def capped(array: jax.Array, limit: float) -> jax.Array:
    """Numbers beyond the limit as the infinite ones that vmap has there."""
    return array if limit >= LARGEST else jnp.where(abs(array) <= limit, array, jnp.inf)


def materialize(t: Tokens, start: jax.Array | None = None) -> jax.Array:
    """The gradients x_i^T g_i `[n, B, d, p]`, added to `start`; a table's are added in place."""
    product = start
    if t.x is not None:
        product = in_blocks(t.x, t.g, (2, 2), token_blocks(t.x.shape[2]), ((2,), (2,)), 2)
        product = product if start is None else start + product
    if t.rows is None and product is not None:
        return product
    rows, h = t.rows[:, 0, :, 0], t.h[:, 0].astype(jnp.float32)
    if product is None and t.d <= _FEW:
        ones = rows[:, :, None] == jnp.arange(t.d)[None, None]
        return full_dot(ones, h, ((1,), (1,)), 1)[:, None]
    start = jnp.zeros((h.shape[0], t.d, t.p), jnp.float32) if product is None else product[:, 0]
    return jax.vmap(lambda start, rows, h: start.at[rows].add(h))(start, rows, h)[:, None]


def weigh(gradients: jax.Array, factors: jax.Array, used: jax.Array) -> jax.Array:
    """Sum over examples of factor * gradient, `[n]` and `[n, entries]`.

    Of at most `BIAS` entries, an example that is not used may hold anything; its factor is 0.
    """
    if gradients.shape[1] <= BIAS:
        return jnp.sum(scaled(gradients, factors, used), 0)
    # As fast as memory is, which parts of the gradients would take more of.
    return full_dot(factors, gradients, ((0,), (0,)), 0)


def weighted_sum(t: Tokens, factors: jax.Array, usable: jax.Array) -> jax.Array:
    """Sum over examples of factor * x_i^T g_i.

    Args:
        t: the canonical arrays.
        factors: `[n]`.
        usable: `[n]` bool; where False, the factor must be 0, and the array that is not scaled (see
            `scales_x`) must be finite. The other one may hold anything.

    Returns:
        `[B, d, p]`.
    """
    both = t.rows is not None
    total = None if t.x is None else _weighted_product(t.x, t.g, factors, usable, both)
    if t.rows is None and total is not None:
        return total
    total = jnp.zeros((1, t.d, t.h.shape[3]), jnp.float32) if total is None else total
    return total.at[0, t.rows[:, 0, :, 0]].add(scaled(t.h, factors, usable)[:, 0])


def scales_x(form: Form) -> bool:
    """Whether the input is scaled, being the smaller array, or the cotangent."""
    return form.d <= form.p


def _weighted_product(
    x: jax.Array, g: jax.Array, factors: jax.Array, usable: jax.Array, in_order: bool
) -> jax.Array:
    """The sum of products; with `in_order`, as an array that is read where it is."""
    scale_x = x.shape[3] <= g.shape[3]
    small, large = (x, g) if scale_x else (g, x)
    small = scaled(small, factors, usable)
    # Two bfloat16 parts carry 16 bits of the scaled array, at twice the cost of one product; one
    # part alone would sum something measurably different from what was clipped.
    parts = halves(small) if x.dtype == g.dtype == jnp.bfloat16 else (small,)
    # A product transposes its first operand: the small one, which is a new array in any case. To
    # transpose the result would take more memory where that is a whole table.
    turned = not scale_x and not in_order
    pairs = [(part, large) if scale_x or turned else (large, part) for part in parts]
    total = functools.reduce(jnp.add, [_sum_products(*pair) for pair in pairs])
    return jnp.swapaxes(total, 1, 2) if turned else total


def scaled(array: jax.Array, factors: jax.Array, usable: jax.Array | None = None) -> jax.Array:
    """Factor times each example's part of `array`, float32; zero where not usable."""
    # In as few operations as there can be: a large model has hundreds of arrays to scale.
    shape = (*factors.shape, *array.shape[1:])
    product = array.astype(jnp.float32) * jax.lax.broadcast_in_dim(factors, shape, (0,))
    if usable is None:
        return product
    usable = jax.lax.broadcast_in_dim(usable, shape, (0,))
    return jax.lax.select(usable, product, jnp.zeros_like(product))


def _sum_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over examples and tokens of the products a_i^T b_i, `[B, ...]`."""
    blocks = token_blocks(a.shape[2])
    if a.shape[1] == 1:
        return in_blocks(a[:, 0], b[:, 0], (1, 1), blocks, ((0, 1), (0, 1)), 0)[None]
    a, b = jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1)
    return in_blocks(a, b, (2, 2), blocks, ((1, 2), (1, 2)), 1)


def combined(t: Tokens) -> jax.Array:
    """The rows of gradients of lookups, `[n, T, p]`: all of a row's cotangents at its first."""
    return row_sums(t, t.h[:, 0].astype(jnp.float32))


def row_sums(t: Tokens, values: jax.Array) -> jax.Array:
    """Adds up the values of lookups of one row.

    Args:
        t: the lookups.
        values: `[n, T, k]`, float32.

    Returns:
        `[n, T, k]`, for each row the sum at the first lookup of it, and zeros at the others.
    """
    rows = t.rows[:, 0, :, 0]
    if rows.shape[1] == 1:
        return values
    if rows.shape[1] <= _PAIRS:  # as a product with ones and zeros, which rounds no more
        first = jnp.argmax(rows[:, :, None] == rows[:, None], axis=2)
        ones = first[:, None] == jnp.arange(first.shape[1])[None, :, None]
        return full_dot(ones, values, ((2,), (1,)), 1)

    def summed(rows: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.zeros_like(values).at[_firsts(rows, t.d)].add(values)

    return jax.vmap(summed)(rows, values)


def _firsts(rows: jax.Array, size: int) -> jax.Array:
    """For each of `[T]` lookups the first of the same row, without a look at all pairs.

    Args:
        rows: numbers of rows, `[T]`.
        size: of the table.
    """
    at = jnp.arange(len(rows), dtype=jnp.uint32)
    if size * len(rows) <= 2**32:  # both in one number, which sorts in a third of the time
        keys = jnp.sort(rows.astype(jnp.uint32) * len(rows) + at)
        ordered, order = keys // len(rows), keys % len(rows)
    else:
        ordered, order = jax.lax.sort((rows, at), num_keys=1)
    begins = jnp.where((at == 0) | (ordered != jnp.roll(ordered, 1)), at, 0)
    return jnp.zeros_like(at).at[order].set(order[jax.lax.cummax(begins)], unique_indices=True)
