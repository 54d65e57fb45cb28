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

A row lookup is a product with one-hot rows; it is recorded as row numbers `[n, 1, T, 1]`.

Each kind has three functions: `form` gives the sizes, `canonical` reorders the recorded arrays, and
`restore` takes a canonical gradient `[B, d, p]` back to the shape of the weight. The order in which
`canonical` merges axes into B, d and p and the order in which `restore` splits them are the same
order, and that is all there is to check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.dp.engines.sites import Site

__all__ = ["KINDS", "Form", "Kind", "conv_sum", "has_patches"]


class Form(NamedTuple):
    """Sizes of a canonical form, per example; `recorded` numbers make it."""

    B: int
    T: int
    d: int
    p: int
    recorded: int


class Kind(NamedTuple):
    """What one kind of site means.

    Attributes:
        form: the canonical sizes of a site.
        canonical: the recorded input and cotangent, `[n, scans..., ...]` each, as x and g.
        restore: a canonical gradient `[B, d, p]` in the shape of the site's weight.
    """

    form: Callable[[Site], Form]
    canonical: Callable[[Site, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    restore: Callable[[Site, jax.Array], jax.Array]


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


def _dot_restore(site: Site, w: jax.Array) -> jax.Array:
    axes, stacked = _dot_axes(site), len(_scans(site)[0])
    order = [*range(stacked)]
    order += [stacked + i for i in (*axes.w_batch, *axes.w_contract, *axes.w_free)]
    return w.reshape(_sizes(site.shape, order)).transpose(np.argsort(order))


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
    if kernel == tuple(p["window_strides"]) and set(p["rhs_dilation"]) <= {1}:
        # Patches that tile x, as a ViT's do, are x in another order: no copy for each position.
        x = x[(slice(None), *(slice(o * k) for o, k in zip(out, kernel)))]
        x = x.reshape(m, *itertools.chain(*zip(out, kernel)), channels)
        spatial = range(1, x.ndim - 1)
        x = x.transpose(0, *spatial[::2], *spatial[1::2], x.ndim - 1)
        return x.reshape(m, *out, math.prod(kernel), channels)
    # Position k of the kernel sees, for all output positions at once, a strided slice of the input.
    steps = list(zip(out, p["window_strides"], p["rhs_dilation"]))
    slices = []
    for offset in itertools.product(*map(range, kernel)):
        start = [o * dilation for o, (_, _, dilation) in zip(offset, steps)]
        limit = [a + (size - 1) * stride + 1 for a, (size, stride, _) in zip(start, steps)]
        strides = [stride for _, stride, _ in steps]
        slices.append(jax.lax.slice(x, [0, *start, 0], [m, *limit, channels], [1, *strides, 1]))
    return jnp.stack(slices, axis=-2)


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


def has_patches(site: Site) -> bool:
    """Whether the canonical x is larger than the input: a kernel of more than one position."""
    return site.kind == "conv" and math.prod(_kernel(site)) > 1


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
            precision=jax.lax.Precision.HIGHEST,
        )

    (gradient,) = jax.linear_transpose(conv, jax.ShapeDtypeStruct(site.shape, jnp.float32))(
        merged(g, dims.out_spec[0])
    )
    return gradient


# gather of rows: T lookups. d counts rows only for `restore`; nothing of that size is formed for an
# example.


def _embed_form(site: Site) -> Form:
    rows = math.prod(site.lengths) * math.prod(site.input.shape[:-1])
    return Form(1, rows, site.shape[0], math.prod(site.shape[1:]), _recorded(site))


def _embed_canonical(site: Site, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    form, n, scans = _embed_form(site), x.shape[0], 1 + len(site.lengths)
    offset = [scans + i for i in site.params["dimension_numbers"].offset_dims]
    g = g.transpose(*(i for i in range(g.ndim) if i not in offset), *offset)
    g, rows = g.reshape(n, 1, form.T, form.p), x.reshape(n, 1, form.T, 1).astype(jnp.int32)
    if site.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        return jnp.clip(rows, 0, form.d - 1), g
    # No other mode has a gradient for a row out of range. Such a row becomes row 0 with a zero
    # cotangent: left as it is, a negative one would be counted from the end once more.
    inside = (rows >= 0) & (rows < form.d)
    return jnp.where(inside, rows, 0), jnp.where(inside, g, 0)


def _embed_restore(site: Site, w: jax.Array) -> jax.Array:
    return w.reshape(site.shape)


KINDS = {
    "dot": Kind(_dot_form, _dot_canonical, _dot_restore),
    "conv": Kind(_conv_form, _conv_canonical, _conv_restore),
    "embed": Kind(_embed_form, _embed_canonical, _embed_restore),
}
