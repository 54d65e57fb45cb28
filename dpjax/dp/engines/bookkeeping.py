"""The book-keeping engine: clipped sums at the price of about one ordinary backward pass.

One backward pass over the microbatch gives, for every leaf whose uses are all products with
example-dependent inputs (see `jaxpr_sites`), those inputs and the cotangents of the products. Both
the norms and, once the clipping factors are known, the weighted sum of the gradients follow from
them without per-example gradients in memory and without a second backward pass. Every other leaf,
mostly biases, norm scales and other small ones, is differentiated per example.

Source: Bu et al. 2022, arXiv 2210.00038 (book-keeping); Li et al. 2021, arXiv 2110.05679 (ghost
norms); Goodfellow 2015, arXiv 1510.01799.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import ClipRule, PerExample
from dpjax.dp.engines import products
from dpjax.dp.engines.forms import KINDS, Form, conv_sum, has_patches
from dpjax.dp.engines.sites import Key, Site, Traced, trace
from dpjax.dp.engines.taps import derived_weight, evaluate

__all__ = ["LeafPlan", "microbatch_sum", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]
Raw = tuple[tuple[jax.Array, jax.Array], ...]  # input and output cotangent of each site

# Numbers in a temporary of one chunk of examples: what a CPU's cache holds, or enough to fill an
# accelerator.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**27


class LeafPlan(NamedTuple):
    """How the gradient of one leaf is handled.

    Attributes:
        path: the leaf's path, keys joined by "/".
        route: "gram", "outer", "embed", "conv", "direct" or "unused".
        reason: the sizes that decided, or why no product was found.
    """

    path: str
    route: str
    reason: str


class _Group(NamedTuple):
    """The sites of one weight, and how their norms are computed.

    Attributes:
        sites: uses of the weight.
        leaves: what the weight is made of.
        form: sizes of the joint canonical form.
        norm: "lookup", "gram", "outer" or "outer again".
    """

    sites: tuple[Site, ...]
    leaves: tuple[int, ...]
    form: Form
    norm: str

    def canonical(self, raw: Raw) -> tuple[jax.Array, jax.Array]:
        """The canonical x and g of all sites, token axes joined."""
        pairs = [KINDS[s.kind].canonical(s, *pair) for s, pair in zip(self.sites, raw)]
        if len(pairs) == 1:
            return pairs[0]
        xs, gs = zip(*pairs)
        return jnp.concatenate(xs, 2), jnp.concatenate(gs, 2)

    def restore(self, gradient: jax.Array) -> jax.Array:
        """A canonical gradient in the shape of the weight."""
        return KINDS[self.sites[0].kind].restore(self.sites[0], gradient)


class _Plan(NamedTuple):
    traced: Traced
    groups: tuple[_Group, ...]
    direct: dict[int, str]


def plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> tuple[LeafPlan, ...]:
    """Says how each leaf of `params` is handled, without computing anything.

    Args:
        loss_fn: `(params, example) -> scalar loss`.
        params: trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
        example: ONE example, likewise.

    Returns:
        One record per leaf, in `jax.tree.leaves` order.
    """
    made = _plan(loss_fn, params, example)
    routes = {leaf: ("direct", reason) for leaf, reason in made.direct.items()}
    for group in made.groups:
        kind, form = group.sites[0].kind, group.form
        sizes = f"T={form.T} d={form.d} p={form.p}" + (f" B={form.B}" if form.B > 1 else "")
        if kind == "conv":
            sizes += f", {group.norm}" + (", derived" if group.sites[0].view is None else "")
        for leaf in group.leaves:
            routes[leaf] = (group.norm.split()[0] if kind == "dot" else kind), sizes
    unused = "unused", "the loss does not depend on it"
    return tuple(
        LeafPlan(jax.tree_util.keystr(path, simple=True, separator="/"), *routes.get(i, unused))
        for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    )


def _plan(loss_fn: LossFn, params: PyTree, example: PyTree) -> _Plan:
    traced = trace(loss_fn, params, example)
    groups = []
    for sites in traced.groups:
        forms = [KINDS[site.kind].form(site) for site in sites]
        form = forms[0]._replace(T=sum(f.T for f in forms), recorded=sum(f.recorded for f in forms))
        if sites[0].kind == "embed":
            norm = "lookup"
        elif sites[0].view is None:  # no Gram matrices: the norm is not that of the weight
            norm = "outer" if products.can_keep(form) else "outer again"
        else:
            norm = products.cheapest(form)
        groups.append(_Group(sites, tuple(sorted(sites[0].leaves)), form, norm))
    return _Plan(traced, tuple(groups), traced.direct)


def microbatch_sum(
    loss_fn: LossFn, rule: ClipRule, params: PyTree, batch: PyTree, mask: jax.Array
) -> tuple[PyTree, PerExample]:
    """Sums the clipped per-example gradients of one microbatch.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar.
        rule: maps gradient norms to scale factors.
        params: trainable parameters.
        batch: pytree of `[n, ...]`.
        mask: `[n]` bool, False for padding.

    Returns:
        The sum, float32 in the shape of `params`, and the facts of each example.

    Guarantees:
        The numbers of the vmap engine, up to rounding. Padding and examples with a non-finite loss
        or gradient contribute exactly zero.
    """
    leaves, treedef = jax.tree.flatten(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    made = _plan(loss_fn, params, example)
    loss, raws, direct = _backward(made, leaves, batch)

    squares = {i: jnp.sum(jnp.square(g), _all_but_first(g)) for i, g in direct.items()}
    pulls = [_pull(made.traced, group, leaves) for group in made.groups]
    kept = []
    for group, pull, raw in zip(made.groups, pulls, raws):
        found, keep = _squares(group, pull, raw)
        squares.update(found)
        kept.append(keep)

    groups, num_groups = rule.groups(params), rule.num_groups(params)
    totals = [jnp.zeros(mask.shape, jnp.float32) for _ in range(num_groups)]
    for leaf in sorted(squares):
        totals[groups[leaf]] += squares[leaf]
    norms = jnp.sqrt(jnp.stack(totals, 1)) if totals else jnp.zeros((*mask.shape, 0), jnp.float32)
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms), 1)
    factors = jnp.where((mask & finite)[:, None], jax.vmap(rule.factors)(norms), 0.0)

    total = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
    for leaf, g in direct.items():
        total[leaf] = products.weigh(g, factors[:, groups[leaf]], finite)
    for group, pull, keep in zip(made.groups, pulls, kept):
        for index in sorted({groups[leaf] for leaf in group.leaves}):
            pulled = pull(_weighted_sum(group, keep, factors[:, index], finite))
            for leaf in group.leaves:
                if groups[leaf] == index:
                    total[leaf] = pulled[leaf]
    facts = PerExample(
        loss=jnp.where(mask, loss, 0.0),
        norms=jnp.where(mask[:, None], norms, 0.0),
        factors=factors,
        real=mask,
    )
    return jax.tree.unflatten(treedef, total), facts


def _backward(
    made: _Plan, leaves: list[Any], batch: PyTree
) -> tuple[jax.Array, list[Raw], dict[int, jax.Array]]:
    """One backward pass: losses, recorded arrays of each group, gradients of direct leaves."""
    sites = [site for group in made.groups for site in group.sites]

    def one(example: PyTree) -> Any:
        def loss(taps: dict[Key, jax.Array], direct: dict[int, Any]) -> Any:
            args = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
            return evaluate(made.traced, [*args, *jax.tree.leaves(example)], taps)

        taps = {s.key: jnp.zeros((*s.lengths, *s.output.shape), s.output.dtype) for s in sites}
        direct = {i: leaves[i] for i in made.direct}
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(taps, direct)

    (loss, inputs), (cotangents, direct) = jax.vmap(one)(batch)
    raws = [tuple((inputs[s.key], cotangents[s.key]) for s in g.sites) for g in made.groups]
    return loss.astype(jnp.float32), raws, {i: g.astype(jnp.float32) for i, g in direct.items()}


def _pull(
    traced: Traced, group: _Group, leaves: list[Any]
) -> Callable[[jax.Array], dict[int, jax.Array]]:
    """The map from a cotangent of the group's weight to those of its leaves, float32."""
    site = group.sites[0]
    if site.view is not None:
        view = site.view
        return lambda cotangent: {view.leaf: view.pull(cotangent)}
    own = {i: leaves[i] for i in group.leaves}
    weight, vjp = jax.vjp(lambda own: derived_weight(traced, site, own), own)

    def pull(cotangent: jax.Array) -> dict[int, jax.Array]:
        (result,) = vjp(cotangent.astype(weight.dtype))
        return jax.tree.map(lambda g: g.astype(jnp.float32), result)

    return pull


