"""ResNet-8 for 32 x 32 images with the frozen, public statistics of its CIFAR-100 weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, compute_dtype, from_linen
from dpjax.models.nets.layers import Affine, conv, fold_norm
from dpjax.models.weights import Source, Tensors, loader

__all__ = ["resnet8"]

_STEM = 64
_STAGES = ((16, 1), (32, 2), (64, 2))  # (width, stride)
_POOL = 4
_WIDTH = 256
_EPSILON = 1e-5


class _Stage(nn.Module):
    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        convolution, norm = partial(conv, dtype=self.dtype), partial(Affine, self.dtype)
        y = convolution(self.width, 3, self.stride, name="conv1")(x)
        y = jax.nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(convolution(self.width, 3, 1, name="conv2")(y))
        shortcut = convolution(self.width, 1, self.stride, name="shortcut")(x)
        return jax.nn.relu(y + norm(name="norm_shortcut")(shortcut))


class _Backbone(nn.Module):
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = conv(_STEM, 3, 1, name="stem", dtype=self.dtype)(images)
        x = jax.nn.relu(Affine(self.dtype, name="norm_stem")(x))
        kind = nn.remat(_Stage) if self.remat else _Stage
        for index, (width, stride) in enumerate(_STAGES):
            x = kind(width, stride, self.dtype, name=f"stages_{index}")(x)
        side, channels = x.shape[-2] // _POOL, x.shape[-1]
        cells = x.reshape(*x.shape[:-3], side, _POOL, side, _POOL, channels)
        pooled = cells.mean(axis=(-4, -2), dtype=jnp.float32)
        # The published head expects the flattened features with channels first.
        return jnp.moveaxis(pooled, -1, -3).reshape(*x.shape[:-3], -1)


def _published(tensors: Tensors, classes: int) -> dict[str, Source]:
    del tensors  # of one layout
    fold = partial(fold_norm, epsilon=_EPSILON)
    table = fold("stem", "norm_stem", "conv1.weight", "bn1", (_STEM, 3, 3, 3))
    width = _STEM
    for index, (out, _) in enumerate(_STAGES):
        ours, theirs = f"stages_{index}", f"layer{index + 1}.0"
        for layer, inputs in (("1", width), ("2", out)):
            table |= fold(
                f"{ours}/conv{layer}",
                f"{ours}/norm{layer}",
                f"{theirs}.conv{layer}.weight",
                f"{theirs}.bn{layer}",
                (out, inputs, 3, 3),
            )
        table |= fold(
            f"{ours}/shortcut",
            f"{ours}/norm_shortcut",
            f"{theirs}.shortcut.0.weight",
            f"{theirs}.shortcut.1",
            (out, width, 1, 1),
        )
        width = out
    table["head/kernel"] = Source("linear.weight", (classes, _WIDTH), np.transpose)
    table["head/bias"] = Source("linear.bias", (classes,))
    return table


def resnet8(
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a ResNet-8: a stem of width 64, one block in each of 3 stages, 113k parameters.

    Batch norm runs in inference mode with the published statistics, which `load` folds into the
    convolutions, so examples are independent. Norm paths: `norm_stem`,
    `stages_i/{norm1,norm2,norm_shortcut}`, each with scale and bias.

    Arguments and errors are those of `vision_transformer`, without a shape.
    """
    spec = InputSpec(32, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return from_linen(
        _Backbone(compute_dtype(dtype), remat),
        spec,
        loader(_published, ignore=r"num_batches_tracked$"),
        width=_WIDTH,
        num_classes=num_classes,
        head_init=head_init,
    )
