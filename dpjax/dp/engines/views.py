"""Parts of values that are parts of parameters: the algebra of views.

Ghost clipping needs the norm of a gradient, and the sum of many, in the place where a weight is
used. A leaf of the parameters is seldom used as it is: a model transposes a kernel, cuts the heads
out of it, joins it to another, casts it, scales it by 1 / sqrt(d). All these *move* numbers and
multiply them by a constant. The gradient of the result is then the leaf's own gradient in another
order, so that

- norms need no way back: the norm in the place of use, times the constant, is the leaf's norm;
- the way back of a sum is one transposition, padding or reshape (`View.pull`), done once;
- two uses of one leaf can be compared: `View.factors` says where in the flat leaf each number of a
  view stands, so that uses with equal places add up as one product with more tokens, and uses of
  disjoint parts (`View.box`) have orthogonal gradients, whose squared norms add up.

A value can consist of several views, as the joined kernel does of one per leaf, and what is no
view's part in it is constant. `follow` takes the views of an equation's operands to those of its
results, as far as it is of that kind: anything else (`sin(w)`, `w - mean(w)`, a broadcast that
repeats numbers) mixes gradients and makes no view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

__all__ = [
    "Factors",
    "Step",
    "View",
    "can_multiply",
    "follow",
    "is_float",
    "is_full",
    "limit_of",
    "split",
    "strides",
]

Factors = list[tuple[int, int]]  # sizes and strides, outermost first

_SAME = ("copy", "name", "sharding_constraint", "optimization_barrier")  # `name` is for remat


class Step(NamedTuple):
    """One step from a leaf to a view of it: a permutation, a slice, or a reshape if neither.

    Attributes:
        shape: shape before the step.
        perm: permutation of the axes.
        window: start and stride of each axis.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...] | None = None
    window: tuple[tuple[int, int], ...] | None = None


