"""A clip bound that follows a quantile of the gradient norms, with its query accounted.

Besides the gradient, every step asks how many examples of its batch have a norm of at most the
bound C, and moves C geometrically toward the wanted share. Noise is added to the count, and count
and gradient are accounted as ONE Gaussian mechanism on one sample. An example contributes the pair
    (its clipped gradient / C,   1/2 if its norm is at most C, else -1/2)
whose parts have norms of at most 1 and exactly 1/2; an absent example contributes (0, 0). With
noise of standard deviation sigma_grad on the first part and sigma_count on the second, divide each
part by its own: the noise becomes standard normal in every coordinate, and the squared norm of a
contribution at most
    sigma_grad^-2 + (2 sigma_count)^-2  =:  sigma_total^-2.
So the pair is a Gaussian mechanism with the noise multiplier sigma_total, subsampled or not. A
release with sigma_total therefore costs the same with or without the count, if the gradient gets
    sigma_grad = (sigma_total^-2 - (2 sigma_count)^-2)^(-1/2).
Under "replace_one" the pair moves by up to twice its norm, as the gradient alone does; the
accountant applies the factor 2 (see `events`). The next bound is computed from the noisy count
alone, so it is post-processing.

Source: Andrew et al. 2021, arXiv 1905.03871, algorithm 1 and theorem 1; the lower limit on the
bound follows arXiv 2506.01396.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.noise import standard_normal

__all__ = ["LARGEST_BOUND", "QuantileBound", "gradient_noise_multiplier", "quantile_bound"]

LARGEST_BOUND = 1e9
"""Limit of the bound: the squares of much larger norms would overflow float32."""


class QuantileBound(NamedTuple):
    """The rule that moves the bound, from `quantile_bound`; its fields may be traced values.

    Attributes:
        quantile: gamma in (0, 1), the wanted share of norms that are at most the bound.
        rate: eta > 0; a step moves the logarithm of the bound by rate * (quantile - share).
        lower_bound: the bound never falls below it, in units of gradient norm.
    """

    quantile: jax.typing.ArrayLike
    rate: jax.typing.ArrayLike
    lower_bound: jax.typing.ArrayLike

    def following(
        self,
        bound: jax.Array,
        centered_count: jax.Array,
        *,
        count_noise: jax.typing.ArrayLike,
        expected_batch_size: jax.typing.ArrayLike,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the bound of the next step, a function of public values and the noisy count.

        Args:
            bound: C of this step, float32 scalar.
            centered_count: sum over the batch of 1/2 for every norm of at most C, and -1/2 for
                every other. Private: nothing else may read it.
            count_noise: sigma_count, from `Mechanism.count_noise`, in examples.
            expected_batch_size: B, a public constant.
            key: secret key of this step alone.
        """
        noisy_count = centered_count + count_noise * standard_normal(key)
        # Divided by the expected size: the realized size is private.
        share = noisy_count / expected_batch_size + 0.5
        new_bound = bound * jnp.exp(self.rate * (self.quantile - share))
        return jnp.clip(new_bound, self.lower_bound, LARGEST_BOUND).astype(jnp.float32)


def quantile_bound(quantile: float, *, rate: float = 0.2, lower_bound: float) -> QuantileBound:
    """Returns a checked `QuantileBound`, whose attributes the arguments are.

    Guarantees:
        The bound stays in [lower_bound, LARGEST_BOUND]. It follows from the noisy count alone, so
        it costs nothing beyond that count, which `Mechanism.count_noise` accounts for.

    Raises:
        ValueError: a value out of range, naming it.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile} must be in (0, 1).")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate} must be > 0 and finite.")
    if not 1 / LARGEST_BOUND <= lower_bound <= LARGEST_BOUND:
        raise ValueError(
            f"lower_bound={lower_bound} must be in [{1 / LARGEST_BOUND:g}, {LARGEST_BOUND:g}]."
        )
    return QuantileBound(quantile, rate, lower_bound)


def gradient_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """Returns sigma_grad, so that gradient and count together have the multiplier sigma_total.

    Args:
        noise_multiplier: sigma_total, the accounted noise multiplier.
        count_noise: sigma_count, standard deviation of the noise on the centered count, in
            examples.

    Raises:
        ValueError: the count query alone would use the whole budget.

    >>> gradient_noise_multiplier(3.0, 2.5)
    3.75
    """
    if not noise_multiplier / 2 < count_noise < math.inf:
        raise ValueError(
            f"count_noise={count_noise} must be finite and > noise_multiplier / 2 = "
            f"{noise_multiplier / 2:.6g}: the count query alone would use the whole budget."
        )
    # sigma_total / sqrt(1 - r^2), factored: 1 - r^2 loses digits when r is close to 1.
    ratio = noise_multiplier / (2 * count_noise)
    return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))
