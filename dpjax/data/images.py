"""Decodes images to uint8 pixels of one shape, on the host, with Pillow."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

with contextlib.suppress(ImportError):  # an extra: photos of phones
    import pillow_heif

    pillow_heif.register_heif_opener()

__all__ = [
    "ImageSpec",
    "decode",
    "encode_png",
    "fit",
    "image_suffixes",
    "open_image",
    "output_shape",
]

_HEIC = (".heic", ".heif", ".hif")

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How the host brings images to one shape.

    Attributes:
        image_size: side of the square result, in pixels, to which the shorter side is scaled before
            the center is cut out; None keeps the stored size, which must then be fixed. Gray is not
            converted to color here: `preprocess` does that inside the step.
        resample: "nearest", "bilinear" or "bicubic"; downscaling is antialiased.
        image_key: the image feature; None finds it.
        label_key: the label feature; None finds it.
    """

    image_size: int | None = None
    resample: str = "bilinear"
    image_key: str | None = None
    label_key: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be >= 1.")
        if self.resample not in _RESAMPLE:
            raise ValueError(f"resample={self.resample!r} must be one of {sorted(_RESAMPLE)}.")


def image_suffixes() -> set[str]:
    """Returns the endings of files that are images, such as ".png"; some may need an extra."""
    known = Image.registered_extensions()
    return {suffix for suffix, kind in known.items() if kind in Image.OPEN} | set(_HEIC)


def open_image(data: bytes) -> Image.Image:
    """Opens an encoded image; `load()` decodes its first frame.

    Raises:
        UnidentifiedImageError: the bytes are no image of a known format.
        ValueError: they are a HEIC photo, and pillow-heif is not installed.
        Exception: whatever else Pillow raises on bad bytes, a dozen unrelated types.
    """
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif", b"msf"):
            raise ValueError(
                "it is a HEIC photo, which needs pillow-heif: pip install pillow-heif"
            ) from error
        raise UnidentifiedImageError("it has the contents of no image that is known") from error


def output_shape(stored: tuple[int | None, ...], spec: ImageSpec) -> tuple[int, int, int]:
    """Returns the shape [H, W, C] of decoded images.

    Args:
        stored: shape of the image feature, None where it varies.
        spec: how images are resized.

    Raises:
        ValueError: there are neither 1 nor 3 channels, or sizes vary and `spec.image_size` is None.
    """
    height, width, channels = stored
    if channels is None:
        channels = 3  # images of mixed modes are read as color
    if channels not in _MODES:
        raise ValueError(f"channels={channels} of the stored images must be 1 or 3.")
    if spec.image_size is not None:
        return spec.image_size, spec.image_size, channels
    if height is None or width is None:
        raise ValueError(
            f"image_size=None must be a number (config.data.host_image_size): the stored images "
            f"vary in size, shape {stored}."
        )
    return height, width, channels


def decode(
    data: bytes, shape: tuple[int | None, int | None, int], spec: ImageSpec | None = None
) -> np.ndarray:
    """Decodes one image, turned upright as its EXIF orientation says.

    Args:
        data: an encoded image (PNG, JPEG, ...); of several frames, the first is taken.
        shape: [H, W, C] from `output_shape`; a side that is None may have any length.
        spec: how the image is resized; None keeps its size.

    Returns:
        uint8 [H, W, C].

    Raises:
        ValueError: the bytes are not a complete image, or its mode or size does not fit.
    """
    if data.startswith(b"\x89PNG") and b"IEND" not in data:  # Pillow asks for the pixels only
        raise ValueError("image file is truncated: it has no end")
    try:
        image = open_image(data)
        image.load()
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return fit(image, shape, spec)


def fit(
    image: Image.Image,
    shape: tuple[int | None, int | None, int],
    spec: ImageSpec | None = None,
) -> np.ndarray:
    """Brings one open_image image upright and to the shape of a data set; as `decode`."""
    height, width, channels = shape
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF raises many types, too
        raise ValueError(f"its EXIF is damaged: {type(error).__name__}: {error}") from error
    image = _to_mode(image, channels)
    if spec is not None and spec.image_size is not None and image.size != (width, height):
        image = _resized(image, spec.image_size, spec)
    if image.width != (width or image.width) or image.height != (height or image.height):
        raise ValueError(f"it is {image.height}x{image.width}, not {height}x{width} as declared")
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns uint8 pixels [H, W], [H, W, 1] or [H, W, 3] as a lossless PNG."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels of dtype {pixels.dtype} must be uint8.")
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    mode = _MODES[channels]
    if image.mode == mode:
        return image
    if channels == 3 and not image.mode.startswith(("I", "F")):
        return image.convert("RGB")  # gray is repeated, alpha dropped, a palette looked up
    if image.mode == "1":
        return image.convert("L")
    raise ValueError(f"mode {image.mode} cannot be read as {channels} channels of 8 bits")


def _resized(image: Image.Image, size: int, spec: ImageSpec) -> Image.Image:
    # One resampling of the centered square equals scaling the shorter side, then cropping.
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), _RESAMPLE[spec.resample], box=box)
