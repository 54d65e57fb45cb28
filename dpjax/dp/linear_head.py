"""The clipped gradient sum of a linear softmax head, in closed form.

The gradient of one example is an outer product: with the residual r = softmax(logits) -
onehot(label), it is x r^T for the kernel and r for the bias. The norms are |x||r| and |r|, and the
clipped sum is X^T diag(factors) R. It costs as much as an ordinary step, and `vmap` trains any
number of heads at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpjax.dp.clipping import ClippedSum, ClipRule, PerExample

__all__ = ["Rows", "clipped_head_sum", "head_sum", "losses", "rows"]

PyTree = Any

_TINY = 2.0**-126  # smallest normal float32: smaller products become 0


class Rows(NamedTuple):
    """Examples of a head.

    Attributes:
        inputs: features, float32 `[batch, width]`.
        squares: squared norms of the inputs `[batch]`. A non-finite input is stored as zeros, and
            its square as inf, so that the example is dropped.
        labels: int32 `[batch]`.
    """

    inputs: jax.Array
    squares: jax.Array
    labels: jax.Array

    def take(self, indices: jax.Array) -> Rows:
        """Returns the rows at `indices`; padding (-1) gets row 0, which the mask must drop."""
        return Rows(*(jnp.take(x, jnp.maximum(indices, 0), axis=0) for x in self))


def rows(inputs: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> Rows:
    """Prepares features `[batch, width]` and labels `[batch]`: the norms are computed only once."""
    inputs = jnp.asarray(inputs, jnp.float32)
    finite = jnp.all(jnp.isfinite(inputs), axis=1)
    squares = jnp.where(finite, jnp.sum(jnp.square(inputs), axis=1), jnp.inf)
    inputs = jnp.where(finite[:, None], inputs, 0.0)  # 0 * NaN would be NaN
    return Rows(inputs, squares, jnp.asarray(labels, jnp.int32))


def clipped_head_sum(
    params: PyTree, rule: ClipRule, batch: Rows, mask: jax.Array
) -> tuple[ClippedSum, PerExample]:
    """Computes `clipped_sum` of the cross-entropy of a linear head, several times faster.

    Args:
        params: `{name: {"kernel": [width, classes], "bias": [classes]}}`.
        rule: maps gradient norms to scale factors.
        batch: the examples.
        mask: bool `[batch]`, False for padding.

    Returns:
        The sum, a tree like `params`, and the facts of each example.

    Guarantees:
        Those of `clipped_sum`; padding and non-finite examples contribute exactly zero.
    """
    name, head = _only(params)
    loss, residual = losses(head, batch)
    # Squares of small numbers underflow to 0, which could make a norm too small and its factor too
    # large. Adding the most that can be lost turns both norms into upper bounds.
    residual_norms = jnp.sqrt(jnp.sum(jnp.square(residual), 1) + residual.shape[1] * _TINY)
    input_norms = jnp.sqrt(batch.squares + batch.inputs.shape[1] * _TINY)
    norms = {"bias": residual_norms, "kernel": input_norms * residual_norms}
    groups = dict(zip(("bias", "kernel"), rule.groups(params)))  # jax.tree.leaves order
    by_group = [
        jnp.linalg.norm(
            jnp.stack([norms[leaf] for leaf in norms if groups[leaf] == group], axis=1), axis=1
        )
        for group in range(rule.num_groups(params))
    ]
    stacked = jnp.stack(by_group, axis=1)
    use = mask & jnp.isfinite(loss) & jnp.all(jnp.isfinite(stacked), axis=1)
    factors = jnp.where(use[:, None], jax.vmap(rule.factors)(stacked), 0.0)
    weighted = {leaf: residual * factors[:, group][:, None] for leaf, group in groups.items()}
    value = _sum(batch, weighted, use)
    facts = PerExample(
        loss=jnp.where(mask, loss, 0.0),
        norms=jnp.where(mask[:, None], stacked, 0.0),
        factors=factors,
        real=mask,
    )
    return ClippedSum({name: value}, rule.sensitivity()), facts


def head_sum(params: PyTree, batch: Rows, mask: jax.Array) -> tuple[PyTree, PerExample]:
    """Returns the ordinary gradient of the summed cross-entropy: neither clipped nor private."""
    name, head = _only(params)
    loss, residual = losses(head, batch)
    ones = jnp.ones((mask.shape[0], 1))
    facts = PerExample(jnp.where(mask, loss, 0.0), 0 * ones, ones, mask)
    use = mask & jnp.isfinite(batch.squares)
    return {name: _sum(batch, {"bias": residual, "kernel": residual}, use)}, facts


def _only(params: PyTree) -> tuple[str, Any]:
    heads = list(params.items())
    if len(heads) != 1 or set(heads[0][1]) != {"kernel", "bias"}:
        raise ValueError(f"params must be {{name: {{'kernel', 'bias'}}}}, got {params}.")
    return heads[0]


def losses(head: Any, batch: Rows) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies `[n]` and their derivatives with respect to the logits `[n, classes]`."""
    logits = batch.inputs @ head["kernel"]
    logits = logits + jnp.broadcast_to(head["bias"], logits.shape)
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hot = jax.nn.one_hot(batch.labels, logits.shape[1], dtype=jnp.float32)
    return entropies, jax.nn.softmax(logits) - hot


def _sum(batch: Rows, weighted: dict[str, jax.Array], use: jax.Array) -> dict[str, jax.Array]:
    """Sums outer products in full float32.

    Faster, less precise products would sum other numbers than those whose norms were bounded.
    """
    weighted = {leaf: jnp.where(use[:, None], w, 0.0) for leaf, w in weighted.items()}
    inputs, kernel = batch.inputs, weighted["kernel"]
    product = jnp.matmul(inputs.T, kernel, precision=jax.lax.Precision.HIGHEST)
    return {"bias": jnp.sum(weighted["bias"], axis=0), "kernel": product}
