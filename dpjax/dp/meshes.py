"""Functions of one device on the caller's mesh.

`jax.make_mesh` gives Explicit axes by default: the type of an array then says how it is sharded,
and an operation whose result JAX cannot place is an error. A loss written for one example on one
device leaves placement to the compiler, and so do the engines; Auto axes do exactly that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["closes_over_explicit", "devices_of", "may_be_divided", "mesh_of", "on_mesh"]

PyTree = Any


def on_mesh(
    function: Callable[..., Any], args: tuple[Any, ...], like: PyTree, *, replicate: bool = False
) -> Any:
    """Calls the function such that Explicit mesh axes of its arguments are Auto inside of it.

    Args:
        function: maps trees of arrays to a tree of arrays.
        args: its arguments.
        like: a prefix of that tree, an array for each result (or tree of results): on Explicit
            axes a result is sharded as that array is.
        replicate: gathers the arguments and lets every device compute everything. Explicit axes
            stay Explicit then. Without a mesh, see `may_be_divided`.

    Returns:
        The results. Without a mesh, or inside of `shard_map`, those of the plain call.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return _undivided(function, args) if replicate else function(*args)
    if not (mesh.explicit_axes or replicate):
        return jax.jit(function)(*args)
    out = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), like)
    whole = NamedSharding(mesh, PartitionSpec())

    def replicated(*args: Any) -> Any:
        if not mesh.explicit_axes:
            held = jax.lax.with_sharding_constraint(args, whole)
            return jax.lax.with_sharding_constraint(function(*held), whole)
        args = jax.sharding.reshard(args, whole)
        with jax.sharding.use_abstract_mesh(mesh):
            results = function(*args)
        return jax.sharding.reshard(results, out)

    auto = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)
    # Outside of jit, JAX asks for the mesh as a context, which a caller need not have entered. A
    # new jit object each time: `function` may close over what has changed since.
    return jax.jit(replicated if replicate else auto)(*args)


def _undivided(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Calls the function such that each device of a mesh that comes to light later computes it all.

    A constraint needs the mesh; an operation that XLA may not partition does not.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    # Such an operation takes plain arrays, and nothing else from outside.
    inputs = [jnp.asarray(x) for x in (*closed.consts, *jax.tree.leaves(args))]
    are_keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in inputs]
    kinds = [jax.random.key_impl(x) if key else None for x, key in zip(inputs, are_keys)]

    def plain(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        own = [
            jax.random.wrap_key_data(x, impl=kind) if key else x
            for x, key, kind in zip(arrays, are_keys, kinds)
        ]
        consts, leaves = own[: len(closed.consts)], own[len(closed.consts) :]
        return tuple(core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))(*leaves))

    def everywhere(mesh: Any, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)

    def partition(mesh: Any, args: PyTree, results: PyTree) -> tuple[Any, ...]:
        return mesh, plain, everywhere(mesh, results), everywhere(mesh, args)

    axes = itertools.count()

    def names(arrays: list[Any]) -> str:
        return ", ".join(" ".join(f"d{next(axes)}" for _ in x.shape) for x in arrays)

    arrays = [jax.random.key_data(x) if key else x for x, key in zip(inputs, are_keys)]
    rule = f"{names(arrays)} -> {names(jax.tree.leaves(shapes))}"
    whole = custom_partitioning(plain)
    whole.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, args, results: everywhere(mesh, results),
        sharding_rule=rule,
        need_replication_factors=tuple(f"d{i}" for i in range(next(axes))),
    )
    # JAX does not know what such an operation is under vmap.
    batched = jax.custom_batching.custom_vmap(lambda *arrays: whole(*arrays))

    @batched.def_vmap
    def _(size: int, are_batched: Any, *arrays: jax.Array) -> Any:
        every = jax.vmap(plain, [0 if own else None for own in are_batched])
        results = _undivided(every, arrays)
        return results, (True,) * len(results)

    return jax.tree.unflatten(jax.tree.structure(shapes), batched(*arrays))


def may_be_divided(tree: PyTree) -> bool:
    """Whether the leaves may be divided among devices for all that JAX knows while it traces.

    `jax.jit(step, in_shardings=...)` divides arrays that were on no mesh, and does not tell.
    """
    if mesh_of(tree) is not None:
        return True
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
    return traced and jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty


def mesh_of(tree: PyTree) -> Any:
    """The abstract mesh of the leaves, or else of the context; None if no axis is to be sharded."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    for mesh in [*meshes, jax.sharding.get_abstract_mesh()]:
        if not mesh.empty and set(mesh.axis_types) != {AxisType.Manual}:
            return mesh
    return None


def devices_of(tree: PyTree, n: int) -> int:
    """How many devices of the leaves' mesh `n` examples may be divided among; 1 without a mesh.

    With Auto axes nobody knows before compilation whether they are. Axes of a `shard_map` do not
    count: each of their devices has its own examples.
    """
    mesh = mesh_of(tree)
    if mesh is None:
        return 1
    own = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual]
    return math.gcd(n, math.prod(mesh.shape[name] for name in own))


def closes_over_explicit(function: Callable[..., Any], mesh: Any, *args: PyTree) -> bool:
    """Whether the function of some abstract values uses arrays of its own with Explicit axes.

    JAX refuses to mix those with Auto axes.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with jax.sharding.use_abstract_mesh(mesh):
        consts = jax.make_jaxpr(function)(*like).consts
    return any(jax.typeof(c).sharding.mesh.explicit_axes for c in consts if hasattr(c, "shape"))
