"""A finished run of a language model becomes text, or a folder that transformers loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from dpjax import models
from dpjax.build import model
from dpjax.build.predictor import finished
from dpjax.config import default
from dpjax.files import read_object

__all__ = ["is_language_model", "load", "save"]


def is_language_model(directory: str | os.PathLike[str]) -> bool:
    """Whether a finished or exported run is of a language model."""
    file = Path(directory).expanduser() / "model.json"
    return file.is_file() and read_object(file).get("task") == "causal_lm"


def load(directory: str | os.PathLike[str], *, weights: str | None = None) -> models.Generator:
    """Returns the generator of a finished run, or of an export, with adapters merged.

    Args:
        directory: the work directory of a run, or what `dpjax export` wrote.
        weights: file in it; by default its weights.

    Raises:
        ValueError: it has not finished, or is not of a language model.
        FileNotFoundError: the tokenizer that the run names is gone.
    """
    folder, file, about = finished(directory, weights)
    if about.get("task") != "causal_lm":
        raise ValueError(f"{str(folder)!r} is not a run of a language model.")
    config = default()
    with config.unlocked():
        config.model.update(about["model"])
    shape = model.size("model.options", models.DECODERS, config.model)
    net = models.decoder(shape, dtype=config.model.dtype)
    like: Any = jax.eval_shape(net.init, jax.random.key(0))
    params = net.load(like, str(file))
    spec = models.TextSpec(shape.max_length, shape.vocab_size, causal=True)
    codec = models.text_codec(_tokenizer(folder, about), spec, end=about["data"]["end_token"])
    return models.Generator(shape, params, codec, config.model.dtype)


def save(
    workdir: str | os.PathLike[str], folder: str | os.PathLike[str], *, layout: str = "transformers"
) -> None:
    """Writes weights with adapters merged, shape and tokenizer of a finished run.

    Args:
        workdir: of the run.
        folder: to write; it may exist.
        layout: "transformers", whose `AutoModelForCausalLM.from_pretrained(folder)` reads it, or
            "dpjax" (our parameter paths). `load` reads both.

    Raises:
        ValueError: as for `load`, or another layout.
        FileNotFoundError: the tokenizer is gone.
    """
    workdir, folder = Path(workdir).expanduser(), Path(folder)
    if layout not in ("dpjax", "transformers"):
        raise ValueError(f"format={layout!r} must be dpjax or transformers for a language model.")
    trained = load(workdir)
    about = read_object(workdir / "model.json")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "dpjax":
        models.save_weights(trained.params, folder / "weights.safetensors")
    else:
        tensors, shape = models.to_hugging_face(trained.params, trained.config)
        if trained.codec.end is not None:
            shape["eos_token_id"] = trained.codec.end
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    trained.codec.library.save(str(folder / "tokenizer.json"))
    # The weights are whole, so those they started from, perhaps a path of this machine, are not
    # needed again.
    about["model"]["weights"], about["data"]["tokenizer"] = None, "tokenizer.json"
    (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")


def _tokenizer(folder: Path, about: dict[str, Any]) -> str:
    named = about["data"]["tokenizer"]
    own = folder / named
    return str(own) if own.is_file() else models.locate(named)
