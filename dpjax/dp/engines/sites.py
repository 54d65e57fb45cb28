"""Finds where trainable parameters meet the example in a loss function's jaxpr.

Ghost clipping rests on one fact: where a weight enters as `y = x @ w`, its gradient is `x^T g`,
with g the cotangent of y. Norms and weighted sums of such gradients follow from x and g, which one
backward pass over the batch gives for all examples. This module looks for all such equations in
the jaxpr of the loss of ONE example, whatever library wrote it and after JAX's own elimination of
dead code:

- A *view* is a part of a value that is a part of a leaf, reshaped, transposed, sliced, converted or
  scaled by a constant: a gradient of the view is one of that part of the leaf up to order and
  scale, so both have the same norm. A value can have several views: kernels that were concatenated
  or stacked have one each, and `w + delta` has one of each summand.
- A *site* is an equation that multiplies a view with a value that depends on the example:
  `dot_general`, `conv_general_dilated`, or a lookup by `gather` or `dynamic_slice` (a product with
  one-hot rows). An equation whose weight has several views is a site for each of them.
- A *derived* weight is another function of parameters alone, such as weight standardization. The
  function's derivative takes the weight's gradient to the leaves. It has to be computed in float32,
  and may be converted at the end: a derivative in fewer bits rounds gradients to those bits, and a
  sum of many such gradients would move by more than the bound.
- A *scalar* is a number computed from parameters alone that meets the example, such as a penalty
  that is added to the loss. Its gradient is one array for all examples, times a number of each.
- A leaf with any other use is *direct*: it is differentiated example by example, as it is.

Uses of one leaf add up before they are squared: |a + b|^2 has a cross term. Uses in one layout add
in the canonical form, where their tokens are joined; uses of disjoint parts of a leaf are
orthogonal. Leaves with other uses are taken together with all weights that they are part of, and
the sum is formed for each example (`Traced.mixed`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P
from jax.interpreters import partial_eval

__all__ = [
    "Key",
    "Site",
    "Traced",
    "View",
    "inlined",
    "layout",
    "scan_parts",
    "trace",
]

PyTree = Any
Key = tuple[int, ...]
Factors = list[tuple[int, int]]  # sizes and strides, outermost first

_GATHER_MODES = (
    jax.lax.GatherScatterMode.CLIP,
    jax.lax.GatherScatterMode.FILL_OR_DROP,
    jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}

_SAME = ("copy", "name", "sharding_constraint", "optimization_barrier")  # `name` is for remat

_MOST_SCALARS = 4  # of one leaf: each needs an array of the leaf's size


class Step(NamedTuple):
    """One step from a leaf to a view of it: a permutation, a slice, or a reshape if neither.

    Attributes:
        shape: shape before the step.
        perm: permutation of the axes.
        window: start and stride of each axis.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...] | None = None
    window: tuple[tuple[int, int], ...] | None = None


