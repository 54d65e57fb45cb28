"""The phases of a run made executable, and what their checkpoints hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.build import Phase, Run
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, unflatten
from dpjax.runtime import sharding
from dpjax.runtime.sharding import Layout
from dpjax.step import Hyper, Steps, TrainState, carry_over, make_steps

__all__ = ["Prepared", "checkpoint_like", "first_state", "prepare"]


class Prepared(NamedTuple):
    """A phase that is ready to run.

    Attributes:
        phase: what is executed.
        steps: its jitted functions.
        hyper: its traced values.
        layout: where parameters, state and batches live.
        goes_on: whether it continues the training of the phase before it, in the same state.
        trained: whether an earlier phase trains the leaf at a path.
    """

    phase: Phase
    steps: Steps
    hyper: Hyper
    layout: Layout
    goes_on: bool
    trained: Callable[[str], bool]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters into those that train in this phase and those that are frozen."""
        return finetune.split(params, self.phase.trainable)

    def earlier(self, frozen: Params) -> Params:
        """Returns the frozen leaves that an earlier phase has trained."""
        return unflatten({k: v for k, v in flatten(frozen).items() if self.trained(k)})


# Phases of one training differ in traced values alone: the second compiles nothing.
_make_steps = functools.lru_cache(maxsize=2)(make_steps)


def prepare(run: Run, private_seed: int) -> tuple[Prepared, ...]:
    """Makes the functions of every phase, and its traced values.

    Each training has keys of its own; the phases of one training share them, for they share the
    counters, too.
    """
    prepared: list[Prepared] = []
    before: list[Callable[[str], bool]] = []
    for phase in run.phases:
        steps, hyper = _functions(run, phase), _values(run, phase, private_seed)
        goes_on = bool(prepared) and prepared[-1].phase.training == phase.training
        trained = functools.partial(_any_of, tuple(before))
        prepared.append(Prepared(phase, steps, hyper, run.layout, goes_on, trained))
        before.append(phase.trainable)
    return tuple(prepared)


def _any_of(predicates: tuple[Callable[[str], bool], ...], path: str) -> bool:
    return any(predicate(path) for predicate in predicates)


def _functions(run: Run, phase: Phase) -> Steps:
    config = run.config
    return _make_steps(
        run.loss_fn,
        phase.optimizer,
        run.layout,
        private=run.rule is not None,
        method=config.dp.method if config.dp is not None else "auto",
        microbatch_size=config.microbatch,
    )


def _values(run: Run, phase: Phase, private_seed: int) -> Hyper:
    config = run.config
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
        return hyper
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
    return hyper


def first_state(prepared: Prepared, trainable: Params, before: TrainState | None) -> TrainState:
    """Returns the state in which a phase begins.

    Args:
        prepared: the phase.
        trainable: parameters that train in it.
        before: the state in which the phase before it ended; None for the first one.
    """
    if before is not None and prepared.goes_on:
        return before
    placed = sharding.place(trainable, prepared.layout.shardings(trainable))
    state = prepared.steps.init(placed, prepared.hyper)
    if before is None:
        return state
    return carry_over(state, before, moments=prepared.phase.keep_optimizer)


def checkpoint_like(prepared: Prepared, params: Params) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of a checkpoint in a phase: `state` and `earlier`."""
    trainable, frozen = prepared.split(params)
    state = jax.eval_shape(prepared.steps.init, trainable, prepared.hyper)
    earlier, layout = prepared.earlier(frozen), prepared.layout
    like: dict[str, Any] = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"state": state, "earlier": earlier},
        {"state": layout.shardings(state), "earlier": layout.whole(earlier)},
    )
    return like