class View(NamedTuple):
    """A part of a value that is a part of a leaf, in another order and times a constant.

    Attributes:
        leaf: index of the leaf.
        shape: shape of the part, leading scanned axes included.
        start: where it starts in the value, per axis of `shape`.
        steps: how it was made from the leaf.
        scale: constant factor; the engine multiplies the recorded cotangents by it.
        limit: largest number of the narrowest float that the value passed through.
        scanned: for every enclosing scan, whether the value is a slice of a stack (else shared).
    """

    leaf: int
    shape: tuple[int, ...]
    start: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    scale: float = 1.0
    limit: float = math.inf
    scanned: tuple[bool, ...] = ()

    def after(self, step: Step, shape: Sequence[int], start: Sequence[int]) -> View:
        """The view after one more step, of another shape and place in the value."""
        return self._replace(steps=(*self.steps, step), shape=tuple(shape), start=tuple(start))

    def pull(self, cotangent: jax.Array) -> jax.Array:
        """Maps a cotangent of the part, scanned axes first and scaled, to one of the leaf."""
        for shape, perm, window in reversed(self.steps):
            if perm is not None:
                cotangent = cotangent.transpose(sorted(range(len(perm)), key=perm.__getitem__))
            elif window is not None:
                padding = [
                    (first, size - first - (count - 1) * stride - 1, stride - 1)
                    for size, count, (first, stride) in zip(shape, cotangent.shape, window)
                ]
                cotangent = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), padding)
            else:
                cotangent = cotangent.reshape(shape)
        return cotangent

    def factors(self) -> tuple[int, list[Factors]] | None:
        """Where the view's numbers stand in the flat leaf.

        Returns:
            The offset, and each axis as factors of it (outermost first) with their strides; no
            factor spans two axes of the leaf. None if an axis has no such factors.
        """
        shapes = [*(step.shape for step in self.steps), self.shape]
        axes: list[Factors] = [
            [(size, stride)] if size > 1 else []
            for size, stride in zip(shapes[0], strides(shapes[0]))
        ]
        offset = 0
        for (before, perm, window), after in zip(self.steps, shapes[1:]):
            if perm is not None:
                axes = [axes[i] for i in perm]
            elif window is not None:
                for i, (first, stride) in enumerate(window):
                    if (first, stride, after[i]) == (0, 1, before[i]):
                        continue
                    if len(axes[i]) != 1:
                        return None
                    step = axes[i][0][1]
                    offset += first * step
                    axes[i] = [(after[i], step * stride)] if after[i] > 1 else []
            else:
                found = split(list(itertools.chain(*axes)), after)
                if found is None:
                    return None
                axes = found
        return offset, axes

    def box(self) -> list[tuple[int, int]]:
        """First and last index of the view along each axis of the leaf."""
        shape = self.steps[0].shape if self.steps else self.shape
        found = self.factors()
        if found is None:
            return [(0, size - 1) for size in shape]
        offset, axes = found
        box = []
        for size, stride in zip(shape, strides(shape)):
            first = last = offset // stride % size
            for count, step in itertools.chain(*axes):
                if stride <= step < stride * size:
                    last += (count - 1) * (step // stride)
            box.append((first, last))
        return box


def strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def split(factors: Factors, shape: Sequence[int]) -> list[Factors] | None:
    """Distributes factors over axes of the given sizes; None if they do not fit."""
    rest, axes = factors[::-1], []
    for size in shape:
        axis: Factors = []
        while size > 1:
            if not rest:
                return None
            count, stride = rest.pop()
            if size % count == 0:
                axis.append((count, stride))
                size //= count
            elif count % size == 0:
                axis.append((size, stride * (count // size)))
                rest.append((count // size, stride))
                size = 1
            else:
                return None
        axes.append(axis)
    return None if rest else axes


def follow(eqn: core.JaxprEqn, operands: Sequence[tuple[View, ...]]) -> list[list[View]] | None:
    """The views of each output of an equation that does not depend on the example.

    Args:
        eqn: the equation.
        operands: the views of each operand; none of a constant.

    Returns:
        The views of each output; an output without any is a constant, such as a slice between two
        views. None if the equation makes no views.
    """
    name, params = eqn.primitive.name, eqn.params
    outs: list[Any] = [v.aval for v in eqn.outvars]
    sources: list[Any] = [v.aval for v in eqn.invars]
    if not all(map(is_float, outs)):
        return None
    own = [i for i, views in enumerate(operands) if views]
    views = [list(own) for own in operands]
    if name == "optimization_barrier":
        return views
    if len(outs) != 1 and name != "split":
        return None
    (out, *_), first = outs, own[0]

    def scaled(by: float) -> list[list[View]] | None:
        scaled = [view._replace(scale=view.scale * by) for view in views[first]]
        # Others leave the range in which a cotangent can be scaled without losing it.
        return [scaled] if all(1e-18 < abs(view.scale) < 1e18 for view in scaled) else None

    def moved(view: View, axis: int, by: int) -> View:
        """A view of a part that stands `by` further along `axis` of the equation's values."""
        axis += len(view.start) - sources[first].ndim
        return view._replace(
            start=tuple(s + by if i == axis else s for i, s in enumerate(view.start))
        )

    if name in _SAME:
        return [views[0]]
    if name == "convert_element_type":
        return [[view._replace(limit=min(view.limit, limit_of(out))) for view in views[0]]]
    if name == "neg":
        return scaled(-1.0)
    if name in ("add", "add_any", "sub"):
        if any(sources[i].shape != out.shape for i in own):
            return None
        signs = (1.0, -1.0 if name == "sub" else 1.0)
        return [[v._replace(scale=v.scale * signs[i]) for i in own for v in views[i]]]
    if name == "mul" or (name == "div" and own == [0]):
        other = eqn.invars[1 - first]
        if len(own) == 1 and isinstance(other, core.Literal) and jnp.ndim(other.val) == 0:
            factor = float(other.val)
            return scaled(factor if name == "mul" else 1 / (factor or np.nan))
        return None
    if name in ("concatenate", "stack"):
        axis = params["dimension" if name == "concatenate" else "axis"]
        if name == "stack":
            views = [[_inserted(view, axis, sources[i].ndim) for view in views[i]] for i in own]
            starts = own
        else:
            sizes = [s.shape[axis] for s in sources]
            starts = [sum(sizes[:i]) for i in own]
            views = [views[i] for i in own]
        ndim = out.ndim
        return [[
            v._replace(start=tuple(
                s + (by if i == axis + len(v.start) - ndim else 0) for i, s in enumerate(v.start)
            ))
            for vs, by in zip(views, starts) for v in vs
        ]]  # fmt: skip
    if len(own) != 1 or first != 0:
        return None
    if name == "split":
        stops = list(itertools.accumulate(params["sizes"]))
        ends = [(stop - size, stop) for stop, size in zip(stops, params["sizes"])]
        axis, sliced = params["axis"], []
        for start, stop in ends:
            window = [(0, n, 1) for n in sources[0].shape]
            window[axis] = (int(start), int(stop), 1)
            sliced.append([w for v in views[0] for w in _sliced(v, window)])
        return sliced
    if name == "slice":
        strides = params["strides"] or (1,) * out.ndim
        window = list(zip(params["start_indices"], params["limit_indices"], strides))
        return [[w for v in views[0] for w in _sliced(v, window)]]
    if name == "pad":
        low, _, inner = zip(*params["padding_config"])
        if any(inner) or min(low) < 0 or any(s + l > o for s, l, o in zip(
                sources[0].shape, low, out.shape)):  # fmt: skip
            return None
        padded = views[0]
        for axis, by in enumerate(low):
            padded = [moved(v, axis, by) for v in padded]
        return [padded]
    if name == "transpose":
        return [[_transposed(view, params["permutation"]) for view in views[0]]]
    reshapes = name in ("squeeze", "broadcast_in_dim", "expand_dims")
    reshapes |= name == "reshape" and params["dimensions"] is None
    # A broadcast that repeats numbers is no reshape: its gradient is a sum over the copies.
    if reshapes and math.prod(out.shape) == math.prod(sources[0].shape):
        found = [_reshaped(view, sources[0].shape, out.shape) for view in views[0]]
        return None if None in found else [found]  # type: ignore[list-item]
    return None


def _stack(view: View, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and start along the scanned axes, which the equation's values lack: they are kept."""
    count = len(view.shape) - ndim
    return view.shape[:count], view.start[:count]


def _transposed(view: View, permutation: Sequence[int]) -> View:
    count = len(view.shape) - len(permutation)
    perm = (*range(count), *(count + p for p in permutation))
    shape, start = ([values[i] for i in perm] for values in (view.shape, view.start))
    return view.after(Step(view.shape, perm=perm), shape, start)


def _inserted(view: View, axis: int, ndim: int) -> View:
    """A view of a value with one more axis of length 1."""
    axis += len(view.shape) - ndim
    shape, start = ((*v[:axis], x, *v[axis:]) for v, x in ((view.shape, 1), (view.start, 0)))
    return view.after(Step(view.shape), shape, start)


def _sliced(view: View, window: Sequence[tuple[int, int, int]]) -> list[View]:
    """The part of a view inside a slice, given as start, limit and stride per axis, if any."""
    shape, start = map(list, _stack(view, len(window)))
    steps = [(0, 1)] * len(shape)
    for size, begin, (first, limit, stride) in zip(
        view.shape[len(steps) :], view.start[len(shape) :], window
    ):
        # Positions first + k * stride of the value that lie in begin ... begin + size - 1.
        low = max(0, -(-(begin - first) // stride))
        high = (min(limit, begin + size) - 1 - first) // stride
        if high < low:
            return []
        steps.append((first + low * stride - begin, stride))
        shape.append(high - low + 1)
        start.append(low)
    return [view.after(Step(view.shape, window=tuple(steps)), shape, start)]


def _reshaped(view: View, before: Sequence[int], after: Sequence[int]) -> View | None:
    """A view of a reshaped value; None if the part would not be a part any more."""
    shape, start = map(list, _stack(view, len(before)))
    count = len(shape)
    own = [t for t in zip(before, view.shape[count:], view.start[count:]) if t[0] != 1]
    rest = [size for size in after if size != 1]
    places: list[tuple[int, int]] = []
    while own:
        # The smallest numbers of axes, before and after, that hold the same numbers.
        block, sizes = [own.pop(0)], [rest.pop(0)]
        while (lack := math.prod(n for n, _, _ in block) - math.prod(sizes)) != 0:
            block += [own.pop(0)] if lack < 0 else []
            sizes += [rest.pop(0)] if lack > 0 else []
        # The part as a range of the block's flat numbers.
        partial = [i for i, (n, m, _) in enumerate(block) if n != m]
        if partial and any(m != 1 for _, m, _ in block[: partial[-1]]):
            return None
        low = sum(s * by for (_, _, s), by in zip(block, strides([n for n, _, _ in block])))
        length = math.prod(m for _, m, _ in block)
        for inner in strides(sizes):
            if low % inner == 0 == length % inner:
                places.append((length // inner, low // inner))
                low, length = 0, inner
            elif low // inner == (low + length - 1) // inner:
                places.append((1, low // inner))
                low %= inner
            else:
                return None
    for size in after:
        one, place = (1, 0) if size == 1 else places.pop(0)
        shape.append(one)
        start.append(place)
    return view.after(Step(view.shape), shape, start)


def is_float(value: Any) -> bool:
    """Whether a value consists of real floating-point numbers."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def is_full(value: Any) -> bool:
    """Whether a value is no float of less than 32 bits."""
    return not is_float(value) or jnp.finfo(value.dtype).bits >= 32


def can_multiply(value: Any) -> bool:
    """Whether the engine's products, which are float32, lose nothing of a value's numbers."""
    return is_float(value) and jnp.finfo(value.dtype).bits <= 32


def limit_of(value: Any) -> float:
    return float(jnp.finfo(value.dtype).max) if is_float(value) else math.inf
