"""Causal decoders: RMSNorm, rotary positions, grouped-query attention and SwiGLU.

The family of Llama (arXiv:2302.13971; grouped queries arXiv:2305.13245, rotary positions
arXiv:2104.09864) and, with a bias on query, key and value, of Qwen2.5. Sizes are data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import Model, Params, TextSpec, compute_dtype, flatten
from dpjax.models.weights import Source, load_weights, read_tensors, translate

__all__ = ["DECODERS", "Cache", "DecoderConfig", "decode", "decoder", "empty_cache",
           "output_logits", "to_hugging_face"]  # fmt: skip

_normal = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Args:
        vocab_size: number of token ids.
        width: token width.
        depth: number of blocks.
        heads: query heads.
        kv_heads: key and value heads; divides heads.
        mlp: width of the hidden layer of a block's MLP.
        head_dim: width of a head, even; None for width / heads.
        theta: base of the rotary frequencies.
        rope_factor: factor by which wavelengths longer than `rope_original` are stretched, as in
            Llama 3.1 and later, with their low and high frequency factors of 1 and 4; 1: off.
        rope_original: context length before stretching, in tokens.
        epsilon: of the norms.
        tied: whether the output layer is the transposed embedding table.
        qkv_bias: whether query, key and value have a bias.
        max_length: tokens of every (padded or cut) sequence.
    """

    vocab_size: int = 49152
    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3
    mlp: int = 1536
    head_dim: int | None = None
    theta: float = 100_000.0
    rope_factor: float = 1.0
    rope_original: int = 8192
    epsilon: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    max_length: int = 128

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "depth", "heads", "kv_heads", "mlp", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} must be even.")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.heads


