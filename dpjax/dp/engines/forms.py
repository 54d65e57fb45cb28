"""Brings the sites of a weight (see `sites`) to one canonical form.

Inputs are x `[n, B, T, d]` and output cotangents g `[n, B, T, p]`, such that example i's gradient
is x_i^T g_i, `[B, d, p]`. T counts tokens: whatever the weight is applied to several times within
one example, and the gradient therefore sums over. B counts independent products side by side, whose
gradients are different parts of the leaf.

| site | T | B | d, p |
|---|---|---|---|
| dense layer on `[tokens, d]` | tokens | 1 | features in, out |
| `einsum("etd,edp->etp")` (experts) | t | e | d, p |
| convolution | output positions | groups | kernel positions x channels in, channels out |
| lookup `table[rows]` | rows looked up | 1 | rows of the table (never formed), row length |
| inside a scan, weight shared by the turns | x turns | | |
| inside a scan, weight a slice of a stack | | x turns | |

A row lookup is a product with one-hot rows; it is recorded as row numbers `[n, 1, T, 1]`. A weight
that is looked up and multiplied, such as an embedding that is tied to the output layer, has both.

Each kind has two functions: `form` gives the sizes and `canonical` reorders the recorded arrays.
`restore` takes a canonical gradient `[B, d, p]` back to the shape of the weight. The order in which
`canonical` merges axes into B, d and p and the order in which `restore` splits them are the same
order, that of `sites.layout`, and that is all there is to check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.dp.engines.sites import Site, layout
from dpjax.dp.engines.views import View

__all__ = [
    "Form",
    "Tokens",
    "conv_sum",
    "form_of",
    "has_patches",
    "is_canonical",
    "is_table",
    "keeps_order",
    "last_axes",
    "part_of",
    "restore",
    "side_by_side",
    "sums_as_convolution",
    "tiles",
    "tokens",
]


class Form(NamedTuple):
    """Sizes of a canonical form, per example; `recorded` numbers make it."""

    B: int
    T: int
    d: int
    p: int
    recorded: int


class Tokens(NamedTuple):
    """The canonical arrays of one weight: products, lookups, or both.

    Attributes:
        x: inputs `[n, B, T, d]`, None without products.
        g: output cotangents `[n, B, T, p]`.
        rows: rows looked up `[n, 1, T, 1]`, int32 and in range; None without lookups.
        h: their cotangents `[n, 1, T, p]`.
        d: rows of the gradient.
    """

    x: Any
    g: Any
    rows: Any = None
    h: Any = None
    d: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of products and of lookups."""
        return sum(int(part.shape[2]) for part in (self.x, self.rows) if part is not None)

    @property
    def p(self) -> int:
        """Columns of the gradient."""
        return int((self.g if self.h is None else self.h).shape[3])


