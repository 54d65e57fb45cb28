"""Layers of the convolutional models; leading axes are a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dpjax.models.weights import Source

__all__ = ["Affine", "DepthwiseConv", "GroupNorm", "StandardizedConv", "conv", "fold_norm"]

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int, size: int, stride: int, *, name: str, dtype: jnp.dtype, same: bool = False
) -> nn.Conv:
    """Returns a square convolution with bias; padding is `size // 2`, or TensorFlow's SAME."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding="SAME" if same else [(size // 2, size // 2)] * 2,
        dtype=dtype,
        kernel_init=_he_normal,
        name=name,
    )


def _channelwise(module: nn.Module, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    scale = module.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(dtype)
    bias = module.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(dtype)
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class Affine(nn.Module):
    """Per-channel `scale * x + bias`: the trainable part of a norm with frozen statistics.

    `fold_norm` folds the statistics into the convolution before it. Every parameter can then be
    trained, and examples stay independent.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., channels]` to the same shape."""
        return _channelwise(self, x, self.dtype)


class GroupNorm(nn.Module):
    """Group normalization of one image at a time, statistics in float32 (arXiv:1803.08494)."""

    groups: int
    dtype: jnp.dtype
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., height, width, channels]` to the same shape."""
        *batch, height, width, channels = x.shape
        grouped = x.astype(jnp.float32).reshape(
            *batch, height * width, self.groups, channels // self.groups
        )
        mean = grouped.mean(axis=(-3, -1), keepdims=True)
        centered = grouped - jnp.broadcast_to(mean, grouped.shape)
        variance = jnp.square(centered).mean(axis=(-3, -1), keepdims=True)
        inverse = lax.rsqrt(variance + self.epsilon)
        normal = (centered * jnp.broadcast_to(inverse, grouped.shape)).reshape(x.shape)
        return _channelwise(self, normal.astype(self.dtype), self.dtype)


class StandardizedConv(nn.Module):
    """Convolution whose kernel has mean 0 in every output channel (arXiv:1903.10520); no bias.

    Args:
        features: output channels.
        size: side of the kernel.
        stride: step between outputs.
        dtype: compute dtype of the convolution; the kernel is standardized in float32.
        scaled: False for variance 1, as in BiT; True for variance 1 / fan-in and a trained `gain`
            per output channel (arXiv:2101.08692, section 3; used by arXiv:2204.13650).
    """

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    scaled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., height, width, channels]`, padded by `size // 2`, to `[..., features]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _he_normal, shape)
        mean = kernel.mean(axis=(0, 1, 2), keepdims=True)
        centered = kernel - jnp.broadcast_to(mean, shape)
        variance = jnp.square(centered).mean(axis=(0, 1, 2), keepdims=True)
        if self.scaled:
            gain = self.param("gain", nn.initializers.ones, (self.features,))
            fan_in = math.prod(shape[:-1])
            factor = lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4)) * gain[None, None, None]
        else:
            factor = lax.rsqrt(variance + 1e-10)
        kernel = (centered * jnp.broadcast_to(factor, shape)).astype(self.dtype)
        images = x.astype(self.dtype).reshape(-1, *x.shape[-3:])
        out = lax.conv_general_dilated(
            images,
            kernel,
            (self.stride, self.stride),
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out.reshape(*x.shape[:-3], *out.shape[1:])


def _same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Returns TensorFlow's SAME padding of one axis: an odd pixel goes to the end."""
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


class DepthwiseConv(nn.Module):
    """One filter per channel, SAME padding, with bias; the kernel is `[size, size, 1, channels]`.

    It is computed as size^2 shifted multiply-adds: XLA's grouped convolution is several times
    slower on CPU, and slower still for the per-example kernel gradients of vmap.
    """

    size: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., height, width, channels]` to the same number of channels."""
        height, width, channels = x.shape[-3:]
        kernel = self.param("kernel", _he_normal, (self.size, self.size, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        kernel = kernel.astype(self.dtype)
        pads = [_same_padding(length, self.size, self.stride) for length in (height, width)]
        padded = jnp.pad(x.astype(self.dtype), [(0, 0)] * (x.ndim - 3) + [*pads, (0, 0)])
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        shape = (*x.shape[:-3], rows, columns, channels)
        out = jnp.broadcast_to(bias.astype(self.dtype), shape)
        for i in range(self.size):
            for j in range(self.size):
                shifted = self._shifted(padded, i, j, rows, columns)
                out = out + shifted * jnp.broadcast_to(kernel[i, j, 0], shape)
        return out

    def _shifted(self, x: jax.Array, i: int, j: int, rows: int, columns: int) -> jax.Array:
        step = self.stride
        x = lax.slice_in_dim(x, i, i + (rows - 1) * step + 1, step, axis=x.ndim - 3)
        return lax.slice_in_dim(x, j, j + (columns - 1) * step + 1, step, axis=x.ndim - 2)


def fold_norm(
    conv_path: str,
    norm_path: str,
    weight: str,
    norm: str,
    shape: tuple[int, int, int, int],
    *,
    epsilon: float,
    pointwise: bool = False,
) -> dict[str, Source]:
    """Returns the sources of a torch convolution without bias followed by a frozen batch norm.

    The convolution absorbs the frozen statistics: kernel / s and bias -mean / s with
    s = sqrt(variance + epsilon). The norm keeps its scale and bias.

    Args:
        conv_path: path of the convolution in our parameters.
        norm_path: path of the `Affine` after it.
        weight: name of the kernel in the file, in OIHW order.
        norm: name of the batch norm in the file.
        shape: shape of the kernel in the file.
        epsilon: epsilon of the batch norm.
        pointwise: whether our kernel is the matrix `[inputs, outputs]` of a 1 x 1 convolution.
    """
    channels = (shape[0],)
    variance = ((f"{norm}.running_var", channels),)

    def kernel(tensor: np.ndarray, var: np.ndarray) -> np.ndarray:
        scaled = (tensor / np.sqrt(var + epsilon)[:, None, None, None]).transpose(2, 3, 1, 0)
        return scaled[0, 0] if pointwise else scaled

    def bias(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return np.asarray(-mean / np.sqrt(var + epsilon))

    return {
        f"{conv_path}/kernel": Source(weight, shape, kernel, variance),
        f"{conv_path}/bias": Source(f"{norm}.running_mean", channels, bias, variance),
        f"{norm_path}/scale": Source(f"{norm}.weight", channels),
        f"{norm_path}/bias": Source(f"{norm}.bias", channels),
    }
