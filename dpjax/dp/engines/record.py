"""What one backward pass leaves behind: inputs of products and cotangents of their outputs.

A record is a pytree of arrays as the model computed them; it knows which axis of each counts the
examples, so that some examples can be taken out, or one be cleared, without a copy of the others.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.sites import Key, Weight

__all__ = ["Record"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays", "scalars"),
    meta_fields=("places", "shapes", "axes", "rows"),
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
    """

    arrays: dict[int, jax.Array]
    scalars: dict[Key, jax.Array]
    places: tuple[tuple[Key, tuple[int, int]], ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]
    rows: tuple[int, ...]

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
        return int(array.shape[self.axes[i]]) // self.rows[i]

    def take(self, first: jax.Array, count: int) -> Record:
        """The part of a few examples."""
        starts = {rows: first * rows for rows in {1, *self.rows}}

        def part(array: jax.Array, rows: int = 1, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, starts[rows], count * rows, axis)

        arrays = {i: part(x, self.rows[i], self.axes[i]) for i, x in self.arrays.items()}
        scalars = {k: part(scalar) for k, scalar in self.scalars.items()}
        return dataclasses.replace(self, arrays=arrays, scalars=scalars)

    def without(self, row: jax.Array) -> dict[int, jax.Array]:
        """The arrays, with zeros for one example."""
        starts = {rows: row * rows for rows in set(self.rows)}

        def cleared(array: jax.Array, rows: int, axis: int) -> jax.Array:
            shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
            zeros = jnp.zeros(shape, array.dtype)
            return jax.lax.dynamic_update_slice_in_dim(array, zeros, starts[rows], axis)

        return {i: cleared(x, self.rows[i], self.axes[i]) for i, x in self.arrays.items()}

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
