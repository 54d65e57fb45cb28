"""Encoded bytes to pixels on the host."""

import io

import numpy as np
import pytest
from PIL import Image

from dpjax import data
from dpjax.data.images import decode, encode_png


def photo(row, height=12, width=9, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.RandomState(row).randint(0, 256, shape).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pixels, buffer.getvalue()


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 8)])
def test_host_resize(shape):
    pixels, encoded = photo(0, *shape)
    out = decode(encoded, (8, 8, 3), data.ImageSpec(image_size=8))
    rows, columns = (slice((side - 8) // 2, (side + 8) // 2) for side in shape)
    np.testing.assert_array_equal(out, pixels[rows, columns])


def test_modes():
    gray, encoded = photo(0, mode="L")
    out = decode(encoded, (12, 9, 3), data.ImageSpec())
    np.testing.assert_array_equal(out, np.repeat(gray[..., None], 3, -1))
    with pytest.raises(ValueError, match="mode RGB cannot be read as 1 channels"):
        decode(photo(0)[1], (12, 9, 1), data.ImageSpec())
    pixels = photo(1)[0]
    np.testing.assert_array_equal(decode(encode_png(pixels), (12, 9, 3), data.ImageSpec()), pixels)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 0}, "image_size=0"),
        ({"resample": "area"}, "resample='area'"),
    ],
)
def test_image_spec(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.ImageSpec(**arguments)
