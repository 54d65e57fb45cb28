"""Compares the book-keeping engine with the reference engine on one loss.

The engine reads the loss's jaxpr, so a mistake in how it reads one equation would be a wrong
gradient, or a broken bound, for some models only. The reference engine reads nothing: it
differentiates. A run therefore compares both on a few examples of its own model and shapes before
it spends any privacy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.dp.engines import bookkeeping, reference
from dpjax.dp.meshes import mesh_of, on_mesh

__all__ = ["EngineMismatch", "check_engine"]

PyTree = Any

# Both engines round differently, by some 1e-4 of a norm in large models. A mistake in reading a
# model is of the size of the gradient itself.
_TOLERANCE = 0.02


class EngineMismatch(RuntimeError):
    """The book-keeping engine and the reference engine disagree about a gradient."""


def check_engine(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    examples: PyTree,
    *,
    frozen: PyTree = None,
    engine: Callable[..., Any] | None = None,
) -> None:
    """Checks that book-keeping clipping gives per-example gradients' norms and sums on this loss.

    Every leaf is clipped on its own, so that each leaf's norm and sum is compared. Parameters are
    moved away from where they are, by normal numbers of deviation 0.02: a zero head would hide
    the rest of the model.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar; with `frozen`,
            `(params, frozen, example) -> loss`.
        params: trainable parameters.
        examples: a few examples, `[n, ...]` each; their values do not have to be real data, but
            labels and token numbers must be in range.
        frozen: what else the loss takes; None if it takes nothing else.
        engine: `(loss_fn, rule, params, frozen, examples, mask) -> (sum, PerExample)`, what is
            compared, in a jitted function; the book-keeping engine on whole parameters by default.

    Raises:
        EngineMismatch: naming the leaf that differs most, how the engine handled it, and what to
            do.

    >>> loss = lambda params, x: jax.numpy.sum(jax.numpy.tanh(x @ params["w"]))
    >>> check_engine(loss, {"w": jax.numpy.ones((3, 2))}, jax.numpy.ones((2, 3)))
    """
    numbers = np.random.default_rng(0)

    def away(parameter: jax.typing.ArrayLike) -> jax.Array:
        at = jnp.asarray(parameter)
        step = jnp.asarray(0.02 * numbers.standard_normal(at.shape), at.dtype)
        return step if 0 in at.shape else (at + step).astype(at.dtype)

    moved = jax.tree.map(away, params)
    rule = per_layer(1.0, grouping=by_leaf)
    mask = jnp.ones(jax.tree.leaves(examples)[0].shape[0], bool)

    @jax.jit
    def both(params: PyTree, examples: PyTree, frozen: PyTree) -> Any:
        loss, same = reference.scalar(bound(frozen)), jax.tree.map(reference.again, examples)
        want = reference.microbatch_sum(loss, rule, params, examples, mask)
        if engine is not None:
            return want, engine(loss_fn, rule, params, frozen, same, mask)
        return want, bookkeeping.microbatch_sum(loss, rule, params, same, mask)

    def bound(frozen: PyTree) -> Callable[[PyTree, PyTree], jax.Array]:
        if frozen is None:
            return loss_fn
        return lambda params, example: loss_fn(params, frozen, example)

    args, like = (moved, examples, frozen), (moved, mask)
    mesh = mesh_of(args)
    whole = mesh is not None and bool(mesh.explicit_axes)
    results = on_mesh(both, args, (like, like), replicate=whole)
    (want, facts), (have, other) = jax.tree.map(np.asarray, results)
    # What the sum of the clipped parts can reach; examples that both drop (0 * NaN) take no part.
    parts = np.where(facts.factors > 0, facts.factors * facts.norms, 0.0)
    scale = np.maximum(np.sum(parts, 0), 1e-30)
    sums = [
        np.linalg.norm(np.ravel(b - a))
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(have), strict=True)
    ]
    used = np.isfinite(facts.norms)  # the reference drops what is not finite
    slack = 1e-6 * np.max(facts.norms, where=used, initial=0.0)
    with np.errstate(invalid="ignore"):
        near = np.abs(other.norms - facts.norms) <= _TOLERANCE * facts.norms + slack
    same = near | ~used
    wrong = ~np.all(same, 0) | ~(np.array(sums) <= _TOLERANCE * scale + 1e-12)
    if not np.any(wrong):
        return
    example = reference.example_of(examples)
    leaf = int(np.argmax(wrong * (np.array(sums) / scale + 1.0)))
    plan = bookkeeping.plan(bound(frozen), params, example)[leaf]
    raise EngineMismatch(
        f"the book-keeping engine gives another gradient than vmap for {plan.path!r} "
        f"(route {plan.route}: {plan.reason}): norms {other.norms[:, leaf]} for "
        f"{facts.norms[:, leaf]}. Use method='vmap' and report the model; nothing was trained."
    )
