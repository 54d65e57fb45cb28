"""Gradients that are measured and summed together: of a weight, or of some direct leaves.

What one backward pass recorded (see `record`) becomes one `Part` for each view of a leaf, for each
set of weights that share leaves, and for direct leaves. A part says what its norms are and what
bounds them (`products`), adds its weighted sum to the totals once the factors are known, and forms
the exact gradient of one example that the engine does not trust.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dpjax.dp.engines import forms, products, summation
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.plans import Group
from dpjax.dp.engines.record import Record, in_order
from dpjax.dp.engines.sites import Key, Weight

__all__ = [
    "Constants",
    "Factors",
    "Part",
    "Totals",
    "Vectors",
    "chunk_of",
    "chunked",
    "cleared",
    "closed_part",
    "kept_part",
    "measured_together",
    "of_kept",
    "sum_of_constant",
    "unscaled",
]

Vectors = tuple[jax.Array, ...]  # flat float32 gradients `[n, entries]`
Totals = dict[int, jax.Array]  # by leaf, sums over examples, flat
Constants = dict[Key, dict[int, jax.Array]]  # by place of a scalar and by leaf, its gradient
Factors = list[tuple[jax.Array, jax.Array]]  # by leaf, `[n]` factors and which are above 0

# Numbers in a temporary of one chunk of examples. On a CPU, few enough for its caches, and enough
# for products of many rows, which are faster by the row; elsewhere, enough to fill an accelerator.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**27

_COPIED = 4  # of the examples of a batch, one in so many is copied at a time to be measured


class Part(NamedTuple):
    """Gradients that are measured and summed together: of a weight, or of a direct leaf.

    Attributes:
        leaves: whose gradients they are.
        kept: the gradients themselves, of which numbers beyond `limit` are infinite; empty if they
            are not kept.
        measures: of those that are not kept; empty if they were measured together with others.
        within: `[n]` bool, whether no number on the way leaves the range of the weight's dtype;
            None if that is float32's own.
        add: `(totals, record, kept, factors, usable [n])` to the totals with the weighted sums
            added. Factors are zero where not usable.
        limit: the largest number of the weight's dtype.
        exact: of gradients that are not kept, the record of ONE example to them, `[1, entries]`
            each, in which numbers beyond the range of the weight's dtype are infinite.
        place: `(totals, record, vectors)` to the totals with such gradients added.
        clears: arrays of the record in which the sum needs zeros where an example is not usable.
    """

    leaves: tuple[int, ...]
    kept: Vectors
    measures: tuple[products.Measure, ...]
    within: jax.Array | None
    add: Callable[[Totals, Record, Vectors, Factors, jax.Array], Totals]
    limit: float = math.inf
    exact: Callable[[Record], Vectors] | None = None
    place: Callable[[Totals, Record, Vectors], Totals] | None = None
    clears: frozenset[int] = frozenset()


def kept_part(leaf: int, gradients: jax.Array) -> Part:
    """A leaf with per-example gradients `[n, entries]` in memory, measured and summed as such."""

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        return totals | {leaf: totals[leaf] + vectors[0]}

    return of_kept((leaf,), (gradients,), None, place)


def of_kept(
    leaves: tuple[int, ...],
    kept: Vectors,
    within: jax.Array | None,
    place: Callable[[Totals, Record, Vectors], Totals],
    limit: float = math.inf,
) -> Part:
    """A part whose gradients are in memory; `limit` is the largest number of the weight's dtype."""

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: Factors, usable: jax.Array
    ) -> Totals:
        weighed = [summation.weigh(g, *factors[i]) for i, g in zip(leaves, kept, strict=True)]
        return place(totals, record, tuple(weighed))

    return Part(leaves, kept, (), within, add, limit)


