"""Random loss programs, and oracles that hold the book-keeping engine against JAX on each of them.

A program is data: parameters, an example and a list of steps that end in a scalar loss. Steps use
the parameters through views and derived functions, in products, lookups and elementwise, inside
calls, loops and branches. `check` runs the engine on a batch of mixed scales; what it must give is
computed in NumPy from the gradient of each example alone, which takes little time to compile.
`shrink` makes a failing program small and `describe` prints it.

    python tests/dp/fuzz_programs.py --start=0 --count=1000
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from dpjax import dp
from dpjax.dp.clipping import PerExample, by_leaf
from dpjax.dp.engines import parts

SIZE = 4
MASKED = 1  # the example that is padding
BOUND = 1.0


class Step(NamedTuple):
    """One operation on earlier values, which are numbered: inputs of the block first."""

    op: str
    args: tuple[int, ...]
    options: dict[str, Any]


class Block(NamedTuple):
    """Steps on the inputs (weights..., data, rows); the value of the last one is the result."""

    inputs: int
    steps: tuple[Step, ...]


class Array(NamedTuple):
    """Shape and dtype of a parameter."""

    shape: tuple[int, ...]
    dtype: str


class Program(NamedTuple):
    """A loss function of parameters and one example (data `[numbers]`, rows `[6]`), and a batch.

    Attributes:
        seed: draws the numbers of the parameters and of the batch.
        params: one entry per leaf.
        numbers: how many floats an example has.
        tokens: how they relate: "random", "repeated", "opposed" or "close" (nearly opposed).
        chunk: how many numbers of temporaries the engine may hold before it cuts the batch.
        scales: factor of each example's floats.
        padding: what the masked example holds.
        block: the loss.
    """

    seed: int
    params: tuple[Array, ...]
    numbers: int
    tokens: str
    chunk: int
    scales: tuple[float, ...]
    padding: float
    block: Block


# --- What the steps do ----------------------------------------------------------------------------
# Every operation accepts data of any shape and repeats or cuts it to the one it needs, so that a
# program stays valid when a step before it is taken out.


def _fit(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    repeats = -(-size // max(x.size, 1))
    return jnp.tile(x.reshape(-1), repeats)[:size].reshape(shape) if x.size else jnp.zeros(shape)


def _common(*arrays: jax.Array) -> list[jax.Array]:
    dtype = functools.reduce(jnp.promote_types, [a.dtype for a in arrays])
    return [a.astype(dtype) for a in arrays]


def _wide(x: jax.Array, wide: bool) -> Any:
    return jnp.float32 if wide and jnp.issubdtype(x.dtype, jnp.floating) else None


def _dot(
    w: jax.Array, x: jax.Array, roles: str, free: tuple[int, ...], order: tuple[int, ...],
    x_first: bool, wide: bool,
) -> jax.Array:  # fmt: skip
    """A dot_general; `roles` says what each axis of w is: (c)ontracted, (b)atch or (f)ree.

    The data's axes are w's contracted and batch axes, then `free`, permuted by `order`.
    """
    shared = [i for i, role in enumerate(roles) if role != "f"]
    sizes = [*(w.shape[i] for i in shared), *free]
    order = tuple(i for i in order if i < len(sizes))
    x = _fit(x, tuple(sizes[i] for i in order))
    w, x = _common(w, x)
    pairs = [
        tuple(zip(*((i, order.index(k)) for k, i in enumerate(shared) if roles[i] == role)))
        or ((), ())
        for role in "cb"
    ]
    operands = (w, x)
    if x_first:
        operands, pairs = (x, w), [pair[::-1] for pair in pairs]
    return jax.lax.dot_general(*operands, tuple(pairs), preferred_element_type=_wide(x, wide))


def _conv(
    w: jax.Array, x: jax.Array, specs: tuple[tuple[int, ...], ...], batch: int,
    sizes: tuple[int, ...], strides: tuple[int, ...], padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...], rhs_dilation: tuple[int, ...], groups: int, batch_groups: int,
    w_first: bool, wide: bool,
) -> jax.Array:  # fmt: skip
    """A convolution with w as its kernel, or as its input if `w_first`."""
    dims = jax.lax.ConvDimensionNumbers(*specs)
    if w_first:
        other = (groups, w.shape[dims.lhs_spec[1]] // groups, *(1 for _ in sizes))
        spec = dims.rhs_spec
    else:
        other = (batch * batch_groups, w.shape[dims.rhs_spec[1]] * groups, *sizes)
        spec = dims.lhs_spec
    x = _fit(x, tuple(other[spec.index(i)] for i in range(w.ndim)))
    w, x = _common(w, x)
    # XLA's CPU backend reads outside of arrays if only the first of two paddings is negative, here
    # or in the derivative.
    kernel = [1 for _ in sizes] if w_first else [w.shape[i] for i in dims.rhs_spec[2:]]
    padding = tuple(
        (min(low, (k - 1) * dilation), high if low >= 0 else min(high, 0))
        for (low, high), k, dilation in zip(padding, kernel, rhs_dilation)
    )
    return jax.lax.conv_general_dilated(
        *((w, x) if w_first else (x, w)),
        strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dims,
        groups,
        batch_groups,
        preferred_element_type=_wide(x, wide),
    )


def _lookup(
    w: jax.Array, rows: jax.Array, how: str, mode: str | None, axis: int, shape: tuple[int, ...]
) -> jax.Array:
    """Rows of w; out of range they wrap, clip or are filled, as `mode` says."""
    rows = _fit(rows, shape)
    size = w.shape[axis]
    if mode == "promise_in_bounds":
        rows = rows % size
    if how == "take":
        return jnp.take(w, rows, axis, mode=mode)
    w = jnp.moveaxis(w, axis, 0) if axis else w
    if how == "at":
        return w.at[rows].get(mode=mode)
    if how == "raw":
        return w.at[rows].get(mode=mode, wrap_negative_indices=False)
    if how == "scalar":
        return w[rows.reshape(-1)[0]]
    if how == "vmap":
        return jax.vmap(lambda row: w[row])(rows.reshape(-1))
    if how == "dynamic":
        return jax.lax.dynamic_index_in_dim(w, rows.reshape(-1)[0], 0)
    if how == "one_hot":
        return jnp.tensordot(jax.nn.one_hot(rows, size, dtype=w.dtype), w, 1)
    if how == "along":
        index = _fit(rows % size, (2, *w.shape[1:]))
        return jnp.take_along_axis(w, index, 0)
    raise ValueError(f"how={how!r}")


def _elementwise(w: jax.Array, x: jax.Array, how: str, lead: tuple[int, ...]) -> jax.Array:
    w, x = _common(jnp.broadcast_to(w, (*lead, *w.shape)), _fit(x, (*lead, *w.shape)))
    return {"add": jnp.add, "multiply": jnp.multiply, "divide": lambda w, x: x / (2 + w * w)}[how](
        w, x
    )


def _axes(w: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in axes if a < w.ndim)


def _center(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return w - w.mean(_axes(w, axes), keepdims=True)


def _standardize(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    w = _center(w, axes)
    return w / jnp.sqrt((w * w).mean(_axes(w, axes), keepdims=True) + 1e-2)


def _weight_norm(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return w / jnp.sqrt(jnp.sum(w * w, _axes(w, axes), keepdims=True))


def _spectral(w: jax.Array, stopped: bool) -> jax.Array:
    """The weight as a matrix over its norm along two vectors."""
    rows = w.reshape(-1, w.shape[-1]) if w.ndim else w.reshape(1, 1)
    u = jnp.tanh(rows @ jnp.ones(rows.shape[1], w.dtype))
    v = jnp.tanh(u @ rows)
    if stopped:
        u, v = jax.lax.stop_gradient((u, v))
    return w / (0.1 + jnp.abs(u @ rows @ v))


def _gained(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """One number of b for each place along an axis of a."""
    shape = tuple(n if i == axis else 1 for i, n in enumerate(a.shape))
    a, gain = _common(a, _fit(b, shape))
    return a * jnp.tanh(gain)


def _mask(w: jax.Array, keep: float) -> jax.Array:
    numbers = np.random.default_rng(w.size).uniform(size=w.shape)
    return w * jnp.asarray(numbers < keep, w.dtype)


def _slice(w: jax.Array, axis: int, start: int, stop: int, step: int) -> jax.Array:
    index = [slice(None)] * w.ndim
    index[axis] = slice(start, stop, step) if step > 0 else slice(None, None, step)
    return w[tuple(index)]


def _concatenate(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    a, b = _common(a, _fit(b, a.shape))
    return jnp.concatenate([a, b], axis)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of two parameters in a's shape, as merged LoRA has it."""
    side = a.shape[-1]
    a, b = _common(a, _fit(b, (side, side)))
    return jnp.tensordot(a, b, 1)


