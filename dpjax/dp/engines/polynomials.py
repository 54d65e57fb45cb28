"""Runs a jaxpr on polynomials in an array u, of which each coefficient is one number for a column.

Sums of such a polynomial over the rows of a column are its coefficients times the sums of 1, u and
u^2: they have no u in them, and may be put into any equation. `run` takes each equation to the
polynomials of its results, up to the square of u, or raises `OtherForm`; see `columns`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dpjax.dp.engines.views import View, follow

__all__ = ["OtherForm", "Polynomial", "plain", "run"]

_SAME = ("copy", "name", "sharding_constraint", "optimization_barrier")
_ELEMENTWISE = (
    "abs", "add", "add_any", "convert_element_type", "div", "exp", "integer_pow", "log", "max",
    "min", "mul", "neg", "pow", "rsqrt", "sqrt", "square", "sub",
)  # fmt: skip
_MOVES = ("transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims")


class OtherForm(Exception):
    """The function is no such polynomial."""


class Polynomial(NamedTuple):
    """A sum over k of parts[k] * u^k.

    Attributes:
        shape: of the value.
        parts: each of the value's rank, and of length 1 along any axis along which it is constant.
        rows: the axes, longer than 1, that run along columns; none of a value that lacks u.
        moments: m1 and m2, of length 1 along the rows.
        view: u as a view of the leaf.
    """

    shape: tuple[int, ...]
    parts: tuple[jax.Array, ...]
    rows: frozenset[int] = frozenset()
    moments: tuple[jax.Array, ...] = ()
    view: View | None = None

    @property
    def degree(self) -> int:
        return len(self.parts) - 1

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape without the numbers of a column."""
        return tuple(1 if i in self.rows else size for i, size in enumerate(self.shape))

    def whole(self) -> jax.Array:
        """The value as an array, if it lacks u."""
        if self.degree:
            raise OtherForm
        return jnp.broadcast_to(self.parts[0], self.shape)

    def with_parts(self, parts: Sequence[jax.Array]) -> Polynomial:
        """Another polynomial in the same u."""
        if any(part.shape[axis] != 1 for part in parts for axis in self.rows):
            raise OtherForm  # numbers of one column are treated differently
        return self._replace(parts=tuple(parts))


def plain(array: Any) -> Polynomial:
    """An array without u."""
    array = jnp.asarray(array)
    return Polynomial(array.shape, (array,))


def run(closed: core.ClosedJaxpr, operands: Sequence[Polynomial]) -> Polynomial:
    """The first result of a jaxpr.

    Args:
        closed: the jaxpr.
        operands: its arguments, of which one may know u.

    Raises:
        OtherForm: some equation makes no such polynomial.
    """
    jaxpr: Any = closed.jaxpr
    env = dict(zip(jaxpr.constvars, map(plain, closed.consts)))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Polynomial:
        return plain(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _results(eqn, [read(atom) for atom in eqn.invars])))
    return read(jaxpr.outvars[0])