def part_of(site: Site, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What of the recorded arrays `[n, scans..., ...]` belongs to the site's view, scaled."""
    for cut in site.cuts[0]:
        x = _cut(x, *cut)
    for cut in site.cuts[1]:
        g = _cut(g, *cut)
    view: View | None = site.view
    if view is None or view.scale == 1.0:
        return x, g
    # The cotangent of a leaf where that of the leaf times a constant was recorded.
    return x, -g if view.scale == -1.0 else g.astype(jnp.float32) * view.scale


def _cut(array: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    return jax.lax.slice_in_dim(array, start, start + size, axis=1 + axis)


def form_of(sites: tuple[Site, ...]) -> Form:
    """The joint sizes of all uses of one weight."""
    forms = [_FORMS[site.kind](site) for site in sites]
    forms = [f._replace(d=f.p, p=f.d) if s.turned else f for s, f in zip(sites, forms)]
    return forms[0]._replace(T=sum(f.T for f in forms), recorded=sum(f.recorded for f in forms))


def tokens(sites: tuple[Site, ...], arrays: Any) -> Tokens:
    """The canonical arrays of all uses of one weight, token axes joined.

    Args:
        sites: the uses.
        arrays: for each, what was recorded and belongs to it; see `part_of`.
    """
    products: list[Any] = []
    lookups: list[Any] = []
    for site, (x, g) in zip(sites, arrays):
        x, g = _CANONICAL[site.kind](site, x, g)[:: -1 if site.turned else 1]
        if site.around:
            x, g = (jnp.pad(a, [(0, 0)] * 3 + [by]) for a, by in zip((x, g), site.around))
        (lookups if site.kind == "embed" else products).append((x, g))

    def joined(pairs: list[tuple[jax.Array, jax.Array]]) -> Any:
        if len(pairs) < 2:
            return pairs[0] if pairs else (None, None)
        return tuple(side_by_side(parts) for parts in zip(*pairs))

    (x, g), (rows, h) = joined(products), joined(lookups)
    return Tokens(x, g, rows, h, form_of(sites).d)


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays `[n, B, tokens, ...]` as one, float32 if they differ in their dtypes."""
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(jnp.float32) for part in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)


def keeps_order(site: Site) -> bool:
    """Whether a canonical gradient is one of the site's weight but for its shape."""
    if site.kind == "conv" or site.turned:
        return False
    order = [axis for part in layout(site) for axis in part]
    return order == sorted(order)


def restore(site: Site, w: jax.Array) -> jax.Array:
    """A canonical gradient `[B, d, p]` in the shape of the site's weight."""
    if site.turned:
        w = jnp.swapaxes(w, 1, 2)
    if site.kind == "conv":
        return _conv_restore(site, w)
    order = [axis for part in layout(site) for axis in part]
    return w.reshape(_sizes(site.shape, order)).transpose(np.argsort(order))


def _scans(site: Site) -> tuple[list[int], list[int]]:
    """Positions of the scans over which the weight is stacked, and of those that share it."""
    stacked = [i for i, s in enumerate(site.scanned) if s]
    shared = [i for i, s in enumerate(site.scanned) if not s]
    return stacked, shared


def _sizes(sizes: Any, axes: Any) -> tuple[int, ...]:
    return tuple(sizes[i] for i in axes)


def _recorded(site: Site) -> int:
    sizes = math.prod(site.input.shape) + math.prod(site.output.shape)
    return math.prod(site.lengths) * sizes


# dot_general: contracts axes of lhs with axes of rhs, side by side over batch axes. The output has
# the batch axes first, then the free axes of lhs, then those of rhs. The weight may be either side.
# B: batch axes; T: the input's free axes; d: contracted axes, p: the weight's free axes.


class _DotAxes(NamedTuple):
    """Axes of a dot_general: of the input x, of the weight w and of the output."""

    x_batch: tuple[int, ...]
    x_free: tuple[int, ...]
    x_contract: tuple[int, ...]
    w_batch: tuple[int, ...]
    w_contract: tuple[int, ...]
    w_free: tuple[int, ...]


def _dot_axes(site: Site) -> _DotAxes:
    contract, batch = site.params["dimension_numbers"]
    w, x = site.operand, 1 - site.operand
    w_ndim = len(site.shape) - len(_scans(site)[0])

    def free(side: int, ndim: int) -> tuple[int, ...]:
        return tuple(i for i in range(ndim) if i not in contract[side] and i not in batch[side])

    return _DotAxes(
        tuple(batch[x]),
        free(x, site.input.ndim),
        tuple(contract[x]),
        tuple(batch[w]),
        tuple(contract[w]),
        free(w, w_ndim),
    )


def _dot_form(site: Site) -> Form:
    axes, shape = _dot_axes(site), site.input.shape
    stacked, shared = _scans(site)
    return Form(
        math.prod(_sizes(site.lengths, stacked) + _sizes(shape, axes.x_batch)),
        math.prod(_sizes(site.lengths, shared) + _sizes(shape, axes.x_free)),
        math.prod(_sizes(shape, axes.x_contract)),
        math.prod(site.output.shape)
        // math.prod(_sizes(shape, axes.x_batch) + _sizes(shape, axes.x_free)),
        _recorded(site),
    )


def _dot_canonical(site: Site, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes, form, n = _dot_axes(site), _dot_form(site), x.shape[0]
    stacked, shared = _scans(site)
    scans = 1 + len(site.lengths)
    before, after = len(axes.x_batch), len(axes.x_free)
    tokens = range(before, before + after)
    if site.operand == 0:  # the output is [batch, w_free, x_free]
        tokens = range(site.output.ndim - after, site.output.ndim)
    features = [i for i in range(before, site.output.ndim) if i not in tokens]

    def order(array: jax.Array, batch: Any, free: Any, last: Any) -> jax.Array:
        outer = [0, *(1 + i for i in stacked), *(scans + i for i in batch)]
        inner = [*(1 + i for i in shared), *(scans + i for i in (*free, *last))]
        return array.transpose(outer + inner)

    x = order(x, axes.x_batch, axes.x_free, axes.x_contract)
    g = order(g, range(before), tokens, features)
    return x.reshape(n, form.B, form.T, form.d), g.reshape(n, form.B, form.T, form.p)


# conv_general_dilated: at every output position the kernel meets one patch of the input, so that
# with patches for tokens a convolution is a dense layer. Kernel positions and input channels are d.
# Channels of group k of the input meet output channels of group k alone: groups are B.


def _conv_form(site: Site) -> Form:
    dims, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    stacked, shared = _scans(site)
    out, kernel = site.output.shape, site.shape[len(stacked) :]
    return Form(
        math.prod(_sizes(site.lengths, stacked)) * groups,
        math.prod(_sizes(site.lengths, shared)) * math.prod(out) // out[dims.out_spec[1]],
        math.prod(kernel) // kernel[dims.rhs_spec[0]],
        out[dims.out_spec[1]] // groups,
        _recorded(site),
    )


def _conv_canonical(site: Site, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    dims, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    form, n, scans = _conv_form(site), x.shape[0], 1 + len(site.lengths)
    stacked, shared = _scans(site)
    outer = [0, *(1 + i for i in stacked), *(1 + i for i in shared)]

    def channels_last(array: jax.Array, spec: Any) -> jax.Array:
        order = outer + [scans + i for i in (spec[0], *spec[2:], spec[1])]
        array = array.transpose(order)
        return array.reshape(-1, *array.shape[scans + 1 :])

    patches = _patches(site, channels_last(x, dims.lhs_spec))
    out = channels_last(g, dims.out_spec)

    def canonical(array: jax.Array, *features: int) -> jax.Array:
        """[n, stacked, T, k, groups, c] to [n, stacked, groups, T, k c]."""
        array = array.reshape(n, form.B // groups, form.T, features[0], groups, features[1])
        array = array.transpose(0, 1, 4, 2, 3, 5)
        return array.reshape(n, form.B, form.T, -1)

    size = math.prod(_kernel(site))
    return canonical(patches, size, form.d // size), canonical(out, 1, form.p)


def _kernel(site: Site) -> tuple[int, ...]:
    """Spatial shape of a convolution's kernel."""
    shape = site.shape[len(_scans(site)[0]) :]
    return _sizes(shape, site.params["dimension_numbers"].rhs_spec[2:])


def _patches(site: Site, x: jax.Array) -> jax.Array:
    """The inputs `[m, out..., kernel size, channels]` under each position of the kernel."""
    p, kernel = site.params, _kernel(site)
    out = _sizes(site.output.shape, p["dimension_numbers"].out_spec[2:])
    padding = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"])]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    m, channels = x.shape[0], x.shape[-1]
    if tiles(site):
        # Patches that tile x, as a ViT's do, are x in another order: no copy for each position.
        x = x[(slice(None), *(slice(o * k) for o, k in zip(out, kernel)))]
        x = x.reshape(m, *itertools.chain(*zip(out, kernel)), channels)
        spatial = range(1, x.ndim - 1)
        x = x.transpose(0, *spatial[::2], *spatial[1::2], x.ndim - 1)
        return x.reshape(m, *out, math.prod(kernel), channels)
    # Position k along an axis of the kernel sees, for all outputs at once, a strided slice. Axis by
    # axis: each slice is a program to be compiled, and those of a large kernel are many.
    strides, dilations = p["window_strides"], p["rhs_dilation"]
    for i in reversed(range(len(kernel))):
        step, reach = strides[i], (out[i] - 1) * strides[i] + 1
        starts = [k * dilations[i] for k in range(kernel[i])]
        slices = [jax.lax.slice_in_dim(x, a, a + reach, step, 1 + i) for a in starts]
        x = jnp.stack(slices, axis=-2)
        x = x.reshape(*x.shape[:-2], -1)
    return x.reshape(m, *out, math.prod(kernel), channels)


def _conv_restore(site: Site, w: jax.Array) -> jax.Array:
    dims, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    kernel, stacked = _kernel(site), len(_scans(site)[0])
    scans, form = site.shape[:stacked], _conv_form(site)
    w = w.reshape(*scans, groups, *kernel, -1, form.p)  # [scans, G, kernel, I, O]
    last = w.ndim - 1
    w = w.transpose(*range(stacked), stacked, last, last - 1, *range(stacked + 1, last - 1))
    w = w.reshape(*scans, groups * form.p, *w.shape[stacked + 2 :])  # [scans, O, I, kernel]
    inverse = np.argsort(dims.rhs_spec)
    return w.transpose(*range(stacked), *(stacked + i for i in inverse))


def last_axes(site: Site) -> tuple[int, int]:
    """How many last axes of the input and of the output are the features of a dense layer.

    Recorded as `[n * tokens, features]`, the arrays are those that XLA multiplies in the model, and
    no copy is made. 0 for other sites, for empty ones, and where the features are not last.
    """
    if site.kind != "dot" or 0 in (*site.input.shape, *site.output.shape):
        return 0, 0
    axes, ndim = _dot_axes(site), site.input.ndim
    if axes.x_batch or site.operand == 0:
        return 0, 0
    count = len(axes.x_contract)
    features_last = axes.x_contract == tuple(range(ndim - count, ndim))
    return count if features_last else 0, len(axes.w_free)


def is_canonical(site: Site) -> bool:
    """Whether the recorded arrays are in canonical order: those of an ordinary dense layer."""
    scale = 1.0 if site.view is None else site.view.scale
    plain = not (site.lengths or site.turned or any(site.cuts)) and scale == 1.0
    return plain and all(last_axes(site))


def has_patches(site: Site) -> bool:
    """Whether the canonical x is larger than the input: a kernel of more than one position."""
    return site.kind == "conv" and math.prod(_kernel(site)) > 1


def tiles(site: Site) -> bool:
    """Whether the patches of a convolution lie side by side: x is no larger in canonical form."""
    p = site.params
    if site.kind != "conv" or not set(p["rhs_dilation"]) <= {1}:
        return False
    return _kernel(site) == tuple(p["window_strides"])


def sums_as_convolution(sites: tuple[Site, ...]) -> bool:
    """Whether the weighted sum of a weight's gradients is one convolution, without patches."""
    return has_patches(sites[0]) and not any(s.lengths or s.kind != "conv" for s in sites)


def is_table(site: Site) -> bool:
    """Whether a leaf that is looked up is `[d, p]` but for its shape."""
    whole = tuple(site.params["table"]) == site.shape[sum(site.scanned) :]
    return whole and not any(site.cuts[0]) and keeps_order(site)


def conv_sum(site: Site, x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of an unscanned convolution's weight, summed over examples, in float32.

    Args:
        site: the convolution.
        x: inputs `[n, ...]`.
        g: output cotangents `[n, ...]`.

    Returns:
        The weight's gradient, without patches in memory.
    """
    p = site.params
    dims = p["dimension_numbers"]

    def merged(array: jax.Array, axis: int) -> jax.Array:
        shape = array.shape[1:]
        array = jnp.moveaxis(array.astype(jnp.float32), 0, axis)
        return array.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def conv(weight: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            merged(x, dims.lhs_spec[0]),
            weight,
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=dims,
            feature_group_count=p["feature_group_count"],
            precision=jax.lax.Precision.HIGHEST,  # on every device: see `arithmetic`
        )

    (gradient,) = jax.linear_transpose(conv, jax.ShapeDtypeStruct(site.shape, jnp.float32))(
        merged(g, dims.out_spec[0])
    )
    return gradient


# gather and dynamic_slice of rows: T lookups. d counts rows only for `restore`; nothing of that
# size is formed for an example. A row may be addressed along several axes of the table, and by the
# turn of a scan over a stack of tables.


def _embed_form(site: Site) -> Form:
    _, rows, inner = layout(site)
    indices = math.prod(site.lengths) * math.prod(site.input.shape[:-1])
    d, p = (math.prod(_sizes(site.shape, axes)) for axes in (rows, inner))
    return Form(1, indices, d, p, _recorded(site))


def _embed_canonical(site: Site, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    form, n, scans = _embed_form(site), x.shape[0], 1 + len(site.lengths)
    params, stacked = site.params, sum(site.scanned)
    dims = params.get("dimension_numbers")
    batching: tuple[tuple[int, int], ...] = ()
    if dims is None:  # dynamic_slice: one index per axis, and all axes are kept
        offset = tuple(range(len(params["slice_sizes"])))
        columns = {axis: axis for axis in offset}
    else:
        offset = dims.offset_dims
        batching = tuple(zip(dims.operand_batching_dims, dims.start_indices_batching_dims))
        columns = {axis: i for i, axis in enumerate(dims.start_index_map)}
    lead = [i for i in range(g.ndim) if i < scans or i - scans not in offset]
    # Axes of the slices that are rows have length 1, so that the others alone are left.
    g = g.transpose(*lead, *(scans + i for i in offset)).reshape(n, 1, form.T, form.p)

    def flat(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(array, x.shape[:-1]).reshape(n, 1, form.T, 1).astype(jnp.int32)

    def along(axis: int) -> jax.Array:
        """The number of each lookup along an axis of `x`."""
        return jnp.arange(x.shape[axis]).reshape(-1, *[1] * (x.ndim - 2 - axis))

    clips = params["mode"] == jax.lax.GatherScatterMode.CLIP
    start = site.view.start if site.view is not None else (0,) * len(site.shape)
    whole, inside = site.params["table"], jnp.ones((n, 1, form.T, 1), bool)
    found: list[jax.Array] = [flat(along(1 + i)) for i, s in enumerate(site.scanned) if s]
    rows = {stacked + i for i in params["row_axes"]}
    places = {axis: along(scans + place) for axis, place in batching}
    for axis, size in enumerate(whole):
        if axis in places:
            index = flat(places[axis])
        elif axis in columns:
            index = flat(x[..., columns[axis]])
        else:
            index = jnp.zeros_like(inside, jnp.int32)
        last = size - params["slice_sizes"][axis]
        if clips:
            index = jnp.clip(index, 0, last)
        else:
            # No other mode has a gradient for a row out of range.
            inside &= (index >= 0) & (index <= last)
        if stacked + axis in rows:
            first = start[stacked + axis]
            inside &= (index >= first) & (index < first + site.shape[stacked + axis])
            found.append(index - first)
    sizes = _sizes(site.shape, layout(site)[1])
    row = sum(index * math.prod(sizes[i + 1 :]) for i, index in enumerate(found))
    # Such a row becomes row 0 with a zero cotangent: left as it is, a negative one would be counted
    # from the end once more.
    return jnp.where(inside, row, 0).astype(jnp.int32), jnp.where(inside, g, 0)


_FORMS = {"dot": _dot_form, "conv": _conv_form, "embed": _embed_form}
_CANONICAL = {"dot": _dot_canonical, "conv": _conv_canonical, "embed": _embed_canonical}