WEIGHTS: dict[str, Callable[..., jax.Array]] = {
    "transpose": lambda w, order: w.transpose(order),
    "reshape": lambda w, shape: w.reshape(shape),
    "flatten_some": lambda w: w.reshape(-1, *w.shape[2:]),
    "expand": lambda w, axis: jnp.expand_dims(w, axis),
    "squeeze": lambda w: w.squeeze(),
    "scale": lambda w, by: w * by,
    "divide": lambda w, by: w / by,
    "negate": lambda w: -w,
    "cast": lambda w, dtype: w.astype(dtype),
    "there_and_back": lambda w, dtype: w.astype(dtype).astype(w.dtype),
    "slice": _slice,
    "center": _center,
    "standardize": _standardize,
    "weight_norm": _weight_norm,
    "spectral": _spectral,
    "unit": lambda w: w / (0.1 + jnp.linalg.norm(w.reshape(-1))),
    "half_stopped": lambda w: w + jax.lax.stop_gradient(w),
    "stopped_mask": lambda w: w * jax.lax.stop_gradient(jnp.tanh(w)),
    "mask": _mask,
    "exp": lambda w: jnp.exp(0.3 * w),
    "tanh": jnp.tanh,
    "softmax": lambda w: jax.nn.softmax(w, -1),
    "barrier": jax.lax.optimization_barrier,
    "jitted": lambda w: jax.jit(lambda w: w.reshape(w.shape[::-1]) * 0.5)(w),
    "concatenate": _concatenate,
    "matmul": _matmul,
    "lora": lambda a, b: a + 0.5 * _matmul(a, b),
    "add": lambda a, b: jnp.add(*_common(a, _fit(b, a.shape))),
    "product": lambda a, b: jnp.multiply(*_common(a, _fit(b, a.shape))),
    "gained": _gained,
    "gated": lambda a, b: jnp.multiply(*_common(a, jnp.mean(jnp.tanh(b)))),
}
PAIRED = ("concatenate", "matmul", "lora", "add", "product", "gained", "gated")


def _norm(x: jax.Array) -> jax.Array:
    x = x - x.mean()
    return x / jnp.sqrt((x * x).mean() + 1e-3)


DATA: dict[str, Callable[..., jax.Array]] = {
    "tanh": jnp.tanh,
    "saturate": lambda x: jnp.tanh(30 * x),
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu6": jax.nn.relu6,
    "sin": jnp.sin,
    "norm": _norm,
    "softmax": lambda x: jax.nn.softmax(x.reshape(-1)),
    "cumsum": lambda x: jnp.cumsum(x.reshape(-1)),
    "turned": lambda x: x.T,
    "stopped": lambda x: x + jax.lax.stop_gradient(x),
    "scaled": lambda x: 0.1 * x,
    "to_bfloat16": lambda x: x.astype(jnp.bfloat16),
    "to_float16": lambda x: x.astype(jnp.float16),
    "fft": lambda x: jnp.fft.fft(x.reshape(-1).astype(jnp.float32)),
}
MIXES: dict[str, Callable[..., jax.Array]] = {
    "plus": lambda x, y: jnp.add(*_common(x, _fit(y, x.shape))),
    "minus": lambda x, y: jnp.subtract(*_common(x, _fit(y, x.shape))),
    "times": lambda x, y: jnp.multiply(*_common(jnp.tanh(x), _fit(y, x.shape))),
    "attend": lambda x, y: jnp.dot(*_common(_fit(x, (3, 2)), _fit(y, (2, 3)))),
    "join": lambda x, y: jnp.concatenate(_common(x.reshape(-1), y.reshape(-1))),
}


def _real(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([x.real.reshape(-1), x.imag.reshape(-1)])
    return x


READOUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda x: x,
    "sin": jnp.sin,
    "square": lambda x: 0.5 * x * x,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}


def _readout(y: jax.Array, x: jax.Array, how: str, weights: str) -> jax.Array:
    """A scalar of y, linear or not; its elements have equal weights, fixed ones or the data's."""
    y = READOUTS[how](_real(y).astype(jnp.float32))
    if weights == "cos":
        y = y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    elif weights == "data":
        y = y * _fit(x, y.shape)
    return jnp.sum(y)


def _loss(*values: jax.Array, terms: tuple[tuple[float, str, str], ...]) -> jax.Array:
    """Sums readouts; opposed terms have coefficients of opposite signs."""
    *ys, x = values
    parts = [c * _readout(y, x, how, weights) for y, (c, how, weights) in zip(ys, terms)]
    return functools.reduce(jnp.add, parts)


def _call(*args: jax.Array, how: str, times: int, block: Block, noise: Any) -> jax.Array:
    """A call of the block, `times` over, each on the result before as its data."""
    *weights, x, rows = args

    def inside(*args: jax.Array) -> jax.Array:
        return run(block, args, noise)

    calls = {
        "jit": jax.jit(inside),
        "remat": jax.checkpoint(inside),
        "remat_dots": jax.checkpoint(inside, policy=jax.checkpoint_policies.dots_saveable),
        "custom_vjp": functools.partial(
            _with_custom_vjp(lambda noise, *args: run(block, args, noise)), noise
        ),
        "gradient": lambda *args: jax.grad(
            lambda x: _readout(inside(*args[:-2], x, args[-1]), x, "sin", "cos")
        )(args[-2]),
    }
    for _ in range(times):
        x = calls[how](*weights, x, rows)
        if how == "gradient":
            x = _real(x)
    return x


