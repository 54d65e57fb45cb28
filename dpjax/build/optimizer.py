"""`config.optimizer` becomes a factory of optax transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dpjax import dp
from dpjax.files import choose
from dpjax.step import Hyper

__all__ = ["check", "optimizer"]

# By name: the transform without privacy, the private one, and the function of its options.
_OPTIMIZERS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any], Callable[..., Any]]] = {
    "adam": (optax.adam, dp.adam, optax.adam),
    "sgd": (optax.sgd, dp.sgd, optax.sgd),
    "lamb": (optax.lamb, dp.lamb, optax.lamb),
    "adam_corrected": (None, dp.adam_corrected, dp.scale_by_adam_corrected),
}
_OURS = ("learning_rate", "noise_variance")  # no options: fields of a run of their own


def check(config: ConfigDict, *, private: bool) -> None:
    """Refuses a name, an option or a schedule that does not exist, by a trial on one parameter."""
    factory = optimizer(config, config.warmup + 1, private=private)
    *_, function = _OPTIMIZERS[config.name]
    known = [name for name in inspect.signature(function).parameters if name not in _OURS]
    for option in config.options:
        choose("optimizer.options field", option, dict.fromkeys(known))
    one = jnp.ones(())
    rule = dp.flat(1.0) if private else None
    hyper = Hyper(one, one, rule, jax.random.key(0), jax.random.key(1), one)

    def trial(hyper: Hyper, params: Any) -> Any:
        transform = factory(hyper)
        gradient = dp.ClippedSum(params, hyper.batch_size) if private else params
        return transform.update(gradient, transform.init(params), params)

    try:
        jax.eval_shape(trial, hyper, {"kernel": jnp.zeros((2, 2))})
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options={dict(config.options)}: {error}") from error


def optimizer(
    config: ConfigDict, steps: int, *, private: bool
) -> Callable[[Hyper], optax.GradientTransformation]:
    """Makes the optimiser factory of `config.optimizer`; private ones take a `ClippedSum`."""
    name, options = config.name, dict(config.options)
    makers = {known: pair[private] for known, pair in _OPTIMIZERS.items() if pair[private]}
    make = choose("optimizer.name", name, makers)
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
