"""Weights that are functions of a leaf number by number: masked, softplus(w), tanh(w) * sigmoid(m).

Where G is the gradient of such a weight, that of the leaf is J * G, number by number, in the
leaf's order; J, the slopes, is one array for all examples. Of several leaves, each has its own.
So the sum over examples is J times one product, and no gradient is formed for it. (A penalty on the
leaf adds one array for all examples; the inner product of J * x^T g and R is that of x^T g and
J * R, see `products`.) For the norm of x^T g,

    |J * x^T g|^2 = sum_st (x_s * x_t)^T J^2 (g_s * g_t),

one product for each pair of tokens (s, t): where they are few, as in a layer that is applied once,
that takes much less time than to form the gradient.

**What this is off by**, in terms of `products`. Let m_t = |J * x_t g_t^T|, which the pair (t, t)
gives. By Cauchy and Schwarz a pair's sum of absolute values is at most m_s m_t, so `error` is a few
units more than those of the product, times (sum_t m_t)^2. `mass` = sum_t m_t bounds the partial
sums of J * x^T g, and `spread` is r(T) u times that. Where the gradient is formed, the largest
slopes of each row and of each column bound m_t. Underflow loses at most `TINY` for each product,
times what it is multiplied with. A slope may be so small that the product overflows before the two
meet; `peak` contains the mass of x^T g for that reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from dpjax.dp.engines import forms, products, summation
from dpjax.dp.engines.arithmetic import root
from dpjax.dp.engines.forms import Tokens
from dpjax.dp.engines.jaxprs import inlined
from dpjax.dp.engines.sites import Weight
from dpjax.dp.engines.taps import weight_of_leaves
from dpjax.dp.engines.tracing import Traced
from dpjax.dp.engines.views import View, follow, is_float

__all__ = ["Entries", "Slopes", "entries_of", "measure", "temporary"]

_PAIRED = 9  # tokens, of which all pairs take less time than the gradient; see `products.cheapest`
# The largest slope that is sound; else examples are taken one by one. What underflow loses is
# multiplied with it, and must stay far below `clipping.SMALLEST_NORM`.
_SMALL, _LARGE = 2.0**-30, 2.0**10
_ROOM = 2.0**20  # examples that may add up before their product meets the slopes

Views = tuple[View, ...]


class Slopes(NamedTuple):
    """The slopes J at some parameters, as `size` times `own`.

    Attributes:
        own: `[B, d, p]`, none above 1 in size if they are sound.
        size: the largest of J in size, 1 if that is 0 or not sound.
        sound: whether sums may be multiplied with J.
    """

    own: jax.Array
    size: jax.Array
    sound: jax.Array


@dataclasses.dataclass(frozen=True)
class Entries:
    """A weight as a function of one of its leaves, number by number.

    Attributes:
        sites: its uses, with the view of the leaf that the weight would be without the function.
        leaf: the leaf.
        leaves: all that the weight is computed from.
        jaxpr: the weight as a function of the leaves, in this order.
    """

    sites: Weight
    leaf: int
    leaves: tuple[int, ...]
    jaxpr: core.ClosedJaxpr

    def at(self, leaves: dict[int, jax.Array]) -> Slopes:
        """The slopes at some values of the leaves.

        From the back, as the gradient has them: where the function has no finite derivative, also
        at a number of the leaf that is not used in the end, all of them count as not sound.
        """
        value, vjp = jax.vjp(_weight(self.jaxpr, self.leaves, self.leaf, leaves), leaves[self.leaf])
        (slopes,) = vjp(jnp.ones_like(value))
        form = forms.form_of(self.sites)
        shape = jax.ShapeDtypeStruct((form.B, form.d, form.p), slopes.dtype)
        (own,) = jax.linear_transpose(self.of_leaf, shape)(slopes.reshape(-1))
        own = own.astype(jnp.float32)
        size = jnp.max(jnp.abs(own), initial=0.0)
        sound = (size == 0) | ((size >= _SMALL) & (size <= _LARGE))
        finite = jnp.all(jnp.isfinite(slopes))
        own, sound = jnp.where(finite, own, jnp.nan), sound & finite
        size = jnp.where(sound & (size > 0), size, 1.0)
        return Slopes(own / size, size, sound)

    def of_leaf(self, gradient: jax.Array) -> jax.Array:
        """A gradient `[B, d, p]` in the order of the leaf, flat."""
        site = self.sites[0]
        return site.view_of_leaf.pull(forms.restore(site, gradient)).reshape(-1)


def _weight(
    jaxpr: core.ClosedJaxpr, order: tuple[int, ...], leaf: int, leaves: dict[int, Any]
) -> Callable[[jax.Array], jax.Array]:
    """A weight as a function of one of its leaves, at some values of the others."""

    def weight(own: jax.Array) -> Any:
        (value,) = core.jaxpr_as_fun(jaxpr)(*[own if i == leaf else leaves[i] for i in order])
        return value

    return weight


def measure(t: Tokens, slopes: Slopes) -> tuple[products.Measure, jax.Array]:
    """Of the gradients J * x_i^T g_i, and the mass `[n]` of x_i^T g_i.

    Args:
        t: inputs and cotangents of the weight.
        slopes: J.
    """
    x, g = t.x.astype(jnp.float32), t.g.astype(jnp.float32)
    x_squares, g_squares = products.token_squares(t)
    if t.tokens <= _PAIRED:
        square, error, lengths = _paired(x, g, jnp.square(slopes.own))
        square, error = (slopes.size * slopes.size * part for part in (square, error))
        rounding = products.rounding_of(t, times=1)
    else:
        # At their full size, as vmap has it: squares of smaller numbers may be lost.
        gradients = (slopes.size * slopes.own)[None] * summation.materialize(t)
        square = products.kept_square(summation.flat(gradients))
        error = jnp.zeros_like(square)
        # The least of what the largest slopes of each row and of each column say. (Of the patches
        # of a convolution, to add up squares times slopes took XLA a third of a step.)
        largest = jnp.abs(slopes.own)
        of_rows = jnp.sum(jnp.square(x * jnp.max(largest, 2)[None, :, None]), 3)
        of_columns = jnp.sum(jnp.square(g * jnp.max(largest, 1)[None, :, None]), 3)
        lengths = jnp.minimum(
            products.length(of_rows, t.d) * products.length(g_squares, t.p),
            products.length(x_squares, t.d) * products.length(of_columns, t.p),
        )
        rounding = products.rounding_of(t, times=2)
    size, mass = slopes.size, root(_total(lengths))
    raw = products.length(x_squares, t.d) * products.length(g_squares, t.p)
    whole = jnp.sum(raw, (1, 2))
    peak = products.peak(jnp.sum(x_squares, 2), jnp.sum(g_squares, 2))
    found = products.Measure(
        square=square,
        error=error,
        spread=(rounding + 4 * products.UNIT) * size * mass,
        mass=size * mass,
        peak=jnp.maximum(peak, _ROOM * whole),
    )
    return found, whole


def _paired(
    x: jax.Array, g: jax.Array, squares: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The square `[n]` and its error, and m_t `[n, B, T]`, from pairs of tokens.

    Args:
        x: inputs.
        g: cotangents.
        squares: of the slopes.
    """
    d, p = squares.shape[1:]
    pairs = list(itertools.combinations_with_replacement(range(x.shape[2]), 2))
    one, other = (np.array(places) for places in zip(*pairs))
    inputs, cotangents = (a[:, :, one] * a[:, :, other] for a in (x, g))
    sums = jnp.sum(summation.applied(inputs, squares) * cotangents, 3)  # [n, B, pairs]
    times = np.where(one == other, 1.0, 2.0).astype(np.float32)
    square = jnp.maximum(jnp.sum(sums * times[None, None], (1, 2)), 0.0)
    # What underflow loses of a pair: of inputs and slopes, of cotangents, of the slopes' squares,
    # of the last product.
    x_squares, g_squares = (jnp.sum(jnp.square(a), 3) for a in (x, g))
    lost = products.TINY * (2 * d * g_squares + 2 * p * x_squares + x_squares * g_squares + p)
    own = jnp.maximum(sums[:, :, one == other], 0.0)
    units = summation.chain(d) + products.REDUCTION + 16
    error = units * products.UNIT * _total(root(own + lost)) + _total(root(lost))
    return square, error, root(own + lost)


