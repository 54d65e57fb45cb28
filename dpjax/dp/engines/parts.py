"""Gradients that are measured and summed together: of a weight, or of some direct leaves.

What one backward pass recorded (`Record`) becomes one `Part` for each view of a leaf, for each set
of weights that share leaves, and for direct leaves. A part says what its norms are and what bounds
them (`products`), adds its weighted sum to the totals once the factors are known, and forms the
exact gradient of one example that the engine does not trust.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms, products, reference
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.plans import Group, Mixed
from dpjax.dp.engines.sites import Key, Site, Weight
from dpjax.dp.engines.taps import function_of_leaves
from dpjax.dp.engines.tracing import Traced

__all__ = [
    "Part",
    "Record",
    "Totals",
    "Vectors",
    "closed_part",
    "formed_part",
    "kept_part",
    "packed",
]

Vectors = tuple[jax.Array, ...]  # flat float32 gradients `[n, entries]`
Totals = dict[int, jax.Array]  # by leaf, sums over examples

# Numbers in a temporary of one chunk of examples: what a CPU's cache holds, or enough to fill an
# accelerator.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**27

_SMALL = 2**16  # numbers that are copied in no time


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("arrays", "scalars"), meta_fields=("places",)
)
@dataclasses.dataclass(frozen=True)
class Record:
    """What one backward pass leaves behind.

    Attributes:
        arrays: inputs of equations and cotangents of their outputs, `[n, ...]` each. An input that
            several equations share is there once.
        scalars: by place, the cotangent of a scalar `[n]`.
        places: for each equation, its input and its cotangent among the arrays.
    """

    arrays: dict[int, jax.Array]
    scalars: dict[Key, jax.Array]
    places: tuple[tuple[Key, tuple[int, int]], ...]

    def of(self, weights: tuple[Weight, ...], scalars: list[Key]) -> Record:
        """The part that belongs to some weights."""
        keys = {site.key for sites in weights for site in sites}
        places = tuple(item for item in self.places if item[0] in keys)
        arrays = {i: self.arrays[i] for _, pair in places for i in pair}
        return Record(arrays, {k: self.scalars[k] for k in scalars}, places)

    def pairs(self, sites: Weight) -> list[tuple[jax.Array, jax.Array]]:
        """The input and the cotangent of each site, as far as they belong to it."""
        places = dict(self.places)
        return [forms.part_of(site, *(self.arrays[i] for i in places[site.key])) for site in sites]

    def tokens(self, sites: Weight) -> Tokens:
        """The canonical arrays of one weight."""
        return forms.tokens(sites, self.pairs(sites))


class Part(NamedTuple):
    """Gradients that are measured and summed together: of a weight, or of some direct leaves.

    Attributes:
        members: the group of the clipping rule that each of the part's gradients belongs to.
        kept: the gradients themselves; empty if they are not kept.
        measures: of those that are not kept.
        within: `[n]` bool, whether no number on the way leaves the range of the weight's dtype;
            None if that is float32's own.
        exact: `(record, kept)` of ONE example to its gradients `[1, entries]`, in which numbers
            beyond the range of the weight's dtype are infinite.
        place: `(totals, record, vectors)` to the totals with such gradients added.
        add: `(totals, record, kept, factors [n, groups], usable [n])` to the totals with the
            weighted sums added. Factors are zero where not usable.
        clears: arrays of the record in which the sum needs zeros where an example is not usable.
    """

    members: tuple[int, ...]
    kept: Vectors
    measures: tuple[products.Measure, ...]
    within: jax.Array | None
    exact: Callable[[Record, Vectors], Vectors]
    place: Callable[[Totals, Record, Vectors], Totals]
    add: Callable[[Totals, Record, Vectors, jax.Array, jax.Array], Totals]
    clears: frozenset[int] = frozenset()


def packed(direct: dict[int, jax.Array]) -> list[dict[int, jax.Array]]:
    """Direct leaves of one part each: few large arrays compile faster than many small ones."""
    small = {i: g for i, g in direct.items() if g.size <= _SMALL}
    return [{i: g} for i, g in direct.items() if i not in small] + ([small] if small else [])


def kept_part(gradients: dict[int, jax.Array], groups: tuple[int, ...]) -> Part:
    """Leaves with per-example gradients `[n, ...]` in memory: measured and summed as they are."""
    by_group: dict[int, list[int]] = {}
    for leaf in gradients:
        by_group.setdefault(groups[leaf], []).append(leaf)
    flat = {leaf: products.flat(g) for leaf, g in gradients.items()}
    kept = [
        jnp.concatenate([flat[i] for i in own], 1) if len(own) > 1 else flat[own[0]]
        for own in by_group.values()
    ]

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        totals = dict(totals)
        for own, vector in zip(by_group.values(), vectors):
            start = 0
            for leaf in own:
                stop = start + flat[leaf].shape[1]
                totals[leaf] += vector[start:stop].reshape(totals[leaf].shape)
                start = stop
        return totals

    return _of_kept(tuple(by_group), tuple(kept), None, place)


def _of_kept(
    members: tuple[int, ...],
    kept: Vectors,
    within: jax.Array | None,
    place: Callable[[Totals, Record, Vectors], Totals],
    limit: float = math.inf,
) -> Part:
    """A part whose gradients are in memory; `limit` is the largest number of the weight's dtype."""

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: jax.Array, usable: jax.Array
    ) -> Totals:
        weighed = [products.weigh(g, factors[:, i]) for i, g in zip(members, kept, strict=True)]
        return place(totals, record, tuple(weighed))

    def exact(record: Record, kept: Vectors) -> Vectors:
        return tuple(_capped(vector, limit) for vector in kept)

    return Part(members, kept, (), within, exact, place, add)


