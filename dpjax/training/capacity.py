"""How many examples fit in memory, read from compiled programs before anything runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from dpjax.build import Run
from dpjax.data import Dataset, Units
from dpjax.models import Params
from dpjax.runtime import hosts, sharding
from dpjax.training import phases
from dpjax.training.feed import Chunk
from dpjax.training.phases import Prepared

__all__ = ["DoesNotFit", "estimate", "largest", "peak_bytes", "physical_batch"]


class DoesNotFit(ValueError):
    """Raised when even the smallest chunk does not fit."""


def physical_batch(
    config: ConfigDict, prepared: Sequence[Prepared], params: Params, train: Dataset | Units
) -> int:
    """Returns the rows of a physical chunk: the config's number, or for "auto" as many as fit.

    The number is rounded up to whole microbatches on every device.

    Args:
        config: of the run.
        prepared: its phases.
        params: all parameters.
        train: the training data.

    Raises:
        DoesNotFit: even the smallest chunk does not fit.
    """
    mesh = prepared[0].layout.mesh
    unit = mesh.size * (config.microbatch or 1)
    if config.physical_batch != "auto":
        return -(-config.physical_batch // unit) * unit
    # A Poisson batch varies with standard deviation sqrt(B): with two of them on top, few batches
    # need one more chunk.
    largest_batch = max(one.phase.batch_size for one in prepared)
    enough = min(largest_batch + 2 * math.sqrt(largest_batch), len(train))
    limit = sharding.memory_per_device(mesh)
    needs = [peak_bytes(one, params, train) for one in prepared]
    # Hosts with different memory would disagree; host 0 decides, so that all cut alike.
    return int(hosts.first(min(largest(need, limit, unit, enough) for need in needs)))


def largest(need: Callable[[int], int], limit: int, unit: int, enough: float) -> int:
    """Returns the chunk size that covers `enough` rows with the fewest equal chunks that fit.

    Args:
        need: bytes that a chunk of n rows needs; slow (it compiles), and close to linear in n.
        limit: bytes available on a device.
        unit: the size is a multiple of it.
        enough: rows of one step.

    Raises:
        DoesNotFit: `unit` rows do not fit.
    """
    low, high = need(unit), need(4 * unit)
    if low > limit:
        raise DoesNotFit(
            f"physical_batch='auto': {unit} rows need {low:,} bytes per device, of {limit:,}. Set "
            "microbatch, train fewer parameters, or use sharding='fsdp'."
        )
    # Two compilations give the line through need(unit) and need(4 unit). It says how many chunks to
    # try first; the loop then checks the exact size, and rarely compiles more than once.
    slope = max(1.0, (high - low) / (3 * unit))
    fits = unit + (limit - low) / slope
    count = max(1, math.ceil(enough / fits))
    while True:
        size = math.ceil(enough / count / unit) * unit
        if size <= unit or need(size) <= limit:
            return size
        count += 1


def peak_bytes(prepared: Prepared, params: Params, train: Dataset | Units) -> Callable[[int], int]:
    """Returns `rows of a chunk -> bytes that a phase needs on one device`."""
    steps, hyper, layout = prepared.steps, prepared.hyper, prepared.layout
    mesh = layout.mesh
    by_row = sharding.batch_sharding(mesh)

    def like(tree: Any, places: Any) -> Any:
        if isinstance(places, NamedSharding):
            places = jax.tree.map(lambda x: places, tree)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    state = phases.checkpoint_like(prepared, params)["state"]
    trainable, frozen = prepared.split(params)
    axes = layout.axes_at_use(trainable), layout.axes_at_use(frozen)
    places = jax.tree.map(lambda axis: NamedSharding(mesh, sharding.partition(axis)), axes)
    parts = like((trainable, frozen), places)
    totals = like(jax.eval_shape(steps.begin, state)[1], by_row)
    update = _program_bytes(steps.update, state, totals, hyper)
    # Held in memory while a chunk runs, but not among its arguments. Replicated parameters are
    # among them; under fsdp the chunk gets gathered copies of small ones, so the shards count too.
    resident = _bytes(state) if layout.spread else _bytes((state.opt, state.average))

    def need(size: int) -> int:
        batch = _made_batch(train, size)
        step = jnp.zeros((), jnp.int32)
        chunk = _program_bytes(steps.accumulate, totals, *parts, like(batch, by_row), step, hyper)
        return max(resident + chunk, update)

    return need


def _made_batch(train: Dataset | Units, size: int) -> dict[str, np.ndarray]:
    """A chunk of zeros, none of them padding, in the shapes of the data."""
    padding = train.batch(np.full(1, -1), seed=0, step=0)
    batch = {name: np.zeros((size, *x.shape[1:]), x.dtype) for name, x in padding.items()}
    return {**batch, "mask": np.ones(size, bool)}


def estimate(run: Run) -> tuple[float, int]:
    """Estimates time and memory of a run: executes up to two chunks of every phase, on made data.

    All chunks of a step take equally long, so that steps of one and of two chunks tell how long any
    step takes. The noise has a seed of its own, 0.

    Returns:
        Seconds of all steps, without compilation, reading and evaluation; and the bytes that they
        need on one device.
    """
    prepared = phases.prepare(run, 0)
    size = physical_batch(run.config, prepared, run.params, run.train)
    seconds, most = 0.0, 0
    for one in prepared:
        most = max(most, peak_bytes(one, run.params, run.train)(size))
        chunks = max(1, math.ceil(one.phase.batch_size / size))
        took = [_step_seconds(one, run, size, count) for count in range(1, min(chunks, 2) + 1)]
        further = max(0.0, took[-1] - took[0]) * (chunks - 1)
        seconds += one.phase.steps * (took[0] + further)
    return seconds, most


def _step_seconds(prepared: phases.Prepared, run: Run, size: int, chunks: int) -> float:
    """Seconds of a step of so many chunks of `size` rows, compiled before."""
    frozen, state = prepared.begin(run.params, None)
    local = sharding.local_rows(size, prepared.layout.mesh)
    batch = {name: x[local] for name, x in _made_batch(run.train, size).items()}
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        feed = [Chunk(batch, size, False)] * (chunks - 1) + [Chunk(batch, size, True)]
        state, facts, _ = prepared.execute(state, frozen, 0, iter(feed))
        jax.block_until_ready((state, facts))
    return time.perf_counter() - began


def _bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _program_bytes(function: Any, *arguments: Any) -> int:
    """Bytes of a jitted function's arguments, results and temporaries on one device."""
    # Compiling on abstract arguments allocates nothing. Donated buffers ("alias") are arguments and
    # results at once, and are counted once.
    sizes = function.lower(*arguments).compile().memory_analysis()
    return int(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
