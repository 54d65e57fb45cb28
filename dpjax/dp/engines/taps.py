"""Evaluates a traced loss function with taps on its sites (see `sites`).

A tap is a zero added to a site's output: the gradient with respect to it is the cotangent of that
output. The inputs of the sites come out beside the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.sites import Key, Site, Traced, inlined, scan_parts

__all__ = ["derived_weight", "evaluate"]

_UNKNOWN = object()


def evaluate(
    traced: Traced, args: Sequence[Any], taps: dict[Key, jax.Array]
) -> tuple[jax.Array, dict[Key, jax.Array]]:
    """Evaluates the loss of ONE example, adding `taps` to the outputs of the sites.

    Args:
        traced: the jaxpr and its sites.
        args: flat parameters, then the flat example.
        taps: for each site an array of its output's shape, enclosing scans leading.

    Returns:
        The loss and each site's input, enclosing scans leading.
    """
    jaxpr = traced.jaxpr
    inputs = {site.key: 1 - site.operand for sites in traced.groups for site in sites}
    (loss,), found = _evaluate(jaxpr.jaxpr, jaxpr.consts, args, (), taps, inputs)
    return loss, found


def derived_weight(traced: Traced, site: Site, leaves: dict[int, Any]) -> jax.Array:
    """Computes the weight of a derived site from parameters alone, before it is converted.

    Args:
        traced: the jaxpr and its sites.
        site: the derived site.
        leaves: by index, the leaves that the weight is computed from.

    Returns:
        The weight.
    """
    jaxpr = traced.jaxpr
    args = [leaves.get(i, _UNKNOWN) for i in range(len(jaxpr.jaxpr.invars))]
    wanted = {site.key: site.operand}
    return _evaluate(jaxpr.jaxpr, jaxpr.consts, args, (), {}, wanted, widen=True)[1][site.key]


def _evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    prefix: Key,
    taps: dict[Key, jax.Array],
    wanted: dict[Key, int],
    *,
    widen: bool = False,
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """Evaluates `jaxpr` with taps; also returns the wanted operand of each wanted equation.

    Equations with unknown arguments are skipped and have unknown results. With `widen`, a wanted
    operand that is a conversion is returned as it was before.
    """
    env: dict[Any, Any] = {**dict(zip(jaxpr.constvars, consts)), **dict(zip(jaxpr.invars, args))}
    found: dict[Key, jax.Array] = {}
    wide: dict[Any, Any] = {}  # conversions, before they lost bits

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        key = (*prefix, i)
        values = [read(atom) for atom in eqn.invars]
        unknown = any(value is _UNKNOWN for value in values)
        if key in wanted:
            operand = wanted[key]
            found[key] = values[operand]
            if widen:
                found[key] = wide.get(eqn.invars[operand], values[operand])
        if widen and eqn.primitive is P.convert_element_type_p and not unknown:
            wide[eqn.outvars[0]] = values[0]
        inner = inlined(eqn)
        within = {k: tap for k, tap in taps.items() if k[: len(key)] == key and k != key}
        with eqn.ctx.manager:
            if within and eqn.primitive is P.remat_p:
                outs, more = _evaluate_remat(eqn, values, key, within, wanted)
            elif within and eqn.primitive is P.scan_p:
                outs, more = _evaluate_scan(eqn, values, key, within, wanted)
            elif inner is not None and (unknown or eqn.primitive is not P.remat_p):
                outs, more = _evaluate(*inner, values, key, within, wanted, widen=widen)
            elif unknown:
                outs, more = [_UNKNOWN] * len(eqn.outvars), {}
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                outs, more = eqn.primitive.bind(*values, **params), {}
                outs = outs if eqn.primitive.multiple_results else [outs]
                if key in taps:
                    outs = [outs[0] + taps[key]]
        found.update(more)
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars], found


def _evaluate_remat(
    eqn: core.JaxprEqn, values: Any, key: Key, taps: dict[Key, jax.Array], wanted: dict[Key, int]
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """A checkpointed call that has sites: of its inside, only their inputs are kept."""

    def call(values: Any, taps: Any) -> Any:
        return _evaluate(eqn.params["jaxpr"], (), values, key, taps, wanted)

    p = eqn.params
    return jax.checkpoint(call, prevent_cse=p["prevent_cse"], policy=p["policy"])(values, taps)


def _evaluate_scan(
    eqn: core.JaxprEqn, values: Any, key: Key, taps: dict[Key, jax.Array], wanted: dict[Key, int]
) -> tuple[list[Any], dict[Key, jax.Array]]:
    """A scan whose body has sites: their taps are scanned in, their inputs stacked out."""
    p = eqn.params
    first, num_carry = scan_parts(eqn)
    last, body = first + num_carry, p["jaxpr"]

    def step(carry: Any, x: Any) -> Any:
        slices, taps = x
        args = [*values[:first], *carry, *slices]
        outs, found = _evaluate(body.jaxpr, body.consts, args, key, taps, wanted)
        return outs[:num_carry], (outs[num_carry:], found)

    carry, (ys, found) = jax.lax.scan(
        step,
        values[first:last],
        (values[last:], taps),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys], found