def _with_custom_vjp(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function of noise, floats and rows; JAX allows it to close over no traced number."""
    wrapped = jax.custom_vjp(function)

    def backward(args: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        noise, *floats, rows = args
        pull = jax.vjp(lambda *floats: function(noise, *floats, rows), *floats)[1]
        return (None, *pull(cotangent), None)

    wrapped.defvjp(lambda *args: (function(*args), args), backward)
    return wrapped


def _scan(
    *args: jax.Array, roles: tuple[str, ...], length: int, result: str, reverse: bool, dead: bool,
    block: Block, noise: Any,
) -> jax.Array:  # fmt: skip
    """A scan of the block; `roles` says how each weight, and last the data, enters.

    "const", "xs", "carry" (unchanged), "decay" (a carry that shrinks), "fed" (a carry to which the
    data is added) or "indexed" (by the iteration's number).
    """
    *weights, x, rows = args
    stacked = [w.shape[0] for w, role in zip(weights, roles) if role in ("xs", "indexed")]
    length = min(stacked, default=length)
    if roles[-1] == "xs":
        x = _fit(x, (length, max(x.size // length, 1)))
    values = [*weights, x]
    xs = [
        v if v.shape[0] == length else v[:length] for v, role in zip(values, roles) if role == "xs"
    ]
    carried = ("carry", "decay", "fed")
    carry = [v for v, role in zip(values, roles) if role in carried]

    def body(carry: Any, now: Any) -> Any:
        number, slices = now
        slices, state = iter(slices), iter(carry)
        enter = []
        for v, role in zip(values, roles):
            if role == "xs":
                enter.append(next(slices))
            elif role in carried:
                enter.append(next(state))
            elif role == "indexed":
                enter.append(jax.lax.dynamic_index_in_dim(v, number, 0, keepdims=False))
            else:
                enter.append(v)
        y = run(block, [*enter, rows], noise)
        out = []
        for k, (v, role) in enumerate(zip(enter, roles)):
            if role not in carried:
                continue
            if role == "decay":
                v = 0.5 * v
            elif role == "fed":
                v = v + (0.1 * jnp.tanh(_real(y).astype(jnp.float32).mean())).astype(v.dtype)
            elif k == len(roles) - 1:
                v = _fit(_real(y).astype(v.dtype), v.shape)
            out.append(v)
        return out, (y, enter[0] if dead else None)

    carry, (ys, _) = jax.lax.scan(
        body, carry, (jnp.arange(length), xs), length=length, reverse=reverse
    )
    return carry[-1] if result == "carry" and roles[-1] in carried else ys


def _vmap(*args: jax.Array, axes: tuple[int | None, ...], block: Block, noise: Any) -> jax.Array:
    """The block, vectorized over an axis of weights, or of data, or of both."""
    *weights, x, rows = args
    sizes = [w.shape[a] for w, a in zip(weights, axes) if a is not None]
    size = min(sizes, default=3)
    weights = [
        w if a is None else jax.lax.slice_in_dim(w, 0, size, axis=a) for w, a in zip(weights, axes)
    ]
    if axes[-1] is not None:
        x = _fit(x, (size, max(x.size // size, 1)))
    return jax.vmap(lambda *args: run(block, args, noise), (*axes, None))(*weights, x, rows)


def _cond(*args: jax.Array, switch: bool, blocks: tuple[Block, Block], noise: Any) -> jax.Array:
    """Two branches; which one depends on the example."""
    x = _real(args[-2]).astype(jnp.float32)
    shape = jax.eval_shape(lambda *a: run(blocks[0], a, noise), *args).shape

    def branch(block: Block) -> Callable[..., jax.Array]:
        def take(*args: jax.Array) -> jax.Array:
            return _fit(_real(run(block, args, noise)).astype(jnp.float32), shape)

        return take

    first, second = map(branch, blocks)
    if switch:
        return jax.lax.switch(jnp.int32(jnp.sum(x) > 0), (first, second, first), *args)
    return jax.lax.cond(jnp.sum(x) > 0, first, second, *args)


USES: dict[str, Callable[..., jax.Array]] = {
    "dot": _dot, "conv": _conv, "lookup": _lookup, "elementwise": _elementwise,
}  # fmt: skip
CONTEXTS: dict[str, Callable[..., jax.Array]] = {
    "call": _call, "scan": _scan, "vmap": _vmap, "cond": _cond,
}  # fmt: skip
OPS: dict[str, Callable[..., Any]] = {
    **WEIGHTS, **DATA, **MIXES, **USES, **CONTEXTS, "loss": _loss,
    "penalty": lambda w: 0.01 * jnp.sum(w.astype(jnp.float32) ** 2),
}  # fmt: skip


def run(block: Block, inputs: Any, noise: Any = None) -> jax.Array:
    """The value of a block; `noise` is the relative size of an error added to every step."""
    values = list(inputs)
    for number, step in enumerate(block.steps):
        more = {"noise": noise} if step.op in CONTEXTS else {}
        value = OPS[step.op](*(values[i] for i in step.args), **step.options, **more)
        if noise is not None and step.op != "loss":
            phase = np.cos(1.0 + 7.0 * number + 12.9898 * np.arange(value.size) ** 1.5)
            error = 1 + noise * jnp.asarray(phase.reshape(value.shape), jnp.float32)
            value = value * error.astype(value.dtype)
        values.append(value)
    return values[-1]


def loss_of(program: Program, noise: Any = None) -> Callable[[Any, Any], jax.Array]:
    """The loss function of one example."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        weights = [params[f"p{i}"] for i in range(len(program.params))]
        return run(program.block, [*weights, example["x"], example["rows"]], noise)

    return loss_fn


def numbers_of(program: Program) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The parameters and the batch."""
    rng = np.random.default_rng([program.seed, 1])
    params = {
        f"p{i}": rng.standard_normal(p.shape).astype(jnp.dtype(p.dtype))
        for i, p in enumerate(program.params)
    }
    x = rng.standard_normal((SIZE, program.numbers))
    half = program.numbers // 2
    if program.tokens != "random":
        close = 1e-4 * rng.standard_normal((SIZE, half)) if program.tokens == "close" else 0.0
        x[:, half : 2 * half] = (1 if program.tokens == "repeated" else -1) * x[:, :half] + close
    x *= np.asarray(program.scales)[:, None]
    x[MASKED] = np.where(np.isfinite(program.padding), x[MASKED], program.padding)
    rows = rng.integers(0, 3, (SIZE, 6))
    rows = np.where(rng.uniform(size=rows.shape) < 0.2, rng.integers(-9, 9, rows.shape), rows)
    return params, {"x": x.astype(np.float32), "rows": rows.astype(np.int32)}


# --- Drawing programs -----------------------------------------------------------------------------


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    """One of a sequence, or one key of a dict of weights."""
    if isinstance(choices, dict):
        weights = np.array(list(choices.values()), float)
        return list(choices)[rng.choice(len(choices), p=weights / weights.sum())]
    return choices[int(rng.integers(len(choices)))]


def _chance(rng: np.random.Generator, p: float) -> bool:
    return bool(rng.uniform() < p)


def _permutation(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    return tuple(int(i) for i in rng.permutation(n))


def _some(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    """A non-empty subset of range(n)."""
    chosen = [i for i in range(n) if _chance(rng, 0.6)]
    return tuple(chosen or [int(rng.integers(n))])


class _Style(NamedTuple):
    """What a program may contain besides float32 numbers of moderate size."""

    half: bool
    complex: bool
    extreme: bool
    twins: bool  # two uses of one derived weight, which differ in one respect


def _draw_dot(rng: np.random.Generator, shape: tuple[int, ...], style: _Style) -> dict[str, Any]:
    roles = "".join(_pick(rng, {"c": 5, "f": 4, "b": 1.5}) for _ in shape)
    if "c" not in roles and _chance(rng, 0.9):
        at = int(rng.integers(len(shape)))
        roles = roles[:at] + "c" + roles[at + 1 :]
    free = tuple(_pick(rng, (1, 2, 3, 5)) for _ in range(_pick(rng, {0: 3, 1: 5, 2: 1})))
    return {
        "roles": roles,
        "free": free,
        "order": _permutation(rng, len(shape) + 2),
        "x_first": _chance(rng, 0.6),
        "wide": style.half and _chance(rng, 0.4),
    }


def _draw_conv(rng: np.random.Generator, shape: tuple[int, ...], style: _Style) -> dict[str, Any]:
    n = len(shape)
    natural = {
        3: ((0, 2, 1), (2, 1, 0), (0, 2, 1)),
        4: ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        5: ((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3)),
    }[n]
    specs = tuple(_permutation(rng, n) if _chance(rng, 0.4) else spec for spec in natural)
    w_first = _chance(rng, 0.05)
    features = shape[specs[0][1] if w_first else specs[1][0]]
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    groups = _pick(rng, divisors) if _chance(rng, 0.3) else 1
    batch_groups = 1
    if groups == 1 and not w_first and _chance(rng, 0.12):
        batch_groups = _pick(rng, divisors)

    def spatial(draw: Callable[[], Any]) -> tuple[Any, ...]:
        return tuple(draw() for _ in range(n - 2))

    plain = _chance(rng, 0.4)
    return {
        "specs": specs,
        "batch": _pick(rng, {1: 4, 2: 1}),
        "sizes": spatial(lambda: _pick(rng, {2: 6, 3: 2, 4: 1} if n < 5 else {1: 1, 2: 2})),
        "strides": spatial(lambda: 1 if plain else _pick(rng, {1: 3, 2: 1})),
        "padding": spatial(
            lambda: (1, 1) if plain else (_pick(rng, (-1, 0, 1, 2)), _pick(rng, (-1, 0, 0, 1, 2)))
        ),
        "lhs_dilation": spatial(lambda: 1 if plain else _pick(rng, {1: 4, 2: 1})),
        "rhs_dilation": spatial(lambda: 1 if plain else _pick(rng, {1: 4, 2: 1})),
        "groups": groups,
        "batch_groups": batch_groups,
        "w_first": w_first,
        "wide": style.half and _chance(rng, 0.4),
    }


def _draw_lookup(rng: np.random.Generator, shape: tuple[int, ...], style: _Style) -> dict[str, Any]:
    return {
        "how": _pick(rng, {"at": 6, "take": 2, "raw": 1, "scalar": 1, "vmap": 0.7,
                           "dynamic": 0.7, "one_hot": 0.7, "along": 0.3}),
        "mode": _pick(rng, (None, None, "clip", "fill", "wrap", "promise_in_bounds")),
        "axis": 0 if _chance(rng, 0.7) else int(rng.integers(len(shape))),
        "shape": _pick(rng, ((), (1,), (3,), (5,), (2, 3))),
    }  # fmt: skip


def _draw_elementwise(
    rng: np.random.Generator, shape: tuple[int, ...], style: _Style
) -> dict[str, Any]:
    return {
        "how": _pick(rng, {"add": 3, "multiply": 3, "divide": 1}),
        "lead": _pick(rng, ((), (3,))),
    }


DRAW = {
    "dot": _draw_dot, "conv": _draw_conv, "lookup": _draw_lookup, "elementwise": _draw_elementwise,
}  # fmt: skip


def _draw_view(
    rng: np.random.Generator, shape: tuple[int, ...], style: _Style
) -> tuple[str, dict[str, Any]]:
    """The same numbers in another order, or each of them scaled or rounded."""
    n = len(shape)
    dtype = _pick(rng, ("bfloat16", "float16")) if style.half else "float32"
    factors: tuple[float, ...] = (0.5, -1.0, 2.0, 3.0, 1 / 3)
    if style.extreme:
        factors += (0.0, 1e18, 1e-23)
    drawn: dict[str, dict[str, Any]] = {
        "transpose": {"order": _permutation(rng, n)},
        "reshape": {"shape": tuple(shape[i] for i in _permutation(rng, n))},
        "flatten_some": {},
        "expand": {"axis": int(rng.integers(n + 1))},
        "squeeze": {},
        "scale": {"by": _pick(rng, factors)},
        "divide": {"by": _pick(rng, factors)},
        "negate": {},
        "cast": {"dtype": dtype},
        "there_and_back": {"dtype": dtype},
        "barrier": {},
        "jitted": {},
    }
    rarer = {"barrier": 0.4, "negate": 0.4}
    op = _pick(rng, {op: rarer.get(op, 1.0) for op in drawn})
    return op, drawn[op]


def _draw_function(
    rng: np.random.Generator, shape: tuple[int, ...], style: _Style
) -> tuple[str, dict[str, Any]]:
    """Another function of one weight, or of two."""
    n = len(shape)
    axis = int(rng.integers(n)) if n else 0
    stop = shape[axis] if n else 0
    axes = _some(rng, max(n, 1))
    drawn: dict[str, dict[str, Any]] = {
        "slice": {
            "axis": axis, "start": int(rng.integers(max(stop, 1))), "stop": stop,
            "step": _pick(rng, (1, 1, 2, -1)),
        },
        "center": {"axes": axes},
        "standardize": {"axes": axes},
        "weight_norm": {"axes": axes},
        "spectral": {"stopped": _chance(rng, 0.5)},
        "unit": {},
        "half_stopped": {},
        "stopped_mask": {},
        "mask": {"keep": _pick(rng, (0.5, 0.9))},
        "exp": {},
        "tanh": {},
        "softmax": {},
        "concatenate": {"axis": axis},
        "matmul": {},
        "lora": {},
        "add": {},
        "product": {},
        "gained": {"axis": axis},
        "gated": {},
    }  # fmt: skip
    op = _pick(rng, ["center", "standardize", *drawn])
    return op, drawn[op]


class _Builder:
    """A block under construction: it knows the shapes of its weights, which decide what fits."""

    def __init__(self, weights: list[jax.ShapeDtypeStruct], rng: Any, style: _Style):
        self.rng, self.style = rng, style
        self.inputs = len(weights) + 2
        self.steps: list[Step] = []
        self.weights = dict(enumerate(weights))
        self.shared = list(self.weights)
        self.x, self.rows = len(weights), len(weights) + 1
        self.data = [self.x]

    def add(self, op: str, args: tuple[int, ...], **options: Any) -> int:
        self.steps.append(Step(op, args, options))
        return self.inputs + len(self.steps) - 1

    def pick_weight(self) -> int:
        """A weight that is shared among uses, or rarely any other."""
        return _pick(self.rng, self.shared if _chance(self.rng, 0.95) else list(self.weights))

    def derive(self, w: int, draw: Any) -> int:
        """A view or a function of a weight; the weight itself if what was drawn does not fit."""
        op, options = draw(self.rng, self.weights[w].shape, self.style)
        args = (w, self.pick_weight()) if op in PAIRED else (w,)
        try:
            out = jax.eval_shape(
                functools.partial(OPS[op], **options), *(self.weights[i] for i in args)
            )
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            return w
        if not 0 < out.size <= 300 or out.ndim > 5:
            return w
        index = self.add(op, args, **options)
        self.weights[index] = out
        return index

    def draw_use(self, w: int) -> tuple[str, dict[str, Any]] | None:
        """A product or another use that fits the weight."""
        shape = self.weights[w].shape
        kinds = {"dot": 5, "lookup": 2, "elementwise": 0.2} if shape else {"elementwise": 1}
        if 3 <= len(shape) <= 5:
            kinds["conv"] = 40 if self.style.twins else 7
        op = _pick(self.rng, kinds)
        options = DRAW[op](self.rng, shape, self.style)
        return (op, options) if self.fits(op, options, w) else None

    def fits(self, op: str, options: dict[str, Any], w: int) -> bool:
        dtype = jnp.int32 if op == "lookup" else jnp.float32
        other = jax.ShapeDtypeStruct((6,), dtype)
        try:
            out = jax.eval_shape(functools.partial(OPS[op], **options), self.weights[w], other)
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            return False
        return out.size <= 600 and (out.size > 0 or _chance(self.rng, 0.1))

    def use(self, w: int, x: int, op: str, options: dict[str, Any]) -> int:
        return self.add(op, (w, self.rows if op == "lookup" else x), **options)

    def vary(self, w: int, op: str, options: dict[str, Any]) -> dict[str, Any]:
        """The same use with another value of one option: the twin that shares its weight."""
        for _ in range(8):
            other = DRAW[op](self.rng, self.weights[w].shape, self.style)
            keys = dict.fromkeys(sorted(options), 1.0)
            keys |= {"specs": 12.0} if op == "conv" else {}
            keys |= {"roles": 0.3} if op == "dot" else {}
            key = _pick(self.rng, keys)
            changed = {**options, key: other[key]}
            if key == "specs":  # the layout of one operand only, most often the weight
                at = _pick(self.rng, {0: 1, 1: 4, 2: 1})
                specs = list(options["specs"])
                specs[at] = _permutation(self.rng, len(specs[at]))
                changed["specs"] = tuple(specs)
            if changed != options and self.fits(op, changed, w):
                return changed
        return options

    def context(self, w: int, x: int, depth: int, inner: tuple[str, dict[str, Any]] | None) -> int:
        """A call, loop or branch around uses of one or two weights; `inner` is used there first."""
        rng = self.rng
        args = (w, self.pick_weight()) if _chance(rng, 0.25) else (w,)
        shapes = [self.weights[i] for i in args]
        kind = _pick(rng, {"call": 4, "scan": 5, "vmap": 1.5, "cond": 0.7})
        length = _pick(rng, (1, 2, 3))
        roles: list[str] = []
        axes: list[int | None] = []
        inside = []
        for k, weight in enumerate(shapes):
            free = not (k == 0 and inner)  # what is used inside must have its shape there
            role = _pick(rng, {"const": 5, "xs": 4, "carry": 0.6, "decay": 0.4, "fed": 0.3,
                               "indexed": 0.7})  # fmt: skip
            role = role if weight.ndim and free else _pick(rng, {"const": 9, "carry": 1})
            axis = int(rng.integers(weight.ndim)) if weight.ndim and free else None
            axis = None if _chance(rng, 0.4) else axis
            roles.append(role)
            axes.append(axis)
            shape = list(weight.shape)
            if kind == "scan" and role in ("xs", "indexed"):
                del shape[0]
            if kind == "vmap" and axis is not None:
                del shape[axis]
            inside.append(jax.ShapeDtypeStruct(tuple(shape), weight.dtype))
        roles.append(_pick(rng, ("const", "xs", "carry")))
        axes.append(0 if all(a is None for a in axes) or _chance(rng, 0.5) else None)

        def block() -> Block:
            sub = _Builder(inside, rng, self.style)
            return sub.body(depth - 1, inner)

        options: dict[str, Any]
        if kind == "call":
            how = _pick(rng, {"jit": 3, "remat": 3, "remat_dots": 1, "custom_vjp": 0.7,
                              "gradient": 1})  # fmt: skip
            options = {"how": how, "times": _pick(rng, {1: 3, 2: 1}), "block": block()}
        elif kind == "scan":
            options = {
                "roles": tuple(roles), "length": length, "result": _pick(rng, ("carry", "stack")),
                "reverse": _chance(rng, 0.3), "dead": _chance(rng, 0.2), "block": block(),
            }  # fmt: skip
        elif kind == "vmap":
            options = {"axes": tuple(axes), "block": block()}
        else:
            options = {"switch": _chance(rng, 0.3), "blocks": (block(), block())}
        return self.add(kind, (*args, x, self.rows), **options)

    def shape_data(self, x: int) -> int:
        rng = self.rng
        usual = [op for op in DATA if op not in ("to_bfloat16", "to_float16", "fft")]
        if self.style.half and _chance(rng, 0.4):
            return self.add(_pick(rng, ("to_bfloat16", "to_float16")), (x,))
        if self.style.complex and _chance(rng, 0.4):
            return self.add("fft", (x,))
        return self.add(_pick(rng, usual), (x,))

    def body(self, depth: int, inner: tuple[str, dict[str, Any]] | None = None) -> Block:
        """One or two uses, and what is between them."""
        rng, x = self.rng, self.x
        if inner:
            x = self.use(0, x, *inner)
        for _ in range(_pick(rng, {0: 1, 1: 2}) if inner else _pick(rng, {1: 3, 2: 1})):
            w = self.pick_weight()
            if _chance(rng, 0.15):
                w = self.derive(w, _pick(rng, (_draw_view, _draw_function)))
            if depth > 0 and _chance(rng, 0.3):
                x = self.context(w, x, depth, None)
            elif use := self.draw_use(w):
                x = self.use(w, x, *use)
            if _chance(rng, 0.3):
                x = self.add(_pick(rng, ("tanh", "sin", "relu", "gelu", "scaled")), (x,))
        if not self.steps:
            self.add("sin", (x,))
        return Block(self.inputs, tuple(self.steps))


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = np.random.default_rng([seed, 0])
    style = _Style(
        half=_chance(rng, 0.12), complex=_chance(rng, 0.06), extreme=_chance(rng, 0.1),
        twins=_chance(rng, 0.3),
    )  # fmt: skip
    # Axes of equal size fit each other's place. Where kernels are large, gradients are not kept.
    palettes: tuple[tuple[int, ...], ...] = ((2,), (3,), (4,))
    if not style.twins:
        palettes = (*palettes[:2], (2, 3), (2, 4), (1, 2, 3), (2, 3, 4))
    palette = _pick(rng, palettes)
    params = []
    ranks = {3: 1, 4: 2} if style.twins else {0: 0.2, 1: 0.8, 2: 3, 3: 3, 4: 3, 5: 1}
    for _ in range(_pick(rng, {1: 4, 2: 3, 3: 1})):
        rank = _pick(rng, ranks)
        dtype = _pick(rng, ("float32", "bfloat16", "float16")) if style.half else "float32"
        params.append(Array(tuple(_pick(rng, palette) for _ in range(rank)), dtype))
    weights = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in params]
    b = _Builder(weights, rng, style)
    terms: list[tuple[int, tuple[float, str, str]]] = []
    for w in list(b.shared):  # most often, all uses of a parameter are uses of one view of it
        draw = _draw_function if _chance(rng, 0.8 if style.twins else 0.15) else _draw_view
        for _ in range(_pick(rng, {1: 3, 2: 1} if style.twins else {0: 3, 1: 2, 2: 1})):
            w = b.derive(w, draw)
        b.shared.append(w)
    b.shared = b.shared[len(params) :]
    for _ in range(_pick(rng, {1: 3, 2: 3, 3: 1})):
        w = b.pick_weight()
        x = _pick(rng, b.data)
        if _chance(rng, 0.3):
            x = b.shape_data(x)
        if _chance(rng, 0.1) and len(b.data) > 1:
            x = b.add(_pick(rng, list(MIXES)), (x, _pick(rng, b.data)))
        linear = _chance(rng, 0.6 if style.twins else 0.3)
        how = "sum" if linear else _pick(rng, list(READOUTS))
        term = (
            _pick(rng, (1.0, 1.0, 0.5, -1.0)), how, _pick(rng, {"cos": 4, "ones": 3, "data": 2})
        )  # fmt: skip
        if _chance(rng, 0.3):
            y = b.context(w, x, 2, None)
        else:
            use = b.draw_use(w)
            if use is None:
                continue
            y = b.use(w, x, *use)
            if _chance(rng, 0.9 if style.twins else 0.4):  # a twin, most often opposed
                other = use if _chance(rng, 0.25) else (use[0], b.vary(w, *use))
                v = b.derive(w, _draw_view) if _chance(rng, 0.15) else w
                if v != w and not b.fits(*other, v):
                    v = w
                twin = b.context(v, x, 2, other) if _chance(rng, 0.3) else b.use(v, x, *other)
                sign = -1.0 if _chance(rng, 0.7) else 1.0
                terms.append((twin, (sign * term[0], *term[1:])))
        if _chance(rng, 0.1 if style.twins else 0.4):
            y = b.shape_data(y)
        b.data.append(y)
        terms.append((y, term))
    if _chance(rng, 0.03):
        terms.append((b.add("penalty", (b.pick_weight(),)), (1.0, "sum", "ones")))
    if not terms:
        terms.append((b.add("elementwise", (0, b.x), how="multiply", lead=()), (1.0, "sum", "cos")))
    b.add("loss", (*(i for i, _ in terms), b.x), terms=tuple(t for _, t in terms))
    top = 1.0 if style.half else 3.0
    scales = 10.0 ** rng.uniform(-top, top, SIZE)
    if style.extreme:
        scales[2] = _pick(rng, (1e8, 1e15, 1e30, 1e-20))
    return pruned(
        Program(
            seed,
            tuple(params),
            _pick(rng, (6, 12, 24)),
            _pick(rng, {"random": 7, "repeated": 1, "opposed": 1, "close": 1}),
            _pick(rng, {2**20: 3, 16: 1}),
            tuple(float(f"{s:.3g}") for s in scales),
            _pick(rng, (1.0, 1.0, math.nan, math.inf)),
            Block(b.inputs, tuple(b.steps)),
        )
    )


def _pruned(block: Block) -> Block:
    """Without the steps that nothing needs."""
    needed = {block.inputs + len(block.steps) - 1}
    for k in reversed(range(len(block.steps))):
        if block.inputs + k in needed:
            needed.update(block.steps[k].args)
    number = {i: i for i in range(block.inputs)}
    steps: list[Step] = []
    for k, step in enumerate(block.steps):
        if block.inputs + k in needed:
            number[block.inputs + k] = block.inputs + len(steps)
            steps.append(step._replace(args=tuple(number[i] for i in step.args)))
    return Block(block.inputs, tuple(steps))


def pruned(program: Program) -> Program:
    """Without the steps and parameters that the loss does not need."""
    block = _pruned(program.block)
    used = {i for step in block.steps for i in step.args}
    kept = [i for i in range(len(program.params)) if i in used] or [0]
    number = {old: new for new, old in enumerate([*kept, *range(len(program.params), 10**4)])}
    steps = tuple(s._replace(args=tuple(number[i] for i in s.args)) for s in block.steps)
    params = tuple(program.params[i] for i in kept)
    return program._replace(params=params, block=Block(len(params) + 2, steps))


# --- Oracles --------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What went wrong: "bound", "neighbor", "crash", "kept", "norm" or "sum", and the numbers."""

    kind: str
    text: str


class Invalid(Exception):
    """JAX itself cannot run the program, or not with `vmap`."""


RTOL = 2e-4
# Gram matrices add a margin for cancellation to the squared norm, relative to the parts'.
CANCELLED = 2.0**-15


def is_half(program: Program) -> bool:
    """Whether numbers of 16 bits occur, which round at other places in the two engines."""
    return any(f in describe(program) for f in ("float16",))


# Programs run for microseconds, so compiling is all that counts. Without the fusion emitters it
# takes a third of the time.
COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # newer versions refuse an option that they do not know
    COMPILE["xla_cpu_use_fusion_emitters"] = False


def _traced(program: Program, params: Any, batch: Any) -> Callable[[Any, Any], jax.Array]:
    """The loss function as its jaxpr: the engines trace it several times, Python only once."""
    example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
    closed = jax.make_jaxpr(loss_of(program))(params, example)
    return lambda *args: jaxpr_as_fun(closed)(*jax.tree.leaves(args))[0]


RULES = {
    "flat": dp.flat(BOUND),
    "per layer": dp.per_layer(BOUND, grouping=by_leaf),
    "automatic": dp.automatic(BOUND),
}


class _Engines:
    """The clipped sums of both engines, under several rules."""

    def __init__(
        self, loss_fn: Any, rules: tuple[str, ...], params: Any, batch: Any, options: Any
    ) -> None:
        self._params, self._batch, self._rules = params, batch, rules
        self._gradient = jax.jit(jax.value_and_grad(loss_fn), compiler_options=options)

        def bookkeeping(params: Any, batch: Any, mask: Any) -> Any:
            sums = {r: dp.clipped_sum(loss_fn, RULES[r], method="bookkeeping") for r in rules}
            return {("bookkeeping", r): f(params, batch, mask) for r, f in sums.items()}

        self._bookkeeping = jax.jit(bookkeeping, compiler_options=options)

    def bookkeeping(self, mask: np.ndarray) -> Any:
        return jax.device_get(self._bookkeeping(self._params, self._batch, mask))

    @np.errstate(all="ignore")
    def vmap(self, mask: np.ndarray) -> Any:
        """What the vmap engine gives: float32 norms, and examples dropped that are not finite."""
        rows = [{k: v[i] for k, v in self._batch.items()} for i in range(SIZE)]
        found = [jax.device_get(self._gradient(self._params, row)) for row in rows]
        loss = np.array([value for value, _ in found], np.float32)
        each = [jax.tree.leaves(gradient) for _, gradient in found]
        leaves = [np.stack(own).astype(np.float32) for own in zip(*each, strict=True)]
        out = {}
        for name in self._rules:
            rule = RULES[name]
            squares = np.zeros((SIZE, rule.num_groups(self._params)), np.float32)
            for group, g in zip(rule.groups(self._params), leaves, strict=True):
                squares[:, group] += np.sum(np.square(g).reshape(SIZE, -1), 1)
            norms = np.sqrt(squares)
            use = mask & np.isfinite(loss) & np.all(np.isfinite(norms), 1)
            factors = np.where(use[:, None], jax.vmap(rule.factors)(norms), np.float32(0.0))
            value = [
                np.einsum("n,n...->...", factors[use, group], g[use])
                for group, g in zip(rule.groups(self._params), leaves, strict=True)
            ]
            total = dp.ClippedSum(
                jax.tree.unflatten(jax.tree.structure(self._params), value), rule.sensitivity()
            )
            norms = np.where(mask[:, None], norms, 0)
            out["vmap", name] = total, PerExample(np.where(mask, loss, 0), norms, factors, mask)
        return out


def _sizes(tree: Any, grouped: bool) -> np.ndarray:
    """Norms of a tree's leaves, or of all of it, in float64."""
    squares = [np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(tree)]
    return np.sqrt(np.array(squares if grouped else [sum(squares)]))


def check(program: Program, rules: tuple[str, ...] = tuple(RULES)) -> Failure | None:
    """Holds the book-keeping engine against the gradients of single examples.

    Args:
        program: the loss and its batch.
        rules: names of the clipping rules.

    Returns:
        The worst failure, or None.

    Raises:
        Invalid: JAX cannot run the program, or gives other numbers each time.
    """
    # What users run counts: XLA's own options must show a failure, too.
    return _check(program, rules, COMPILE) and _check(program, rules, {})


def _check(program: Program, rules: tuple[str, ...], options: dict[str, Any]) -> Failure | None:
    with mock.patch.dict(parts._CHUNK, {"cpu": program.chunk}):
        return _failure(program, rules, options)


def _failure(program: Program, rules: tuple[str, ...], options: dict[str, Any]) -> Failure | None:
    params, batch = numbers_of(program)
    mask = np.arange(SIZE) != MASKED
    try:
        loss_fn = _traced(program, params, batch)
        engines = _Engines(loss_fn, rules, params, batch, options)
        want = engines.vmap(mask)
    except Exception as invalid:
        raise Invalid(str(invalid)) from invalid
    try:
        result = want | engines.bookkeeping(mask)
    except Exception as error:
        try:  # some products of bfloat16 numbers are more than XLA can do on a CPU
            plain = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))
            jax.block_until_ready(jax.jit(plain, compiler_options=options)(params, batch))
        except Exception as invalid:
            raise Invalid(str(invalid)) from invalid
        return Failure("crash", f"{type(error).__name__}: {str(error)[:200]}")
    real = np.flatnonzero(mask)
    alone = {i: engines.bookkeeping(np.arange(SIZE) == i) for i in real}
    without = {i: engines.bookkeeping(mask & (np.arange(SIZE) != i)) for i in real}
    failures = []
    with np.errstate(all="ignore"):
        for name in rules:
            grouped = name == "per layer"
            limit = BOUND / math.sqrt(len(params) if grouped else 1)
            key = ("bookkeeping", name)
            for i in real:
                size = _sizes(alone[i][key][0].value, grouped).max()
                if not size <= limit * (1 + 1e-6):
                    failures.append(Failure("bound", f"{name}: example {i} gives {size / limit} C"))
                moved = jax.tree.map(
                    lambda a, b: np.asarray(a, np.float64) - b,
                    result[key][0].value,
                    without[i][key][0].value,
                )
                size = _sizes(moved, grouped).max()
                if not size <= limit * (1 + 1e-5):
                    failures.append(
                        Failure("neighbor", f"{name}: without {i} it moves {size / limit} C")
                    )
            if problem := _differs(program, name, result, None):
                spread = _spread(program, params, batch)
                problem = _differs(program, name, result, spread)
                failures += [problem] if problem else []
    if failures and any(_unequal(want, engines.vmap(mask)) for _ in range(5)):
        raise Invalid("equal inputs give different results.")
    order = ("bound", "neighbor", "kept", "norm", "sum")
    return min(failures, key=lambda f: order.index(f.kind), default=None)


