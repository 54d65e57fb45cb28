"""Moving averages of parameters: free post-processing of private iterates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["moving_average"]

PyTree = Any


def moving_average(
    average: PyTree, params: PyTree, decay: jax.typing.ArrayLike, step: jax.Array
) -> PyTree:
    """Returns the exponential moving average after one more iterate.

    Args:
        average: the average so far, float32.
        params: the new iterate.
        decay: in [0, 1); early on (1 + t) / (10 + t) if that is smaller, so that the start is soon
            forgotten.
        step: t, the number of iterates before this one.

    Source: De et al. 2022, arXiv 2204.13650.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
