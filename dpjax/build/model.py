"""`config.model` and `config.finetune` become a model, its first parameters and what trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from dpjax import models
from dpjax.dp import seeds
from dpjax.files import choose, resolve, returned
from dpjax.models import Model, Params, finetune

__all__ = [
    "families",
    "finetuning_set",
    "frozen_as",
    "initial",
    "model",
    "model_title",
    "size",
    "tuned",
    "vote_count",
    "weights_file",
]

_MODELS: dict[str, tuple[Callable[..., Model], Mapping[str, Any] | None]] = {
    "vit": (models.vision_transformer, models.SIZES),
    "resnet_v2": (models.resnet_v2, models.RESNETS),
    "wide_resnet": (models.wide_resnet, {"16_4": models.WRN_16_4}),
    "efficientnet_lite": (models.efficientnet_lite, models.EFFICIENTNETS),
    "resnet8": (models.resnet8, None),
    "text_encoder": (models.text_encoder, models.TEXT_SIZES),
    "decoder": (models.decoder, models.DECODERS),
}


def families() -> dict[str, tuple[str, ...]]:
    """Returns the sizes of every family of ours; a family of one size has none."""
    return {name: tuple(sizes or ()) for name, (_, sizes) in _MODELS.items()}


def model_title(config: ConfigDict) -> str:
    """Returns family and size, where there is one, of `config.model`."""
    _, sizes = _family(config.name)
    return config.name if sizes is None else f"{config.name} {config.size}"


def model(config: ConfigDict, num_classes: int) -> Model:
    """Makes the model of `config.model`.

    Options replace fields of the size that a family of ours has; any other function takes them as
    keywords.
    """
    make, sizes = _family(config.name)
    if models.is_module(make):
        _without_remat(config)
        if not isinstance(make, type) and config.dtype != "float32":
            raise ValueError(
                f"model.dtype={config.dtype!r}: {config.name!r} is a module that computes in the "
                "dtype it was made with. Name its class, or a function that makes it."
            )
        return _bare(config, make, num_classes, config.options)
    options: dict[str, Any] = {"head_init": config.head_init, "dtype": config.dtype}
    arguments: list[Any] = [num_classes]
    if sizes is not None:
        arguments.insert(0, size("model.options", sizes, config))
    else:
        options |= config.options
    known = inspect.signature(make).parameters
    if "remat" in known:
        options["remat"] = config.remat
    else:
        _without_remat(config)
    # The input of a bare module that the function returns is ours to know, not the function's.
    of_input = {name: options[name] for name in models.MODULE_INPUT if name in options}
    options = {k: v for k, v in options.items() if k not in of_input or k in known}
    try:
        inspect.signature(make).bind(*arguments, **options)
    except TypeError as error:
        shown = dict(config.options)
        raise ValueError(f"model.options={shown}: model.name={config.name!r}: {error}.") from error
    made = make(*arguments, **options)
    if models.is_module(made):
        return _bare(config, made, num_classes, of_input)
    if isinstance(made, Model) and not set(of_input) <= set(known):
        shown = dict(config.options)
        raise ValueError(f"model.options={shown}: {config.name!r} takes {list(known)}.")
    return returned("model.name", config.name, made, Model)


def _without_remat(config: ConfigDict) -> None:
    if config.remat:
        raise ValueError(
            f"model.remat=True: {config.name!r} takes no remat. Give the function a keyword remat, "
            "or wrap blocks in nn.remat (Linen), nnx.remat or jax.checkpoint in the model."
        )


def _bare(config: ConfigDict, module: Any, num_classes: int, options: Mapping[str, Any]) -> Model:
    """A model of a module as it is; its mistakes name the field."""
    try:
        return models.from_module(
            module,
            num_classes,
            head_init=config.head_init,
            dtype=config.dtype,
            options=dict(options),
        )
    except ValueError as error:
        raise ValueError(
            f"model.name={config.name!r} with model.options={dict(config.options)}: {error}"
        ) from error


def _family(name: str) -> tuple[Callable[..., Model], Any]:
    """A family of ours and its sizes, or a function of the user's."""
    family = resolve("model.name", name, _MODELS)
    return family if isinstance(family, tuple) else (family, None)


