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
import optax
from ml_collections import ConfigDict

from dpjax import budget, data, dp, finetune, models, names, planner, rng, sharding
from dpjax.budget import Phase, Temperature
from dpjax.data.dataset import splits_overlap
from dpjax.dp.per_example import METHODS
from dpjax.models import Model, Params
from dpjax.step import LossFn

_DTYPES = ("float32", "bfloat16", "float16")

__all__ = ["Phase", "Run", "build", "functions"]


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
        rule: clipping rule, at the first phase's bound; None without privacy.
        adaptive: how the bound follows a quantile; None if it does not.
        temperature: None if no temperature is fitted.
        batch_plan: why the batch size is what it is, if the config left it to the planner.
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
    adaptive: dp.QuantileBound | None
    temperature: Temperature | None
    batch_plan: planner.Plan | None
    phases: tuple[Phase, ...]
    ledger: dp.Ledger | None
    layout: sharding.Layout

    @property
    def evaluates_on_private_data(self) -> bool:
        """Whether the held-out data may be of the training split: its metrics are not private."""
        train, test = self.train, self.test
        return train.name == test.name and splits_overlap(train.split, test.split)


def build(config: ConfigDict, *, datasets: tuple[data.Dataset, data.Dataset] | None = None) -> Run:
    """Makes every object of a run and checks that they fit.

    Args:
        config: from `dpjax.config.default`.
        datasets: training data and held-out data in place of those that `config.data` names.

    Returns:
        The run, ready for `loop.train`.

    Raises:
        ValueError: naming the field and its value, or what is missing where.
    """
    _check_values(config)
    adaptive = names.adaptive_bound(config.dp) if config.dp is not None else None
    rule = None
    for _, bound in reversed(budget.bounds(config)):  # the first one stays
        rule = names.clip_rule(config.dp, bound) if config.dp is not None else None
    train, test = _data(config) if datasets is None else _given(config, datasets)
    train, temperature = budget.temperature(config, train)
    sizes, plan = budget.batch_sizes(config, len(train))
    tuning = names.finetuning_set(config.finetune)(names.model(config.model, train.num_classes))
    params = _initial(tuning.model, config)
    apply, loss_fn = functions(tuning.model, config.data, train.shape)
    models.check_examples_independent(apply, params, models.probe(tuning.model.input, train.shape))
    finetune.split(params, tuning.trainable)  # raises if nothing trains
    phases = budget.phases(config, tuning, sizes, len(train))
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
        adaptive=adaptive,
        temperature=temperature,
        batch_plan=plan,
        phases=phases,
        ledger=budget.ledger(config, phases, temperature),
        layout=sharding.layout(config.sharding),
    )


def _data(config: ConfigDict) -> tuple[data.Dataset, data.Dataset]:
    """Opens the training data and the data to evaluate on."""
    spec = names.model(config.model, num_classes=1).input

    def load(split: str) -> data.Dataset:
        name, data_dir = config.data.name, config.data.data_dir
        if ":" in name:
            return names.dataset(name, split)
        if isinstance(spec, models.InputSpec):
            size = config.data.host_image_size
            image = data.ImageSpec(image_size=size, resample=config.data.resample)
            return data.load(name, split=split, data_dir=data_dir, spec=image)
        tokenize = models.tokenizer(models.locate(config.data.tokenizer), spec)
        return data.load_text(name, split=split, data_dir=data_dir, tokenize=tokenize)

    train = load(config.data.train_split)
    field = "data.holdout"
    try:
        if config.data.holdout is not None:
            train, held = data.holdout(train, config.data.holdout, seed=config.seed)
        field = "data.subset"
        if config.data.subset is not None:
            train = data.subset(train, config.data.subset, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if config.data.holdout is None:
        held = load(config.data.test_split)
    return train, held


def _given(
    config: ConfigDict, datasets: tuple[data.Dataset, data.Dataset]
) -> tuple[data.Dataset, data.Dataset]:
    """Checks that the config asks for no part of data that it did not open."""
    for field in ("holdout", "subset"):
        if config.data[field] is not None:
            raise ValueError(f"data.{field}={config.data[field]} must be None for given datasets.")
    return datasets


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


def _check_values(config: ConfigDict) -> None:
    for field in ("log_every", "checkpoint_every", "epochs",
                  "keep_checkpoints", "microbatch", "eval_every"):  # fmt: skip
        value = config[field]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field}={value} must be > 0.")
    if not 0 <= config.lp.fraction <= 1:
        raise ValueError(f"lp.fraction={config.lp.fraction} must be in [0, 1].")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema={config.ema} must be in [0, 1).")
    size = config.physical_batch
    if size != "auto" and not (isinstance(size, int) and size > 0):
        raise ValueError(f"physical_batch={size!r} must be 'auto' or a whole number > 0.")
    if config.keep_best < 0:
        raise ValueError(f"keep_best={config.keep_best} must be >= 0.")
    if config.dp is not None:
        names.sampler(config.dp)
        names.choose("dp.method", config.dp.method, dict.fromkeys(METHODS))
    if config.model.dtype not in _DTYPES:
        raise ValueError(f"model.dtype={config.model.dtype!r} must be one of {_DTYPES}.")
    rate = config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"optimizer.learning_rate={rate} must be > 0 and finite.")
    if config.private_seed is not None and not 0 <= config.private_seed < 2**128:
        raise ValueError(f"private_seed={config.private_seed} must be in [0, 2**128).")
