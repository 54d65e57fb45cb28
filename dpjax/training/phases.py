"""Turns the phases of a run into jitted functions and traced values, and describes checkpoints.

A *training* is a stretch with one set of trainable parameters and one optimizer state: linear
probing is one, fine-tuning the next. A training with a schedule of batch sizes or clip bounds has
several *phases*; within it the train state is handed on unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.build import Run, TrainingPhase
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, unflatten
from dpjax.runtime import sharding
from dpjax.runtime.sharding import Layout
from dpjax.step import Hyper, Steps, TrainState, at_bound, carry_over, make_steps
from dpjax.training.feed import Chunk

__all__ = ["Prepared", "checkpoint_like", "prepare"]


class Prepared(NamedTuple):
    """A phase that is ready to run.

    Attributes:
        phase: the phase to execute.
        span: its step numbers, counted over all phases.
        steps: its jitted functions.
        hyper: its traced values.
        layout: where parameters, state and batches live.
        continues: whether it continues the training of the previous phase, from its last state.
        trained: maps a parameter's path to whether an earlier phase trains it.
    """

    phase: TrainingPhase
    span: range
    steps: Steps
    hyper: Hyper
    layout: Layout
    continues: bool
    trained: Callable[[str], bool]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters into trainable and frozen ones of this phase."""
        return finetune.split(params, self.phase.trainable)

    def earlier(self, frozen: Params) -> Params:
        """Returns the frozen leaves that an earlier phase trained.

        A checkpoint stores them beside the state. All other frozen leaves have their initial
        values, which a resumed process builds again from the config.
        """
        return unflatten({k: v for k, v in flatten(frozen).items() if self.trained(k)})

    def begin(
        self, params: Params, before: TrainState | None, *, restored: bool = False
    ) -> tuple[Params, TrainState]:
        """Returns the frozen parameters, on the devices, and the initial state of the phase.

        Args:
            params: all parameters after the previous phase.
            before: last state of the previous phase; None for the first phase.
            restored: whether `before` is a state of this very phase, from a checkpoint.
        """
        trainable, frozen = self.split(params)
        frozen = self.layout.place_frozen(frozen)
        if before is not None and (restored or self.continues):
            return frozen, before  # with its moments, noise counter and place in the schedule
        # `place` copies from the host: `update` donates the state, and the caller still needs its
        # parameters.
        placed = sharding.place(trainable, self.layout.shardings(trainable))
        state = self.steps.init(placed, self.hyper)
        if before is not None:
            state = carry_over(state, before, moments=self.phase.keep_optimizer)
        return frozen, state

    def execute(
        self, state: TrainState, frozen: Params, step: int, chunks: Iterator[Chunk]
    ) -> tuple[TrainState, dict[str, jax.Array], int]:
        """Takes the chunks of one step from an iterator, and executes the step.

        Returns:
            The next state (the old one is donated), the facts of the step (still on the devices),
            and the number of rows of its chunks.
        """
        steps, hyper = self.steps, self.hyper
        trainable, totals = steps.begin(state)
        at_step = at_bound(hyper, state)
        number = jnp.asarray(step, jnp.int32)
        while True:
            chunk = next(chunks)  # raises if the iterator ends within the step
            batch = sharding.to_mesh(chunk.batch, self.layout.mesh)
            totals = steps.accumulate(totals, trainable, frozen, batch, number, at_step)
            if chunk.last:
                break
        state, facts = steps.update(state, totals, hyper)
        return state, facts, chunk.rows


# Phases of one training differ in traced values only. With the same jitted functions (same loss,
# optimizer and layout objects), the second phase compiles nothing, and neither do the runs of an
# audit after the first.
_make_steps = functools.lru_cache(maxsize=2)(make_steps)


def prepare(run: Run, private_seed: int) -> tuple[Prepared, ...]:
    """Returns every phase with its jitted functions and traced values.

    Keys are folded with the number of the training, not of the phase. The noise transform counts
    its draws in the optimizer state; a new training starts at 0 again and would repeat the noise of
    the previous one under the same key. A new phase of the same training goes on counting.

    Args:
        run: provides phases, loss and layout.
        private_seed: the run's secret seed.
    """
    prepared: list[Prepared] = []
    before: list[Callable[[str], bool]] = []
    first = 0
    for phase in run.phases:
        span = range(first, first + phase.steps)
        first = span.stop
        steps, hyper = _functions(run, phase), _values(run, phase, private_seed)
        continues = bool(prepared) and prepared[-1].phase.training == phase.training
        trained = functools.partial(_any_of, tuple(before))
        prepared.append(Prepared(phase, span, steps, hyper, run.layout, continues, trained))
        before.append(phase.trainable)
    return tuple(prepared)


def _any_of(predicates: tuple[Callable[[str], bool], ...], path: str) -> bool:
    return any(predicate(path) for predicate in predicates)


def _functions(run: Run, phase: TrainingPhase) -> Steps:
    config = run.config
    return _make_steps(
        run.loss_fn,
        phase.optimizer,
        run.layout,
        private=run.rule is not None,
        method=config.dp.method if config.dp is not None else "auto",
        microbatch_size=config.microbatch,
        secure=phase.mechanism is not None and phase.mechanism.secure_size is not None,
    )


def _values(run: Run, phase: TrainingPhase, private_seed: int) -> Hyper:
    config = run.config
    # Traced arrays, not attributes of the functions: a sweep over rates or epsilon compiles once.
    hyper = Hyper(
        learning_rate=jnp.asarray(phase.learning_rate, jnp.float32),
        noise_multiplier=jnp.zeros((), jnp.float32),
        rule=None,
        noise_key=None,
        augment_key=jax.random.fold_in(seeds.public_key(config.seed, "augment"), phase.training),
        batch_size=jnp.asarray(phase.expected_batch_size, jnp.float32),
        ema_decay=jnp.asarray(config.ema, jnp.float32) if config.ema else None,
    )
    mechanism = phase.mechanism
    if mechanism is None or run.rule is None:
        return hyper
    hyper = hyper._replace(
        # Of the gradient alone: with an adaptive bound, the count query takes its share of the
        # accounted multiplier (see `dp.adaptive`).
        noise_multiplier=jnp.asarray(mechanism.gradient_noise_multiplier, jnp.float32),
        rule=dataclasses.replace(run.rule, threshold=phase.bound),
        noise_key=jax.random.fold_in(
            seeds.noise_key(private_seed, secure=mechanism.secure_size is not None), phase.training
        ),
    )
    if mechanism.count_noise is not None:
        hyper = hyper._replace(
            adaptive=run.adaptive,
            count_noise=jnp.asarray(mechanism.count_noise, jnp.float32),
            # Not folded with the training: the step folds in its own number, which counts over all
            # phases and never restarts.
            count_key=seeds.noise_key(private_seed, "count"),
        )
    return hyper


def checkpoint_like(prepared: Prepared, params: Params) -> dict[str, Any]:
    """Returns the shapes, dtypes and shardings of a phase's checkpoint, {"state", "earlier"}.

    A checkpoint is restored into shardings, so it may have been written on another number of
    devices.
    """
    trainable, frozen = prepared.split(params)
    state = jax.eval_shape(prepared.steps.init, trainable, prepared.hyper)
    earlier, layout = prepared.earlier(frozen), prepared.layout
    like: dict[str, Any] = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"state": state, "earlier": earlier},
        {"state": layout.shardings(state), "earlier": layout.whole(earlier)},
    )
    return like
