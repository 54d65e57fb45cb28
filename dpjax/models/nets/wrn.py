"""Wide ResNets for training from scratch under DP (De et al., arXiv:2204.13650, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, compute_dtype, from_linen
from dpjax.models.nets.layers import GroupNorm, StandardizedConv
from dpjax.models.weights import load_plain

__all__ = ["WRN_16_4", "WideResNetConfig", "wide_resnet"]

_STEM = 16
_STAGES = 3


@dataclass(frozen=True)
class WideResNetConfig:
    """Shape of a wide ResNet.

    Args:
        depth: number of layers, 6 n + 4 for n blocks in each of the three stages.
        widen: the stages have widths 16, 32 and 64 times this.
        groups: groups of the norms; divides 16.
        image_size: side of the image, in pixels.
        channels: image channels.
    """

    depth: int = 16
    widen: int = 4
    groups: int = 16
    image_size: int = 32
    channels: int = 3

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth={self.depth} must be 6 n + 4 with n >= 1.")
        for field in ("widen", "groups", "image_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if _STEM % self.groups:
            raise ValueError(f"groups={self.groups} must divide {_STEM}.")

    @property
    def features(self) -> int:
        """Number of channels after the last stage."""
        return _STEM * self.widen * 2 ** (_STAGES - 1)


WRN_16_4 = WideResNetConfig()


class _Block(nn.Module):
    width: int
    stride: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def convolution(size: int, stride: int, name: str) -> StandardizedConv:
            return StandardizedConv(self.width, size, stride, self.dtype, True, name=name)

        norm = partial(GroupNorm, self.groups, self.dtype)
        y = jax.nn.relu(norm(name="norm1")(x))
        if x.shape[-1] != self.width or self.stride > 1:
            x = convolution(1, self.stride, "shortcut")(y)
        y = convolution(3, self.stride, "conv1")(y)
        return x + convolution(3, 1, "conv2")(jax.nn.relu(norm(name="norm2")(y)))


class _Backbone(nn.Module):
    config: WideResNetConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.config
        x = StandardizedConv(_STEM, 3, 1, self.dtype, True, name="stem")(images)
        kind = nn.remat(_Block) if self.remat else _Block
        for stage in range(_STAGES):
            for block in range((cfg.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                width = _STEM * cfg.widen * 2**stage
                name = f"stages_{stage}_blocks_{block}"
                x = kind(width, stride, cfg.groups, self.dtype, name=name)(x)
        x = jax.nn.relu(GroupNorm(cfg.groups, self.dtype, name="norm")(x))
        return x.mean(axis=(-3, -2), dtype=jnp.float32)


def wide_resnet(
    config: WideResNetConfig,
    num_classes: int,
    *,
    head_init: str = "random",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a WRN with group norm and scaled weight standardization; `WRN_16_4` is usual.

    Norm paths: `stages_i_blocks_j/{norm1,norm2}` and `norm`, each with scale and bias. `load` reads
    files of `save_weights`; no weights are published in this layout.

    Arguments and errors are those of `vision_transformer`.
    """
    # Constants: statistics of the training data would be private.
    half = (0.5,) * config.channels
    return from_linen(
        _Backbone(config, compute_dtype(dtype), remat),
        InputSpec(config.image_size, config.channels, half, half),
        load_plain,
        width=config.features,
        num_classes=num_classes,
        head_init=head_init,
    )
