"""Frozen matrices of 8-bit integers: with their scales, 9 bits a number.

A block of 32 numbers shares a scale, the largest magnitude over 127, as in the GGUF format Q8_0,
whose files are kept exactly. A step turns a matrix into floats where it uses it, and again in the
backward pass (`dpjax.runtime.gathering`), so that they are never all in memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["BLOCK", "Int8", "in_int8", "marks", "quantized", "whole"]

PyTree = Any

BLOCK = 32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers", "scales"], meta_fields=["axis"]
)
@dataclass(frozen=True)
class Int8:
    """A matrix.

    Attributes:
        numbers: int8 `[rows, columns]`.
        scales: float32, of the same shape, except that `axis` is shorter by a factor `BLOCK`.
        axis: along which blocks lie.
    """

    numbers: Any
    scales: Any
    axis: int

    @property
    def size(self) -> int:
        """Numbers in the matrix."""
        return int(self.numbers.size)

    def whole(self) -> jax.Array:
        """Returns the matrix in float32."""
        shape = list(self.numbers.shape)
        blocks = [*shape[: self.axis], shape[self.axis] // BLOCK, BLOCK, *shape[self.axis + 1 :]]
        parts = jnp.asarray(self.numbers).astype(jnp.float32).reshape(blocks)
        scales = jnp.expand_dims(jnp.asarray(self.scales), self.axis + 1)
        return (parts * jnp.broadcast_to(scales, parts.shape)).reshape(shape)


def quantized(matrix: Any, axis: int) -> Int8:
    """Rounds a float matrix, on the host; a block is off by at most half its scale.

    Args:
        matrix: `[rows, columns]`, finite.
        axis: along which blocks lie; its length must be a multiple of `BLOCK`.
    """
    values = np.asarray(matrix, np.float32)
    shape = list(values.shape)
    blocks = [*shape[:axis], shape[axis] // BLOCK, BLOCK, *shape[axis + 1 :]]
    parts = values.reshape(blocks)
    scales = np.max(np.abs(parts), axis=axis + 1, keepdims=True) / np.float32(127)
    numbers = np.rint(parts / np.where(scales == 0, 1, scales)).astype(np.int8)
    return Int8(numbers.reshape(shape), scales.squeeze(axis + 1), axis)


def in_int8(path: str, leaf: Any) -> Any:
    """Rounds a parameter if it is a matrix that blocks divide; else returns it as it is.

    Blocks lie along the inputs of a kernel and along the row of a table, as in GGUF files.
    """
    axis = 0 if path.endswith("/kernel") else 1
    fits = leaf.ndim == 2 and leaf.shape[axis] % BLOCK == 0
    return quantized(leaf, axis) if fits else leaf


def _is_int8(node: Any) -> bool:
    return isinstance(node, Int8)


def whole(tree: PyTree) -> PyTree:
    """Returns a tree with every `Int8` in float32."""
    return jax.tree.map(lambda x: x.whole() if _is_int8(x) else x, tree, is_leaf=_is_int8)


def marks(tree: PyTree) -> list[bool]:
    """Returns, for every array of a tree, whether it is a part of an `Int8`."""
    return jax.tree.leaves(
        jax.tree.map(
            lambda node: jax.tree.map(lambda _: _is_int8(node), node), tree, is_leaf=_is_int8
        )
    )
