"""Squared norms of per-example products G_i = x_i^T g_i, and why they bound what is summed.

Canonical forms only: x `[n, B, T, d]`, g `[n, B, T, p]`, see `forms`. All results are
float32, and `arithmetic` says what products of float32 numbers are off by on each device.

**Why a norm bounds what is summed.** Let u = 2^-24, the unit roundoff of float32. A sum of k
products, in any order, fused or not, is off by at most r(k) u times the sum of their absolute
values (to first order in u), and by `TINY` for each product that underflows: r(k) = k in float32,
and more where the device multiplies in parts (`arithmetic.roundings`). Long sums are
computed in b blocks of 256, with r(256) + b in place of r(k). Where the gradient is formed for its
norm and kept for the sum, measured and summed are one array and nothing more is needed. Elsewhere
the norm is measured on one rounding path and the sum formed on another, and `Measure` carries what
both may be off by:

- `error` bounds how far the computed square is from the exact square of G_i. For Gram matrices
  X = x x^T, Y = g g^T the square is sum_st X_st Y_st. X_st is off by r(d) u |x_s||x_t|, Y_st
  by r(p) u |g_s||g_t|, their product and the sum over s and t by another few u |X_st Y_st|. The
  input of a lookup is a one-hot row: with another such row X_st is 0 or 1, with the input of a
  product it is one of its numbers; neither is rounded, and the bound holds with |x_s| = 1.
- `spread` bounds the norm of the rounding errors in the product that example i adds to the sum:
  T terms a number, so r(T) u sum_t |x_t||g_t|.
- `mass` = sum_t |x_t||g_t| bounds every partial sum on the way to G_i. A sum over examples is
  rounded in units of its partial sums, so that tokens of one example that cancel at 1e30 would wipe
  out all the others. `spread` alone does not exclude that.
- `peak` bounds the numbers that are multiplied, which must stay in range when the factor scales
  them.

A penalty on the parameters adds c_i R to G_i, with one array R for all examples. (Several add
several such terms. The same holds for their sum, with the sum of their norms.) The square is then
|G_i|^2 + 2 c_i <G_i, R> + |c_i R|^2. The inner product is sum_t (x_t R) g_t: x_t R is off by
r(d) u |x_t||R|, the sum over tokens and columns by another `REDUCTION` u |x_t||R||g_t|, together
(r(d) + ...) u mass |R|; `error` grows by 2 |c_i| times that. It grows by 2 |c_i R| spread as well:
a square that was measured on a rounded G_i lacks as much beside the inner product of the exact one.
`mass` and `spread` grow by |c_i R| and a few units of it, because sum_i f_i c_i R is one more
product that the example takes part in.

The same goes for any array A_i of an example in place of c_i R (`with_added`), with what its inner
product with G_i is off by; `columns` has such arrays.

The engine clips by `sqrt(square + error) + spread`, and does so only where that is close to
`sqrt(square)` and where mass and peak are moderate; of any other example the gradient is formed,
measured and summed as one array. The bounds are themselves rounded, by less than the few units that
are added to every count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms, summation
from dpjax.dp.engines.arithmetic import root, roundings
from dpjax.dp.engines.forms import Form, Tokens

__all__ = [
    "REDUCTION",
    "TINY",
    "UNIT",
    "Measure",
    "can_keep",
    "cheapest",
    "gram",
    "gram_measure",
    "grams_of",
    "inner_product",
    "kept_measure",
    "kept_square",
    "length",
    "lookup_measure",
    "outer",
    "outer_measure",
    "peak",
    "rounding_of",
    "token_squares",
    "with_added",
    "with_constants",
]

# Costs in multiplications, measured on a CPU: a number of a gradient that is materialized and kept
# is written once and read twice; a Gram matrix is a product of awkward shape, made and read once.
_TRAFFIC = 110
_GRAM = 1.3

# Gradients are kept if they are at most this many times larger than what they are computed from.
_KEEP = 2

UNIT = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-126  # products below this are lost
REDUCTION = 128  # of any size: XLA reduces in trees of short branches


def can_keep(form: Form, times: int = 1) -> bool:
    """Whether per-example gradients take little enough memory to be kept.

    Args:
        form: sizes.
        times: how much longer than usual it takes to form them again.
    """
    return form.B * form.d * form.p <= times * _KEEP * form.recorded


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
    best = min(costs, key=costs.__getitem__)
    kept = product + _TRAFFIC * form.d * form.p
    # A small gradient in memory is measured with others, and never formed again for one example:
    # that leaves less to compile.
    small = form.B * form.d * form.p <= summation.BIAS
    return "outer" if can_keep(form) and kept < (1.25 if small else 1) * costs[best] else best


def _gram(array: jax.Array) -> tuple[jax.Array, int]:
    """Gram matrices `[n, B, T, T]`, and how many units roundoff one of their sums may be off by."""
    blocks = summation.blocks_of(array.shape[3])
    gram = summation.in_blocks(array, array, (3, 3), blocks, ((3,), (3,)), 2)
    return gram, summation.chain_of(array.shape[3], blocks, array, array)


Grams = list[list[jax.Array]]


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
    return Measure(kept_square(gradients), zero, zero, zero, zero)


def kept_square(gradients: jax.Array) -> jax.Array:
    """The squared norms `[n]` of gradients `[n, ...]` in memory."""
    return _total(jnp.square(gradients))


class Gram(NamedTuple):
    """What the norm of x_i^T g_i follows from, and what that is off by.

    Attributes:
        x: Gram matrices `[n, B, T, T]` of the inputs; of one token the squares `[n, B]`.
        g: those of the cotangents.
        d: rows of the gradient.
        p: columns of the gradient.
        x_chain: units roundoff that a number of `x` may be off by.
        g_chain: the same of `g`.
        rounding: what rounding adds to the sum over examples, in parts of the mass.
    """

    x: jax.Array
    g: jax.Array
    d: Any
    p: Any
    x_chain: Any
    g_chain: Any
    rounding: Any


def gram(t: Tokens) -> Gram:
    """The Gram matrices x x^T and g g^T."""
    if t.tokens == 1:
        x_square, g_square = token_squares(t)
        # One rounding in float32 is within the reserve of the rule; what else `dot` loses is not.
        rounding = _split(t) + (roundings(1, t.x, t.g) - 1) * UNIT
        return Gram(x_square[:, :, 0], g_square[:, :, 0], t.d, t.p, 0, 0, rounding)
    (xx, x_chain), (gg, g_chain) = _input_gram(t), _gram(_cotangents(t))
    return Gram(xx, gg, t.d, t.p, x_chain, g_chain, rounding_of(t, times=1))


def gram_measure(found: Gram) -> Measure:
    """Of x_i^T g_i, from Gram matrices; summed by `weighted_sum`."""
    xx, gg, d, p = found[:4]
    if xx.ndim == 2:  # one token, no sum over tokens: squares add up without cancellation
        square = jnp.sum(xx * gg, 1)
        error = TINY * jnp.sum(d * gg + p * xx + 1, 1)
        mass = root(square + error)
        return Measure(square, error, found.rounding * mass, mass, peak(xx, gg))
    x_square, g_square = _diagonals(xx), _diagonals(gg)
    products = xx * gg
    rounding = (
        _outer(_off(x_square, d, found.x_chain)) * jnp.abs(gg)
        + jnp.abs(xx) * _outer(_off(g_square, p, found.g_chain))
        + UNIT * REDUCTION * jnp.abs(products)
    )
    square, error = _total(jnp.stack([products, rounding + 4 * TINY]), 2)
    square = jnp.maximum(square, 0.0)
    return _unkept(square, error, Outer(square, x_square, g_square, d, p, found.rounding))


def _input_gram(t: Tokens) -> tuple[jax.Array, int]:
    """The Gram matrices of the inputs, of which those of lookups are one-hot rows."""
    if t.rows is None:
        return _gram(t.x)
    same = (t.rows == jnp.swapaxes(t.rows, 2, 3)).astype(jnp.float32)
    if t.x is None:
        return same, 1
    # The product of a one-hot row and an input is one number of the input, without rounding.
    picked = jnp.take_along_axis(t.x, jnp.swapaxes(t.rows, 2, 3), 3).astype(jnp.float32)
    xx, chain = _gram(t.x)
    upper = jnp.concatenate([same, jnp.swapaxes(picked, 2, 3)], 3)
    return jnp.concatenate([upper, jnp.concatenate([picked, xx], 3)], 2), chain


def _cotangents(t: Tokens) -> jax.Array:
    """Those of lookups first."""
    return forms.side_by_side([part for part in (t.h, t.g) if part is not None])


def token_squares(t: Tokens) -> tuple[jax.Array, jax.Array]:
    """Squared norms `[n, B, T]` of inputs and of cotangents, those of lookups first."""
    g = _squares(_cotangents(t))
    inputs = [] if t.rows is None else [jnp.ones(t.rows.shape[:3], jnp.float32)]
    inputs += [] if t.x is None else [_squares(t.x)]
    return (inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, 2)), g


class Outer(NamedTuple):
    """What a gradient x_i^T g_i that was formed is measured by.

    Attributes:
        square: its squared norm `[n]`.
        x_square: squared norms of the inputs' tokens, `[n, B, T]`.
        g_square: those of the cotangents.
        d: rows of the gradient.
        p: columns of the gradient.
        rounding: what rounding adds to the sum over examples, in parts of the mass.
    """

    square: jax.Array
    x_square: jax.Array
    g_square: jax.Array
    d: Any
    p: Any
    rounding: Any


def outer(t: Tokens) -> tuple[Outer, jax.Array]:
    """Forms the gradients x_i^T g_i `[n, B, d, p]`, and what measures them."""
    gradients = summation.materialize(t)
    # The gradient that is measured and the one that is summed are both rounded.
    rounding = rounding_of(t, times=2)
    square = _total(jnp.square(gradients))
    return Outer(square, *token_squares(t), t.d, t.p, rounding), gradients


def outer_measure(found: Outer) -> Measure:
    """Of x_i^T g_i, formed here but summed by another product."""
    return _unkept(found.square, jnp.zeros_like(found.square), found)


def rounding_of(t: Tokens, *, times: int) -> float:
    """What rounding adds to a sum over tokens, in parts of the mass."""
    chain = t.tokens
    if t.x is not None:  # lookups are added up one by one, in float32
        own = t.x.shape[2]
        chain += summation.chain_of(own, summation.token_blocks(own), t.x, t.g) - own
    return times * (chain + 4) * UNIT + _split(t)


def _unkept(square: jax.Array, error: jax.Array, found: Outer) -> Measure:
    """The measure of a sum over tokens, from the tokens' squared norms."""
    _, x_square, g_square, d, p, rounding = found
    lengths = length(x_square, d) * length(g_square, p)
    masses, x_total, g_total = jnp.sum(jnp.stack([lengths, x_square, g_square]), 3)
    mass = root(jnp.sum(jnp.square(masses), 1))
    return Measure(square, error, rounding * mass, mass, peak(x_total, g_total))


