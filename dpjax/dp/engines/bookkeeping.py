"""The book-keeping engine: clipped sums at the price of about one ordinary backward pass.

One backward pass over the microbatch gives, for every leaf whose uses are all products with
example-dependent inputs (see `sites`), those inputs and the cotangents of the products. Both
the norms and, once the clipping factors are known, the weighted sum of the gradients follow from
them without per-example gradients in memory and without a second backward pass. The same goes for
weights that are certain functions of leaves (`columns`, `factored`); other functions' gradients are
formed from what was recorded (`formed`). Every other leaf, mostly biases, norm scales and other
small ones, is differentiated per example.

**The bound holds for every input.** Norms come with proved bounds on rounding (`products`),
and the factor is that of their sum. Where the bounds are not small beside the norm itself, tokens
cancel, numbers leave the range of float32 or of the leaf's own dtype, and the engine does not trust
itself: it takes the example out of its products and forms the gradient of that example alone, from
what was recorded, as an array that is measured and summed (`_set_apart`). No ordinary example is
treated so. This is a loop that is most often not entered, and so are the barriers of
`reference.once`; all weights share them.

**Compiling.** XLA compiles equal kernels once, and its passes take time for each operation. Norms
of weights of one length are therefore measured by one loop (`parts.measured_together`), what is
recorded has the shape in which the model computed it, sums and small gradients are flat, and a
direct leaf has as few operations as possible.

**Memory.** Inputs and cotangents of products are kept up to the end, but for those of which the
gradients are kept in their place; where a plain gradient keeps much less, the batch is taken in
parts (`memory`).

Source: Bu et al. 2022, arXiv 2210.00038 (book-keeping); Li et al. 2021, arXiv 2110.05679 (ghost
norms); Goodfellow 2015, arXiv 1510.01799.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import SMALLEST_NORM, ClipRule, PerExample
from dpjax.dp.engines import products, reference, summation
from dpjax.dp.engines.arithmetic import root
from dpjax.dp.engines.backward import backward, constants_of
from dpjax.dp.engines.formed import formed_part
from dpjax.dp.engines.held import here
from dpjax.dp.engines.parts import (
    Factors,
    Part,
    Totals,
    Vectors,
    closed_part,
    kept_part,
    measured_together,
)
from dpjax.dp.engines.plans import LeafPlan, Mixed, Plan, make_plan, plan
from dpjax.dp.engines.record import Record, zeroed
from dpjax.dp.meshes import devices_of

__all__ = ["LeafPlan", "microbatch_sum", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# An example is trusted if rounding adds at most this share to its norm, if its tokens do not cancel
# (see `_cancellation`), and if the numbers that are multiplied keep their distance from the ends of
# float32's range, before and after the factor.
_MARGIN = 2.0**-7
_LARGE, _SCALED = 2.0**60, 2.0**120


def microbatch_sum(
    loss_fn: LossFn,
    rule: ClipRule,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    *,
    start: PyTree | None = None,
    planned: Plan | None = None,
) -> tuple[PyTree, PerExample]:
    """Sums the clipped per-example gradients of one microbatch.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar.
        rule: maps gradient norms to scale factors.
        params: trainable parameters, or a `Held`.
        batch: pytree of `[n, ...]`.
        mask: `[n]` bool, False for padding.
        start: sum of earlier microbatches, which this one's is added to in place, in the shape of
            `params` or flat, leaf by leaf; None for none.
        planned: the plan of the loss, if it has been made.

    Returns:
        The sum, float32 in the shape of `start` or else of `params`, and the facts of each example.

    Guarantees:
        The numbers of the vmap engine, up to rounding. Padding and examples with a non-finite loss
        or gradient contribute exactly zero. Where a weight has 16 bits, vmap rounds each gradient
        to them, and float16 loses numbers below 6e-8; this engine multiplies in float32 and keeps
        them. What meets a weight in float64 is differentiated per example, as by vmap.
    """
    held = here(params)
    params = held.shapes
    leaves, treedef = jax.tree.flatten(params)
    example = reference.example_of(batch)
    planned = planned or make_plan(loss_fn, params, example)
    if planned.traced.writes:  # which JAX alone can follow
        total, facts = reference.microbatch_sum(loss_fn, rule, held.whole(), batch, mask)
        if start is not None:
            total = jax.tree.map(lambda sums, own: sums + own.reshape(sums.shape), start, total)
        return total, facts
    loss, record, direct = backward(planned.traced, held, batch)
    record = dataclasses.replace(record, devices=devices_of(batch, mask.shape[0]))
    groups, num_groups = rule.groups(params), rule.num_groups(params)

    turns = reference.turns_of(loss)
    constants = constants_of(planned.traced, held)

    def formed(mixed: Mixed, record: Record) -> Part:
        return formed_part(planned.traced, mixed, record, constants, held, turns)

    # Leaves of equal shape share their kernels: a part for each compiles faster than one for all.
    parts = [kept_part(leaf, gradients) for leaf, gradients in direct.items()]
    parts += [closed_part(g, record, constants) for g in planned.groups if g.is_kept]
    parts += [formed(mixed, record) for mixed in planned.mixed if mixed.kept]
    weights = [group.sites for group in planned.groups if not group.is_kept]
    weights += [sites for mixed in planned.mixed if not mixed.kept for sites in mixed.weights]
    # One recording for the norms and for the sums. Gradients that are kept go with it, so that
    # nothing else reads the cotangents, of which XLA would make a copy.
    record, kept = reference.once(
        (record.of(tuple(weights), list(record.scalars)), [part.kept for part in parts]), turns
    )
    together = measured_together(planned.groups, record, constants)
    masses = {
        i: functools.partial(_row, measure.mass, k)
        for members, measure in together
        for k, i in enumerate(members)
    }
    measured = [
        closed_part(group, record, constants, masses.get(i))
        for i, group in enumerate(planned.groups)
        if not group.is_kept
    ]
    measured += [formed(mixed, record) for mixed in planned.mixed if not mixed.kept]
    parts, kept = parts + measured, kept + [part.kept for part in measured]

    most = _cancellation(planned.tokens)
    squares = _kept_squares(parts, kept, groups, num_groups, mask.shape[0])
    measures = [
        (jax.tree.map(lambda row: row[None], measure), [groups[leaf]])
        for part in parts
        for measure, leaf in zip(part.measures, part.leaves)
    ]
    for members, measure in together:
        leaves_of = [min(planned.groups[i].sites[0].leaves) for i in members]
        measures.append((measure, [groups[leaf] for leaf in leaves_of]))
    clip = _clip(rule, parts, measures, squares, loss, mask, most)
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
    if start is None:
        totals = {i: jnp.zeros(leaf.size, jnp.float32) for i, leaf in enumerate(leaves)}
    else:
        totals = {i: total.reshape(-1) for i, total in enumerate(jax.tree.leaves(start))}
    count = jnp.sum(~clip.usable)
    if repairs:
        totals, facts, count = _set_apart(
            rule, groups, parts, squares, record, totals, facts, clip.usable, doubtful, turns
        )
    # A gradient in memory was measured as it is summed, of whatever example.
    trusted, all_of_them = _by_leaf(clip.factors, groups), _by_leaf(facts.factors, groups)
    touched = frozenset[int]().union(*(part.clears for part in parts))
    record, kept = _cleared(
        record, touched, kept, clip.usable, jnp.any(facts.factors > 0, 1), count
    )
    for part, own in zip(parts, kept):
        factors = all_of_them if part.exact is None else trusted
        totals = part.add(totals, record, own, factors, clip.usable)
    sums = [totals[i].reshape(leaf.shape) for i, leaf in enumerate(leaves)]
    total = jax.tree.unflatten(treedef, sums)
    if spreads:
        whole = held.whole()
        total, facts = reference.one_by_one(loss_fn, rule, whole, batch, doubtful, total, facts)
    if start is not None:
        total = jax.tree.map(lambda sums, like: sums.reshape(like.shape), total, start)
    return total, facts


def _row(array: jax.Array, row: int) -> jax.Array:
    return array[row]


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


def _kept_squares(
    parts: list[Part], kept: list[Vectors], groups: tuple[int, ...], num_groups: int, size: int
) -> jax.Array:
    """The squared norms `[n, groups]` of all gradients that are in memory."""
    group_of: dict[int, int] = {}
    by_group: dict[int, list[jax.Array]] = {}
    for part, own in zip(parts, kept):
        for group, g in zip((groups[leaf] for leaf in part.leaves), own):
            # Small ones are copied side by side, so that one program measures all of a group.
            key = group if g.shape[1] <= summation.BIAS else num_groups + len(by_group)
            by_group.setdefault(key, []).append(summation.capped(g, part.limit))
            group_of[key] = group
    squares = [products.kept_square(jnp.concatenate(own, 1)) for own in by_group.values()]
    if not squares:
        return jnp.zeros((size, num_groups), jnp.float32)
    return _sum_by_group(jnp.stack(squares), list(group_of.values()), num_groups).T


def _sum_by_group(rows: jax.Array, groups: list[int], num_groups: int) -> jax.Array:
    """Sums `[gradients, ...]` to `[groups, ...]` of the clipping rule."""
    if num_groups == 1:
        return jnp.sum(rows, 0, keepdims=True)
    return jax.ops.segment_sum(rows, jnp.array(groups, jnp.int32), num_groups)


def _clip(
    rule: ClipRule,
    parts: list[Part],
    measures: list[tuple[products.Measure, list[int]]],
    squares: jax.Array,
    loss: jax.Array,
    mask: jax.Array,
    most: float,
) -> _Clip:
    """Adds up the parts' measures and turns them into factors, or into doubt.

    Args:
        rule: the clipping rule.
        parts: all gradients.
        measures: `[gradients, n]` of those that are not kept, and the groups they belong to.
        squares: squared norms `[n, groups]` of those that are kept.
        loss: `[n]`.
        mask: `[n]`.
        most: how far a trusted gradient may cancel.
    """
    finite, num_groups = jnp.isfinite(loss), squares.shape[1]
    if not num_groups:
        empty = jnp.zeros((*mask.shape, 0), jnp.float32)
        return _Clip(empty, empty, finite)
    trusted = jnp.ones(mask.shape, bool)
    for part in parts:
        if part.within is not None:
            trusted &= part.within
    zero = jnp.zeros_like(squares)
    found = products.Measure(squares, zero, zero, zero, zero)
    if measures:
        groups = [group for _, own in measures for group in own]
        each = jax.tree.map(lambda *rows: jnp.concatenate(rows), *[m for m, _ in measures])
        # Parts are orthogonal, so spread and mass add up in squares. The peak is that of all.
        terms = [each.square, each.error, jnp.square(each.spread), jnp.square(each.mass)]
        sums = _sum_by_group(jnp.stack(terms, 1), groups, num_groups)  # [groups, 4, n]
        square, error, spread, mass = jnp.transpose(sums, (1, 2, 0))
        peak = jnp.broadcast_to(jnp.max(each.peak, 0)[:, None], squares.shape)
        found = products.Measure(squares + square, error, root(spread), root(mass), peak)
    square, error, spread, mass, peak = found
    norms = root(square)
    bounded = root(square + error) + spread
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
    groups: tuple[int, ...],
    parts: list[Part],
    squares: jax.Array,
    record: Record,
    totals: Totals,
    facts: PerExample,
    usable: jax.Array,
    doubtful: jax.Array,
    turns: jax.Array,
) -> tuple[Totals, PerExample, jax.Array]:
    """Adds doubtful examples to the totals, each on its own.

    The gradient is formed as an array, as by vmap: measured, scaled and added to the totals as it
    is. So its contribution exceeds the bound by no more than rounding, which `ClipRule.factors`
    allows for, whatever its numbers are. Gradients that are in memory are such arrays already:
    they only get the factor.

    Args:
        rule: the clipping rule.
        groups: the rule's, by leaf.
        parts: all gradients.
        squares: squared norms `[n, groups]` of those that are kept.
        record: of all examples.
        totals: to be added to.
        facts: of all examples, to be corrected for the doubtful ones.
        usable: `[n]` bool, most often all of them; then nothing is done.
        doubtful: `[n]` bool, which of the others may contribute.
        turns: see `reference.once`.

    Returns:
        The totals, the facts, and how many examples are not usable: known once this is done, so
        that what reads the number may write over the record.
    """
    order, num_groups = _order(usable), squares.shape[1]
    formed = [(p.exact, p.place, p.leaves) for p in parts if p.exact and p.place]
    members = [groups[leaf] for _, _, leaves in formed for leaf in leaves]

    def turn(
        i: jax.Array, state: tuple[Totals, PerExample, jax.Array]
    ) -> tuple[Totals, PerExample, jax.Array]:
        row = order[i]
        totals, facts, count = state
        own = record.take(row, 1)
        vectors = reference.once([exact(own) for exact, _, _ in formed], turns)
        lengths = [products.kept_square(v) for mine in vectors for v in mine]
        square = squares[row]
        if lengths:
            square += _sum_by_group(jnp.stack(lengths), members, num_groups)[:, 0]
        norms = root(square)
        use = doubtful[row] & jnp.all(jnp.isfinite(norms))
        # Once, or XLA computes them again in the program of every weight, which it has to compile.
        factors = reference.once(jnp.where(use, rule.factors(norms), 0.0), turns)
        columns = _by_leaf(factors[None], groups)
        for (_, place, leaves), mine in zip(formed, vectors, strict=True):
            weighed = [
                summation.scaled(v, *columns[i])[0] for i, v in zip(leaves, mine, strict=True)
            ]
            totals = place(totals, own, tuple(weighed))
        norms = jnp.where(doubtful[row], norms, facts.norms[row])
        facts = facts._replace(
            norms=facts.norms.at[row].set(norms), factors=facts.factors.at[row].set(factors)
        )
        return totals, facts, count + 1

    start = {leaf: totals[leaf] for _, _, leaves in formed for leaf in leaves}
    end, facts, count = jax.lax.fori_loop(0, jnp.sum(~usable), turn, (start, facts, jnp.int32(0)))
    return totals | end, facts, count


def _by_leaf(factors: jax.Array, groups: tuple[int, ...]) -> Factors:
    columns = [(column, column > 0) for column in jnp.unstack(factors, axis=1)]
    return [columns[group] for group in groups]


def _order(usable: jax.Array) -> jax.Array:
    """The rows, those first that are not usable; unsigned, so that none counts from the end."""
    return jnp.argsort(usable).astype(jnp.uint32)


def _cleared(
    record: Record,
    touched: frozenset[int],
    kept: list[Vectors],
    usable: jax.Array,
    used: jax.Array,
    count: jax.Array,
) -> tuple[Record, list[Vectors]]:
    """Writes zeros for examples that must not reach a product: 0 * NaN is NaN.

    Args:
        record: of all examples.
        touched: arrays of the record that are cleared where not usable.
        kept: gradients `[n, entries]`; cleared where not used either. Small ones are left: there,
            the sum itself leaves such examples out.
        usable: `[n]` bool.
        used: `[n]` bool, which examples have a factor.
        count: how many are not usable.
    """
    large, treedef = jax.tree.flatten(kept)
    places = [i for i, g in enumerate(large) if g.shape[1] > summation.BIAS]
    if not touched and not places:
        return record, kept
    order = _order(usable)

    def clear(i: jax.Array, state: Any) -> Any:
        row = order[i]
        arrays = dataclasses.replace(record, arrays=state[0]).without(row)
        kept = []
        for g in state[1]:
            kept.append(zeroed(g, row, record.devices, unless=used[row]))
        return arrays, kept

    # In place: a copy of all recorded arrays would take about 4% of a step.
    start = {i: record.arrays[i] for i in touched}, [large[i] for i in places]
    arrays, own = jax.lax.fori_loop(0, count, clear, start)
    for i, g in zip(places, own, strict=True):
        large[i] = g
    record = dataclasses.replace(record, arrays=record.arrays | arrays)
    return record, jax.tree.unflatten(treedef, large)