def _unequal(a: Any, b: Any) -> bool:
    """Whether two results differ at all."""
    pairs = zip(*(jax.tree.leaves(result) for result in (a, b)), strict=True)
    return any(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in pairs)


def _differs(program: Program, name: str, result: Any, spread: np.ndarray | None) -> Failure | None:
    """Where norms or sums are not vmap's, up to rounding, which grows with `spread`."""
    (want, facts), (have, other) = (result[method, name] for method in ("vmap", "bookkeeping"))
    grouped = name == "per layer"
    if spread is None:
        spread = np.zeros((SIZE, len(program.params)))
    if not grouped:
        spread = np.sqrt(np.sum(np.square(spread), 1, keepdims=True))
    a, b = np.asarray(facts.norms, np.float64), np.asarray(other.norms, np.float64)
    # Squares of small numbers underflow; the engine adds what may have been lost.
    error = np.sqrt(a * a * (1 + 2 * RTOL) + CANCELLED * spread**2) - a + 1e-9
    if is_half(program):
        error += 2.0**-6 * spread + 1e-5
    first, second = (np.any(f.factors != 0, 1) for f in (facts, other))
    # Where parts cancel whose squares overflow, what is left may overflow as well, or not.
    overflows = np.max(spread, 1) > 1e18
    counts = ~np.all(np.maximum(a, b) <= error, 1)  # a norm of zero has no factor, in some rules
    if np.any((first != second) & ~overflows & counts):
        return Failure("kept", f"{name}: vmap keeps {first} of norms {a}, the other {second}")
    error[overflows] = math.inf
    if np.any((np.abs(a - b) > error) & first[:, None]):
        return Failure("norm", f"{name}: vmap {a.tolist()}, the other {b.tolist()}")
    factors = np.asarray(facts.factors, np.float64)
    room = np.where(first[:, None], np.minimum(2.2 * factors * error, 2 * BOUND), 0.0)
    room = np.sum(np.where((first != second)[:, None], BOUND, room), 0)
    sizes = _sizes(
        jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, want.value, have.value), grouped
    )
    if np.any(~(sizes <= room + 1e-6 * BOUND)):
        return Failure("sum", f"{name}: the sums differ by {sizes} C, rounding explains {room}")
    return None


