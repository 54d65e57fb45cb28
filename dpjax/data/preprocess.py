"""Turns stored pixels into model input inside the jitted step, one example at a time; pure JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

__all__ = ["chain", "preprocess", "random_crop", "random_flip", "random_shift"]

_RESAMPLE = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}


def preprocess(
    image: jax.Array,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    resample: str = "bilinear",
) -> jax.Array:
    """Scales, resizes, repeats gray to color and normalizes ONE image.

    Args:
        image: uint8 [H, W, C].
        image_size: side of the result, in pixels. The image is stretched to a square (crop on the
            host if proportions matter). Downscaling is antialiased, as in Pillow.
        mean: per-channel mean to subtract from pixels in [0, 1]; length `channels` or 1.
        std: per-channel divisor; length `channels` or 1.
        channels: number of channels of the result. A gray image is repeated to 3 channels.
        resample: "nearest", "bilinear" or "bicubic".

    Returns:
        float32 [image_size, image_size, channels].

    Raises:
        ValueError: a wrong rank, dtype, channel count, statistic or resample name.
    """
    if image.ndim != 3:
        raise ValueError(f"image of shape {image.shape} must be one image [H, W, C].")
    if image.dtype != jnp.uint8:
        raise ValueError(f"image of dtype {image.dtype} must be uint8.")
    if resample not in _RESAMPLE:
        raise ValueError(f"resample={resample!r} must be one of {sorted(_RESAMPLE)}.")
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be >= 1.")
    height, width, depth = image.shape
    if depth != channels and not (depth == 1 and channels == 3):
        raise ValueError(f"channels={channels} cannot be made from an image with {depth}.")
    for field, value in (("mean", mean), ("std", std)):
        if len(value) not in (1, channels):
            raise ValueError(f"{field}={tuple(value)} must have {channels} entries or one.")
    if min(std) <= 0:
        raise ValueError(f"std={tuple(std)} must be > 0.")
    pixels = image.astype(jnp.float32) / 255.0
    if (height, width) != (image_size, image_size):
        shape = (image_size, image_size, depth)
        pixels = jax.image.resize(pixels, shape, method=_RESAMPLE[resample], antialias=True)
        pixels = jnp.clip(pixels, 0.0, 1.0)  # bicubic resampling overshoots
    if depth != channels:
        pixels = jnp.repeat(pixels, channels, axis=-1)
    center = jnp.asarray(mean, jnp.float32)[None, None]
    return (pixels - center) / jnp.asarray(std, jnp.float32)[None, None]


def random_flip(image: jax.Array, *, key: jax.Array) -> jax.Array:
    """Mirrors ONE image [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_crop(image: jax.Array, *, key: jax.Array, padding: int) -> jax.Array:
    """Pads ONE image by reflection and cuts a window of its own size at a uniformly random place.

    Args:
        image: [H, W, C], any dtype.
        key: used once.
        padding: pixels added on each side, >= 0.

    Returns:
        [H, W, C], same dtype.

    Raises:
        ValueError: a negative padding, or a reflection wider than the image.
    """
    _check_padding(image, padding)
    if padding >= min(image.shape[:2]):
        raise ValueError(f"padding={padding} must be < {min(image.shape[:2])} to be reflected.")
    widths = ((padding, padding), (padding, padding), (0, 0))
    return _window(jnp.pad(image, widths, mode="reflect"), image.shape, key, padding)


def random_shift(
    image: jax.Array, *, key: jax.Array, max_shift: int, fill: float | Sequence[float] = 0.0
) -> jax.Array:
    """Moves ONE image by up to `max_shift` pixels each way.

    Args:
        image: [H, W, C], any dtype.
        key: used once.
        max_shift: in pixels, >= 0; rows and columns move independently and uniformly.
        fill: value of the pixels that move in, one or [C]; after normalization, that of the
            normalized background, which differs between channels.

    Returns:
        [H, W, C], same dtype.

    Raises:
        ValueError: a negative shift.
    """
    _check_padding(image, max_shift)
    height, width, channels = image.shape
    shape = (height + 2 * max_shift, width + 2 * max_shift, channels)
    background = jnp.broadcast_to(jnp.asarray(fill, image.dtype), shape)
    padded = jax.lax.dynamic_update_slice(background, image, (max_shift, max_shift, 0))
    return _window(padded, image.shape, key, max_shift)


def chain(*augmentations: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Applies augmentations `f(image, *, key)` in order, each with its own key."""

    def augment(image: jax.Array, *, key: jax.Array) -> jax.Array:
        for index, augmentation in enumerate(augmentations):
            image = augmentation(image, key=jax.random.fold_in(key, index))
        return image

    return augment


def _check_padding(image: jax.Array, padding: int) -> None:
    if image.ndim != 3:
        raise ValueError(f"image of shape {image.shape} must be one image [H, W, C].")
    if padding < 0:
        raise ValueError(f"padding={padding} must be >= 0.")


def _window(padded: jax.Array, shape: tuple[int, ...], key: jax.Array, padding: int) -> jax.Array:
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    zero = jnp.zeros_like(top)
    return jax.lax.dynamic_slice(padded, (top, left, zero), shape)