def _results(eqn: core.JaxprEqn, args: list[Polynomial]) -> list[Polynomial]:
    """The results of an equation."""
    name = eqn.primitive.name
    if not args:  # such as an iota
        out = eqn.primitive.bind(**eqn.primitive.get_bind_params(eqn.params))
        return [plain(own) for own in (out if eqn.primitive.multiple_results else [out])]
    if name in _SAME:
        return args
    first = args[0]
    if name in _MOVES:
        return [_moved(eqn, first)]
    if name == "reduce_sum":
        return [_summed(first, eqn.params["axes"])]
    if not any(arg.degree for arg in args):
        params = eqn.primitive.get_bind_params(eqn.params)
        if name in _ELEMENTWISE:  # what is constant along columns stays so
            shape = tuple(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
            parts = [_of_rank(arg.parts[0], len(shape)) for arg in args]
            return [
                Polynomial(shape, (eqn.primitive.bind(*jnp.broadcast_arrays(*parts), **params),))
            ]
        outs = eqn.primitive.bind(*(arg.whole() for arg in args), **params)
        return [plain(out) for out in (outs if eqn.primitive.multiple_results else [outs])]
    if name == "neg":
        return [first.with_parts([-part for part in first.parts])]
    if name == "convert_element_type":
        dtype = eqn.params["new_dtype"]
        return [first.with_parts([part.astype(dtype) for part in first.parts])]
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
        return [_product(first, first)]
    if name == "mul":
        return [_product(*args)]
    if name == "div" and not args[1].degree:
        return [_product(first, args[1], jnp.divide)]
    if name in ("add", "add_any", "sub"):
        second = args[1]
        if name == "sub":
            second = second._replace(parts=tuple(-part for part in second.parts))
        return [_added(first, second)]
    raise OtherForm


def _of_rank(array: jax.Array, rank: int) -> jax.Array:
    return array.reshape((1,) * rank) if array.ndim < rank else array  # a scalar meets an array


def _in_common(a: Polynomial, b: Polynomial) -> Polynomial:
    """The one that knows u; both, if they know the same."""
    known, other = (a, b) if a.degree else (b, a)
    if other.degree and (known.shape, known.rows, known.view) != (
        other.shape, other.rows, other.view,
    ):  # fmt: skip
        raise OtherForm
    return known


def _product(a: Polynomial, b: Polynomial, times: Any = jnp.multiply) -> Polynomial:
    known = _in_common(a, b)
    if a.degree + b.degree > 2:
        raise OtherForm
    parts: list[Any] = [None] * (a.degree + b.degree + 1)
    rank = len(known.shape)
    for (i, x), (j, y) in itertools.product(enumerate(a.parts), enumerate(b.parts)):
        term = times(_of_rank(x, rank), _of_rank(y, rank))
        parts[i + j] = term if parts[i + j] is None else parts[i + j] + term
    return known.with_parts(parts)


def _added(a: Polynomial, b: Polynomial) -> Polynomial:
    known, rank = _in_common(a, b), len(a.shape) or len(b.shape)
    pairs = itertools.zip_longest(a.parts, b.parts)
    parts = [
        _of_rank(x if y is None else y, rank)
        if x is None or y is None
        else _of_rank(x, rank) + _of_rank(y, rank)
        for x, y in pairs
    ]
    return known.with_parts(parts)


def _summed(value: Polynomial, axes: Sequence[int]) -> Polynomial:
    """The sum over some axes: over whole columns, or of a value that lacks u."""
    total = value.parts[0]
    if value.degree:
        if not value.rows <= set(axes):
            raise OtherForm
        total = math.prod(value.shape[i] for i in value.rows) * total
        for part, moment in zip(value.parts[1:], value.moments):
            total = total + part * moment
    shape = value.columns if value.degree else value.shape
    return plain(jnp.sum(jnp.broadcast_to(total, shape), tuple(axes)))


def _moved(eqn: core.JaxprEqn, value: Polynomial) -> Polynomial:
    """The value with other axes."""
    after: tuple[int, ...] = tuple(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
    name, before = eqn.primitive.name, value.shape
    places: list[int | None]  # by axis, that of the value before; of a new axis None
    if name == "transpose":
        places = list(eqn.params["permutation"])
    elif name == "broadcast_in_dim":
        dims = list(eqn.params["broadcast_dimensions"])
        places = [dims.index(i) if i in dims else None for i in range(len(after))]
        if value.degree and math.prod(before) != math.prod(after):
            raise OtherForm  # numbers of u are repeated
    elif not value.degree:
        return plain(value.whole().reshape(after))
    else:
        return _reshaped(eqn, value, after)

    def moved(array: jax.Array) -> jax.Array:
        if name == "transpose":
            return array.transpose(places)
        return array.reshape([1 if i is None else array.shape[i] for i in places])

    rows = frozenset(i for i, place in enumerate(places) if place in value.rows)
    parts, moments = (tuple(map(moved, arrays)) for arrays in (value.parts, value.moments))
    return Polynomial(after, parts, rows, moments, _view(eqn, value))


def _reshaped(eqn: core.JaxprEqn, value: Polynomial, after: tuple[int, ...]) -> Polynomial:
    """Of a value that knows u: rows may be merged with rows, and columns with columns."""
    own = [i for i, size in enumerate(value.shape) if size != 1]
    rest = [i for i, size in enumerate(after) if size != 1]
    rows: set[int] = set()
    while own:
        block, target = [own.pop(0)], [rest.pop(0)]
        while (lack := math.prod(value.shape[i] for i in block)
               - math.prod(after[i] for i in target)) != 0:  # fmt: skip
            block += [own.pop(0)] if lack < 0 else []
            target += [rest.pop(0)] if lack > 0 else []
        if value.rows.isdisjoint(block):
            continue
        if not value.rows.issuperset(block):
            raise OtherForm
        rows.update(target)
    shape = [1 if i in rows else size for i, size in enumerate(after)]

    def moved(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(array, value.columns).reshape(shape)

    parts, moments = (tuple(map(moved, arrays)) for arrays in (value.parts, value.moments))
    return Polynomial(after, parts, frozenset(rows), moments, _view(eqn, value))


def _view(eqn: core.JaxprEqn, value: Polynomial) -> View | None:
    if value.view is None:
        return None
    views = follow(eqn, [(value.view,)])
    if views is None or len(views[0]) != 1:
        raise OtherForm
    return views[0][0]
