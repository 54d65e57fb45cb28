"""Finds where trainable parameters meet the example in a loss function's jaxpr.

Ghost clipping rests on one fact: where a weight enters as `y = x @ w`, its gradient is `x^T g`,
with g the cotangent of y. Norms and weighted sums of such gradients follow from x and g, which one
backward pass over the batch gives for all examples. This module looks for all such equations in
the jaxpr of the loss of ONE example, whatever library wrote it and after JAX's own elimination of
dead code:

- A *view* is a part of a value that is a part of a leaf, in another order or scaled; see `views`.
- A *site* is an equation that multiplies views with a value that depends on the example; see
  `sites`.
- A *derived* weight is another function of parameters alone, such as weight standardization. The
  function's derivative takes the weight's gradient to the leaves. It has to be computed in float32,
  and may be converted at the end: a derivative in fewer bits rounds gradients to those bits, and a
  sum of many such gradients would move by more than the bound. Of a weight that contains a product
  of two small ones, both are sites; see `factored`.
- A *scalar* is a number computed from parameters alone that meets the example, such as a penalty
  that is added to the loss. Its gradient is one array for all examples, times a number of each.
  A number that scales a weight is one, where that saves a derived weight; see `scales`.
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
from jax.extend import core
from jax.extend.core import primitives as P
from jax.interpreters import partial_eval

from dpjax.dp.engines import factored, reference, scales
from dpjax.dp.engines.factored import Factored, Product, follow_product
from dpjax.dp.engines.jaxprs import convolves_inside, equations, inlined, is_closed, scan_parts
from dpjax.dp.engines.sites import (
    Key,
    Site,
    Weight,
    are_disjoint,
    joined,
    nested,
    sites_of,
    source_of,
)
from dpjax.dp.engines.views import View, can_multiply, follow, is_float, is_full, limit_of

__all__ = ["Traced", "trace"]

PyTree = Any

_WRITES = {"swap", "addupdate"}  # to mutable arrays, `jax.new_ref`
_MOST_SCALARS = 4  # of one leaf: each needs an array of the leaf's size


@dataclasses.dataclass(frozen=True)
class Traced:
    """A loss function's jaxpr and what each parameter leaf does in it.

    Attributes:
        jaxpr: the jaxpr of `loss_fn(params, example)` for ONE example.
        written: the same as the model has it, with scales in its products; see `scales`.
        consts: its constants.
        groups: the sites of one view of a leaf each; views of one leaf are disjoint.
        mixed: weights whose leaves have several uses, or that are derived; no leaf is in two.
        direct: for each other leaf that is used, why it is not covered by sites.
        scalars: by place, the leaves of scalars that meet the example. The place of an equation's
            operand is the equation's key with -1 - operand behind it.
        sources: by leaf, the line of the model that decided, if JAX knows it.
        spreads: whether a batched gradient may spread one example's NaN over the others.
        taps: shape and dtype of the cotangent of each site's equation and of each scalar.
        factored: equations that are two sites each, see `factored`.
        same: by place, an earlier one where the same scalar meets the example.
        writes: whether the loss writes to arrays in place (`jax.new_ref`), which nothing here
            follows; all leaves are direct then.
    """

    jaxpr: core.Jaxpr
    written: core.Jaxpr
    consts: Sequence[Any]
    groups: tuple[Weight, ...]
    mixed: tuple[tuple[Weight, ...], ...]
    direct: dict[int, str]
    scalars: dict[Key, frozenset[int]]
    sources: dict[int, str]
    spreads: bool

    taps: dict[Key, jax.ShapeDtypeStruct]
    factored: dict[Key, Factored]
    same: dict[Key, Key]
    writes: bool = False

    @property
    def sites(self) -> list[Site]:
        """All sites, those of one equation included."""
        return [s for w in (*self.groups, *itertools.chain(*self.mixed)) for s in w]

    def left_to_jax(self, leaves: dict[int, str]) -> Traced:
        """The same with some leaves direct that have groups, and why."""
        groups = tuple(sites for sites in self.groups if sites[0].leaves.isdisjoint(leaves))
        found = dataclasses.replace(self, groups=groups, direct=self.direct | leaves)
        used = {site.equation for site in found.sites} | self.scalars.keys()
        taps = {key: tap for key, tap in self.taps.items() if key in used}
        return dataclasses.replace(found, taps=taps)


class _Info(NamedTuple):
    """What is known of a value: does it depend on the example, and on which leaves otherwise."""

    example: bool = False
    leaves: frozenset[int] = frozenset()
    views: tuple[View, ...] = ()  # empty if some dependence on a leaf is no view
    full: bool = True  # whether it, and all that it was computed from, has 32 bits or more
    product: Product | None = None
    reads: frozenset[int] = frozenset()  # leaves that it is computed from, with a gradient or not
    entered: tuple[Key, int] | None = None  # see `Site`
    narrowed: bool = False  # whether it is a conversion of a value that was full

    @property
    def known(self) -> bool:
        """Whether a weight that is derived like this can be differentiated in 32 bits or more."""
        return (self.full or self.narrowed) and self.reads <= self.leaves


class _Walk(NamedTuple):
    """What one walk over a jaxpr found.

    Attributes:
        sites: in the order of the jaxpr.
        scalars: see `Traced`.
        direct: reason and line of leaves with other uses.
        convolutions: those whose kernel differs between examples or has leaves, which are named.
        shapes: shape and dtype of the output of each site's equation, scans first, and of scalars.
        early: whether products of parameters alone count as sites, if the result is small.
        factored: see `Traced`.
        seen: by variable and call, the place where a scalar met the example first.
        same: see `Traced`.
    """

    sites: list[Site]
    scalars: dict[Key, frozenset[int]]
    direct: dict[int, tuple[str, str]]
    convolutions: dict[Key, frozenset[int]]
    shapes: dict[Key, jax.ShapeDtypeStruct]
    early: bool
    factored: dict[Key, Factored]
    seen: dict[Any, Key]
    same: dict[Key, Key]

    def add(self, sites: list[Site], lengths: tuple[int, ...], output: Any) -> None:
        self.sites.extend(sites)
        for site in sites:
            shape = (*lengths, *output.shape)
            self.shapes[site.equation] = jax.ShapeDtypeStruct(shape, output.dtype)

    def give_up(self, leaves: Iterable[int], reason: str, source: str = "") -> None:
        for leaf in leaves:
            self.direct.setdefault(leaf, (reason, source))


def _empty(early: bool) -> _Walk:
    return _Walk([], {}, {}, {}, {}, early, {}, {}, {})


def trace(loss_fn: Any, params: PyTree, example: PyTree) -> Traced:
    """Traces `loss_fn` on one example and classifies the leaves of `params`.

    Args:
        loss_fn: `(params, example) -> scalar loss`.
        params: pytree of arrays or abstract values, the trainable parameters.
        example: one example, arrays or abstract values.

    Returns:
        The jaxpr with its sites.

    Raises:
        TypeError: the loss is not one real scalar.
    """
    values = reference.unplaced((params, example))
    closed = jax.make_jaxpr(reference.scalar(loss_fn))(*values)
    # Scans that return parameters nobody reads, heads whose logits nobody reads: not uses.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    leaves = jax.tree.leaves(params)
    if any(eqn.primitive.name in _WRITES for eqn in equations(jaxpr)):
        found = _resolve(jaxpr, closed.consts, _empty(early=False))  # of no equation
        direct = dict.fromkeys(range(len(leaves)), "the loss writes to an array in place")
        return dataclasses.replace(found, direct=direct, writes=True)
    infos = [
        _Info(
            False,
            frozenset([i]),
            (View(i, tuple(leaf.shape), (0,) * len(leaf.shape), limit=limit_of(leaf)),),
            is_full(leaf),
            reads=frozenset([i]),
        )
        if 0 not in leaf.shape
        else _Info()  # no number of it is used anywhere
        for i, leaf in enumerate(leaves)
    ]
    infos += [_Info(True)] * (len(jaxpr.invars) - len(leaves))

    def walked(jaxpr: core.Jaxpr, early: bool = False) -> Traced:
        walk = _empty(early)
        (loss,) = _walk(jaxpr, infos, (), (), walk)
        # A leaf that reaches the loss without meeting the example has no equation to tap.
        walk.give_up(loss.leaves, "the loss depends on it without the example")
        return _resolve(jaxpr, closed.consts, walk)

    def formed(traced: Traced) -> int:
        """Numbers of the gradients that are formed for each example."""
        mixed = (site.leaves for weight in itertools.chain(*traced.mixed) for site in weight)
        return sum(math.prod(leaves[i].shape) for i in frozenset(traced.direct).union(*mixed))

    found = walked(jaxpr)
    if not formed(found):
        return found
    others = [walked(jaxpr, early=True)]
    if found.mixed or any(len(leaves[i].shape) > 1 for i in found.direct):
        bare = scales.taken_out(jaxpr, [math.prod(leaf.shape) for leaf in leaves])
        others += [walked(bare), walked(bare, early=True)] if bare else []
    return dataclasses.replace(min(found, *others, key=formed), written=jaxpr)


def _resolve(jaxpr: core.Jaxpr, consts: Sequence[Any], walk: _Walk) -> Traced:
    """Groups the sites by weight; decides which leaves are taken together, and which are direct."""
    direct = dict(walk.direct)
    uses: dict[int, list[Site]] = {}
    for site in walk.sites:
        for leaf in site.leaves:
            uses.setdefault(leaf, []).append(site)
    counts: dict[int, int] = {}
    for leaf in itertools.chain(*walk.scalars.values()):
        counts[leaf] = counts.get(leaf, 0) + 1
        if leaf not in uses:
            direct.setdefault(leaf, ("it meets the example in a scalar", ""))
        elif counts[leaf] > _MOST_SCALARS:
            direct.setdefault(leaf, (f"more than {_MOST_SCALARS} scalars depend on it", ""))

    groups: list[Weight] = []
    # Leaves that are taken together, by any one of them.
    together: dict[int, set[int]] = {}
    for leaf, sites in uses.items():
        weights = joined(sites) if all(site.view for site in sites) else []
        if not are_disjoint(weights):
            weights = nested(weights)
        # A scalar's gradient is one of all numbers of the leaf.
        numbers = sum(math.prod(weight[0].shape) for weight in weights)
        whole = leaf not in counts or (weights and numbers == _leaf_size(weights[0][0]))
        if weights and are_disjoint(weights) and whole:
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
        mixed.append(tuple(joined(list(own.values()))))
    # Leaves that became direct after their groups had been formed.
    groups = [sites for sites in groups if sites[0].leaves.isdisjoint(direct)]
    sites = [s for w in (*groups, *itertools.chain(*mixed)) for s in w]
    keys = {site.equation for site in sites}
    covered: frozenset[int] = frozenset().union(*(site.leaves for site in sites))
    sources = {leaf: source for leaf, (_, source) in direct.items()}
    for site in sites:
        for leaf in site.leaves:
            sources.setdefault(leaf, site.source)
    covering = {k: own & covered for k, own in walk.scalars.items() if own & covered}
    taps = {site.equation: walk.shapes[site.equation] for site in sites}
    taps |= {place: walk.shapes[place] for place in covering}
    return Traced(
        taps=taps,
        factored=walk.factored,
        same={place: first for place, first in walk.same.items() if first in covering},
        jaxpr=jaxpr,
        written=jaxpr,
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
            outs = [_Info(args[0].example, reads=args[0].reads)]
        elif not any(a.example for a in args):
            outs = _without_example(eqn, args, key, lengths, walk)
        elif eqn.primitive is P.scan_p:
            args = args if inside else _entered(args, key)
            outs = _walk_scan(eqn, args, key, lengths, walk)
        elif eqn.primitive is P.cond_p:
            args = args if inside else _entered(args, key)
            outs = _walk_cond(eqn, args, key, lengths, walk)
        else:
            # Past this equation the leaf is part of a value that depends on the example: whatever
            # uses that value is no use of the leaf.
            outs = [_Info(True)] * len(eqn.outvars)
            _meet(eqn, args, key, lengths, inside, walk)
        outs = [
            o if _is_inexact(v.aval) else _Info(o.example, reads=o.reads)
            for o, v in zip(outs, eqn.outvars)
        ]
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars]


def _entered(args: list[_Info], key: Key) -> list[_Info]:
    """Notes of derived weights that enter a loop or a branch where they are computed."""
    return [a._replace(entered=(key, i)) for i, a in enumerate(args)]


def _without_example(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...], walk: _Walk
) -> list[_Info]:
    """A function of parameters alone: views, perhaps, or part of a derived weight."""
    if walk.early and any(a.leaves for a in args) and len(eqn.outvars) == 1:
        # A product with a learned query, or the first rows of a table: if the result is smaller
        # than the weight, it may as well be taken for a value of the example.
        size = _size(eqn.outvars[0])
        fits = [i for i, a in enumerate(args) if a.views and _size(eqn.invars[i]) > size]
        for operand in fits:
            info = args[operand]
            found = sites_of(eqn, operand, info.views, info.leaves, key, lengths)
            if found:
                walk.add(found, lengths, eqn.outvars[0].aval)
                rest = [a for i, a in enumerate(args) if i != operand]
                walk.give_up(_leaves(rest), *_reason(eqn))
                return [_Info(True)]
    # What has an effect must not run again, as the function of a derived weight does.
    full = all(a.full for a in args) and not is_closed(eqn) and not eqn.effects
    full = full and all(is_full(v.aval) for v in eqn.outvars)
    narrowed = eqn.primitive is P.convert_element_type_p and args[0].full
    views = None
    if any(a.views for a in args) and all(a.views or not a.leaves for a in args):
        views = follow(eqn, [a.views for a in args])
    leaves, reads = _leaves(args), frozenset[int]().union(*(a.reads for a in args))
    product = follow_product(eqn, key, args)
    return [
        _Info(False, leaves, tuple(views[k]) if views else (), full, product, reads, None, narrowed)
        if views is None or views[k]
        else _Info(False, reads=reads)
        for k in range(len(eqn.outvars))
    ]


def _meet(
    eqn: core.JaxprEqn, args: list[_Info], key: Key, lengths: tuple[int, ...],
    inside: bool, walk: _Walk,
) -> None:  # fmt: skip
    """Parameters meet the example: in a site, as a scalar, or in another way."""
    if not eqn.outvars:
        return  # `jax.debug.print` and its like
    convolves = eqn.primitive is P.conv_general_dilated_p
    if (convolves and (args[1].example or _leaves(args))) or convolves_inside(eqn):
        walk.convolutions[key] = _leaves(args)
    positions = [i for i, a in enumerate(args) if a.leaves]
    found: list[Site] = []
    if len(positions) == 1:
        (operand,) = positions
        info = args[operand]
        # A derived weight's derivative in fewer bits, or one that is computed inside of a loop, is
        # left to JAX, and that of a function that reads other leaves behind `stop_gradient`.
        known = info.known and (not inside or info.entered is not None)
        halves = None
        if info.product and info.full and not inside:
            halves = factored.split(eqn, operand, info.product, key)
        if halves:
            walk.factored[key], found = halves
        elif info.views or known:
            found = sites_of(eqn, operand, info.views, info.leaves, key, lengths)
            if not info.views:
                found = [dataclasses.replace(site, entered=info.entered) for site in found]
    walk.add(found, lengths, eqn.outvars[0].aval)
    for i in positions if not found else ():
        scalar = _size(eqn.invars[i]) == 1 and can_multiply(eqn.invars[i].aval)
        if scalar and not inside and args[i].reads <= args[i].leaves:
            place = (*key, -1 - i)
            first = walk.seen.setdefault((key[:-1], eqn.invars[i]), place)
            if first != place:
                walk.same[place] = first
                continue
            walk.scalars[place] = args[i].leaves
            aval: Any = eqn.invars[i].aval
            walk.shapes[place] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        else:
            reason, source = _reason(eqn)
            if not args[i].views and eqn.primitive in (P.dot_general_p, P.conv_general_dilated_p):
                if inside and args[i].entered is None:
                    reason += ", as a weight that is computed in the same loop or branch"
                elif not args[i].known:
                    reason += ", as a weight that has a loop, a solver, few bits or a stopped leaf"
            walk.give_up(args[i].leaves, reason, source)


def _reason(eqn: core.JaxprEqn) -> tuple[str, str]:
    wide = any(is_float(v.aval) and not can_multiply(v.aval) for v in (*eqn.invars, *eqn.outvars))
    return f"used by {eqn.primitive.name}" + " in float64" * wide, source_of(eqn)


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _leaves(args: Iterable[_Info]) -> frozenset[int]:
    return frozenset(leaf for a in args for leaf in a.leaves)


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
    xs = [a._replace(entered=None) for a in xs]  # slices of what entered
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
