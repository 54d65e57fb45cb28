"""Clipping rules: from the gradient norms of one example to its scale factors.

A rule never touches a gradient. It names groups of leaves and holds a function from ONE example's
group norms to one factor per group. `ClipRule.factors` calls the function and limits what it
returns, so that `factor * norm <= bound` holds for every group, every norm and every function,
a user's included. The L2 sensitivity of a sum of gradients scaled this way, under adding or
removing one example, is therefore `sqrt(sum(bounds**2))`. Every engine shares the rules.

Bounds are arrays: a jitted function that takes a rule as an argument does not recompile when the
bound changes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "SMALLEST_NORM",
    "ClipRule",
    "ClippedSum",
    "PerExample",
    "automatic",
    "by_leaf",
    "by_prefix",
    "flat",
    "global_",
    "one_group",
    "per_layer",
    "rule",
]

PyTree = Any
Grouping = Callable[[PyTree], tuple[int, ...]]

# A float32 factor is a rounded quotient of a rounded norm, and what it multiplies is rounded once
# more. The norm is the root of a sum of squares. The engines make sure that XLA adds them in trees
# with branches of 32: five levels for 3e7 entries, each of which is off by at most 31 units
# in the last place, and half of that after the root. Shrinking every factor by 128 units keeps the
# promise in exact arithmetic; it changes updates by 8e-6 relative. Engines that measure a norm in
# another way add their own margin to it.
_ROUNDING = 1.0 - 2.0**-17

# Entries below 1e-19 have squares that underflow, so a norm can be measured too small by up to
# 1e-19 * sqrt(parameters). No gradient is scaled up as if its norm were below this value, which
# keeps the part that was not measured below 1e-5 of the bound for up to 1e10 parameters.
SMALLEST_NORM = 1e-9

# Above it squares of norms, and quotients of bounds and norms, leave the range of float32.
_LARGEST_BOUND = 1e15


class _NoiseFirst(type):
    """Says what to do where JAX's messages show the type: a wrapper stands before the noise."""

    def __repr__(cls) -> str:
        return (
            f"<class '{cls.__module__}.{cls.__qualname__}'> (noise comes first: chain dp.gaussian "
            "before the optimizer, and put wrappers such as MultiSteps, masked, partition or "
            "apply_if_finite around what follows it)"
        )


_UNSEALED = object()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum(metaclass=_NoiseFirst):
    """A sum of clipped per-example gradients, with the sensitivity that clipping gave it.

    The only input the noise transforms accept. Sums over disjoint chunks of one batch add. It is a
    tree, so a transform that scales or clips gradients would go through it, by a factor that may
    depend on private data, and change sum and sensitivity alike: the noise would be scaled too. Its
    seal notices that, for arithmetic makes it another type. (A schedule before the noise passes:
    its factor is public, and scales sum and noise alike.)

    Attributes:
        value: pytree of float32 arrays, the sum (never a mean); of int32 arrays for secure noise.
        sensitivity: float32 scalar, the L2 sensitivity of the sum to adding or removing one
            example.
        seal: bool, set here.
        unit: of an int32 value: what 1 stands for, float32 scalar. None: `value` is float32.
    """

    value: PyTree
    sensitivity: jax.Array
    seal: Any = _UNSEALED
    unit: jax.Array | None = None

    def __post_init__(self) -> None:
        if self.seal is _UNSEALED:
            object.__setattr__(self, "seal", jnp.ones(jnp.shape(self.sensitivity), bool))

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Sum over the union of two disjoint chunks; an example is in one of them only."""
        if not isinstance(other, ClippedSum):
            return NotImplemented
        value = jax.tree.map(jnp.add, self.value, other.value)
        sensitivity = jnp.maximum(self.sensitivity, other.sensitivity)
        return ClippedSum(value, sensitivity, self.seal & other.seal, self._common_unit(other))

    def _common_unit(self, other: ClippedSum) -> jax.Array | None:
        """The unit of both sums; NaN if they differ. An empty sum, of unit 0, has any."""
        if self.unit is None or other.unit is None:
            if self.unit is not other.unit:
                raise TypeError(
                    "a sum of integers (for secure noise) and one of floats do not add."
                )
            return None
        same = (self.unit == other.unit) | (self.unit == 0) | (other.unit == 0)
        return jnp.where(same, jnp.maximum(self.unit, other.unit), jnp.nan)

    def __radd__(self, other: object) -> ClippedSum:
        """Lets `sum(chunks)` start from its 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