def _spread(program: Program, params: Any, batch: Any) -> np.ndarray:
    """How much each example's gradient, by leaf, moves per unit of relative error in the steps.

    Where parts of a gradient cancel, this is their size.
    """

    def gradients(noise: jax.Array, params: Any, batch: Any) -> Any:
        loss_fn = loss_of(program, noise)
        return jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)

    gradients = jax.jit(gradients, compiler_options=COMPILE)
    exact = gradients(0.0, params, batch)
    spread = np.zeros((SIZE, len(program.params)))
    # The small ones see what jumps: signs, ranks, a sine of millions.
    for noise in (2.0**-5, -(2.0**-5), 2.0**-20, -(2.0**-20)):
        moved = jax.tree.map(
            lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64),
            exact,
            gradients(noise, params, batch),
        )
        sizes = [np.sqrt(np.sum(g.reshape(SIZE, -1) ** 2, 1)) for g in jax.tree.leaves(moved)]
        spread = np.maximum(spread, np.stack(sizes, 1) / abs(noise))
    norms = [
        np.sqrt(np.sum(np.asarray(g, np.float64).reshape(SIZE, -1) ** 2, 1))
        for g in jax.tree.leaves(exact)
    ]
    return np.nan_to_num(np.maximum(spread, np.stack(norms, 1)), nan=1e30, posinf=1e30)


