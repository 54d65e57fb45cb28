"""The book-keeping engine: clipped sums at the price of about one ordinary backward pass.

One backward pass over the microbatch gives, for every leaf whose uses are all products with
example-dependent inputs (see `sites`), those inputs and the cotangents of the products. Both
the norms and, once the clipping factors are known, the weighted sum of the gradients follow from
them without per-example gradients in memory and without a second backward pass. Every other leaf,
mostly biases, norm scales and other small ones, is differentiated per example.

**The bound holds for every input.** Norms come with proved bounds on rounding (`products`),
and the factor is that of their sum. Where the bounds are not small beside the norm itself, tokens
cancel, numbers leave the range of float32 or of the leaf's own dtype, and the engine does not trust
itself: it takes the example out of its products and forms the gradient of that example alone, from
what was recorded, as an array that is measured and summed (`_set_apart`). No ordinary example is
treated so. This is a loop that is most often not entered, and so are the barriers of
`reference.once`; all weights share them, because each loop and each kernel takes time to compile.

Source: Bu et al. 2022, arXiv 2210.00038 (book-keeping); Li et al. 2021, arXiv 2110.05679 (ghost
norms); Goodfellow 2015, arXiv 1510.01799.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import SMALLEST_NORM, ClipRule, PerExample
from dpjax.dp.engines import forms, products, reference
from dpjax.dp.engines.forms import Form, Tokens
from dpjax.dp.engines.sites import Key, Site, Traced, Weight, trace
from dpjax.dp.engines.taps import evaluate, function_of_leaves

__all__ = ["LeafPlan", "microbatch_sum", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]
Vectors = tuple[jax.Array, ...]  # flat float32 gradients `[n, entries]`
Totals = dict[int, jax.Array]  # by leaf, sums over examples

# Numbers in a temporary of one chunk of examples: what a CPU's cache holds, or enough to fill an
# accelerator.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**27

# An example is trusted if rounding adds at most this share to its norm, if its tokens do not cancel
# (see `_cancellation`), and if the numbers that are multiplied keep their distance from the ends of
# float32's range, before and after the factor.
_MARGIN = 2.0**-7
_LARGE, _SCALED = 2.0**60, 2.0**120


class LeafPlan(NamedTuple):
    """How the gradient of one leaf is handled.

    Attributes:
        path: the leaf's path, keys joined by "/".
        route: "gram", "outer", "embed", "conv", "derived", "direct" or "unused".
        reason: the sizes that decided, or why no product was found.
        source: the line of the model that decided, "file.py:12 (function)", if JAX knows it.
    """

    path: str
    route: str
    reason: str
    source: str = ""


class _Group(NamedTuple):
    """The sites of one view of a leaf, and how their norms are computed.

    Attributes:
        sites: uses of the view.
        form: sizes of the joint canonical form.
        norm: "lookup", "gram", "outer" or "outer again".
    """

    sites: Weight
    form: Form
    norm: str

    @property
    def route(self) -> str:
        """The name in the plan."""
        kinds = {site.kind for site in self.sites}
        return kinds.pop() if kinds in ({"embed"}, {"conv"}) else self.norm.split()[0]


class _Mixed(NamedTuple):
    """Weights that are formed for each example, because their leaves have several uses.

    Attributes:
        weights: the sites of each weight.
        leaves: all leaves that they are computed from.
        kept: whether the leaves' gradients are kept for the sum, or formed a second time.
        numbers: numbers of the gradients of all weights, of one example.
    """

    weights: tuple[Weight, ...]
    leaves: tuple[int, ...]
    kept: bool
    numbers: int

    @property
    def route(self) -> str:
        """The name in the plan."""
        return "conv" if {s.kind for w in self.weights for s in w} == {"conv"} else "derived"


class _Plan(NamedTuple):
    traced: Traced
    groups: tuple[_Group, ...]
    mixed: tuple[_Mixed, ...]


def plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> tuple[LeafPlan, ...]:
    """Says how each leaf of `params` is handled, without computing anything.

    Args:
        loss_fn: `(params, example) -> scalar loss`.
        params: trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
        example: ONE example, likewise.

    Returns:
        One record per leaf, in `jax.tree.leaves` order.
    """
    planned = _plan(loss_fn, params, example)
    traced = planned.traced
    routes = {leaf: ("direct", reason) for leaf, reason in traced.direct.items()}
    for group in planned.groups:
        routes[min(group.sites[0].leaves)] = group.route, _sizes(group.sites, group.norm)
    for mixed in planned.mixed:
        norm = "outer" if mixed.kept else "outer again"
        for leaf in mixed.leaves:
            own = [w for w in mixed.weights if leaf in w[0].leaves]
            sizes = "; ".join(_sizes(weight, norm) for weight in own) + ", derived"
            routes[leaf] = mixed.route, sizes
    unused = "unused", "the loss does not depend on it"
    return tuple(
        LeafPlan(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            *routes.get(i, unused),
            traced.sources.get(i, ""),
        )
        for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    )


def _sizes(sites: Weight, norm: str) -> str:
    form = forms.form_of(sites)
    sizes = f"T={form.T} d={form.d} p={form.p}" + (f" B={form.B}" if form.B > 1 else "")
    return sizes if {site.kind for site in sites} in ({"dot"}, {"embed"}) else f"{sizes}, {norm}"


def _plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> _Plan:
    traced = trace(loss_fn, params, example)
    leaves = jax.tree.leaves(params)
    groups = []
    for sites in traced.groups:
        form = forms.form_of(sites)
        if all(site.kind == "embed" for site in sites):
            # Where lookups outnumber the rows, a gradient takes less room than its parts.
            norm = "lookup" if form.T < form.d else "outer"
        else:
            norm = products.cheapest(form)
        groups.append(_Group(sites, form, norm))
    mixed = []
    for weights in traced.mixed:
        own = sorted({leaf for sites in weights for leaf in sites[0].leaves})
        sizes = [forms.form_of(sites) for sites in weights]
        total = Form(1, 1, 1, sum(math.prod(leaves[i].shape) for i in own),
                     sum(form.recorded for form in sizes))  # fmt: skip
        numbers = sum(form.B * form.d * form.p for form in sizes)
        mixed.append(_Mixed(weights, tuple(own), products.can_keep(total), numbers))
    return _Plan(traced, tuple(groups), tuple(mixed))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("arrays", "scalars"), meta_fields=("places",)
)
@dataclasses.dataclass(frozen=True)
class _Record:
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

    def of(self, weights: tuple[Weight, ...], scalars: list[Key]) -> _Record:
        """The part that belongs to some weights."""
        keys = {site.key for sites in weights for site in sites}
        places = tuple(item for item in self.places if item[0] in keys)
        arrays = {i: self.arrays[i] for _, pair in places for i in pair}
        return _Record(arrays, {k: self.scalars[k] for k in scalars}, places)

    def pairs(self, sites: Weight) -> list[tuple[jax.Array, jax.Array]]:
        """The input and the cotangent of each site, as far as they belong to it."""
        places = dict(self.places)
        return [forms.part_of(site, *(self.arrays[i] for i in places[site.key])) for site in sites]

    def tokens(self, sites: Weight) -> Tokens:
        """The canonical arrays of one weight."""
        return forms.tokens(sites, self.pairs(sites))


class _Part(NamedTuple):
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
    exact: Callable[[_Record, Vectors], Vectors]
    place: Callable[[Totals, _Record, Vectors], Totals]
    add: Callable[[Totals, _Record, Vectors, jax.Array, jax.Array], Totals]
    clears: frozenset[int] = frozenset()


def microbatch_sum(
    loss_fn: LossFn, rule: ClipRule, params: PyTree, batch: PyTree, mask: jax.Array
) -> tuple[PyTree, PerExample]:
    """Sums the clipped per-example gradients of one microbatch.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar.
        rule: maps gradient norms to scale factors.
        params: trainable parameters.
        batch: pytree of `[n, ...]`.
        mask: `[n]` bool, False for padding.

    Returns:
        The sum, float32 in the shape of `params`, and the facts of each example.

    Guarantees:
        The numbers of the vmap engine, up to rounding. Padding and examples with a non-finite loss
        or gradient contribute exactly zero. Where a weight has 16 bits, vmap rounds each gradient
        to them, and float16 loses numbers below 6e-8; this engine multiplies in float32 and keeps
        them. Where it has 64, this engine multiplies in float32 all the same.
    """
    leaves, treedef = jax.tree.flatten(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    planned = _plan(loss_fn, params, example)
    loss, record, direct = _backward(planned.traced, leaves, batch)
    groups, num_groups = rule.groups(params), rule.num_groups(params)

    doubts = reference.count_of_doubts(loss)
    record = reference.once(record, doubts)  # one recording for the norms and for the sums
    constants = _constants(planned.traced, leaves)
    parts = [_kept(own, groups) for own in _packed(direct)]
    parts += [_closed(group, record, constants, groups) for group in planned.groups]
    parts += [
        _formed(planned.traced, mixed, record, constants, leaves, groups, doubts)
        for mixed in planned.mixed
    ]
    kept = reference.once([part.kept for part in parts], doubts)

    most = _cancellation(max((group.form.T for group in planned.groups), default=1))
    clip = _clip(rule, parts, kept, num_groups, loss, mask, most)
    facts = PerExample(
        loss=jnp.where(mask, loss, 0.0),
        norms=jnp.where(mask[:, None], clip.norms, 0.0),
        factors=clip.factors,
        real=mask,
    )
    # A batched convolution may have spread one example's NaN over the losses of all, see reference.
    spreads = planned.traced.spreads
    doubtful = mask & ~clip.usable & (spreads | jnp.isfinite(loss))
    repairs = not spreads and bool(planned.groups or planned.mixed)
    totals = {i: jnp.zeros(leaf.shape, jnp.float32) for i, leaf in enumerate(leaves)}
    if repairs:
        totals, facts = _set_apart(
            rule, parts, record, kept, totals, facts, clip.usable, doubtful, doubts
        )
    touched = frozenset[int]().union(*(part.clears for part in parts))
    arrays, kept = _cleared(({i: record.arrays[i] for i in touched}, kept), clip.usable)
    record = dataclasses.replace(record, arrays=record.arrays | arrays)
    for part, own in zip(parts, kept):
        totals = part.add(totals, record, own, clip.factors, clip.usable)
    total = jax.tree.unflatten(treedef, [totals[i] for i in range(len(leaves))])
    if not spreads:
        return total, facts
    return reference.one_by_one(loss_fn, rule, params, batch, doubtful, total, facts)


def _backward(
    traced: Traced, leaves: list[Any], batch: PyTree
) -> tuple[jax.Array, _Record, dict[int, jax.Array]]:
    """One backward pass: losses, what is recorded, and gradients of direct leaves."""

    places: dict[Key, int] = {}

    def one(example: PyTree) -> Any:
        def loss(taps: dict[Key, jax.Array], direct: dict[int, Any]) -> Any:
            args = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
            value, inputs = evaluate(traced, [*args, *jax.tree.leaves(example)], taps)
            unique = {id(x): x for x in inputs.values()}
            order = {x: i for i, x in enumerate(unique)}
            places.update({key: order[id(x)] for key, x in inputs.items()})
            return value, list(unique.values())

        taps = {key: jnp.zeros(v.shape, v.dtype) for key, v in traced.taps.items()}
        direct = {i: leaves[i] for i in traced.direct}
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(taps, direct)

    (loss, inputs), (cotangents, direct) = jax.vmap(one)(batch)
    keys = sorted(places)
    arrays = dict(enumerate([*inputs, *(cotangents[key] for key in keys)]))
    record = _Record(
        arrays,
        {place: cotangents[place].reshape(-1).astype(jnp.float32) for place in traced.scalars},
        tuple((key, (places[key], len(inputs) + i)) for i, key in enumerate(keys)),
    )
    return loss.astype(jnp.float32), record, {i: g.astype(jnp.float32) for i, g in direct.items()}


def _constants(traced: Traced, leaves: list[Any]) -> dict[Key, dict[int, jax.Array]]:
    """By place of a scalar and by leaf, the scalar's gradient, the same for all examples."""

    def gradient(place: Key, own: dict[int, Any]) -> dict[int, jax.Array]:
        *key, operand = place

        def scalar(own: dict[int, Any]) -> jax.Array:
            return function_of_leaves(traced, tuple(key), -1 - operand, own).reshape(())

        return {i: g.astype(jnp.float32) for i, g in jax.grad(scalar)(own).items()}

    covered = {leaf for site in traced.sites for leaf in site.leaves}
    constants = {}
    for place, needs in traced.scalars.items():
        found = gradient(place, {i: leaves[i] for i in needs})
        constants[place] = {i: g for i, g in found.items() if i in covered}
    return constants