class View(NamedTuple):
    """A part of a value that is a part of a leaf, in another order and times a constant.

    Attributes:
        leaf: index of the leaf.
        shape: shape of the part, leading scanned axes included.
        start: where it starts in the value, per axis of `shape`.
        steps: how it was made from the leaf.
        scale: constant factor; the engine multiplies the recorded cotangents by it.
        limit: largest number of the narrowest float that the value passed through.
        scanned: for every enclosing scan, whether the value is a slice of a stack (else shared).
    """

    leaf: int
    shape: tuple[int, ...]
    start: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    scale: float = 1.0
    limit: float = math.inf
    scanned: tuple[bool, ...] = ()

    def after(self, step: Step, shape: Sequence[int], start: Sequence[int]) -> View:
        """The view after one more step, of another shape and place in the value."""
        return self._replace(steps=(*self.steps, step), shape=tuple(shape), start=tuple(start))

    def pull(self, cotangent: jax.Array) -> jax.Array:
        """Maps a cotangent of the part, scanned axes first and scaled, to one of the leaf."""
        for shape, perm, window in reversed(self.steps):
            if perm is not None:
                cotangent = cotangent.transpose(sorted(range(len(perm)), key=perm.__getitem__))
            elif window is not None:
                padding = [
                    (first, size - first - (count - 1) * stride - 1, stride - 1)
                    for size, count, (first, stride) in zip(shape, cotangent.shape, window)
                ]
                cotangent = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), padding)
            else:
                cotangent = cotangent.reshape(shape)
        return cotangent

    def factors(self) -> tuple[int, list[Factors]] | None:
        """Where the view's numbers stand in the flat leaf.

        Returns:
            The offset, and each axis as factors of it (outermost first) with their strides; no
            factor spans two axes of the leaf. None if an axis has no such factors.
        """
        shapes = [*(step.shape for step in self.steps), self.shape]
        axes: list[Factors] = [
            [(size, stride)] if size > 1 else []
            for size, stride in zip(shapes[0], _strides(shapes[0]))
        ]
        offset = 0
        for (before, perm, window), after in zip(self.steps, shapes[1:]):
            if perm is not None:
                axes = [axes[i] for i in perm]
            elif window is not None:
                for i, (first, stride) in enumerate(window):
                    if (first, stride, after[i]) == (0, 1, before[i]):
                        continue
                    if len(axes[i]) != 1:
                        return None
                    step = axes[i][0][1]
                    offset += first * step
                    axes[i] = [(after[i], step * stride)] if after[i] > 1 else []
            else:
                split = _split(list(itertools.chain(*axes)), after)
                if split is None:
                    return None
                axes = split
        return offset, axes

    def box(self) -> list[tuple[int, int]]:
        """First and last index of the view along each axis of the leaf."""
        shape = self.steps[0].shape if self.steps else self.shape
        found = self.factors()
        if found is None:
            return [(0, size - 1) for size in shape]
        offset, axes = found
        box = []
        for size, stride in zip(shape, _strides(shape)):
            first = last = offset // stride % size
            for count, step in itertools.chain(*axes):
                if stride <= step < stride * size:
                    last += (count - 1) * (step // stride)
            box.append((first, last))
        return box


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _split(factors: Factors, shape: Sequence[int]) -> list[Factors] | None:
    """Distributes factors over axes of the given sizes; None if they do not fit."""
    rest, axes = factors[::-1], []
    for size in shape:
        axis: Factors = []
        while size > 1:
            if not rest:
                return None
            count, stride = rest.pop()
            if size % count == 0:
                axis.append((count, stride))
                size //= count
            elif count % size == 0:
                axis.append((size, stride * (count // size)))
                rest.append((count // size, stride))
                size = 1
            else:
                return None
        axes.append(axis)
    return None if rest else axes


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a weight whose gradient is a product of an input and an output cotangent.

    Attributes:
        key: position of the equation, through nested jaxprs.
        kind: "dot", "conv" or "embed".
        leaves: the leaves that the weight is computed from; one, unless it is derived.
        view: the weight as a view of its leaf; None if it is derived.
        weight: the derived weight: equal for uses of one weight, as a variable and its place.
        operand: position of the weight among the equation's operands (the input is the other).
        params: the equation's parameters.
        shape: shape of the weight, leading scanned axes included.
        input: abstract value of the input.
        output: abstract value of the output.
        lengths: lengths of the enclosing scans, outermost first; of a part of a stack, its own.
        scanned: for each of them, whether the weight is a slice of a stack.
        limit: largest number of the narrowest float on the way from the leaf to the weight.
        cuts: the part of the recorded (input, cotangent) that belongs to the view, as axis, start
            and size, scans first; of a lookup's input, the first row of each axis.
        turned: whether input and cotangent trade places in the canonical form.
        source: the line of the model, if JAX knows it.
    """

    key: Key
    kind: str
    leaves: frozenset[int]
    view: View | None
    weight: Any
    operand: int
    params: dict[str, Any]
    shape: tuple[int, ...]
    input: Any
    output: Any
    lengths: tuple[int, ...]
    scanned: tuple[bool, ...]
    limit: float
    cuts: tuple[tuple[tuple[int, int, int], ...], ...] = ((), ())
    turned: bool = False
    source: str = ""

    @property
    def view_of_leaf(self) -> View:
        """The view, of a site that has one.

        Raises:
            ValueError: the weight is derived.
        """
        if self.view is None:
            raise ValueError(f"the weight {self.weight!r} is derived: it is no view of a leaf.")
        return self.view


Weight = tuple[Site, ...]  # uses of one weight in one layout


@dataclasses.dataclass(frozen=True)
class Traced:
    """A loss function's jaxpr and what each parameter leaf does in it.

    Attributes:
        jaxpr: the jaxpr of `loss_fn(params, example)` for ONE example.
        consts: its constants.
        groups: the sites of one view of a leaf each; views of one leaf are disjoint.
        mixed: weights whose leaves have several uses, or that are derived; no leaf is in two.
        direct: for each other leaf that is used, why it is not covered by sites.
        scalars: by place, the leaves of scalars that meet the example. The place of an equation's
            operand is the equation's key with -1 - operand behind it.
        sources: by leaf, the line of the model that decided, if JAX knows it.
        spreads: whether a batched gradient may spread one example's NaN over the others.
        taps: shape and dtype of the cotangent of each site's equation and of each scalar.
    """

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    groups: tuple[Weight, ...]
    mixed: tuple[tuple[Weight, ...], ...]
    direct: dict[int, str]
    scalars: dict[Key, frozenset[int]]
    sources: dict[int, str]
    spreads: bool

    taps: dict[Key, jax.ShapeDtypeStruct]

    @property
    def sites(self) -> list[Site]:
        """All sites, those of one equation included."""
        return [s for w in (*self.groups, *itertools.chain(*self.mixed)) for s in w]


class _Info(NamedTuple):
    """What is known of a value: does it depend on the example, and on which leaves otherwise."""

    example: bool = False
    leaves: frozenset[int] = frozenset()
    views: tuple[View, ...] = ()  # empty if some dependence on a leaf is no view
    full: bool = True  # whether it, and all that it was computed from, has 32 bits or more


class _Walk(NamedTuple):
    """What one walk over a jaxpr found.

    Attributes:
        sites: in the order of the jaxpr.
        scalars: see `Traced`.
        direct: reason and line of leaves with other uses.
        convolutions: those whose kernel differs between examples or has leaves, which are named.
        shapes: shape and dtype of the output of each site's equation, scans first, and of scalars.
        early: whether products of parameters alone count as sites, if the result is small.
    """

    sites: list[Site]
    scalars: dict[Key, frozenset[int]]
    direct: dict[int, tuple[str, str]]
    convolutions: dict[Key, frozenset[int]]
    shapes: dict[Key, jax.ShapeDtypeStruct]
    early: bool

    def add(self, sites: list[Site], lengths: tuple[int, ...], output: Any) -> None:
        self.sites.extend(sites)
        for site in sites:
            shape = (*lengths, *output.shape)
            self.shapes[site.key] = jax.ShapeDtypeStruct(shape, output.dtype)

    def give_up(self, leaves: Iterable[int], reason: str, source: str = "") -> None:
        for leaf in leaves:
            self.direct.setdefault(leaf, (reason, source))


def _empty(early: bool) -> _Walk:
    return _Walk([], {}, {}, {}, {}, early)


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
    # Scans that return parameters nobody reads, heads whose logits nobody reads: not uses.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    leaves = jax.tree.leaves(params)
    infos = [
        _Info(
            False,
            frozenset([i]),
            (View(i, tuple(leaf.shape), (0,) * len(leaf.shape), limit=_limit(leaf)),),
            _is_full(leaf),
        )
        if 0 not in leaf.shape
        else _Info()  # no number of it is used anywhere
        for i, leaf in enumerate(leaves)
    ]
    infos += [_Info(True)] * (len(jaxpr.invars) - len(leaves))

    def walked(early: bool) -> Traced:
        walk = _empty(early)
        (loss,) = _walk(jaxpr, infos, (), (), walk)
        # A leaf that reaches the loss without meeting the example has no equation to tap.
        walk.give_up(loss.leaves, "the loss depends on it without the example")
        return _resolve(jaxpr, closed.consts, walk)

    def formed(traced: Traced) -> int:
        """Numbers of the gradients that are formed for each example."""
        mixed = (site.leaves for weight in itertools.chain(*traced.mixed) for site in weight)
        return sum(math.prod(leaves[i].shape) for i in frozenset(traced.direct).union(*mixed))

    found = walked(early=False)
    return min(found, walked(early=True), key=formed) if formed(found) else found


def _resolve(jaxpr: core.Jaxpr, consts: Sequence[Any], walk: _Walk) -> Traced:
    """Groups the sites by weight; decides which leaves are taken together, and which are direct."""
    direct = dict(walk.direct)
    uses: dict[int, list[Site]] = {}
    for site in walk.sites:
        for leaf in site.leaves:
            uses.setdefault(leaf, []).append(site)
    scalars: dict[int, int] = {}
    for leaf in itertools.chain(*walk.scalars.values()):
        scalars[leaf] = scalars.get(leaf, 0) + 1
        if leaf not in uses:
            direct.setdefault(leaf, ("it meets the example in a scalar", ""))
        elif scalars[leaf] > _MOST_SCALARS:
            direct.setdefault(leaf, (f"more than {_MOST_SCALARS} scalars depend on it", ""))

    groups: list[Weight] = []
    # Leaves that are taken together, by any one of them.
    together: dict[int, set[int]] = {}
    for leaf, sites in uses.items():
        weights = _joined(sites) if all(site.view for site in sites) else []
        whole = len(weights) == 1 and math.prod(weights[0][0].shape) == _leaf_size(weights[0][0])
        if weights and _disjoint(weights) and scalars.get(leaf, 0) <= whole:
            groups += [] if leaf in direct else weights
            continue
        for other in {leaf}.union(*(site.leaves for site in sites)):
            one, two = together.get(leaf, {leaf}), together.get(other, {other})
            for member in (merged := one | two):
                together[member] = merged
    mixed = []
    for leaves in {min(leaves): leaves for leaves in together.values()}.values():
        if leaves & direct.keys():
            for leaf in leaves:
                direct.setdefault(leaf, ("its weight has a leaf that is used elsewhere", ""))
            continue
        own = {id(site): site for leaf in leaves for site in uses[leaf]}
        mixed.append(tuple(_joined(list(own.values()))))
    # Leaves that became direct after their groups had been formed.
    groups = [sites for sites in groups if sites[0].leaves.isdisjoint(direct)]
    sites = [s for w in (*groups, *itertools.chain(*mixed)) for s in w]
    keys = {site.key for site in sites}
    covered: frozenset[int] = frozenset().union(*(site.leaves for site in sites))
    sources = {leaf: source for leaf, (_, source) in direct.items()}
    for site in sites:
        for leaf in site.leaves:
            sources.setdefault(leaf, site.source)
    covering = {k: own & covered for k, own in walk.scalars.items() if own & covered}
    taps = {site.key: walk.shapes[site.key] for site in sites}
    taps |= {place: walk.shapes[place] for place in covering}
    return Traced(
        taps=taps,
        jaxpr=jaxpr,
        consts=consts,
        groups=tuple(groups),
        mixed=tuple(mixed),
        direct={leaf: reason for leaf, (reason, _) in sorted(direct.items())},
        scalars={k: walk.scalars[k] for k in covering},
        sources=sources,
        spreads=any(
            key not in keys or own & direct.keys() for key, own in walk.convolutions.items()
        ),
    )


def _leaf_size(site: Site) -> int:
    view = site.view_of_leaf
    return math.prod(view.steps[0].shape if view.steps else view.shape)


def _joined(sites: list[Site]) -> list[Weight]:
    """Groups sites whose gradients add up in the canonical form.

    Whatever decides how a canonical gradient is taken back to the leaves belongs to the identity:
    for views, where each number of B, d and p stands in the leaf.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sorted(sites, key=lambda site: site.kind != "embed"):
        identity = _identity(site)
        turned = (identity[0], identity[1][:-2] + identity[1][:-3:-1])
        if identity not in groups and turned in groups and site.kind != "embed":
            site = dataclasses.replace(site, turned=True)
            identity = turned
        groups.setdefault(identity, []).append(site)
    return [tuple(group) for group in groups.values()]


def _identity(site: Site) -> tuple[Any, tuple[Any, ...]]:
    """Equal for sites whose canonical gradients stand for the same numbers of the same leaves."""
    own = site.view.factors() if site.view is not None else None
    if site.view is None or own is None:
        view = site.view and site.view._replace(scanned=(), limit=0.0, scale=1.0)
        return (site.leaves, site.weight, view), (site.kind, *map(tuple, layout(site)))
    offset, axes = own
    parts = []
    for part in layout(site):
        # A convolution's output channels are cut into groups: (axis, groups, whether outside).
        factors: Factors = []
        for axis in part:
            if isinstance(axis, tuple):
                axis, groups, outside = axis
                cut = _split(axes[axis], (groups, site.shape[axis] // groups))
                if cut is None:
                    return (site.leaves, site.view, site.key), (site.kind,)
                factors += cut[0] if outside else cut[1]
            else:
                factors += axes[axis]
        merged: Factors = []
        for size, stride in factors:
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        parts.append(tuple(merged))
    return (site.view.leaf, offset), tuple(parts)


def layout(site: Site) -> tuple[list[Any], list[Any], list[Any]]:
    """The weight's axes, scanned ones first, that form B, d and p of the canonical form, in order.

    The output channels of a convolution with groups are an axis of B and of p: there, the axis is
    given as (axis, groups, whether the groups are meant).
    """
    stacked = sum(site.scanned)
    outer = list(range(stacked))
    if site.kind == "dot":
        contract, batch = (pair[site.operand] for pair in site.params["dimension_numbers"])
        free = [i for i in range(len(site.shape) - stacked) if i not in contract + batch]
        parts: tuple[Any, Any, Any] = (batch, contract, free)
    elif site.kind == "conv":
        out, channels, *kernel = site.params["dimension_numbers"].rhs_spec
        groups = site.params["feature_group_count"]
        if groups > 1:
            axis = stacked + out
            inner = [*(stacked + i for i in kernel), stacked + channels]
            return [*outer, (axis, groups, True)], inner, [(axis, groups, False)]
        parts = ((), (*kernel, channels), (out,))
    else:
        rows = site.params["row_axes"]
        inner = [i for i in range(len(site.shape) - stacked) if i not in rows]
        # The turns of a scan over a stack of tables are rows as well.
        return [], [*outer, *(stacked + i for i in rows)], [stacked + i for i in inner]
    batch, rows, inner = ([stacked + i for i in part] for part in parts)
    return [*outer, *batch], rows, inner


def _disjoint(weights: list[Weight]) -> bool:
    """Whether no number of the leaf is part of two of the weights."""
    boxes = [weight[0].view.box() for weight in weights if weight[0].view]
    return all(
        any(a[1] < b[0] or b[1] < a[0] for a, b in zip(one, two))
        for one, two in itertools.combinations(boxes, 2)
    )


def _walk(
    jaxpr: core.Jaxpr,
    infos: Sequence[_Info],
    prefix: Key,
    lengths: tuple[int, ...],
    walk: _Walk,
    branch: bool = False,
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
        inside = bool(lengths) or branch
        if inner is not None:
            outs = _walk(inner[0], args, key, lengths, walk, branch)
        elif eqn.primitive.name == "stop_gradient":
            outs = [_Info(args[0].example)]
        elif not any(a.example for a in args):
            outs = _without_example(eqn, args, key, lengths, narrowed, inside, walk)
        elif eqn.primitive is P.scan_p:
            outs = _walk_scan(eqn, args, key, lengths, walk)
        elif eqn.primitive is P.cond_p:
            outs = _walk_cond(eqn, args, key, lengths, walk)
        else:
            # Past this equation the leaf is part of a value that depends on the example: whatever
            # uses that value is no use of the leaf.
            outs = [_Info(True)] * len(eqn.outvars)
            _meet(eqn, args, key, lengths, narrowed, inside, walk)
        outs = [o if _is_inexact(v.aval) else _Info(o.example) for o, v in zip(outs, eqn.outvars)]
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars]


def _without_example(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...],
    narrowed: set[Any], inside: bool, walk: _Walk,
) -> list[_Info]:  # fmt: skip
    """A function of parameters alone: views, perhaps, or part of a derived weight."""
    if walk.early and any(a.leaves for a in args) and len(eqn.outvars) == 1:
        # A product with a learned query, or the first rows of a table: if the result is smaller
        # than the weight, it may as well be taken for a value of the example.
        size = _size(eqn.outvars[0])
        fits = [i for i, a in enumerate(args) if a.views and _size(eqn.invars[i]) > size]
        for operand in fits:
            found = _sites(eqn, args, key, lengths, narrowed, inside, operand)
            if found:
                walk.add(found, lengths, eqn.outvars[0].aval)
                rest = [a for i, a in enumerate(args) if i != operand]
                walk.give_up(_leaves(rest), *_reason(eqn))
                return [_Info(True)]
    full = all(a.full for a in args) and not _is_closed(eqn)
    full = full and all(_is_full(v.aval) for v in eqn.outvars)
    if eqn.primitive is P.convert_element_type_p and args[0].full:
        narrowed.add(eqn.outvars[0])
    views = _follow(eqn, args) if any(a.views for a in args) else None
    return [
        _Info(False, _leaves(args), tuple(views[k]) if views else (), full)
        if views is None or views[k]
        else _Info(False)
        for k in range(len(eqn.outvars))
    ]


def _meet(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...],
    narrowed: set[Any], inside: bool, walk: _Walk,
) -> None:  # fmt: skip
    """Parameters meet the example: in a site, as a scalar, or in another way."""
    if not eqn.outvars:
        return  # `jax.debug.print` and its like
    convolves = eqn.primitive is P.conv_general_dilated_p
    if (convolves and (args[1].example or _leaves(args))) or _convolves_inside(eqn):
        walk.convolutions[key] = _leaves(args)
    positions = [i for i, a in enumerate(args) if a.leaves]
    found = []
    if len(positions) == 1:
        found = _sites(eqn, args, key, lengths, narrowed, inside, positions[0])
    walk.add(found, lengths, eqn.outvars[0].aval)
    for i in positions if not found else ():
        if _size(eqn.invars[i]) == 1 and _is_float(eqn.invars[i].aval) and not inside:
            walk.scalars[(*key, -1 - i)] = args[i].leaves
            aval: Any = eqn.invars[i].aval
            walk.shapes[(*key, -1 - i)] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        else:
            walk.give_up(args[i].leaves, *_reason(eqn))


def _reason(eqn: core.JaxprEqn) -> tuple[str, str]:
    return f"used by {eqn.primitive.name}", source_of(eqn)


def source_of(eqn: core.JaxprEqn) -> str:
    """The line of the model that an equation comes from, "file.py:12 (function)", or "".

    That is the innermost line outside of JAX and, if JAX kept it, of the packages that models are
    written with.
    """
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    for known in (_JAX + _LIBRARIES, _JAX):
        for frame in frames:
            if not any(part in frame.file_name for part in known):
                name = frame.file_name.rsplit("/", 1)[-1]
                return f"{name}:{frame.line_num} ({frame.function_name.rsplit('.', 1)[-1]})"
    return ""


_JAX = ("/jax/", "/jaxlib/", "/dpjax/dp/engines/", "<")
_LIBRARIES = ("/flax/", "/equinox/", "/haiku/", "/optax/", "/jaxtyping/", "/einops/")


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    parts = jax.tree.leaves(list(eqn.params.values()))
    closed = [p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in parts]
    return [p for p in closed if isinstance(p, core.Jaxpr)]


def _convolves_inside(eqn: core.JaxprEqn) -> bool:
    inner = [e for jaxpr in _inner_jaxprs(eqn) for e in jaxpr.eqns]
    # The derivative that a custom rule has is not in its parameters in readable form.
    custom = eqn.primitive.name.startswith("custom_vjp")
    return custom or any(
        e.primitive is P.conv_general_dilated_p or _convolves_inside(e) for e in inner
    )


def _is_closed(eqn: core.JaxprEqn) -> bool:
    """Whether an equation has an inside (a loop, a custom derivative) that the walk skips.

    What it computes inside may have fewer bits than its inputs and outputs show.
    """
    return bool(_inner_jaxprs(eqn))


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _is_float(value: Any) -> bool:
    """Whether a value consists of real floating-point numbers, as the engine's products need."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def _is_full(value: Any) -> bool:
    return not _is_float(value) or jnp.finfo(value.dtype).bits >= 32


def _limit(value: Any) -> float:
    return float(jnp.finfo(value.dtype).max) if _is_float(value) else math.inf


def _leaves(args: Iterable[_Info]) -> frozenset[int]:
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
        views = (view._replace(scanned=(*view.scanned, scanned)) for view in info.views)
        return info._replace(views=tuple(views))

    consts = [enter(a, False) for a in args[:num_consts]]
    xs = [enter(a, True) for a in args[num_consts + num_carry :]]
    initial = args[num_consts : num_consts + num_carry]
    for a in initial:  # the carry changes from turn to turn: no view of one leaf
        walk.give_up(a.leaves, "used by the carry of scan", source_of(eqn))
    carry = [_Info(a.example) for a in initial]
    inside = (*lengths, eqn.params["length"])
    # A carry may come to depend on the example after some turns. Dependence only grows, so this
    # ends; the walk that counts is the one made once it has.
    while True:
        outs = _walk(body, consts + carry + xs, key, inside, _empty(walk.early))
        after = [_Info(a.example or b.example) for a, b in zip(carry, outs)]
        if after == carry:
            break
        carry = after
    outs = _walk(body, consts + carry + xs, key, inside, walk)
    for out in outs:  # a leaf that leaves the scan, stacked or carried, is no longer followed
        walk.give_up(out.leaves, "used by the output of scan", source_of(eqn))
    return [_Info(True)] * len(outs)


def _walk_cond(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...], walk: _Walk
) -> list[_Info]:
    """Enters the branches of cond or switch."""
    for number, body in enumerate(eqn.params["branches"]):
        outs = _walk(body.jaxpr, args[1:], (*key, number), lengths, walk, branch=True)
        for out in outs:
            walk.give_up(out.leaves, "used by the output of cond", source_of(eqn))
    return [_Info(True)] * len(eqn.outvars)


def _follow(eqn: core.JaxprEqn, args: list[_Info]) -> list[list[View]] | None:
    """The views of each output of `eqn`, free of the example; None if it makes no views.

    An output without any is a constant, such as a slice between two views.
    """
    name, params = eqn.primitive.name, eqn.params
    outs: list[Any] = [v.aval for v in eqn.outvars]
    sources: list[Any] = [v.aval for v in eqn.invars]
    if not all(map(_is_float, outs)) or any(a.leaves and not a.views for a in args):
        return None
    own = [i for i, a in enumerate(args) if a.views]
    views = [list(a.views) for a in args]
    if name == "optimization_barrier":
        return views
    if len(outs) != 1 and name != "split":
        return None
    (out, *_), first = outs, own[0]

    def scaled(by: float) -> list[list[View]] | None:
        scaled = [view._replace(scale=view.scale * by) for view in views[first]]
        # Others leave the range in which a cotangent can be scaled without losing it.
        return [scaled] if all(1e-18 < abs(view.scale) < 1e18 for view in scaled) else None

    def moved(view: View, axis: int, by: int) -> View:
        """A view of a part that stands `by` further along `axis` of the equation's values."""
        axis += len(view.start) - sources[first].ndim
        return view._replace(
            start=tuple(s + by if i == axis else s for i, s in enumerate(view.start))
        )

    if name in _SAME:
        return [views[0]]
    if name == "convert_element_type":
        return [[view._replace(limit=min(view.limit, _limit(out))) for view in views[0]]]
    if name == "neg":
        return scaled(-1.0)
    if name in ("add", "add_any", "sub"):
        if any(sources[i].shape != out.shape for i in own):
            return None
        signs = (1.0, -1.0 if name == "sub" else 1.0)
        return [[v._replace(scale=v.scale * signs[i]) for i in own for v in views[i]]]
    if name == "mul" or (name == "div" and own == [0]):
        other = eqn.invars[1 - first]
        if len(own) == 1 and isinstance(other, core.Literal) and jnp.ndim(other.val) == 0:
            factor = float(other.val)
            return scaled(factor if name == "mul" else 1 / (factor or np.nan))
        return None
    if name in ("concatenate", "stack"):
        axis = params["dimension" if name == "concatenate" else "axis"]
        if name == "stack":
            views = [[_inserted(view, axis, sources[i].ndim) for view in views[i]] for i in own]
            starts = own
        else:
            sizes = [s.shape[axis] for s in sources]
            starts = [sum(sizes[:i]) for i in own]
            views = [views[i] for i in own]
        ndim = out.ndim
        return [[
            v._replace(start=tuple(
                s + (by if i == axis + len(v.start) - ndim else 0) for i, s in enumerate(v.start)
            ))
            for vs, by in zip(views, starts) for v in vs
        ]]  # fmt: skip
    if len(own) != 1 or first != 0:
        return None
    if name == "split":
        stops = list(itertools.accumulate(params["sizes"]))
        ends = [(stop - size, stop) for stop, size in zip(stops, params["sizes"])]
        axis, sliced = params["axis"], []
        for start, stop in ends:
            window = [(0, n, 1) for n in sources[0].shape]
            window[axis] = (int(start), int(stop), 1)
            sliced.append([w for v in views[0] for w in _sliced(v, window)])
        return sliced
    if name == "slice":
        strides = params["strides"] or (1,) * out.ndim
        window = list(zip(params["start_indices"], params["limit_indices"], strides))
        return [[w for v in views[0] for w in _sliced(v, window)]]
    if name == "pad":
        low, _, inner = zip(*params["padding_config"])
        if any(inner) or min(low) < 0 or any(s + l > o for s, l, o in zip(
                sources[0].shape, low, out.shape)):  # fmt: skip
            return None
        padded = views[0]
        for axis, by in enumerate(low):
            padded = [moved(v, axis, by) for v in padded]
        return [padded]
    if name == "transpose":
        return [[_transposed(view, params["permutation"]) for view in views[0]]]
    reshapes = name in ("squeeze", "broadcast_in_dim", "expand_dims")
    reshapes |= name == "reshape" and params["dimensions"] is None
    # A broadcast that repeats numbers is no reshape: its gradient is a sum over the copies.
    if reshapes and math.prod(out.shape) == math.prod(sources[0].shape):
        found = [_reshaped(view, sources[0].shape, out.shape) for view in views[0]]
        return None if None in found else [found]  # type: ignore[list-item]
    return None


def _stack(view: View, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and start along the scanned axes, which the equation's values lack: they are kept."""
    count = len(view.shape) - ndim
    return view.shape[:count], view.start[:count]


def _transposed(view: View, permutation: Sequence[int]) -> View:
    count = len(view.shape) - len(permutation)
    perm = (*range(count), *(count + p for p in permutation))
    shape, start = ([values[i] for i in perm] for values in (view.shape, view.start))
    return view.after(Step(view.shape, perm=perm), shape, start)


def _inserted(view: View, axis: int, ndim: int) -> View:
    """A view of a value with one more axis of length 1."""
    axis += len(view.shape) - ndim
    shape, start = ((*v[:axis], x, *v[axis:]) for v, x in ((view.shape, 1), (view.start, 0)))
    return view.after(Step(view.shape), shape, start)


def _sliced(view: View, window: Sequence[tuple[int, int, int]]) -> list[View]:
    """The part of a view inside a slice, given as start, limit and stride per axis, if any."""
    shape, start = map(list, _stack(view, len(window)))
    steps = [(0, 1)] * len(shape)
    for size, begin, (first, limit, stride) in zip(
        view.shape[len(steps) :], view.start[len(shape) :], window
    ):
        # Positions first + k * stride of the value that lie in begin ... begin + size - 1.
        low = max(0, -(-(begin - first) // stride))
        high = (min(limit, begin + size) - 1 - first) // stride
        if high < low:
            return []
        steps.append((first + low * stride - begin, stride))
        shape.append(high - low + 1)
        start.append(low)
    return [view.after(Step(view.shape, window=tuple(steps)), shape, start)]


def _reshaped(view: View, before: Sequence[int], after: Sequence[int]) -> View | None:
    """A view of a reshaped value; None if the part would not be a part any more."""
    shape, start = map(list, _stack(view, len(before)))
    count = len(shape)
    own = [t for t in zip(before, view.shape[count:], view.start[count:]) if t[0] != 1]
    rest = [size for size in after if size != 1]
    places: list[tuple[int, int]] = []
    while own:
        # The smallest numbers of axes, before and after, that hold the same numbers.
        block, sizes = [own.pop(0)], [rest.pop(0)]
        while (lack := math.prod(n for n, _, _ in block) - math.prod(sizes)) != 0:
            block += [own.pop(0)] if lack < 0 else []
            sizes += [rest.pop(0)] if lack > 0 else []
        # The part as a range of the block's flat numbers.
        partial = [i for i, (n, m, _) in enumerate(block) if n != m]
        if partial and any(m != 1 for _, m, _ in block[: partial[-1]]):
            return None
        low = sum(s * by for (_, _, s), by in zip(block, _strides([n for n, _, _ in block])))
        length = math.prod(m for _, m, _ in block)
        for inner in _strides(sizes):
            if low % inner == 0 == length % inner:
                places.append((length // inner, low // inner))
                low, length = 0, inner
            elif low // inner == (low + length - 1) // inner:
                places.append((1, low // inner))
                low %= inner
            else:
                return None
    for size in after:
        one, place = (1, 0) if size == 1 else places.pop(0)
        shape.append(one)
        start.append(place)
    return view.after(Step(view.shape), shape, start)


def _sites(
    eqn: core.JaxprEqn,
    args: list[_Info],
    key: Key,
    lengths: tuple[int, ...],
    narrowed: set[Any],
    inside: bool,
    operand: int,
) -> list[Site]:
    """The sites that `eqn` is, if it multiplies operand `operand`, a weight, with one value."""
    weight = eqn.invars[operand]
    aval: Any = weight.aval
    output: Any = eqn.outvars[0].aval
    if len(eqn.outvars) != 1 or not _is_float(aval) or not _is_float(output):
        return []  # a complex product has a conjugate in its derivative
    params = dict(eqn.params)
    if eqn.primitive is P.dot_general_p:
        kind = "dot"
    elif eqn.primitive is P.conv_general_dilated_p and operand == 1:
        kind = "conv"
        if params["batch_group_count"] != 1:
            return []
    elif eqn.primitive is P.gather_p and operand == 0:
        kind = "embed"
        if params["mode"] not in _GATHER_MODES:
            return []
    elif eqn.primitive is P.dynamic_slice_p and operand == 0:
        kind = "embed"  # a lookup whose indices are operands of their own, and are clipped
        params["mode"] = jax.lax.GatherScatterMode.CLIP
    else:
        return []
    if kind == "embed":
        sizes = params["slice_sizes"]
        if any(size not in (1, n) for size, n in zip(sizes, aval.shape)) or aval.ndim == 0:
            return []
        rows = [i for i, size in enumerate(sizes) if size == 1 != aval.shape[i]]
        if not rows and sizes[0] != 1:
            return []  # the table itself
        params |= {"row_axes": rows or [0], "table": tuple(aval.shape)}
        indices: Any = eqn.invars[1].aval
        shape = indices.shape if eqn.primitive is P.gather_p else (aval.ndim,)
        inputs: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    else:
        inputs = eqn.invars[1 - operand].aval
        if not _is_float(inputs):
            return []
    if 0 in (*aval.shape, *inputs.shape, *output.shape, *lengths):
        return []  # an empty product, whose patches have no shape
    views, leaves = args[operand].views, args[operand].leaves
    site = Site(
        key=key, kind=kind, leaves=leaves, view=None, weight=(key[:-1], weight), operand=operand,
        params=params, shape=tuple(aval.shape), input=inputs, output=output, lengths=lengths,
        scanned=(False,) * len(lengths), limit=_limit(aval), source=source_of(eqn),
    )  # fmt: skip
    if not views:
        # A derivative in fewer bits, or inside of a loop, is left to JAX.
        return [site] if not inside and (args[operand].full or weight in narrowed) else []
    sites = []
    for view in views:
        whole = dataclasses.replace(
            site, leaves=frozenset([view.leaf]), view=view, weight=None, scanned=view.scanned,
            limit=view.limit,
        )  # fmt: skip
        cut = _cut(whole, view, aval.shape)
        if cut is None:
            return []
        sites.append(cut)
    return sites


def _cut(site: Site, view: View, shape: Sequence[int]) -> Site | None:
    """The site of a part of the weight: what of the recorded arrays belongs to it."""
    stacked = [i for i, s in enumerate(site.scanned) if s]
    whole = [*(site.lengths[i] for i in stacked), *shape]
    scans, count = len(site.lengths), len(stacked)
    x_cuts, g_cuts = [], []
    lengths = list(site.lengths)
    x_shape, g_shape = list(site.input.shape), list(site.output.shape)
    for axis, (size, part, start) in enumerate(zip(whole, view.shape, view.start)):
        if (part, start) == (size, 0):
            continue
        if axis < count:  # of the turns of a scan
            lengths[stacked[axis]] = part
            x_cuts.append((stacked[axis], start, part))
            g_cuts.append((stacked[axis], start, part))
            continue
        x_axis, g_axis = _axes_of(site, axis - count)
        if x_axis is None and g_axis is None:
            return None
        if x_axis is not None and site.kind == "embed":
            continue  # rows are counted from `view.start`
        if x_axis is not None:
            x_shape[x_axis] = part
            x_cuts.append((scans + x_axis, start, part))
        if g_axis is not None:
            g_shape[g_axis] = part
            g_cuts.append((scans + g_axis, start, part))
    return dataclasses.replace(
        site,
        shape=view.shape,
        lengths=tuple(lengths),
        input=jax.ShapeDtypeStruct(tuple(x_shape), site.input.dtype),
        output=jax.ShapeDtypeStruct(tuple(g_shape), site.output.dtype),
        cuts=(tuple(x_cuts), tuple(g_cuts)),
    )


def _axes_of(site: Site, axis: int) -> tuple[int | None, int | None]:
    """The axes of the input and of the output that run along an axis of the weight."""
    if site.kind == "conv":
        dims = site.params["dimension_numbers"]
        if site.params["feature_group_count"] != 1:
            return None, None
        if axis == dims.rhs_spec[0]:
            return None, dims.out_spec[1]
        return (dims.lhs_spec[1], None) if axis == dims.rhs_spec[1] else (None, None)
    if site.kind == "embed":
        sizes = site.params["slice_sizes"]
        if axis in site.params["row_axes"]:
            return 0, None
        dims = site.params.get("dimension_numbers")
        if dims is None:
            return None, axis
        gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        kept = [i for i in range(len(sizes)) if i not in gone]
        return None, dims.offset_dims[kept.index(axis)]
    contract, batch = site.params["dimension_numbers"]
    w, x = site.operand, 1 - site.operand
    if axis in contract[w]:
        return contract[x][contract[w].index(axis)], None
    if axis in batch[w]:
        place = batch[w].index(axis)
        return batch[x][place], place
    ndim = (len(site.output.shape) - len(site.input.shape)) + 2 * len(contract[w]) + len(batch[w])
    free = [i for i in range(ndim) if i not in contract[w] and i not in batch[w]]
    x_free = len(site.input.shape) - len(contract[x]) - len(batch[x])
    return None, len(batch[w]) + free.index(axis) + (x_free if w == 1 else 0)
