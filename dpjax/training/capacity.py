"""How many examples fit: read off compiled programs, not found out by running out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.build import Run
from dpjax.models import finetune
from dpjax.runtime import hosts, sharding
from dpjax.training import phases

__all__ = ["DoesNotFit", "largest", "peak_bytes", "physical_batch"]


class DoesNotFit(ValueError):
    """Raised when not even the smallest chunk fits."""


def physical_batch(run: Run, private_seed: int) -> int:
    """Returns the number of rows of a chunk: the config's, or for "auto" as many as fit.

    It is a multiple of whole microbatches on every device.

    Raises:
        DoesNotFit: not even the smallest chunk does.
    """
    config, layout = run.config, run.layout
    unit = layout.mesh.size * (config.microbatch or 1)
    if config.physical_batch != "auto":
        return -(-config.physical_batch // unit) * unit
    # Two standard deviations of the size of a Poisson batch: few batches need a chunk more.
    largest_batch = max(phase.batch_size for phase in run.phases)
    enough = min(largest_batch + 2 * math.sqrt(largest_batch), len(run.train))
    limit = sharding.memory_per_device(layout.mesh)
    needs = [peak_bytes(run, index, private_seed) for index in range(len(run.phases))]
    return int(hosts.first(min(largest(need, limit, unit, enough) for need in needs)))


def largest(need: Callable[[int], int], limit: int, unit: int, enough: float) -> int:
    """Returns the size of the fewest equal chunks that hold `enough` rows and fit.

    Args:
        need: bytes that a chunk of n rows needs; dear to call, and close to linear in n.
        limit: bytes there are.
        unit: sizes are multiples of it.
        enough: rows of one step.

    Raises:
        DoesNotFit: `unit` rows do not.
    """
    low, high = need(unit), need(4 * unit)
    if low > limit:
        raise DoesNotFit(
            f"physical_batch='auto': {unit} rows need {low:,} bytes a device of {limit:,}. Set a "
            "microbatch, train fewer parameters, or take sharding='fsdp'."
        )
    slope = max(1.0, (high - low) / (3 * unit))
    fits = unit + (limit - low) / slope
    count = max(1, math.ceil(enough / fits))
    while True:
        size = math.ceil(enough / count / unit) * unit
        if size <= unit or need(size) <= limit:
            return size
        count += 1


def peak_bytes(run: Run, index: int, private_seed: int) -> Callable[[int], int]:
    """Returns the function from the rows of a chunk to the bytes that a phase needs on a device."""
    steps, hyper = phases.prepare(run, index, private_seed)
    mesh = run.layout.mesh
    spread, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def like(tree: Any, place: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    state = phases.checkpoint_like(run, index, private_seed)["state"]
    params = like(finetune.split(run.params, run.phases[index].trainable), whole)
    totals = like(jax.eval_shape(steps.begin, state)[1], spread)
    update = _program_bytes(steps.update, state, totals, hyper)
    resident = _bytes(state) if run.layout.spread else _bytes((state.opt, state.average))

    def need(size: int) -> int:
        batch = {
            "input": np.zeros((size, *run.train.shape), run.train.source.dtype),
            "label": np.zeros(size, np.int32),
            "identity": np.zeros(size, np.uint32),
            "mask": np.zeros(size, bool),
        }
        step = jnp.zeros((), jnp.int32)
        chunk = _program_bytes(steps.accumulate, totals, *params, like(batch, spread), step, hyper)
        return max(resident + chunk, update)

    return need


def _bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _program_bytes(function: Any, *arguments: Any) -> int:
    """Bytes of a jitted function's arguments, results and temporaries on one device."""
    sizes = function.lower(*arguments).compile().memory_analysis()
    return int(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
