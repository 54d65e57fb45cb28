"""The prediction on raw inputs and the loss of a raw example, augmentations included."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dpjax import data, models
from dpjax.build import next_token
from dpjax.files import resolve
from dpjax.models import Model, Params
from dpjax.step import LossFn

__all__ = ["augmentation", "check", "functions"]


def check(spec: models.InputSpec | models.TextSpec, config: ConfigDict) -> None:
    """Refuses what `config.data` asks to do with a model's input, whatever the data will be."""
    if config.pad < 0:
        raise ValueError(f"data.pad={config.pad} must be >= 0.")
    if not 0 <= config.pixel_noise < math.inf:
        raise ValueError(f"data.pixel_noise={config.pixel_noise} must be >= 0 and finite.")
    preparation(spec, config, spec.example().shape)
    augment = augmentation(spec, config)
    if augment is not None:
        try:
            key = jax.eval_shape(lambda: jax.random.key(0))
            jax.eval_shape(lambda x, key: augment(x, key=key), spec.example(), key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"data: an augmentation cannot be applied: {error}") from error


def functions(
    net: Model, config: ConfigDict, shape: tuple[int, ...]
) -> tuple[Callable[[Params, jax.Array], Any], LossFn]:
    """Returns the prediction on raw inputs, and the loss of one raw example.

    Those of a language model are in `next_token`.

    An example that has `record` is a unit of several records: `input` [records, ...], `label`
    [records], `record` [records] bool. Its loss is the mean over the records that are there.
    """
    if isinstance(net.input, models.TextSpec) and net.input.causal:
        return next_token.functions(net)
    prepare = preparation(net.input, config, shape)
    augment = augmentation(net.input, config)

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return net.apply(params, jax.vmap(prepare)(inputs))

    def views(record: jax.Array, key: jax.Array | None) -> jax.Array:
        """What the model sees of one record, [views, ...]."""
        one = prepare(record)
        if augment is None or key is None:
            return one[None]
        keys = jax.random.split(key, config.multiplicity)
        return jax.vmap(lambda k: augment(one, key=k))(keys)

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        label, key = example["label"], None if augment is None else example["key"]
        if "record" not in example:
            inputs = views(example["input"], key)
            # Without a batch axis where there is one view: it would cost the engine time.
            logits = net.apply(params, inputs) if augment else net.apply(params, inputs[0])[None]
            return jnp.mean(_cross_entropy(logits, jnp.broadcast_to(label, logits.shape[:1])))
        there = example["record"]
        # The keys of a unit's records come from the unit's own: no other unit changes them.
        keys = None if key is None else jax.random.split(key, len(there))
        inputs = jax.vmap(views, (0, None if keys is None else 0))(example["input"], keys)
        logits = net.apply(params, inputs.reshape(-1, *inputs.shape[2:]))
        losses = _cross_entropy(logits, jnp.repeat(label, inputs.shape[1]))
        losses = jnp.mean(losses.reshape(inputs.shape[:2]), axis=1)
        return jnp.sum(jnp.where(there, losses, 0.0)) / jnp.maximum(jnp.sum(there), 1)

    return apply, loss_fn


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def preparation(
    spec: models.InputSpec | models.TextSpec, config: ConfigDict, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from one stored input, of a shape, to that of the model."""
    if isinstance(spec, models.TextSpec):
        return lambda tokens: tokens
    if shape[-1] not in (1, spec.channels):
        raise ValueError(
            f"the images have {shape[-1]} channels and the model takes {spec.channels}: set "
            f"model.options.channels={shape[-1]}, or choose a model that takes them."
        )

    def prepare(image: jax.Array) -> jax.Array:
        border = (config.pad, config.pad)
        return data.preprocess(
            jnp.pad(image, (border, border, (0, 0))),
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            channels=spec.channels,
            resample=config.resample,
        )

    try:
        jax.eval_shape(prepare, jax.ShapeDtypeStruct(shape, jnp.uint8))
    except ValueError as error:
        raise ValueError(f"data.{error}") from error
    return prepare


def augmentation(
    spec: models.InputSpec | models.TextSpec, config: ConfigDict
) -> Callable[..., jax.Array] | None:
    """Returns what is done at random to a prepared example; None if nothing is."""
    normal = () if isinstance(spec, models.TextSpec) else zip(spec.mean, spec.std, strict=True)
    black = [-mean / std for mean, std in normal]
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
    if config.augmentation is not None:
        chosen.append(resolve("data.augmentation", config.augmentation, {}))
    if chosen and isinstance(spec, models.TextSpec):
        raise ValueError("data: augmentations are for images, not for text.")
    if config.multiplicity < 1:
        raise ValueError(f"data.multiplicity={config.multiplicity} must be >= 1.")
    if config.multiplicity > 1 and not chosen:
        raise ValueError(
            f"data.multiplicity={config.multiplicity} needs an augmentation, such as data.flip."
        )
    return data.chain(*chosen) if chosen else None
