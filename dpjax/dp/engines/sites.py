"""Equations in which a part of a parameter is multiplied with a value of the example.

Where a weight enters as `y = x @ w`, its gradient is `x^T g`, with g the cotangent of y. A *site*
is an equation of which that is true: `dot_general`, `conv_general_dilated`, or a lookup by `gather`
or `dynamic_slice` (a product with one-hot rows). Its weight consists of views of leaves (see
`views`), or it is *derived*: another function of parameters alone. An equation whose weight has
several views, such as kernels that were joined, is a site for each of them, with the part of the
recorded arrays that belongs to the view (`Site.cuts`).

`joined` finds the sites whose gradients add up number by number in the canonical form (see
`forms`). Two uses of one leaf add up before they are squared, |a + b|^2 has a cross term, so a
mistake here would be a wrong norm: sites are joined only if every number of both canonical
gradients stands for the same number of the same leaf.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.views import Factors, View, can_multiply, limit_of, split

__all__ = [
    "Key",
    "Site",
    "Weight",
    "are_disjoint",
    "axes_of",
    "joined",
    "layout",
    "sites_of",
    "source_of",
]

Key = tuple[int, ...]

_GATHER_MODES = (
    jax.lax.GatherScatterMode.CLIP,
    jax.lax.GatherScatterMode.FILL_OR_DROP,
    jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)


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
        factor: whether the weight is one of two whose product the equation has; see `factored`.
        around: of a rectangle of a larger weight, how many rows and columns of that lie before and
            behind it, `((before, behind), (before, behind))` of d and of p; see `nested`.
        entered: of a derived weight that enters a loop or a branch, the outermost equation that it
            enters, and the position among its operands.
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
    factor: bool = False
    around: tuple[tuple[int, int], ...] = ()
    entered: tuple[Key, int] | None = None

    @property
    def equation(self) -> Key:
        """Position of the equation whose input and cotangent are recorded."""
        return self.key[:-1] if self.factor else self.key

    @property
    def place(self) -> tuple[Key, int]:
        """An equation and an operand of it that a derived weight is, where it is computed."""
        return self.entered or (self.key, self.operand)

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


def sites_of(
    eqn: core.JaxprEqn,
    operand: int,
    views: tuple[View, ...],
    leaves: frozenset[int],
    key: Key,
    lengths: tuple[int, ...],
) -> list[Site]:
    """The sites that an equation is, if it multiplies a weight with one other value.

    Args:
        eqn: the equation.
        operand: position of the weight among its operands.
        views: the views that form the weight; empty for a derived weight.
        leaves: the leaves that it is computed from.
        key: position of the equation, through nested jaxprs.
        lengths: lengths of the enclosing scans, outermost first.

    Returns:
        One site per view, one of a derived weight, or none.
    """
    weight = eqn.invars[operand]
    aval: Any = weight.aval
    output: Any = eqn.outvars[0].aval
    if len(eqn.outvars) != 1 or not can_multiply(aval) or not can_multiply(output):
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
        if not can_multiply(inputs):
            return []
    if 0 in (*aval.shape, *inputs.shape, *output.shape, *lengths):
        return []  # an empty product, whose patches have no shape
    site = Site(
        key=key, kind=kind, leaves=leaves, view=None, weight=(key[:-1], weight), operand=operand,
        params=params, shape=tuple(aval.shape), input=inputs, output=output, lengths=lengths,
        scanned=(False,) * len(lengths), limit=limit_of(aval), source=source_of(eqn),
    )  # fmt: skip
    if not views:
        return [site]
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
        x_axis, g_axis = axes_of(site, axis - count)
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


def axes_of(site: Site, axis: int) -> tuple[int | None, int | None]:
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


def joined(sites: list[Site]) -> list[Weight]:
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


def nested(weights: list[Weight]) -> list[Weight]:
    """Joins the dense uses of rectangles of a leaf, some inside of others, to one weight.

    With zeros around its input and its cotangent, a rectangle's gradient is one of the largest
    weight. Heads for several widths of one embedding are of this kind (Kusupati et al. 2022, arXiv
    2205.13147), and layers of several widths.

    Args:
        weights: of one leaf.

    Returns:
        One weight if the largest contains all others and each is a matrix; else the same weights.
    """
    rectangles = [_rectangle(weight[0]) for weight in weights]
    if any(found is None for found in rectangles) or any(w[0].turned for w in weights):
        return weights
    order = sorted(range(len(weights)), key=lambda i: -math.prod(weights[i][0].shape))
    offset, sizes, steps = rectangles[order[0]]  # type: ignore[misc]
    joined = list(weights[order[0]])
    for i in order[1:]:
        start, own, own_steps = rectangles[i]  # type: ignore[misc]
        across = min((0, 1), key=lambda axis: -steps[axis])  # the axis with the longer steps
        before = [0, 0]
        before[across], rest = divmod(start - offset, steps[across])
        before[1 - across], rest = divmod(rest, steps[1 - across])
        behind = [n - m - b for n, m, b in zip(sizes, own, before)]
        if own_steps != steps or rest or min(*before, *behind) < 0:
            return weights
        around = tuple(zip(before, behind))
        joined += [dataclasses.replace(site, around=around) for site in weights[i]]
    return [tuple(joined)]


def _rectangle(site: Site) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Where a matrix starts in its leaf, its numbers of rows and columns, and the steps of both."""
    if site.kind != "dot" or site.view is None or site.view.factors() is None:
        return None
    (_, offset), (batch, *both) = _identity(site)
    if batch or any(len(part) != 1 for part in both):
        return None
    (d, d_step), (p, p_step) = (part[0] for part in both)
    return offset, (d, p), (d_step, p_step)


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
                cut = split(axes[axis], (groups, site.shape[axis] // groups))
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


def are_disjoint(weights: list[Weight]) -> bool:
    """Whether no number of the leaf is part of two of the weights."""
    boxes = [weight[0].view.box() for weight in weights if weight[0].view]
    return all(
        any(a[1] < b[0] or b[1] < a[0] for a, b in zip(one, two))
        for one, two in itertools.combinations(boxes, 2)
    )


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
