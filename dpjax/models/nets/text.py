"""A BERT-style text encoder (arXiv:1810.04805) with a head; DistilBERT and MPNet are variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import Model, TextSpec, compute_dtype, from_linen
from dpjax.models.nets.blocks import Attention, Mlp
from dpjax.models.weights import Source, Tensors, loader

__all__ = ["TEXT_SIZES", "TextConfig", "text_encoder"]


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text encoder.

    Args:
        vocab_size: number of token ids.
        width: token width.
        depth: number of blocks.
        heads: attention heads; divides width.
        mlp: width of the hidden layer of a block's MLP.
        positions: number of position embeddings.
        first_position: row of the table of positions that the first token takes.
        max_length: tokens of every (padded or truncated) sequence; at most positions.
        token_types: number of token-type embeddings (all tokens here have type 0); 0 for
            DistilBERT and MPNet.
        relative: rows of a table of attention biases by the distance of two tokens, which all
            blocks share (arXiv:2004.09297; buckets as in arXiv:1910.10683); 0 for none.
        epsilon: of the norms.
        pad_id: id of the padding token, which is masked out.
        pooling: "mean" averages the tokens that are not padding; "cls" takes the first token.
    """

    vocab_size: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp: int = 1536
    positions: int = 512
    first_position: int = 0
    max_length: int = 128
    token_types: int = 2
    relative: int = 0
    epsilon: float = 1e-12
    pad_id: int = 0
    pooling: str = "mean"

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "mlp", "positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        for field in ("token_types", "first_position", "relative"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 0.")
        room = self.positions - self.first_position
        if self.max_length > room:
            raise ValueError(f"max_length={self.max_length} must be <= {room}, the positions left.")
        if self.relative % 4:
            raise ValueError(f"relative={self.relative} must be a multiple of 4.")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling={self.pooling!r} must be 'mean' or 'cls'.")


_BASE = TextConfig(width=768, depth=12, heads=12, mlp=3072, pooling="cls")
_MPNET = dataclasses.replace(
    _BASE, vocab_size=30527, positions=514, first_position=2, token_types=0, pad_id=1, relative=32,
    epsilon=1e-5, pooling="mean",
)  # fmt: skip

TEXT_SIZES: Mapping[str, TextConfig] = MappingProxyType(
    {
        "minilm_l6": TextConfig(),
        "bert_base": _BASE,
        "distilbert_base": dataclasses.replace(_BASE, depth=6, token_types=0),
        "mpnet_base": _MPNET,
    }
)


class _Embed(nn.Module):
    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.config

        def table(name: str, rows: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.02), (rows, cfg.width))

        x = table("word", cfg.vocab_size)[tokens]
        positions = slice(cfg.first_position, cfg.first_position + tokens.shape[-1])
        x = x + jnp.broadcast_to(table("position", cfg.positions)[positions], x.shape)
        if cfg.token_types:
            x = x + jnp.broadcast_to(table("token_type", cfg.token_types)[0], x.shape)
        return nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype, name="norm")(x)


class _Relative(nn.Module):
    """Attention biases by distance: `[heads, tokens, tokens]`."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: int) -> jax.Array:
        rows = self.config.relative
        table = self.param("table", nn.initializers.normal(0.02), (rows, self.config.heads))
        return jnp.moveaxis(table[_buckets(tokens, rows)], -1, 0)


def _buckets(tokens: int, rows: int, furthest: int = 128) -> np.ndarray:
    """Row of the table for every (query, key): half of the rows for keys that come later.

    Of each half, the first half are single distances, and the rest grow logarithmically up to
    `furthest`; all beyond share the last one.
    """
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half, exact = rows // 2, rows // 4
    far = np.maximum(np.abs(distance), exact)
    # In float32, as the published weights were trained: it decides the bucket at the edges.
    ratio = np.log(far.astype(np.float32) / np.float32(exact)) / math.log(furthest / exact)
    large = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(np.abs(distance) < exact, np.abs(distance), large) + half * (distance > 0)


class _Block(nn.Module):
    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array, bias: jax.Array | None) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=self.config.epsilon, dtype=self.dtype)
        y = Attention(self.config.heads, self.dtype, name="attn")(x, keep, bias)
        x = norm(name="norm1")(x + y)
        return norm(name="norm2")(x + Mlp(self.config.mlp, self.dtype, name="mlp")(x))


class _Backbone(nn.Module):
    config: TextConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        keep = tokens != self.config.pad_id
        x = _Embed(self.config, self.dtype, name="embed")(tokens)
        bias = None
        if self.config.relative:
            bias = _Relative(self.config, name="relative")(tokens.shape[-1])
        block = nn.remat(_Block) if self.remat else _Block
        for index in range(self.config.depth):
            x = block(self.config, self.dtype, name=f"blocks_{index}")(x, keep, bias)
        x = x.astype(jnp.float32)
        if self.config.pooling == "cls":
            return x[..., 0, :]
        weights = jnp.broadcast_to(keep[..., None], x.shape).astype(jnp.float32)
        # At least one: a sequence of padding only would be 0 / 0.
        count = jnp.maximum(weights.sum(axis=-2), 1.0)
        return (x * weights).sum(axis=-2) / count


def text_encoder(
    config: TextConfig,
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a classifier of token sequences; attention and the mean ignore padding.

    Parameters: `embed/{word,position,token_type}`, `embed/norm/{scale,bias}`,
    `blocks_i/attn/{query,key,value,out}/{kernel,bias}`, `blocks_i/mlp/{fc1,fc2}/{kernel,bias}`,
    `blocks_i/{norm1,norm2}/{scale,bias}` (each after its residual sum), `relative/table` where
    there are relative biases, `head/{kernel,bias}`. The published pooler and language-model heads
    are not part of it. `load` reads Hugging Face `.safetensors` of BERT, DistilBERT
    (arXiv:1910.01108) and MPNet (arXiv:2004.09297), and files of `save_weights`.

    Arguments and errors are those of `vision_transformer`; `TEXT_SIZES` has the usual shapes.
    """
    return from_linen(
        _Backbone(config, compute_dtype(dtype), remat),
        TextSpec(config.max_length, config.vocab_size, config.pad_id),
        loader(partial(_table, config), ignore=_IGNORE),
        width=config.width,
        num_classes=num_classes,
        head_init=head_init,
    )


