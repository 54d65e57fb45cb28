"""The clipped sum of per-example gradients, by whichever engine computes it.

`clipped_sum` is the one door: both engines have its signature and give its numbers. The vmap
engine materialises one microbatch of per-example gradients; the book-keeping engine
(`bookkeeping.py`) needs one ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import ClippedSum, ClipRule, PerExample
from dpjax.dp.engines import bookkeeping

__all__ = ["METHODS", "clipped_sum", "cut"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

METHODS = ("auto", "bookkeeping", "vmap")


def clipped_sum(
    loss_fn: LossFn,
    rule: ClipRule,
    *,
    method: str = "auto",
    microbatch_size: int | None = None,
) -> Callable[[PyTree, PyTree, jax.Array], tuple[ClippedSum, PerExample]]:
    """Builds the function that sums clipped per-example gradients over a masked batch.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar. Frozen parameters are closed
            over, so that they take no part in norms, memory or time. A mean over augmented views
            of the example inside `loss_fn` is averaged before clipping.
        rule: maps gradient norms to scale factors.
        method: "vmap", or "bookkeeping", which "auto" stands for: it applies to every loss, and
            differentiates per example the leaves that it finds no product for.
        microbatch_size: examples whose per-example state is in memory at once; must divide the
            batch. None takes the batch whole.

    Returns:
        `(params, batch, mask) -> (ClippedSum, PerExample)` where every leaf of `batch` is
        `[batch, ...]` and `mask` is `[batch]` bool, False for padding.

    Guarantees:
        The sum is float32 whatever the dtype of the model. Adding or removing one example moves
        it by at most `ClippedSum.sensitivity`; padding and examples with a non-finite loss or
        gradient contribute exactly zero.

    Raises:
        ValueError: an unknown method, or a microbatch size that does not divide the batch.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}.")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be >= 1.")

    def clipped_sum_fn(
        params: PyTree, batch: PyTree, mask: jax.Array
    ) -> tuple[ClippedSum, PerExample]:
        size = mask.shape[0]
        micro = microbatch_size or size
        if size % micro:
            raise ValueError(f"microbatch_size={micro} must divide the batch size {size}.")
        engine = _vmap_engine if method == "vmap" else bookkeeping.microbatch_sum
        sensitivity = rule.sensitivity()

        if micro == size:
            total, facts = engine(loss_fn, rule, params, batch, mask)
            return ClippedSum(total, sensitivity), facts

        def one(total: PyTree, chunk: tuple[PyTree, jax.Array]) -> tuple[PyTree, PerExample]:
            part, facts = engine(loss_fn, rule, params, *chunk)
            return jax.tree.map(jnp.add, total, part), facts

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        total, facts = jax.lax.scan(one, zeros, cut((batch, mask), micro))
        return ClippedSum(total, sensitivity), _uncut(facts)

    return clipped_sum_fn


def cut(tree: PyTree, size: int) -> PyTree:
    """Cuts leaves `[n, ...]` into `[n // size, size, ...]` column-major.

    Example i goes to microbatch i % (n // size). Row-major cuts would make every device wait for
    one device's examples when the batch axis is sharded.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1), tree)


def _uncut(tree: PyTree) -> PyTree:
    """Inverse of `cut`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _vmap_engine(
    loss_fn: LossFn, rule: ClipRule, params: PyTree, batch: PyTree, mask: jax.Array
) -> tuple[PyTree, PerExample]:
    """Per-example gradients of one microbatch by vmap: the reference for every other engine."""
    groups = rule.groups(params)
    num_groups = rule.num_groups(params)

    def one(example: PyTree, real: jax.Array) -> tuple[PyTree, PerExample]:
        loss, grad = jax.value_and_grad(loss_fn)(params, example)
        loss = loss.astype(jnp.float32)
        grad = jax.tree.map(lambda g: g.astype(jnp.float32), grad)
        squares = [jnp.zeros((), jnp.float32) for _ in range(num_groups)]
        for group, leaf in zip(groups, jax.tree.leaves(grad)):
            squares[group] += jnp.sum(jnp.square(leaf))
        norms = jnp.sqrt(jnp.stack(squares)) if squares else jnp.zeros((0,), jnp.float32)
        use = real & jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms))
        factors = jnp.where(use, rule.factors(norms), 0.0)
        scale = dict(enumerate(factors))
        leaves, treedef = jax.tree.flatten(grad)
        # where, not multiplication: 0 * NaN is NaN.
        clipped = [jnp.where(use, g, 0.0) * scale[i] for i, g in zip(groups, leaves)]
        facts = PerExample(
            loss=jnp.where(real, loss, 0.0),
            norms=jnp.where(real, norms, 0.0),
            factors=factors,
            real=real,
        )
        return jax.tree.unflatten(treedef, clipped), facts

    clipped, facts = jax.vmap(one)(batch, mask)
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), clipped), facts
