"""Scale-then-privatize: Adam's second moments scale a gradient before it is clipped.

A coordinate whose gradients are large takes most of a gradient's norm, and noise of one size for
all coordinates drowns those whose gradients are small. So every example's gradient g is scaled to
s * g, clipped to norm C and summed; the noised mean is divided by s again and goes into Adam. With
v the corrected second moment of the earlier noised gradients and a stability e,

    s = 1 / (1 + sqrt(v) / e),

which is e times the scale of arXiv 2507.01129 (algorithm 8), so that C is in units of a gradient's
norm for every e. A large e scales nothing. s is computed from what was released before, so a step
costs what a step of DP-Adam costs.

For a linear head, whose gradient x r^T is a product, the squared norm of the scaled gradient is
(x^2)^T s^2 (r^2): one matrix product more than `linear_head`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpjax import dp, heads
from dpjax.dp import linear_head
from dpjax.step import Hyper, TrainState

__all__ = ["clipped_sum", "optimizer", "scales"]

_B2 = 0.999  # decay of Adam's second moments
_TINY = 2.0**-126


def scales(moments: optax.ScaleByAdamState, stability: float) -> Any:
    """Returns s of the next step, in (0, 1], a tree like the parameters; 1 before the first."""
    age = jnp.maximum(1 - _B2**moments.count, 1e-6)
    return jax.tree.map(lambda v: 1 / (1 + jnp.sqrt(v / age) / stability), moments.nu)


@functools.cache  # one factory, one compilation
def optimizer(stability: float) -> heads.Optimizer:
    """Returns the optimizer: noise, division by the scales, Adam.

    Args:
        stability: e > 0, in units of a gradient's coordinate.
    """
    adam = optax.scale_by_adam(b2=_B2)

    def update(noised: Any, moments: Any, params: Any = None) -> tuple[Any, Any]:
        grads = jax.tree.map(jnp.divide, noised, scales(moments, stability))
        return adam.update(grads, moments, params)

    def factory(hyper: Hyper) -> optax.GradientTransformation:
        if hyper.noise_key is None:
            raise TypeError("a private optimizer needs hyper.noise_key.")
        noise = dp.gaussian(hyper.noise_multiplier, hyper.batch_size, key=hyper.noise_key)
        scaled_adam = optax.GradientTransformation(adam.init, update)
        return optax.chain(noise, scaled_adam, optax.scale_by_learning_rate(hyper.learning_rate))

    return factory


@functools.cache
def clipped_sum(stability: float) -> heads.ClippedHeadSum:
    """Returns the sum of clipped, scaled gradients, for `heads.train_heads` and `optimizer`.

    Args:
        stability: e > 0, that of the optimizer.
    """

    def summed(
        state: TrainState, rule: dp.ClipRule, batch: linear_head.Rows, mask: jax.Array
    ) -> tuple[dp.ClippedSum, dp.PerExample]:
        ((name, head),) = state.trainable.items()
        (scale,) = scales(state.opt[1], stability).values()
        losses, residual = linear_head.losses(head, batch)
        precise = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        squares = precise(jnp.square(batch.inputs), jnp.square(scale["kernel"]))
        squares = squares + jnp.square(scale["bias"])[None]
        # What underflows is added, so that a norm is never too small.
        lost = 2 * head["kernel"].size * _TINY
        norms = jnp.sqrt(jnp.sum(squares * jnp.square(residual), axis=1) + lost)[:, None]
        use = mask & jnp.isfinite(losses) & jnp.isfinite(batch.squares) & jnp.isfinite(norms[:, 0])
        factors = jnp.where(use[:, None], jax.vmap(rule.factors)(norms), 0.0)
        weighted = jnp.where(use[:, None], residual * factors, 0.0)
        value = {
            "bias": scale["bias"] * jnp.sum(weighted, axis=0),
            "kernel": scale["kernel"] * precise(batch.inputs.T, weighted),
        }
        facts = dp.PerExample(
            loss=jnp.where(mask, losses, 0.0), norms=jnp.where(mask[:, None], norms, 0.0),
            factors=factors, real=mask,
        )  # fmt: skip
        return dp.ClippedSum({name: value}, rule.sensitivity()), facts

    return summed