# --- Shrinking and printing -----------------------------------------------------------------------


def describe(program: Program) -> str:
    """A program as text, one step a line."""
    lines = [
        f"seed {program.seed}, tokens {program.tokens}, scales {program.scales}, "
        f"padding {program.padding}, chunk {program.chunk}"
    ]
    names = [f"p{i}" for i in range(len(program.params))]
    for name, (shape, dtype) in zip(names, program.params):
        lines.append(f"  {name}: {dtype}{list(shape)}")
    lines += _lines(program.block, names, "  ")
    return "\n".join(lines)


def _lines(block: Block, weights: list[str], indent: str) -> Iterator[str]:
    names = [*weights, "x", "rows"]
    for k, (op, args, options) in enumerate(block.steps):
        names.append(f"v{k}")
        inner = options.get("blocks", [options["block"]] if "block" in options else [])
        shown = [f"{k}={v!r}" for k, v in options.items() if k not in ("block", "blocks")]
        arguments = ", ".join([*(names[i] for i in args), *shown])
        yield f"{indent}v{k} = {op}({arguments})" + (":" if inner else "")
        for part in inner:
            inside = [f"w{i}" for i in range(part.inputs - 2)]
            yield from _lines(part, inside, indent + "    ")
            yield f"{indent}    ."


