"""Finds where trainable parameters meet the example in a loss function's jaxpr.

Ghost clipping rests on one fact: where a weight enters as `y = x @ w`, its gradient is `x^T g`,
with g the cotangent of y. Norms and weighted sums of such gradients follow from x and g, which one
backward pass over the batch gives for all examples. This module looks for all such equations in
the jaxpr of the loss of ONE example, whatever library wrote it:

- A *view* is a leaf that was reshaped, transposed, converted or scaled by a constant: a gradient of
  the view is one of the leaf up to order and scale, so both have the same norm.
- A *site* is an equation that multiplies a view with a value that depends on the example:
  `dot_general`, `conv_general_dilated`, or a row lookup by `gather` (a product with one-hot rows).
- A *derived* site is a convolution whose kernel is another function of parameters alone, such as
  weight standardization. The function's derivative takes the kernel's gradient to the leaves. It
  has to be computed in float32, and may be converted at the end: a derivative in fewer bits rounds
  gradients to those bits, and a sum of many such gradients would move by more than the bound.
- A leaf with any other use is *direct*: it is differentiated example by example, as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P

__all__ = ["Key", "Site", "Traced", "View", "inlined", "scan_parts", "trace"]

PyTree = Any
Key = tuple[int, ...]

_GATHER_MODES = (
    jax.lax.GatherScatterMode.CLIP,
    jax.lax.GatherScatterMode.FILL_OR_DROP,
    jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


class View(NamedTuple):
    """A value that is a leaf reshaped, transposed, converted or scaled by a constant.

    Attributes:
        leaf: index of the leaf.
        shape: shape of the value, leading scanned axes included.
        steps: how it was made: (shape before the step, permutation or None for a reshape).
        scale: constant factor; the engine multiplies the recorded cotangents by it.
        limit: largest number of the narrowest float that the value passed through.
        scanned: for every enclosing scan, whether the value is a slice of a stack (else shared).
    """

    leaf: int
    shape: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...] = ()
    scale: float = 1.0
    limit: float = math.inf
    scanned: tuple[bool, ...] = ()

    def pull(self, cotangent: jax.Array) -> jax.Array:
        """Maps a cotangent of the value, scanned axes first and scaled, to one of the leaf."""
        for shape, perm in reversed(self.steps):
            if perm is None:
                cotangent = cotangent.reshape(shape)
            else:
                cotangent = cotangent.transpose(sorted(range(len(perm)), key=perm.__getitem__))
        return cotangent


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a weight whose gradient is a product of an input and an output cotangent.

    Attributes:
        key: position of the equation, through nested jaxprs.
        kind: "dot", "conv" or "embed".
        leaves: the leaves that the weight is computed from; one, unless it is derived.
        view: the weight as a view of its leaf; None if it is derived.
        weight_id: equal for sites whose gradients can be added before they are squared.
        operand: position of the weight among the equation's operands (the input is the other).
        params: the equation's parameters.
        shape: shape of the weight, leading scanned axes included.
        input: abstract value of the input.
        output: abstract value of the output.
        lengths: lengths of the enclosing scans, outermost first.
        scanned: for each of them, whether the weight is a slice of a stack.
        limit: largest number of the narrowest float on the way from the leaf to the weight.
    """

    key: Key
    kind: str
    leaves: frozenset[int]
    view: View | None
    weight_id: Any
    operand: int
    params: dict[str, Any]
    shape: tuple[int, ...]
    input: Any
    output: Any
    lengths: tuple[int, ...]
    scanned: tuple[bool, ...]
    limit: float


@dataclasses.dataclass(frozen=True)
class Traced:
    """A loss function's jaxpr and what each parameter leaf does in it.

    Attributes:
        jaxpr: the closed jaxpr of `loss_fn(params, example)` for ONE example.
        groups: the sites of one weight each, for leaves all of whose uses are such sites.
        direct: for each other leaf that is used, why it is not covered by sites.
    """

    jaxpr: core.ClosedJaxpr
    groups: tuple[tuple[Site, ...], ...]
    direct: dict[int, str]


