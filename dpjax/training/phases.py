"""A phase of a run made executable, and what its checkpoints hold."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.build import Run
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, unflatten
from dpjax.runtime import sharding
from dpjax.step import Hyper, Steps, TrainState, at_bound, carry_over, make_steps
from dpjax.training.feed import Chunk

__all__ = ["Execute", "begin", "checkpoint_like", "prepare", "spans", "trained_before"]

Execute = Callable[[TrainState, int, Iterator[Chunk]], tuple[TrainState, dict[str, jax.Array], int]]


# Phases of one training differ in traced values alone: the second compiles nothing.
_make_steps = functools.lru_cache(maxsize=2)(make_steps)


def prepare(run: Run, index: int, private_seed: int) -> tuple[Steps, Hyper]:
    """Makes the functions of a phase, and its traced values.

    Each training has keys of its own; the phases of one training share them, for they share the
    counters, too.
    """
    config, phase = run.config, run.phases[index]
    steps = _make_steps(
        run.loss_fn,
        phase.optimizer,
        run.layout,
        private=run.rule is not None,
        method=config.dp.method if config.dp is not None else "auto",
        microbatch_size=config.microbatch,
    )
    hyper = Hyper(
        learning_rate=jnp.asarray(phase.learning_rate, jnp.float32),
        noise_multiplier=jnp.zeros((), jnp.float32),
        rule=None,
        noise_key=None,
        augment_key=jax.random.fold_in(seeds.public_key(config.seed, "augment"), phase.training),
        batch_size=jnp.asarray(phase.batch_size, jnp.float32),
        ema_decay=jnp.asarray(config.ema, jnp.float32) if config.ema else None,
    )
    mechanism = phase.mechanism
    if mechanism is None or run.rule is None:
        return steps, hyper
    hyper = hyper._replace(
        noise_multiplier=jnp.asarray(mechanism.gradient_noise_multiplier, jnp.float32),
        rule=dataclasses.replace(run.rule, threshold=phase.bound),
        noise_key=jax.random.fold_in(seeds.noise_key(private_seed), phase.training),
    )
    if mechanism.count_noise is not None:
        hyper = hyper._replace(
            adaptive=run.adaptive,
            count_noise=jnp.asarray(mechanism.count_noise, jnp.float32),
            count_key=seeds.noise_key(private_seed, "count"),
        )
    return steps, hyper


def spans(run: Run) -> list[range]:
    """Returns the numbers of the steps of each phase, counted over all phases."""
    ends = itertools.accumulate(phase.steps for phase in run.phases)
    return [range(end - phase.steps, end) for phase, end in zip(run.phases, ends, strict=True)]


def begin(
    run: Run,
    index: int,
    params: Params,
    before: TrainState | None,
    *,
    private_seed: int,
    restored: bool = False,
) -> tuple[Execute, Params, TrainState]:
    """Makes a phase executable.

    Args:
        run: its phases.
        index: of the phase.
        params: all parameters, as the phase before it left them.
        before: the state in which the phase before it ended; None for the first one.
        private_seed: of the run.
        restored: `before` is a state of this phase, from a checkpoint.

    Returns:
        `(execute, frozen parameters, first state)`. `execute(state, step, chunks)` runs one step
        over the next chunks of an iterator, up to the last of the step. It returns the next state
        and, still on the devices, the facts of the step, and the rows of its chunks. It donates
        the state.
    """
    phase, layout = run.phases[index], run.layout
    steps, hyper = prepare(run, index, private_seed)
    trainable, frozen = finetune.split(params, phase.trainable)
    frozen = sharding.place(frozen, layout.whole(frozen))
    goes_on = restored or run.phases[index - 1].training == phase.training
    if before is None or not goes_on:
        state = steps.init(sharding.place(trainable, layout.shardings(trainable)), hyper)
        if before is not None:
            state = carry_over(state, before, moments=phase.keep_optimizer)
    else:
        state = before

    def execute(
        state: TrainState, step: int, chunks: Iterator[Chunk]
    ) -> tuple[TrainState, dict[str, jax.Array], int]:
        whole, totals = steps.begin(state)
        now, number = at_bound(hyper, state), jnp.asarray(step, jnp.int32)
        while True:
            chunk = next(chunks)  # fails if the step is cut short
            batch = sharding.to_mesh(chunk.batch, layout.mesh)
            totals = steps.accumulate(totals, whole, frozen, batch, number, now)
            if chunk.last:
                break
        state, facts = steps.update(state, totals, hyper)
        return state, facts, chunk.rows

    return execute, frozen, state


def trained_before(run: Run, index: int, frozen: Params) -> Params:
    """Returns the frozen leaves of a phase that an earlier phase has trained."""
    predicates = [phase.trainable for phase in run.phases[:index]]
    return unflatten({k: v for k, v in flatten(frozen).items() if any(p(k) for p in predicates)})


def checkpoint_like(run: Run, index: int, private_seed: int) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of a checkpoint in a phase: `state` and `earlier`."""
    steps, hyper = prepare(run, index, private_seed)
    trainable, frozen = finetune.split(run.params, run.phases[index].trainable)
    state = jax.eval_shape(steps.init, trainable, hyper)
    earlier = trained_before(run, index, frozen)
    like: dict[str, Any] = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"state": state, "earlier": earlier},
        {"state": run.layout.shardings(state), "earlier": run.layout.whole(earlier)},
    )
    return like
