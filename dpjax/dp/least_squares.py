"""Private linear heads in closed form: least squares from noisy second moments.

A linear head W minimizes sum_i |x_i^T W - y_i|^2 + ridge |W|^2. It depends on the private data only
through A = sum_i x_i x_i^T and B = sum_i x_i y_i^T. Both are released once, with Gaussian noise;
everything computed from them (eigenvalues, ridges, any number of solutions) is post-processing.

The sensitivity to adding or removing one example, with |x| <= R after clipping and y the one-hot
label minus 1/classes, whose norm is Y = sqrt(1 - 1/classes) for every label, is exactly

    |x x^T|_F = |x|^2 <= R^2,        |x y^T|_F = |x||y| <= R Y.

Every example of norm R attains both. With noise of standard deviation z_A R^2 on each of the d^2
entries of A and z_B R Y on each entry of B, the pair (A / (z_A R^2), B / (z_B R Y)) is one Gaussian
mechanism of unit noise, and the same examples attain its sensitivity sqrt(1/z_A^2 + 1/z_B^2). The
release is therefore exactly one Gaussian event with noise multiplier z, where
1/z^2 = 1/z_A^2 + 1/z_B^2: one step of a `Mechanism` with `FullBatch`.
`covariance_share` is the fraction of 1/z^2 that A uses. Symmetrizing the noisy A afterward is
post-processing, and halves the variance off the diagonal.

Source: Mehta, Krichene, Thakurta, Kurakin, Cutkosky 2022, arXiv 2211.13403 (DP least squares on
features). The centered targets and the joint event are our additions.

>>> import jax, jax.numpy as jnp
>>> from dpjax import dp
>>> x, label = jax.random.normal(jax.random.key(0), (1000, 2)), jnp.arange(1000) % 2
>>> x = x.at[:, 0].add(4.0 * label)
>>> mechanism = dp.calibrated(
...     epsilon=1.0, delta=1e-4, num_examples=1000, batch_size=1000, steps=1)
>>> sums = moments(x, label, jnp.ones(1000, bool), num_classes=2, bound=4.0)
>>> noisy = release(sums, mechanism.noise_multiplier, key=jax.random.key(1))
>>> solve(noisy, [noise_floor(noisy)]).shape
(1, 2, 2)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.noise import check_scale, standard_normal

__all__ = ["MomentSum", "NoisyMoments", "moments", "noise_floor", "release", "solve"]

# Like the one in `clipping`: it covers the rounding of norm, factor and product, so that |x| <= R
# holds exactly in float32.
_ROUNDING = 1.0 - 2.0**-19


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MomentSum:
    """Second moments of clipped examples, not yet private. Sums over disjoint chunks add.

    Attributes:
        covariance: float32 `[width, width]`, sum of x x^T (not centered, never a mean).
        cross: float32 `[width, classes]`, sum of x y^T.
        bound: R, the largest norm of a clipped x.
    """

    covariance: jax.Array
    cross: jax.Array
    bound: jax.Array

    def __add__(self, other: MomentSum) -> MomentSum:
        """Sum over the union of two disjoint chunks."""
        if not isinstance(other, MomentSum):
            return NotImplemented
        bound = jnp.maximum(self.bound, other.bound)
        return MomentSum(self.covariance + other.covariance, self.cross + other.cross, bound)

    def sensitivities(self) -> tuple[jax.Array, jax.Array]:
        """L2 sensitivities of covariance and cross to adding or removing one example."""
        target = math.sqrt(1 - 1 / self.cross.shape[1])
        return jnp.square(self.bound), self.bound * target


class NoisyMoments(NamedTuple):
    """Private second moments.

    Attributes:
        covariance: `[width, width]`, symmetric; the noise may make eigenvalues negative.
        cross: `[width, classes]`.
        covariance_std: standard deviation of the noise on the diagonal; off it, divided by sqrt 2.
        cross_std: standard deviation of the noise on every entry of `cross`.
    """

    covariance: jax.Array
    cross: jax.Array
    covariance_std: jax.Array
    cross_std: jax.Array


def moments(
    features: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    num_classes: int,
    bound: jax.typing.ArrayLike,
) -> MomentSum:
    """Clips every example and sums its second moments.

    Args:
        features: `[batch, width]`; append a constant column for an intercept, which is then clipped
            with the rest.
        labels: int32 `[batch]` in [0, num_classes).
        mask: bool `[batch]`, False for padding.
        num_classes: at least 2.
        bound: R > 0; an x longer than R is scaled to norm R.

    Guarantees:
        Padding, and examples with a non-finite feature, contribute exactly zero; adding or removing
        one example moves the sums by at most `MomentSum.sensitivities`.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be >= 2.")
    check_scale("bound", bound)
    if features.ndim != 2 or not labels.shape == mask.shape == features.shape[:1]:
        raise ValueError(
            f"features of shape {features.shape}, labels {labels.shape} and mask {mask.shape} must "
            "be [batch, width], [batch], [batch]."
        )
    features = features.astype(jnp.float32)
    limit = jnp.asarray(bound, jnp.float32)
    # Divide by the largest entry before squaring: the squares neither overflow nor underflow.
    largest = jnp.max(jnp.abs(features), axis=1)
    finite = jnp.all(jnp.isfinite(features), axis=1)
    safe = jnp.where(finite & (largest > 0), largest, 1.0)
    unit = jnp.where(finite[:, None], features / safe[:, None], 0.0)
    norms = jnp.sqrt(jnp.sum(jnp.square(unit), axis=1))  # of `unit`; 1 or more, or 0
    lengths = jnp.minimum(safe, limit / jnp.maximum(norms, 1.0)) * _ROUNDING
    clipped = jnp.where(mask[:, None], unit * lengths[:, None], 0.0)
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    targets = jnp.where(mask[:, None], hot - 1 / num_classes, 0.0)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return MomentSum(product(clipped.T, clipped), product(clipped.T, targets), limit)


