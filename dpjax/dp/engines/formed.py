"""Weights that are functions of their leaves, or that share a leaf in several layouts.

In general their leaves' gradients are formed for each example, measured and summed. Where a weight
only scales and shifts the columns of a leaf (`columns`), or takes its numbers one by one
(`entries`), norms and sums follow from what was recorded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.dp.engines import entries, forms, products, reference, summation
from dpjax.dp.engines.arithmetic import root
from dpjax.dp.engines.columns import (
    Columns,
    Products,
    Scaled,
    inner_products,
    products_of,
    pulled,
    with_columns,
)
from dpjax.dp.engines.entries import Entries
from dpjax.dp.engines.held import Held
from dpjax.dp.engines.parts import (
    Constants,
    Factors,
    Part,
    Totals,
    Vectors,
    chunk_of,
    chunked,
    cleared,
    of_kept,
    sum_of_constant,
    unscaled,
)
from dpjax.dp.engines.plans import Mixed
from dpjax.dp.engines.record import Record, taken
from dpjax.dp.engines.sites import Key, Site, Weight
from dpjax.dp.engines.taps import function_of_leaves
from dpjax.dp.engines.tracing import Traced

__all__ = ["formed_part"]

# Columns are scaled by less, and their numbers are smaller; beyond, examples are taken one by one.
_MODERATE = 2.0**30


def formed_part(
    traced: Traced,
    mixed: Mixed,
    record: Record,
    constants: Constants,
    held: Held,
    turns: jax.Array,
) -> Part:
    """The part of weights that are functions of their leaves, or that share them in other layouts.

    The derivative of such a function can cancel nearly all of a gradient, say that of
    `w - mean(w)`, and so can two uses of a leaf. A sum over examples that is formed before it may
    hold errors of any size beside the bound. The leaves' gradients are therefore formed per
    example, and what is formed is measured and summed.
    """
    terms = {
        place: {i: g for i, g in own.items() if i in mixed.leaves}
        for place, own in constants.items()
        if own.keys() & set(mixed.leaves)
    }
    if mixed.columns:
        return _columns_part(mixed, record, terms, held, turns)
    pulls = [_pull(traced, sites[0], held) for sites in mixed.weights]
    limits = [min(site.limit for site in sites) for sites in mixed.weights]

    def gradients(record: Record, cap: bool = False) -> tuple[Vectors, jax.Array]:
        total: dict[int, jax.Array] = {}
        within = jnp.ones((), bool)
        for sites, pull, limit in zip(mixed.weights, pulls, limits):
            if limit < summation.LARGEST:
                formed, gradient = products.outer(record.tokens(sites))
                within &= products.outer_measure(formed).mass < limit / 4
            else:
                plain, scale = unscaled(sites)
                gradient = scale * summation.materialize(record.tokens(plain))
            gradient = summation.capped(gradient, limit if cap else math.inf)
            within &= jnp.ones(gradient.shape[0], bool)
            for leaf, value in jax.vmap(pull)(gradient).items():
                total[leaf] = total[leaf] + value if leaf in total else value
        for place, constant in terms.items():
            for leaf in constant:
                total[leaf] += summation.scaled(constant[leaf][None], record.scalars[place])
        return tuple(summation.flat(total[leaf]) for leaf in mixed.leaves), within

    # The weight may have few bits where its leaves have not.
    capped = functools.partial(gradients, cap=True)

    def exact(record: Record) -> Vectors:
        return capped(record)[0]

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        totals = dict(totals)
        for leaf, vector in zip(mixed.leaves, vectors, strict=True):
            totals[leaf] += vector
        return totals

    own, size = record.of(mixed.weights, list(terms)), _temporary_of(mixed)
    if mixed.kept:
        kept, within = chunked(capped, own, size)
        return of_kept(mixed.leaves, kept, within, place)

    def measure(record: Record) -> tuple[tuple[products.Measure, ...], jax.Array]:
        vectors, within = gradients(record)
        return tuple(map(products.kept_measure, reference.once(vectors, turns))), within

    if mixed.entries:
        return _entries_part(mixed, record, terms, held, exact, place, turns)
    measures, within = chunked(measure, own, size)

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: Factors, usable: jax.Array
    ) -> Totals:
        own = record.of(mixed.weights, list(terms))
        chunk = chunk_of(own, size)

        def turn(i: jax.Array, totals: Totals) -> Totals:
            def part(array: jax.Array) -> jax.Array:
                return taken(array, i, chunk, own.devices)

            weighed = []
            vectors = reference.once(gradients(own.take(i, chunk))[0], turns)
            for leaf, measured, g in zip(mixed.leaves, measures, vectors, strict=True):
                square = part(measured.square)
                # Formed a second time, in another program: what is added is measured once more, and
                # shrunk if it is the larger.
                again = products.kept_square(g)
                shrink = jnp.where(
                    again > square, root(square / jnp.where(again > 0, again, 1.0)), 1.0
                )
                finite = jnp.isfinite(again)
                g = jnp.where(finite[:, None], g, 0.0)
                factor = jnp.where(finite, part(factors[leaf][0]) * shrink, 0.0)
                weighed.append(summation.weigh(g, factor, factor > 0))
            return place(totals, record, tuple(weighed))

        start = {leaf: totals[leaf] for leaf in mixed.leaves}
        return totals | jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(own.size // chunk), turn, start)

    return Part(mixed.leaves, (), measures, within, add, min(limits), exact, place)


def _entries_part(
    mixed: Mixed,
    record: Record,
    terms: Constants,
    held: Held,
    exact: Callable[[Record], Vectors],
    place: Callable[[Totals, Record, Vectors], Totals],
    turns: jax.Array,
) -> Part:
    """The part of weights that are functions of their leaves number by number; see `entries`.

    Args:
        mixed: the weights.
        record: what was recorded.
        terms: gradients of scalars, of the weights' leaves.
        held: the parameters.
        exact: see `Part`.
        place: likewise.
        turns: see `reference.once`.
    """
    limit = min(site.limit for own in mixed.entries for site in own.sites)
    measures: dict[int, products.Measure] = {}
    within = jnp.ones(record.size, bool)
    # Once: what is measured is multiplied with the slopes that the sum is multiplied with.
    slopes = {e.leaf: e.at({i: held.leaf(i) for i in e.leaves}) for e in mixed.entries}
    slopes = reference.once(slopes, turns)
    for own in mixed.entries:
        form = forms.form_of(own.sites)
        across = _transposed(own.of_leaf, (form.B, form.d, form.p))
        constants = {k: all[own.leaf] for k, all in terms.items() if own.leaf in all}
        grams = products.grams_of(list(constants.values()))
        constants = {place: across(constant) for place, constant in constants.items()}

        def measure(record: Record, own: Entries, constants: Any, grams: Any) -> Any:
            t, by = record.tokens(own.sites), slopes[own.leaf]
            found, mass = entries.measure(t, by)
            if not constants:
                return found, mass
            slope, scalars = by.size * by.own, [record.scalars[place] for place in constants]
            inners = [products.inner_product(t, other, slope) for other in constants.values()]
            form = forms.form_of(own.sites)
            return products.with_constants(found, form, scalars, inners, grams), mass

        function = functools.partial(measure, own=own, constants=constants, grams=grams)
        part = record.of((own.sites,), list(constants))
        measures[own.leaf], mass = chunked(function, part, entries.temporary(own))
        within &= slopes[own.leaf].sound & (mass < limit / 4)

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: Factors, usable: jax.Array
    ) -> Totals:
        totals = dict(totals)
        for own in mixed.entries:
            factor, by = factors[own.leaf][0], slopes[own.leaf]
            value = _weighted(own.sites, record, factor, usable)
            value = own.of_leaf(by.size * (by.own * value))
            totals[own.leaf] += jnp.where(by.sound, value, 0.0)  # 0 * NaN is NaN
        return _with_terms(totals, record, terms, factors, usable)

    clears = frozenset().union(*(cleared(own.sites, record) for own in mixed.entries))
    in_order = tuple(measures[leaf] for leaf in mixed.leaves)
    return Part(mixed.leaves, (), in_order, within, add, limit, exact, place, clears)


def _columns_part(
    mixed: Mixed, record: Record, terms: Constants, held: Held, turns: jax.Array
) -> Part:
    """The part of weights that scale and shift the columns of a leaf each; see `columns`."""
    places = list(terms)
    constants: dict[int, dict[Key, jax.Array]] = {}
    for own, _ in mixed.columns:
        form = forms.form_of(own.sites)
        across = _transposed(functools.partial(_of_leaf, own), (form.B, form.d, form.p))
        constants[own.leaf] = {k: across(g[own.leaf]) for k, g in terms.items() if own.leaf in g}
    of_gains = {k: {i: g for i, g in all.items() if i not in constants} for k, all in terms.items()}
    of_columns = {k: {i: g for i, g in all.items() if i in constants} for k, all in terms.items()}
    limit = min(site.limit for own, _ in mixed.columns for site in own.sites)
    weights = [
        (own, norm, own.at({i: held.leaf(i) for i in own.leaves})) for own, norm in mixed.columns
    ]

    def gradients(record: Record) -> tuple[Vectors, jax.Array]:
        by_leaf: dict[int, jax.Array] = {}
        within = jnp.ones(record.size, bool)
        for own, _, at in weights:
            formed, gradient, others = pulled(record.tokens(own.sites), at, limit)
            if limit < summation.LARGEST:
                within &= products.outer_measure(formed).mass < limit / 4
            for k, constant in constants[own.leaf].items():
                gradient += summation.scaled(jnp.swapaxes(constant, 1, 2)[None], record.scalars[k])
            by_leaf[own.leaf] = summation.flat(gradient)
            _add_flat(by_leaf, others)
        _add_scaled(by_leaf, of_gains, record)
        return tuple(by_leaf[leaf] for leaf in mixed.leaves), within

    def exact(record: Record) -> Vectors:
        return gradients(record)[0]

    def place(totals: Totals, record: Record, vectors: Vectors) -> Totals:
        totals = dict(totals)
        by_leaf = dict(zip(mixed.leaves, vectors, strict=True))
        for own, _, at in weights:
            B, d, p = at.u.shape
            value = jnp.swapaxes(by_leaf.pop(own.leaf).reshape(B, p, d), 1, 2)
            totals[own.leaf] += _of_leaf(own, value)
        for leaf, vector in by_leaf.items():
            totals[leaf] += vector
        return totals

    if mixed.kept:
        kept, within = chunked(gradients, record.of(mixed.weights, places), _temporary_of(mixed))
        return of_kept(mixed.leaves, kept, within, place)

    measures: dict[int, products.Measure] = {}
    others: dict[int, jax.Array] = {}
    within = jnp.ones(record.size, bool)
    added, sound = {}, jnp.ones((), bool)
    for own, norm, at in weights:
        form, more = forms.form_of(own.sites), constants[own.leaf]

        def measure(record: Record, own: Columns, norm: str, at: Scaled, more: Any) -> Products:
            return products_of(record.tokens(own.sites), norm, at, list(more.values()))

        function = functools.partial(measure, own=own, norm=norm, at=at, more=more)
        product = chunked(function, record.of((own.sites,), []), _temporary_of_columns(own, norm))
        # Once: they are measured as they are summed.
        a, b, gains = reference.once(jax.vmap(at.back)(product.by_scale, product.by_shift), turns)
        found = with_columns(product, form, at, a, b)
        if more:
            scalars = [record.scalars[place] for place in more]
            others_of, grams = list(more.values()), products.grams_of(list(more.values()))
            inners = inner_products(product, at, a, b, others_of)
            found = products.with_constants(found, form, scalars, inners, grams)
        measures[own.leaf] = found
        _add_flat(others, gains)
        # The square of no number in a column exceeds their sum.
        columns = (jnp.abs(at.scale) < _MODERATE) & (at.moments[1] < _MODERATE**2)
        sound &= jnp.all(columns)
        within &= product.mass < limit / 4
        added[own.leaf] = a, b
    _add_scaled(others, of_gains, record)
    others = reference.once(others, turns)
    measures |= {leaf: products.kept_measure(gradient) for leaf, gradient in others.items()}

    def add(
        totals: Totals, record: Record, kept: Vectors, factors: Factors, usable: jax.Array
    ) -> Totals:
        totals = dict(totals)
        for leaf, gradient in others.items():
            totals[leaf] += jnp.sum(summation.scaled(gradient, factors[leaf][0], usable), 0)
        for own, _, at in weights:
            factor = factors[own.leaf][0]
            value = at.scale[:, None] * _weighted(own.sites, record, factor, usable)
            a, b = (jnp.sum(summation.scaled(x, factor, usable), 0) for x in added[own.leaf])
            value = _of_leaf(own, value + a[:, None] + b[:, None] * at.u)
            totals[own.leaf] += jnp.where(sound, value, 0.0)  # 0 * NaN is NaN
        return _with_terms(totals, record, of_columns, factors, usable)

    clears = frozenset().union(*(cleared(own.sites, record) for own, _, _ in weights))
    in_order = tuple(measures[leaf] for leaf in mixed.leaves)
    return Part(mixed.leaves, (), in_order, within & sound, add, limit, exact, place, clears)


def _transposed(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> Any:
    """Takes gradients of a leaf, in its shape, to the canonical form of a weight."""
    transposed = jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    return lambda gradient: transposed(gradient.reshape(-1))[0]


def _add_scaled(total: dict[int, jax.Array], terms: Constants, record: Record) -> None:
    """Adds gradients of scalars to flat gradients of examples."""
    for place, own in terms.items():
        for leaf, constant in own.items():
            total[leaf] += summation.scaled(constant.reshape(1, -1), record.scalars[place])


def _with_terms(
    totals: Totals, record: Record, terms: Constants, factors: Factors, usable: jax.Array
) -> Totals:
    """The totals with the weighted sums of gradients of scalars."""
    totals = dict(totals)
    for place, own in terms.items():
        for leaf, constant in own.items():
            scalars, factor = record.scalars[place], factors[leaf][0]
            totals[leaf] += sum_of_constant(constant.reshape(-1), scalars, factor, usable)
    return totals


def _add_flat(total: dict[int, jax.Array], gradients: dict[int, jax.Array]) -> None:
    for leaf, gradient in gradients.items():
        gradient = summation.flat(gradient)
        total[leaf] = total[leaf] + gradient if leaf in total else gradient


def _of_leaf(columns: Columns, gradient: jax.Array) -> jax.Array:
    """A gradient `[B, d, p]` in the order of the leaf, flat."""
    site = columns.sites[0]
    return site.view_of_leaf.pull(forms.restore(site, gradient)).reshape(-1)


def _weighted(sites: Weight, record: Record, factor: jax.Array, usable: jax.Array) -> jax.Array:
    """The weighted sum of products, `[B, d, p]`."""
    if not forms.sums_as_convolution(sites):
        return summation.weighted_sum(record.tokens(sites), factor, usable)
    form = forms.form_of(sites)
    shape = jax.ShapeDtypeStruct((form.B, form.d, form.p), jnp.float32)
    total = sum(
        forms.conv_sum(site, x, summation.scaled(g, factor, usable))
        for site, (x, g) in zip(sites, record.pairs(sites))
    )
    return jax.linear_transpose(lambda w: forms.restore(sites[0], w), shape)(total)[0]


def _pull(traced: Traced, site: Site, held: Held) -> Callable[[jax.Array], dict[int, jax.Array]]:
    """Takes a canonical gradient of a weight to the weight's leaves, float32."""
    view = site.view
    if view is not None:
        return lambda gradient: {view.leaf: view.pull(forms.restore(site, gradient))}
    own = {i: held.leaf(i) for i in sorted(site.leaves)}
    weight, vjp = jax.vjp(lambda own: function_of_leaves(traced, *site.place, own), own)

    def pull(gradient: jax.Array) -> dict[int, jax.Array]:
        (result,) = vjp(forms.restore(site, gradient).astype(weight.dtype))
        return jax.tree.map(lambda g: g.astype(jnp.float32), result)

    return pull


def _temporary_of(mixed: Mixed) -> int:
    patches = 0
    for sites in mixed.weights:
        if any(forms.has_patches(site) for site in sites):
            form = forms.form_of(sites)
            patches += form.B * form.T * form.d
    return patches if mixed.kept and patches else max(patches, mixed.numbers)


def _temporary_of_columns(columns: Columns, norm: str) -> int:
    """Numbers that measuring one example takes."""
    form = forms.form_of(columns.sites)
    patches = any(forms.has_patches(site) for site in columns.sites)
    size = form.T * ((form.d if patches else 0) + 2 * form.p)
    return form.B * (size + (0 if norm == "gram" else form.d * form.p))