def closed_part(
    group: Group,
    record: Record,
    constants: Constants,
    mass: Callable[[], jax.Array] | None = None,
) -> Part:
    """The part of one view of a leaf, from the recorded inputs and cotangents of its sites.

    Args:
        group: the sites.
        record: what was recorded.
        constants: gradients of scalars; see `bookkeeping`.
        mass: that of the measure, if it was measured with others; see `measured_together`.
    """
    sites, form = group.sites, group.form
    view = sites[0].view_of_leaf
    leaf = view.leaf

    def back(gradient: jax.Array) -> jax.Array:
        """A canonical gradient in the shape of the leaf."""
        return view.pull(forms.restore(sites[0], gradient))

    shape = (form.B, form.d, form.p)
    in_order = not view.steps and forms.keeps_order(sites[0])

    def flat_back(gradient: jax.Array) -> jax.Array:
        """A canonical gradient, flat or not, in the order of the leaf, flat."""
        return (gradient if in_order else back(gradient.reshape(shape))).reshape(-1)

    terms = {place: own[leaf] for place, own in constants.items() if leaf in own}
    if terms:
        across = jax.linear_transpose(back, jax.ShapeDtypeStruct(shape, jnp.float32))
        terms = {place: across(constant)[0] for place, constant in terms.items()}
    grams = products.grams_of(list(terms.values()))
    # What a recorded number may be before a constant factor of the weight, and behind it.
    limit = min(site.limit for site in sites)
    reach = max(1.0, *(1 / abs(site.view.scale) for site in sites if site.view))
    narrow = limit < summation.LARGEST
    largest = limit / 4 / reach

    plain, scale = unscaled(sites)

    def materialized(record: Record) -> jax.Array:
        t = record.tokens(plain)
        own = [summation.scaled(c[None], record.scalars[place]) for place, c in terms.items()]
        start = sum(own[1:], own[0]) if own else None
        if scale == 1.0:
            return summation.materialize(t, start)
        gradients = scale * summation.materialize(t)
        return gradients if start is None else start + gradients

    def finish(found: products.Measure, record: Record) -> products.Measure:
        if not terms:
            return found
        t, scalars = record.tokens(sites), [record.scalars[place] for place in terms]
        inners = [products.inner_product(t, constant) for constant in terms.values()]
        return products.with_constants(found, form, scalars, inners, grams)

    def measure(record: Record) -> tuple[tuple[products.Measure, ...], jax.Array | None]:
        t = record.tokens(sites)
        if group.norm == "lookup":
            found = products.lookup_measure(t)
        elif group.norm == "gram":
            found = products.gram_measure(products.gram(t))
        else:
            found = products.outer_measure(products.outer(t)[0])
        found = finish(found, record)
        return (found,), found.mass < largest if narrow else None

    def gradients(record: Record) -> tuple[Vectors, jax.Array | None]:
        vectors = (summation.flat(materialized(record)),)
        if not narrow:
            return vectors, None
        formed = products.outer(record.tokens(sites))[0]
        found = finish(products.outer_measure(formed), record)
        return vectors, found.mass < largest

    def exact(record: Record) -> Vectors:
        if group.norm == "lookup" and not terms:
            gradients = scale * summation.combined(record.tokens(plain))
        else:
            gradients = materialized(record)
        return (summation.capped(summation.flat(gradients), limit / reach if narrow else math.inf),)

    # The leaf itself as a table, or as the transposed of one, can be added to in place.
    table = group.norm == "lookup" and not view.steps and forms.is_table(sites[0])

    def look_up(totals: Totals, t: Tokens, h: jax.Array) -> Totals:
        """Adds rows h `[..., T, p]`."""
        rows, h = t.rows.reshape(-1), h.reshape(-1, form.p)
        if table:
            own = totals[leaf]
            return totals | {leaf: own.reshape(form.d, form.p).at[rows].add(h).reshape(-1)}
        gradient = jnp.zeros((form.d, form.p), jnp.float32).at[rows].add(h)
        return totals | {leaf: totals[leaf] + flat_back(gradient)}

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        if group.norm == "lookup" and not terms:
            return look_up(totals, record.tokens(sites), vectors[0])
        return totals | {leaf: totals[leaf] + flat_back(vectors[0])}

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: Factors, usable: jax.Array
    ) -> Totals:
        factor = factors[leaf][0]
        if forms.sums_as_convolution(sites):
            for site, (x, g) in zip(sites, record.pairs(sites)):
                # Back through its own view: another use may order the leaf's axes otherwise.
                value = forms.conv_sum(site, x, summation.scaled(g, factor, usable))
                value = site.view_of_leaf.pull(value).reshape(-1)
                totals = totals | {leaf: totals[leaf] + value}
        elif group.norm == "lookup":
            t = record.tokens(sites)
            totals = look_up(totals, t, summation.scaled(t.h, factor, usable))
        else:
            value = flat_back(summation.weighted_sum(record.tokens(sites), factor, usable))
            totals = totals | {leaf: totals[leaf] + value}
        for at, constant in terms.items():
            value = flat_back(sum_of_constant(constant, record.scalars[at], factor, usable))
            totals = totals | {leaf: totals[leaf] + value}
        return totals

    own = record.of((sites,), list(terms))
    size = _temporary(group)
    if group.is_kept:
        kept, within = chunked(gradients, own, size)
        return of_kept((leaf,), kept, within, place, limit / reach if narrow else math.inf)
    if mass is not None:
        measures, within = (), mass() < largest if narrow else None
    else:
        measures, within = chunked(measure, own, size)
    clears = cleared(sites, record)
    return Part((leaf,), (), measures, within, add, limit, exact, place, clears)


