"""The book-keeping engine: clipped sums at the price of about one ordinary backward pass.

One backward pass over the microbatch gives, for every leaf whose uses are all products with
example-dependent inputs (see `sites`), those inputs and the cotangents of the products. Both
the norms and, once the clipping factors are known, the weighted sum of the gradients follow from
them without per-example gradients in memory and without a second backward pass. Every other leaf,
mostly biases, norm scales and other small ones, is differentiated per example.

**The bound holds for every input.** Norms come with proved bounds on rounding (`products`),
and the factor is that of their sum. Where the bounds are not small beside the norm itself, tokens
cancel, numbers leave the range of float32 or of the leaf's own dtype, and the engine does not trust
itself: it leaves the example out of its products and hands it to the reference engine, one example
at a time. Ordinary examples never are; one that is costs a gradient of its own.

Source: Bu et al. 2022, arXiv 2210.00038 (book-keeping); Li et al. 2021, arXiv 2110.05679 (ghost
norms); Goodfellow 2015, arXiv 1510.01799.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpjax.dp.clipping import SMALLEST_NORM, ClipRule, PerExample
from dpjax.dp.engines import products, reference
from dpjax.dp.engines.forms import KINDS, Form, conv_sum, has_patches
from dpjax.dp.engines.sites import Key, Site, Traced, View, trace
from dpjax.dp.engines.taps import derived_weight, evaluate

__all__ = ["LeafPlan", "microbatch_sum", "plan"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]
Raw = tuple[tuple[jax.Array, jax.Array], ...]  # input and output cotangent of each site

# Numbers in a temporary of one chunk of examples: what a CPU's cache holds, or enough to fill an
# accelerator.
_CHUNK = {"cpu": 2**20}
_LARGE_CHUNK = 2**27

# An example is trusted if rounding adds at most this share to its norm, if its tokens do not cancel
# (see `_cancellation`), and if the numbers that are multiplied keep their distance from the ends of
# float32's range, before and after the factor.
_MARGIN = 2.0**-7
_LARGE, _SCALED = 2.0**60, 2.0**120


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
        leaves: the leaves that the weight is computed from.
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

    @property
    def limit(self) -> float:
        """The largest number of the narrowest float that a gradient of the weight passes."""
        return min(site.limit for site in self.sites)


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
    planned = _plan(loss_fn, params, example)
    routes = {leaf: ("direct", reason) for leaf, reason in planned.direct.items()}
    for group in planned.groups:
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
    planned = _plan(loss_fn, params, example)
    loss, raws, direct = _backward(planned, leaves, batch)

    doubts = reference.count_of_doubts(loss)
    parts = [_kept(direct, doubts)] if direct else []
    parts += [
        _part(planned.traced, group, raw, leaves, doubts)
        for group, raw in zip(planned.groups, raws)
    ]
    groups, num_groups = rule.groups(params), rule.num_groups(params)
    most = _cancellation(max((group.form.T for group in planned.groups), default=1))
    clip = _clip(rule, parts, groups, num_groups, loss, mask, most)
    # A batched convolution may have spread one example's NaN over the losses of all, see reference.
    convolutions = reference.differentiates_convolutions(loss_fn, params, batch)
    doubtful = mask & ~clip.usable & (convolutions | jnp.isfinite(loss))
    total = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
    for part in parts:
        factors = {leaf: clip.factors[:, groups[leaf]] for leaf in part.measures}
        for leaf, value in part.sum(factors, clip.usable).items():
            total[leaf] = value
    facts = PerExample(
        loss=jnp.where(mask, loss, 0.0),
        norms=jnp.where(mask[:, None], clip.norms, 0.0),
        factors=clip.factors,
        real=mask,
    )
    summed = jax.tree.unflatten(treedef, total)
    if not planned.groups and not convolutions:
        return summed, facts  # gradients of direct leaves are those of the reference
    return reference.one_by_one(loss_fn, rule, params, batch, doubtful, summed, facts)


class _Clip(NamedTuple):
    """What the norms decide, `[n]` or `[n, groups]`.

    Attributes:
        norms: measured.
        factors: zero for examples that the engine does not sum.
        usable: False where recorded arrays may hold anything, or where the bound is in doubt.
    """

    norms: jax.Array
    factors: jax.Array
    usable: jax.Array


def _cancellation(tokens: int) -> float:
    """How many times its own norm the partial sums of a trusted gradient may reach.

    Random tokens reach the root of their number. Twice that adds no more to the rounding of the
    shared sum than a few more examples would.
    """
    return 4 + 2 * tokens**0.5


def _clip(
    rule: ClipRule,
    parts: list[_Part],
    groups: tuple[int, ...],
    num_groups: int,
    loss: jax.Array,
    mask: jax.Array,
    most: float,
) -> _Clip:
    """Adds up the leaves' measures and turns them into factors, or into doubt."""
    finite = jnp.isfinite(loss)
    if not num_groups:
        empty = jnp.zeros((*mask.shape, 0), jnp.float32)
        return _Clip(empty, empty, finite)
    zero = jnp.zeros(mask.shape, jnp.float32)
    found = [[products.Measure(zero, zero, zero, zero, zero)] for _ in range(num_groups)]
    for part in parts:
        for leaf, measure in part.measures.items():
            found[groups[leaf]].append(measure)
    # [leaves, n, groups]; leaves are orthogonal, so spread and mass add up in squares.
    each = [jax.tree.map(lambda *xs: jnp.stack(xs), *measures) for measures in found]
    square, error = (
        jnp.stack([jnp.sum(getattr(m, name), 0) for m in each], 1) for name in ("square", "error")
    )
    spread, mass = (
        jnp.stack([jnp.linalg.norm(getattr(m, name), axis=0) for m in each], 1)
        for name in ("spread", "mass")
    )
    peak = jnp.stack([jnp.max(m.peak, 0) for m in each], 1)
    norms = jnp.sqrt(square)
    bounded = jnp.sqrt(square + error) + spread
    # Below SMALLEST_NORM a factor no longer depends on the norm, so a bound below it suffices.
    regular = norms > SMALLEST_NORM
    trusted = bounded <= jnp.where(regular, (1 + _MARGIN) * norms, SMALLEST_NORM)
    trusted &= mass <= most * jnp.maximum(norms, SMALLEST_NORM)
    trusted &= (peak <= _LARGE) & jnp.isfinite(norms)
    trusted = jnp.all(trusted, 1)
    for part in parts:
        if part.within is not None:
            trusted &= part.within
    factors = jax.vmap(rule.factors)(jnp.where(norms > 0, bounded, norms))
    # Factors far above 1 belong to tiny bounds; what they scale must stay finite.
    trusted &= jnp.all(factors * peak <= _SCALED, 1)
    usable = trusted & finite
    factors = jnp.where((mask & usable)[:, None], factors, 0.0)
    return _Clip(norms, factors, usable)


