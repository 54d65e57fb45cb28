"""Private optimizers: the noise transform, followed by an optimizer from optax."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpjax.dp.noise import gaussian

__all__ = ["adam", "adam_corrected", "lamb", "scale_by_adam_corrected", "sgd"]

PyTree = Any


def _with_options_of(optimizer: Callable[..., Any]) -> Callable[[Any], Any]:
    """Names the options in the signature, where `optax.inject_hyperparams` looks for them."""

    def decorate(function: Any) -> Any:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(optimizer).parameters.values()
            if p.name not in own.parameters and p.name != "noise_variance"
        ]
        function.__signature__ = own.replace(parameters=[*named, *options])
        return function

    return decorate


@_with_options_of(optax.adam)
def adam(
    learning_rate: optax.ScalarOrSchedule,
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """DP-Adam: Adam on the noisy mean of clipped gradients (arXiv 2510.20616, algorithm 1).

    Args:
        learning_rate: step size or schedule.
        noise_multiplier: sigma, see `gaussian`.
        expected_batch_size: B, see `gaussian`.
        key: typed PRNG key of the whole run, secret.
        **kwargs: passed to `optax.adam` (b1, b2, eps, ...).

    Returns:
        A transform whose `update` takes a `ClippedSum`. To change a number while training, use
        `optax.inject_hyperparams(dp.adam, static_args="key")`: without `static_args`, the secret
        key would be part of the optimizer state, and so of checkpoints.

    >>> import jax, jax.numpy as jnp
    >>> from dpjax import dp
    >>> loss = lambda params, example: (params["w"] * example - 1.0) ** 2
    >>> params = {"w": jnp.zeros(())}
    >>> tx = dp.adam(0.1, noise_multiplier=1.0, expected_batch_size=4, key=jax.random.key(0))
    >>> clipped, _ = dp.clipped_sum(loss, dp.flat(1.0))(params, jnp.ones(4), jnp.ones(4, bool))
    >>> updates, state = tx.update(clipped, tx.init(params), params)
    """
    noise = gaussian(noise_multiplier, expected_batch_size, key=key)
    return optax.chain(noise, optax.adam(learning_rate, **kwargs))


@_with_options_of(optax.sgd)
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """DP-SGD: SGD on the noisy mean of clipped gradients (arXiv 1607.00133, algorithm 1).

    Takes and returns what `adam` does; `kwargs` go to `optax.sgd` (momentum, ...).
    """
    noise = gaussian(noise_multiplier, expected_batch_size, key=key)
    return optax.chain(noise, optax.sgd(learning_rate, **kwargs))


@_with_options_of(optax.lamb)
def lamb(
    learning_rate: optax.ScalarOrSchedule,
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """DP-LAMB: LAMB on the noisy mean of clipped gradients (arXiv 2205.02973).

    Takes and returns what `adam` does; `kwargs` go to `optax.lamb` (weight_decay, ...).
    """
    noise = gaussian(noise_multiplier, expected_batch_size, key=key)
    return optax.chain(noise, optax.lamb(learning_rate, **kwargs))


class AdamCorrectedState(NamedTuple):
    """State of `scale_by_adam_corrected`: number of updates and the two moments."""

    step: jax.Array
    mu: PyTree
    nu: PyTree


def scale_by_adam_corrected(
    noise_variance: jax.typing.ArrayLike,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 5e-8,
) -> optax.GradientTransformation:
    """Adam whose second moment has the known noise variance subtracted.

    Args:
        noise_variance: variance of the noise in each coordinate of the noisy mean,
            (sigma S / B)^2. It is public, so the correction costs no privacy.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: lower bound on the corrected second moment (gamma' in the paper).

    Returns:
        A transform of noisy mean gradients.

    Source: Tang et al. 2023, DP-AdamBC, arXiv 2312.14334, algorithm 1.
    """

    def init(params: PyTree) -> AdamCorrectedState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return AdamCorrectedState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(
        updates: PyTree, state: AdamCorrectedState, params: PyTree | None = None
    ) -> tuple[PyTree, AdamCorrectedState]:
        del params
        step = state.step + 1
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        mu_hat = optax.tree.bias_correction(mu, b1, step)
        nu_hat = optax.tree.bias_correction(nu, b2, step)
        # E[noisy gradient^2] = E[gradient^2] + noise variance. The difference of an estimate and
        # the variance may be negative, hence the lower bound.
        scaled = jax.tree.map(
            lambda m, v: m / jnp.sqrt(jnp.maximum(v - noise_variance, eps)), mu_hat, nu_hat
        )
        return scaled, AdamCorrectedState(step, mu, nu)

    return optax.GradientTransformation(init, update)


@_with_options_of(scale_by_adam_corrected)
def adam_corrected(
    learning_rate: optax.ScalarOrSchedule,
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    sensitivity: jax.typing.ArrayLike,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """DP-AdamBC: DP-Adam without the noise's bias in the second moment (arXiv 2312.14334).

    Takes and returns what `adam` does; `kwargs` go to `scale_by_adam_corrected` (b1, b2, eps).
    `sensitivity` is the clipping rule's, which fixes the noise variance.
    """
    variance = jnp.square(noise_multiplier * sensitivity / expected_batch_size)
    noise = gaussian(noise_multiplier, expected_batch_size, key=key)
    corrected = scale_by_adam_corrected(variance, **kwargs)
    return optax.chain(noise, corrected, optax.scale_by_learning_rate(learning_rate))
