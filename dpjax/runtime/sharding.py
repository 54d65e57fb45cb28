"""The mesh: one axis "data" over every device of every host. No other module names devices.

Batches are sharded over the axis. Parameters and optimizer state are replicated, or sharded over
the same axis ("fsdp") where a pattern matches their path. Small ones are gathered once, at the
start of a step, others at each use, see `gathering`. The gradient sum is scattered once, at the end
of a step (ZeRO, arXiv 1910.02054).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "AXIS",
    "Layout",
    "batch_sharding",
    "gather_leaves",
    "layout",
    "local_rows",
    "make_mesh",
    "memory_per_device",
    "partition",
    "place",
    "replicated",
    "sum_over_devices",
    "to_mesh",
]

PyTree = Any

AXIS = "data"
_LEAST = 2**12  # numbers of a parameter that is gathered at each use


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a run live.

    Attributes:
        mesh: from `make_mesh`.
        spread: pattern of the paths of sharded leaves; None replicates every leaf.
    """

    mesh: Mesh
    spread: re.Pattern[str] | None = None

    def axes(self, tree: PyTree) -> PyTree:
        """Returns the axis along which each leaf is sharded, -1 for a replicated leaf.

        A leaf is sharded if its path matches the pattern and an axis of it is divisible by the
        number of devices; the longest such axis is taken. Every suffix of the path is tried, so
        that "^blocks_0" also matches the moments of `blocks_0` deep in an optimizer's state.
        """
        return jax.tree_util.tree_map_with_path(self._axis, tree)

    def axes_at_use(self, tree: PyTree) -> PyTree:
        """Returns the axes of parameters as a step has them, which gathers them at each use.

        Small ones are replicated: a collective for each of their uses would cost more than room.
        """
        return jax.tree.map(
            lambda leaf, axis: axis if leaf.size >= _LEAST else -1, tree, self.axes(tree)
        )

    def place_frozen(self, tree: PyTree) -> PyTree:
        """Puts parameters that do not train, which every host holds in full, onto the mesh."""
        axes = self.axes_at_use(tree)
        return place(tree, jax.tree.map(lambda a: NamedSharding(self.mesh, partition(a)), axes))

    def on_host(self) -> contextlib.AbstractContextManager[Any]:
        """Lets JAX compute on the host, if parameters are sharded: a device may not hold them all.

        For what needs the whole model once: its first parameters and the checks before training.
        """
        if self.spread is None or jax.default_backend() == "cpu":
            return contextlib.nullcontext()
        return jax.default_device(jax.local_devices(backend="cpu")[0])

    def shardings(self, tree: PyTree) -> PyTree:
        """Returns the sharding of each leaf."""
        return jax.tree.map(lambda axis: NamedSharding(self.mesh, partition(axis)), self.axes(tree))

    def whole(self, tree: PyTree) -> PyTree:
        """Returns a replicated sharding for each leaf."""
        return jax.tree.map(lambda leaf: replicated(self.mesh), tree)

    def gather(self, tree: PyTree) -> PyTree:
        """Returns the tree with every leaf replicated."""
        return tree if self.spread is None else _gather(self)(tree)

    def for_steps(self, tree: PyTree) -> PyTree:
        """Returns the tree with those leaves replicated that are not gathered at each use."""
        if self.spread is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        small = [i for i, a in enumerate(jax.tree.leaves(self.axes_at_use(tree))) if a < 0]
        axes = jax.tree.leaves(self.axes(tree))
        found = _gather_along(self.mesh, tuple(axes[i] for i in small))([leaves[i] for i in small])
        for i, leaf in zip(small, found):
            leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves)

    def _axis(self, path: tuple[Any, ...], leaf: Any) -> int:
        # A key of a dict, a field of a NamedTuple, or an index: parameters are dicts, optimizer
        # states are NamedTuples of such dicts.
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        suffixes = ("/".join(keys[i:]) for i in range(len(keys)))
        if self.spread is None or not any(self.spread.search(suffix) for suffix in suffixes):
            return -1
        # The axis depends on the shape alone, so a parameter, its moments and its gradient sum,
        # which share a shape, are sharded alike.
        divisible = [i for i, n in enumerate(leaf.shape) if n and n % self.mesh.size == 0]
        return max(divisible, key=lambda i: leaf.shape[i], default=-1)


@functools.cache  # a new jit object for every step would compile again
def _gather(layout: Layout) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: gather_leaves(tree, layout.axes(tree), layout.mesh))


@functools.cache
def _gather_along(mesh: Mesh, axes: tuple[int, ...]) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda leaves: gather_leaves(leaves, list(axes), mesh))