PLAIN: dict[str, Any] = {
    "batch": 1, "groups": 1, "batch_groups": 1, "wide": False, "w_first": False, "x_first": True,
    "times": 1, "reverse": False, "dead": False, "mode": None, "how": "jit", "switch": False,
    "length": 2, "free": (), "lead": (), "axis": 0,
}  # fmt: skip


def _smaller_blocks(block: Block) -> Iterator[Block]:
    """Blocks with one step less, or with a simpler step."""
    for k in reversed(range(len(block.steps))):
        step, own = block.steps[k], block.inputs + k

        def put(*new: Step, k: int = k) -> Block:
            return Block(block.inputs, (*block.steps[:k], *new, *block.steps[k + 1 :]))

        if step.op == "loss":
            terms = step.options["terms"]
            for t in range(len(terms)) if len(terms) > 1 else ():
                yield put(
                    step._replace(
                        args=step.args[:t] + step.args[t + 1 :],  # the last one is the data
                        options={"terms": terms[:t] + terms[t + 1 :]},
                    )
                )
            for t, (coefficient, how, weights) in enumerate(terms):
                for simple in ((coefficient, "sum", weights), (coefficient, how, "ones")):
                    if simple != terms[t]:
                        yield put(
                            step._replace(options={"terms": (*terms[:t], simple, *terms[t + 1 :])})
                        )
            continue
        for arg in step.args:  # the step's uses take one of its own arguments
            steps = [
                s._replace(args=tuple(arg if i == own else i for i in s.args)) for s in block.steps
            ]
            if k < len(steps) - 1:
                yield Block(block.inputs, tuple(steps))
        inner = step.options.get("blocks") or (
            (step.options["block"],) if "block" in step.options else ()
        )
        for part in inner:  # what is inside, without the context
            yield _inlined(block, k, part)
        for position, part in enumerate(inner):
            for smaller in _smaller_blocks(part):
                if "block" in step.options:
                    yield put(step._replace(options={**step.options, "block": _pruned(smaller)}))
                else:
                    parts = list(inner)
                    parts[position] = _pruned(smaller)
                    yield put(step._replace(options={**step.options, "blocks": tuple(parts)}))
        for key, value in step.options.items():
            plain = PLAIN.get(key, value)
            if key == "how" and step.op != "call":
                plain = {"lookup": "at", "elementwise": "multiply"}[step.op]
            if key in ("strides", "lhs_dilation", "rhs_dilation"):
                plain = tuple(1 for _ in value)
            if key == "padding":
                plain = tuple((0, 0) for _ in value)
            if key == "roles" and step.op == "scan":
                plain = tuple("const" for _ in value)
            if key == "specs":
                for at in range(3):
                    n = len(value[0])
                    usual = (
                        (n - 1, n - 2, *range(n - 2)) if at == 1 else (0, n - 1, *range(1, n - 1))
                    )
                    if value[at] != usual:
                        specs = (*value[:at], usual, *value[at + 1 :])
                        yield put(step._replace(options={**step.options, key: specs}))
            if plain != value:
                yield put(step._replace(options={**step.options, key: plain}))