def grams_of(constants: Sequence[jax.Array]) -> Grams:
    """Inner products of each two of some arrays that are the same for all examples."""
    return [[jnp.sum(a * b) for a in constants] for b in constants]


def inner_product(t: Tokens, constant: jax.Array, slopes: jax.Array | None = None) -> jax.Array:
    """Of x_i^T g_i, or of J * x_i^T g_i with the slopes J, and an array `[B, d, p]`; `[n]`."""
    inner = jnp.zeros((), jnp.float32)
    if t.x is not None:
        own = constant if slopes is None else slopes * constant
        inner += _total(summation.applied(t.x, own) * t.g.astype(jnp.float32))
    if t.rows is not None:
        inner += _total(constant[0][t.rows[:, 0, :, 0]] * t.h[:, 0].astype(jnp.float32))
    return inner


def with_constants(
    measure: Measure,
    form: Form,
    scalars: Sequence[jax.Array],
    inners: Sequence[jax.Array],
    grams: Grams,
) -> Measure:
    """Of x_i^T g_i + sum_k c_ik R_k, from the measure of the first; see the module.

    The last term is summed as R_k times one weight for each k.

    Args:
        measure: of x_i^T g_i, whose columns or numbers may be scaled.
        form: sizes.
        scalars: c_k, `[n]` each.
        inners: inner products of x_i^T g_i and R_k, likewise; see `inner_product`.
        grams: of R; see `grams_of`.
    """
    own = square = inner = jnp.zeros_like(scalars[0])
    for c, product, row, k in zip(scalars, inners, grams, itertools.count()):
        own += jnp.abs(c) * root(row[k])
        square += sum(c * b * gram for b, gram in zip(scalars, row))
        inner += c * product
    # Numbers of R are multiplied with others at most twice before they are added up.
    rounded = summation.chain(form.d) + 4
    return with_added(measure, inner, own, square, rounded, form.B * form.d * form.p)


