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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import SMALLEST_NORM, ClipRule, PerExample
from dpjax.dp.engines import products, reference
from dpjax.dp.engines.parts import (
    Part,
    Record,
    Totals,
    Vectors,
    closed_part,
    formed_part,
    kept_part,
    packed,
)
from dpjax.dp.engines.plans import LeafPlan, make_plan, plan
from dpjax.dp.engines.sites import Key
from dpjax.dp.engines.taps import evaluate, function_of_leaves
from dpjax.dp.engines.tracing import Traced

__all__ = ["LeafPlan", "microbatch_sum", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# An example is trusted if rounding adds at most this share to its norm, if its tokens do not cancel
# (see `_cancellation`), and if the numbers that are multiplied keep their distance from the ends of
# float32's range, before and after the factor.
_MARGIN = 2.0**-7
_LARGE, _SCALED = 2.0**60, 2.0**120


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
    planned = make_plan(loss_fn, params, example)
    loss, record, direct = _backward(planned.traced, leaves, batch)
    groups, num_groups = rule.groups(params), rule.num_groups(params)

    doubts = reference.count_of_doubts(loss)
    record = reference.once(record, doubts)  # one recording for the norms and for the sums
    constants = _constants(planned.traced, leaves)
    parts = [kept_part(own, groups) for own in packed(direct)]
    parts += [closed_part(group, record, constants, groups) for group in planned.groups]
    parts += [
        formed_part(planned.traced, mixed, record, constants, leaves, groups, doubts)
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
) -> tuple[jax.Array, Record, dict[int, jax.Array]]:
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
    record = Record(
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
    parts: list[Part],
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
    parts: list[Part],
    record: Record,
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