def _inlined(block: Block, k: int, part: Block) -> Block:
    """`block` with step k, a context, replaced by the steps inside it."""
    step, own = block.steps[k], block.inputs + k
    extra = len(part.steps) - 1

    def inside(i: int) -> int:
        return step.args[i] if i < part.inputs else own + i - part.inputs

    moved = [s._replace(args=tuple(inside(i) for i in s.args)) for s in part.steps]
    after = [
        s._replace(args=tuple(i + extra if i >= own else i for i in s.args))
        for s in block.steps[k + 1 :]
    ]
    return Block(block.inputs, (*block.steps[:k], *moved, *after))


def _smaller(program: Program) -> Iterator[Program]:
    for block in _smaller_blocks(program.block):
        yield pruned(program._replace(block=block))
    if program.tokens != "random":
        yield program._replace(tokens="random")
    if program.chunk != 2**20:
        yield program._replace(chunk=2**20)
    if any(s != 1.0 for s in program.scales):
        yield program._replace(scales=(1.0,) * SIZE)
    for i, p in enumerate(program.params):
        for shape in {tuple(min(s, 2) for s in p.shape)} - {p.shape}:
            params = (*program.params[:i], p._replace(shape=shape), *program.params[i + 1 :])
            yield program._replace(params=params)


def shrink(
    program: Program, kind: str, rules: tuple[str, ...] = tuple(RULES), tries: int = 100
) -> Program:
    """A smaller program that fails in the same way."""
    while tries > 0:
        for smaller in _smaller(program):
            tries -= 1
            if tries <= 0:
                break
            try:
                failure = _check(smaller, rules, COMPILE)
            except Exception:
                continue
            if failure and failure.kind == kind:
                program = smaller
                break
        else:
            return program
    return program


def rule_of(seed: int) -> tuple[str]:
    """The rule that a seed's program is checked with: compiling two takes twice the time."""
    return ({0: "per layer", 1: "flat", 2: "per layer", 3: "automatic"}[seed % 4],)


def failures(seeds: Iterable[int]) -> Iterator[tuple[int, Failure | None]]:
    """Checks programs under one rule each; yields the seeds that count, and how they fail if so."""
    for number, seed in enumerate(seeds):
        try:
            yield seed, check(generate(seed), rule_of(seed))
        except Invalid:
            continue
        if number % 50 == 49:
            jax.clear_caches()  # compiled programs are never used again


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--shrink", action="store_true", help="shrink failing programs")
    options = parser.parse_args(argv)
    began, ran, kinds = time.time(), 0, {}
    for seed, failure in failures(range(options.start, options.start + options.count)):
        ran += 1
        if ran % 100 == 0:
            print(f"{ran} programs, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        if failure is None:
            continue
        kinds[failure.kind] = kinds.get(failure.kind, 0) + 1
        print(f"seed {seed}: {failure.kind}: {failure.text}", flush=True)
        program = generate(seed)
        if options.shrink:
            program = shrink(program, failure.kind, rule_of(seed))
            print(program)
        print(describe(program), flush=True)
    print(
        f"{ran} of {options.count} programs ran in {time.time() - began:.0f} s; failures: {kinds}"
    )
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