def release(
    sums: MomentSum,
    noise_multiplier: jax.typing.ArrayLike,
    *,
    covariance_share: float = 0.5,
    key: jax.Array,
) -> NoisyMoments:
    """Releases the moments privately: one Gaussian event with this noise multiplier.

    Args:
        sums: over ALL examples, each of them once.
        noise_multiplier: z >= 0, of one step of a `Mechanism` with `FullBatch`; 0 is not private.
        covariance_share: fraction of the budget (of 1/z^2) that the covariance uses, in (0, 1).
        key: typed PRNG key, secret and used for nothing else.

    Raises:
        ValueError: an argument out of range.
        TypeError: `sums` is not a `MomentSum`.
    """
    if not isinstance(sums, MomentSum):
        raise TypeError(f"release takes a MomentSum, got {type(sums).__name__}.")
    if not 0 < covariance_share < 1:
        raise ValueError(f"covariance_share={covariance_share} must be in (0, 1).")
    check_scale("noise_multiplier", noise_multiplier, zero=True)
    noise_multiplier = jnp.asarray(noise_multiplier, jnp.float32)
    sensitivity, cross_sensitivity = sums.sensitivities()
    std = noise_multiplier * sensitivity / math.sqrt(covariance_share)
    cross_std = noise_multiplier * cross_sensitivity / math.sqrt(1 - covariance_share)
    first, second = jax.random.split(key)
    noisy = sums.covariance + std * standard_normal(first, sums.covariance.shape)
    return NoisyMoments(
        covariance=(noisy + noisy.T) / 2,
        cross=sums.cross + cross_std * standard_normal(second, sums.cross.shape),
        covariance_std=std,
        cross_std=cross_std,
    )


def noise_floor(noisy: NoisyMoments) -> float:
    """Returns the spectral norm of the covariance's noise, about std * sqrt(2 width).

    Smaller eigenvalues are mostly noise, which makes it the natural unit of a ridge.
    """
    return float(noisy.covariance_std) * math.sqrt(2 * noisy.covariance.shape[0])


def solve(noisy: NoisyMoments, ridges: Sequence[float]) -> jax.Array:
    """Solves for the head with each ridge, from one eigendecomposition; post-processing.

    Args:
        noisy: from `release`.
        ridges: each > 0; added to every eigenvalue after negative ones are set to 0.

    Returns:
        Kernels `[ridges, width, classes]`; the scores of an example are `x @ kernel`.

    Raises:
        ValueError: a ridge is not > 0.
    """
    for ridge in ridges:
        check_scale("ridge", ridge)
    values, vectors = jnp.linalg.eigh(noisy.covariance)
    projected = vectors.T @ noisy.cross
    shifted = jnp.maximum(values, 0.0)[None, :] + jnp.asarray(ridges, jnp.float32)[:, None]
    return jnp.einsum("de,rec->rdc", vectors, projected[None] / shifted[:, :, None])
