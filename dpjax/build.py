"""From config strings to objects: the only file that reads names out of a config.

`build` does everything that can fail on a user's mistake, and writes nothing but caches, so that
a mistake costs nothing.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpjax import data, dp, finetune, models, rng
from dpjax.dp.per_example import METHODS
from dpjax.models import Model, Params
from dpjax.step import Hyper, LossFn

_DTYPES = ("float32", "bfloat16", "float16")

__all__ = ["Phase", "Run", "build", "clip_rule", "finetuning_set", "model", "optimizer"]


class Phase(NamedTuple):
    """One stretch of training: what trains, for how long, under which mechanism.

    Attributes:
        name: "train", or the fine-tuning set.
        trainable: predicate on parameter paths.
        steps: number of updates.
        mechanism: None without privacy.
        optimizer: makes the transform from traced values.
        learning_rate: base learning rate.
    """

    name: str
    trainable: Callable[[str], bool]
    steps: int
    mechanism: dp.Mechanism | None
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    learning_rate: float


class Run(NamedTuple):
    """A run as objects; see `build`.

    Attributes:
        config: the resolved config, for the record.
        train: training data, private unless `ledger` is None.
        test: held-out data.
        model: the model that runs.
        params: all parameters at the start.
        merge: turns trained parameters into plain weights.
        apply: `(params, uint8 inputs [batch, ...]) -> logits`.
        loss_fn: `(params, example) -> loss` of one example.
        rule: clipping rule; None without privacy.
        phases: what is executed, in order.
        ledger: nothing executed yet; None without privacy.
    """

    config: ConfigDict
    train: data.Dataset
    test: data.Dataset
    model: Model
    params: Params
    merge: Callable[[Params], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    loss_fn: LossFn
    rule: dp.ClipRule | None
    phases: tuple[Phase, ...]
    ledger: dp.Ledger | None


def build(config: ConfigDict) -> Run:
    """Makes every object of a run and checks that they fit.

    Args:
        config: from `dpjax.config.default`.

    Returns:
        The run, ready for `loop.train`.

    Raises:
        ValueError: naming the field and its value, or what is missing where.
    """
    _check_values(config)
    rule = clip_rule(config.dp) if config.dp is not None else None
    train = data.load(
        config.data.name, split=config.data.train_split, data_dir=config.data.data_dir
    )
    test = data.load(config.data.name, split=config.data.test_split, data_dir=config.data.data_dir)
    if config.data.subset is not None:
        train = data.subset(train, config.data.subset, seed=config.seed)
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size={config.batch_size} must be <= the {len(train)} training examples."
        )
    tuning = finetuning_set(config.finetune)(model(config.model, train.num_classes))
    params = _initial(tuning.model, config)
    apply, loss_fn = _functions(tuning.model, config.data, train.shape)
    models.check_examples_independent(apply, params, _probe(train.shape))

    mechanism = None
    ledger = None
    steps = dp.num_steps(len(train), config.batch_size, config.epochs)
    if config.dp is not None:
        mechanism = dp.calibrated(
            epsilon=config.dp.epsilon,
            delta=config.dp.delta,
            num_examples=len(train),
            batch_size=config.batch_size,
            steps=steps,
            sampler=config.dp.sampler,
            max_batch_size=config.dp.max_batch_size,
        )
        ledger = dp.Ledger(
            (dp.Phase("train", mechanism),), epsilon=config.dp.epsilon, delta=config.dp.delta
        )
    phase = Phase(
        name="train",
        trainable=tuning.trainable,
        steps=steps,
        mechanism=mechanism,
        optimizer=optimizer(config.optimizer, steps, config.batch_size, private=rule is not None),
        learning_rate=config.optimizer.learning_rate,
    )
    finetune.split(params, tuning.trainable)  # raises if nothing trains
    return Run(
        config=config,
        train=train,
        test=test,
        model=tuning.model,
        params=params,
        merge=tuning.merge,
        apply=apply,
        loss_fn=loss_fn,
        rule=rule,
        phases=(phase,),
        ledger=ledger,
    )


def _choose(field: str, name: str, table: Mapping[str, Any]) -> Any:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), list(table), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{field}={name!r} must be one of {', '.join(sorted(table))}.{hint}")


def clip_rule(config: ConfigDict) -> dp.ClipRule:
    """Makes the clipping rule of `config.dp`."""
    make = _choose(
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
        rule: dp.ClipRule = make(config.bound, normalised=config.normalised)
    except ValueError as error:
        raise ValueError(f"dp.{error}") from error
    return rule


def model(config: ConfigDict, num_classes: int) -> Model:
    """Makes the model of `config.model`."""
    make, sizes = _choose(
        "model.name",
        config.name,
        {
            "vit": (models.vision_transformer, models.SIZES),
            "resnet_v2": (models.resnet_v2, models.RESNETS),
            "wide_resnet": (models.wide_resnet, {"16_4": models.WRN_16_4}),
            "efficientnet_lite": (models.efficientnet_lite, {"lite0": models.LITE0}),
            "resnet8": (models.resnet8, None),
        },
    )
    arguments = [num_classes]
    if sizes is not None:
        size = _choose("model.size", config.size, sizes)
        arguments.insert(0, _replace("model.options", size, config.options))
    made: Model = make(*arguments, head_init=config.head_init, dtype=config.dtype)
    return made


def _replace(field: str, value: Any, options: Mapping[str, Any]) -> Any:
    """Replaces fields of a frozen dataclass, answering an unknown one with the nearest."""
    for name in options:
        _choose(f"{field} field", name, value.__dataclass_fields__)
    return type(value)(**{**vars(value), **options})


def finetuning_set(text: str) -> finetune.FineTuningSet:
    """Makes a fine-tuning set from text such as "film", "blocks:last:2" or "bias+regex:cls"."""
    sets = []
    for part in text.split("+"):
        name, *rest = part.split(":")
        make = _choose(
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
    config: ConfigDict, steps: int, batch_size: int, *, private: bool
) -> Callable[[Hyper], optax.GradientTransformation]:
    """Makes the optimiser factory of `config.optimizer`; private ones take a `ClippedSum`."""
    name, options = config.name, dict(config.options)
    plain = {"adam": optax.adam, "sgd": optax.sgd, "lamb": optax.lamb}
    private_ones = {
        "adam": dp.adam, "sgd": dp.sgd, "lamb": dp.lamb, "adam_corrected": dp.adam_corrected,
    }  # fmt: skip
    make = _choose("optimizer.name", name, private_ones if private else plain)
    shape = _schedule(config, steps)

    def factory(hyper: Hyper) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> jax.Array:
            return hyper.learning_rate * shape(count)

        if not private:
            return optax.chain(optax.scale(1 / batch_size), make(rate, **options))
        if hyper.rule is None or hyper.noise_key is None:
            raise TypeError("a private optimiser needs hyper.rule and hyper.noise_key.")
        extra = {"sensitivity": hyper.rule.sensitivity()} if name == "adam_corrected" else {}
        return make(
            rate, hyper.noise_multiplier, batch_size, key=hyper.noise_key, **extra, **options
        )

    return factory


def _schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate as a fraction of its base."""
    if not 0 <= config.warmup < steps:
        raise ValueError(f"optimizer.warmup={config.warmup} must be in [0, steps={steps}).")
    rest = steps - config.warmup
    after = _choose(
        "optimizer.schedule",
        config.schedule,
        {
            "constant": optax.constant_schedule(1.0),
            "cosine": optax.cosine_decay_schedule(1.0, rest),
            "linear": optax.linear_schedule(1.0, 0.0, rest),
        },
    )
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, config.warmup), after], [config.warmup]
    )


