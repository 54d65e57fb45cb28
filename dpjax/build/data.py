"""`config.data` becomes the training data and the data to evaluate on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dpjax import data, models
from dpjax.build import next_token
from dpjax.files import resolve, returned

__all__ = ["check", "given", "most_examples", "opened"]


def check(config: ConfigDict) -> None:
    """Refuses a user's function that does not exist, and an impossible part of the data."""
    if ":" in config.name:
        resolve("data.name", config.name, {})
        if config.label_key is not None:
            raise ValueError(
                f"data.label_key={config.label_key!r} must be None for a function of your own, "
                "which returns the labels itself."
            )
    for field in ("name", "train_split", "test_split"):
        if not config[field]:
            raise ValueError(f"data.{field}={config[field]!r} must not be empty.")
    if config.holdout is not None and not 0 < config.holdout < 1:
        raise ValueError(f"data.holdout={config.holdout} must be in (0, 1).")
    part = config.subset
    whole = isinstance(part, int) and not isinstance(part, bool) and part >= 1
    if part is not None and not whole and not (isinstance(part, float) and 0 < part <= 1):
        raise ValueError(
            f"data.subset={part!r} must be a fraction in (0, 1], or a whole number of examples per "
            "class, >= 1."
        )
    limit = config.unit_records
    whole = config.unit is None and config.long_records == "cut"  # a record is an example
    if limit < 1 or (whole and limit != 1):
        raise ValueError(
            f"data.unit_records={limit} must be >= 1, and 1 unless data.unit names whose data a "
            "record is, or data.long_records='split' makes a record a unit of windows."
        )
    if not whole and isinstance(config.subset, int):
        raise ValueError(
            f"data.subset={config.subset} shots per class would divide units: give a fraction."
        )


def most_examples(config: ConfigDict) -> int | None:
    """Returns how many training examples there can be, from the description of the data alone.

    A subset, a share that is held out and units make fewer. None: only opening the data shows it.

    Raises:
        ValueError: the data, or the split, is not there.
    """
    section = config.data
    if ":" in section.name or config.task == "causal_lm":
        return None
    return data.stored_examples(section.name, split=section.train_split, data_dir=section.data_dir)


def opened(
    config: ConfigDict, spec: models.InputSpec | models.TextSpec
) -> tuple[data.Dataset | data.Units, data.Dataset]:
    """Opens the training data and the data to evaluate on, for the input of a model.

    Raises:
        ValueError: data that cannot be opened, or that does not fit together.
    """
    own = config.data.name
    if ":" in own:
        function = resolve("data.name", own, {})
        reader: Callable[..., data.Dataset] = lambda name, *, split, data_dir: returned(  # noqa: E731
            "data.name", own, function(split), data.Dataset
        )
    elif config.task == "causal_lm" and isinstance(spec, models.TextSpec):
        reader = next_token.opened(config, spec)
    elif isinstance(spec, models.InputSpec):
        size, resample = config.data.host_image_size, config.data.resample
        label_key = config.data.label_key
        image = data.ImageSpec(image_size=size, resample=resample, label_key=label_key)
        reader = functools.partial(data.load, spec=image)
    else:
        tokenize = models.tokenizer(models.locate(config.data.tokenizer), spec)
        reader = functools.partial(
            data.load_text, tokenize=tokenize, label_key=config.data.label_key
        )

    def load(split: str, **whose: str | None) -> data.Dataset:
        return reader(config.data.name, split=split, data_dir=config.data.data_dir, **whose)

    # A function of the user's returns the units with the data.
    whose = {} if ":" in own else {"unit": config.data.unit}
    train: data.Dataset | data.Units = in_units(config, load(config.data.train_split, **whose))
    field = "data.holdout"
    try:
        if config.data.holdout is not None:
            train, rest = data.holdout(train, config.data.holdout, seed=config.seed)
            held = rest.records if isinstance(rest, data.Units) else rest
        field = "data.subset"
        if config.data.subset is not None:
            train = data.subset(train, config.data.subset, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if config.data.holdout is None:
        held = load(config.data.test_split)
    return _fitting(config, train, held)


def in_units(config: ConfigDict, train: data.Dataset) -> data.Dataset | data.Units:
    """Groups training data by unit, if `config.data.unit` asks for it."""
    windows = config.task == "causal_lm" and config.data.long_records == "split"
    if config.data.unit is None and not windows:
        return train
    if train.units is None:
        raise ValueError(
            f"data.unit={config.data.unit!r}: {train!r} does not say whose data a record is."
        )
    return data.Units(train, config.data.unit_records)


def given(
    config: ConfigDict, datasets: tuple[data.Dataset, data.Dataset]
) -> tuple[data.Dataset | data.Units, data.Dataset]:
    """Checks that the config asks for no part of data that it did not open, and that they fit."""
    for field in ("holdout", "subset", "label_key"):
        if config.data[field] is not None:
            raise ValueError(f"data.{field}={config.data[field]} must be None for given datasets.")
    train, held = _fitting(config, *datasets)
    return in_units(config, train), held


def _fitting(config: ConfigDict, train: Any, held: data.Dataset) -> tuple[Any, data.Dataset]:
    """Refuses data to evaluate on whose inputs or classes are not those of the training data."""
    if config.task == "classification" and train.num_classes < 2:
        raise ValueError(
            f"the training data {train.name!r} has one class, {train.class_names[0]!r}: there is "
            "nothing to tell apart."
        )
    names = (f"held-out data {held.name!r} split {held.split!r}", f"training data {train.name!r}")
    if held.shape != train.shape or held.source.dtype != train.source.dtype:
        raise ValueError(
            f"the {names[0]} has inputs {held.source.dtype} {list(held.shape)}, but the {names[1]} "
            f"{train.source.dtype} {list(train.shape)}; they must be the same."
        )
    for label, name in enumerate(held.class_names):
        here = train.class_names[label] if label < train.num_classes else None
        if here != name:
            where = f"{here!r} in" if here is not None else "no class of"
            raise ValueError(
                f"label {label} of the {names[0]} is {name!r}, but {where} the {names[1]}, which "
                f"has {train.num_classes} classes; labels must mean the same in both."
            )
    return train, held