class _Clip(NamedTuple):
    """What the norms decide, `[n]` or `[n, groups]`.

    Attributes:
        norms: measured.
        factors: zero for examples that the engine does not sum.
        usable: False where recorded arrays may hold anything, or where the bound is in doubt.
    """

    norms: jax.Array
    factors: jax.Array
    usable: jax.Array


def _cancellation(tokens: int) -> float:
    """How many times its own norm the partial sums of a trusted gradient may reach.

    Random tokens reach the root of their number. Twice that adds no more to the rounding of the
    shared sum than a few more examples would.
    """
    return 4 + 2 * tokens**0.5


def _clip(
    rule: ClipRule,
    parts: list[_Part],
    kept: list[Vectors],
    num_groups: int,
    loss: jax.Array,
    mask: jax.Array,
    most: float,
) -> _Clip:
    """Adds up the parts' measures and turns them into factors, or into doubt."""
    finite = jnp.isfinite(loss)
    if not num_groups:
        empty = jnp.zeros((*mask.shape, 0), jnp.float32)
        return _Clip(empty, empty, finite)
    zero = jnp.zeros(mask.shape, jnp.float32)
    found = [[products.Measure(zero, zero, zero, zero, zero)] for _ in range(num_groups)]
    trusted = jnp.ones(mask.shape, bool)
    for part, own in zip(parts, kept):
        measures = part.measures or tuple(products.kept_measure(g) for g in own)
        if part.within is not None:
            trusted &= part.within
        for group, measure in zip(part.members, measures, strict=True):
            found[group].append(measure)
    # [parts, n, groups]; parts are orthogonal, so spread and mass add up in squares.
    each = [jax.tree.map(lambda *xs: jnp.stack(xs), *measures) for measures in found]
    square, error = (
        jnp.stack([jnp.sum(getattr(m, name), 0) for m in each], 1) for name in ("square", "error")
    )
    spread, mass = (
        jnp.stack([jnp.linalg.norm(getattr(m, name), axis=0) for m in each], 1)
        for name in ("spread", "mass")
    )
    peak = jnp.stack([jnp.max(m.peak, 0) for m in each], 1)
    norms = jnp.sqrt(square)
    bounded = jnp.sqrt(square + error) + spread
    # Below SMALLEST_NORM a factor no longer depends on the norm, so a bound below it suffices.
    regular = norms > SMALLEST_NORM
    sound = bounded <= jnp.where(regular, (1 + _MARGIN) * norms, SMALLEST_NORM)
    sound &= mass <= most * jnp.maximum(norms, SMALLEST_NORM)
    sound &= (peak <= _LARGE) & jnp.isfinite(norms)
    trusted &= jnp.all(sound, 1)
    factors = jax.vmap(rule.factors)(jnp.where(norms > 0, bounded, norms))
    # Factors far above 1 belong to tiny bounds; what they scale must stay finite.
    trusted &= jnp.all(factors * peak <= _SCALED, 1)
    usable = trusted & finite
    factors = jnp.where((mask & usable)[:, None], factors, 0.0)
    return _Clip(norms, factors, usable)