def sum_of_constant(
    constant: jax.Array, scalars: jax.Array, factors: jax.Array, usable: jax.Array
) -> jax.Array:
    """The weighted sum of gradients of a scalar: one array times a number of each example."""
    weight = jnp.sum(summation.scaled(scalars, factors, usable))
    # Where the array is not finite, no example is summed; and 0 * NaN is NaN.
    return jnp.where(weight != 0, weight * constant, 0.0)


def cleared(sites: Weight, record: Record) -> frozenset[int]:
    """The arrays of the record in which a weighted sum needs zeros; see `Part.clears`.

    Of a product, the smaller array is scaled, and cleared by that.
    """
    places = dict(record.places)
    if forms.sums_as_convolution(sites):
        return frozenset(places[site.key][0] for site in sites)
    scale_x = summation.scales_x(forms.form_of(sites))
    products_of = (site for site in sites if site.kind != "embed")
    return frozenset(places[site.key][site.turned != scale_x] for site in products_of)


def measured_together(
    groups: Sequence[Group], record: Record, constants: Constants
) -> list[tuple[list[int], products.Measure]]:
    """Measures weights with equal numbers of tokens by one program, which is compiled once for all.

    A model of many equal blocks then takes little more time to compile than one of few. What was
    recorded of a few examples at a time is copied side by side.

    Args:
        groups: of the plan.
        record: what was recorded.
        constants: gradients of scalars; leaves that have some are left out.

    Returns:
        Positions of groups that have others of their kind, and their measures `[positions, n]`.
    """
    alike: dict[tuple[str, int, int], list[int]] = {}
    others = {leaf for own in constants.values() for leaf in own}
    for i in sorted(range(len(groups)), key=lambda i: (-groups[i].form.T, i)):
        group = groups[i]
        plain = all(s.kind != "embed" for s in group.sites)
        plain &= not any(forms.has_patches(s) and not forms.tiles(s) for s in group.sites)
        plain &= group.norm in ("gram", "outer again")
        if plain and others.isdisjoint(group.sites[0].leaves):
            B, T = group.form[:2]
            # Blocks of a ViT have one token more than there are patches: those get one of zeros.
            near = [t for norm, b, t in alike if (norm, b) == (group.norm, B) and 1 < T >= 0.9 * t]
            alike.setdefault((group.norm, B, min(near, default=T)), []).append(i)
    together = []
    for (norm, B, T), members in alike.items():
        # Those of equal sizes are neighbors, as they are in the stacks that are measured.
        by_size: dict[Any, list[int]] = {}
        for i in members:
            by_size.setdefault(_size(groups[i].sites, record), []).append(i)
        classes = list(by_size.values())
        if len(members) > 1:
            weights = [[groups[i].sites for i in own] for own in classes]
            measure = _measured_alike(weights, norm, B, T, record)
            together.append(([i for own in classes for i in own], measure))
    return together


def _size(sites: Weight, record: Record) -> Any:
    """What weights have in common whose tokens are stacked: sizes, and what dtypes follow from."""
    d, p = forms.form_of(sites)[2:4]
    places = dict(record.places)
    orders = [-1 if site.turned != (d > p) else 1 for site in sites]
    pairs = [places[site.key][::order] for site, order in zip(sites, orders)]
    dtypes = [[record.arrays[i].dtype for i in pair] for pair in pairs]
    scales = [site.view is not None and abs(site.view.scale) != 1.0 for site in sites]
    return min(d, p), max(d, p), str(dtypes), any(scales)


def _pair(t: Tokens) -> tuple[jax.Array, jax.Array]:
    """Inputs and cotangents, those of fewer features first: the norm of x^T g is that of g^T x."""
    return (t.x, t.g) if t.d <= t.p else (t.g, t.x)


