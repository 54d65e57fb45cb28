"""A phase of a run made executable, and what its checkpoints hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpjax import finetune, rng
from dpjax.build import Run
from dpjax.models import Params, flatten, unflatten
from dpjax.step import Hyper, Steps, make_steps

__all__ = ["checkpoint_like", "prepare", "trained_before"]


def prepare(run: Run, index: int, private_seed: int) -> tuple[Steps, Hyper]:
    """Makes the functions of a phase, and its traced values; each phase has keys of its own."""
    config, phase = run.config, run.phases[index]
    steps = make_steps(
        run.loss_fn,
        phase.optimizer,
        run.layout,
        private=run.rule is not None,
        method=config.dp.method if config.dp is not None else "auto",
        microbatch_size=config.microbatch,
    )
    private = phase.mechanism is not None
    sigma = phase.mechanism.noise_multiplier if phase.mechanism is not None else 0.0
    return steps, Hyper(
        learning_rate=jnp.asarray(phase.learning_rate, jnp.float32),
        noise_multiplier=jnp.asarray(sigma, jnp.float32),
        rule=run.rule,
        noise_key=jax.random.fold_in(rng.noise_key(private_seed), index) if private else None,
        augment_key=jax.random.fold_in(rng.public_key(config.seed, "augment"), index),
    )


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
