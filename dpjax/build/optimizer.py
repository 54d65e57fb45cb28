"""`config.optimizer` becomes a factory of optax transforms."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

from dpjax import dp
from dpjax.files import choose
from dpjax.step import Hyper

__all__ = ["optimizer"]


def optimizer(
    config: ConfigDict, steps: int, *, private: bool
) -> Callable[[Hyper], optax.GradientTransformation]:
    """Makes the optimiser factory of `config.optimizer`; private ones take a `ClippedSum`."""
    name, options = config.name, dict(config.options)
    plain = {"adam": optax.adam, "sgd": optax.sgd, "lamb": optax.lamb}
    private_ones = {
        "adam": dp.adam, "sgd": dp.sgd, "lamb": dp.lamb, "adam_corrected": dp.adam_corrected,
    }  # fmt: skip
    make = choose("optimizer.name", name, private_ones if private else plain)
    shape = _schedule(config, steps)

    def factory(hyper: Hyper) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> jax.Array:
            return hyper.learning_rate * shape(count)

        if not private:
            return optax.chain(optax.scale(1 / hyper.batch_size), make(rate, **options))
        if hyper.rule is None or hyper.noise_key is None:
            raise TypeError("a private optimiser needs hyper.rule and hyper.noise_key.")
        extra = {"sensitivity": hyper.rule.sensitivity()} if name == "adam_corrected" else {}
        return make(
            rate, hyper.noise_multiplier, hyper.batch_size, key=hyper.noise_key, **extra, **options
        )

    return factory


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate as a fraction of its base."""
    if not 0 <= config.warmup < steps:
        raise ValueError(f"optimizer.warmup={config.warmup} must be in [0, steps={steps}).")
    rest = steps - config.warmup
    after = choose(
        "optimizer.schedule",
        config.schedule,
        {
            "constant": optax.constant_schedule(1.0),
            "cosine": optax.cosine_decay_schedule(1.0, rest),
            "linear": optax.linear_schedule(1.0, 0.0, rest),
        },
    )
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, config.warmup), after], [config.warmup]
    )
