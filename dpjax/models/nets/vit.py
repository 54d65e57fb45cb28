"""Vision transformer from a few blocks to Ti, S and B (Dosovitskiy et al., arXiv:2010.11929).

Pre-norm blocks, exact GELU, LayerNorm with epsilon 1e-6, no dropout and no `pre_logits`. The
query, key and value projections are separate square matrices, so that every published layout maps
on them exactly and each is one plain matmul under vmap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, compute_dtype, from_linen
from dpjax.models.nets import vit_weights
from dpjax.models.nets.blocks import Attention, Mlp

__all__ = ["SIZES", "ViTConfig", "vision_transformer"]


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    Args:
      width: token width.
      depth: number of blocks.
      heads: attention heads; divides width.
      mlp: width of the hidden layer of a block's MLP.
      patch: side of a patch, in pixels.
      image_size: side of the image, in pixels; a multiple of patch.
      channels: image channels.
      pooling: "cls" reads the class token after the last norm; "gap" averages the patch tokens,
        then applies the last norm (as timm's `global_pool="avg"`).
      class_token: whether there is a class token; needed by "cls".
    """

    width: int = 64
    depth: int = 3
    heads: int = 4
    mlp: int = 128
    patch: int = 7
    image_size: int = 28
    channels: int = 1
    pooling: str = "cls"
    class_token: bool = True

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "mlp", "patch", "image_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {self.patch=}.")
        if self.pooling not in ("cls", "gap"):
            raise ValueError(f"pooling={self.pooling!r} must be 'cls' or 'gap'.")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("class_token=False needs pooling='gap'.")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Length of the token sequence."""
        return self.grid**2 + int(self.class_token)

    def at(self, image_size: int) -> ViTConfig:
        """The same shape for another image size."""
        return dataclasses.replace(self, image_size=image_size)


_PATCH16 = ViTConfig(patch=16, image_size=224, channels=3)

SIZES: Mapping[str, ViTConfig] = MappingProxyType(
    {
        "mini": ViTConfig(),
        "ti16": dataclasses.replace(_PATCH16, width=192, depth=12, heads=3, mlp=768),
        "s16": dataclasses.replace(_PATCH16, width=384, depth=12, heads=6, mlp=1536),
        "b16": dataclasses.replace(_PATCH16, width=768, depth=12, heads=12, mlp=3072),
    }
)


class _Block(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        x = x + Attention(self.config.heads, self.dtype, name="attn")(norm(name="norm1")(x))
        return x + Mlp(self.config.mlp, self.dtype, name="mlp")(norm(name="norm2")(x))


class _Backbone(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.config
        batch = images.shape[:-3]
        # One matmul over flattened patches is the stride-`patch` convolution, and is what both
        # vmap and book-keeping handle fastest.
        grid = images.reshape(*batch, cfg.grid, cfg.patch, cfg.grid, cfg.patch, cfg.channels)
        patches = jnp.swapaxes(grid, -4, -3).reshape(*batch, cfg.grid**2, -1)
        x = nn.Dense(cfg.width, dtype=self.dtype, name="embed")(patches)
        if cfg.class_token:
            token = self.param("cls", nn.initializers.normal(1e-6), (cfg.width,))
            token = jnp.broadcast_to(token.astype(self.dtype), (*batch, 1, cfg.width))
            x = jnp.concatenate([token, x], axis=-2)
        position = self.param("pos_embed", nn.initializers.normal(0.02), (cfg.tokens, cfg.width))
        x = x + jnp.broadcast_to(position.astype(self.dtype), x.shape)
        for index in range(cfg.depth):
            x = _Block(cfg, self.dtype, name=f"blocks_{index}")(x)
        if cfg.pooling == "cls":
            pooled = x[..., 0, :]
        else:
            pooled = x[..., int(cfg.class_token) :, :].mean(axis=-2, dtype=jnp.float32)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(pooled)


def vision_transformer(
    config: ViTConfig,
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
) -> Model:
    """A ViT classifier.

    Parameters: `embed/{kernel,bias}`, `cls`, `pos_embed`, `blocks_i/{norm1,norm2}/{scale,bias}`,
    `blocks_i/attn/{query,key,value,out}/{kernel,bias}`, `blocks_i/mlp/{fc1,fc2}/{kernel,bias}`,
    `norm/{scale,bias}`, `head/{kernel,bias}`. `load` reads our own files, AugReg `.npz`, and timm
    and Hugging Face `.safetensors`.

    Args:
      config: the shape; `SIZES` has the usual ones.
      num_classes: number of classes.
      head_init: "zero", "random" or "near_zero".
      dtype: what the blocks compute in; parameters, softmax, norm statistics and logits are
        float32 whatever it is.

    Raises:
      ValueError: an argument is out of range.

    >>> model = vision_transformer(ViTConfig(), num_classes=10)
    >>> jax.eval_shape(model.init, jax.random.key(0))["blocks_0"]["attn"]["query"]["kernel"].shape
    (64, 64)
    """
    # Pixels to [-1, 1], as all AugReg descendants were trained.
    spec = InputSpec(
        config.image_size, config.channels, (0.5,) * config.channels, (0.5,) * config.channels
    )
    return from_linen(
        _Backbone(config, compute_dtype(dtype)),
        spec,
        partial(vit_weights.load, config),
        width=config.width,
        num_classes=num_classes,
        head_init=head_init,
    )