DECODERS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "tiny": DecoderConfig(vocab_size=512, width=64, depth=2, heads=4, kv_heads=2, mlp=128,
                              theta=10_000.0, max_length=64),
        "smollm2_135m": DecoderConfig(),
        "smollm2_360m": DecoderConfig(width=960, depth=32, heads=15, kv_heads=5, mlp=2560),
        "llama3_2_1b": DecoderConfig(vocab_size=128256, width=2048, depth=16, heads=32, kv_heads=8,
                                     mlp=8192, theta=500_000.0, rope_factor=32.0),
        "qwen2_5_0_5b": DecoderConfig(vocab_size=151936, width=896, depth=24, heads=14, kv_heads=2,
                                      mlp=4864, theta=1_000_000.0, epsilon=1e-6, qkv_bias=True),
    }
)  # fmt: skip


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, `[depth, batch, length, kv_heads, head_dim]`."""

    keys: jax.Array
    values: jax.Array


def _frequencies(cfg: DecoderConfig) -> np.ndarray:
    """Rotary frequencies, radians a token, `[head_dim / 2]`."""
    size = cfg.head_width
    frequency = cfg.theta ** (-np.arange(0, size, 2) / size)
    if cfg.rope_factor == 1.0:
        return frequency
    # How often a wave turns within the original context: below 1 it is stretched, from 4 on it
    # stays, and between them the two are mixed.
    turns = cfg.rope_original * frequency / (2 * math.pi)
    stay = np.clip((turns - 1) / (4 - 1), 0.0, 1.0)
    return frequency * (stay + (1 - stay) / cfg.rope_factor)


def _rotated(x: jax.Array, positions: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """Turns pairs (i, i + head_dim / 2) of `[..., tokens, heads, head_dim]` by their position."""
    frequencies = jnp.asarray(_frequencies(cfg), jnp.float32)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    cos, sin = (jnp.broadcast_to(f(angles)[..., None, :], shape) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


class _RMSNorm(nn.Module):
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normal = x * jnp.broadcast_to(jax.lax.rsqrt(mean + self.epsilon), x.shape)
        return (normal * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


class _Attention(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        size, groups = cfg.head_width, cfg.heads // cfg.kv_heads

        def project(name: str, heads: int) -> jax.Array:
            out = dense(heads * size, use_bias=cfg.qkv_bias, name=name)(x)
            return out.reshape(*x.shape[:-1], heads, size)

        query = _rotated(project("query", cfg.heads), positions, cfg)
        key = _rotated(project("key", cfg.kv_heads), positions, cfg)
        value = project("value", cfg.kv_heads)
        if cache is None:
            seen = positions
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache.keys.at[rows, positions].set(key)
            value = cache.values.at[rows, positions].set(value)
            cache, seen = Cache(key, value), jnp.arange(key.shape[1])
        query = query.reshape(*x.shape[:-1], cfg.kv_heads, groups, size) * size**-0.5
        scores = jnp.einsum("...qhgd,...khd->...hgqk", query, key).astype(jnp.float32)
        # Padding stands at the end, so that no real token attends to it.
        past = jnp.subtract.outer(positions, seen) >= 0  # [..., tokens, tokens]
        past = jnp.broadcast_to(past[..., None, None, :, :], scores.shape)
        scores = jnp.where(past, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("...hgqk,...khd->...qhgd", weights, value)
        mixed = mixed.reshape(*x.shape[:-1], cfg.heads * size)
        return dense(cfg.width, use_bias=False, name="out")(mixed), cache


class _Mlp(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_normal)
        hidden = nn.silu(dense(self.config.mlp, name="gate")(x))
        hidden = hidden * dense(self.config.mlp, name="up")(x)
        return dense(x.shape[-1], name="down")(hidden)


class _Block(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        norm = partial(_RMSNorm, self.config.epsilon, self.dtype)
        attention = _Attention(self.config, self.dtype, name="attn")
        mixed, cache = attention(norm(name="norm1")(x), positions, cache)
        x = x + mixed
        return x + _Mlp(self.config, self.dtype, name="mlp")(norm(name="norm2")(x)), cache


class _Embed(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.param("tokens", _normal, (self.config.vocab_size, self.config.width))
        return jnp.asarray(table)[tokens]  # a table of NumPy cannot be read at traced rows


class _Backbone(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        x = _Embed(cfg, name="embed")(tokens).astype(self.dtype)
        block = nn.remat(_Block) if self.remat else _Block
        layers = []
        for index in range(cfg.depth):
            layer = None if cache is None else Cache(cache.keys[index], cache.values[index])
            x, layer = block(cfg, self.dtype, name=f"blocks_{index}")(x, positions, layer)
            layers.append(layer)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        return _RMSNorm(cfg.epsilon, self.dtype, name="norm")(x), cache


def output_logits(params: Params, features: jax.Array) -> jax.Array:
    """Applies the output layer: the head, or the transposed embedding table if there is none.

    Args:
        params: of a decoder.
        features: `[..., width]`; their dtype is that of the product.

    Returns:
        float32 logits `[..., vocab_size]`.
    """
    tied = "head" not in params
    table = params["embed"]["tokens"] if tied else params["head"]["kernel"]
    return jax.lax.dot_general(
        features,
        table.astype(features.dtype),
        (((features.ndim - 1,), (1 if tied else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def decoder(
    config: DecoderConfig,
    num_classes: int = 0,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a causal language model: `apply` gives the logits of every token's successor.

    Parameters: `embed/tokens`, `blocks_i/attn/{query,key,value,out}/kernel` (and `bias`, see
    `DecoderConfig.qkv_bias`), `blocks_i/mlp/{gate,up,down}/kernel`, `blocks_i/{norm1,norm2}/scale`
    (each before its layer), `norm/scale` and, unless tied, `head/kernel`. `load` reads Hugging
    Face `.safetensors` of Llama and Qwen2, their `.safetensors.index.json`, `.gguf` files, and
    files of `save_weights`; the output layer is always loaded.

    Args:
        config: the shape; `DECODERS` has the usual ones.
        num_classes: not used: the classes are the tokens.
        head_init: not used: the output layer is pretrained like the rest.
        dtype: in which layers compute; norms, attention weights and logits are float32.
        remat: see `vision_transformer`.

    Returns:
        The model. `features` is `[..., tokens, width]` of the compute dtype, `apply` float32
        `[..., tokens, vocab_size]`, for tokens int32 `[..., tokens]` of any length.
    """
    net = _Backbone(config, compute_dtype(dtype), remat)

    def init(key: jax.Array) -> Params:
        body, head = jax.random.split(key)
        tokens = jnp.zeros((1,), jnp.int32)
        params: Params = dict(net.init(body, tokens, jnp.arange(1))["params"])
        if not config.tied:
            params["head"] = {"kernel": _normal(head, (config.width, config.vocab_size))}
        return params

    def features(params: Params, tokens: jax.Array) -> jax.Array:
        body = {name: leaf for name, leaf in params.items() if name != "head"}
        return net.apply({"params": body}, tokens, jnp.arange(tokens.shape[-1]))[0]

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return output_logits(params, features(params, tokens))

    def load(params: Params, path: str, *, head: bool = False) -> Params:
        tensors = read_tensors(path)
        if set(tensors) & set(flatten(params)):
            return load_weights(path, params)
        table = _table(config, gguf="token_embd.weight" in tensors)
        # The head is no new layer here, whatever `head` says. A tied file may repeat the table.
        ignore = _IGNORE if not config.tied else rf"{_IGNORE}|^lm_head\.weight$|^output\.weight$"
        return translate(params, tensors, table, origin=path, head=None, ignore=ignore)

    spec = TextSpec(config.max_length, config.vocab_size, causal=True)
    return Model(init, apply, load, "embed" if config.tied else "head", spec, features)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """Returns a cache for `batch` sequences of up to `length` tokens."""
    shape = (config.depth, batch, length, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def decode(
    config: DecoderConfig, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads tokens after those in the cache.

    Args:
        config: the shape.
        params: plain weights.
        tokens: int32 `[batch, tokens]`.
        positions: int32 `[batch, tokens]`, where each stands in its sequence. What the cache holds
            there is overwritten, and what it holds beyond a token is not seen by that token.
        cache: of `empty_cache`, or of an earlier call.

    Returns:
        Features `[batch, tokens, width]`, the input of `output_logits`, and the cache with the
        tokens in it.
    """
    net = _Backbone(config, cache.keys.dtype)
    body = {name: leaf for name, leaf in params.items() if name != "head"}
    result: Any = net.apply({"params": body}, tokens, positions, cache)
    return result[0], result[1]


# Published weights: Hugging Face's names of Llama and Qwen2, and GGUF's.

_IGNORE = r"rotary_emb\.inv_freq$|^rope_freqs\.weight$"

# Ours, Hugging Face's and GGUF's name of what a block has.
_LAYERS = (
    ("attn/query", "self_attn.q_proj", "attn_q"),
    ("attn/key", "self_attn.k_proj", "attn_k"),
    ("attn/value", "self_attn.v_proj", "attn_v"),
    ("attn/out", "self_attn.o_proj", "attn_output"),
    ("mlp/gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp/up", "mlp.up_proj", "ffn_up"),
    ("mlp/down", "mlp.down_proj", "ffn_down"),
    ("norm1", "input_layernorm", "attn_norm"),
    ("norm2", "post_attention_layernorm", "ffn_norm"),
)


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T)


def _unpaired(heads: int, tensor: np.ndarray) -> np.ndarray:
    """GGUF files of Llama keep pairs (2i, 2i + 1) of a head's outputs where we have halves."""
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2)
    return _transposed(pairs.reshape(tensor.shape))


def _table(cfg: DecoderConfig, *, gguf: bool = False) -> dict[str, Source]:
    d, queries, keys = cfg.width, cfg.heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    outer = ("token_embd", "output_norm", "output", "blk") if gguf else (
        "model.embed_tokens", "model.norm", "lm_head", "model.layers")  # fmt: skip
    embed, norm, head, blocks = outer
    table = {
        "embed/tokens": Source(f"{embed}.weight", (cfg.vocab_size, d)),
        "norm/scale": Source(f"{norm}.weight", (d,)),
    }
    if not cfg.tied:
        table["head/kernel"] = Source(f"{head}.weight", (cfg.vocab_size, d), _transposed)
    outputs = {"query": queries, "key": keys, "value": keys, "gate": cfg.mlp, "up": cfg.mlp}
    inputs = {"out": queries, "down": cfg.mlp}
    for index in range(cfg.depth):
        for ours, theirs, short in _LAYERS:
            path, name = f"blocks_{index}/{ours}", f"{blocks}.{index}.{short if gguf else theirs}"
            kind = ours.split("/")[-1]
            if kind.startswith("norm"):
                table[f"{path}/scale"] = Source(f"{name}.weight", (d,))
                continue
            shape = outputs.get(kind, d), inputs.get(kind, d)
            convert = _transposed
            if gguf and kind in ("query", "key") and not cfg.qkv_bias:
                convert = partial(_unpaired, cfg.heads if kind == "query" else cfg.kv_heads)
            table[f"{path}/kernel"] = Source(f"{name}.weight", shape, convert)
            if cfg.qkv_bias and kind in ("query", "key", "value"):
                table[f"{path}/bias"] = Source(f"{name}.bias", (outputs[kind],))
    return table


def to_hugging_face(params: Params, config: DecoderConfig) -> tuple[dict[str, np.ndarray], dict]:
    """Returns plain weights as transformers names them, and the `config.json` to put beside them.

    Args:
        params: plain weights of a decoder, adapters merged.
        config: its shape.
    """
    flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(params).items()}
    tensors = {}
    for path, source in _table(config).items():
        value = flat[path]
        tensors[source.name] = _transposed(value) if path.endswith("/kernel") else value
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.theta}
    if config.rope_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": config.rope_original,
        }
    kind = "qwen2" if config.qkv_bias else "llama"
    shape = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.theta,  # where older versions look for it
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "max_position_embeddings": max(config.max_length, config.rope_original),
        "torch_dtype": "float32",
    }
    if config.rope_factor != 1.0:
        shape["rope_scaling"] = rope
    return tensors, shape
