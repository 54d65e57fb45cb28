"""Evaluates a traced loss function with taps on its sites and scalars (see `sites`).

A tap is a zero added to a site's output, or to a scalar: the gradient with respect to it is the
cotangent of that value. The inputs of the sites come out beside the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.factored import Factored
from dpjax.dp.engines.jaxprs import inlined, scan_parts
from dpjax.dp.engines.sites import Key, Site
from dpjax.dp.engines.tracing import Traced

__all__ = ["evaluate", "function_of_leaves", "weight_of_leaves"]

_UNKNOWN = object()

Taps = dict[Key, jax.Array]
Wanted = dict[Key, Callable[[Sequence[Any]], Any]]  # what of an equation's operands is returned


def evaluate(
    traced: Traced, args: Sequence[Any], taps: Taps
) -> tuple[jax.Array, dict[Key, jax.Array]]:
    """Evaluates the loss of ONE example, adding `taps` to the outputs of the sites.

    Args:
        traced: the jaxpr and its sites.
        args: flat parameters, then the flat example.
        taps: for each site's equation an array of its output's shape, enclosing scans leading;
            for each scalar one of its shape.

    Returns:
        The loss and the input of each site's equation, enclosing scans leading.
    """
    taps = taps | {place: taps[first] for place, first in traced.same.items()}
    wanted = {site.equation: _input(site, traced.factored) for site in traced.sites}
    (loss,), inputs = _evaluate(traced.jaxpr, traced.consts, args, (), taps, wanted)
    return loss, inputs


def _input(site: Site, factored: dict[Key, Factored]) -> Callable[[Sequence[Any]], Any]:
    if site.kind == "embed" and "dimension_numbers" not in site.params:
        return lambda values: jnp.stack([_int32(v) for v in values[1:]])
    if site.kind == "embed":
        return lambda values: _int32(values[1])
    operand = factored[site.equation].operand if site.factor else site.operand
    return lambda values: _array(values[1 - operand])


def _int32(index: Any) -> jax.Array:
    """An index of any integer type; what is out of range stays out of range, on its side."""
    index, most = _array(index), jnp.iinfo(jnp.int32)
    if index.dtype == jnp.int32:
        return index
    own = jnp.iinfo(index.dtype)
    return jnp.clip(index, max(own.min, most.min), min(own.max, most.max)).astype(jnp.int32)


def _array(value: Any) -> jax.Array:
    """The value itself, if it is traced: what several equations read is recorded once."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _constant(value: Any, aval: Any) -> jax.Array:
    """A value that may be a constant of the jaxpr, in a form of JAX's own."""
    if isinstance(value, jax.Array):
        return value
    if getattr(aval, "weak_type", False) and np.ndim(value) == 0:
        number = jnp.asarray(np.asarray(value).item())  # as a Python number, which promotes nothing
        if number.dtype == aval.dtype:
            return number
    return jnp.asarray(value)


def function_of_leaves(traced: Traced, place: Key, operand: int, leaves: dict[int, Any]) -> Any:
    """Computes an operand of an equation from parameters alone, before it is converted.

    Args:
        traced: the jaxpr and its sites.
        place: the equation.
        operand: the operand, such as a derived weight.
        leaves: by index, the leaves that it is computed from.

    Returns:
        The operand.
    """
    args = [leaves.get(i, _UNKNOWN) for i in range(len(traced.jaxpr.invars))]
    for i, var in enumerate(traced.jaxpr.invars):
        aval: Any = var.aval
        if 0 in aval.shape:  # of no number, and so among no operand's leaves
            args[i] = jnp.zeros(aval.shape, aval.dtype)
    wanted: Wanted = {place: lambda values: values[operand]}
    return _evaluate(traced.jaxpr, traced.consts, args, (), {}, wanted, widen=operand)[1][place]


def weight_of_leaves(
    traced: Traced, site: Site, shapes: Sequence[Any]
) -> tuple[dict[int, jax.ShapeDtypeStruct], core.ClosedJaxpr]:
    """A derived weight as a function of its leaves.

    Args:
        traced: the jaxpr and its sites.
        site: a use of the weight.
        shapes: of all leaves, arrays or abstract values.

    Returns:
        The leaves that it is computed from, by index in order, and the function of them.
    """
    leaves = sorted(site.leaves)
    own = {i: jax.ShapeDtypeStruct(shapes[i].shape, shapes[i].dtype) for i in leaves}

    def weight(*args: jax.Array) -> Any:
        return function_of_leaves(traced, *site.place, dict(zip(leaves, args)))

    return own, jax.make_jaxpr(weight)(*own.values())


