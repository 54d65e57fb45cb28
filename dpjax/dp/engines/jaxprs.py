"""Reads jaxprs: what is inside of an equation, whatever JAX's version calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.views import is_full

__all__ = ["convolves_inside", "equations", "inlined", "inner_jaxprs", "is_closed", "scan_parts"]

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


def inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The bodies, branches and functions that an equation has."""
    parts = jax.tree.leaves(list(eqn.params.values()))
    closed = [p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in parts]
    return [p for p in closed if isinstance(p, core.Jaxpr)]


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations of a jaxpr, those inside of others included.

    Not those of Pallas kernels, which write to arrays of their own as a matter of course.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for inner in inner_jaxprs(eqn):
                yield from equations(inner)


def convolves_inside(eqn: core.JaxprEqn) -> bool:
    """Whether the inside of an equation, or of its derivative, may have convolutions."""
    # The derivative that a custom rule has is not in its parameters in readable form.
    inner = [e for jaxpr in inner_jaxprs(eqn) for e in equations(jaxpr)]
    custom = any(e.primitive.name.startswith("custom_vjp") for e in [eqn, *inner])
    return custom or any(e.primitive is P.conv_general_dilated_p for e in inner)


def inlined(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """The inner jaxpr and constants of a call that only groups equations, remat included."""
    if eqn.primitive is P.remat_p:
        return eqn.params["jaxpr"], ()
    name = _CALLS.get(eqn.primitive.name)
    return None if name is None else (eqn.params[name].jaxpr, eqn.params[name].consts)


def is_closed(eqn: core.JaxprEqn) -> bool:
    """Whether an equation has an inside (a loop, a custom rule) that may have fewer bits.

    What a function such as `jax.nn.softplus` computes, which has a rule for its derivative, can be
    seen.
    """
    inside = inner_jaxprs(eqn)
    if inlined(eqn) is None and eqn.primitive.name != "custom_jvp_call":
        return bool(inside)
    inner = [e for jaxpr in inside for e in jaxpr.eqns]
    return any(is_closed(e) or not all(is_full(v.aval) for v in e.outvars) for e in inner)


def scan_parts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan.

    Read from shapes, because the equation's parameters that say it changed their names between
    versions of JAX: what is scanned or stacked has one axis more outside of the body than inside.
    """
    body = eqn.params["jaxpr"].jaxpr
    ndim = lambda atom: len(atom.aval.shape)  # noqa: E731
    num_scanned = sum(ndim(v) > ndim(w) for v, w in zip(eqn.invars, body.invars))
    num_carry = sum(ndim(v) == ndim(w) for v, w in zip(eqn.outvars, body.outvars))
    return len(eqn.invars) - num_scanned - num_carry, num_carry
