"""A finished run becomes a classifier of new images or texts.

`description` says what a run's weights need to be used; it is `model.json` of the run, and `load`
reads it. It depends on the training data only through the classes and the size of inputs, which are
taken as public.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from dpjax import data, models
from dpjax.build import loss
from dpjax.build.model import initial, model, weights_file
from dpjax.build.run import Run
from dpjax.config import default
from dpjax.files import local_path, read_object
from dpjax.models import Model, Params

__all__ = ["Predictions", "Predictor", "description", "finished", "image_files", "load"]

_FACTS = ("class_names", "data", "model", "seed", "shape")  # of every model.json
_ROWS = 64  # examples at once; fewer are padded, so that one program serves all


class Predictions(NamedTuple):
    """What a classifier says about some inputs.

    Attributes:
        names: name of the most probable class of each input.
        labels: its number, int32 [inputs].
        probabilities: of every class, float32 [inputs, classes]; if the run fitted a temperature
            privately, it is part of the weights.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """A trained classifier, with everything between a file and a class name.

    Attributes:
        model: the pure functions; `model.module` is the Flax module of the features.
        params: all parameters, adapters merged; `params[model.head]` is the head's.
        class_names: one per class.
        shape: of one stored input, [H, W, C] or [L].
        description: as `model.json` says, see `description`.
        tokenize: of a text model: maps texts to int32 tokens [texts, L]; None for images.
    """

    model: Model
    params: Params
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    description: dict[str, Any]
    tokenize: Callable[[list[str]], np.ndarray] | None

    def __repr__(self) -> str:
        kind = "images" if self.tokenize is None else "texts"
        return f"Predictor({kind} of shape {self.shape}, classes={len(self.class_names)})"

    def predict(self, inputs: Any) -> Predictions:
        """Predicts the class of every input.

        Args:
            inputs: for images, a file, a folder (its images, sub-folders included, by name), an
                array uint8 [n, H, W, C], or a list of files, `PIL.Image`s and arrays [H, W, C], of
                any size; for text, a text or a list of texts, or tokens int32 [n, L].

        Raises:
            ValueError: an input is unreadable, naming it, or of another kind.
        """
        rows: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        for item in self._items(inputs):
            batch.append(self.read(item))
            if len(batch) == _ROWS:
                rows.append(self._probabilities(batch))
                batch = []
        if batch:
            rows.append(self._probabilities(batch))
        classes = len(self.class_names)
        probabilities = np.concatenate([np.zeros((0, classes), np.float32), *rows])
        labels = probabilities.argmax(axis=1).astype(np.int32)
        return Predictions(tuple(self.class_names[k] for k in labels), labels, probabilities)

    def read(self, item: Any) -> np.ndarray:
        """Returns one input as the data set stores it, `[*shape]`; see `predict`.

        A photo is turned upright, its centered square is resized, and color becomes gray where the
        data set is gray.

        Raises:
            ValueError: as `predict`.
        """
        spec = self.model.input
        if self.tokenize is not None and isinstance(spec, models.TextSpec):
            if isinstance(item, str):
                return np.asarray(self.tokenize([item])[0])
            tokens = np.asarray(item)
            if tokens.dtype.kind not in "iu" or tokens.shape != self.shape:
                raise ValueError(f"an input must be text or {self.shape} token ids, got {item!r}.")
            wrong = tokens[(tokens < 0) | (tokens >= spec.vocab_size)]
            if wrong.size:
                raise ValueError(f"token {wrong[0]} must be in [0, {spec.vocab_size}).")
            return tokens.astype(np.int32)
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == self.shape:
            return item
        height, width, channels = self.shape
        # Images of other proportions than the data set's are refused by `fit`.
        side = height if height == width else None
        resize = data.ImageSpec(image_size=side, resample=self.description["data"]["resample"])
        upright = ImageOps.exif_transpose(_opened(item))
        if channels == 1 and not upright.mode.startswith(("I", "F")):
            upright = upright.convert("L")
        try:
            return data.fit(upright, (height, width, channels), resize)
        except ValueError as error:
            raise ValueError(f"{_name(item)}: {error}") from error

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `weights.safetensors` and `model.json` (and a tokenizer), which `load` reads."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # The weights are whole, so those they started from, perhaps a path of this machine, are not
        # needed again.
        about = {**self.description, "model": {**self.description["model"], "weights": None}}
        if self.tokenize is not None:
            source = models.locate(about["data"]["tokenizer"])
            about = {**about, "data": {**about["data"], "tokenizer": "tokenizer.json"}}
            (folder / "tokenizer.json").write_bytes(Path(source).read_bytes())
        models.save_weights(self.params, folder / "weights.safetensors")
        (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")

    def _items(self, inputs: Any) -> Iterable[Any]:
        if self.tokenize is not None:
            return [inputs] if isinstance(inputs, str) else inputs
        if isinstance(inputs, (str, os.PathLike)):
            return image_files(Path(inputs)) if Path(inputs).is_dir() else [inputs]
        if isinstance(inputs, Image.Image):
            return [inputs]
        if isinstance(inputs, np.ndarray) and inputs.ndim != 4:
            raise ValueError(f"an array of shape {inputs.shape} must be uint8 [n, H, W, C].")
        return inputs

    @functools.cached_property
    def _apply(self) -> Callable[[Params, np.ndarray], jax.Array]:
        settings = default().data
        settings.update(self.description["data"])
        prepare = loss.preparation(self.model.input, settings, self.shape)

        @jax.jit
        def apply(params: Params, inputs: jax.Array) -> jax.Array:
            return jax.nn.softmax(self.model.apply(params, jax.vmap(prepare)(inputs)), axis=-1)

        return apply

    def _probabilities(self, batch: list[np.ndarray]) -> np.ndarray:
        padded = np.zeros((_ROWS, *self.shape), batch[0].dtype)
        padded[: len(batch)] = batch
        return np.asarray(self._apply(self.params, padded))[: len(batch)]


def image_files(folder: Path) -> list[Path]:
    """Returns the images of a folder and its sub-folders, by name; hidden ones are left out."""
    endings = data.image_suffixes()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )


def _opened(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item.copy()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[-1] not in (1, 3):
            raise ValueError(f"an array of {item.dtype} {item.shape} must be uint8 [H, W, 1 or 3].")
        return Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
    try:
        image = data.open_image(Path(item).read_bytes())
        image.load()
    except Exception as error:  # Pillow raises a dozen unrelated types on bad bytes
        raise ValueError(f"{_name(item)} cannot be read as an image: {error}.") from error
    return image


def _name(item: Any) -> str:
    return repr(str(item)) if isinstance(item, (str, os.PathLike)) else "an image"


def description(run: Run) -> dict[str, Any]:
    """Returns what the weights of a run need to be used: model, input and class names.

    The fields "model", "data" and "seed" are those of the config; "class_names" and "shape" are
    those of the training data, and taken as public.
    """
    config = run.config
    kept = ("host_image_size", "pad", "resample", "tokenizer", "end_token")
    return {
        "task": config.task,
        "class_names": list(run.train.class_names),
        "shape": list(run.train.shape),
        "model": json.loads(config.model.to_json()),
        "seed": config.seed,
        "data": {name: config.data[name] for name in kept},
    }


def finished(
    directory: str | os.PathLike[str], weights: str | None = None
) -> tuple[Path, Path, dict[str, Any]]:
    """Returns the folder of a finished or exported run, its file of weights and its `model.json`.

    Args:
        directory: the folder.
        weights: name of the file; None finds it.

    Raises:
        ValueError: a file is missing, naming it.
    """
    folder = local_path("workdir", directory)
    if weights is None:  # timm and transformers call the file of an export model.safetensors
        known = ("weights.safetensors", "model.safetensors")
        weights = next((name for name in known if (folder / name).is_file()), known[0])
    for name in ("model.json", weights):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no {name}: has the run finished?")
    return folder, folder / weights, read_object(folder / "model.json", "data", "model")


def load(directory: str | os.PathLike[str], *, weights: str | None = None) -> Predictor:
    """Loads a finished run, or an exported one, to predict with it.

    Args:
        directory: the work directory of a run, or what `dpjax export` wrote.
        weights: file in it; by default its weights, in whichever layout. The file
            "weights_ema.safetensors" has the average of the parameters, if one was kept.

    Raises:
        ValueError: a file is missing or does not fit, naming it.
    """
    folder, file, about = finished(directory, weights)
    if about.get("task") == "causal_lm":
        raise ValueError(
            f"{str(folder)!r} is a language model: dpjax predict writes text with it, and so does "
            "dpjax.build.generator.load."
        )
    about = read_object(folder / "model.json", *_FACTS)
    config = default()
    with config.unlocked():
        config.model.update(about["model"])
        config.seed = about["seed"]
    names, shape = tuple(about["class_names"]), tuple(about["shape"])
    net = model(config.model, len(names))
    params = _params(net, config, file)
    tokenize = None
    if isinstance(net.input, models.TextSpec):
        own = folder / about["data"]["tokenizer"]
        if own.is_file():
            about["data"]["tokenizer"] = str(own)
        tokenize = models.tokenizer(models.locate(about["data"]["tokenizer"]), net.input)
    return Predictor(net, params, names, shape, about, tokenize)


def _params(net: Model, config: ConfigDict, file: Path) -> Params:
    """All parameters of a model; a file of the head alone keeps the body of before the training."""
    like = jax.eval_shape(net.init, jax.random.key(0))
    tensors = models.read_tensors(file)
    if all(path.split("/")[0] == net.head for path in tensors):
        params = initial(net, config, weights_file(config.model))
        return {**params, net.head: models.unflatten(dict(tensors))[net.head]}
    if f"{net.head}/kernel" in tensors:  # our own names; "pos_embed" is timm's too
        return models.load_weights(str(file), like)
    return net.load(like, str(file), head=True)