def _set_apart(
    rule: ClipRule,
    parts: list[_Part],
    record: _Record,
    kept: list[Vectors],
    totals: Totals,
    facts: PerExample,
    usable: jax.Array,
    doubtful: jax.Array,
    doubts: jax.Array,
) -> tuple[Totals, PerExample]:
    """Adds doubtful examples to the totals, each on its own.

    The gradient is formed as an array, as by vmap: measured, scaled and added to the totals as it
    is. So its contribution exceeds the bound by no more than rounding, which `ClipRule.factors`
    allows for, whatever its numbers are.

    Args:
        rule: the clipping rule.
        parts: all gradients.
        record: of all examples.
        kept: likewise.
        totals: to be added to.
        facts: of all examples, to be corrected for the doubtful ones.
        usable: `[n]` bool, most often all of them; then nothing is done.
        doubtful: `[n]` bool, which of the others may contribute.
        doubts: see `reference.once`.

    Returns:
        The totals and the facts.
    """
    order = jnp.argsort(usable)

    def turn(i: jax.Array, state: tuple[Totals, PerExample]) -> tuple[Totals, PerExample]:
        row = order[i]
        totals, facts = state
        own: Any = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), (record, kept))
        vectors = [part.exact(own[0], mine) for part, mine in zip(parts, own[1], strict=True)]
        vectors = reference.once(vectors, doubts)
        squares = jnp.zeros(facts.norms.shape[1], jnp.float32)
        for part, mine in zip(parts, vectors, strict=True):
            for group, vector in zip(part.members, mine, strict=True):
                squares = squares.at[group].add(products.kept_measure(vector).square[0])
        norms = jnp.sqrt(squares)
        use = doubtful[row] & jnp.all(jnp.isfinite(norms))
        factors = jnp.where(use, rule.factors(norms), 0.0)
        for part, mine in zip(parts, vectors, strict=True):
            weighed = [
                jnp.where(use, vector[0], 0.0) * factors[group]
                for group, vector in zip(part.members, mine, strict=True)
            ]
            totals = part.place(totals, own[0], tuple(weighed))
        norms = jnp.where(doubtful[row], norms, facts.norms[row])
        return totals, facts._replace(
            norms=facts.norms.at[row].set(norms), factors=facts.factors.at[row].set(factors)
        )

    return jax.lax.fori_loop(0, jnp.sum(~usable), turn, (totals, facts))