def _backward(
    planned: _Plan, leaves: list[Any], batch: PyTree
) -> tuple[jax.Array, list[Raw], dict[int, jax.Array]]:
    """One backward pass: losses, recorded arrays of each group, gradients of direct leaves."""
    sites = [site for group in planned.groups for site in group.sites]

    def one(example: PyTree) -> Any:
        def loss(taps: dict[Key, jax.Array], direct: dict[int, Any]) -> Any:
            args = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
            return evaluate(planned.traced, [*args, *jax.tree.leaves(example)], taps)

        taps = {s.key: jnp.zeros((*s.lengths, *s.output.shape), s.output.dtype) for s in sites}
        direct = {i: leaves[i] for i in planned.direct}
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(taps, direct)

    (loss, inputs), (cotangents, direct) = jax.vmap(one)(batch)
    raws = [
        tuple((inputs[s.key], _scaled(s.view, cotangents[s.key])) for s in group.sites)
        for group in planned.groups
    ]
    return loss.astype(jnp.float32), raws, {i: g.astype(jnp.float32) for i, g in direct.items()}


def _scaled(view: View | None, cotangent: jax.Array) -> jax.Array:
    """The cotangent of a leaf where that of the leaf times a constant was recorded."""
    if view is None or view.scale == 1.0:
        return cotangent
    return cotangent.astype(jnp.float32) * view.scale