def _total(lengths: jax.Array) -> jax.Array:
    """Over all pairs of tokens, the products of lengths `[n, B, T]`; the parts B are orthogonal."""
    return jnp.sum(jnp.square(jnp.sum(lengths, 2)), 1)


def temporary(entries: Entries) -> int:
    """Numbers that measuring one example takes."""
    form = forms.form_of(entries.sites)
    patches = form.T * form.d if any(map(forms.has_patches, entries.sites)) else 0
    pairs = form.T * (form.T + 1) // 2
    own = pairs * (form.d + 2 * form.p) if form.T <= _PAIRED else form.d * form.p
    return form.B * (patches + own)


def entries_of(traced: Traced, sites: Weight, shapes: Sequence[Any]) -> tuple[Entries, ...]:
    """The weight as a function of each of its leaves number by number; none if it is not one.

    Args:
        traced: the jaxpr and its sites.
        sites: the uses of a derived weight.
        shapes: of all leaves, arrays or abstract values.
    """
    site = sites[0]
    if site.view is not None or any(s.kind == "embed" or any(s.scanned) for s in sites):
        return ()
    own, jaxpr = weight_of_leaves(traced, site, shapes)
    leaves = tuple(own)
    found = []
    for leaf in leaves:
        view = _view(jaxpr, leaves, leaf, own)
        if view is None or view.shape != site.shape or any(view.start):
            return ()
        view = view._replace(limit=site.limit, scale=1.0)
        uses = tuple(dataclasses.replace(s, view=view) for s in sites)
        found.append(Entries(uses, leaf, leaves, jaxpr))
    return tuple(found)


