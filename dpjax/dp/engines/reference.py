"""The reference engine: per-example gradients by vmap, which every other engine is held to.

`one_by_one` is for the examples that a batched program leaves in doubt: those whose loss or norm is
not finite in a model with convolutions. XLA may turn the batched gradient of a convolution's kernel
into a dense product with a mask of zeros, so that one example's NaN or overflow (0 * NaN) reaches
all the others. The book-keeping engine needs it only where it leaves a kernel to JAX
(`sites.Traced.spreads`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp import secure
from dpjax.dp.clipping import ClipRule, PerExample
from dpjax.dp.engines import summation
from dpjax.dp.engines.arithmetic import root
from dpjax.dp.engines.jaxprs import equations

__all__ = [
    "again",
    "differentiates_convolutions",
    "example_of",
    "has_grouped_convolutions",
    "microbatch_sum",
    "once",
    "one_by_one",
    "turns_of",
]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]


def microbatch_sum(
    loss_fn: LossFn,
    rule: ClipRule,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    grid: secure.Grid | None = None,
    *,
    start: PyTree | None = None,
) -> tuple[PyTree, PerExample]:
    """Sums the clipped per-example gradients of one microbatch; see `clipped_sum`.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example.
        rule: the clipping rule.
        params: trainable parameters.
        batch: pytree of `[n, ...]`.
        mask: `[n]` bool, False for padding.
        grid: where given, gradients are rounded to it one by one, and the sum is int32 and exact.
        start: sum of earlier microbatches, which this one's is added to; None for none.

    Guarantees:
        What is measured is what is summed: the norm is that of the very array that the factor
        multiplies, so a contribution exceeds its bound by rounding alone, which `ClipRule.factors`
        allows for.
    """
    total, facts = _batched(loss_fn, rule, params, batch, mask, grid)
    if start is not None:
        total = jax.tree.map(jnp.add, start, total)
    if mask.shape[0] == 1 or not differentiates_convolutions(loss_fn, params, batch):
        return total, facts
    doubtful = mask & ~(jnp.isfinite(facts.loss) & jnp.all(jnp.isfinite(facts.norms), 1))
    return one_by_one(loss_fn, rule, params, batch, doubtful, total, facts, grid)


def once(arrays: PyTree, turns: jax.Array) -> PyTree:
    """Returns the arrays such that XLA computes them once, however many results read them.

    A norm is that of what is summed only if both read the same numbers. XLA is free to compute an
    array twice, fused into the norm and fused into the sum, with two roundings; where a gradient
    cancels, the two differ by more than the bound (17 C was seen). Its CPU compiler does so, and
    removes `optimization_barrier` before. It cannot look through a loop: this one changes the signs
    an even number of times, known at run time only and 0 for ordinary batches, in place.

    Args:
        arrays: numbers of any dtype.
        turns: that number, see `turns_of`.
    """
    if not jax.tree.leaves(arrays):
        return arrays
    flip = lambda _, arrays: jax.tree.map(_turned, arrays)  # noqa: E731
    return jax.lax.fori_loop(0, turns, flip, arrays)


def _turned(array: jax.Array) -> jax.Array:
    return jnp.logical_not(array) if array.dtype == bool else jnp.negative(array)


def scalar(loss_fn: LossFn) -> LossFn:
    """The loss function, which raises TypeError where it does not return one real scalar."""

    def checked(params: PyTree, example: PyTree) -> jax.Array:
        loss = loss_fn(params, example)
        if not jax.tree_util.all_leaves([loss]):
            kind = type(loss).__name__
            raise TypeError(f"loss_fn must return one scalar, got {kind}: return the loss alone.")
        if jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(f"loss_fn must return one real scalar, got {jax.typeof(loss)}.")
        return loss

    return checked


def unplaced(tree: PyTree) -> PyTree:
    """Arrays as abstract values without shardings.

    Of Explicit axes, whose shardings are part of a type, a loss for one device need not know.
    """

    return jax.tree.map(lambda x: _abstract(x, x.shape) if isinstance(x, jax.Array) else x, tree)


def example_of(batch: PyTree) -> PyTree:
    """One example of a batch, as abstract values; see `unplaced`."""
    return jax.tree.map(lambda x: _abstract(x, x.shape[1:]), batch)


def _abstract(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    # A weak type promotes others to less than a strong one does. Random keys have none.
    return jax.ShapeDtypeStruct(shape, x.dtype, weak_type=getattr(x, "weak_type", False))


def turns_of(loss: jax.Array) -> jax.Array:
    """Twice the number of examples whose loss is not finite, from `[n]` losses; see `once`."""
    return 2 * jnp.sum(~jnp.isfinite(loss), dtype=jnp.int32)


def differentiates_convolutions(loss_fn: LossFn, params: PyTree, batch: PyTree) -> bool:
    """Whether the loss of one example, or its gradient (a custom one included), convolves."""
    example = example_of(batch)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss_fn))(unplaced(params), example).jaxpr
    return bool(_convolutions(jaxpr))


def has_grouped_convolutions(jaxpr: core.Jaxpr) -> bool:
    """Whether a convolution in a program has groups, of channels or of examples."""
    kinds = ("feature_group_count", "batch_group_count")
    return any(eqn.params[kind] > 1 for eqn in _convolutions(jaxpr) for kind in kinds)


def _convolutions(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    return [eqn for eqn in equations(jaxpr) if eqn.primitive is P.conv_general_dilated_p]


def one_by_one(
    loss_fn: LossFn,
    rule: ClipRule,
    params: PyTree,
    batch: PyTree,
    doubtful: jax.Array,
    total: PyTree,
    facts: PerExample,
    grid: secure.Grid | None = None,
) -> tuple[PyTree, PerExample]:
    """Adds doubtful examples to a sum that leaves them out, each in a program of its own.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example.
        rule: the clipping rule.
        params: trainable parameters.
        batch: pytree of `[n, ...]`.
        doubtful: `[n]` bool; none in an ordinary batch, which then costs nothing.
        total: the sum over the other examples.
        facts: of all examples, to be corrected for the doubtful ones.
        grid: of the sum, see `microbatch_sum`.

    Returns:
        The sum over all examples, and their facts.
    """
    order = jnp.argsort(~doubtful)

    def add(i: jax.Array, state: tuple[PyTree, PerExample]) -> tuple[PyTree, PerExample]:
        total, facts = state
        row = order[i]
        example = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(again(x), row, 1), batch)
        part, one = _batched(loss_fn, rule, params, example, jnp.ones(1, bool), grid)
        facts = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0), facts, one
        )
        return jax.tree.map(jnp.add, total, part), facts

    return jax.lax.fori_loop(0, jnp.sum(doubtful), add, (total, facts))


def again(array: jax.Array) -> jax.Array:
    """The array; random keys are marked for a second use, which is that of the same example."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.clone(array)
    return array


