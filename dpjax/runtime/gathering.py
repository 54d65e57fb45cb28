"""Sharded parameters that are gathered where a function uses them, and again in the backward pass.

Differentiating a function keeps its constants from the forward pass to the backward pass. A
parameter that is gathered first would therefore be held whole, and all of them at once. Here an
equation that reads one is checkpointed together with the gathering: of it, only the shard and the
other operands are kept. What is computed from sharded parameters alone, such as a conversion, a
transpose or a standardized kernel, is computed again at each use. So is what is
computed from other parameters that the caller marks, such as the floats of a frozen matrix of 8-bit
integers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax import dp
from dpjax.runtime.sharding import AXIS

__all__ = ["at_use", "gathers_in_branches", "held"]

PyTree = Any

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


class _Later(NamedTuple):
    """A value that is computed from sharded parameters alone.

    Attributes:
        shards: of these parameters.
        make: gathers shards and computes the value.
    """

    shards: tuple[jax.Array, ...]
    make: Callable[[tuple[jax.Array, ...]], jax.Array]


def at_use(
    function: Callable[..., Any], shards: PyTree, axes: PyTree, marks: Sequence[bool] | None = None
) -> Callable[..., Any]:
    """Closes a function over parameters of which every device holds a shard.

    Args:
        function: `(parameters, *args) -> result`, arrays and trees of such.
        shards: this device's part of the parameters, inside of `shard_map`.
        axes: the axis along which each is sharded, -1 for a parameter that is here whole.
        marks: for each array, whether what is computed from it alone is computed at each use, even
            if it is here whole; None marks none.

    Returns:
        `(*args) -> result`. Its collectives run in the same order on every device, unless a
        caller puts them into a branch or a loop that depends on a device's own data: see
        `gathers_in_branches`.
    """

    def later(shard: jax.Array, axis: int, marked: bool) -> Any:
        if axis >= 0:
            return _Later((shard,), lambda s: _gathered(s[0], axis))
        return _Later((shard,), lambda s: s[0]) if marked else shard

    def call(*args: Any) -> Any:
        closed, out = jax.make_jaxpr(function, return_shape=True)(_shapes(shards, axes), *args)
        leaves, sides = jax.tree.leaves(shards), jax.tree.leaves(axes)
        values = list(map(later, leaves, sides, marks or [False] * len(leaves)))
        results = _evaluate(closed.jaxpr, closed.consts, [*values, *jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(out), [_now(value) for value in results])

    return call


def held(shards: PyTree, axes: PyTree) -> dp.Held:
    """Trainable parameters for the engine: gathered in the loss as by `at_use`, and one by one.

    Args:
        shards: this device's part of the parameters, inside of `shard_map`.
        axes: the axis along which each is sharded, -1 for a parameter that is here whole.
    """
    leaves, sides = jax.tree.leaves(shards), jax.tree.leaves(axes)
    return dp.Held(
        shapes=_shapes(shards, axes),
        leaf=lambda i: leaves[i] if sides[i] < 0 else _gathered(leaves[i], sides[i]),
        at_use=lambda function: at_use(function, shards, axes),
    )


def _gathered(shard: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(shard, AXIS, axis=axis, tiled=True)


def _shapes(shards: PyTree, axes: PyTree) -> PyTree:
    size = jax.lax.axis_size(AXIS)

    def whole(shard: jax.Array, axis: int) -> Any:
        shape = [n * (size if i == axis else 1) for i, n in enumerate(shard.shape)]
        return jax.ShapeDtypeStruct(shape, shard.dtype)

    return jax.tree.map(whole, shards, axes)


def _now(value: Any) -> Any:
    return value.make(value.shards) if isinstance(value, _Later) else value


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates equations; results of sharded parameters alone are left for later."""
    env: dict[Any, Any] = {**dict(zip(jaxpr.constvars, consts)), **dict(zip(jaxpr.invars, args))}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _results(eqn, values)))
    return [read(atom) for atom in jaxpr.outvars]


def _results(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    later = [value for value in values if isinstance(value, _Later)]
    if not later:
        return _bind(eqn, values)
    name = _CALLS.get(eqn.primitive.name)
    if name is not None:
        inner = eqn.params[name]
        return _evaluate(inner.jaxpr, inner.consts, values)
    shards = [value.shards for value in later]

    def merged(shards: Sequence[tuple[jax.Array, ...]], here: Sequence[Any]) -> list[Any]:
        """The operands, with the later ones of these shards."""
        rows, rest = iter(shards), iter(here)
        return [v._replace(shards=next(rows)) if isinstance(v, _Later) else next(rest)
                for v in values]  # fmt: skip

    here = [value for value in values if not isinstance(value, _Later)]
    if all(
        isinstance(v, _Later) or isinstance(a, core.Literal) for v, a in zip(values, eqn.invars)
    ):
        ends = list(itertools.accumulate(map(len, shards), initial=0))

        def make(shards: tuple[jax.Array, ...], index: int) -> jax.Array:
            own = [shards[a:b] for a, b in itertools.pairwise(ends)]
            return _bind(eqn, list(map(_now, merged(own, here))))[index]

        every = tuple(itertools.chain(*shards))
        return [_Later(every, functools.partial(make, index=i)) for i in range(len(eqn.outvars))]
    if eqn.primitive is P.remat_p:  # what the model checkpoints stays one block

        def block(*here: Any) -> list[Any]:
            return list(map(_now, _evaluate(eqn.params["jaxpr"], (), merged(shards, here))))

        more = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        return list(jax.checkpoint(block, **more)(*here))

    def use(*here: Any) -> list[Any]:
        # Bound to an operand that the parameter is about to meet, it can be gathered neither long
        # before nor once for all turns of a loop over examples.
        met = [i for i, x in enumerate(here) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        bound, numbers = jax.lax.optimization_barrier((shards, [here[i] for i in met]))
        here = tuple(dict(zip(met, numbers)).get(i, x) for i, x in enumerate(here))
        return _bind(eqn, list(map(_now, merged(bound, here))))

    return list(jax.checkpoint(use)(*here))


def _bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def gathers_in_branches(jaxpr: core.Jaxpr, inside: bool = False) -> bool:
    """Whether a device's data decides if, or how often, it gathers: others would wait for ever."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name == "all_gather":
            return True
        within = inside or eqn.primitive in (P.while_p, P.cond_p)
        for part in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(part, "jaxpr", part)
            if isinstance(inner, core.Jaxpr) and gathers_in_branches(inner, within):
                return True
    return False
