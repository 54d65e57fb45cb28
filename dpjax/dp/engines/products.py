"""Squared norms and weighted sums of per-example products G_i = x_i^T g_i.

Canonical forms only: x `[n, B, T, d]`, g `[n, B, T, p]`, see `forms`. All results are
float32, and products of float32 numbers are not rounded to less on accelerators.

**Why a norm bounds what is summed.** Let u = 2^-24, the unit roundoff of float32. A sum of k
products, in any order, fused or not, is off by at most k u times the sum of their absolute values
(to first order in u), and by `_TINY` for each product that underflows. Where the gradient is formed
for its norm and kept for the sum, measured and summed are one array and nothing more is needed.
Elsewhere the norm is measured on one rounding path and the sum formed on another, and `Measure`
carries what both may be off by:

- `error` bounds how far the computed square is from the exact square of G_i. For Gram matrices
  X = x x^T, Y = g g^T the square is sum_st X_st Y_st. X_st is off by d u |x_s||x_t|, Y_st by
  p u |g_s||g_t|, their product and the sum over s and t by another few u |X_st Y_st|.
- `spread` bounds the norm of the rounding errors in the product that example i adds to the sum:
  T terms a number, so T u sum_t |x_t||g_t|.
- `mass` = sum_t |x_t||g_t| bounds every partial sum on the way to G_i. A sum over examples is
  rounded in units of its partial sums, so that tokens of one example that cancel at 1e30 would wipe
  out all the others. `spread` alone does not exclude that.
- `peak` bounds the numbers that are multiplied, which must stay in range when the factor scales
  them.

The engine clips by `sqrt(square + error) + spread`, and does so only where that is close to
`sqrt(square)` and where mass and peak are moderate; any other example goes to the reference engine.
The bounds are themselves rounded, by less than the few units that are added to every count.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.engines.forms import Form

__all__ = [
    "LARGEST",
    "Measure",
    "can_keep",
    "cheapest",
    "cleared",
    "gram_measure",
    "kept_measure",
    "lookup_measure",
    "lookup_sum",
    "materialize",
    "outer_measure",
    "scaled",
    "weigh",
    "weighted_product",
]

# Costs in multiplications, measured on a CPU: a number of a gradient that is materialized and kept
# is written once and read twice; a Gram matrix is a product of awkward shape, made and read once.
_TRAFFIC = 110
_GRAM = 1.3

# Gradients are kept if they are at most this many times larger than what they are computed from.
_KEEP = 4

_SMALL = 2**16  # numbers that are copied in no time

_BLOCK = 256  # numbers of a long vector that are summed in one go

_UNIT = 2.0**-24  # unit roundoff of float32
_TINY = 2.0**-126  # products below this are lost
LARGEST = float(jnp.finfo(jnp.float32).max)
_REDUCTION = 128  # of any size: XLA reduces in trees of short branches


def can_keep(form: Form) -> bool:
    """Whether per-example gradients take little enough memory to be kept."""
    return form.B * form.d * form.p <= _KEEP * form.recorded


def cheapest(form: Form) -> str:
    """Chooses how the norms are computed, from the sizes of the canonical form.

    Returns:
        "gram": inner product of the Gram matrices x x^T and g g^T.
        "outer": gradients are materialized, and kept for the weighted sum.
        "outer again": gradients are materialized a few examples at a time and dropped; the
        weighted sum is one more product.
    """
    product = form.T * form.d * form.p
    if form.T == 1:
        return "gram"
    costs = {
        "gram": _GRAM * form.T**2 * (form.d + form.p) + product,
        "outer again": 2 * product + _TRAFFIC * form.d * form.p / 3,
    }
    if can_keep(form):
        costs["outer"] = product + _TRAFFIC * form.d * form.p
    return min(costs, key=costs.__getitem__)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, ...], batch: int) -> jax.Array:
    """Contracts the same axes of `a` and `b`, with `batch` common leading axes, in float32."""
    exact = a.dtype == b.dtype == jnp.bfloat16
    if not exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(
        a,
        b,
        ((contract, contract), (tuple(range(batch)), tuple(range(batch)))),
        precision=None if exact else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _gram(array: jax.Array) -> tuple[jax.Array, int]:
    """Gram matrices `[n, B, T, T]`, and the most roundings in a row that one of their sums has."""
    size = array.shape[3]
    blocks, rest = divmod(size, _BLOCK)
    if blocks < 4:
        return _dot(array, array, (3,), 2), size

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        part = jax.lax.dynamic_slice_in_dim(array, i * _BLOCK, _BLOCK, 3)
        return total + _dot(part, part, (3,), 2), None

    tail = array[..., size - rest :]
    total, _ = jax.lax.scan(add, _dot(tail, tail, (3,), 2), jnp.arange(blocks))
    return total, _BLOCK + blocks


class Measure(NamedTuple):
    """A squared gradient norm and what it may be off by, `[n]` float32 each; see the module.

    Attributes:
        square: computed squared norm.
        error: bound on what `square` lacks of the exact square.
        spread: bound on the norm of what rounding adds to the example's part of the sum.
        mass: bound on the norm of every partial sum over tokens.
        peak: bound on the norm of the inputs and on that of the cotangents.
    """

    square: jax.Array
    error: jax.Array
    spread: jax.Array
    mass: jax.Array
    peak: jax.Array


def kept_measure(gradients: jax.Array) -> Measure:
    """Of gradients `[n, ...]` that are summed as they are."""
    zero = jnp.zeros(gradients.shape[0], jnp.float32)
    return Measure(_total(jnp.square(gradients)), zero, zero, zero, zero)


def gram_measure(x: jax.Array, g: jax.Array) -> Measure:
    """Of x_i^T g_i, from the Gram matrices x x^T and g g^T; summed by `weighted_product`."""
    tokens, d, p = x.shape[2], x.shape[3], g.shape[3]
    if tokens == 1:  # no sum over tokens: squares add up without cancellation
        xx, gg = _squares(x)[:, :, 0], _squares(g)[:, :, 0]
        square = jnp.sum(xx * gg, 1)
        error = _TINY * jnp.sum(d * gg + p * xx + 1, 1)
        mass = jnp.sqrt(square + error)
        return Measure(square, error, _split(x, g) * mass, mass, _peak(xx, gg))
    (xx, x_chain), (gg, g_chain) = _gram(x), _gram(g)
    x_square, g_square = _diagonals(xx), _diagonals(gg)
    products = xx * gg
    rounding = _UNIT * (
        (x_chain + 4) * _outer(_length(x_square, d)) * jnp.abs(gg)
        + (g_chain + 4) * jnp.abs(xx) * _outer(_length(g_square, p))
        + _REDUCTION * jnp.abs(products)
    )  # fmt: skip
    underflow = _TINY * (d * jnp.abs(gg) + p * jnp.abs(xx) + 1)
    square = jnp.maximum(_total(products), 0.0)
    error = jnp.sum(rounding + underflow, (1, 2, 3))
    return _unkept(square, error, x_square, g_square, x, g, times=1)


def outer_measure(x: jax.Array, g: jax.Array) -> tuple[Measure, jax.Array]:
    """Of x_i^T g_i, materialized here but summed by another product; also the gradients."""
    gradients = materialize(x, g)
    square = _total(jnp.square(gradients))
    zero = jnp.zeros_like(square)
    # The gradient that is measured and the one that is summed are both rounded.
    return _unkept(square, zero, _squares(x), _squares(g), x, g, times=2), gradients


def _unkept(
    square: jax.Array,
    error: jax.Array,
    x_square: jax.Array,
    g_square: jax.Array,
    x: jax.Array,
    g: jax.Array,
    *,
    times: int,
) -> Measure:
    """The measure of a sum over tokens, from the tokens' squared norms `[n, B, T]`."""
    lengths = _length(x_square, x.shape[3]) * _length(g_square, g.shape[3])
    mass = jnp.sqrt(jnp.sum(jnp.square(jnp.sum(lengths, 2)), 1))
    spread = (times * (x.shape[2] + 4) * _UNIT + _split(x, g)) * mass
    return Measure(square, error, spread, mass, _peak(x_square, g_square))


