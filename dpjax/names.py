"""From names to objects: what a string in a config can stand for, and nothing else.

An unknown name answers with the nearest known one.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import optax
from ml_collections import ConfigDict

from dpjax import data, dp, finetune, models
from dpjax.models import Model
from dpjax.step import Hyper

__all__ = ["adaptive_bound", "augmentation", "choose", "clip_rule", "dataset", "finetuning_set",
           "model", "model_title", "optimizer", "resolve", "sampler", "size"]  # fmt: skip

T = TypeVar("T")


def choose(field: str, name: str, table: Mapping[str, Any], *, also: Sequence[str] = ()) -> Any:
    if name in table:
        return table[name]
    names = ", ".join([*sorted(table), *also])
    raise ValueError(f"{field}={name!r} must be one of {names}.{_hint(name, table)}")


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def resolve(field: str, text: str, table: Mapping[str, Any]) -> Any:
    """Returns what a name in a config stands for.

    Args:
        field: of the config.
        text: a key of `table`, or "module:function" of the user's.
        table: what the names stand for.

    Returns:
        The entry of the table, or the function.

    Raises:
        ValueError: it is neither, naming the field, its value and the nearest name.
    """
    module, colon, name = str(text).partition(":")
    if not colon:
        return choose(field, text, table, also=["MODULE:FUNCTION of yours"])
    try:
        own = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{field}={text!r} cannot be imported: {reason}.") from error
    found = getattr(own, name, None)
    if not callable(found):
        hint = _hint(name, (key for key, value in vars(own).items() if callable(value)))
        raise ValueError(f"{field}={text!r}: {module} has no function {name!r}.{hint}")
    return found


def clip_rule(config: ConfigDict, bound: float | None = None) -> dp.ClipRule:
    """Makes the clipping rule of `config.dp`, at its bound or at another."""
    make = resolve(
        "dp.clipping",
        config.clipping,
        {
            "flat": dp.flat,
            "per_layer": dp.per_layer,
            "automatic": functools.partial(dp.automatic, gamma=config.gamma),
            "global": dp.global_,
        },
    )
    try:
        rule = make(config.bound if bound is None else bound, normalised=config.normalised)
    except ValueError as error:
        raise ValueError(f"dp.{error}") from error
    return _returned("dp.clipping", config.clipping, rule, dp.ClipRule)


def sampler(config: ConfigDict) -> str | dp.sampling.Factory:
    """Returns what makes the sampler of `config.dp`: a name of ours, or the user's function."""
    made: str | dp.sampling.Factory = resolve(
        "dp.sampler", config.sampler, {name: name for name in dp.sampling.SAMPLERS}
    )
    return made


def dataset(name: str, split: str) -> data.Dataset:
    """Opens a split of the user's data set "module:function"."""
    return _returned("data.name", name, resolve("data.name", name, {})(split), data.Dataset)


def _returned(field: str, text: str, value: Any, kind: type[T]) -> T:
    """Checks what a function, which may be the user's, has returned."""
    if not isinstance(value, kind):
        raise ValueError(f"{field}={text!r} must return a {kind.__name__}, not {value!r}.")
    return value


def adaptive_bound(config: ConfigDict) -> dp.QuantileBound | None:
    """Makes the rule by which the bound of `config.dp` follows a quantile; None: it does not."""
    adaptive = config.adaptive
    if adaptive.quantile is None:
        return None
    if config.clipping != "flat":
        raise ValueError(f"dp.adaptive.quantile needs dp.clipping='flat', got {config.clipping!r}.")
    if config.bound_schedule:
        raise ValueError("dp.adaptive.quantile and dp.bound_schedule exclude each other.")
    try:
        made = dp.quantile_bound(
            adaptive.quantile, rate=adaptive.rate, lower_bound=adaptive.lower_bound
        )
    except ValueError as error:
        raise ValueError(f"dp.adaptive.{error}") from error
    if config.bound < adaptive.lower_bound:
        raise ValueError(
            f"dp.bound={config.bound} must be >= dp.adaptive.lower_bound={adaptive.lower_bound}."
        )
    return made


_MODELS: dict[str, tuple[Callable[..., Model], Mapping[str, Any] | None]] = {
    "vit": (models.vision_transformer, models.SIZES),
    "resnet_v2": (models.resnet_v2, models.RESNETS),
    "wide_resnet": (models.wide_resnet, {"16_4": models.WRN_16_4}),
    "efficientnet_lite": (models.efficientnet_lite, {"lite0": models.LITE0}),
    "resnet8": (models.resnet8, None),
    "text_encoder": (models.text_encoder, models.TEXT_SIZES),
}


