"""Weights that contain a product of two smaller ones, such as merged LoRA: y = x (c + s a b).

With c constant, y is x c + s (x a) b, so that the gradients are products of tokens again: that of a
is x^T (s g b^T), that of b is (x a)^T (s g). Such a use of a weight is two sites, whose weights are
views of a and of b. The engine computes g b^T and x a once, for all examples, from what was
recorded (each token scaled by a power of two, so that they stay in range). Whatever rounding they
hold, the same numbers are measured and summed, and `products` bounds them as those of any other
site. (Hu et al. 2021, arXiv 2106.09685.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.sites import Key, Site, sites_of, source_of
from dpjax.dp.engines.views import View

__all__ = ["Factored", "Product", "follow_product", "split"]


class Product(NamedTuple):
    """A matrix that is a constant plus `scale` times a product of two views.

    Attributes:
        place: the equation of the product.
        views: of both operands, matrices without scans.
        contract: the axis of each that is added up.
        leaves: all that they are computed from.
        scale: constant factor.
    """

    place: Key
    views: tuple[View, View]
    contract: tuple[int, int]
    leaves: frozenset[int]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Factored:
    """An equation whose weight contains a product.

    Attributes:
        operand: position of the weight among the equation's operands.
        product: what is trained in the weight.
        near: which operand of the product meets the input first, 0 or 1.
        axis: the input's axis that is added up.
    """

    operand: int
    product: Product
    near: int
    axis: int

    def first(self, x: jax.Array, near: jax.Array) -> jax.Array:
        """The input times the first of both weights, with tokens in front."""
        free = 1 - self.product.contract[self.near]
        return _dot(x, near, self.axis, free)

    def second(self, x: jax.Array, far: jax.Array) -> jax.Array:
        """That times the other one: the equation's output but for the constant and the scale."""
        axis = self.product.contract[1 - self.near]
        if self.operand == 0:
            return _dot(far, x, axis, x.ndim - 1)
        return _dot(x, far, x.ndim - 1, axis)

    def moderate(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The input and the cotangent, `[n, ...]` each, such that neither x a nor g b^T is lost.

        Of a token at 1e30 whose cotangent is 1e-30, x^T g is an ordinary number, but x a may be
        infinite, or g b^T zero. Each token's input is divided by a power of two near its largest
        number, and its cotangent is multiplied by that: their product stays as it is.
        """
        largest = jnp.max(jnp.abs(x), self.axis + 1)
        exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
        exponent = jnp.clip(exponent, -126, 126)
        axis = 1 if self.operand == 0 else g.ndim - 1
        x = jnp.ldexp(x, -jnp.expand_dims(exponent, self.axis + 1))
        return x, jnp.ldexp(g, jnp.expand_dims(exponent, axis))

    def back(self, x: Any, far: jax.Array, cotangent: jax.Array) -> jax.Array:
        """The cotangent of `first`, from that of the equation's output."""
        (result,) = jax.linear_transpose(lambda x: self.second(x, far), x)(cotangent)
        return result


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)


def follow_product(eqn: core.JaxprEqn, key: Key, operands: Sequence[Any]) -> Product | None:
    """The product in the result of an equation of parameters alone.

    Args:
        eqn: the equation.
        key: its position.
        operands: what is known of each: its leaves, its views and its product, if it has one, and
            the leaves that are read for it.
    """
    name, avals = eqn.primitive.name, [v.aval for v in eqn.invars]
    if eqn.primitive is P.dot_general_p:
        (contract, batch) = eqn.params["dimension_numbers"]
        full = jnp.dtype(jnp.float32)
        matrices = all(aval.ndim == 2 and aval.dtype == full for aval in avals)  # type: ignore[attr-defined]
        if not matrices or batch[0] or len(contract[0]) != 1:
            return None
        if not all(len(o.views) == 1 and o.reads <= o.leaves for o in operands):
            return None
        pair = operands[0].views[0], operands[1].views[0]
        if any(view.shape != aval.shape for view, aval in zip(pair, avals)):  # type: ignore[attr-defined]
            return None
        leaves = operands[0].leaves | operands[1].leaves
        return Product(key, pair, (contract[0][0], contract[1][0]), leaves)
    own = [i for i, operand in enumerate(operands) if operand.leaves]
    if len(own) != 1 or len(eqn.outvars) != 1:
        return None
    (place,) = own  # all others are constant
    product: Product | None = operands[place].product
    if product is None or avals[place].shape != eqn.outvars[0].aval.shape:  # type: ignore[attr-defined]
        return None
    if name in ("copy", "sharding_constraint", "convert_element_type", "add", "add_any"):
        return product
    if name in ("neg", "sub"):
        return product._replace(
            scale=-product.scale if name == "neg" or place == 1 else product.scale
        )
    if name == "mul" or (name == "div" and place == 0):
        other = eqn.invars[1 - place]
        if isinstance(other, core.Literal) and jnp.ndim(other.val) == 0 and float(other.val):
            factor = float(other.val)
            return product._replace(scale=product.scale * (factor if name == "mul" else 1 / factor))
    return None


def split(
    eqn: core.JaxprEqn, operand: int, product: Product, key: Key
) -> tuple[Factored, list[Site]] | None:
    """The two sites that an equation is, if its weight contains a product that is small enough.

    Args:
        eqn: the equation.
        operand: position of the weight among its operands.
        product: what is trained in the weight.
        key: position of the equation; the sites have 0 and 1 behind it.
    """
    if eqn.primitive is not P.dot_general_p or not 1e-6 < abs(product.scale) < 1e6:
        return None
    contract, batch = eqn.params["dimension_numbers"]
    dtypes = {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}  # type: ignore[attr-defined]
    if batch[0] or len(contract[0]) != 1 or dtypes != {jnp.dtype(jnp.float32)}:
        return None
    (axis,) = contract[operand]
    near = axis  # the product's first operand has the rows of the weight, its second the columns
    shapes = [view.shape for view in product.views]
    rank = shapes[0][product.contract[0]]
    rows, columns = (shape[1 - c] for shape, c in zip(shapes, product.contract))
    if 2 * rank * (rows + columns) > rows * columns:
        return None
    factored = Factored(operand, product, near, contract[1 - operand][0])
    x: Any = eqn.invars[1 - operand].aval
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def applied(x: jax.Array, near: jax.Array, far: jax.Array) -> jax.Array:
        return factored.second(factored.first(x, near), far)

    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    jaxpr = jax.make_jaxpr(applied)(x, weights[near], weights[1 - near]).jaxpr
    sites: list[Site] = []
    for i, (place, which) in enumerate(((1, near), (operand, 1 - near))):
        view = product.views[which]
        view = view._replace(scale=view.scale * product.scale)
        own = frozenset([view.leaf])
        sites += sites_of(jaxpr.eqns[i], place, (view,), own, (*key, i), ())
    if len(sites) != 2:
        return None
    source = source_of(eqn)
    return factored, [dataclasses.replace(site, factor=True, source=source) for site in sites]
