"""Parameters as an engine is given them: whole, or in parts that are gathered where they are used.

The engine needs shapes to make its plan, and numbers in few places: in the loss, where each is met
once forward and once backward, and where a leaf is differentiated by itself. `Held` has a function
for each, so that the engine does not know on how many devices a parameter lies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["Held", "here"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Held:
    """Parameters that `clipped_sum`'s function takes in place of a tree of arrays.

    The sum is that of whole parameters: this device's part of it, if devices have parts of the
    batch.

    Attributes:
        shapes: of the whole parameters; arrays or abstract values.
        leaf: the whole leaf of a number, in `jax.tree.leaves` order.
        at_use: takes a function `(parameters, *args)` to `(*args)`, with the parameters put in
            where they are used.
    """

    shapes: PyTree
    leaf: Callable[[int], jax.Array]
    at_use: Callable[[Callable[..., Any]], Callable[..., Any]]

    def whole(self) -> PyTree:
        """All parameters as arrays."""
        leaves, treedef = jax.tree.flatten(self.shapes)
        return jax.tree.unflatten(treedef, [self.leaf(i) for i in range(len(leaves))])


def here(params: PyTree) -> Held:
    """Parameters that are whole, or held otherwise already."""
    if isinstance(params, Held):
        return params
    leaves = jax.tree.leaves(params)
    return Held(params, leaves.__getitem__, lambda function: functools.partial(function, params))
