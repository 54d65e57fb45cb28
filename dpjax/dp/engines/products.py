"""Squared norms and weighted sums of per-example products x_i^T g_i.

Canonical forms only: x `[n, B, T, d]`, g `[n, B, T, p]`, see `site_algebra`. All results are
float32, and products of float32 numbers are not rounded to less on accelerators: a norm of
something other than what is summed would break the promise of the clipping rule.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dpjax.dp.engines.forms import Form

__all__ = [
    "can_keep",
    "cheapest",
    "cleared",
    "gram_squares",
    "lookup_squares",
    "lookup_sum",
    "materialise",
    "scaled",
    "weigh",
    "weighted_product",
]

# Costs in multiplications, measured on a CPU: a number of a gradient that is materialised and kept
# is written once and read twice; a Gram matrix is a product of awkward shape, made and read once.
_TRAFFIC = 110
_GRAM = 1.3

# Gradients are kept if they are at most this many times larger than what they are made of.
_KEEP = 4

_SMALL = 2**16  # numbers that are copied in no time

_UNIT = 2.0**-24  # unit roundoff of float32
_TINY = 2.0**-126  # products below this are lost


def can_keep(form: Form) -> bool:
    """Whether per-example gradients take little enough memory to be kept."""
    return form.B * form.d * form.p <= _KEEP * form.recorded


def cheapest(form: Form) -> str:
    """Chooses how the norms are computed, from the sizes of the canonical form.

    Returns:
        "gram": inner product of the Gram matrices x x^T and g g^T.
        "outer": gradients are materialised, and kept for the weighted sum.
        "outer again": gradients are materialised a few examples at a time and dropped; the
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


def gram_squares(x: jax.Array, g: jax.Array) -> jax.Array:
    """Squared norms `[n]` of x_i^T g_i as sums of (x x^T) * (g g^T).

    Guarantees:
        Not less than the exact value by more than rounding errors of the size that
        `weighted_product` makes itself: cancellation and underflow are covered by small additions.
    """
    tokens, d, p = x.shape[2], x.shape[3], g.shape[3]
    if tokens == 1:
        xx = jnp.sum(jnp.square(x.astype(jnp.float32)), (2, 3))
        gg = jnp.sum(jnp.square(g.astype(jnp.float32)), (2, 3))
        return jnp.sum(xx * gg + _TINY * d * gg + _TINY * p * xx, 1)
    xx, gg = _dot(x, x, (3,), 2), _dot(g, g, (3,), 2)
    inner = jnp.sum(xx * gg, (1, 2, 3))
    xx, gg = _diagonals(xx), _diagonals(gg)
    rounding = 8 * _UNIT * xx * gg + _TINY * tokens * (d * gg + p * xx)
    return jnp.maximum(inner, 0.0) + jnp.sum(rounding, (1, 2))


def _diagonals(matrices: jax.Array) -> jax.Array:
    """The diagonals `[n, B, T]` of `[n, B, T, T]`."""
    n, B, T, _ = matrices.shape
    return matrices.reshape(n, B, T * T)[:, :, :: T + 1]


def materialise(x: jax.Array, g: jax.Array) -> jax.Array:
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


def lookup_squares(rows: jax.Array, g: jax.Array) -> jax.Array:
    """Squared norms `[n]` of gradients whose row rows[i, t] gets g[i, t] added.

    Args:
        rows: `[n, 1, T, 1]` int32.
        g: `[n, 1, T, p]`, zero where the row is out of range.
    """
    same = rows == jnp.swapaxes(rows, 2, 3)
    first = jnp.argmax(same, axis=3)[:, 0]  # the first token that looks up the same row
    g = g[:, 0].astype(jnp.float32)
    summed = jax.vmap(lambda rows, g: jnp.zeros_like(g).at[rows].add(g))(first, g)
    return jnp.sum(jnp.square(summed), (1, 2))


def lookup_sum(
    rows: jax.Array, g: jax.Array, factors: jax.Array, finite: jax.Array, num_rows: int
) -> jax.Array:
    """Sum over examples of factor * gradient, `[1, num_rows, p]`; see `lookup_squares`."""
    zeros = jnp.zeros((num_rows, g.shape[3]), jnp.float32)
    g = scaled(g, factors, finite)
    return zeros.at[rows[:, 0, :, 0]].add(g[:, 0], mode="drop")[None]
