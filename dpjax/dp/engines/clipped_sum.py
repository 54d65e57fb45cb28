"""The clipped sum of per-example gradients, by whichever engine computes it.

`clipped_sum` is the one door: both engines have its signature and give its numbers. The vmap
engine materializes one microbatch of per-example gradients; the book-keeping engine
(`bookkeeping.py`) needs one ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.dp import secure
from dpjax.dp.clipping import ClippedSum, ClipRule, PerExample
from dpjax.dp.engines import bookkeeping, memory, reference
from dpjax.dp.engines.held import Held
from dpjax.dp.engines.plans import make_plan
from dpjax.dp.meshes import closes_over_explicit, devices_of, may_be_divided, mesh_of, on_mesh

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
    secure_noise: jax.typing.ArrayLike | None = None,
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
            batch. None takes the batch whole, or in the parts that the book-keeping engine needs to
            stay near the memory of an ordinary gradient; see `memory`.
        secure_noise: noise multiplier of the secure noise that will be added, see `dp.secure`. The
            sum is then exact, in integers, which the vmap engine forms.

    Returns:
        `(params, batch, mask) -> (ClippedSum, PerExample)` where every leaf of `batch` is
        `[batch, ...]` and `mask` is `[batch]` bool, False for padding. `params` may be a `Held`.

    Guarantees:
        The sum is float32 whatever the dtype of the model, or int32 for secure noise. Adding or
        removing one example moves it by at most `ClippedSum.sensitivity`; padding and examples with
        a non-finite loss or gradient contribute exactly zero. The function can be vmapped, scanned
        over and differentiated forward, not in reverse.

    Raises:
        ValueError: an unknown method, a microbatch size that does not divide the batch, a batch and
            a mask that do not fit, or a `jax.shard_map` around it without `check_vma=False`.
        TypeError: a rule, a parameter or a mask of the wrong type, named.
    """
    if not isinstance(rule, ClipRule):
        raise TypeError(f"rule={rule!r} must be a ClipRule, such as dp.flat(1.0).")
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {METHODS}.")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size} must be >= 1.")
    if secure_noise is not None:
        if method == "bookkeeping":
            raise ValueError("method='bookkeeping' sums in float32; secure noise needs 'vmap'.")
        method = "vmap"
    dtype = jnp.float32 if secure_noise is None else jnp.int32
    loss_fn = reference.scalar(loss_fn)

    def clipped_sum_fn(
        params: PyTree, batch: PyTree, mask: jax.Array
    ) -> tuple[ClippedSum, PerExample]:
        # JAX arrays, at the door: int64 of NumPy becomes what JAX makes of it.
        batch = jax.tree.map(jnp.asarray, batch)
        _check_sizes(batch, mask)
        if isinstance(params, Held):  # the caller has divided the batch among the devices
            return summed(params.whole() if method == "vmap" else params, batch, mask)
        params = _parameters(params)
        args = params, batch, jnp.asarray(mask)
        _check_axes(args)
        scalar = jnp.zeros(())
        unit = None if secure_noise is None else scalar
        like = ClippedSum(params, scalar, unit=unit), PerExample(*[args[2]] * 4)

        def divided(*args: Any) -> Any:
            return on_mesh(summed, args, like)

        # Outside of jit, `jax_debug_nans` looks at every operation. The engines compute NaN on the
        # way to a sum that has none, and would raise for losses that have none either.
        with jax.debug_nans(False):
            return on_mesh(summed, args, like, replicate=_replicate(loss_fn, divided, args))

    def summed(held: PyTree, batch: PyTree, mask: jax.Array) -> tuple[ClippedSum, PerExample]:
        params = held.shapes if isinstance(held, Held) else held
        size = mask.shape[0]
        sensitivity, unit = rule.sensitivity(), None
        options: dict[str, Any] = {}
        if secure_noise is not None:
            entries = sum(leaf.size for leaf in jax.tree.leaves(params))
            grid = secure.grid(sensitivity, secure_noise, entries)
            sensitivity, unit, options = grid.sensitivity, grid.unit, {"grid": grid}

        def made(total: PyTree) -> ClippedSum:
            return ClippedSum(total, sensitivity, unit=unit)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        if size == 0:  # of no example: the step is noise alone
            return made(zeros), _no_facts(rule, params)
        micro = microbatch_size or size
        if size % micro:
            raise ValueError(f"microbatch_size={micro} must divide the batch size {size}.")
        engine: Any = reference
        if method != "vmap":
            example = reference.example_of(batch)
            planned = make_plan(loss_fn, params, example)
            engine, options = bookkeeping, {"planned": planned}
            if microbatch_size is None:
                devices = devices_of(batch, size)
                sizes = memory.sizes_of(planned, params)
                micro = devices * memory.microbatch(sizes, size // devices)
        if micro == size:
            total, facts = engine.microbatch_sum(loss_fn, rule, held, batch, mask, **options)
            return made(total), facts

        def one(total: PyTree, i: jax.Array) -> tuple[PyTree, PerExample]:
            batch, mask = part(whole, i)
            return engine.microbatch_sum(loss_fn, rule, held, batch, mask, start=total, **options)

        if engine is bookkeeping:  # its sums are flat, because XLA copies what a loop reshapes
            zeros = jax.tree.map(jnp.ravel, zeros)
        whole = cut((batch, mask), micro)
        total, facts = jax.lax.scan(one, zeros, jnp.arange(size // micro))
        total = jax.tree.map(lambda sums, p: sums.reshape(p.shape), total, params)
        return made(total), _uncut(facts)

    return clipped_sum_fn


def _parameters(params: PyTree) -> PyTree:
    """Checks that every parameter can be differentiated, and makes arrays of Python floats."""

    def checked(path: Any, leaf: Any) -> Any:
        array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"parameter {name!r} is {array.dtype}; clipping needs real floating-point "
                "parameters. Close over what is not trained; split a complex parameter in two."
            )
        return array

    return jax.tree_util.tree_map_with_path(checked, params)


def _replicate(loss_fn: LossFn, divided: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether every device of the caller's mesh must compute the whole sum.

    The mesh may be one that comes to light later, see `may_be_divided`.

    Args:
        loss_fn: of one example.
        divided: the function of `args` that sums on divided batches.
        args: parameters, batch and mask.
    """
    if not may_be_divided(args):
        return False
    mesh = mesh_of(args)
    params, batch, _ = args
    example = reference.example_of(batch)
    explicit = mesh is not None and mesh.explicit_axes
    if explicit and closes_over_explicit(loss_fn, mesh, params, example):
        return True
    # XLA's partitioner miscompiles the gradient of a convolution's kernel for each example of a
    # sharded batch, a convolution with a group for each example: it gives the channels of one
    # example to another. (`jax.vmap(jax.grad(...))` alone shows it, on jax 0.10.2.) With groups of
    # other kinds it may stop the process.
    if not reference.differentiates_convolutions(loss_fn, params, batch):
        return False
    return reference.has_grouped_convolutions(jax.make_jaxpr(divided)(*args).jaxpr)


def _check_axes(args: PyTree) -> None:
    """Raises ValueError where JAX would add up gradients of different devices before clipping."""
    axes: set[Any] = set()
    for leaf in jax.tree.leaves(args):
        kind = jax.typeof(leaf)
        kind = getattr(kind, "manual_axis_type", kind)
        axes |= getattr(kind, "varying", getattr(kind, "vma", frozenset()))  # by JAX's version
    if axes:
        raise ValueError(
            f"clipped_sum inside of jax.shard_map over {sorted(map(str, axes))} needs "
            "check_vma=False: otherwise JAX adds up the gradients of all devices' examples before "
            "they are clipped."
        )


def _check_sizes(batch: PyTree, mask: jax.Array) -> None:
    kind = getattr(mask, "dtype", type(mask).__name__)
    if str(kind) != "bool" or mask.ndim != 1:
        shape = getattr(mask, "shape", None)
        raise TypeError(f"mask must be a bool array of shape [batch], got {kind} of shape {shape}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.shape(leaf)[:1] != mask.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"batch {name!r} of shape {jnp.shape(leaf)} must have one row for each of the "
                f"{mask.shape[0]} entries of mask."
            )


def _no_facts(rule: ClipRule, params: PyTree) -> PerExample:
    none, groups = jnp.zeros(0), jnp.zeros((0, rule.num_groups(params)))
    return PerExample(loss=none, norms=groups, factors=groups, real=jnp.zeros(0, bool))


def cut(tree: PyTree, size: int) -> PyTree:
    """Cuts leaves `[n, ...]` into `[size, n // size, ...]`; see `part`."""
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), tree)


def part(tree: PyTree, i: jax.Array) -> PyTree:
    """A microbatch of a batch that was cut: example k is part of microbatch k % (n // size).

    Microbatches of neighbors would make every device wait for one device's examples when the batch
    axis is sharded. To slice each out is to copy none of the others.
    """
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), tree)


def _uncut(tree: PyTree) -> PyTree:
    """Leaves `[n // size, size, ...]` of all microbatches, in the order of the examples."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
