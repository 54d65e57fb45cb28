"""Functions of one device on the caller's mesh.

`jax.make_mesh` gives Explicit axes by default: the type of an array then says how it is sharded,
and an operation whose result JAX cannot place is an error. A loss written for one example on one
device leaves placement to the compiler, and so do the engines; Auto axes do exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["closes_over_explicit", "devices_of", "mesh_of", "on_mesh"]

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
            stay Explicit then.

    Returns:
        The results. Without a mesh, or inside of `shard_map`, those of the plain call.
    """
    mesh = mesh_of(args)
    if mesh is None:
        return function(*args)
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