def _cleared(arrays: PyTree, usable: jax.Array) -> PyTree:
    """Arrays `[n, ...]` with zeros for examples that are not usable: 0 * NaN is NaN."""
    if not jax.tree.leaves(arrays):
        return arrays
    order = jnp.argsort(usable)

    def clear(i: jax.Array, arrays: PyTree) -> PyTree:
        def cleared(x: jax.Array) -> jax.Array:
            zeros = jnp.zeros((1, *x.shape[1:]), x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(x, zeros, order[i], 0)

        return jax.tree.map(cleared, arrays)

    # In place: a copy of all recorded arrays would take about 4% of a step.
    return jax.lax.fori_loop(0, jnp.sum(~usable), clear, arrays)


def _packed(direct: dict[int, jax.Array]) -> list[dict[int, jax.Array]]:
    """Direct leaves of one part each: few large arrays compile faster than many small ones."""
    small = {i: g for i, g in direct.items() if g.size <= _SMALL}
    return [{i: g} for i, g in direct.items() if i not in small] + ([small] if small else [])


_SMALL = 2**16  # numbers that are copied in no time


def _kept(gradients: dict[int, jax.Array], groups: tuple[int, ...]) -> _Part:
    """Leaves with per-example gradients `[n, ...]` in memory: measured and summed as they are."""
    by_group: dict[int, list[int]] = {}
    for leaf in gradients:
        by_group.setdefault(groups[leaf], []).append(leaf)
    flat = {leaf: products.flat(g) for leaf, g in gradients.items()}
    kept = [
        jnp.concatenate([flat[i] for i in own], 1) if len(own) > 1 else flat[own[0]]
        for own in by_group.values()
    ]

    def place(totals: Totals, record: _Record, vectors: Vectors) -> Totals:
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
    place: Callable[[Totals, _Record, Vectors], Totals],
    limit: float = math.inf,
) -> _Part:
    """A part whose gradients are in memory; `limit` is the largest number of the weight's dtype."""

    def add(
        totals: Totals, record: _Record, kept: Vectors, factors: jax.Array, usable: jax.Array
    ) -> Totals:
        weighed = [products.weigh(g, factors[:, i]) for i, g in zip(members, kept, strict=True)]
        return place(totals, record, tuple(weighed))

    def exact(record: _Record, kept: Vectors) -> Vectors:
        return tuple(_capped(vector, limit) for vector in kept)

    return _Part(members, kept, (), within, exact, place, add)