class _Part(NamedTuple):
    """The leaves of one weight, or one direct leaf: how large their gradients are, and their sum.

    Attributes:
        measures: by leaf, `[n]` each.
        sum: `({leaf: factors [n]}, usable [n]) -> {leaf: sum over examples}`.
        within: `[n]` bool, whether no number on the way leaves the range of the weight's dtype;
            None if that is float32's own.
    """

    measures: dict[int, products.Measure]
    sum: Callable[[dict[int, jax.Array], jax.Array], dict[int, jax.Array]]
    within: jax.Array | None = None


def _kept(gradients: dict[int, jax.Array], doubts: jax.Array) -> _Part:
    """Leaves with per-example gradients `[n, ...]` in memory: measured and summed as they are."""
    flat = reference.flattened(gradients, doubts)
    return _Part(
        {leaf: products.kept_measure(g) for leaf, g in flat.items()},
        lambda factors, usable: {
            leaf: products.weigh(g, factors[leaf], usable).reshape(gradients[leaf].shape[1:])
            for leaf, g in flat.items()
        },
    )


def _part(traced: Traced, group: _Group, raw: Raw, leaves: list[Any], doubts: jax.Array) -> _Part:
    """The part of one weight, from the recorded inputs and cotangents of its sites."""
    view = group.sites[0].view
    if view is None:
        return _derived_part(traced, group, raw, leaves, doubts)

    def measure(raw: Raw) -> tuple[products.Measure, Any]:
        x, g = group.canonical(raw)
        if group.norm == "lookup":
            return products.lookup_measure(x, g), ()
        if group.norm == "gram":
            return products.gram_measure(x, g), ()
        found, gradients = products.outer_measure(x, g)
        if group.norm == "outer again":
            return found, ()
        gradients = reference.once(gradients, doubts)
        return products.kept_measure(gradients)._replace(mass=found.mass * narrow), gradients

    # The mass of kept gradients does not matter, unless the weight is of a narrow dtype.
    narrow = float(group.limit < products.LARGEST)
    raw = reference.once(raw, doubts)  # one recording for the norm and for the sum
    measured, gradients = _chunked(measure, raw, _temporary(group))
    # In both places: before the constant factor of a scaled weight, and behind it.
    reach = measured.mass * max(1.0, 1 / abs(view.scale))
    within = reach < group.limit / 4 if narrow else None
    if group.norm == "outer":
        measured = measured._replace(mass=jnp.zeros_like(measured.mass))

    def total(factors: dict[int, jax.Array], usable: jax.Array) -> dict[int, jax.Array]:
        if group.norm == "outer":
            weighed = products.weigh(gradients, factors[view.leaf], usable)
            return {view.leaf: view.pull(group.restore(weighed))}
        return {view.leaf: view.pull(_weighted_sum(group, raw, factors[view.leaf], usable))}

    return _Part({view.leaf: measured}, total, within)


