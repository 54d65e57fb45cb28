"""The mesh: one axis "data", over every device of every host. Nothing else names devices.

Batches are spread over the axis. Parameters and optimiser state are whole on every device, or
spread over the same axis by a rule over their paths: they are then gathered at the start of a step
and the sum of gradients is scattered at its end, once each (ZeRO, arXiv 1910.02054).
"""

from __future__ import annotations

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a run live.

    Attributes:
        mesh: from `make_mesh`.
        spread: which leaves are spread over the devices, by their paths; None for none of them.
    """

    mesh: Mesh
    spread: re.Pattern[str] | None = None

    def axes(self, tree: PyTree) -> PyTree:
        """Returns the axis along which each leaf is spread, -1 for a leaf that is whole.

        A leaf is spread if the pattern is found in its path (or in an end of it, so that
        "^blocks_0" also finds the moments of `blocks_0` in an optimiser's state) and one of its
        axes, the longest of them, can be cut into equal parts.
        """
        return jax.tree_util.tree_map_with_path(self._axis, tree)

    def shardings(self, tree: PyTree) -> PyTree:
        """Returns the sharding of each leaf."""
        return jax.tree.map(lambda axis: NamedSharding(self.mesh, partition(axis)), self.axes(tree))

    def whole(self, tree: PyTree) -> PyTree:
        """Returns, for each leaf, the sharding of a leaf that is whole on every device."""
        return jax.tree.map(lambda leaf: replicated(self.mesh), tree)

    def gather(self, tree: PyTree) -> PyTree:
        """Returns the tree with every leaf whole on every device."""
        return tree if self.spread is None else _gather(self)(tree)

    def _axis(self, path: tuple[Any, ...], leaf: Any) -> int:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        if self.spread is None or not any(self.spread.search(end) for end in ends):
            return -1
        even = [i for i, n in enumerate(leaf.shape) if n and n % self.mesh.size == 0]
        return max(even, key=lambda i: leaf.shape[i], default=-1)


@functools.cache
def _gather(layout: Layout) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: gather_leaves(tree, layout.axes(tree), layout.mesh))


def layout(text: str, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Makes a layout from "replicated", "fsdp", or "fsdp:REGEX" over parameter paths.

    Raises:
        ValueError: any other text, or no regular expression.
    """
    name, _, pattern = text.partition(":")
    if text not in ("replicated", "fsdp") and not (name == "fsdp" and pattern):
        raise ValueError(f"sharding={text!r} must be 'replicated', 'fsdp' or 'fsdp:REGEX'.")
    try:
        spread = re.compile(pattern) if name == "fsdp" else None
    except re.error as error:
        raise ValueError(f"sharding={text!r} holds no regular expression: {error}.") from error
    return Layout(make_mesh(devices), spread)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, all of them by default."""
    devices = jax.devices() if devices is None else devices
    # Auto: the default, Explicit, does not trace Flax attention under vmap.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def partition(axis: int) -> PartitionSpec:
    """Returns the spec of a leaf spread along `axis`; -1 is nowhere."""
    return PartitionSpec(*[None] * axis, AXIS) if axis >= 0 else PartitionSpec()


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, partition(-1))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is spread over the devices."""
    return NamedSharding(mesh, partition(0))


def memory_per_device(mesh: Mesh) -> int:
    """Returns the bytes that a program may take on one device of this host."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * stats["bytes_limit"])
    # Host devices share the memory of the machine with everything else.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // (2 * len(devices))


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts values that every host holds onto the mesh, without any host asking another."""

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def sum_over_devices(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Sums leaves `[devices, ...]`, spread along their first axis, over the devices.

    Args:
        tree: one summand per device.
        axes: along which axis of its sum each leaf is to be spread, -1 for a whole sum.
        mesh: from `make_mesh`.

    Returns:
        The sums, without the leading axis.

    Guarantees:
        Whatever the number of leaves, one all-reduce for those that stay whole and one
        reduce-scatter for those that are spread. (XLA merges the collectives of single leaves
        only up to a size that depends on the backend, so the leaves travel as one vector.)
    """
    leaves, treedef = jax.tree.flatten(tree)
    along = jax.tree.leaves(axes)

    def local(*parts: jax.Array) -> list[jax.Array]:
        # The axis to cut comes first, so that a device's pieces of all leaves are one row.
        moved = [jnp.moveaxis(x[0], a, 0) if a >= 0 else x[0] for x, a in zip(parts, along)]
        whole = [i for i, a in enumerate(along) if a < 0]
        cut = [i for i, a in enumerate(along) if a >= 0]
        sums = dict(zip(whole, _joined(lambda v: jax.lax.psum(v, AXIS), [moved[i] for i in whole])))
        if cut:
            rows = [moved[i].reshape(mesh.size, -1) for i in cut]
            mine = jax.lax.psum_scatter(jnp.concatenate(rows, axis=1), AXIS)
            ends = np.cumsum([row.shape[1] for row in rows])[:-1]
            for i, piece in zip(cut, jnp.split(mine, ends)):
                shape = (moved[i].shape[0] // mesh.size, *moved[i].shape[1:])
                sums[i] = jnp.moveaxis(piece.reshape(shape), 0, along[i])
        return [sums[i] for i in range(len(parts))]

    summed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=partition(0),
        out_specs=[partition(a) for a in along],
        check_vma=False,
    )(*leaves)
    return jax.tree.unflatten(treedef, summed)


def gather_leaves(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Makes leaves that are spread along `axes` whole on every device: one all-gather for all."""
    leaves, treedef = jax.tree.flatten(tree)
    along = jax.tree.leaves(axes)
    cut = [i for i, a in enumerate(along) if a >= 0]

    def local(*parts: jax.Array) -> list[jax.Array]:
        moved = {i: jnp.moveaxis(parts[i], along[i], 0) for i in cut}
        whole = list(parts)
        mine = jnp.concatenate([x.ravel() for x in moved.values()])
        rows = jax.lax.all_gather(mine, AXIS)  # [devices, this device's pieces of all leaves]
        ends = np.cumsum([x.size for x in moved.values()])[:-1]
        for (i, x), piece in zip(moved.items(), jnp.split(rows, ends, axis=1)):
            full = piece.reshape(x.shape[0] * mesh.size, *x.shape[1:]).astype(x.dtype)
            whole[i] = jnp.moveaxis(full, 0, along[i])
        return whole

    if not cut:
        return tree
    gathered = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(partition(a) for a in along),
        out_specs=partition(-1),
        check_vma=False,
    )(*leaves)
    return jax.tree.unflatten(treedef, gathered)


def _joined(function: Any, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Applies a function of one vector to all the arrays at once."""
    if not arrays:
        return []
    vector = function(jnp.concatenate([x.ravel() for x in arrays]))
    ends = np.cumsum([x.size for x in arrays])[:-1]
    return [p.reshape(x.shape) for p, x in zip(jnp.split(vector, ends), arrays)]


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Puts this host's rows of a batch on its devices; every host passes its own rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Returns which rows of a `[size, ...]` batch this host must read, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in slices]))