def with_added(
    measure: Measure, inner: jax.Array, own: jax.Array, square: jax.Array, rounded: Any, size: int
) -> Measure:
    """Of x_i^T g_i + A_i, from the measure of the first; see the module.

    Args:
        measure: of x_i^T g_i.
        inner: the computed inner product of both, `[n]`.
        own: bound on the norm of A_i, and on the sum of those of the terms that make it.
        square: the computed squared norm of A_i.
        rounded: units roundoff that `inner` may be off by for each unit of mass * own.
        size: numbers of A_i.
    """
    # The mass bounds the norm of x_i^T g_i and that of all partial sums of the inner product.
    mass = measure.mass + own
    cross = 2 * own * ((rounded + 2 * REDUCTION) * UNIT * measure.mass + measure.spread)
    rest = measure.square + 2 * measure.mass * own + own * own
    return Measure(
        square=jnp.maximum(measure.square + 2 * inner + square, 0.0),
        error=measure.error + cross + (rounded + REDUCTION) * UNIT * rest + TINY * size,
        spread=measure.spread + 4 * UNIT * mass,
        mass=mass,
        peak=jnp.maximum(measure.peak, own),
    )


def _total(array: jax.Array, keep: int = 1) -> jax.Array:
    """Sums all axes but the first ones, in a tree; XLA needs one long axis for that."""
    if array.ndim == keep + 1:
        return jnp.sum(array, keep)
    # The barrier is for compilers that would fold the reshape into the sum.
    flat = jax.lax.optimization_barrier(array.reshape(*array.shape[:keep], -1))
    return jnp.sum(flat, keep)


