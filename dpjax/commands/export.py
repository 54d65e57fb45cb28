"""Export a finished run's weights, with its privacy statement.

    dpjax export WORKDIR FILE.safetensors [--format=timm]

The weights are plain (adapters merged), and the privacy statement is written beside them, because
weights without it claim nothing. Both hold only what may be published.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from safetensors.numpy import save

from dpjax import audit, build, dp, models
from dpjax.commands import cli
from dpjax.files import choose, replacing
from dpjax.runtime import Workdir

FORMATS = ("dpjax", "timm")


def export(workdir: Path, target: Path, *, layout: str = "dpjax") -> list[Path]:
    """Writes the weights of a run and its statement, both as they may be published.

    Args:
        workdir: of a finished run.
        target: a `.safetensors` file; the statement goes to `target` with `.privacy.json` and
            `.privacy.md` as endings.
        layout: "dpjax" (our parameter paths) or "timm" (loads into timm's model; ViT only).

    Returns:
        The files written.

    Guarantees:
        Every file is written whole or not at all, and never is a statement beside weights that it
        is not about: an older one is removed first, and the new one comes last. The statement
        contains nothing that the guarantee does not cover: no result of an audit.

    Raises:
        ValueError: an unfinished run, a claim that an audit refuted, another ending, or a layout
            the model does not have.
    """
    choose("format", layout, dict.fromkeys(FORMATS))
    if target.suffix != ".safetensors":
        raise ValueError(f"{str(target)!r} must end in .safetensors.")
    run = Workdir(workdir)
    for name in ("config.json", "weights.safetensors"):
        if not run.exists(name):
            raise ValueError(f"workdir={str(workdir)!r} has no {name}: has the run finished?")
    config = ConfigDict(run.read("config.json"))
    statement = run.read("privacy.json") if run.exists("privacy.json") else None
    if config.dp is not None and statement is None:
        raise ValueError(f"workdir={str(workdir)!r} has no privacy.json: weights claim nothing.")
    if run.exists("audit.json") and audit.refuted(run.read("audit.json")):
        raise ValueError(f"workdir={str(workdir)!r}: its audit refutes the claim, see audit.json.")
    weights = workdir / "weights.safetensors"
    content = _timm(config, weights) if layout == "timm" else weights.read_bytes()
    beside = {ending: target.with_suffix(f".privacy.{ending}") for ending in ("json", "md")}
    for path in beside.values():
        path.unlink(missing_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    if statement is None:
        return [target]
    statement = dp.publishable(statement)
    texts = {"json": json.dumps(statement, indent=2) + "\n", "md": dp.to_markdown(statement)}
    for ending, path in beside.items():
        with replacing(path) as temporary:
            temporary.write_text(texts[ending])
    return [target, *beside.values()]


def _timm(config: ConfigDict, weights: Path) -> bytes:
    if config.model.name != "vit":
        raise ValueError(f"format='timm' is for model.name='vit', got {config.model.name!r}.")
    shape = build.model.size("model.options", models.SIZES, config.model)
    tensors = models.read_tensors(weights)
    net = models.vision_transformer(shape, len(tensors["head/bias"]))
    like: Any = jax.eval_shape(net.init, jax.random.key(0))
    content: bytes = save(models.to_timm(models.load_weights(weights, like), shape))
    return content


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("workdir", type=cli.path, help="of a finished run")
    parser.add_argument("target", type=cli.path, help="the file to write, .safetensors")
    parser.add_argument("--format", default="dpjax", help=", ".join(FORMATS))


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    for path in export(args.workdir, args.target, layout=args.format):
        print(path)
    return 0
