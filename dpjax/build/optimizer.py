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
from dpjax.files import choose, resolve, returned
from dpjax.models import flatten, unflatten
from dpjax.step import KEPT, Hyper

__all__ = ["check", "optimizer"]

_OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd, "lamb": optax.lamb}
_PRIVATE = {**_OPTIMIZERS, "adam_corrected": dp.scale_by_adam_corrected}
_OURS = ("learning_rate", "noise_variance")  # no options: fields of a run of their own


def check(config: ConfigDict, *, private: bool) -> None:
    """Refuses a name, an option or a schedule that does not exist, by a trial on one parameter."""
    factory = optimizer(config, config.warmup + 1, private=private)
    function = _maker(config, private=private)
    known = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for option in config.options:
            names = [name for name in known if name not in _OURS]
            choose("optimizer.options field", option, dict.fromkeys(names))
    for option in ("b1", "b2", "momentum"):
        value = config.options.get(option)
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"optimizer.options.{option}={value} must be in [0, 1).")
    one = jnp.ones(())
    rule = dp.flat(1.0) if private else None
    hyper = Hyper(one, one, rule, jax.random.key(0), jax.random.key(1), one)

    def trial(hyper: Hyper, params: Any) -> Any:
        transform = factory(hyper)
        gradient = dp.ClippedSum(params, hyper.batch_size) if private else params
        return transform.update(gradient, transform.init(params), params)

    options = dict(config.options)
    try:
        alone = function(optax.constant_schedule(1.0), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options={options} of {config.name!r}: {error}") from error
    returned("optimizer.name", config.name, alone, optax.GradientTransformation)
    try:
        jax.eval_shape(trial, hyper, {"kernel": jnp.zeros((2, 2))})
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options={options} of {config.name!r}: {error}") from error


def _maker(config: ConfigDict, *, private: bool) -> Callable[..., optax.GradientTransformation]:
    table: dict[str, Any] = _PRIVATE if private else _OPTIMIZERS
    make: Callable[..., optax.GradientTransformation] = resolve(
        "optimizer.name", config.name, table
    )
    return make


def optimizer(
    config: ConfigDict, steps: int, *, private: bool, kept: Callable[[str], bool] | None = None
) -> Callable[[Hyper], optax.GradientTransformation]:
    """Makes the optimizer factory of `config.optimizer`; private ones take a `ClippedSum`.

    Args:
        config: of the optimizer.
        steps: of the training, for the schedule.
        private: whether the noise comes first.
        kept: paths of parameters whose state goes on in the next training. They get an optimizer
            of their own: Adam corrects moments by their age, which is another for new parameters.
    """
    name, options = config.name, dict(config.options)
    make, shape = _maker(config, private=private), _schedule(config, steps)

    def apart(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        if kept is None:
            return tx
        return optax.partition(
            {KEPT: tx, "new": tx},
            lambda params: unflatten({k: KEPT if kept(k) else "new" for k in flatten(params)}),
        )

    def factory(hyper: Hyper) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> jax.Array:
            return hyper.learning_rate * shape(count)

        if not private:
            return optax.chain(optax.scale(1 / hyper.batch_size), apart(make(rate, **options)))
        if hyper.rule is None or hyper.noise_key is None:
            raise TypeError("a private optimizer needs hyper.rule and hyper.noise_key.")
        noise = hyper.noise_multiplier, hyper.batch_size
        if name == "adam_corrected":  # it has to know the noise that it corrects for
            stddev = hyper.noise_multiplier * hyper.rule.sensitivity() / hyper.batch_size
            corrected = dp.scale_by_adam_corrected(jnp.square(stddev), **options)
            tx = optax.chain(corrected, optax.scale_by_learning_rate(rate))
        else:
            tx = make(rate, **options)
        # The noise comes first, and is not the optimizer's to leave out.
        return optax.chain(dp.gaussian(*noise, key=hyper.noise_key), apart(tx))

    return factory


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate as a fraction of its base."""
    if not 0 <= config.warmup < steps:
        raise ValueError(f"optimizer.warmup={config.warmup} must be in [0, steps={steps}).")
    after = resolve(
        "optimizer.schedule",
        config.schedule,
        {
            "constant": lambda steps: optax.constant_schedule(1.0),
            "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
            "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
        },
    )(steps - config.warmup)
    try:
        wrong = jax.eval_shape(after, jax.ShapeDtypeStruct((), "int32")).shape
    except (TypeError, ValueError, AttributeError) as error:
        wrong = error
    if wrong != ():
        raise ValueError(
            f"optimizer.schedule={config.schedule!r} must return a function from the step to a "
            f"number, in jax.numpy: {str(wrong).splitlines()[0]}."
        )
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, config.warmup), after], [config.warmup]
    )