def _capped(array: jax.Array, limit: float) -> jax.Array:
    """Numbers beyond the limit as the infinite ones that vmap has there."""
    return array if limit >= products.LARGEST else jnp.where(abs(array) <= limit, array, jnp.inf)


def closed_part(
    group: Group,
    record: Record,
    constants: dict[Key, dict[int, jax.Array]],
    groups: tuple[int, ...],
) -> Part:
    """The part of one view of a leaf, from the recorded inputs and cotangents of its sites."""
    sites, form = group.sites, group.form
    view = sites[0].view_of_leaf
    leaf, rule_group = view.leaf, groups[view.leaf]

    def back(gradient: jax.Array) -> jax.Array:
        """A canonical gradient in the shape of the leaf."""
        return view.pull(forms.restore(sites[0], gradient))

    shape = (form.B, form.d, form.p)
    terms = {place: own[leaf] for place, own in constants.items() if leaf in own}
    if terms:
        across = jax.linear_transpose(back, jax.ShapeDtypeStruct(shape, jnp.float32))
        terms = {place: across(constant)[0] for place, constant in terms.items()}
    # What a recorded number may be before a constant factor of the weight, and behind it.
    limit = min(site.limit for site in sites)
    reach = max(1.0, *(1 / abs(site.view.scale) for site in sites if site.view))
    narrow = limit < products.LARGEST
    largest = limit / 4 / reach

    def materialized(record: Record, tokens: Tokens) -> jax.Array:
        gradients = products.materialize(tokens)
        for place, constant in terms.items():
            gradients += products.scaled(constant[None], record.scalars[place])
        return gradients

    def finish(found: products.Measure, record: Record) -> products.Measure:
        for place, constant in terms.items():
            scalar = record.scalars[place]
            found = products.with_constant(found, record.tokens(sites), scalar, constant)
        return found

    def measure(record: Record) -> tuple[tuple[products.Measure, ...], jax.Array | None]:
        t = record.tokens(sites)
        if group.norm == "lookup":
            found = products.lookup_measure(t)
        elif group.norm == "gram":
            found = products.gram_measure(t)
        else:
            found = products.outer_measure(t)[0]
        found = finish(found, record)
        return (found,), found.mass < largest if narrow else None

    def gradients(record: Record) -> tuple[Vectors, jax.Array | None]:
        t = record.tokens(sites)
        vectors = (products.flat(materialized(record, t)),)
        if not narrow:
            return vectors, None
        return vectors, finish(products.outer_measure(t)[0], record).mass < largest

    def exact(record: Record, kept: Vectors) -> Vectors:
        t = record.tokens(sites)
        if group.norm == "lookup" and not terms:
            gradients = products.combined(t)
        else:
            gradients = materialized(record, t)
        return (_capped(products.flat(gradients), limit / reach if narrow else math.inf),)

    # The leaf itself as a table, or as the transposed of one, can be added to in place.
    table = group.norm == "lookup" and not view.steps and forms.is_table(sites[0])

    def look_up(totals: Totals, t: Tokens, h: jax.Array) -> Totals:
        """Adds rows h `[..., T, p]`."""
        rows, h = t.rows.reshape(-1), h.reshape(-1, form.p)
        if table:
            own = totals[leaf]
            return totals | {leaf: own.reshape(form.d, form.p).at[rows].add(h).reshape(own.shape)}
        gradient = jnp.zeros((form.d, form.p), jnp.float32).at[rows].add(h)
        return totals | {leaf: totals[leaf] + back(gradient[None])}

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        if group.norm == "lookup" and not terms:
            return look_up(totals, record.tokens(sites), vectors[0])
        return totals | {leaf: totals[leaf] + back(vectors[0].reshape(shape))}

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: jax.Array, usable: jax.Array
    ) -> Totals:
        factor = factors[:, rule_group]
        if forms.sums_as_convolution(sites):
            for site, (x, g) in zip(sites, record.pairs(sites)):
                # Back through its own view: another use may order the leaf's axes otherwise.
                value = forms.conv_sum(site, x, products.scaled(g, factor, usable))
                totals = totals | {leaf: totals[leaf] + site.view_of_leaf.pull(value)}
        elif group.norm == "lookup":
            t = record.tokens(sites)
            totals = look_up(totals, t, products.scaled(t.h, factor, usable))
        else:
            value = back(products.weighted_sum(record.tokens(sites), factor, usable))
            totals = totals | {leaf: totals[leaf] + value}
        for at, constant in terms.items():
            weights = products.scaled(record.scalars[at], factor, usable)
            totals = totals | {leaf: totals[leaf] + back(jnp.sum(weights) * constant)}
        return totals

    # Of a product, the smaller array is scaled, and cleared by that.
    places = dict(record.places)
    if forms.sums_as_convolution(sites):
        clears = {places[site.key][0] for site in sites}
    else:
        scale_x = products.scales_x(form)
        clears = {
            places[site.key][site.turned != scale_x] for site in sites if site.kind != "embed"
        }
    own = record.of((sites,), list(terms))
    size = _temporary(group)
    if group.norm == "outer":
        kept, within = _chunked(gradients, own, size)
        return _of_kept((rule_group,), kept, within, place, limit / reach if narrow else math.inf)
    measures, within = _chunked(measure, own, size)
    return Part((rule_group,), (), measures, within, exact, place, add, frozenset(clears))


