"""ResNet-v2 with group norm and weight standardization, in the layout of BiT (arXiv:1912.11370)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, compute_dtype, from_linen
from dpjax.models.nets.layers import GroupNorm, StandardizedConv
from dpjax.models.weights import Source, Tensors, loader

__all__ = ["RESNETS", "ResNetConfig", "resnet_v2"]

_EXPANSION = 4


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a pre-activation bottleneck ResNet.

    Args:
        depths: blocks of each stage; stage i has bottleneck width `width * 2**i`.
        width: bottleneck width of the first stage, and of the stem.
        groups: groups of the norms; divides width.
        image_size: side of the image, in pixels.
        channels: image channels.
    """

    depths: tuple[int, ...]
    width: int = 64
    groups: int = 32
    image_size: int = 224
    channels: int = 3

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must be one or more numbers >= 1.")
        for field in ("width", "groups", "image_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if self.width % self.groups:
            raise ValueError(f"groups={self.groups} must divide width={self.width}.")

    @property
    def features(self) -> int:
        """Number of channels after the last stage."""
        return _EXPANSION * self.width * 2 ** (len(self.depths) - 1)


RESNETS: Mapping[str, ResNetConfig] = MappingProxyType(
    {
        "mini": ResNetConfig(depths=(1, 1), width=16, groups=4, image_size=32),
        "r50x1": ResNetConfig(depths=(3, 4, 6, 3)),
        "r101x1": ResNetConfig(depths=(3, 4, 23, 3)),
    }
)


class _Block(nn.Module):
    width: int
    stride: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def convolution(features: int, size: int, stride: int, name: str) -> StandardizedConv:
            return StandardizedConv(features, size, stride, self.dtype, name=name)

        norm = partial(GroupNorm, self.groups, self.dtype)
        out = _EXPANSION * self.width
        y = jax.nn.relu(norm(name="norm1")(x))
        if x.shape[-1] != out or self.stride > 1:
            x = convolution(out, 1, self.stride, "shortcut")(y)
        y = convolution(self.width, 1, 1, "conv1")(y)
        y = convolution(self.width, 3, self.stride, "conv2")(jax.nn.relu(norm(name="norm2")(y)))
        y = convolution(out, 1, 1, "conv3")(jax.nn.relu(norm(name="norm3")(y)))
        return x + y


class _Backbone(nn.Module):
    config: ResNetConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.config
        x = StandardizedConv(cfg.width, 7, 2, self.dtype, name="stem")(images)
        # Padded with zeros, not with -inf, like the network that the published weights come from.
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        kind = nn.remat(_Block) if self.remat else _Block
        for stage, depth in enumerate(cfg.depths):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                width = cfg.width * 2**stage
                name = f"stages_{stage}_blocks_{block}"
                x = kind(width, stride, cfg.groups, self.dtype, name=name)(x)
        x = jax.nn.relu(GroupNorm(cfg.groups, self.dtype, name="norm")(x))
        return x.mean(axis=(-3, -2), dtype=jnp.float32)


def _drop_ones(kernel: np.ndarray) -> np.ndarray:
    return kernel[0, 0]


def _bit(cfg: ResNetConfig, tensors: Tensors, classes: int) -> dict[str, Source]:
    del tensors  # of one layout
    kernel = "standardized_conv2d/kernel"
    table = {
        "stem/kernel": Source(f"resnet/root_block/{kernel}", (7, 7, cfg.channels, cfg.width)),
        "norm/scale": Source("resnet/group_norm/gamma", (cfg.features,)),
        "norm/bias": Source("resnet/group_norm/beta", (cfg.features,)),
        "head/kernel": Source(
            "resnet/head/conv2d/kernel", (1, 1, cfg.features, classes), _drop_ones
        ),
        "head/bias": Source("resnet/head/conv2d/bias", (classes,)),
    }
    inputs = cfg.width
    for stage, depth in enumerate(cfg.depths):
        width = cfg.width * 2**stage
        out = _EXPANSION * width
        for block in range(depth):
            ours = f"stages_{stage}_blocks_{block}"
            theirs = f"resnet/block{stage + 1}/unit{block + 1:02d}"
            layers = (
                ("1", "a", inputs, (1, 1, inputs, width)),
                ("2", "b", width, (3, 3, width, width)),
                ("3", "c", width, (1, 1, width, out)),
            )
            for number, letter, normed, shape in layers:
                unit, norm = f"{theirs}/{letter}", f"{ours}/norm{number}"
                table[f"{ours}/conv{number}/kernel"] = Source(f"{unit}/{kernel}", shape)
                table[f"{norm}/scale"] = Source(f"{unit}/group_norm/gamma", (normed,))
                table[f"{norm}/bias"] = Source(f"{unit}/group_norm/beta", (normed,))
            if block == 0:
                table[f"{ours}/shortcut/kernel"] = Source(
                    f"{theirs}/a/proj/{kernel}", (1, 1, inputs, out)
                )
            inputs = out
    return table


def resnet_v2(
    config: ResNetConfig,
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a BiT classifier; all norms are group norms, so examples are independent.

    Norm paths: `stages_i_blocks_j/{norm1,norm2,norm3}` and `norm`, each with scale and bias. `load`
    reads BiT `.npz` files and files of `save_weights`.

    Arguments and errors are those of `vision_transformer`; `RESNETS` has the usual shapes.
    """
    half = (0.5,) * config.channels
    return from_linen(
        _Backbone(config, compute_dtype(dtype), remat),
        InputSpec(config.image_size, config.channels, half, half),
        loader(partial(_bit, config)),
        width=config.features,
        num_classes=num_classes,
        head_init=head_init,
    )