def _evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    prefix: Key,
    taps: Taps,
    wanted: Wanted,
    *,
    widen: int | None = None,
    wide: Sequence[Any] = (),
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """Evaluates `jaxpr` with taps; also returns what is wanted of the equations.

    Equations with unknown arguments are skipped and have unknown results. With `widen`, so are
    those with effects, and a wanted operand that is a conversion is returned as it was before;
    `wide` has `args` as they were.
    """
    env: dict[Any, Any] = {**dict(zip(jaxpr.constvars, consts)), **dict(zip(jaxpr.invars, args))}
    returned: dict[Key, jax.Array] = {}
    # Conversions, before they lost bits.
    unconverted: dict[Any, Any] = {v: w for v, w, a in zip(jaxpr.invars, wide, args) if w is not a}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def before(atom: Any) -> Any:
        return read(atom) if isinstance(atom, core.Literal) else unconverted.get(atom, env[atom])

    for i, eqn in enumerate(jaxpr.eqns):
        key = (*prefix, i)
        values = [read(atom) for atom in eqn.invars]
        unknown = any(value is _UNKNOWN for value in values)
        # The function of a weight runs beside the loss itself: no effect may happen twice.
        unknown |= widen is not None and bool(eqn.effects) and inlined(eqn) is None
        if key in wanted:
            returned[key] = wanted[key](values)
            if widen is not None:
                returned[key] = before(eqn.invars[widen])
                return [], returned
        if widen is not None and eqn.primitive is P.convert_element_type_p and not unknown:
            unconverted[eqn.outvars[0]] = values[0]
        inner = inlined(eqn)
        within = {k: tap for k, tap in taps.items() if k[: len(key)] == key and k != key}
        for operand in range(len(values)):
            if (*key, -1 - operand) in within:
                values[operand] = values[operand] + within.pop((*key, -1 - operand))
        with eqn.ctx.manager:
            if within and eqn.primitive is P.remat_p:
                outs, more = _evaluate_remat(eqn, values, key, within, wanted)
            elif within and eqn.primitive is P.scan_p:
                outs, more = _evaluate_scan(eqn, values, key, within, wanted)
            elif within and eqn.primitive is P.cond_p:
                outs, more = _evaluate_cond(eqn, values, key, within, wanted)
            elif inner is not None and (widen is not None or eqn.primitive is not P.remat_p):
                known = [before(atom) for atom in eqn.invars] if widen is not None else ()
                outs, more = _evaluate(*inner, values, key, within, wanted, widen=widen, wide=known)
                if widen is not None and more:
                    return [], more
            elif unknown:
                outs, more = [_UNKNOWN] * len(eqn.outvars), {}
            else:
                if eqn.primitive.name.startswith("custom_"):
                    # The model's own rules see these values, and expect what JAX would give them.
                    values = [_constant(v, atom.aval) for v, atom in zip(values, eqn.invars)]
                params = eqn.primitive.get_bind_params(eqn.params)
                outs, more = eqn.primitive.bind(*values, **params), {}
                outs = outs if eqn.primitive.multiple_results else [outs]
                if key in taps:
                    outs = [outs[0] + taps[key]]
        returned.update(more)
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars], returned


def _evaluate_remat(
    eqn: core.JaxprEqn, values: Any, key: Key, taps: Taps, wanted: Wanted
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """A checkpointed call that has sites: of its inside, only their inputs are kept."""

    def call(values: Any, taps: Any) -> Any:
        return _evaluate(eqn.params["jaxpr"], (), values, key, taps, wanted)

    p = eqn.params
    return jax.checkpoint(call, prevent_cse=p["prevent_cse"], policy=p["policy"])(values, taps)


def _evaluate_scan(
    eqn: core.JaxprEqn, values: Any, key: Key, taps: Taps, wanted: Wanted
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """A scan whose body has sites: their taps are scanned in, their inputs stacked out."""
    p = eqn.params
    first, num_carry = scan_parts(eqn)
    last, body = first + num_carry, p["jaxpr"]

    def step(carry: Any, x: Any) -> Any:
        slices, taps = x
        args = [*values[:first], *carry, *slices]
        outs, inputs = _evaluate(body.jaxpr, body.consts, args, key, taps, wanted)
        return outs[:num_carry], (outs[num_carry:], inputs)

    carry, (ys, inputs) = jax.lax.scan(
        step,
        values[first:last],
        (values[last:], taps),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys], inputs


def _evaluate_cond(
    eqn: core.JaxprEqn, values: Any, key: Key, taps: Taps, wanted: Wanted
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """Branches that have sites: those of a branch not taken have zeros for inputs."""

    def branch(number: int, body: core.ClosedJaxpr) -> Callable[..., Any]:
        def run(values: Any, taps: Any) -> Any:
            return _evaluate(body.jaxpr, body.consts, values, (*key, number), taps, wanted)

        return run

    branches = [branch(i, body) for i, body in enumerate(eqn.params["branches"])]
    inputs: dict[Key, Any] = {}
    for run in branches:
        inputs |= jax.eval_shape(run, values[1:], taps)[1]

    def padded(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(values: Any, taps: Any) -> Any:
            outs, own = run(values, taps)
            return outs, {k: own.get(k, jnp.zeros(v.shape, v.dtype)) for k, v in inputs.items()}

        return call

    calls, platforms = [padded(run) for run in branches], eqn.params.get("branches_platforms")
    if platforms is None:
        outs, own = jax.lax.switch(values[0], calls, values[1:], taps)
    else:  # `jax.lax.platform_dependent`: a branch may be of no use on other platforms
        own_of = {name: call for names, call in zip(platforms, calls) for name in names or ()}
        default = next((call for names, call in zip(platforms, calls) if names is None), None)
        outs, own = jax.lax.platform_dependent(values[1:], taps, default=default, **own_of)
    return outs, own
