"""Clipping rules that the study on hard tasks compares: ours, and one of a few lines more."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpjax import dp

__all__ = ["RULES", "tanh"]


def _tanh(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    small = jnp.maximum(norms, 1e-12)
    return thresholds * jnp.tanh(small / thresholds) / small


def tanh(bound: float) -> dp.ClipRule:
    """Shrinks a gradient of norm n to C tanh(n / C), smoothly, where flat clipping cuts at C.

    Args:
        bound: C.

    Returns:
        The rule, normalized to sensitivity 1.

    Source: SoftAdaClip, arXiv 2510.01447, which smooths the clipping of a gradient in this way.
    """
    return dp.rule(_tanh, bound, normalized=True)


RULES: dict[str, Callable[[float], dp.ClipRule]] = {
    "flat": lambda bound: dp.flat(bound, normalized=True),
    "not normalized": dp.flat,
    "automatic": lambda bound: dp.automatic(bound, normalized=True),
    "tanh": tanh,
}
