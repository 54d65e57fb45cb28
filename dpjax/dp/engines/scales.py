"""Takes numbers that scale a weight out of its products: x (s w) = s (x w).

Spectral normalization divides a kernel by a number that is computed from all of it; gates and
quantizers multiply one by a mean or by a learned number. The product s w is a function of its
leaves that mixes all of their numbers, so that its gradients would be formed for each example.
Behind the product, s is a scalar that meets the example, and w is used as it is, which the engine
has closed forms for. A number for each column of a weight may be taken out as well, if it is not
computed from the weight: the magnitudes of DoRA, whose norms have no gradient. (Miyato et al. 2018,
arXiv 1802.05957; Liu et al. 2024, arXiv 2402.09353.)

All of it is done on the jaxpr of the loss, in float32 alone, outside of loops and branches and not
across the border of a checkpointed call. The value is the same up to rounding where the numbers are
ordinary. It differs where x w leaves float32's range and x (s w) does not, at either end, and where
s is 0 or infinite: what is clipped and summed is then the gradient of s (x w), within the bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P
from jax.interpreters import partial_eval

from dpjax.dp.engines.jaxprs import equations, inlined
from dpjax.dp.engines.sites import axes_of, sites_of

__all__ = ["taken_out"]

_MOVES = {
    "copy", "name", "neg", "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "split",
    "rev",
}  # fmt: skip
_KEEP_PLACES = {"copy", "name", "neg", "mul", "div"}


class _Scale(NamedTuple):
    """A factor of a weight.

    Attributes:
        divides: whether the weight is divided by it.
        value: a scalar, or an array with all axes of the weight, of length 1 where it is constant.
    """

    divides: bool
    value: Any


class _Info(NamedTuple):
    """What is known of a value: as in `tracing`, and a weight's factors.

    Attributes:
        example: whether it depends on the example.
        leaves: those with a gradient that it is computed from otherwise.
        bare: the weight without its factors.
        scales: the factors.
        narrow: what was broadcast to this, with axes of length 1.
    """

    example: bool = False
    leaves: frozenset[int] = frozenset()
    bare: Any = None
    scales: tuple[_Scale, ...] = ()
    narrow: Any = None


def taken_out(jaxpr: core.Jaxpr, sizes: Sequence[int]) -> core.Jaxpr | None:
    """Takes scales of weights out of products.

    Args:
        jaxpr: of the loss of one example; leaves, then the example.
        sizes: how many numbers each leaf has.

    Returns:
        The same function of the same constants; None if there is nothing to take out, or if the
        loss has effects, such as `jax.debug.print`.
    """
    walk = _Walk(sizes)
    if any(eqn.effects for eqn in equations(jaxpr)):
        return None  # which may name a variable
    infos = [_Info(leaves=frozenset([i])) for i in range(len(sizes))]
    infos += [_Info(True)] * (len(jaxpr.invars) - len(sizes))
    walk.infos.update(zip(jaxpr.invars, infos))
    outs = walk.run(jaxpr, jaxpr.invars)
    if not walk.changed:
        return None
    own = jaxpr.replace(eqns=walk.eqns, outvars=outs)
    return partial_eval.dce_jaxpr(own, [True] * len(outs), instantiate=True)[0]


class _Walk:
    """Writes the equations of a jaxpr once more, calls that only group equations opened."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.eqns: list[core.JaxprEqn] = []
        self.infos: dict[Any, _Info] = {}
        self.changed = False

    def run(
        self, jaxpr: core.Jaxpr, args: Sequence[Any], constants: Sequence[Any] | None = None
    ) -> list[Any]:
        """Adds the equations of `jaxpr` with these arguments, and returns its results."""
        known = zip(jaxpr.constvars, jaxpr.constvars if constants is None else constants)
        env: dict[Any, Any] = dict(known) | dict(zip(jaxpr.invars, args))
        read = lambda atom: atom if isinstance(atom, core.Literal) else env[atom]  # noqa: E731
        for eqn in jaxpr.eqns:
            invars, inner = [read(atom) for atom in eqn.invars], inlined(eqn)
            if inner is not None and eqn.primitive is not P.remat_p:
                body, consts = inner
                constants = [core.Literal(c, v.aval) for c, v in zip(consts, body.constvars)]
                outs = self.run(body, invars, constants)
            else:
                outs = self.equation(eqn.replace(invars=invars))
            env.update(zip(eqn.outvars, outs))
        return [read(atom) for atom in jaxpr.outvars]

    def info(self, atom: Any) -> _Info:
        return _Info() if isinstance(atom, core.Literal) else self.infos.get(atom, _Info())

    def add(self, eqn: core.JaxprEqn) -> list[Any]:
        """Adds an equation as it is, with results of its own."""
        args = [self.info(atom) for atom in eqn.invars]
        stopped = eqn.primitive.name == "stop_gradient"
        leaves = frozenset[int]() if stopped else frozenset[int]().union(*(a.leaves for a in args))
        outs = [v if isinstance(v, core.DropVar) else core.Var(v.aval) for v in eqn.outvars]
        self.infos.update(dict.fromkeys(outs, _Info(any(a.example for a in args), leaves)))
        self.eqns.append(eqn.replace(outvars=outs))
        return outs

    def apply(self, function: Callable[..., jax.Array], eqn: core.JaxprEqn, *atoms: Any) -> Any:
        """Adds a function of some values; `eqn` has the line of the model that it is for."""
        avals = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in atoms]
        closed = jax.make_jaxpr(function)(*avals)
        own = [e.replace(source_info=eqn.source_info) for e in closed.jaxpr.eqns]
        (out,) = self.run(closed.jaxpr.replace(eqns=own), atoms)
        return out

    def equation(self, eqn: core.JaxprEqn) -> list[Any]:
        """Adds an equation; notes the factors of a weight, or takes them out of a product."""
        args = [self.info(atom) for atom in eqn.invars]
        places = [i for i, a in enumerate(args) if a.scales]
        if eqn.primitive is P.remat_p:
            return self.checkpointed(eqn, args)
        looks_up = eqn.primitive in (P.gather_p, P.dynamic_slice_p) and places == [0]
        if not looks_up and not all(map(_is_float32, (*eqn.invars, *eqn.outvars))):
            return self.add(eqn)
        meets = any(a.example for a in args)
        if eqn.primitive is P.dot_general_p and len(places) == 1:
            # A small product with a constant counts as one, such as with a recurrent layer's start.
            meets |= _size(eqn.outvars[0]) < _size(eqn.invars[places[0]])
        if meets:
            return self.take_out(eqn, places[0]) if len(places) == 1 else self.add(eqn)
        outs = self.add(eqn)
        if len(places) == 1 and eqn.primitive.name in _MOVES:
            self.move(eqn, places[0], outs)
        elif len(outs) == 1:
            self.note(eqn, args, outs)
        return outs

    def note(self, eqn: core.JaxprEqn, args: Sequence[_Info], outs: list[Any]) -> None:
        """Notes of a function of parameters alone what it repeats, or what it is a multiple of."""
        name, operands, info = eqn.primitive.name, eqn.invars, self.infos[outs[0]]
        out: Any = eqn.outvars[0].aval
        if name == "broadcast_in_dim" and args[0].leaves and _size(operands[0]) < _size(out):
            self.infos[outs[0]] = info._replace(narrow=self.broadcast(eqn, operands[0]))
        for i in {"mul": (0, 1), "div": (0,)}.get(name, ()):
            weight, other = operands[i], operands[1 - i]
            # Axes of length 1 are repeated by the product itself, or by a broadcast before it.
            value: Any = args[1 - i].narrow or other
            if not args[i].leaves or _size(weight) != _size(out):
                continue
            if isinstance(other, core.Literal) and _size(other) == 1:
                if args[i].scales:
                    self.move(eqn, i, outs)
                return
            if _size(value) < _size(weight) and self.is_scale(value, args[i]):
                if _size(value) == 1 and value.aval.ndim:
                    value = self.apply(lambda s: s.reshape(()), eqn, value)
                scales = (*args[i].scales, _Scale(name == "div", value))
                bare = args[i].bare or weight
                self.infos[outs[0]] = info._replace(bare=bare, scales=scales)
                return

    def is_scale(self, value: Any, weight: _Info) -> bool:
        """Whether a value may be a factor: a scalar, or numbers of small leaves, or of none."""
        leaves = self.info(value).leaves
        own = sum(self.sizes[i] for i in leaves) <= 2 * _size(value)
        return _size(value) == 1 or (own and leaves.isdisjoint(weight.leaves))

    def move(self, eqn: core.JaxprEqn, place: int, outs: list[Any]) -> None:
        """Moves the numbers of a bare weight as well, or multiplies them by a constant."""
        weight, scales = self.info(eqn.invars[place]), []
        for scale in weight.scales:
            value, name = scale.value, eqn.primitive.name
            if value.aval.ndim and name == "transpose":
                perm = eqn.params["permutation"]
                value = self.apply(lambda s, perm=perm: s.transpose(perm), eqn, value)
            elif value.aval.ndim and name == "broadcast_in_dim":
                value = self.broadcast(eqn, value)
            elif value.aval.ndim and name not in _KEEP_PLACES:
                return
            scales.append(scale._replace(value=value))
        for out, bare in zip(outs, self.add(_with(eqn, place, weight.bare))):
            self.infos[out] = self.infos[out]._replace(bare=bare, scales=tuple(scales))

    def broadcast(self, eqn: core.JaxprEqn, value: Any) -> Any:
        """A value with the axes of a broadcast's result, of length 1 where they are new."""
        out: Any = eqn.outvars[0].aval
        shape = [1] * out.ndim
        for size, axis in zip(value.aval.shape, eqn.params["broadcast_dimensions"]):
            shape[axis] = size
        return self.apply(lambda s: s.reshape(shape), eqn, value)

    def take_out(self, eqn: core.JaxprEqn, place: int) -> list[Any]:
        """Adds an equation in which a scaled weight meets the example, with the bare one."""
        info = self.info(eqn.invars[place])
        found = sites_of(eqn, place, (), info.leaves, (0,), ())
        if not found or eqn.params.get("fill_value"):  # which has no scale
            return self.add(eqn)
        axes = []
        for scale in info.scales:
            long = [i for i, size in enumerate(scale.value.aval.shape) if size > 1]
            axes.append({i: axes_of(found[0], i)[1] for i in long})
        if any(None in own.values() for own in axes):
            return self.add(eqn)
        self.changed = True
        (result,) = self.add(_with(eqn, place, info.bare))
        for (divides, value), own in zip(info.scales, axes):
            function = functools.partial(_times, divides=divides, axes=own)
            result = self.apply(function, eqn, result, value)
        return [result]

    def checkpointed(self, eqn: core.JaxprEqn, args: Sequence[_Info]) -> list[Any]:
        """A checkpointed call, which stays one, with scales taken out inside of it."""
        inner, inside = eqn.params["jaxpr"], _Walk(self.sizes)
        known = [_Info(a.example, a.leaves) for a in args]
        inside.infos.update(zip(inner.invars, known))
        outs = inside.run(inner, inner.invars)
        if inside.changed:
            self.changed = True
            own = inner.replace(eqns=inside.eqns, outvars=outs)
            eqn = eqn.replace(params={**eqn.params, "jaxpr": own})
        return self.add(eqn)


def _times(y: jax.Array, scale: jax.Array, divides: bool, axes: dict[int, Any]) -> jax.Array:
    """Scales the result of a product; `axes` says which of its axes are the scale's long ones."""
    if scale.ndim:
        order = sorted(axes, key=axes.__getitem__)
        sizes = {axes[i]: scale.shape[i] for i in order}
        scale = scale.transpose(*order, *(i for i in range(scale.ndim) if i not in axes))
        scale = scale.reshape([sizes.get(i, 1) for i in range(y.ndim)])
    return y / scale if divides else y * scale


def _with(eqn: core.JaxprEqn, place: int, atom: Any) -> core.JaxprEqn:
    return eqn.replace(invars=[atom if i == place else v for i, v in enumerate(eqn.invars)])


def _size(value: Any) -> int:
    return math.prod(getattr(value, "aval", value).shape)


def _is_float32(atom: Any) -> bool:
    return atom.aval.dtype == jnp.float32
