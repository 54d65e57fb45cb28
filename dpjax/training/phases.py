"""Turns a phase of a run into jitted functions and traced values, and describes its checkpoints.

A *training* is a stretch with one set of trainable parameters and one optimizer state: linear
probing is one, fine-tuning the next. A training with a schedule of batch sizes or clip bounds has
several *phases*; within it the train state is handed on unchanged.
"""

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


# Phases of one training differ in traced values only. With the same jitted functions (same loss,
# optimizer and layout objects), the second phase compiles nothing. Two entries: `capacity` goes
# through all phases before the loop does, and a run has two trainings at most.
_make_steps = functools.lru_cache(maxsize=2)(make_steps)


def prepare(run: Run, index: int, private_seed: int) -> tuple[Steps, Hyper]:
    """Returns the jitted functions of a phase, and its traced values.

    Args:
        run: contains the phase.
        index: number of the phase.
        private_seed: the run's secret seed.
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
    # Keys are folded with the number of the training, not of the phase. The noise transform counts
    # its draws in the optimizer state; a new training starts at 0 again and would repeat the noise
    # of the previous one under the same key. A new phase of the same training goes on counting.
    hyper = Hyper(
        # Traced arrays, not attributes of the functions: a sweep over rates or epsilon compiles
        # once.
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
        # Of the gradient alone: with an adaptive bound, the count query takes its share of the
        # accounted multiplier (see `dp.adaptive`).
        noise_multiplier=jnp.asarray(mechanism.gradient_noise_multiplier, jnp.float32),
        rule=dataclasses.replace(run.rule, threshold=phase.bound),
        noise_key=jax.random.fold_in(seeds.noise_key(private_seed), phase.training),
    )
    if mechanism.count_noise is not None:
        hyper = hyper._replace(
            adaptive=run.adaptive,
            count_noise=jnp.asarray(mechanism.count_noise, jnp.float32),
            # Not folded with the training: the step folds in its own number, which counts over all
            # phases and never restarts.
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
        run: contains the phase.
        index: number of the phase.
        params: all parameters, as the previous phase left them.
        before: last state of the previous phase; None for the first phase.
        private_seed: the run's secret seed.
        restored: `before` is a state of this phase itself, from a checkpoint.

    Returns:
        `(execute, frozen parameters, initial state)`. `execute(state, step, chunks)` runs one step
        over the next chunks of an iterator, through the last chunk of the step. It donates the
        state and returns the next one, the facts of the step (still on the devices), and the
        number of rows of its chunks.
    """
    phase, layout = run.phases[index], run.layout
    steps, hyper = prepare(run, index, private_seed)
    trainable, frozen = finetune.split(params, phase.trainable)
    frozen = sharding.place(frozen, layout.whole(frozen))
    same_training = run.phases[index - 1].training == phase.training
    if before is not None and (restored or same_training):
        state = before  # moments, noise counter and learning-rate schedule all go on
    else:
        # `place` copies from the host: `update` donates the state, and the caller still needs its
        # parameters.
        state = steps.init(sharding.place(trainable, layout.shardings(trainable)), hyper)
        if before is not None:
            state = carry_over(state, before, moments=phase.keep_optimizer)

    def execute(
        state: TrainState, step: int, chunks: Iterator[Chunk]
    ) -> tuple[TrainState, dict[str, jax.Array], int]:
        trainable, totals = steps.begin(state)
        at_step = at_bound(hyper, state)
        number = jnp.asarray(step, jnp.int32)  # an array: a Python int would recompile
        while True:
            chunk = next(chunks)  # raises if the iterator ends within the step
            batch = sharding.to_mesh(chunk.batch, layout.mesh)
            totals = steps.accumulate(totals, trainable, frozen, batch, number, at_step)
            if chunk.last:
                break
        state, facts = steps.update(state, totals, hyper)
        return state, facts, chunk.rows

    return execute, frozen, state


def trained_before(run: Run, index: int, frozen: Params) -> Params:
    """Returns the frozen leaves of a phase that an earlier phase trained.

    A checkpoint stores them beside the state: all other frozen leaves are those of `run.params`,
    which a resumed process builds again from the config.
    """
    predicates = [phase.trainable for phase in run.phases[:index]]
    return unflatten({k: v for k, v in flatten(frozen).items() if any(p(k) for p in predicates)})


def checkpoint_like(run: Run, index: int, private_seed: int) -> dict[str, Any]:
    """Returns the shapes, dtypes and shardings of a phase's checkpoint, {"state", "earlier"}.

    A checkpoint is restored into shardings, so it may have been written on another number of
    devices.
    """
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