def _view(
    jaxpr: core.ClosedJaxpr, order: tuple[int, ...], leaf: int, own: dict[int, Any]
) -> View | None:
    """The view of a leaf that a weight is but for factors of single numbers, if it is one."""

    def derivative(tangent: jax.Array, leaves: dict[int, jax.Array]) -> Any:
        function = _weight(jaxpr, order, leaf, leaves)
        return jax.jvp(function, (leaves[leaf],), (tangent,))[1]

    closed = jax.make_jaxpr(derivative)(own[leaf], own)
    linear, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
    shape = tuple(own[leaf].shape)
    start = View(leaf, shape, (0,) * len(shape))
    views = _followed(linear, [(start,), *[()] * (len(linear.invars) - 1)])
    return None if views is None or len(views[0]) != 1 else views[0][0]


def _followed(jaxpr: core.Jaxpr, operands: Sequence[Views]) -> list[Views] | None:
    """The views of the outputs of a linear function; None if one number feeds several, or adds."""
    env: dict[Any, Views] = dict(zip(jaxpr.invars, operands))

    def read(atom: Any) -> Views:
        return () if isinstance(atom, core.Literal) else env.get(atom, ())

    for eqn in jaxpr.eqns:
        views, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        own = [v for v in views if v]
        inner = inlined(eqn)
        outs: Sequence[Sequence[View]] | None
        avals: list[Any] = [v.aval for v in eqn.outvars]
        sources: list[Any] = [a.aval for a, v in zip(eqn.invars, views) if v]
        one_by_one = all(source.shape == avals[0].shape for source in sources)
        if not own:
            outs = [()] * len(eqn.outvars)
        elif inner is not None:
            outs = _followed(inner[0], views)
        elif not all(is_float(v) and jnp.finfo(v.dtype).bits >= 32 for v in avals):
            outs = None  # a rule of its own that has few bits
        elif name in ("add", "add_any", "sub", "select_n") and all(v == own[0] for v in own):
            outs = [own[0]] if one_by_one and not (name == "select_n" and views[0]) else None
        elif name in ("mul", "div", "neg"):
            one_by_one &= len(own) == 1 and bool(views[0] or name == "mul")
            outs = [own[0]] if one_by_one else None
        else:
            outs = follow(eqn, views)
        if outs is None:
            return None
        env.update(zip(eqn.outvars, map(tuple, outs)))
    return [read(atom) for atom in jaxpr.outvars]