def size(field: str, sizes: Mapping[str, Any], config: ConfigDict) -> Any:
    """Makes the shape that `config.size` names, with the fields in `config.options` replaced."""
    shape = choose("model.size", config.size, sizes)
    for name, value in config.options.items():
        choose(f"{field} field", name, shape.__dataclass_fields__)
        kind = type(getattr(shape, name))
        other = type(value) is not kind and (kind, type(value)) != (float, int)
        if other and kind is not type(None):
            raise ValueError(f"{field}.{name}={value!r} must be of type {kind.__name__}.")
    try:
        return type(shape)(**{**vars(shape), **config.options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from error


def tuned(config: ConfigDict, num_classes: int) -> finetune.FineTuning:
    """Makes the model of a config, prepared for its fine-tuning set."""
    net, tune = model(config.model, num_classes), finetuning_set(config.finetune)
    try:
        return tune(net)
    except ValueError as error:
        raise ValueError(f"finetune={config.finetune!r}: {error}") from error


def weights_file(config: ConfigDict) -> str | None:
    """Returns the file of the weights that `config.model` starts from; None: they are random."""
    return None if config.weights is None else models.locate(config.weights)


def initial(net: Model, config: ConfigDict, weights: str | None) -> Params:
    """Returns the parameters at the start: random, or read from a file of weights."""
    params = net.init(seeds.public_key(config.seed, "init"))
    return params if weights is None else net.load(params, weights, head=config.model.keep_head)


def vote_count(text: str) -> int | None:
    """Returns K of the fine-tuning set "vote:K"; None of any other."""
    parts = text.split("+")
    if not any(part.split(":")[0] == "vote" for part in parts):
        return None
    count = text.removeprefix("vote:")
    if len(parts) > 1 or not count.isdecimal():
        raise ValueError(f"finetune={text!r} must be vote:K, with a whole number K, and no more.")
    return int(count)


def _blocks(end: str, count: str) -> finetune.FineTuningSet:
    places: dict[str, Any] = {"at": lambda: [int(place) for place in count.split(",")]}
    return finetune.blocks(**{end: places.get(end, lambda: int(count))()})


def _candidates(count: str) -> finetune.FineTuningSet:
    """All blocks and the head: of them, a vote picks so many blocks."""

    def make(net: Model) -> finetune.FineTuning:
        names = finetune.block_names(net)
        if not 1 <= int(count) < len(names):
            raise ValueError(f"{count} must be in 1..{len(names) - 1}: there are {len(names)}.")
        return finetune.blocks(last=len(names))(net)

    return make


def frozen_as(config: ConfigDict, params: Params, trained: Callable[[str], bool]) -> Params:
    """Rounds the parameters that no phase trains to `model.frozen_dtype`.

    Args:
        config: of the run.
        params: all parameters, float32.
        trained: maps a parameter's path to whether a phase trains it.

    Raises:
        ValueError: every parameter is trained.
    """
    if config.model.frozen_dtype is None:
        return params
    flat = models.flatten(params)
    if all(map(trained, flat)):
        raise ValueError(
            f"model.frozen_dtype={config.model.frozen_dtype!r}: finetune={config.finetune!r} "
            "trains every parameter; leave frozen_dtype at None."
        )
    dtype = config.model.frozen_dtype
    if dtype == "int8":
        small = {k: x if trained(k) else models.int8.in_int8(k, x) for k, x in flat.items()}
    else:
        small = {k: x if trained(k) else x.astype(jnp.dtype(dtype)) for k, x in flat.items()}
    return models.unflatten(small)


def finetuning_set(text: str) -> finetune.FineTuningSet:
    """Makes a fine-tuning set from text such as "film", "blocks:last:2" or "bias+regex:cls"."""
    sets = []
    vote_count(text)  # raises if it is not alone
    for part in text.split("+"):
        name, *rest = part.split(":")
        make = choose(
            "finetune",
            name,
            {
                "full": lambda: finetune.full(),
                "head": lambda: finetune.head(),
                "film": lambda: finetune.film(),
                "bias": lambda: finetune.bias(),
                "blocks": _blocks,
                "vote": _candidates,
                "lora": lambda rank="8", *targets: finetune.lora(
                    rank=int(rank), **({"targets": ":".join(targets)} if targets else {})
                ),
                "regex": lambda *pattern: finetune.regex(":".join(pattern)),
            },
        )
        try:
            sets.append(make(*rest))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"finetune={part!r} is not understood: {str(error).rstrip('.')}."
            ) from error
    return finetune.combine(sets)