def _measured_alike(
    classes: list[list[Weight]], norm: str, B: int, T: int, record: Record
) -> products.Measure:
    """The measures `[weights, n]` of weights of at most T tokens, by their sizes."""

    def found(x: jax.Array, g: jax.Array) -> products.Gram | products.Outer:
        t = Tokens(x, g, d=x.shape[3])
        return products.gram(t) if norm == "gram" else products.outer(t)[0]

    def longer(array: jax.Array) -> jax.Array:
        missing = T - array.shape[2]
        return jnp.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else array

    def measure(record: Record) -> jax.Array:
        stacked = []
        for weights in classes:
            pairs = [map(longer, _pair(record.tokens(sites))) for sites in weights]
            stacked.append(jax.vmap(found)(*map(jnp.stack, zip(*pairs))))
        joint = jax.tree.map(lambda *rows: jnp.concatenate(rows), *stacked)
        one = products.gram_measure if norm == "gram" else products.outer_measure
        return jnp.transpose(jnp.stack(jax.vmap(one)(joint)))  # [n, weights, 5]

    every, each = [sites for own in classes for sites in own], 0
    for sites in every:
        d, p = forms.form_of(sites)[2:4]
        each += B * T * (d + p) + B * (2 * T * T if norm == "gram" else d * p)
    found_all = chunked(measure, record.of(tuple(every), []), each, share=_COPIED)
    return products.Measure(*jnp.transpose(found_all))


def unscaled(sites: Weight) -> tuple[Weight, float]:
    """The sites without the factor that their views have in common, and the factor.

    A gradient that is formed is scaled last, as JAX does it: a cotangent times 1e10 may leave
    float32's range where the gradient does not.
    """
    views = [site.view for site in sites if site.view is not None]
    scales = {abs(view.scale) for view in views}
    if len(views) < len(sites) or len(scales) > 1:
        return sites, 1.0
    (scale,) = scales
    signs = (view._replace(scale=math.copysign(1.0, view.scale)) for view in views)
    return tuple(dataclasses.replace(s, view=v) for s, v in zip(sites, signs)), scale


def _temporary(group: Group) -> int:
    """Numbers that measuring one example takes beyond what is recorded or kept."""
    B, T, d, p = group.form[:4]
    if group.norm == "lookup":
        return 2 * T * p
    if any(forms.has_patches(site) for site in group.sites):
        return B * T * d
    # What a scan recorded is turned, to have the examples first.
    turned = B * T * (d + p) if any(site.lengths for site in group.sites) else 0
    return turned + (B * d * p if group.norm == "outer again" else 0)


def chunk_of(record: Record, size: int, share: int = 1) -> int:
    """How many examples are measured at a time, such that temporaries of `size` each are small.

    No chunk has more than one of `share` parts of the examples. On a mesh, every device has as many
    examples of a chunk, and each has memory of its own.
    """
    n, least = record.size, record.devices
    if not isinstance(n, int):
        return n  # a symbolic size, of `jax.export`
    budget = least * _CHUNK.get(jax.default_backend(), _LARGE_CHUNK)
    choices = (c for c in range(least, n // share + 1, least) if n % c == 0)
    return max((c for c in choices if c * size <= budget), default=least if n % least == 0 else n)


def chunked(function: Callable[[Record], Any], record: Record, size: int, share: int = 1) -> Any:
    """Applies `function` to a few examples at a time if its temporaries, `size` each, are large."""
    chunk, n = chunk_of(record, size, share), record.size
    if chunk == n:
        return function(record)
    parts = n // chunk
    # XLA reads a slice where it is; of arrays reshaped to `[chunks, chunk, ...]` it copies some.
    # Traced once, for the shapes of the results and for the loop.
    closed, shapes = jax.make_jaxpr(lambda i: function(record.take(i, chunk)), return_shape=True)(
        jnp.uint32(0)
    )

    # Not a `fori_loop`, which has the number of the turn twice: XLA needs rounds over the whole
    # program to find that out.
    def turn(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        i, results = state
        found = core.jaxpr_as_fun(closed)(i)
        return i + 1, [
            jax.lax.dynamic_update_index_in_dim(all, own, i, 0)
            for all, own in zip(results, found, strict=True)
        ]

    # All of it is written over. Some number of the record in place of zeros, because XLA makes
    # zeros before the forward pass and holds them all through it.
    _, (_, cotangent) = record.places[-1]
    some = record.arrays[cotangent].reshape(-1)[0]
    leaves, treedef = jax.tree.flatten(shapes)
    start = [jnp.full((parts, *x.shape), some, x.dtype) for x in leaves]
    _, results = jax.lax.while_loop(lambda s: s[0] < parts, turn, (jnp.uint32(0), start))
    return jax.tree.unflatten(treedef, [in_order(x, record.devices) for x in results])
