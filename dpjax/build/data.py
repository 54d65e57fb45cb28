"""`config.data` becomes the training data and the data to evaluate on."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from dpjax import data, models
from dpjax.files import resolve, returned

__all__ = ["check", "given", "opened"]


def check(config: ConfigDict) -> None:
    """Refuses a function of the user's in `config.data.name` that does not exist."""
    if ":" in config.name:
        resolve("data.name", config.name, {})


def opened(
    config: ConfigDict, spec: models.InputSpec | models.TextSpec
) -> tuple[data.Dataset, data.Dataset]:
    """Opens the training data and the data to evaluate on, for the input of a model."""
    own = config.data.name
    if ":" in own:
        function = resolve("data.name", own, {})
        reader: Callable[..., data.Dataset] = lambda name, *, split, data_dir: returned(  # noqa: E731
            "data.name", own, function(split), data.Dataset
        )
    elif isinstance(spec, models.InputSpec):
        size, resample = config.data.host_image_size, config.data.resample
        image = data.ImageSpec(image_size=size, resample=resample)
        reader = functools.partial(data.load, spec=image)
    else:
        tokenize = models.tokenizer(models.locate(config.data.tokenizer), spec)
        reader = functools.partial(data.load_text, tokenize=tokenize)

    def load(split: str) -> data.Dataset:
        return reader(config.data.name, split=split, data_dir=config.data.data_dir)

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


def given(
    config: ConfigDict, datasets: tuple[data.Dataset, data.Dataset]
) -> tuple[data.Dataset, data.Dataset]:
    """Checks that the config asks for no part of data that it did not open."""
    for field in ("holdout", "subset"):
        if config.data[field] is not None:
            raise ValueError(f"data.{field}={config.data[field]} must be None for given datasets.")
    return datasets