class PerExample(NamedTuple):
    """Facts about each example of a batch. NOT private: log them as `nonprivate/...` only.

    Attributes:
        loss: `[batch]` float32, 0 for padding.
        norms: `[batch, groups]` float32 gradient norms before clipping, 0 for padding.
        factors: `[batch, groups]` float32 scale factors, 0 for padding and non-finite examples.
        real: `[batch]` bool, False for padding.
    """

    loss: jax.Array
    norms: jax.Array
    factors: jax.Array
    real: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "parameters"),
    meta_fields=("function", "grouping", "normalized"),
)
@dataclasses.dataclass(frozen=True)
class ClipRule:
    """How one example's gradient is scaled, from its group norms alone.

    Build one with `flat`, `per_layer`, `automatic`, `global_`, or `rule` for a function of yours.

    Attributes:
        threshold: clip bound C, scalar or `[groups]`, in units of gradient norm. Traced.
        parameters: further arguments of `function`, by name. Traced.
        function: `(norms, thresholds, **parameters) -> factors`, all `[groups]` float32.
        grouping: maps a tree to the group index of each of its leaves, in `jax.tree.leaves` order.
        normalized: factors are divided by the bound, so that the sensitivity is 1 whatever C is
            and the learning rate does not depend on C (arXiv 2204.13650, section 3.2).

    Guarantees:
        `factors(norms) * norms <= bounds(len(norms))` for all norms, in every group, whatever
        `function` returns; all factors are 0 if any norm is not finite.
    """

    threshold: Any
    parameters: dict[str, Any]
    function: Callable[..., jax.Array]
    grouping: Grouping
    normalized: bool

    def groups(self, tree: PyTree) -> tuple[int, ...]:
        """Returns the group index (0..G-1) of each leaf of `tree`."""
        groups = self.grouping(tree)
        if sorted(set(groups)) != list(range(max(groups, default=-1) + 1)):
            raise ValueError(f"groups={groups} must use every index from 0 without gaps.")
        return groups

    def num_groups(self, tree: PyTree) -> int:
        """Returns the number of groups the leaves of `tree` fall into."""
        return max(self.groups(tree), default=-1) + 1

    def thresholds(self, num_groups: int) -> jax.Array:
        """Returns the norm at which each group is clipped, `[groups]` float32.

        A scalar C is shared as C/sqrt(groups), so that the total is C.
        """
        threshold = jnp.asarray(self.threshold, jnp.float32)
        if threshold.ndim == 0:
            return jnp.full((num_groups,), 1 / math.sqrt(max(num_groups, 1))) * threshold[None]
        if threshold.shape != (num_groups,):
            raise ValueError(
                f"bound has {threshold.shape[0]} entries, but the parameters form {num_groups} "
                "groups."
            )
        return threshold

    def bounds(self, num_groups: int) -> jax.Array:
        """Returns the promised upper bound on each group's scaled norm, `[groups]` float32."""
        thresholds = self.thresholds(num_groups)
        if not self.normalized:
            return thresholds
        return thresholds / jnp.linalg.norm(thresholds, keepdims=True)

    def sensitivity(self) -> jax.Array:
        """Returns sqrt(sum(bounds**2)), the clipped sum's L2 sensitivity to one example.

        A float32 scalar: it does not depend on the number of groups that share a scalar bound.
        """
        if self.normalized:
            return jnp.ones((), jnp.float32)
        return jnp.linalg.norm(jnp.atleast_1d(jnp.asarray(self.threshold, jnp.float32)))

    def factors(self, norms: jax.Array) -> jax.Array:
        """Returns the scale factors of ONE example.

        Args:
            norms: `[groups]` L2 norms of the example's gradient.

        Returns:
            `[groups]` float32 factors, 0 in every group if any norm is not finite.
        """
        norms = norms.astype(jnp.float32)
        thresholds = self.thresholds(norms.shape[0])
        finite = jnp.isfinite(norms)
        safe = jnp.where(finite, norms, 1.0)
        wanted = self.function(safe, thresholds, **self.parameters)
        wanted = jnp.broadcast_to(jnp.asarray(wanted, jnp.float32), norms.shape)
        # The function may return anything. NaN and negative numbers become 0, and nothing exceeds
        # the factor that brings the norm to its bound.
        largest = thresholds / jnp.maximum(safe, SMALLEST_NORM)
        factors = jnp.where(wanted > 0, jnp.minimum(wanted, largest), 0.0)
        if self.normalized:
            factors = factors / jnp.linalg.norm(thresholds, keepdims=True)
        usable = jnp.all(finite & jnp.isfinite(factors), keepdims=True)
        return jnp.where(usable, factors * _ROUNDING, 0.0)


