"""Compares the clipping engines on the run's own model before the run spends any privacy."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp, files
from dpjax.build import Run
from dpjax.models import Params, TextSpec, finetune, int8
from dpjax.runtime import code_digest, compilation, sharding
from dpjax.runtime.gathering import at_use, held

__all__ = ["engines", "examples"]

_COUNT = 2  # examples; more would only round differently


def engines(run: Run) -> int:
    """Checks book-keeping clipping against vmap, once for each set of trained parameters.

    A program that was checked before, with the same code, leaves a file in the cache directory and
    is not checked again.

    Returns:
        The number of comparisons made.

    Raises:
        dp.EngineMismatch: the engines disagree; nothing was trained.
    """
    if run.rule is None or run.config.dp.method == "vmap":
        return 0
    batch, compared = examples(run), 0
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    trainings = {phase.training: phase.trainable for phase in run.phases}
    for trainable in trainings.values():
        trains, frozen = finetune.split(run.params, trainable)

        def loss(params: Params, frozen: Params, example: Any) -> jax.Array:
            return run.loss_fn(finetune.join(params, frozen), example)

        marker = files.cache_dir("engine") / _name(jax.make_jaxpr(loss)(trains, frozen, one))
        if files.caching() and marker.exists():
            continue
        # The frozen parameters are an argument: as constants they would slow the compiler down.
        engine = None if run.layout.spread is None else functools.partial(_gathering, run.layout)
        try:
            with run.layout.on_host():
                dp.check_engine(loss, trains, batch, frozen=frozen, engine=engine)
        except dp.EngineMismatch as error:
            raise dp.EngineMismatch(f"{error} In a config, that is dp.method='vmap'.") from error
        compared += 1
        if files.caching():
            with contextlib.suppress(OSError):  # a read-only home: it is compared in every run
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
    return compared


def _gathering(
    layout: sharding.Layout,
    loss: Callable[[Params, Params, Any], jax.Array],
    rule: dp.ClipRule,
    trains: Params,
    frozen: Params,
    batch: Any,
    mask: jax.Array,
) -> Any:
    """The book-keeping engine as a step has it under fsdp: parameters are gathered at each use.

    On one device of the host, which gathers from itself: a device of the run may not have room for
    the other engine's gradients.
    """
    axes = layout.axes_at_use(trains), layout.axes_at_use(frozen)

    def local(trains: Params, frozen: Params, batch: Any, mask: jax.Array) -> Any:
        def flipped(frozen: Params, params: Params, one: Any) -> jax.Array:
            return loss(params, frozen, one)

        late = at_use(flipped, frozen, axes[1], int8.marks(frozen))
        return dp.bookkeeping.microbatch_sum(late, rule, held(trains, axes[0]), batch, mask)

    here = sharding.partition(-1)
    mesh = sharding.make_mesh(jax.local_devices(backend="cpu")[:1])
    return jax.shard_map(local, mesh=mesh, in_specs=here, out_specs=here, check_vma=False)(
        trains, frozen, batch, mask
    )


def examples(run: Run) -> dict[str, jax.Array]:
    """Returns a few artificial examples in the shapes of the run's batches."""
    padding = run.train.batch(np.full(_COUNT, -1), seed=0, step=0)
    rng, spec = np.random.default_rng(0), run.model.input
    top = {
        "input": spec.vocab_size if isinstance(spec, TextSpec) else 256,
        "label": max(1, run.train.num_classes),
        "record": 2,
    }
    batch: dict[str, Any] = {
        name: jnp.asarray(rng.integers(0, top[name], x.shape).astype(x.dtype))
        for name, x in padding.items()
        if name in top
    }
    return {**batch, "key": jax.random.split(jax.random.key(0), _COUNT)}


def _name(jaxpr: Any) -> str:
    """A file name for a program under this code; addresses of Python objects are left out."""
    program = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))
    digest = hashlib.sha256(f"{code_digest()}\n{program}".encode())
    for array in compilation.arrays_of(jaxpr):  # the print has their shapes alone
        digest.update(compilation.content(array))
    return digest.hexdigest()