def _capped(array: jax.Array, limit: float) -> jax.Array:
    """Numbers beyond the limit as the infinite ones that vmap has there."""
    return array if limit >= products.LARGEST else jnp.where(abs(array) <= limit, array, jnp.inf)


def _closed(
    group: _Group,
    record: _Record,
    constants: dict[Key, dict[int, jax.Array]],
    groups: tuple[int, ...],
) -> _Part:
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

    def materialized(record: _Record, tokens: Tokens) -> jax.Array:
        gradients = products.materialize(tokens)
        for place, constant in terms.items():
            gradients += products.scaled(constant[None], record.scalars[place])
        return gradients

    def finish(found: products.Measure, record: _Record) -> products.Measure:
        for place, constant in terms.items():
            scalar = record.scalars[place]
            found = products.with_constant(found, record.tokens(sites), scalar, constant)
        return found

    def measure(record: _Record) -> tuple[tuple[products.Measure, ...], jax.Array | None]:
        t = record.tokens(sites)
        if group.norm == "lookup":
            found = products.lookup_measure(t)
        elif group.norm == "gram":
            found = products.gram_measure(t)
        else:
            found = products.outer_measure(t)[0]
        found = finish(found, record)
        return (found,), found.mass < largest if narrow else None

    def gradients(record: _Record) -> tuple[Vectors, jax.Array | None]:
        t = record.tokens(sites)
        vectors = (products.flat(materialized(record, t)),)
        if not narrow:
            return vectors, None
        return vectors, finish(products.outer_measure(t)[0], record).mass < largest

    def exact(record: _Record, kept: Vectors) -> Vectors:
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

    def place(totals: Totals, record: _Record, vectors: Vectors) -> Totals:
        if group.norm == "lookup" and not terms:
            return look_up(totals, record.tokens(sites), vectors[0])
        return totals | {leaf: totals[leaf] + back(vectors[0].reshape(shape))}

    def add(
        totals: Totals, record: _Record, kept: Vectors, factors: jax.Array, usable: jax.Array
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
    return _Part((rule_group,), (), measures, within, exact, place, add, frozenset(clears))


def _formed(
    traced: Traced,
    mixed: _Mixed,
    record: _Record,
    constants: dict[Key, dict[int, jax.Array]],
    leaves: list[Any],
    groups: tuple[int, ...],
    doubts: jax.Array,
) -> _Part:
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

    def gradients(record: _Record, capped: bool = False) -> tuple[Vectors, jax.Array]:
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

    def exact(record: _Record, kept: Vectors) -> Vectors:
        return gradients(record, capped=True)[0]

    def place(totals: Totals, record: _Record, vectors: Vectors) -> Totals:
        totals = dict(totals)
        for leaf, vector in zip(mixed.leaves, vectors, strict=True):
            totals[leaf] += vector.reshape(totals[leaf].shape)
        return totals

    own, size = record.of(mixed.weights, list(terms)), _temporary_of(mixed)
    if mixed.kept:
        kept, within = _chunked(gradients, own, size)
        return _of_kept(members, kept, within, place, min(limits))

    def measure(record: _Record) -> tuple[tuple[products.Measure, ...], jax.Array]:
        vectors, within = gradients(record)
        return tuple(map(products.kept_measure, reference.once(vectors, doubts))), within

    measures, within = _chunked(measure, own, size)

    def add(
        totals: Totals, record: _Record, kept: Vectors, factors: jax.Array, usable: jax.Array
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

    return _Part(members, (), measures, within, exact, place, add)


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


def _temporary(group: _Group) -> int:
    """Numbers that measuring one example takes beyond what is recorded or kept."""
    if any(forms.has_patches(site) for site in group.sites):
        return group.form.B * group.form.T * group.form.d
    return group.form.B * group.form.d * group.form.p if group.norm == "outer again" else 0


def _temporary_of(mixed: _Mixed) -> int:
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