def _total(array: jax.Array) -> jax.Array:
    """The sum of each example's numbers, in a tree; XLA needs one long axis for that."""
    flat = array if array.ndim == 2 else array.reshape(array.shape[0], -1)
    # The barrier is for compilers that would fold the reshape into the sum.
    return jnp.sum(flat if array.ndim == 2 else jax.lax.optimization_barrier(flat), 1)


def _squares(array: jax.Array) -> jax.Array:
    """Squared norms `[n, B, T]` of tokens."""
    return jnp.sum(jnp.square(array.astype(jnp.float32)), 3)


def _length(squares: jax.Array, size: int) -> jax.Array:
    """Norms of tokens of `size` numbers, from squares of which any may have underflowed."""
    return jnp.sqrt(squares + size * _TINY)


def _outer(lengths: jax.Array) -> jax.Array:
    return lengths[..., :, None] * lengths[..., None, :]


def _peak(x_square: jax.Array, g_square: jax.Array) -> jax.Array:
    axes = tuple(range(1, x_square.ndim))
    return jnp.sqrt(jnp.maximum(jnp.sum(x_square, axes), jnp.sum(g_square, axes)))


def _split(x: jax.Array, g: jax.Array) -> float:
    """What `weighted_product` loses of an array that it cuts in two parts of 16 bits."""
    return 2.0**-17 if x.dtype == g.dtype == jnp.bfloat16 else 0.0


def _diagonals(matrices: jax.Array) -> jax.Array:
    """The diagonals `[n, B, T]` of `[n, B, T, T]`."""
    n, B, T, _ = matrices.shape
    return matrices.reshape(n, B, T * T)[:, :, :: T + 1]