def _squares(array: jax.Array) -> jax.Array:
    """Squared norms `[n, B, T]` of tokens."""
    return jnp.sum(jnp.square(array.astype(jnp.float32)), 3)


def length(squares: jax.Array, size: int) -> jax.Array:
    """Norms of tokens of `size` numbers, from squares of which any may have underflowed."""
    return root(squares + size * TINY)


def _off(squares: jax.Array, size: int, chain: int) -> jax.Array:
    """Numbers r_s such that a number of a Gram matrix is off by at most r_s r_t.

    That is by (chain + 4) u |x_s||x_t| and by `TINY` for each of `size` products. With b for the
    latter and r_s^2 = a_s^2 + b, r_s r_t >= a_s a_t + b (Cauchy and Schwarz). The second b is for
    an a_s^2 that is lost. (Where it is lost, so are parts of numbers: see `arithmetic`.)
    """
    return root((chain + 4) * UNIT * (squares + size * TINY) + 2 * size * TINY)


def _outer(lengths: jax.Array) -> jax.Array:
    return lengths[..., :, None] * lengths[..., None, :]


def peak(x_square: jax.Array, g_square: jax.Array) -> jax.Array:
    axes = tuple(range(1, x_square.ndim))
    return root(jnp.maximum(jnp.sum(x_square, axes), jnp.sum(g_square, axes)))


def _split(t: Tokens) -> float:
    """What `weighted_sum` loses of an array that it cuts in two parts of 16 bits."""
    return 2.0**-17 if t.x is not None and t.x.dtype == t.g.dtype == jnp.bfloat16 else 0.0


def _diagonals(matrices: jax.Array) -> jax.Array:
    """The diagonals `[n, B, T]` of `[n, B, T, T]`."""
    n, B, T, _ = matrices.shape
    return matrices.reshape(n, B, T * T)[:, :, :: T + 1]


def lookup_measure(t: Tokens) -> Measure:
    """Of gradients that are lookups alone; summed by `weighted_sum`."""
    h = t.h[:, 0].astype(jnp.float32)
    squares = _squares(h[:, None])
    lengths = length(squares, t.p)[:, 0, :, None]
    # Of each row the sum, its mass, and how often it is looked up.
    values = jnp.concatenate([h, lengths, jnp.ones_like(lengths)], 2)
    sums = summation.row_sums(t, values)
    square = _total(jnp.square(sums[:, :, :-2]))
    mass = root(jnp.sum(jnp.square(sums[:, :, -2]), 1))
    repeats = jnp.max(sums[:, :, -1], 1)
    spread = jnp.where(repeats > 1, 2 * (roundings(repeats) + 4) * UNIT * mass, 0.0)
    return Measure(square, jnp.zeros_like(square), spread, mass, peak(squares, squares))