def _squares(
    group: _Group, pull: Callable[[jax.Array], dict[int, jax.Array]], raw: Raw
) -> tuple[dict[int, jax.Array], Any]:
    """Squared gradient norms `[n]` by leaf, and what the weighted sum needs."""
    view = group.sites[0].view

    def norms(raw: Raw) -> tuple[dict[int, jax.Array], Any]:
        x, g = group.canonical(raw)
        if view is None:
            gradients = products.materialise(x, g)
            pulled = jax.vmap(lambda w: pull(group.restore(w)))(gradients)
            squares = {i: jnp.sum(jnp.square(g), _all_but_first(g)) for i, g in pulled.items()}
            return squares, gradients
        if group.norm == "gram":
            return {view.leaf: products.gram_squares(x, g) * view.scale**2}, ()
        if group.norm == "lookup":
            return {view.leaf: products.lookup_squares(x, g) * view.scale**2}, ()
        gradients = products.materialise(x, g)
        square = jnp.sum(jnp.square(gradients), _all_but_first(gradients))
        return {view.leaf: square * view.scale**2}, gradients

    def outer(raw: Raw) -> tuple[dict[int, jax.Array], Any]:
        squares, gradients = norms(raw)
        return squares, gradients if group.norm == "outer" else ()

    size = 0
    if any(has_patches(site) for site in group.sites):
        size = group.form.B * group.form.T * group.form.d
    elif group.norm == "outer again":
        size = group.form.B * group.form.d * group.form.p
    squares, gradients = _chunked(outer, raw, size)
    return squares, gradients if group.norm == "outer" else raw


def _all_but_first(array: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _chunked(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Applies `function` to a few examples at a time if its temporaries, `size` each, are large."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    budget = _CHUNK.get(jax.default_backend(), _LARGE_CHUNK)
    chunk = max(c for c in range(1, n + 1) if n % c == 0 and (c == 1 or c * size <= budget))
    if chunk == n:
        return function(arrays)
    cut = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), jax.lax.map(function, cut))


def _weighted_sum(group: _Group, kept: Any, factors: jax.Array, finite: jax.Array) -> jax.Array:
    """Sum over examples of factor * gradient of a group's weight."""
    if group.norm == "outer":
        return group.restore(products.weigh(kept, factors, finite))
    if has_patches(group.sites[0]) and not group.sites[0].lengths:
        total = jnp.zeros(group.sites[0].shape, jnp.float32)
        for site, (x, g) in zip(group.sites, kept):
            x, g = products.cleared(x, finite), products.scaled(g, factors, finite)
            total += conv_sum(site, x, g)
        return total
    x, g = group.canonical(kept)
    if group.norm == "lookup":
        return group.restore(products.lookup_sum(x, g, factors, finite, group.form.d))
    return group.restore(products.weighted_product(x, g, factors, finite))
