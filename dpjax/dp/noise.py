"""Gaussian noise, and the optax transforms that turn a clipped sum into a private mean.

Sum, never mean; one noise draw per step, in float32; one division, by the expected batch size,
after the noise. Every other release in `dpjax.dp` (the count of an adaptive bound, the moments of
least squares, the sign of a temperature's derivative, a vote) draws its noise from
`standard_normal` too.

The key decides which noise it is: with a ChaCha20 key, from `seeds.noise_key(seed, secure=True)`,
it is the integer noise of `dp.secure`, and the sum must be an exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from dpjax.dp import chacha, secure
from dpjax.dp.clipping import ClippedSum, ClipRule, flat
from dpjax.dp.engines.clipped_sum import clipped_sum
from dpjax.dp.engines.reference import once
from dpjax.dp.meshes import mesh_of, on_mesh

__all__ = [
    "GaussianState",
    "aggregate",
    "check_scale",
    "gaussian",
    "gaussian_noise",
    "standard_normal",
]

PyTree = Any


class GaussianState(NamedTuple):
    """State of the noise transforms.

    Attributes:
        step: int32 scalar, the number of noise draws so far. Together with the key it determines
            the next draw, so a resumed run draws the noise that the interrupted run would have.
    """

    step: jax.Array


def standard_normal(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draws standard normal float32 numbers with accurate tails.

    `jax.random.normal` uses 23 random bits and never leaves [-5.42, 5.22]. If one example moves a
    sum beyond that range, an observer of every step notices, with a probability of the order of a
    typical delta. Here every number uses 64 bits: one for the sign, the others for the probability
    of the tail.

    Args:
        key: typed PRNG key, used for nothing else.
        shape: shape of the result.

    Returns:
        Symmetric numbers in [-9.16, 9.16], a range that N(0, 1) leaves with probability 5e-20;
        within 1e-6 of the exact quantile of their bits.
    """
    first, second = jax.random.bits(key, (2, *shape), jnp.uint32)
    # A probability in (0, 1/2], and a sign, instead of one probability in (0, 1): floats are dense
    # near 0, so both tails are equally fine. The added 0.5 keeps it above 0, where ndtri is -inf.
    tail = (first >> 1).astype(jnp.float32) * 2.0**-32
    tail += (second.astype(jnp.float32) + 0.5) * 2.0**-64
    quantile = jax.scipy.special.ndtri(tail)
    return jnp.where(first & 1, quantile, -quantile)


def gaussian_noise(key: jax.Array, tree: PyTree) -> PyTree:
    """Draws standard normal float32 noise in the shapes of `tree`: one flat draw, cut into leaves.

    Guarantees:
        Under `jax.jit` with sharded operands the values depend on the key and the shapes alone, not
        on the number of devices (JAX's partitionable threefry).
    """
    return _flat_draw(_normal_numbers, key, tree)


def _normal_numbers(key: jax.Array, size: int) -> jax.Array:
    numbers = standard_normal(key, (size,))
    # Computed once, before it is cut: fused into the leaves, it would be rounded one way on one
    # device, another way on eight.
    return once(numbers, jnp.sum(~jnp.isfinite(numbers[:1]), dtype=jnp.int32))


