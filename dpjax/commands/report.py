"""Draw the figures of a run, or rebuild a study's report, from files alone.

    dpjax report WORKDIR...

A directory with `study.json` holds a study (see `experiments/study.py`): the file named there, seen
from the directory in which this command runs, is asked for its `report(workdir)`.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from dpjax.commands import cli
from dpjax.runtime import read_jsonl


def figures(workdir: Path) -> list[Path]:
    """Draws `learning_curve.png` and, for a classifier, `reliability.png`.

    Args:
        workdir: of a run that has been evaluated.

    Returns:
        The files written.

    Raises:
        ValueError: `metrics.jsonl` or `eval.json` is missing, or holds no evaluation.
    """
    for name in ("metrics.jsonl", "eval.json"):
        if not (workdir / name).is_file():
            raise ValueError(f"workdir={str(workdir)!r} has no {name}: has the run finished?")
    rows = list(read_jsonl(workdir / "metrics.jsonl"))
    final = json.loads((workdir / "eval.json").read_text())
    curve = _learning_curve(workdir, rows)
    # A language model has no classes whose probabilities could be checked.
    return [curve, _reliability(workdir, final)] if "reliability" in final else [curve]


def study(workdir: Path) -> list[Path]:
    """Rebuilds the tables and figures of a study; returns the files written.

    Raises:
        ValueError: the study's file is not there, or it defines no `report`.
    """
    file = json.loads((workdir / "study.json").read_text())["config"].partition(":")[0]
    if not Path(file).is_file():
        raise ValueError(f"study {file!r} is not a file: run this where {file!r} is.")
    module = runpy.run_path(file)
    if "report" not in module:
        raise ValueError(f"study {file!r} defines no report().")
    return list(module["report"](workdir))


def _learning_curve(workdir: Path, rows: list[dict[str, float]]) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    train = [(r["step"], r["nonprivate/loss"]) for r in rows if "nonprivate/loss" in r]
    begin = "nonprivate/eval/" if any("nonprivate/eval/nll" in r for r in rows) else "eval/"
    held = [r for r in rows if f"{begin}nll" in r]
    if not held:
        raise ValueError(f"workdir={str(workdir)!r}: metrics.jsonl holds no evaluation.")
    if train:
        left.plot(*zip(*train), color="0.75", label="private batches (not private)")
    steps = [r["step"] for r in held]
    held_out = "held out" if begin == "eval/" else "held out of the private data (not private)"
    left.plot(steps, [r[f"{begin}nll"] for r in held], "o-", color="C0", label=held_out)
    left.set(xlabel="step", ylabel="cross-entropy [nats]", title="Loss")
    left.legend()
    right.plot(steps, [100 * r[f"{begin}accuracy"] for r in held], "o-", color="C0")
    right.set(xlabel="step", ylabel="held-out accuracy [%]", title="Accuracy", ylim=(0, 100))
    if all("epsilon" in r for r in held):
        twin = right.twinx()
        twin.plot(steps, [r["epsilon"] for r in held], "--", color="C3")
        twin.set_ylabel("epsilon spent (dashed)", color="C3")
        twin.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _save(figure, workdir / "learning_curve.png")


def _reliability(workdir: Path, final: dict[str, object]) -> Path:
    bins = {name: np.asarray(values) for name, values in final["reliability"].items()}  # type: ignore[attr-defined]
    count, confidence, accuracy = bins["count"], bins["confidence"], bins["accuracy"]
    edges = np.linspace(0, 1, len(count) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    used = count > 0
    width = edges[1] - edges[0]
    top.plot([0, 1], [0, 1], "--", color="0.5", label="perfect calibration")
    top.bar(edges[:-1][used], accuracy[used], width, align="edge", alpha=0.6, edgecolor="white")
    top.plot(confidence[used], accuracy[used], "o", color="C1", label="mean confidence of the bin")
    top.set(
        ylabel="accuracy", ylim=(0, 1), xlim=(0, 1),
        title=f"Reliability on held-out data: ECE {100 * final['ece']:.1f} %, "  # type: ignore[operator]
        f"MCE {100 * final['mce']:.1f} %",  # type: ignore[operator]
    )  # fmt: skip
    top.legend(loc="upper left")
    bottom.bar(edges[:-1], count, width, align="edge", color="0.6", edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="examples")
    return _save(figure, workdir / "reliability.png")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument(
        "workdirs", nargs="+", type=Path, metavar="WORKDIR", help="of runs, studies"
    )


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    for workdir in args.workdirs:
        rebuild = study if (workdir / "study.json").is_file() else figures
        for path in rebuild(workdir):
            print(path)
    return 0
