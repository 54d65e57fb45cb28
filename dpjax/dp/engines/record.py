"""What one backward pass leaves behind: inputs of products and cotangents of their outputs.

A record is a pytree of arrays as the model computed them; it knows which axis of each counts the
examples, so that some examples can be taken out, or one be cleared, without a copy of the others.

On a mesh, each device has its share of the examples. To slice some neighbors out, or to write over
one, would bring all arrays to all devices; there, examples are taken out that are as far apart as
they can be, some of every device, and one is taken out or cleared by a mask.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.sites import Key, Weight

__all__ = ["Record", "in_order", "taken", "zeroed"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays", "scalars"),
    meta_fields=("places", "shapes", "axes", "rows", "devices"),
)
@dataclasses.dataclass(frozen=True)
class Record:
    """What one backward pass leaves behind.

    Attributes:
        arrays: inputs of equations and cotangents of their outputs, `[scans..., n, ...]` each, or
            those of a dense layer as `[scans..., n * tokens, features]`, see `forms.last_axes`: as
            the model computes them, so that XLA makes no copy. An input that several equations
            share is there once.
        scalars: by place, the cotangent of a scalar `[n]`.
        places: for each equation, its input and its cotangent among the arrays.
        shapes: of each array, without the axis of examples.
        axes: of each array, the axis of examples.
        rows: how many rows along that axis belong to an example.
        devices: how many devices the examples may be divided among.
    """

    arrays: dict[int, jax.Array]
    scalars: dict[Key, jax.Array]
    places: tuple[tuple[Key, tuple[int, int]], ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]
    rows: tuple[int, ...]
    devices: int = 1

    def of(self, weights: tuple[Weight, ...], own_scalars: list[Key]) -> Record:
        """The part that belongs to some weights."""
        keys = {site.key for sites in weights for site in sites}
        places = tuple(item for item in self.places if item[0] in keys)
        arrays = {i: self.arrays[i] for _, pair in places for i in pair}
        scalars = {k: self.scalars[k] for k in own_scalars}
        return dataclasses.replace(self, arrays=arrays, scalars=scalars, places=places)

    @property
    def size(self) -> int:
        """The number of examples."""
        i, array = next(iter(self.arrays.items()))
        size: int = array.shape[self.axes[i]] // self.rows[i]
        return size

    def take(self, part: jax.Array, count: int) -> Record:
        """A part of `count` examples, see `taken`."""
        arrays = {
            i: taken(x, part, count, self.devices, self.rows[i], self.axes[i])
            for i, x in self.arrays.items()
        }
        scalars = {k: taken(x, part, count, self.devices) for k, x in self.scalars.items()}
        return dataclasses.replace(self, arrays=arrays, scalars=scalars)

    def without(self, row: jax.Array) -> dict[int, jax.Array]:
        """The arrays, with zeros for one example."""
        return {
            i: zeroed(x, row, self.devices, self.rows[i], self.axes[i])
            for i, x in self.arrays.items()
        }

    def pairs(self, sites: Weight) -> list[tuple[jax.Array, jax.Array]]:
        """The input and the cotangent of each site, as far as they belong to it."""
        places = dict(self.places)

        def array(i: int) -> jax.Array:
            x, shape, axis = self.arrays[i], self.shapes[i], self.axes[i]
            n = x.shape[axis] // self.rows[i]
            return jnp.moveaxis(x.reshape(*shape[:axis], n, *shape[axis:]), axis, 0)

        return [forms.part_of(site, *map(array, places[site.key])) for site in sites]

    def tokens(self, sites: Weight) -> Tokens:
        """The canonical arrays of one weight."""
        if len(sites) == 1 and forms.is_canonical(sites[0]):
            form, places = forms.form_of(sites), dict(self.places)[sites[0].key]
            x, g = (self.arrays[i] for i in places)
            x, g = (a.reshape(-1, form.B, form.T, size) for a, size in ((x, form.d), (g, form.p)))
            return Tokens(x, g, d=form.d)
        return forms.tokens(sites, self.pairs(sites))


def taken(
    array: jax.Array, part: jax.Array, count: int, devices: int, rows: int = 1, axis: int = 0
) -> jax.Array:
    """What belongs to a part of the examples: `count` neighbors, or on a mesh every so many.

    Args:
        array: `[..., n * rows, ...]`.
        part: which one, below n // count; unsigned.
        count: a divisor of n.
        devices: see `Record`.
        rows: of each example.
        axis: of the examples.
    """
    if devices == 1:
        return jax.lax.dynamic_slice_in_dim(array, part * (count * rows), count * rows, axis)
    before, (n, *after) = array.shape[:axis], array.shape[axis:]
    parts = n // (count * rows)
    cut = array.reshape(*before, count, parts, rows, *after)
    if count == 1:
        # Exact: what is added to the example's numbers are zeros.
        own = _is_row(part, parts, (*before, 1, parts, rows, *after), axis + 1)
        chosen = jnp.sum(jnp.where(own, cut, jnp.zeros_like(cut)), axis + 1, dtype=array.dtype)
    else:
        chosen = jax.lax.dynamic_index_in_dim(cut, part, axis + 1, keepdims=False)
    return chosen.reshape(*before, count * rows, *after)


def in_order(results: jax.Array, devices: int) -> jax.Array:
    """Results `[parts, count, ...]` of all parts that were `taken`, as `[n, ...]`."""
    results = results if devices == 1 else jnp.swapaxes(results, 0, 1)
    return results.reshape(-1, *results.shape[2:])


def zeroed(
    array: jax.Array,
    row: jax.Array,
    devices: int,
    rows: int = 1,
    axis: int = 0,
    unless: jax.typing.ArrayLike = False,
) -> jax.Array:
    """The array with zeros for one example, unless a scalar says no; the rest is as in `taken`."""
    if devices == 1:
        zeros = jnp.zeros((*array.shape[:axis], rows, *array.shape[axis + 1 :]), array.dtype)
        if unless is not False:
            own = jax.lax.dynamic_slice_in_dim(array, row * rows, rows, axis)
            zeros = jnp.where(unless, own, zeros)
        return jax.lax.dynamic_update_slice_in_dim(array, zeros, row * rows, axis)
    before, (n, *after) = array.shape[:axis], array.shape[axis:]
    cut = array.reshape(*before, n // rows, rows, *after)
    own = _is_row(row, n // rows, cut.shape, axis)
    return jnp.where(own & jnp.logical_not(unless), jnp.zeros_like(cut), cut).reshape(array.shape)


def _is_row(row: jax.Array, n: int, shape: tuple[int, ...], axis: int) -> jax.Array:
    rows = jnp.arange(n, dtype=jnp.uint32) == row
    return jax.lax.broadcast_in_dim(rows, shape, (axis,))