class _Info(NamedTuple):
    """What is known of a value: does it depend on the example, and on which leaves otherwise."""

    example: bool = False
    leaves: frozenset[int] = frozenset()
    view: View | None = None
    full: bool = True  # whether it, and all that it was computed from, has 32 bits or more


@dataclasses.dataclass
class _Walk:
    """What one walk over a jaxpr found: sites by position, and direct leaves with the reason."""

    sites: dict[Key, Site] = dataclasses.field(default_factory=dict)
    direct: dict[int, str] = dataclasses.field(default_factory=dict)

    def give_up(self, leaves: frozenset[int], reason: str) -> None:
        for leaf in leaves:
            self.direct.setdefault(leaf, reason)


def trace(loss_fn: Any, params: PyTree, example: PyTree) -> Traced:
    """Traces `loss_fn` on one example and classifies the leaves of `params`.

    Args:
        loss_fn: `(params, example) -> scalar loss`.
        params: pytree of arrays or abstract values, the trainable parameters.
        example: one example, arrays or abstract values.

    Returns:
        The jaxpr with its sites.

    Raises:
        TypeError: the loss is not a scalar.
    """
    closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, example)
    outputs = jax.tree.leaves(shape)
    if len(outputs) != 1 or outputs[0].shape != ():
        raise TypeError(f"loss_fn must return one scalar, got {shape}.")
    leaves = jax.tree.leaves(params)
    infos = [
        _Info(False, frozenset([i]), View(i, tuple(leaf.shape), limit=_limit(leaf)), _is_full(leaf))
        for i, leaf in enumerate(leaves)
    ]
    infos += [_Info(True)] * (len(closed.jaxpr.invars) - len(leaves))
    walk = _Walk()
    (loss,) = _walk(closed.jaxpr, infos, (), (), walk)
    # A leaf that reaches the loss without meeting the example has no equation to tap.
    walk.give_up(loss.leaves, "the loss depends on it without the example")
    return Traced(closed, _group(walk), walk.direct)


def _group(walk: _Walk) -> tuple[tuple[Site, ...], ...]:
    """Groups the sites by weight; a leaf of several different weights becomes direct.

    The gradients of two uses have to be added before they are squared: |a + b|^2 has a cross term.
    Uses of one weight in one layout add in the canonical form (their tokens are joined). Uses of
    one leaf as two weights, say once transposed, would need a cross term of their own.
    """
    weights: dict[int, set[Any]] = {}
    groups: dict[Any, list[Site]] = {}
    for site in walk.sites.values():
        groups.setdefault(site.weight_id, []).append(site)
        for leaf in site.leaves:
            weights.setdefault(leaf, set()).add(site.weight_id)
    for leaf, ids in weights.items():
        if len(ids) > 1:
            walk.give_up(frozenset([leaf]), f"used in {len(ids)} ways")
    # A derived weight needs all of its leaves. Once is enough: none is a leaf of a second weight.
    for sites in groups.values():
        if not sites[0].leaves.isdisjoint(walk.direct):
            walk.give_up(sites[0].leaves, "its weight has a leaf that is used elsewhere")
    return tuple(tuple(s) for s in groups.values() if s[0].leaves.isdisjoint(walk.direct))


def _walk(
    jaxpr: core.Jaxpr, infos: Sequence[_Info], prefix: Key, lengths: tuple[int, ...], walk: _Walk
) -> list[_Info]:
    """Propagates `infos` through `jaxpr`, adding to `walk` the sites and the direct leaves."""
    env: dict[Any, _Info] = dict(zip(jaxpr.invars, infos))
    narrowed: set[Any] = set()  # conversions of values of 32 bits, which derived weights may end in

    def read(atom: Any) -> _Info:
        # Constants of the jaxpr are in no environment: they know neither example nor leaf.
        return _Info() if isinstance(atom, core.Literal) else env.get(atom, _Info())

    for i, eqn in enumerate(jaxpr.eqns):
        key = (*prefix, i)
        args = [read(atom) for atom in eqn.invars]
        inner = inlined(eqn)
        if inner is not None:
            outs = _walk(inner[0], args, key, lengths, walk)
        elif not any(a.example for a in args):
            # A function of parameters alone: a view, perhaps, or part of a derived weight.
            full = all(a.full for a in args) and not _is_closed(eqn)
            full = full and all(_is_full(v.aval) for v in eqn.outvars)
            outs = [_Info(False, _leaves(args), _follow(eqn, args), full)] * len(eqn.outvars)
            if eqn.primitive is P.convert_element_type_p and args[0].full:
                narrowed.add(eqn.outvars[0])
        elif eqn.primitive is P.scan_p:
            outs = _walk_scan(eqn, args, key, lengths, walk)
        else:
            # Past this equation the leaf is part of a value that depends on the example: whatever
            # uses that value is no use of the leaf.
            outs = [_Info(True)] * len(eqn.outvars)
            site = _site(eqn, args, key, lengths, narrowed)
            if site is not None:
                walk.sites[key] = site
            else:
                walk.give_up(_leaves(args), f"used by {eqn.primitive.name}")
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars]