def _initial(net: Model, config: ConfigDict) -> Params:
    params = net.init(rng.public_key(config.seed, "init"))
    if config.model.weights is None:
        return params
    return net.load(params, models.locate(config.model.weights), head=config.model.keep_head)


def _functions(
    net: Model, config: ConfigDict, shape: tuple[int, ...]
) -> tuple[Callable[[Params, jax.Array], jax.Array], LossFn]:
    """Returns the prediction on raw inputs, and the loss of one raw example."""
    spec = net.input
    if not isinstance(spec, models.InputSpec):
        raise ValueError(f"model.name: a text model cannot read images of shape {shape}.")
    if config.pad < 0:
        raise ValueError(f"data.pad={config.pad} must be >= 0.")

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

    jax.eval_shape(prepare, jax.ShapeDtypeStruct(shape, jnp.uint8))  # raises on channels, resample
    augment = _augmentation(config, black=-spec.mean[0] / spec.std[0])

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return net.apply(params, jax.vmap(prepare)(inputs))

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        image = prepare(example["input"])
        if augment is None:
            logits = net.apply(params, image)[None]
        else:
            keys = jax.random.split(example["key"], config.multiplicity)
            logits = net.apply(params, jax.vmap(lambda k: augment(image, key=k))(keys))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(example["label"], logits.shape[:1])
        )
        return jnp.mean(losses)

    return apply, loss_fn


def _augmentation(config: ConfigDict, black: float) -> Callable[..., jax.Array] | None:
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


def _probe(shape: tuple[int, ...]) -> np.ndarray:
    """Public inputs for the cross-example check."""
    return np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)


def _check_values(config: ConfigDict) -> None:
    for field in ("batch_size", "physical_batch", "log_every", "checkpoint_every", "epochs",
                  "keep_checkpoints", "microbatch", "eval_every"):  # fmt: skip
        value = config[field]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field}={value} must be > 0.")
    if config.dp is not None:
        _choose("dp.method", config.dp.method, dict.fromkeys(METHODS))
    if config.model.dtype not in _DTYPES:
        raise ValueError(f"model.dtype={config.model.dtype!r} must be one of {_DTYPES}.")
    rate = config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"optimizer.learning_rate={rate} must be > 0 and finite.")
    if config.private_seed is not None and not 0 <= config.private_seed < 2**128:
        raise ValueError(f"private_seed={config.private_seed} must be in [0, 2**128).")