def formed_part(
    traced: Traced,
    mixed: Mixed,
    record: Record,
    constants: dict[Key, dict[int, jax.Array]],
    leaves: list[Any],
    groups: tuple[int, ...],
    doubts: jax.Array,
) -> Part:
    """The part of weights that are functions of their leaves, or that share them in other layouts.

    The derivative of such a function can cancel nearly all of a gradient, say that of
    `w - mean(w)`, and so can two uses of a leaf. A sum over examples that is formed before it may
    hold errors of any size beside the bound. The leaves' gradients are therefore formed per
    example, and what is formed is measured and summed.
    """
    pulls = [_pull(traced, sites[0], leaves) for sites in mixed.weights]
    terms = {place: own for place, own in constants.items() if own.keys() & set(mixed.leaves)}
    members = tuple(groups[leaf] for leaf in mixed.leaves)
    limits = [min(site.limit for site in sites) for sites in mixed.weights]

    def gradients(record: Record, capped: bool = False) -> tuple[Vectors, jax.Array]:
        total: dict[int, jax.Array] = {}
        within = jnp.ones((), bool)
        for sites, pull, limit in zip(mixed.weights, pulls, limits):
            t = record.tokens(sites)
            if limit < products.LARGEST:
                found, gradient = products.outer_measure(t)
                within &= found.mass < limit / 4
            else:
                gradient = products.materialize(t)
            gradient = _capped(gradient, limit if capped else math.inf)
            within &= jnp.ones(gradient.shape[0], bool)
            for leaf, value in jax.vmap(pull)(gradient).items():
                total[leaf] = total[leaf] + value if leaf in total else value
        for place, constant in terms.items():
            for leaf in total.keys() & constant.keys():
                total[leaf] += products.scaled(constant[leaf][None], record.scalars[place])
        return tuple(products.flat(total[leaf]) for leaf in mixed.leaves), within

    def exact(record: Record, kept: Vectors) -> Vectors:
        return gradients(record, capped=True)[0]

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        totals = dict(totals)
        for leaf, vector in zip(mixed.leaves, vectors, strict=True):
            totals[leaf] += vector.reshape(totals[leaf].shape)
        return totals

    own, size = record.of(mixed.weights, list(terms)), _temporary_of(mixed)
    if mixed.kept:
        kept, within = _chunked(gradients, own, size)
        return _of_kept(members, kept, within, place, min(limits))

    def measure(record: Record) -> tuple[tuple[products.Measure, ...], jax.Array]:
        vectors, within = gradients(record)
        return tuple(map(products.kept_measure, reference.once(vectors, doubts))), within

    measures, within = _chunked(measure, own, size)

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: jax.Array, usable: jax.Array
    ) -> Totals:
        def chunk(totals: Totals, part: Any) -> tuple[Totals, None]:
            record, factors, squares = part
            weighed = []
            vectors = reference.once(gradients(record)[0], doubts)
            for i, (member, g) in enumerate(zip(members, vectors, strict=True)):
                # Formed a second time, in another program: what is added is measured once more, and
                # shrunk if it is the larger.
                again = products.kept_measure(g).square
                shrink = jnp.where(again > squares[i], jnp.sqrt(squares[i] / again), 1.0)
                finite = jnp.isfinite(again)
                g = jnp.where(finite[:, None], g, 0.0)
                factor = jnp.where(finite, factors[:, member] * shrink, 0.0)
                weighed.append(products.weigh(g, factor))
            return place(totals, record, tuple(weighed)), None

        squares = tuple(measured.square for measured in measures)
        own = {leaf: totals[leaf] for leaf in mixed.leaves}
        parts = (record.of(mixed.weights, list(terms)), factors, squares)
        return totals | jax.lax.scan(chunk, own, _cut(parts, size)[0])[0]

    return Part(members, (), measures, within, exact, place, add)


