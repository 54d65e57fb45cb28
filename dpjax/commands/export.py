"""Exports a finished run.

    python -m dpjax.commands.export WORKDIR FILE.safetensors [--format=timm]

The weights are plain (adapters merged), and the privacy statement is copied beside them, because
weights without it claim nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dpjax import build, models

__all__ = ["export", "main"]

FORMATS = ("dpjax", "timm")


def export(workdir: Path, target: Path, *, layout: str = "dpjax") -> list[Path]:
    """Writes the weights of a run and its statement.

    Args:
        workdir: of a finished run.
        target: a `.safetensors` file; the statement goes to `target` with `.privacy.json` and
            `.privacy.md` as endings.
        layout: "dpjax" (our parameter paths) or "timm" (loads into timm's model; ViT only).

    Returns:
        The files written.

    Raises:
        ValueError: an unfinished run, another ending, or a layout the model does not have.
    """
    if layout not in FORMATS:
        raise ValueError(f"format={layout!r} must be one of {FORMATS}.")
    if target.suffix != ".safetensors":
        raise ValueError(f"{str(target)!r} must end in .safetensors.")
    for name in ("config.json", "weights.safetensors"):
        if not (workdir / name).is_file():
            raise ValueError(f"workdir={str(workdir)!r} has no {name}: has the run finished?")
    weights = workdir / "weights.safetensors"
    if layout == "timm":
        config = ConfigDict(json.loads((workdir / "config.json").read_text()))
        save_file(_timm(config, weights), target)
    else:
        shutil.copyfile(weights, target)
    written = [target]
    for ending in ("json", "md"):
        statement = workdir / f"privacy.{ending}"
        if statement.is_file():
            written.append(target.with_suffix(f".privacy.{ending}"))
            shutil.copyfile(statement, written[-1])
    return written


def _timm(config: ConfigDict, weights: Path) -> dict[str, np.ndarray]:
    if config.model.name != "vit":
        raise ValueError(f"format='timm' is for model.name='vit', got {config.model.name!r}.")
    shape = build.model.size("model.options", models.SIZES, config.model)
    tensors = models.read_tensors(weights)
    net = models.vision_transformer(shape, len(tensors["head/bias"]))
    like: Any = jax.eval_shape(net.init, jax.random.key(0))
    return models.to_timm(models.load_weights(weights, like), shape)


def main(argv: list[str]) -> int:
    """Runs the command; exit code 2 is a mistake, and nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m dpjax.commands.export", description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", default="dpjax", choices=FORMATS)
    arguments = parser.parse_args(argv)
    try:
        for path in export(arguments.workdir, arguments.target, layout=arguments.format):
            print(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
