"""`config.data` becomes the training data and the data to evaluate on."""

from __future__ import annotations

from ml_collections import ConfigDict

from dpjax import data, models
from dpjax.build.model import model

__all__ = ["given", "opened"]


def opened(config: ConfigDict) -> tuple[data.Dataset, data.Dataset]:
    """Opens the training data and the data to evaluate on."""
    spec = model(config.model, num_classes=1).input

    def load(split: str) -> data.Dataset:
        name, data_dir = config.data.name, config.data.data_dir
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


def given(
    config: ConfigDict, datasets: tuple[data.Dataset, data.Dataset]
) -> tuple[data.Dataset, data.Dataset]:
    """Checks that the config asks for no part of data that it did not open."""
    for field in ("holdout", "subset"):
        if config.data[field] is not None:
            raise ValueError(f"data.{field}={config.data[field]} must be None for given datasets.")
    return datasets
