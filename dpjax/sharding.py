"""The mesh: one axis "data", over every device of every host. Nothing else names devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "AXIS",
    "batch_sharding",
    "local_rows",
    "make_mesh",
    "replicated",
    "to_mesh",
]

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, all of them by default."""
    devices = jax.devices() if devices is None else devices
    # Auto: the default, Explicit, does not trace Flax attention under vmap.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


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
