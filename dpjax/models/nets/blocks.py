"""Self-attention and MLP of the transformers; leading axes are a batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["Attention", "Mlp"]

_xavier = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head self-attention with separate square projections (arXiv:1706.03762)."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None = None, bias: jax.Array | None = None
    ) -> jax.Array:
        """Attends among the tokens of each sequence.

        Args:
            x: `[..., tokens, width]`.
            keep: bool `[..., tokens]`, False for tokens that are not attended to; None keeps all.
            bias: `[heads, queries, keys]`, added to the scores before the softmax.

        Returns:
            `[..., tokens, width]`.
        """
        width = x.shape[-1]
        dense = partial(nn.Dense, width, dtype=self.dtype, kernel_init=_xavier)
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query = dense(name="query")(x).reshape(split) * (split[-1] ** -0.5)
        key = dense(name="key")(x).reshape(split)
        value = dense(name="value")(x).reshape(split)
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key).astype(jnp.float32)
        if bias is not None:
            scores = scores + jnp.broadcast_to(bias, scores.shape)
        if keep is not None:
            # Finite, not -inf: the softmax of a sequence of padding only would be NaN.
            kept = jnp.broadcast_to(keep[..., None, None, :], scores.shape)
            scores = jnp.where(kept, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        return dense(name="out")(mixed.reshape(x.shape))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to `[..., width]`."""
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_xavier)
        hidden = jax.nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        return dense(x.shape[-1], name="fc2")(hidden)
