"""From a config to a run: with `names.py`, the only file that turns config values into objects.

`build` does everything that can fail on a user's mistake, and writes nothing but caches, so that
a mistake costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpjax import data, dp, finetune, models, names, rng, sharding
from dpjax.dp.per_example import METHODS
from dpjax.models import Model, Params
from dpjax.step import Hyper, LossFn

_DTYPES = ("float32", "bfloat16", "float16")

__all__ = ["Phase", "Run", "build", "functions"]


class Phase(NamedTuple):
    """One stretch of training: what trains, for how long, under which mechanism.

    Attributes:
        name: "train", or the fine-tuning set.
        trainable: predicate on parameter paths.
        steps: number of updates.
        mechanism: None without privacy.
        optimizer: makes the transform from traced values.
        learning_rate: base learning rate.
        keep_optimizer: whether optimiser state of leaves that the phase before trained goes on.
    """

    name: str
    trainable: Callable[[str], bool]
    steps: int
    mechanism: dp.Mechanism | None
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    learning_rate: float
    keep_optimizer: bool = False


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
        layout: where parameters, optimiser state and batches live.
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
    layout: sharding.Layout


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
    rule = names.clip_rule(config.dp) if config.dp is not None else None
    train, test = _data(config)
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size={config.batch_size} must be <= the {len(train)} training examples."
        )
    tuning = names.finetuning_set(config.finetune)(names.model(config.model, train.num_classes))
    params = _initial(tuning.model, config)
    apply, loss_fn = functions(tuning.model, config.data, train.shape)
    models.check_examples_independent(apply, params, _probe(tuning.model.input, train.shape))
    finetune.split(params, tuning.trainable)  # raises if nothing trains
    phases = _phases(config, tuning, dp.num_steps(len(train), config.batch_size, config.epochs))
    ledger = None
    if config.dp is not None:
        phases = _with_noise(config, phases, len(train))
        ledger = dp.Ledger(
            tuple(dp.Phase(p.name, p.mechanism) for p in phases if p.mechanism is not None),
            epsilon=config.dp.epsilon,
            delta=config.dp.delta,
        )
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
        phases=phases,
        ledger=ledger,
        layout=sharding.layout(config.sharding),
    )


def _data(config: ConfigDict) -> tuple[data.Dataset, data.Dataset]:
    """Opens the training data and the data to evaluate on."""
    spec = names.model(config.model, num_classes=1).input

    def load(split: str) -> data.Dataset:
        name, data_dir = config.data.name, config.data.data_dir
        if isinstance(spec, models.InputSpec):
            size = config.data.host_image_size
            image = data.ImageSpec(image_size=size, resample=config.data.resample)
            return data.load(name, split=split, data_dir=data_dir, spec=image)
        tokenize = models.tokenizer(models.locate(config.data.tokenizer), spec)
        return data.load_text(name, split=split, data_dir=data_dir, tokenize=tokenize)

    train = load(config.data.train_split)
    if config.data.holdout is not None:
        train, held = data.holdout(train, config.data.holdout, seed=config.seed)
    else:
        held = load(config.data.test_split)
    if config.data.subset is not None:
        train = data.subset(train, config.data.subset, seed=config.seed)
    return train, held


def _phases(config: ConfigDict, tuning: finetune.FineTuning, steps: int) -> tuple[Phase, ...]:
    """Splits the steps between linear probing and the fine-tuning set; no noise yet."""
    fraction = config.lp.fraction
    if not 0 <= fraction <= 1:
        raise ValueError(f"lp.fraction={fraction} must be in [0, 1].")
    probing = round(fraction * steps)
    rate = config.lp.learning_rate or config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"lp.learning_rate={rate} must be > 0 and finite.")
    planned = [
        ("linear-probe", finetune.head()(tuning.model).trainable, probing, rate, False),
        (
            "train",
            tuning.trainable,
            steps - probing,
            config.optimizer.learning_rate,
            config.lp.keep_optimizer,
        ),
    ]
    private = config.dp is not None
    return tuple(
        Phase(
            name=name,
            trainable=trainable,
            steps=count,
            mechanism=None,
            optimizer=names.optimizer(config.optimizer, count, config.batch_size, private=private),
            learning_rate=rate,
            keep_optimizer=keep,
        )
        for name, trainable, count, rate, keep in planned
        if count
    )


def _with_noise(
    config: ConfigDict, phases: tuple[Phase, ...], num_examples: int
) -> tuple[Phase, ...]:
    """Gives every phase a mechanism, so that their composition meets the one budget."""
    if not 0 < config.lp.noise_ratio < math.inf:
        raise ValueError(f"lp.noise_ratio={config.lp.noise_ratio} must be > 0 and finite.")
    mechanisms = dp.calibrated_phases(
        epsilon=config.dp.epsilon,
        delta=config.dp.delta,
        num_examples=num_examples,
        batch_size=config.batch_size,
        steps=[phase.steps for phase in phases],
        noise_ratios=[config.lp.noise_ratio] * (len(phases) - 1) + [1.0],
        sampler=config.dp.sampler,
        max_batch_size=config.dp.max_batch_size,
    )
    return tuple(p._replace(mechanism=m) for p, m in zip(phases, mechanisms, strict=True))


def _initial(net: Model, config: ConfigDict) -> Params:
    params = net.init(rng.public_key(config.seed, "init"))
    if config.model.weights is None:
        return params
    return net.load(params, models.locate(config.model.weights), head=config.model.keep_head)


def functions(
    net: Model, config: ConfigDict, shape: tuple[int, ...]
) -> tuple[Callable[[Params, jax.Array], jax.Array], LossFn]:
    """Returns the prediction on raw inputs, and the loss of one raw example."""
    if config.pad < 0:
        raise ValueError(f"data.pad={config.pad} must be >= 0.")
    spec = net.input
    black = 0.0 if isinstance(spec, models.TextSpec) else -spec.mean[0] / spec.std[0]
    augment = names.augmentation(config, black=black)
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


def _probe(spec: models.InputSpec | models.TextSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Public inputs for the cross-example check."""
    rng = np.random.default_rng(0)
    if isinstance(spec, models.TextSpec):
        return rng.integers(0, spec.vocab_size, (4, *shape), dtype=np.int32)
    return rng.integers(0, 256, (4, *shape), dtype=np.uint8)


def _check_values(config: ConfigDict) -> None:
    for field in ("batch_size", "log_every", "checkpoint_every", "epochs",
                  "keep_checkpoints", "microbatch", "eval_every"):  # fmt: skip
        value = config[field]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field}={value} must be > 0.")
    for field in ("physical_batch", "keep_best"):
        if config[field] < 0:
            raise ValueError(f"{field}={config[field]} must be >= 0.")
    if config.dp is not None:
        names.choose("dp.method", config.dp.method, dict.fromkeys(METHODS))
    if config.model.dtype not in _DTYPES:
        raise ValueError(f"model.dtype={config.model.dtype!r} must be one of {_DTYPES}.")
    rate = config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"optimizer.learning_rate={rate} must be > 0 and finite.")
    if config.private_seed is not None and not 0 <= config.private_seed < 2**128:
        raise ValueError(f"private_seed={config.private_seed} must be in [0, 2**128).")