def _flat_draw(numbers: Callable[[jax.Array, int], jax.Array], key: jax.Array, tree: PyTree) -> Any:
    """Draws one flat array of numbers, and cuts it into the shapes of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    sizes = [leaf.size for leaf in leaves]

    def draw(key: jax.Array) -> list[jax.Array]:
        # One draw, because every draw is a program of its own to the compiler: with one for each
        # leaf, noise took most of the compile time of a step.
        parts = jnp.split(numbers(key, sum(sizes)), np.cumsum(sizes)[:-1])
        return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)]

    mesh = mesh_of(tree)
    if mesh is not None and not mesh.manual_axes:
        # Every device draws all numbers and keeps its own. Left to the partitioner, a flat vector
        # that is cut where devices are not would cost a collective for each leaf.
        whole = PartitionSpec()
        draw = jax.shard_map(draw, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.tree.unflatten(treedef, draw(key))


def gaussian(
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
) -> optax.GradientTransformation:
    """Adds Gaussian noise to a clipped sum and divides by the expected batch size.

    Args:
        noise_multiplier: sigma >= 0, standard deviation of the noise divided by the sensitivity of
            the sum. 0 is not private.
        expected_batch_size: B = q N > 0, a public constant; never the realized size.
        key: typed PRNG key of the whole run; step t uses `fold_in(key, t)`. It must be secret
            and used for nothing else. A ChaCha20 key makes the noise secure, see `dp.secure`.

    Returns:
        A transform whose `update` takes a `ClippedSum` and returns float32 updates in the tree of
        its value. Chain optax optimizers after it.

    Guarantees:
        Given a `ClippedSum` of sensitivity S, one update is the Gaussian mechanism with standard
        deviation `noise_multiplier * S` on the sum. Noise is float32 whatever the dtype of the
        parameters. It comes first in a chain: a transform before it is refused. Secure noise is of
        integers, and the result is NaN if the sum was made for another noise multiplier.

    Raises:
        TypeError: `update` received anything but a `ClippedSum` as clipping returns it, or the key
            is not a typed key.
        ValueError: a negative or non-finite argument.

    >>> import jax, optax
    >>> from dpjax import dp
    >>> tx = optax.chain(dp.gaussian(1.0, 256, key=jax.random.key(0)), optax.adam(1e-3))
    >>> state = tx.init({"w": jax.numpy.zeros(3)})
    >>> tx.update({"w": jax.numpy.ones(3)}, state)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    TypeError: the noise transform takes a ClippedSum, got dict: clip per-example gradients first...
    """
    check_scale("noise_multiplier", noise_multiplier, zero=True)
    check_scale("expected_batch_size", expected_batch_size)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key={key!r} must be a typed key, such as jax.random.key(seed).")
    if key.shape != ():
        raise TypeError(f"key of shape {key.shape} must be a single key.")
    is_secure = chacha.is_chacha(key)
    if is_secure:
        check_scale("noise_multiplier", noise_multiplier)  # the grid is a part of the noise

    def init(params: PyTree) -> GaussianState:
        del params
        return GaussianState(step=jnp.zeros((), jnp.int32))

    def update(
        updates: ClippedSum, state: GaussianState, params: PyTree | None = None
    ) -> tuple[PyTree, GaussianState]:
        del params
        if not isinstance(updates, ClippedSum):
            raise TypeError(
                f"the noise transform takes a ClippedSum, got {type(updates).__name__}: "
                "clip per-example gradients first. Where something unpacks the sum before, as "
                "nnx.Optimizer does, update the noise by itself and pass on its result."
            )
        if updates.seal.dtype != bool:
            raise TypeError(
                "noise comes first: a transform before it has scaled or clipped the ClippedSum, "
                "which voids its sensitivity. Chain it after dp.gaussian."
            )

        if is_secure != (updates.unit is not None):
            raise TypeError(
                "secure noise and exact sums go together: give dp.clipped_sum secure_noise=sigma "
                "and the transform a ChaCha20 key, or neither."
            )

        def noisy_mean(total: PyTree, stddev: jax.Array, size: jax.Array, key: jax.Array) -> PyTree:
            noise = gaussian_noise(key, total)
            return jax.tree.map(
                lambda s, z: (s.astype(jnp.float32) + stddev * z) / size, total, noise
            )

        def secure_mean(total: PyTree, unit: jax.Array, size: jax.Array, key: jax.Array) -> PyTree:
            noise = _flat_draw(secure.rounded_gaussian, key, total)
            return jax.tree.map(
                lambda s, z: (s + z).astype(jnp.float32) * (unit / size), total, noise
            )

        stddev = jnp.asarray(noise_multiplier * updates.sensitivity, jnp.float32)
        size = jnp.asarray(expected_batch_size, jnp.float32)
        draw_key = jax.random.fold_in(key, state.step)
        if updates.unit is not None:
            enough = stddev <= updates.unit * secure.STDDEV * (1 + 1e-5)
            unit = jnp.where(enough, updates.unit, jnp.nan)
            args = updates.value, unit, size, draw_key
            return on_mesh(secure_mean, args, updates.value), GaussianState(step=state.step + 1)
        args = updates.value, stddev, size, draw_key
        return on_mesh(noisy_mean, args, updates.value), GaussianState(step=state.step + 1)

    return optax.GradientTransformation(init, update)


def aggregate(
    l2_norm_clip: jax.typing.ArrayLike | ClipRule,
    noise_multiplier: jax.typing.ArrayLike,
    expected_batch_size: jax.typing.ArrayLike,
    *,
    key: jax.Array,
) -> optax.GradientTransformation:
    """Drop-in for `optax.contrib.differentially_private_aggregate`, with a privacy guarantee.

    It is meant for code that computes per-example gradients itself. It differs from optax's
    transform where that one is not private: it divides by the expected batch size (a public
    constant) instead of the realized one, and an example with a non-finite gradient contributes
    zero.

    Args:
        l2_norm_clip: clip bound C, or any `ClipRule`.
        noise_multiplier: sigma, in units of the sensitivity.
        expected_batch_size: B, a public constant.
        key: typed PRNG key of the whole run, secret.

    Returns:
        A transform whose `update` takes a tree of `[batch, ...]` per-example gradients, each of ONE
        example. It cannot detect gradients of means, for which it guarantees nothing.

    Guarantees:
        For per-example gradients, those of `gaussian`.

    Raises:
        TypeError, ValueError: as `gaussian`, and for a bound out of range.

    >>> import jax, jax.numpy as jnp
    >>> tx = aggregate(1.0, 0.0, 4, key=jax.random.key(0))
    >>> per_example = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
    >>> updates, _ = tx.update(per_example, tx.init({"w": jnp.zeros(2)}))
    >>> [round(float(u), 3) for u in updates["w"]]  # ([0.6, 0.8] + [0, 0.5]) / 4
    [0.15, 0.325]
    """
    rule = l2_norm_clip if isinstance(l2_norm_clip, ClipRule) else flat(l2_norm_clip)
    noise = gaussian(noise_multiplier, expected_batch_size, key=key)
    # The gradient of a linear loss is its coefficients: the per-example gradients themselves.
    # Products of entries, not `vdot`, which an accelerator may take in fewer bits.
    clip = clipped_sum(
        lambda params, grads: optax.tree.sum(optax.tree.mul(params, grads)),
        rule,
        method="vmap",
        secure_noise=noise_multiplier if chacha.is_chacha(key) else None,
    )

    def update(
        updates: PyTree, state: GaussianState, params: PyTree | None = None
    ) -> tuple[PyTree, GaussianState]:
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], jnp.float32), updates)
        everyone = jnp.ones(jax.tree.leaves(updates)[0].shape[0], bool)
        return noise.update(clip(zeros, updates, everyone)[0], state, params)

    return optax.GradientTransformation(noise.init, update)


def check_scale(name: str, value: jax.typing.ArrayLike, *, zero: bool = False) -> None:
    """Raises ValueError unless a scalar is finite and > 0, or >= 0 where zero is allowed."""
    if isinstance(value, jax.core.Tracer):
        return  # its value is unknown while tracing
    number = float(np.asarray(value))  # comparing an array of JAX's would be traced under jit
    if not 0 <= number < np.inf or (number == 0 and not zero):
        raise ValueError(f"{name}={value} must be {'>=' if zero else '>'} 0 and finite.")
