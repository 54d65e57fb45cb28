"""Weights whose columns are scaled and shifted: weight norm, weight standardization and their like.

Such a weight is a function of its leaf w in which every number of a column is treated alike, and in
which the column as a whole enters only by sums of its numbers and of their squares:

    weight = s * u + t,   u = w - c,   s and t functions of m1 = sum(u), m2 = sum(u^2) and others,

with c the column's mean, a constant, which keeps the sums free of cancellation. Where G is the
gradient of the weight, that of the leaf is, column by column,

    s * G + a * 1 + b * u,   a = dL/dm1,   b = 2 dL/dm2,

and all of dL/dm1, dL/dm2 and the gradients of other leaves follow from dL/ds = u^T G and
dL/dt = 1^T G, two numbers for each column. So norms and sums need no gradient of an example in
memory: s * G is a product with scaled cotangents, and what is added to it has rank two. A penalty
on the leaf adds one more array, which is the same for all examples; see `products`.

`columns_of` finds such functions. It runs their jaxpr on polynomials in u of which each coefficient
is one number for a column (`polynomials`): where that is possible, and the result has degree one,
the function has the form above. (Salimans and Kingma 2016, arXiv 1602.07868; Qiao
et al. 2019, arXiv 1903.10520; Brock et al. 2021, arXiv 2101.08692.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from dpjax.dp.engines import forms, products, summation
from dpjax.dp.engines.arithmetic import root, roundings
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.polynomials import OtherForm, Polynomial, plain, run
from dpjax.dp.engines.sites import Site, Weight, layout
from dpjax.dp.engines.taps import weight_of_leaves
from dpjax.dp.engines.tracing import Traced
from dpjax.dp.engines.views import View

__all__ = [
    "Columns",
    "Scaled",
    "columns_of",
    "inner_products",
    "products_of",
    "pulled",
    "with_columns",
]


class Scaled(NamedTuple):
    """The weight at some parameters, in canonical form.

    Attributes:
        scale: s, `[B, p]`.
        u: the leaf less its columns' means, `[B, d, p]`.
        moments: sums over d of u and u^2, `[B, p]` each.
        back: dL/ds and dL/dt `[B, p]` to a and b, likewise, and to gradients of the other leaves.
    """

    scale: jax.Array
    u: jax.Array
    moments: tuple[jax.Array, jax.Array]
    back: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, dict[int, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Columns:
    """A weight whose columns are scaled and shifted.

    Attributes:
        sites: its uses, with the view of the leaf that the weight would be without that.
        leaf: the leaf that has the columns.
        leaves: all that it depends on: the others are gains and their like.
        rows: the leaf's axes that run along a column.
        jaxpr: the weight as a function of the leaves, in this order.
    """

    sites: Weight
    leaf: int
    leaves: tuple[int, ...]
    rows: frozenset[int]
    jaxpr: core.ClosedJaxpr

    @property
    def others(self) -> tuple[int, ...]:
        """The leaves without that of the columns."""
        return tuple(i for i in self.leaves if i != self.leaf)

    def at(self, leaves: dict[int, jax.Array]) -> Scaled:
        """The weight at some values of its leaves, float32."""
        rows = tuple(sorted(self.rows))
        center = jnp.mean(leaves[self.leaf], rows, keepdims=True)
        u = leaves[self.leaf] - center
        sums = [jnp.sum(power, rows, keepdims=True) for power in (u, jnp.square(u))]

        def coefficients(sums: Any, others: dict[int, jax.Array]) -> tuple[jax.Array, jax.Array]:
            value = _weight(self, center, sums, others)
            shift, scale = (jnp.broadcast_to(part, value.columns) for part in value.parts)
            return _canonical(self.sites[0], scale, value), _canonical(self.sites[0], shift, value)

        def canonical(array: jax.Array) -> jax.Array:
            value = _weight(self, center, [array, array], others)
            return _canonical(self.sites[0], value.moments[0], value).astype(jnp.float32)

        others = {i: leaves[i] for i in self.others}
        (scale, shift), vjp = jax.vjp(coefficients, sums, others)

        def back(by_scale: jax.Array, by_shift: jax.Array) -> Any:
            (first, second), own = vjp((by_scale.astype(scale.dtype), by_shift.astype(shift.dtype)))
            own = {i: g.astype(jnp.float32) for i, g in own.items()}
            return canonical(first), 2 * canonical(second), own

        site, form = self.sites[0], forms.form_of(self.sites)
        pull = site.view_of_leaf.pull
        (canonical_u,) = jax.linear_transpose(pull, jax.ShapeDtypeStruct(site.shape, u.dtype))(u)
        shape = jax.ShapeDtypeStruct((form.B, form.d, form.p), u.dtype)
        (canonical_u,) = jax.linear_transpose(lambda w: forms.restore(site, w), shape)(canonical_u)
        moments = canonical(sums[0]), canonical(sums[1])
        return Scaled(scale.astype(jnp.float32), canonical_u.astype(jnp.float32), moments, back)


class Products(NamedTuple):
    """What the norm of a gradient that is not formed follows from, of some examples.

    Attributes:
        scaled: the measure of s * x^T g.
        mass: that of x^T g.
        by_scale: dL/ds, `[n, B, p]`.
        by_shift: dL/dt, `[n, B, p]`.
        inner: inner products of s * x^T g and of other arrays, `[n]` each.
    """

    scaled: products.Measure
    mass: jax.Array
    by_scale: jax.Array
    by_shift: jax.Array
    inner: tuple[jax.Array, ...]


def products_of(t: Tokens, norm: str, at: Scaled, others: Sequence[jax.Array] = ()) -> Products:
    """Measures s * x_i^T g_i, and adds up x_i^T g_i and its products with u column by column.

    Args:
        t: inputs and cotangents of the weight.
        norm: "gram", or else the product is formed.
        at: the weight.
        others: arrays `[B, d, p]` that inner products are wanted of.
    """
    zero = jnp.zeros(t.x.shape[0], jnp.float32)
    cotangents = t.g.astype(jnp.float32)
    own = t._replace(g=cotangents * at.scale[None, :, None])
    raw = products.outer_measure(products.Outer(zero, *products.token_squares(t), t.d, t.p, 0.0))
    if norm == "gram":
        grams = products.gram(own)._replace(rounding=products.gram(t).rounding)
        measure = products.gram_measure(grams)
        # As products: XLA adds up the axis of tokens slowly on a CPU.
        by_scale = _over_tokens("nbtp,nbtp->nbp", summation.applied(t.x, at.u), cotangents)
        inputs = jnp.sum(t.x.astype(jnp.float32), 3)
        by_shift = _over_tokens("nbt,nbtp->nbp", inputs, cotangents)
        inner = tuple(products.inner_product(own, other) for other in others)
    else:
        formed, gradients, by_scale, by_shift = _over_rows(t, at)
        scale = jnp.broadcast_to(at.scale[:, :, None], gradients.shape[1:]).reshape(1, -1)
        square = products.kept_square(summation.flat(gradients) * scale)
        inner = tuple(
            jnp.sum(summation.flat(gradients) * scale * jnp.swapaxes(other, 1, 2).reshape(1, -1), 1)
            for other in others
        )
        outer = products.Outer(square, *products.token_squares(own), t.d, t.p, formed.rounding)
        measure = products.outer_measure(outer)
    measure = measure._replace(peak=jnp.maximum(measure.peak, raw.peak))
    return Products(measure, raw.mass, by_scale, by_shift, inner)


def pulled(t: Tokens, at: Scaled, limit: float) -> tuple[Any, jax.Array, dict[int, jax.Array]]:
    """Forms the gradients of the weight and takes them to its leaves.

    Args:
        t: inputs and cotangents of the weight.
        at: the weight.
        limit: numbers beyond it are infinite in the gradients of the weight.

    Returns:
        What the gradients of the weight are measured by; those of the leaf, `[n, B, p, d]`; those
        of the other leaves.
    """
    formed, g, by_scale, by_shift = _over_rows(t, at, limit)
    a, b, others = jax.vmap(at.back)(by_scale, by_shift)
    u = jnp.swapaxes(at.u, 1, 2)[None]
    return formed, g * at.scale[None, :, :, None] + a[..., None] + b[..., None] * u, others


def _over_rows(
    t: Tokens, at: Scaled, limit: float = math.inf
) -> tuple[products.Outer, jax.Array, jax.Array, jax.Array]:
    """Transposed gradients of the weight, and the sums over columns of them and of their products.

    Transposed, because XLA adds up a last axis in trees; and flat, which takes a CPU less time.
    """
    formed, g = products.outer(Tokens(t.g, t.x, d=t.p))
    g = summation.capped(g, limit)
    u = jnp.swapaxes(at.u, 1, 2).reshape(1, -1)
    by_scale = jnp.sum((summation.flat(g) * u).reshape(g.shape), 3)
    return formed, g, by_scale, jnp.sum(g, 3)


def _over_tokens(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST)


def with_columns(
    product: Products, sizes: forms.Form, at: Scaled, a: jax.Array, b: jax.Array
) -> products.Measure:
    """Measures s * x_i^T g_i + a_i * 1 + b_i * u, which is summed term by term.

    a and b are numbers, computed once (`reference.once`): whatever rounding they hold, the same are
    measured and summed. In the inner product of s * x_i^T g_i with the other terms, x 1 and x u are
    off by r(d) u |x_t| times the norm of 1 or of a column of u, and the sum over tokens by r(T): by
    Cauchy and Schwarz both are bounded by the mass of s * x_i^T g_i times |a_i * 1| + |b_i * u|;
    see `products`. Scaling by s rounds each number once more, in the norm and in the sum, which the
    units that `with_added` adds hold.

    Args:
        product: of s * x_i^T g_i.
        sizes: of the weight.
        at: the weight.
        a: `[n, B, p]`.
        b: likewise.
    """
    inner = jnp.sum(at.scale[None] * (a * product.by_shift + b * product.by_scale), (1, 2))
    total, square = (moment[None] for moment in at.moments)
    of_a, of_b = (jnp.sum(jnp.square(x) * y, (1, 2)) for x, y in ((a, sizes.d), (b, square)))
    own = root(of_a) + root(of_b)
    added = of_a + of_b + 2 * jnp.sum(a * b * total, (1, 2))
    chain = summation.chain(sizes.d) + roundings(sizes.T)
    measure = products.with_added(
        product.scaled, inner, own, added, chain, sizes.B * sizes.d * sizes.p
    )
    # The moments are sums over a column one by one.
    return measure._replace(error=measure.error + sizes.d * 2.0**-23 * own * own)


def inner_products(
    product: Products, at: Scaled, a: jax.Array, b: jax.Array, constants: Sequence[jax.Array]
) -> list[jax.Array]:
    """Of s * x_i^T g_i + a_i * 1 + b_i * u and other arrays, `[n]` each.

    Sums over a column are trees, whose rounding `products.with_added` allows for.

    Args:
        product: of s * x_i^T g_i, with its own inner products.
        at: the weight.
        a: `[n, B, p]`.
        b: likewise.
        constants: the other arrays, `[B, d, p]`.
    """
    inners, u = [], jnp.swapaxes(at.u, 1, 2)
    for constant, inner in zip(constants, product.inner, strict=True):
        columns = jnp.swapaxes(constant, 1, 2)
        by_a, by_b = jnp.sum(columns, 2)[None], jnp.sum(columns * u, 2)[None]
        inners.append(inner + jnp.sum(a * by_a + b * by_b, (1, 2)))
    return inners


def columns_of(traced: Traced, sites: Weight, shapes: Sequence[Any]) -> Columns | None:
    """The weight as one whose columns are scaled and shifted, if it is one.

    Args:
        traced: the jaxpr and its sites.
        sites: the uses of a derived weight.
        shapes: of all leaves, arrays or abstract values.
    """
    site = sites[0]
    if site.view is not None or any(s.kind == "embed" or any(s.scanned) for s in sites):
        return None
    own, closed = weight_of_leaves(traced, site, shapes)
    leaves = tuple(own)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    if len(leaves) == 1 and not any(eqn.primitive.name == "reduce_sum" for eqn in jaxpr.eqns):
        return None  # a leaf times a constant that is too large or too small for a view
    for leaf in leaves:
        if math.prod(own[leaf].shape) != math.prod(site.shape):
            continue
        for rows in _choices(own[leaf].shape, site):
            function = core.ClosedJaxpr(jaxpr, closed.consts)
            columns = _tried(Columns(sites, leaf, leaves, rows, function), own)
            if columns is not None:
                return columns
    return None


def _choices(shape: Sequence[int], site: Site) -> list[frozenset[int]]:
    """Sets of the leaf's axes that are as long as a column of the weight: most often one or two."""
    _, d, p = (math.prod(site.shape[i] for i in axes if not isinstance(i, tuple))
               for axes in layout(site))  # fmt: skip
    sizes = {d} if site.kind == "conv" else {d, p}
    long = [i for i, size in enumerate(shape) if size > 1]
    sets = itertools.chain(*(itertools.combinations(long, k) for k in range(1, len(long))))
    return [frozenset(rows) for rows in sets if math.prod(shape[i] for i in rows) in sizes]