# Published weights: Hugging Face `.safetensors`, and `save_weights` files.

# Buffers, and layers between the features and the published heads.
_IGNORE = (
    r"position_ids$|(^|\.)pooler\.|^cls\.|^pre_classifier\.|^lm_head\."
    r"|^vocab_(transform|layer_norm|projector)\."
)

_BERT = {
    "attn/query": "attention.self.query",
    "attn/key": "attention.self.key",
    "attn/value": "attention.self.value",
    "attn/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTILBERT = {
    "attn/query": "attention.q_lin",
    "attn/key": "attention.k_lin",
    "attn/value": "attention.v_lin",
    "attn/out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "mlp/fc1": "ffn.lin1",
    "mlp/fc2": "ffn.lin2",
    "norm2": "output_layer_norm",
}
_MPNET_NAMES = _BERT | {
    "attn/query": "attention.attn.q",
    "attn/key": "attention.attn.k",
    "attn/value": "attention.attn.v",
    "attn/out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T)


def _table(cfg: TextConfig, tensors: Tensors, classes: int) -> dict[str, Source]:
    layer, names = "encoder.layer", _MPNET_NAMES if cfg.relative else _BERT
    if any(".q_lin." in name for name in tensors):
        layer, names = "transformer.layer", _DISTILBERT
    word = "embeddings.word_embeddings.weight"
    prefix = next((p for p in ("bert.", "distilbert.", "mpnet.") if p + word in tensors), "")
    d, embed = cfg.width, f"{prefix}embeddings"
    # The oldest files spell the parameters of norms in their own way.
    old = f"{embed}.LayerNorm.gamma" in tensors
    scale, bias = ("gamma", "beta") if old else ("weight", "bias")
    table = {
        "embed/word": Source(f"{embed}.word_embeddings.weight", (cfg.vocab_size, d)),
        "embed/position": Source(f"{embed}.position_embeddings.weight", (cfg.positions, d)),
        "embed/norm/scale": Source(f"{embed}.LayerNorm.{scale}", (d,)),
        "embed/norm/bias": Source(f"{embed}.LayerNorm.{bias}", (d,)),
        "head/kernel": Source("classifier.weight", (classes, d), _transposed),
        "head/bias": Source("classifier.bias", (classes,)),
    }
    if cfg.token_types:
        table["embed/token_type"] = Source(
            f"{embed}.token_type_embeddings.weight", (cfg.token_types, d)
        )
    if cfg.relative:
        name = f"{prefix}encoder.relative_attention_bias.weight"
        table["relative/table"] = Source(name, (cfg.relative, cfg.heads))
    for index in range(cfg.depth):
        for ours, theirs in names.items():
            path, name = f"blocks_{index}/{ours}", f"{prefix}{layer}.{index}.{theirs}"
            if ours.startswith("norm"):
                table[f"{path}/scale"] = Source(f"{name}.{scale}", (d,))
                table[f"{path}/bias"] = Source(f"{name}.{bias}", (d,))
                continue
            inputs = cfg.mlp if ours == "mlp/fc2" else d
            outputs = cfg.mlp if ours == "mlp/fc1" else d
            table[f"{path}/kernel"] = Source(f"{name}.weight", (outputs, inputs), _transposed)
            table[f"{path}/bias"] = Source(f"{name}.bias", (outputs,))
    return table
