"""Export a finished run: weights, privacy statement and model card, in one folder.

    dpjax export WORKDIR FOLDER [--format=timm]

The folder is new. It can be given away: it has the weights (adapters merged), model.json with what
they need to be used, a model card (README.md) and the privacy statement, without which weights
claim nothing. `dpjax predict --workdir=FOLDER` and `dpjax.load("FOLDER")` read it. With
--format=timm or --format=transformers, those libraries load it by its path too; both are for vision
transformers, transformers for those with a class token.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dpjax import audit, build, dp, models
from dpjax.build import generator, predictor
from dpjax.commands import cli
from dpjax.files import choose, read_object
from dpjax.runtime import Workdir

FORMATS = ("dpjax", "timm", "transformers")


def export(workdir: Path, folder: Path, *, layout: str = "dpjax") -> list[Path]:
    """Writes a finished run as a folder of its own, whole or not at all.

    Args:
        workdir: of a finished run.
        folder: to write; it is new or empty.
        layout: "dpjax" (our parameter paths), or "timm" or "transformers", whose own functions then
            load the folder too.

    Returns:
        The files written.

    Guarantees:
        The folder contains nothing that the guarantee does not cover, no result of an audit either.

    Raises:
        ValueError: an unfinished run, a claim that an audit refuted, a folder with files, or a
            layout the model does not have.
    """
    choose("format", layout, dict.fromkeys(FORMATS))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists: name a new folder.")
    for name in ("config.json", "eval.json"):
        if not (workdir / name).is_file():
            raise ValueError(f"workdir={str(workdir)!r} has no {name}: has the run finished?")
    config = ConfigDict(read_object(workdir / "config.json"))
    statement = _statement(workdir, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, workdir, config, statement, layout)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(folder.iterdir())


def _fill(
    temporary: Path,
    workdir: Path,
    config: ConfigDict,
    statement: dict[str, Any] | None,
    layout: str,
) -> None:
    """Writes all files of an export into a folder that no reader knows."""
    if generator.is_language_model(workdir):
        generator.save(workdir, temporary, layout=layout)
        card = _text_card(config, statement, layout)
    else:
        trained = predictor.load(workdir)
        theirs = None if layout == "dpjax" else _theirs(config, trained, layout)
        trained.save(temporary)
        if theirs is not None:
            tensors, about = theirs
            (temporary / "weights.safetensors").unlink()
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        card = _card(workdir, config, trained, statement, layout)
    if statement is not None:
        (temporary / "privacy.json").write_text(json.dumps(statement, indent=2) + "\n")
        (temporary / "privacy.md").write_text(dp.to_markdown(statement))
        for file in temporary.iterdir():  # weights are written for their owner alone
            file.chmod(0o644)
    (temporary / "README.md").write_text(card)


def _statement(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns what may be published of the statement; None for a run without privacy."""
    run = Workdir(workdir)
    if config.dp is None:
        return None
    if not run.exists("privacy.json"):
        raise ValueError(f"workdir={str(workdir)!r} has no privacy.json: weights claim nothing.")
    if run.exists("audit.json") and audit.refuted(run.read("audit.json")):
        raise ValueError(f"workdir={str(workdir)!r}: its audit refutes the claim, see audit.json.")
    return dp.publishable(run.read("privacy.json"))


def _theirs(
    config: ConfigDict, trained: predictor.Predictor, layout: str
) -> tuple[Any, dict[str, Any]]:
    """Returns the tensors and the config.json of another library."""
    if config.model.name != "vit":
        raise ValueError(f"format={layout!r} is for model.name='vit', got {config.model.name!r}.")
    shape = build.model.size("model.options", models.SIZES, config.model)
    names = list(trained.class_names)
    tensors = models.to_layout(trained.params, shape, layout)
    return tensors, models.layout_config(shape, layout, names)