def _is_closed(eqn: core.JaxprEqn) -> bool:
    """Whether an equation has an inside (a loop, a custom derivative) that the walk skips.

    What it computes inside may have fewer bits than its inputs and outputs show.
    """
    parts = jax.tree.leaves(list(eqn.params.values()))
    return any(isinstance(p, (core.Jaxpr, core.ClosedJaxpr)) for p in parts)


def _is_float(value: Any) -> bool:
    """Whether a value consists of real floating-point numbers, as the engine's products need."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def _is_full(value: Any) -> bool:
    return not _is_float(value) or jnp.finfo(value.dtype).bits >= 32


def _limit(value: Any) -> float:
    return float(jnp.finfo(value.dtype).max) if _is_float(value) else math.inf


def _leaves(args: list[_Info]) -> frozenset[int]:
    return frozenset(leaf for a in args for leaf in a.leaves)


def inlined(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """The inner jaxpr and constants of a call that only groups equations, remat included."""
    if eqn.primitive is P.remat_p:
        return eqn.params["jaxpr"], ()
    name = _CALLS.get(eqn.primitive.name)
    return None if name is None else (eqn.params[name].jaxpr, eqn.params[name].consts)


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


def _walk_scan(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...], walk: _Walk
) -> list[_Info]:
    """Enters a scan: constants are shared by its iterations, scanned inputs are slices."""
    num_consts, num_carry = scan_parts(eqn)
    body = eqn.params["jaxpr"].jaxpr

    def enter(info: _Info, scanned: bool) -> _Info:
        view = info.view
        return info._replace(view=view and view._replace(scanned=(*view.scanned, scanned)))

    consts = [enter(a, False) for a in args[:num_consts]]
    xs = [enter(a, True) for a in args[num_consts + num_carry :]]
    initial = args[num_consts : num_consts + num_carry]
    for a in initial:  # the carry changes from turn to turn: no view of one leaf
        walk.give_up(a.leaves, "used by the carry of scan")
    carry = [_Info(a.example) for a in initial]
    inside = (*lengths, eqn.params["length"])
    # A carry may come to depend on the example after some turns. Dependence only grows, so this
    # ends; the walk that counts is the one made once it has.
    while True:
        outs = _walk(body, consts + carry + xs, key, inside, _Walk())
        after = [_Info(a.example or b.example) for a, b in zip(carry, outs)]
        if after == carry:
            break
        carry = after
    outs = _walk(body, consts + carry + xs, key, inside, walk)
    for out in outs:  # a leaf that leaves the scan, stacked or carried, is no longer followed
        walk.give_up(out.leaves, "used by the output of scan")
    return [_Info(True)] * len(outs)


def _follow(eqn: core.JaxprEqn, args: list[_Info]) -> View | None:
    """The view that `eqn`, free of the example, makes of a leaf; None if it is not isometric."""
    positions = [i for i, a in enumerate(args) if a.leaves]
    if len(positions) != 1 or len(eqn.outvars) != 1:
        return None
    (position,) = positions
    view = args[position].view
    if view is None:
        return None
    primitive, params = eqn.primitive, eqn.params
    out: Any = eqn.outvars[0].aval
    source: Any = eqn.invars[position].aval
    if not _is_float(out):
        return None
    # Inside a scan the equation sees a slice, the view knows the stack: leading axes are kept.
    stack = view.shape[: len(view.shape) - source.ndim]
    shape = (*stack, *out.shape)
    if primitive in (P.copy_p, P.name_p):  # `name` marks values for remat policies
        return view
    if primitive is P.convert_element_type_p:
        return view._replace(limit=min(view.limit, _limit(out)))
    if primitive is P.transpose_p:
        perm = (*range(len(stack)), *(len(stack) + p for p in params["permutation"]))
        return view._replace(shape=shape, steps=(*view.steps, (view.shape, perm)))
    reshapes = primitive in (P.squeeze_p, P.broadcast_in_dim_p)
    reshapes |= primitive is P.reshape_p and params["dimensions"] is None
    # A broadcast that repeats numbers is no reshape: its gradient is a sum over the copies.
    if reshapes and math.prod(shape) == math.prod(view.shape):
        return view._replace(shape=shape, steps=(*view.steps, (view.shape, None)))
    if primitive is P.mul_p or (primitive is P.div_p and position == 0):
        other = eqn.invars[1 - position]
        if isinstance(other, core.Literal) and jnp.ndim(other.val) == 0:
            factor = float(other.val)
            scale = view.scale * factor if primitive is P.mul_p else view.scale / (factor or np.nan)
            # Others leave the range in which a cotangent can be scaled without losing it.
            return view._replace(scale=scale) if 1e-18 < abs(scale) < 1e18 else None
    return None


def _site(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...], narrowed: set[Any]
) -> Site | None:
    """The site that `eqn` is, if it multiplies one weight with one example-dependent value."""
    positions = [i for i, a in enumerate(args) if a.leaves]
    if len(positions) != 1 or len(args) != 2:
        return None
    (operand,) = positions
    weight, params = eqn.invars[operand], eqn.params
    aval: Any = weight.aval
    inputs: Any = eqn.invars[1 - operand].aval
    output: Any = eqn.outvars[0].aval
    if not _is_float(aval) or not _is_float(output):
        return None  # a complex product has a conjugate in its derivative
    if 0 in (*inputs.shape, *output.shape, *lengths):
        return None  # an empty product, whose patches have no shape
    leaves, view = args[operand].leaves, args[operand].view
    scanned = view.scanned if view else ()
    layout: Any = None  # how the weight's axes enter the equation
    if eqn.primitive is P.dot_general_p:
        kind = "dot"
        contract, batch = params["dimension_numbers"]
        layout = tuple(contract[operand]), tuple(batch[operand])
        if not _is_float(inputs):
            return None
    elif eqn.primitive is P.conv_general_dilated_p:
        kind = "conv"
        layout = params["dimension_numbers"].rhs_spec, params["feature_group_count"]
        if operand != 1 or params["batch_group_count"] != 1 or not _is_float(inputs):
            return None
    elif eqn.primitive is P.gather_p:
        kind = "embed"
        dims = params["dimension_numbers"]
        rows = tuple(dims.collapsed_slice_dims) == (0,) == tuple(dims.start_index_map)
        entire = tuple(params["slice_sizes"]) == (1, *aval.shape[1:])
        known = params["mode"] in _GATHER_MODES
        if operand != 0 or not rows or not entire or dims.operand_batching_dims or any(scanned):
            return None
        if not known:
            return None
    else:
        return None
    # Gradients of two uses of a weight are added before they are squared, in the canonical form
    # and then restored together. So whatever decides how a gradient is restored belongs to the
    # identity of the weight: the kind, the layout and, for a view, every step from its leaf.
    weight_id: Any
    if view is not None:
        shape = view.shape
        weight_id = kind, layout, view._replace(scanned=(True,) * sum(scanned), limit=math.inf)
    elif kind == "conv" and not lengths and (args[operand].full or weight in narrowed):
        shape, weight_id = tuple(aval.shape), (kind, layout, key[:-1], weight)
    else:  # differentiating such a weight per example costs no more than a derived site
        return None
    return Site(
        key=key, kind=kind, leaves=leaves, view=view, weight_id=weight_id, operand=operand,
        params=params, shape=shape, input=inputs, output=output, lengths=lengths,
        scanned=scanned, limit=view.limit if view else _limit(aval),
    )  # fmt: skip
