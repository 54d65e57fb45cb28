"""A clip bound that follows a quantile of the gradient norms, its query accounted.

Beside the gradient, a step asks how many examples of its batch have a norm of at most the bound C,
and moves C geometrically toward the wanted share. The count is noised, and the two are accounted
as ONE Gaussian mechanism on one sample. An example contributes to the pair
    (its clipped gradient / C,   1/2 if its norm is at most C, else -1/2)
with norms of at most 1 and exactly 1/2; an example that is not there contributes (0, 0). With noise
of standard deviation sigma_grad on the first and sigma_count on the second, divide each by its own:
the noise becomes standard normal in every coordinate and the contribution's squared norm at most
    sigma_grad^-2 + (2 sigma_count)^-2  =:  sigma_total^-2.
So the pair is a Gaussian mechanism with the noise multiplier sigma_total, sampled or not, and a
release with sigma_total costs the same with the count or without it: the gradient gets the noise
    sigma_grad = (sigma_total^-2 - (2 sigma_count)^-2)^(-1/2).
Under "replace_one" the pair moves by up to twice its norm, as the gradient alone does, and the
accounting knows about the 2 (see `events`). What follows from the noised count, the next bound
first of all, is post-processing.

Source: Andrew et al. 2021, arXiv 1905.03871, algorithm 1 and theorem 1; a lower limit
on the bound as in arXiv 2506.01396.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.noise import standard_normal

__all__ = ["LARGEST_BOUND", "QuantileBound", "gradient_noise_multiplier", "quantile_bound"]

LARGEST_BOUND = 1e9
"""A bound that would leave the range of its squares in float32 stops here."""


class QuantileBound(NamedTuple):
    """How the bound follows the quantile; made by `quantile_bound`. Traced values.

    Attributes:
        quantile: gamma in (0, 1), the wanted share of norms that are at most the bound.
        rate: eta > 0; a step moves the logarithm of the bound by rate * (share - quantile).
        lower_bound: the bound never falls below it.
    """

    quantile: jax.typing.ArrayLike
    rate: jax.typing.ArrayLike
    lower_bound: jax.typing.ArrayLike

    def following(
        self,
        bound: jax.Array,
        centred_count: jax.Array,
        *,
        count_noise: jax.typing.ArrayLike,
        expected_batch_size: jax.typing.ArrayLike,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the bound of the next step, a function of public values and the noised count.

        Args:
            bound: C of this step, float32 scalar.
            centred_count: sum over the batch of 1/2 for a norm of at most C and -1/2 for any
                other. Private: nothing else may read it.
            count_noise: sigma_count, of `Mechanism.count_noise`.
            expected_batch_size: B, a public constant.
            key: secret, for this step alone.
        """
        noised = centred_count + count_noise * standard_normal(key)
        share = noised / expected_batch_size + 0.5
        moved = bound * jnp.exp(self.rate * (self.quantile - share))
        return jnp.clip(moved, self.lower_bound, LARGEST_BOUND).astype(jnp.float32)


def quantile_bound(quantile: float, *, rate: float = 0.2, lower_bound: float) -> QuantileBound:
    """Checks and makes a `QuantileBound`.

    Args:
        quantile: gamma in (0, 1), the wanted share of norms that are at most the bound.
        rate: eta > 0; a step moves the logarithm of the bound by rate * (share - quantile).
        lower_bound: the bound never falls below it, in units of gradient norm.

    Returns:
        The rule that moves the bound.

    Guarantees:
        The bound stays in [lower_bound, LARGEST_BOUND]. It follows from the noised count alone, so
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
    """Returns sigma_grad of a release whose gradient and count together have sigma_total.

    Args:
        noise_multiplier: sigma_total, what is accounted.
        count_noise: sigma_count, standard deviation of the noise on the centered count [examples].

    Raises:
        ValueError: a count so precise that it alone costs as much as the whole release may.

    >>> gradient_noise_multiplier(3.0, 2.5)
    3.75
    """
    if not noise_multiplier / 2 < count_noise < math.inf:
        raise ValueError(
            f"count_noise={count_noise} must be finite and > noise_multiplier / 2 = "
            f"{noise_multiplier / 2:.6g}: nothing would be left for the gradient."
        )
    # sigma_total / sqrt(1 - r^2), which keeps its digits where the count costs next to nothing.
    ratio = noise_multiplier / (2 * count_noise)
    return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))