def _batched(
    loss_fn: LossFn,
    rule: ClipRule,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    grid: secure.Grid | None,
) -> tuple[PyTree, PerExample]:
    groups, num_groups = rule.groups(params), rule.num_groups(params)
    loss, grads = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))(params, batch)
    leaves, treedef = jax.tree.flatten(grads)
    leaves = once([summation.flat(g) for g in leaves], turns_of(loss))
    loss = loss.astype(jnp.float32)
    squares: list[list[jax.Array]] = [[] for _ in range(num_groups)]
    for group, g in zip(groups, leaves):
        squares[group].append(jnp.sum(jnp.square(g), 1))
    totals = [jnp.sum(jnp.stack(parts), 0) for parts in squares]
    norms = root(jnp.stack(totals, 1)) if totals else jnp.zeros((*mask.shape, 0))
    use = mask & jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms), 1)
    factors = jnp.where(use[:, None], jax.vmap(rule.factors)(norms), 0.0)

    clipped = [
        # where, not multiplication: 0 * NaN is NaN
        jnp.where(use[:, None], g, 0.0) * factors[:, group, None]
        for group, g in zip(groups, leaves)
    ]
    if grid is not None:
        clipped = secure.on_grid(clipped, grid)
    sums = [
        jnp.sum(g, 0, dtype=g.dtype).reshape(jnp.shape(like))
        for g, like in zip(clipped, jax.tree.leaves(params))
    ]
    total = jax.tree.unflatten(treedef, sums)
    facts = PerExample(
        loss=jnp.where(mask, loss, 0.0),
        norms=jnp.where(mask[:, None], norms, 0.0),
        factors=factors,
        real=mask,
    )
    return total, facts