def _derived_part(
    traced: Traced, group: _Group, raw: Raw, leaves: list[Any], doubts: jax.Array
) -> _Part:
    """The part of a weight that is a function of its leaves.

    The derivative of that function can cancel nearly all of a gradient, say that of `w - mean(w)`,
    so a sum over examples that is formed before it may hold errors of any size beside the bound.
    The derivative is therefore taken per example, and what it gives is measured and summed.
    """
    site = group.sites[0]
    own = {i: leaves[i] for i in group.leaves}
    weight, vjp = jax.vjp(lambda own: derived_weight(traced, site, own), own)

    def pull(gradient: jax.Array) -> dict[int, jax.Array]:
        (result,) = vjp(group.restore(gradient).astype(weight.dtype))
        return jax.tree.map(lambda g: g.astype(jnp.float32), result)

    def gradients(raw: Raw) -> tuple[dict[int, jax.Array], jax.Array]:
        x, g = group.canonical(raw)
        if group.limit < products.LARGEST:
            found, gradient = products.outer_measure(x, g)
            within = found.mass < group.limit / 4
        else:
            gradient = products.materialize(x, g)
            within = jnp.ones(gradient.shape[0], bool)
        return jax.vmap(pull)(gradient), within

    if group.norm == "outer":
        pulled, within = _chunked(gradients, raw, _temporary(group))
        return _kept(pulled, doubts)._replace(within=within)

    def measure(raw: Raw) -> tuple[dict[int, products.Measure], jax.Array]:
        pulled, within = gradients(raw)
        flat = reference.flattened(pulled, doubts)
        return {leaf: products.kept_measure(g) for leaf, g in flat.items()}, within

    measures, within = _chunked(measure, raw, _temporary(group))

    def total(factors: dict[int, jax.Array], usable: jax.Array) -> dict[int, jax.Array]:
        def chunk(total: dict[int, jax.Array], part: Any) -> tuple[dict[int, jax.Array], None]:
            raw, factors, usable, squares = part
            pulled = reference.flattened(gradients(raw)[0], doubts)
            for leaf, g in pulled.items():
                # Formed a second time, in another program: what is added is measured once more, and
                # shrunk if it is the larger.
                again = products.kept_measure(g).square
                shrink = jnp.where(again > squares[leaf], jnp.sqrt(squares[leaf] / again), 1.0)
                fine = usable & jnp.isfinite(again)
                weighed = products.weigh(g, factors[leaf] * shrink, fine)
                total[leaf] += weighed.reshape(total[leaf].shape)
            return total, None

        squares = {leaf: measured.square for leaf, measured in measures.items()}
        zeros = {leaf: jnp.zeros(leaves[leaf].shape, jnp.float32) for leaf in squares}
        cut, _ = _cut((raw, factors, usable, squares), _temporary(group))
        return jax.lax.scan(chunk, zeros, cut)[0]

    return _Part(measures, total, within)


def _temporary(group: _Group) -> int:
    """Numbers that measuring one example takes beyond what is recorded or kept."""
    if any(has_patches(site) for site in group.sites):
        return group.form.B * group.form.T * group.form.d
    return group.form.B * group.form.d * group.form.p if group.norm == "outer again" else 0


def _cut(arrays: Any, size: int) -> tuple[Any, int]:
    """Cuts arrays `[n, ...]` into `[chunks, n / chunks, ...]` by the `size` of each example."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    budget = _CHUNK.get(jax.default_backend(), _LARGE_CHUNK)
    chunk = max(c for c in range(1, n + 1) if n % c == 0 and (c == 1 or c * size <= budget))
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), arrays), n // chunk


def _chunked(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Applies `function` to a few examples at a time if its temporaries, `size` each, are large."""
    cut, chunks = _cut(arrays, size)
    if chunks == 1:
        return function(arrays)
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), jax.lax.map(function, cut)
    )


def _weighted_sum(group: _Group, raw: Raw, factors: jax.Array, usable: jax.Array) -> jax.Array:
    """Sum over examples of factor * gradient of a weight whose gradients were not kept."""
    if has_patches(group.sites[0]) and not any(site.lengths for site in group.sites):
        total = jnp.zeros(group.sites[0].shape, jnp.float32)
        for site, (x, g) in zip(group.sites, raw):
            x, g = products.cleared(x, usable), products.scaled(g, factors, usable)
            total += conv_sum(site, x, g)
        return total
    x, g = group.canonical(raw)
    if group.norm == "lookup":
        return group.restore(products.lookup_sum(x, g, factors, usable, group.form.d))
    return group.restore(products.weighted_product(x, g, factors, usable))
