"""The plan of the book-keeping engine for a model, as a table that says what to change."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpjax.dp.engines import memory
from dpjax.dp.engines.plans import LeafPlan, leaf_plans, make_plan

__all__ = ["explain", "route_shares"]

PyTree = Any

_LARGEST = 5  # direct leaves that are listed

_ADVICE = (
    ("ways", "use it in one layout, or keep a parameter for each use"),
    ("in place", "return what it would write, and read that"),
    ("same loop or branch", "compute the weight before the loop or the branch"),
    ("weight that has", "compute it in float32, without loops or solvers, of no stopped leaf"),
    ("in float64", "compute it in float32, as the norms and the sum are"),
    ("without the example", "leave a term without the example, such as decay, to the optimizer"),
    ("in a scalar", "a number of its own costs little; keep large arrays out of it"),
    ("scalars depend", "compute it once and use that, or from fewer numbers"),
    ("gather", "look up whole rows with an integer array: table[rows]"),
    ("carry of scan", "scan over a stack of parameters, or close over them, instead of carrying"),
    ("output of scan", "let the body of the scan use it, and return what depends on the example"),
    ("used elsewhere", "give every leaf of a computed weight this one use"),
)


def route_shares(plan: Sequence[LeafPlan], params: PyTree) -> dict[str, float]:
    """Returns the share of parameters on each route, the largest first."""
    sizes: collections.Counter[str] = collections.Counter()
    for leaf, array in zip(plan, jax.tree.leaves(params), strict=True):
        sizes[leaf.route] += int(np.prod(np.shape(array)))
    total = max(1, sum(sizes.values()))
    return {route: size / total for route, size in sizes.most_common()}


def _advice(reason: str) -> str:
    """Returns what to change so that a direct leaf becomes part of a product."""
    for words, text in _ADVICE:
        if words in reason:
            return text
    return "let it meet the example in a product, a convolution or a lookup"


def explain(loss_fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, example: PyTree) -> str:
    """Says how `clipped_sum` computes the gradients of a loss: a table to print.

    A leaf on the route "direct" is differentiated for each example: its gradients take memory for
    each example of a microbatch, and as a large matrix also time. On the route "derived", a weight
    that is a function of leaves is formed for a few examples at a time: that takes the time of
    per-example gradients, not their memory. Where the function only scales and shifts the columns
    of a leaf, as weight norm does, it takes one more product, and where it takes numbers one by
    one, as a mask does, one for each pair of tokens if those are few. All other routes need one
    ordinary backward pass; a number that scales a whole weight, such as a spectral norm, is taken
    out of its products in float32 outside of loops. Nothing is computed.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar.
        params: trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
        example: ONE example, likewise.

    Returns:
        The share of parameters by route; an estimate of temporaries, beside those of a plain
        gradient, for a batch taken whole (`clipped_sum` takes a large one in parts); the largest
        leaves whose gradients are formed for each example; the memory that direct leaves take, and
        the largest of them with the reason, the line of the model if JAX knows it, and an advice.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 4)), "scale": jnp.ones(8)}
    >>> loss = lambda params, x: jnp.sum(jnp.tanh((x * params["scale"]) @ params["w"]))
    >>> print(explain(loss, params, jnp.ones(8)))  # doctest: +ELLIPSIS
    route    share  leaves
    gram    80.0 %       1
    direct  20.0 %       1
    memory: about 1.4 of a plain gradient's for each example, and 160 bytes besides
    direct leaves take 32 bytes for each example of a microbatch, 0.20 of a plain gradient
    largest direct leaves:
      scale [8]: used by mul...; let it meet the example in a product, a convolution or a lookup
    """
    params = jax.tree.map(lambda x: x if hasattr(x, "shape") else np.float32(x), params)
    planned = make_plan(loss_fn, params, example)
    plan = leaf_plans(planned, params)
    leaves = jax.tree.leaves(params)
    counts = collections.Counter(leaf.route for leaf in plan)
    width = max([5, *(len(route) for route in counts)])
    lines = [f"{'route':<{width}}   share  leaves"]
    lines += [
        f"{route:<{width}}  {100 * share:4.1f} %  {counts[route]:6}"
        for route, share in route_shares(plan, params).items()
    ]
    lines.append(f"memory: {memory.sizes_of(planned, params)}")
    sizes = [int(np.prod(np.shape(x))) for x in leaves]
    order = sorted(range(len(leaves)), key=lambda i: -sizes[i])

    def named(i: int) -> str:
        at = f" at {plan[i].source}" if plan[i].source else ""
        return f"  {plan[i].path} {list(np.shape(leaves[i]))}: {plan[i].reason}{at}"

    formed = {leaf for mixed in planned.mixed if mixed.is_formed for leaf in mixed.leaves}
    if formed:
        lines.append("formed for each example, in the time of per-example gradients:")
        lines += [named(i) for i in order if i in formed][:_LARGEST]
        weights = [w for mixed in planned.mixed if mixed.is_formed for w in mixed.weights]
        if any(sites[0].view is None for sites in weights):  # else a leaf has several layouts
            lines.append(
                "  if you can, do to the output of the product what is done to these weights"
            )
    direct = [i for i in order if plan[i].route == "direct"]
    if not direct:
        return "\n".join(lines)
    size, total = sum(sizes[i] for i in direct), sum(sizes)
    lines += [
        f"direct leaves take {4 * size:,} bytes for each example of a microbatch, "
        f"{size / total:.2f} of a plain gradient",
        "largest direct leaves:",
    ]
    lines += [f"{named(i)}; {_advice(plan[i].reason)}" for i in direct[:_LARGEST]]
    return "\n".join(lines)