def _tried(columns: Columns, own: dict[int, Any]) -> Columns | None:
    """The columns with their view of the leaf, if rows of the leaf are rows of the weight."""
    value: list[Polynomial] = []

    def weight(leaves: dict[int, jax.Array]) -> None:
        leaf = leaves[columns.leaf]
        center = jnp.mean(leaf, tuple(columns.rows), keepdims=True)
        others = {i: leaves[i] for i in columns.others}
        value.append(_weight(columns, center, [center, center], others))

    try:
        jax.eval_shape(weight, own)
    except OtherForm:
        return None
    (end,) = value
    site = columns.sites[0]
    if end.degree != 1 or end.view is None or end.shape != site.shape:
        return None
    _, d, p = ({i for i in axes if not isinstance(i, tuple) and site.shape[i] > 1}
               for axes in layout(site))  # fmt: skip
    view = end.view._replace(limit=site.limit, scale=1.0)
    sites = tuple(dataclasses.replace(s, view=view) for s in columns.sites)
    if end.rows == p != d and site.kind == "dot":
        sites = tuple(dataclasses.replace(s, turned=not s.turned) for s in sites)
    elif end.rows != d:
        return None
    return dataclasses.replace(columns, sites=sites)


def _canonical(site: Site, array: jax.Array, value: Polynomial) -> jax.Array:
    """Numbers of columns, in the weight's layout, as `[B, p]`."""
    site = dataclasses.replace(site, shape=value.columns)
    form = forms.form_of((site,))
    shape = jax.ShapeDtypeStruct((form.B, 1, form.p), array.dtype)
    (gradient,) = jax.linear_transpose(lambda w: forms.restore(site, w), shape)(array)
    return gradient[:, 0]


def _weight(
    columns: Columns, center: jax.Array, sums: Sequence[jax.Array], others: dict[int, jax.Array]
) -> Polynomial:
    """The weight as a polynomial in u, at some sums of u and of its squares."""
    values = {i: plain(other) for i, other in others.items()}
    shape = tuple(columns.jaxpr.in_avals[columns.leaves.index(columns.leaf)].shape)
    one = jnp.ones((1,) * len(shape), center.dtype)
    view = View(columns.leaf, shape, (0,) * len(shape))
    values[columns.leaf] = Polynomial(shape, (center, one), columns.rows, tuple(sums), view)
    return run(columns.jaxpr, [values[i] for i in columns.leaves])
