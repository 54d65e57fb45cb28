"""One backward pass over a microbatch: losses, what is recorded of products, and direct gradients.

`record` says how it is kept. Of a weight that contains a product of two small ones, the inputs and
cotangents of both are computed here (see `factored`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpjax.dp.engines import forms, summation
from dpjax.dp.engines.held import Held
from dpjax.dp.engines.record import Record
from dpjax.dp.engines.sites import Key, Site
from dpjax.dp.engines.taps import evaluate, function_of_leaves
from dpjax.dp.engines.tracing import Traced

__all__ = ["backward", "constants_of"]

PyTree = Any


def backward(
    traced: Traced, held: Held, batch: PyTree
) -> tuple[jax.Array, Record, dict[int, jax.Array]]:
    """One backward pass: losses, what is recorded, and gradients of direct leaves."""

    depths = {site.equation: len(site.lengths) for site in traced.sites}
    places: dict[Key, tuple[int, int]] = {}

    def tapped(params: PyTree, example: PyTree, taps: Any, direct: dict[int, Any]) -> Any:
        args = [direct.get(i, leaf) for i, leaf in enumerate(jax.tree.leaves(params))]
        value, inputs = evaluate(traced, [*args, *jax.tree.leaves(example)], taps)
        # Those that several equations share once; by depth, which is where their examples' axis is.
        unique: dict[int, dict[int, jax.Array]] = {depth: {} for depth in depths.values()}
        for key, x in inputs.items():
            unique[depths[key]].setdefault(id(x), x)
        for key, x in inputs.items():
            places[key] = depths[key], list(unique[depths[key]]).index(id(x))
        return value, {depth: list(own.values()) for depth, own in unique.items()}

    direct_leaves = {i: held.leaf(i) for i in traced.direct}

    def one(example: PyTree) -> Any:
        taps = {key: jnp.zeros(v.shape, v.dtype) for key, v in traced.taps.items()}
        loss = functools.partial(held.at_use(tapped), example)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(taps, direct_leaves)

    axes = {key: depths.get(key, 0) for key in traced.taps}
    by_depth = {depth: depth for depth in depths.values()}
    (loss, inputs), (cotangents, direct) = jax.vmap(one, out_axes=((0, by_depth), (axes, 0)))(batch)
    arrays: list[jax.Array] = []
    layout: list[tuple[tuple[int, ...], int, int]] = []  # shape, axis and rows, see `Record`
    order: dict[Any, int] = {}
    pairs: dict[Key, tuple[int, int]] = {}
    for site in traced.sites:
        depth, place = places[site.equation]
        both: tuple[Any, Any] = ("input", depth, place), ("cotangent", site.equation)
        arrays_of = inputs[depth][place], cotangents[site.equation]
        if site.factor:
            both, arrays_of = _of_factor(traced, held, site, *arrays_of)
        for name, x, last in zip(both, arrays_of, forms.last_axes(site)):
            if name not in order:
                order[name] = len(arrays)
                shape = (*x.shape[:depth], *x.shape[depth + 1 :])
                split = len(shape) - last if last else depth
                layout.append((shape, depth, math.prod(shape[depth:split])))
                if last:
                    x = x.reshape(*shape[:depth], -1, math.prod(shape[split:]))
                arrays.append(x)
        pairs[site.key] = order[both[0]], order[both[1]]
    record = Record(
        dict(enumerate(arrays)),
        {place: cotangents[place].reshape(-1).astype(jnp.float32) for place in traced.scalars},
        tuple(pairs.items()),
        *zip(*layout) if layout else ((), (), ()),
    )
    return loss.astype(jnp.float32), record, {i: summation.flat(g) for i, g in direct.items()}


def _of_factor(
    traced: Traced, held: Held, site: Site, x: jax.Array, g: jax.Array
) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
    """Names, input and cotangent of one of two weights whose product an equation has.

    Args:
        traced: see `factored`.
        held: the parameters.
        site: one of both.
        x: the equation's input, `[n, ...]`.
        g: the cotangent of its output, likewise.
    """
    own, second = traced.factored[site.equation], bool(site.key[-1])
    which = own.near if second else 1 - own.near  # the other of both
    leaves = {i: held.leaf(i) for i in own.product.leaves}
    other = function_of_leaves(traced, own.product.place, which, leaves)
    x, g = own.moderate(x, g)
    computed = "factor", site.key
    if second:
        pair = jax.vmap(lambda x: own.first(x, other))(x), g
        return (computed, ("moderate g", site.equation)), pair
    like = jax.ShapeDtypeStruct(site.output.shape, site.output.dtype)
    return (("moderate x", site.equation), computed), (
        x,
        jax.vmap(lambda g: own.back(like, other, g))(g),
    )


def constants_of(traced: Traced, held: Held) -> dict[Key, dict[int, jax.Array]]:
    """By place of a scalar and by leaf, the scalar's gradient, the same for all examples."""

    def gradient(place: Key, own: dict[int, Any]) -> dict[int, jax.Array]:
        *key, operand = place

        def scalar(own: dict[int, Any]) -> jax.Array:
            return function_of_leaves(traced, tuple(key), -1 - operand, own).reshape(())

        return {i: g.astype(jnp.float32) for i, g in jax.grad(scalar)(own).items()}

    covered = {leaf for site in traced.sites for leaf in site.leaves}
    constants = {}
    for place, needs in traced.scalars.items():
        by_leaf = gradient(place, {i: held.leaf(i) for i in needs})
        constants[place] = {i: g for i, g in by_leaf.items() if i in covered}
    return constants