def materialize(x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradients x_i^T g_i `[n, B, d, p]`."""
    return _dot(x, g, (2,), 2)


def weigh(gradients: jax.Array, factors: jax.Array, finite: jax.Array) -> jax.Array:
    """Sum over examples of factor * gradient, `[n]` and `[n, ...]`; see `weighted_product`."""
    return _dot(factors, cleared(gradients, finite), (0,), 0)


def weighted_product(
    x: jax.Array, g: jax.Array, factors: jax.Array, finite: jax.Array
) -> jax.Array:
    """Sum over examples of factor * x_i^T g_i.

    Args:
        x: inputs `[n, B, T, d]`.
        g: output cotangents `[n, B, T, p]`.
        factors: `[n]`.
        finite: `[n]` bool; where False, x and g may hold anything and the factor must be 0.

    Returns:
        `[B, d, p]`.
    """
    scale_x = x.shape[3] <= g.shape[3]  # the smaller array is scaled
    small, large = (x, g) if scale_x else (g, x)
    parts = [scaled(small, factors, finite)]
    if x.dtype == g.dtype == jnp.bfloat16:
        # Two bfloat16 parts carry 16 bits of the scaled array, at twice the cost of one product;
        # one part alone would sum something measurably different from what was clipped.
        high = parts[0].astype(jnp.bfloat16)
        parts = [high, (parts[0] - high.astype(jnp.float32)).astype(jnp.bfloat16)]
    large = cleared(large, finite)
    total = functools.reduce(jnp.add, [_sum_products(part, large) for part in parts])
    return total if scale_x else jnp.swapaxes(total, 1, 2)


def scaled(array: jax.Array, factors: jax.Array, finite: jax.Array) -> jax.Array:
    """Factor times each example's part of `array`, float32; zero where not finite."""
    shape = (-1, *[1] * (array.ndim - 1))
    product = array.astype(jnp.float32) * factors.reshape(shape)
    return jnp.where(finite.reshape(shape), product, 0.0)  # 0 * NaN is NaN


def cleared(array: jax.Array, finite: jax.Array) -> jax.Array:
    """`array` with zeros in place of the examples that are not finite, of which most often none."""
    if array.size < _SMALL:
        return jnp.where(finite.reshape(-1, *[1] * (array.ndim - 1)), array, 0)
    squeezed = array.reshape(array.shape[0], *(size for size in array.shape[1:] if size > 1))
    order, zeros = jnp.argsort(finite), jnp.zeros((1, *squeezed.shape[1:]), array.dtype)

    def clear(i: jax.Array, rest: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rest, zeros, order[i], 0)

    # In place: a copy of all recorded arrays would take about 4% of a step.
    return jax.lax.fori_loop(0, jnp.sum(~finite), clear, squeezed).reshape(array.shape)


def _sum_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over examples and tokens of the products a_i^T b_i, `[B, ...]`."""
    if a.shape[1] == 1:
        return _dot(a[:, 0], b[:, 0], (0, 1), 0)[None]
    return _dot(jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1), (1, 2), 1)


def lookup_measure(rows: jax.Array, g: jax.Array) -> Measure:
    """Of gradients whose row rows[i, t] gets g[i, t] added; summed by `lookup_sum`.

    Args:
        rows: `[n, 1, T, 1]` int32, in range.
        g: `[n, 1, T, p]`.
    """
    same = rows == jnp.swapaxes(rows, 2, 3)
    first = jnp.argmax(same, axis=3)[:, 0]  # the first token that looks up the same row
    squares = _squares(g)
    g = g[:, 0].astype(jnp.float32)
    summed = jax.vmap(lambda rows, g: jnp.zeros_like(g).at[rows].add(g))(first, g)
    square = _total(jnp.square(summed))
    lengths = _length(squares, g.shape[2])
    # The squared mass of a row is the sum over pairs of its tokens.
    mass = jnp.sqrt(jnp.sum(same[:, 0] * _outer(lengths[:, 0]), (1, 2)))
    repeats = jnp.max(jnp.sum(same[:, 0], 2), 1)  # the most that one row is looked up
    spread = jnp.where(repeats > 1, 2 * (repeats + 4) * _UNIT * mass, 0.0)
    return Measure(square, jnp.zeros_like(square), spread, mass, _peak(squares, squares))


def lookup_sum(
    rows: jax.Array, g: jax.Array, factors: jax.Array, finite: jax.Array, num_rows: int
) -> jax.Array:
    """Sum over examples of factor * gradient, `[1, num_rows, p]`; see `lookup_measure`."""
    zeros = jnp.zeros((num_rows, g.shape[3]), jnp.float32)
    g = scaled(g, factors, finite)
    return zeros.at[rows[:, 0, :, 0]].add(g[:, 0], mode="drop")[None]