def _pull(
    traced: Traced, site: Site, leaves: list[Any]
) -> Callable[[jax.Array], dict[int, jax.Array]]:
    """Takes a canonical gradient of a weight to the weight's leaves, float32."""
    view = site.view
    if view is not None:
        return lambda gradient: {view.leaf: view.pull(forms.restore(site, gradient))}
    own = {i: leaves[i] for i in sorted(site.leaves)}
    weight, vjp = jax.vjp(lambda own: function_of_leaves(traced, site.key, site.operand, own), own)

    def pull(gradient: jax.Array) -> dict[int, jax.Array]:
        (result,) = vjp(forms.restore(site, gradient).astype(weight.dtype))
        return jax.tree.map(lambda g: g.astype(jnp.float32), result)

    return pull


def _temporary(group: Group) -> int:
    """Numbers that measuring one example takes beyond what is recorded or kept."""
    if any(forms.has_patches(site) for site in group.sites):
        return group.form.B * group.form.T * group.form.d
    return group.form.B * group.form.d * group.form.p if group.norm == "outer again" else 0


def _temporary_of(mixed: Mixed) -> int:
    patches = 0
    for sites in mixed.weights:
        if any(forms.has_patches(site) for site in sites):
            form = forms.form_of(sites)
            patches += form.B * form.T * form.d
    return patches if mixed.kept and patches else max(patches, mixed.numbers)


def _cut(arrays: Any, size: int) -> tuple[Any, int]:
    """Cuts arrays `[n, ...]` into `[chunks, n / chunks, ...]` by the `size` of each example."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    budget = _CHUNK.get(jax.default_backend(), _LARGE_CHUNK)
    chunk = max(c for c in range(1, n + 1) if n % c == 0 and (c == 1 or c * size <= budget))
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), arrays), n // chunk


def _chunked(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Applies `function` to a few examples at a time if its temporaries, `size` each, are large."""
    cut, chunks = _cut(arrays, size)
    if chunks == 1:
        return function(arrays)
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), jax.lax.map(function, cut)
    )