def _card(
    workdir: Path,
    config: ConfigDict,
    trained: predictor.Predictor,
    statement: dict[str, Any] | None,
    layout: str,
) -> str:
    """Returns the model card. It describes the training data by public facts alone."""
    kind = "texts" if trained.tokenize else f"images of shape {list(trained.shape)}"
    names, start = trained.class_names, config.model.weights
    lines = [
        f"# {build.model.model_title(config.model)}, fine-tuned on {config.data.name}",
        "",
        f"A classifier of {kind} into {len(names)} classes: {', '.join(names[:20])}"
        + (" and more (model.json)." if len(names) > 20 else "."),
        "",
        "## Privacy",
        "",
        *_guarantee(statement),
        "",
        "## Training",
        "",
        f"Split `{config.data.train_split}` of the data set `{config.data.name}`, whose examples "
        f"are not part of this folder. Trained: `{config.finetune}`, starting from "
        + (f"`{Path(start).name}`." if start else "random weights."),
        "",
        *_evaluation(workdir, config.data.test_split),
        "## Intended use",
        "",
        "Inputs like those of the training data, and these classes alone: every input gets one of "
        "them, with a probability that may be wrong. Training under differential privacy costs "
        "accuracy, most of all on rare classes: check each class on data of your own before a "
        "decision depends on it.",
        "",
        "## Use",
        "",
        "```python",
        *_USE[layout],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _text_card(config: ConfigDict, statement: dict[str, Any] | None, layout: str) -> str:
    """Returns the model card of a language model."""
    start = config.model.weights
    use = {
        "dpjax": ['dpjax predict --workdir=FOLDER --input="Once upon"'],
        "transformers": ["from transformers import AutoModelForCausalLM", "",
                         'model = AutoModelForCausalLM.from_pretrained("FOLDER")'],
    }[layout]  # fmt: skip
    return "\n".join(
        [
            f"# {build.model.model_title(config.model)}, fine-tuned on private text",
            "",
            f"A causal language model. Trained: `{config.finetune}`, starting from "
            + (f"`{Path(start).name}`." if start else "random weights."),
            "",
            "## Privacy",
            "",
            *_guarantee(statement),
            "",
            "It does not cover what many records say, or what the initial weights knew.",
            "",
            "## Use",
            "",
            "```",
            *use,
            "```",
            "",
        ]
    )


_USE = {
    "dpjax": ("import dpjax", "", 'predictions = dpjax.load("FOLDER").predict(inputs)',
              "predictions.names, predictions.probabilities"),
    "timm": ("import timm", "", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)'),
    "transformers": ("from transformers import AutoModelForImageClassification", "",
                     'model = AutoModelForImageClassification.from_pretrained("FOLDER")'),
}  # fmt: skip


def _guarantee(facts: dict[str, Any] | None) -> list[str]:
    if facts is None:
        return ["None: these weights were trained without privacy and may reveal their examples."]
    return [
        f"The weights are ({facts['epsilon']:.4g}, {facts['delta']:g})-differentially private: "
        f"neighboring relation {facts['neighboring_relation']}, unit {facts['unit_of_privacy']}. "
        f"Seed: {facts['seed_policy']}. The whole statement, and what it does not cover, is "
        "in privacy.md; keep it with the weights."
    ]


def _evaluation(workdir: Path, split: str) -> list[str]:
    """The held-out metrics, if the examples they were computed on are public."""
    found = read_object(workdir / "eval.json")
    if "ece" not in found:  # else it is named nonprivate/ece
        return []
    return [
        f"Held out (`{split}`): accuracy {100 * found['accuracy']:.1f} %, negative log-likelihood "
        f"{found['nll']:.3f}, expected calibration error {100 * found['ece']:.1f} %.",
        "",
    ]


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("workdir", type=cli.path, help="of a finished run")
    parser.add_argument("folder", type=cli.path, help="the folder to write")
    parser.add_argument("--format", default="dpjax", help=", ".join(FORMATS))


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    for path in export(args.workdir, args.folder, layout=args.format):
        print(path)
    return 0
