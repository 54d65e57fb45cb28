"""Preprocessing and augmentation inside the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpjax import data

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 20, 12, 3)).astype(np.uint8)
HALF = {"mean": (0.5,), "std": (0.5,)}
AUGMENTATIONS = {
    "flip": data.random_flip,
    "reflect": functools.partial(data.random_crop, padding=3),
    "shift": functools.partial(data.random_shift, max_shift=3, fill=-1.0),
    "chain": data.chain(data.random_flip, functools.partial(data.random_shift, max_shift=2)),
}


def test_scaling_and_normalization_without_resizing():
    image = PIXELS[0, :12]
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = data.preprocess(image, image_size=12, mean=mean, std=std, channels=3)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (image / 255 - mean) / std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 31])
@pytest.mark.parametrize(
    "resample, pil",
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_resize_is_that_of_pillow(size, resample, pil):
    out = data.preprocess(
        PIXELS[0], image_size=size, mean=(0.0,), std=(1.0,), channels=3, resample=resample
    )
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(PIXELS[0], -1, 0)]
    want = np.stack([np.asarray(plane.resize((size, size), pil)) for plane in planes], -1) / 255
    np.testing.assert_allclose(out, np.clip(want, 0, 1), atol=2e-5)


def test_nearest():
    out = data.preprocess(
        PIXELS[0, :12, :, :1], image_size=24, channels=1, resample="nearest", **HALF
    )
    np.testing.assert_allclose(out[::2, ::2, 0], PIXELS[0, :12, :, 0] / 127.5 - 1, atol=1e-6)


def test_gray_is_repeated():
    out = data.preprocess(PIXELS[0, ..., :1], image_size=10, channels=3, **HALF)
    assert out.shape == (10, 10, 3)
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_jit_vmap_equals_one_by_one():
    one = functools.partial(data.preprocess, image_size=9, channels=3, **HALF)
    together = jax.jit(jax.vmap(one))(PIXELS)
    np.testing.assert_allclose(together, np.stack([one(i) for i in PIXELS]), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": PIXELS}, "one image"),
        ({"image": PIXELS[0].astype(np.float32)}, "float32 must be uint8"),
        ({"image": PIXELS[0, ..., :2]}, "channels=3 cannot"),
        ({"channels": 1}, "channels=1 cannot"),
        ({"resample": "lanczos"}, "resample='lanczos'"),
        ({"image_size": 0}, "image_size=0"),
        ({"mean": (0.5, 0.5)}, "mean="),
        ({"std": (0.0,)}, "std="),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"image": PIXELS[0], "image_size": 8, "channels": 3, **HALF, **change}
    with pytest.raises(ValueError, match=message):
        data.preprocess(arguments.pop("image"), **arguments)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_under_jit_and_vmap(name):
    images = jnp.asarray(PIXELS, jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(images))
    augment = AUGMENTATIONS[name]
    out = jax.jit(jax.vmap(lambda image, key: augment(image, key=key)))(images, keys)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    keys = jax.random.split(jax.random.key(0), len(images))
    alone = np.stack([augment(image, key=key) for image, key in zip(images, keys)])
    np.testing.assert_array_equal(out, alone)
    assert (out != images).any()


def test_flip_happens_half_of_the_time():
    keys = jax.random.split(jax.random.key(1), 4000)
    image = jnp.array([[0.0, 1.0]])[..., None]
    flipped = jax.vmap(lambda key: data.random_flip(image, key=key))(keys)[:, 0, 0, 0]
    assert abs(float(flipped.mean()) - 0.5) < 5 * 0.5 / 4000**0.5
    assert set(np.asarray(flipped)) == {0.0, 1.0}


def test_every_shift_is_equally_likely_and_uint8_stays():
    image = jnp.zeros((7, 7, 1), jnp.uint8).at[3, 3, 0].set(9)
    keys = jax.random.split(jax.random.key(2), 5000)
    moved = jax.vmap(lambda key: data.random_shift(image, key=key, max_shift=2))(keys)
    assert moved.dtype == jnp.uint8
    hits = np.asarray((moved == 9).sum(0))[..., 0]
    assert hits.sum() == 5000
    assert (hits[1:6, 1:6] > 0).all()
    assert hits[1:6, 1:6].sum() == 5000
    assert np.abs(hits[1:6, 1:6] - 200).max() < 5 * (5000 * 0.04 * 0.96) ** 0.5


def test_what_moves_in_may_differ_between_channels():
    image = jnp.zeros((4, 4, 3))
    keys = jax.random.split(jax.random.key(0), 20)
    moved = jax.vmap(
        lambda key: data.random_shift(image, key=key, max_shift=2, fill=[1.0, 2.0, 3.0])
    )(keys)
    outside = np.asarray(moved)[np.any(moved != 0, axis=-1)]
    assert len(outside) > 20
    assert (outside == [1, 2, 3]).all()


def test_crop_is_a_window_of_the_padded_image():
    image = jnp.asarray(PIXELS[0, :8, :8], jnp.float32)
    out = np.asarray(data.random_crop(image, key=jax.random.key(3), padding=2))
    padded = np.pad(PIXELS[0, :8, :8], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    assert sum((window == out).all() for window in windows) == 1


def test_augmentation_mistakes():
    image, key = jnp.zeros((4, 4, 1)), jax.random.key(0)
    with pytest.raises(ValueError, match="padding=4"):
        data.random_crop(image, key=key, padding=4)
    with pytest.raises(ValueError, match="padding=-1"):
        data.random_shift(image, key=key, max_shift=-1)
    with pytest.raises(ValueError, match="one image"):
        data.random_crop(image[None], key=key, padding=1)