def model_title(config: ConfigDict) -> str:
    """Returns family and size, where there is one, of `config.model`."""
    _, sizes = _family(config.name)
    return config.name if sizes is None else f"{config.name} {config.size}"


def model(config: ConfigDict, num_classes: int) -> Model:
    """Makes the model of `config.model`."""
    make, sizes = _family(config.name)
    arguments = [num_classes]
    if sizes is not None:
        arguments.insert(0, size("model.options", sizes, config))
    made: Model = make(*arguments, head_init=config.head_init, dtype=config.dtype)
    return made


def _family(name: str) -> tuple[Callable[..., Model], Any]:
    """A family of ours and its sizes, or a function of the user's."""
    family = resolve("model.name", name, _MODELS)
    return family if isinstance(family, tuple) else (family, None)


def size(field: str, sizes: Mapping[str, Any], config: ConfigDict) -> Any:
    """Makes the shape that `config.size` names, with the fields in `config.options` replaced."""
    shape = choose("model.size", config.size, sizes)
    for name in config.options:
        choose(f"{field} field", name, shape.__dataclass_fields__)
    return type(shape)(**{**vars(shape), **config.options})


def finetuning_set(text: str) -> finetune.FineTuningSet:
    """Makes a fine-tuning set from text such as "film", "blocks:last:2" or "bias+regex:cls"."""
    sets = []
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
                "blocks": lambda end, count: finetune.blocks(**{end: int(count)}),
                "lora": lambda rank="8", *targets: finetune.lora(
                    rank=int(rank), **({"targets": ":".join(targets)} if targets else {})
                ),
                "regex": lambda *pattern: finetune.regex(":".join(pattern)),
            },
        )
        try:
            sets.append(make(*rest))
        except (TypeError, ValueError) as error:
            raise ValueError(f"finetune={part!r} is not understood: {error}.") from error
    return finetune.combine(sets)


def optimizer(
    config: ConfigDict, steps: int, *, private: bool
) -> Callable[[Hyper], optax.GradientTransformation]:
    """Makes the optimizer factory of `config.optimizer`; private ones take a `ClippedSum`."""
    name, options = config.name, dict(config.options)
    table = {"adam": optax.adam, "sgd": optax.sgd, "lamb": optax.lamb}
    if private:
        table["adam_corrected"] = dp.scale_by_adam_corrected
    make = resolve("optimizer.name", name, table)
    try:
        tried = make(optax.constant_schedule(1.0), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.options={options} of {name!r}: {error}.") from error
    _returned("optimizer.name", name, tried, optax.GradientTransformation)
    shape = _schedule(config, steps)

    def factory(hyper: Hyper) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> jax.Array:
            return hyper.learning_rate * shape(count)

        if not private:
            return optax.chain(optax.scale(1 / hyper.batch_size), make(rate, **options))
        if hyper.rule is None or hyper.noise_key is None:
            raise TypeError("a private optimiser needs hyper.rule and hyper.noise_key.")
        noise = hyper.noise_multiplier, hyper.batch_size
        if name == "adam_corrected":  # it has to know the noise that it corrects for
            return dp.adam_corrected(
                rate, *noise, key=hyper.noise_key, sensitivity=hyper.rule.sensitivity(), **options
            )
        # The noise comes first, and is not the optimizer's to leave out.
        return optax.chain(dp.gaussian(*noise, key=hyper.noise_key), make(rate, **options))

    return factory


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate as a fraction of its base."""
    if not 0 <= config.warmup < steps:
        raise ValueError(f"optimizer.warmup={config.warmup} must be in [0, steps={steps}).")
    after = resolve(
        "optimizer.schedule",
        config.schedule,
        {
            "constant": lambda steps: optax.constant_schedule(1.0),
            "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
            "linear": lambda steps: optax.linear_schedule(1.0, 0.0, steps),
        },
    )(steps - config.warmup)
    try:
        wrong = jax.eval_shape(after, jax.ShapeDtypeStruct((), "int32")).shape
    except (TypeError, ValueError, AttributeError) as error:
        wrong = error
    if wrong != ():
        raise ValueError(
            f"optimizer.schedule={config.schedule!r} must return a function from the step to a "
            f"number, in jax.numpy: {str(wrong).splitlines()[0]}."
        )
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, config.warmup), after], [config.warmup]
    )


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
    if config.augmentation is not None:
        chosen.append(resolve("data.augmentation", config.augmentation, {}))
    if config.multiplicity < 1:
        raise ValueError(f"data.multiplicity={config.multiplicity} must be >= 1.")
    if config.multiplicity > 1 and not chosen:
        raise ValueError(
            f"data.multiplicity={config.multiplicity} needs an augmentation, such as data.flip."
        )
    return data.chain(*chosen) if chosen else None
