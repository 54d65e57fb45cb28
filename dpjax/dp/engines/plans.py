"""How the gradient of each leaf is handled: which product, in which form, or example by example.

The plan is made from sizes alone, before anything is computed. It decides what the engine does,
and is what a run prints and `explain` tells.

- "gram", "outer", "outer again", "lookup": the leaf's uses are all products in one layout. The norm
  comes from Gram matrices, or from gradients that are formed, where they are cheaper; those are
  kept for the sum if they take little memory. Some small ones are left to JAX, which forms them
  on the way back ("outer" too, see `_small`).
- "derived": the weight is a function of its leaves, or a leaf is used in several layouts. Where all
  that is done to a leaf is to scale and shift its columns, norms are computed as for a product
  ("by columns", see `columns`), and where its numbers are taken one by one, by the products of
  pairs of tokens if those are few ("by entries", see `entries`); else the gradient is formed for a
  few examples at a time.
- "direct": JAX differentiates the leaf for each example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms, products, summation
from dpjax.dp.engines.columns import Columns, columns_of
from dpjax.dp.engines.entries import Entries, entries_of
from dpjax.dp.engines.forms import Form
from dpjax.dp.engines.sites import Weight
from dpjax.dp.engines.tracing import Traced, trace

__all__ = ["Group", "LeafPlan", "Mixed", "Plan", "leaf_plans", "make_plan", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# How many times fewer numbers a gradient has than are recorded: of the model, where that of a layer
# that is applied once is kept in any case; of its own product, where it is left to JAX.
_KEPT, _LEFT = 16, 8


class LeafPlan(NamedTuple):
    """How the gradient of one leaf is handled.

    Attributes:
        path: the leaf's path, keys joined by "/".
        route: "gram", "outer", "embed", "conv", "derived", "direct" or "unused".
        reason: the sizes that decided, or why no product was found.
        source: the line of the model that decided, "file.py:12 (function)", if JAX knows it.
    """

    path: str
    route: str
    reason: str
    source: str = ""


class Group(NamedTuple):
    """The sites of one view of a leaf, and how their norms are computed.

    Attributes:
        sites: uses of the view.
        form: sizes of the joint canonical form.
        norm: "lookup", "gram", "outer" or "outer again".
    """

    sites: Weight
    form: Form
    norm: str

    @property
    def is_kept(self) -> bool:
        """Whether the gradients are kept for the sum."""
        return self.norm == "outer"

    @property
    def route(self) -> str:
        """The name in the plan."""
        kinds = {site.kind for site in self.sites}
        return kinds.pop() if kinds in ({"embed"}, {"conv"}) else self.norm.split()[0]


class Mixed(NamedTuple):
    """Weights that are formed for each example, because their leaves have several uses.

    Attributes:
        weights: the sites of each weight.
        leaves: all leaves that they are computed from.
        kept: whether the leaves' gradients are kept for the sum, or formed a second time.
        numbers: numbers of the gradients of all weights, of one example.
        columns: the weights as columns that are scaled and shifted, whose gradients are not formed,
            with the way to their norms; empty if they are not of that kind.
        entries: likewise, the weights as functions of the numbers of each leaf, one by one.
    """

    weights: tuple[Weight, ...]
    leaves: tuple[int, ...]
    kept: bool
    numbers: int
    columns: tuple[tuple[Columns, str], ...] = ()
    entries: tuple[Entries, ...] = ()

    @property
    def is_formed(self) -> bool:
        """Whether gradients are formed for each example, twice: for norms, and for the sum."""
        return not (self.kept or self.columns or self.entries)

    @property
    def route(self) -> str:
        """The name in the plan."""
        return "conv" if {s.kind for w in self.weights for s in w} == {"conv"} else "derived"


class Plan(NamedTuple):
    """What the engine does.

    Attributes:
        traced: the loss.
        groups: of leaves whose gradients are measured as products.
        mixed: weights that are derived, or used in several ways.
        small: by leaf, the sizes of products that are left to JAX, see `_small`.
    """

    traced: Traced
    groups: tuple[Group, ...]
    mixed: tuple[Mixed, ...]
    small: dict[int, str]

    @property
    def tokens(self) -> int:
        """The most tokens of a weight whose gradient is measured without being kept."""
        sites = [group.sites for group in self.groups]
        sites += [own.sites for mixed in self.mixed for own, _ in mixed.columns]
        sites += [own.sites for mixed in self.mixed for own in mixed.entries]
        return max((forms.form_of(own).T for own in sites), default=1)


def plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> tuple[LeafPlan, ...]:
    """Says how each leaf of `params` is handled, without computing anything.

    Args:
        loss_fn: `(params, example) -> scalar loss`.
        params: trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
        example: ONE example, likewise.

    Returns:
        One record per leaf, in `jax.tree.leaves` order.
    """
    return leaf_plans(make_plan(loss_fn, params, example), params)


def leaf_plans(planned: Plan, params: PyTree) -> tuple[LeafPlan, ...]:
    """The plan, leaf by leaf."""
    traced = planned.traced
    routes = {leaf: ("direct", reason) for leaf, reason in traced.direct.items()}
    for group in planned.groups:
        routes[min(group.sites[0].leaves)] = group.route, _sizes(group.sites, group.norm)
    for mixed in planned.mixed:
        norm = "outer" if mixed.kept else "outer again"
        for leaf in mixed.leaves:
            own = [w for w in mixed.weights if leaf in w[0].leaves]
            how = "by entries" if mixed.entries else "derived"
            sizes = "; ".join(_sizes(weight, norm) for weight in own) + f", {how}"
            by_columns = [
                _sizes(columns.sites, norm if mixed.kept else own_norm)
                for columns, own_norm in mixed.columns
                if leaf in columns.leaves
            ]
            if by_columns:
                sizes = "; ".join(by_columns) + ", by columns"
            routes[leaf] = mixed.route, sizes
    routes |= {leaf: ("outer", sizes) for leaf, sizes in planned.small.items()}
    unused = "unused", "the loss does not depend on it"
    return tuple(
        LeafPlan(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            *routes.get(i, unused),
            traced.sources.get(i, ""),
        )
        for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    )


def _sizes(sites: Weight, norm: str) -> str:
    form = forms.form_of(sites)
    sizes = f"T={form.T} d={form.d} p={form.p}" + (f" B={form.B}" if form.B > 1 else "")
    return sizes if {site.kind for site in sites} in ({"dot"}, {"embed"}) else f"{sizes}, {norm}"


def make_plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> Plan:
    traced = trace(loss_fn, params, example)
    leaves = jax.tree.leaves(params)
    small = _small(traced)
    traced = traced.left_to_jax(small) if small else traced
    groups = []
    recorded = sum(forms.form_of(sites).recorded for sites in traced.groups)
    for sites in traced.groups:
        form = forms.form_of(sites)
        numbers = form.B * form.d * form.p
        if all(site.kind == "embed" for site in sites):
            # Where lookups outnumber the rows, a gradient takes less room than its parts.
            norm = "lookup" if form.T < form.d else "outer"
        elif form.T == 1 and numbers <= min(summation.BIAS, recorded // _KEPT):
            # Such as the head of a large model: measured and summed with other small gradients, it
            # needs no programs of its own.
            norm = "outer"
        else:
            norm = products.cheapest(form)
        groups.append(Group(sites, form, norm))
    mixed = []
    for weights in traced.mixed:
        own = sorted({leaf for sites in weights for leaf in sites[0].leaves})
        sizes = [forms.form_of(sites) for sites in weights]
        total = Form(1, 1, 1, sum(math.prod(leaves[i].shape) for i in own),
                     sum(form.recorded for form in sizes))  # fmt: skip
        numbers = sum(form.B * form.d * form.p for form in sizes)
        group = Mixed(weights, tuple(own), False, numbers)
        # The derivative of the function is taken again, too; beside patches that is little.
        times = 1 if group.route == "conv" else 2
        columns = _columns(traced, weights, leaves)
        kept = products.can_keep(total, 1 if columns else times)
        group = group._replace(columns=columns)
        if not (kept or columns):
            group = group._replace(entries=_entries(traced, weights, leaves))
        mixed.append(group._replace(kept=kept))
    return Plan(traced, tuple(groups), tuple(mixed), small)


def _small(traced: Traced) -> dict[int, str]:
    """Leaves whose gradients JAX forms on the way back in less time than it takes to record them.

    They are far smaller than what they are computed from, and that is not in the order that the
    engine needs: of products side by side, say, such as those of a block diagonal. No turn of a
    loop is among them: there, JAX adds up a gradient for each.

    Returns:
        By leaf, the sizes.
    """
    by_leaf: dict[int, list[Weight]] = {}
    for sites in traced.groups:
        by_leaf.setdefault(min(sites[0].leaves), []).append(sites)
    scalars = frozenset[int]().union(*traced.scalars.values())
    return {
        leaf: f"{'; '.join(_sizes(sites, 'outer') for sites in weights)}, on the way back"
        for leaf, weights in by_leaf.items()
        if leaf not in scalars and all(_is_small(sites) for sites in weights)
    }


def _is_small(sites: Weight) -> bool:
    form = forms.form_of(sites)
    wide = all({site.input.dtype, site.output.dtype} == {jnp.dtype("float32")} for site in sites)
    # Of a factor of a large weight, JAX would form the gradient of the weight.
    plain = all(s.kind == "dot" and not (s.lengths or s.factor or any(s.cuts)) for s in sites)
    moved = not all(forms.is_canonical(site) for site in sites)
    return plain and wide and moved and _LEFT * form.B * form.d * form.p <= form.recorded


def _entries(
    traced: Traced, weights: tuple[Weight, ...], leaves: Sequence[Any]
) -> tuple[Entries, ...]:
    """The weights as functions of single numbers, if all are, each of leaves of its own."""
    every: list[Entries] = []
    for sites in weights:
        found = entries_of(traced, sites, leaves)
        if not found or not {own.leaf for own in found}.isdisjoint(own.leaf for own in every):
            return ()
        every.extend(found)
    return tuple(every)


def _columns(
    traced: Traced, weights: tuple[Weight, ...], leaves: Sequence[Any]
) -> tuple[tuple[Columns, str], ...]:
    """The weights as scaled and shifted columns, if all are, each of a leaf of its own."""
    every = []
    for sites in weights:
        found = columns_of(traced, sites, leaves)
        if found is None:
            return ()
        norm = products.cheapest(forms.form_of(found.sites))
        every.append((found, "gram" if norm == "gram" else "outer again"))
    scaled = [found.leaf for found, _ in every]
    others = {leaf for found, _ in every for leaf in found.others}
    if len(set(scaled)) < len(scaled) or not others.isdisjoint(scaled):
        return ()
    # The gradients of gains are kept.
    numbers = sum(math.prod(leaves[i].shape) for i in others)
    return tuple(every) if 4 * numbers <= sum(math.prod(leaves[i].shape) for i in scaled) else ()
