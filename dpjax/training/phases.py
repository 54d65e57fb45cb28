"""A phase of a run made executable, and what its checkpoints hold."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.build import Run
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, unflatten
from dpjax.runtime import sharding
from dpjax.step import Hyper, Steps, TrainState, carry_over, make_steps

__all__ = ["checkpoint_like", "first_state", "prepare", "trained_before"]


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


def first_state(
    run: Run,
    index: int,
    steps: Steps,
    hyper: Hyper,
    trainable: Params,
    before: TrainState | None,
) -> TrainState:
    """Returns the state in which a phase begins.

    Args:
        run: its phases.
        index: of the phase.
        steps: from `prepare`.
        hyper: from `prepare`.
        trainable: parameters that train in this phase.
        before: the state in which the phase before it ended; None for the first one.
    """
    phase = run.phases[index]
    if before is not None and run.phases[index - 1].training == phase.training:
        return before
    state = steps.init(sharding.place(trainable, run.layout.shardings(trainable)), hyper)
    if before is None:
        return state
    return carry_over(state, before, moments=phase.keep_optimizer)


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
