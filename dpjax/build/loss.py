"""The prediction on raw inputs and the loss of a raw example, augmentations included."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dpjax import data, models
from dpjax.models import Model, Params
from dpjax.step import LossFn

__all__ = ["augmentation", "functions"]


def functions(
    net: Model, config: ConfigDict, shape: tuple[int, ...]
) -> tuple[Callable[[Params, jax.Array], jax.Array], LossFn]:
    """Returns the prediction on raw inputs, and the loss of one raw example."""
    if config.pad < 0:
        raise ValueError(f"data.pad={config.pad} must be >= 0.")
    spec = net.input
    black = 0.0 if isinstance(spec, models.TextSpec) else -spec.mean[0] / spec.std[0]
    augment = augmentation(config, black=black)
    if isinstance(spec, models.TextSpec) and augment is not None:
        raise ValueError("data: augmentations are for images, not for text.")

    def prepare(example: jax.Array) -> jax.Array:
        if isinstance(spec, models.TextSpec):
            return example
        border = (config.pad, config.pad)
        return data.preprocess(
            jnp.pad(example, (border, border, (0, 0))),
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            channels=spec.channels,
            resample=config.resample,
        )

    dtype = jnp.int32 if isinstance(spec, models.TextSpec) else jnp.uint8
    jax.eval_shape(prepare, jax.ShapeDtypeStruct(shape, dtype))  # raises on channels, resample

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return net.apply(params, jax.vmap(prepare)(inputs))

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        one = prepare(example["input"])
        if augment is None:
            logits = net.apply(params, one)[None]
        else:
            keys = jax.random.split(example["key"], config.multiplicity)
            logits = net.apply(params, jax.vmap(lambda k: augment(one, key=k))(keys))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(example["label"], logits.shape[:1])
        )
        return jnp.mean(losses)

    return apply, loss_fn


def augmentation(config: ConfigDict, black: float) -> Callable[..., jax.Array] | None:
    chosen: list[Callable[..., jax.Array]] = []
    if config.crop:
        chosen.append(functools.partial(data.random_crop, padding=config.crop))
    if config.shift:
        chosen.append(functools.partial(data.random_shift, max_shift=config.shift, fill=black))
    if config.flip:
        chosen.append(data.random_flip)
    if config.pixel_noise:
        chosen.append(
            lambda image, *, key: image + config.pixel_noise * jax.random.normal(key, image.shape)
        )
    if config.multiplicity < 1:
        raise ValueError(f"data.multiplicity={config.multiplicity} must be >= 1.")
    if config.multiplicity > 1 and not chosen:
        raise ValueError(
            f"data.multiplicity={config.multiplicity} needs an augmentation, such as data.flip."
        )
    return data.chain(*chosen) if chosen else None