def layout(text: str, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Makes a layout from "replicated", "fsdp", or "fsdp:REGEX" over parameter paths.

    Raises:
        ValueError: any other text, or REGEX is not a regular expression.
    """
    name, _, pattern = text.partition(":")
    if text not in ("replicated", "fsdp") and not (name == "fsdp" and pattern):
        raise ValueError(f"sharding={text!r} must be 'replicated', 'fsdp' or 'fsdp:REGEX'.")
    try:
        # "fsdp" alone has the empty pattern, which matches every path.
        spread = re.compile(pattern) if name == "fsdp" else None
    except re.error as error:
        raise ValueError(
            f"sharding={text!r} has an invalid regular expression: {error}."
        ) from error
    return Layout(make_mesh(devices), spread)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, all of them by default."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: with JAX's default, Explicit, Flax's attention cannot be traced under vmap.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def partition(axis: int) -> PartitionSpec:
    """Returns the spec of a leaf sharded along `axis`; -1 is replicated."""
    return PartitionSpec(*[None] * axis, AXIS) if axis >= 0 else PartitionSpec()


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, partition(-1))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is divided among the devices."""
    return NamedSharding(mesh, partition(0))


def memory_per_device(mesh: Mesh) -> int:
    """Returns the bytes that a program may use on one device of this host."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * stats["bytes_limit"])  # a tenth stays for fragmentation and live batches
    # CPU devices report no limit, and share the machine's memory with one another and with all
    # other processes: half of it is left to those.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // (2 * len(devices))


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts values that every host holds in full onto the mesh."""

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        # Not `jax.device_put`: across hosts it compares the values first, with a collective for
        # every leaf. Here each host copies its own slices and talks to nobody.
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def sum_over_devices(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Sums leaves `[devices, ...]`, sharded along their first axis, over the devices.

    Args:
        tree: one summand per device.
        axes: the axis of its sum along which each leaf is to be sharded, -1 for a replicated sum.
        mesh: from `make_mesh`.

    Returns:
        The sums, without the leading axis.

    Guarantees:
        Whatever the number of leaves: one all-reduce for all replicated sums of a dtype, and one
        reduce-scatter for all sharded ones, which have one dtype.
    """
    leaves, treedef = jax.tree.flatten(tree)
    sharded_axes = jax.tree.leaves(axes)

    # XLA merges the collectives of single leaves only up to a size that depends on the backend. A
    # collective per leaf would pay its latency per leaf, so all leaves travel as one vector.
    def local(*parts: jax.Array) -> list[jax.Array]:
        # x[0]: a device sees its own summand, with a leading axis of 1. The axis to shard moves to
        # the front, where one reshape cuts it into equal blocks, a row per receiving device.
        summands = [
            jnp.moveaxis(x[0], a, 0) if a >= 0 else x[0] for x, a in zip(parts, sharded_axes)
        ]
        replicated = [i for i, a in enumerate(sharded_axes) if a < 0]
        scattered = [i for i, a in enumerate(sharded_axes) if a >= 0]
        sums = dict(
            zip(
                replicated,
                _joined(lambda v: jax.lax.psum(v, AXIS), [summands[i] for i in replicated]),
            )
        )
        if scattered:
            rows = [summands[i].reshape(mesh.size, -1) for i in scattered]
            # Row d of the sum goes to device d, without the leading axis: this device's blocks of
            # all leaves, one after the other.
            own_blocks = jax.lax.psum_scatter(jnp.concatenate(rows, axis=1), AXIS)
            ends = np.cumsum([row.shape[1] for row in rows])[:-1]
            for i, block in zip(scattered, jnp.split(own_blocks, ends)):
                shape = (summands[i].shape[0] // mesh.size, *summands[i].shape[1:])
                sums[i] = jnp.moveaxis(block.reshape(shape), 0, sharded_axes[i])
        return [sums[i] for i in range(len(parts))]

    summed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=partition(0),
        out_specs=[partition(a) for a in sharded_axes],
    )(*leaves)
    return jax.tree.unflatten(treedef, summed)


def gather_leaves(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Replicates leaves that are sharded along `axes`, with one all-gather for all of them."""
    leaves, treedef = jax.tree.flatten(tree)
    sharded_axes = jax.tree.leaves(axes)
    sharded = [i for i, a in enumerate(sharded_axes) if a >= 0]

    def local(*parts: jax.Array) -> list[jax.Array]:
        # The inverse of the scatter above: the sharded axis moves to the front, so that the blocks
        # of all devices, one after the other, are the full leaf.
        own_blocks = {i: jnp.moveaxis(parts[i], sharded_axes[i], 0) for i in sharded}
        full_leaves = list(parts)
        vector = jnp.concatenate([x.ravel() for x in own_blocks.values()])
        rows = jax.lax.all_gather(vector, AXIS)  # [devices, a device's blocks of all leaves]
        ends = np.cumsum([x.size for x in own_blocks.values()])[:-1]
        for (i, x), columns in zip(own_blocks.items(), jnp.split(rows, ends, axis=1)):
            # `concatenate` promotes mixed dtypes to the widest; each leaf gets its own back.
            full = columns.reshape(x.shape[0] * mesh.size, *x.shape[1:]).astype(x.dtype)
            full_leaves[i] = jnp.moveaxis(full, 0, sharded_axes[i])
        return full_leaves

    if not sharded:
        return tree
    gathered = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(partition(a) for a in sharded_axes),
        out_specs=partition(-1),
        check_vma=False,  # every device ends with the same rows, which JAX cannot infer here
    )(*leaves)
    return jax.tree.unflatten(treedef, gathered)


def _joined(function: Any, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Applies an elementwise function of one vector to all arrays at once."""
    results = list(arrays)
    # A vector for each dtype: one of both kinds would round integers to floats.
    for kind in dict.fromkeys(x.dtype for x in arrays):
        places = [i for i, x in enumerate(arrays) if x.dtype == kind]
        vector = function(jnp.concatenate([arrays[i].ravel() for i in places]))
        ends = np.cumsum([arrays[i].size for i in places])[:-1]
        for i, part in zip(places, jnp.split(vector, ends)):
            results[i] = part.reshape(arrays[i].shape)
    return results


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Assembles a global batch from each host's `local_rows`, without copies between hosts."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Returns which rows of a `[size, ...]` batch this host must read, ascending."""
    # Asked of the sharding, not computed: JAX decides the order of the devices in the mesh.
    slices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in slices]))