def one_group(tree: PyTree) -> tuple[int, ...]:
    """Puts every leaf into one group: the norm is that of the whole gradient.

    Args:
        tree: the trainable parameters.

    Returns:
        0 for each leaf, in `jax.tree.leaves` order.
    """
    return (0,) * len(jax.tree.leaves(tree))


def by_leaf(tree: PyTree) -> tuple[int, ...]:
    """Puts every leaf into a group of its own.

    Args:
        tree: the trainable parameters.

    Returns:
        0, 1, 2, ... in `jax.tree.leaves` order.
    """
    return tuple(range(len(jax.tree.leaves(tree))))


def by_prefix(depth: int) -> Grouping:
    """Groups leaves that share the first `depth` keys of their path (say, per block).

    Args:
        depth: number of leading path keys, at least 1.

    Returns:
        A grouping, for `per_layer` and the like; equal depths give the same object, so that jit
        caches hit.

    Raises:
        ValueError: `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be >= 1.")
    return _by_prefix(depth)


@functools.cache
def _by_prefix(depth: int) -> Grouping:
    def by_prefix(tree: PyTree) -> tuple[int, ...]:
        order: dict[Any, int] = {}
        paths = [path[:depth] for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        return tuple(order.setdefault(path, len(order)) for path in paths)

    return by_prefix


def rule(
    function: Callable[..., jax.Array],
    bound: jax.typing.ArrayLike,
    *,
    grouping: Grouping = one_group,
    normalized: bool = False,
    **parameters: Any,
) -> ClipRule:
    """Makes a clipping rule of any function from norms to factors.

    Args:
        function: `(norms, thresholds, **parameters) -> factors` for ONE example, `[groups]`
            float32 each, in jax.numpy. A factor that would leave a norm above its threshold is
            lowered until it does not.
        bound: clip bound C > 0, shared as C/sqrt(groups), or one bound per group `[groups]`.
        grouping: `one_group`, `by_leaf`, `by_prefix(depth)` or any function from a tree to groups.
        normalized: divide all factors by sqrt(sum(bounds**2)), for sensitivity 1.
        **parameters: passed to `function`; numbers and arrays, traced in jit.

    Returns:
        The rule, of sensitivity sqrt(sum(bounds**2)), or 1 if `normalized`.

    Raises:
        ValueError: the bound is not positive and finite.
        TypeError: `function` cannot be called.

    >>> soft = rule(lambda n, c: c * jax.numpy.tanh(n / c) / n, 2.0)  # SoftAdaClip, 2510.01447
    >>> round(float(soft.factors(jax.numpy.array([4.0]))[0]), 3)
    0.482
    """
    if not callable(function):
        raise TypeError(f"function={function!r} must be a function from norms to factors.")
    _check_positive("bound", bound)
    return ClipRule(bound, parameters, function, grouping, normalized)


def _flat(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    return jnp.where(norms > thresholds, thresholds / jnp.maximum(norms, SMALLEST_NORM), 1.0)


def _automatic(norms: jax.Array, thresholds: jax.Array, gamma: jax.Array) -> jax.Array:
    total = norms + gamma
    return jnp.where(norms > 0, thresholds / jnp.where(total > 0, total, 1.0), 0.0)


def _keep_or_drop(norms: jax.Array, thresholds: jax.Array) -> jax.Array:
    return jnp.where(norms <= thresholds, 1.0, 0.0)


def flat(bound: jax.typing.ArrayLike, *, normalized: bool = False) -> ClipRule:
    """Clips the norm of the whole gradient: factor min(1, C/|g|).

    Args:
        bound: clip bound C > 0, scalar.
        normalized: use min(1/C, 1/|g|) instead, with sensitivity 1 (arXiv 2510.20616).

    Returns:
        The rule, of sensitivity `bound`, or 1 if `normalized`.

    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1.

    >>> flat(2.0).factors(jax.numpy.array([4.0])).round(3)
    Array([0.5], dtype=float32)
    """
    _check_positive("bound", bound, scalar=True)
    return ClipRule(bound, {}, _flat, one_group, normalized)


def per_layer(
    bounds: jax.typing.ArrayLike,
    *,
    grouping: Grouping = by_leaf,
    normalized: bool = False,
) -> ClipRule:
    """Clips each group of leaves on its own.

    Args:
        bounds: total bound C > 0, shared as C/sqrt(groups), or one bound per group `[groups]`.
        grouping: `by_leaf`, `by_prefix(depth)` or any function from a tree to group indices.
        normalized: divide all factors by sqrt(sum(bounds**2)), for sensitivity 1.

    Returns:
        The rule, of sensitivity sqrt(sum(bounds**2)), or 1 if `normalized`.

    Source: McMahan et al. 2018, arXiv 1710.06963; Bu et al., arXiv 2106.07830, layerwise clipping.
    """
    _check_positive("bounds", bounds)
    return ClipRule(bounds, {}, _flat, grouping, normalized)


def automatic(
    bound: jax.typing.ArrayLike = 1.0,
    *,
    gamma: jax.typing.ArrayLike = 0.01,
    normalized: bool = False,
    grouping: Grouping = one_group,
) -> ClipRule:
    """Normalizes every gradient: factor C/(|g| + gamma), without a bound to tune.

    Args:
        bound: C > 0; it only scales the update, so 1 is usual.
        gamma: stability constant, 0.01 for AUTO-S; 0 gives AUTO-V.
        normalized: use 1/(|g| + gamma), for sensitivity 1.
        grouping: normalize per group instead of over the whole gradient.

    Returns:
        The rule, of sensitivity `bound`, or 1 if `normalized`.

    Source: Bu et al. 2022, arXiv 2206.07136, equations 4.1 (AUTO-V) and 4.2 (AUTO-S).
    """
    _check_positive("bound", bound)
    _check_positive("gamma", gamma, scalar=True, zero=True)
    return ClipRule(bound, {"gamma": gamma}, _automatic, grouping, normalized)


def global_(
    bound: jax.typing.ArrayLike, *, normalized: bool = False, grouping: Grouping = one_group
) -> ClipRule:
    """Keeps a gradient whose norm is at most the bound and drops it otherwise.

    Args:
        bound: R > 0.
        normalized: kept gradients are divided by R, for sensitivity 1.
        grouping: keep or drop per group ("global, layerwise").

    Returns:
        The rule, of sensitivity `bound`, or 1 if `normalized`.

    Source: Bu et al., arXiv 2106.07830, global clipping: factor 1{|g| <= R}.
    """
    _check_positive("bound", bound)
    return ClipRule(bound, {}, _keep_or_drop, grouping, normalized)


def _check_positive(
    name: str, value: jax.typing.ArrayLike, *, scalar: bool = False, zero: bool = False
) -> None:
    """Raises unless `value` is finite and positive; a traced value is checked by its caller."""
    if isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value)  # numpy: inside jit, jnp would make a traced value of it
    if numbers.dtype.kind not in "iuf":
        raise TypeError(f"{name}={value!r} must be a number.")
    if scalar and numbers.ndim != 0:
        raise ValueError(f"{name}={value!r} must be a scalar.")
    for v in numbers.astype(np.float64).ravel().tolist():
        if not math.isfinite(v) or v < 0 or (v == 0 and not zero):
            raise ValueError(f"{name}={value} must be {'>=' if zero else '>'} 0 and finite.")
        if not zero and v < SMALLEST_NORM:
            raise ValueError(
                f"{name}={value} must be >= {SMALLEST_NORM}, the smallest norm measured."
            )
        if v > _LARGEST_BOUND:
            raise ValueError(
                f"{name}={value} must be <= {_LARGEST_BOUND:g}: squares overflow above."
            )
