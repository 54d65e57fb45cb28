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
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from dpjax.commands import cli
from dpjax.files import read_object
from dpjax.metrics import PRIVATE, lookup
from dpjax.runtime import Workdir, read_jsonl

_FEW = 20  # bins of fewer examples are gray: their accuracy says little
_WRITTEN = 20  # classes of a confusion matrix whose shares are written into it


def figures(workdir: Path) -> list[Path]:
    """Draws `learning_curve.png` and, of a classifier, `reliability.png` and `confusion.png`.

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
    drawn: list[Path | None] = [_learning_curve(workdir, rows)]
    names = {name.rpartition("/")[2] for name in read_object(workdir / "eval.json")}
    if "reliability" in names:  # a language model has no classes
        drawn += [_reliability(workdir), _confusion(workdir)]
    return [path for path in drawn if path is not None]


def study(workdir: Path) -> list[Path]:
    """Rebuilds the tables and figures of a study; returns the files written.

    Raises:
        ValueError: the study's file is not there, or it defines no `report`.
    """
    file = read_object(workdir / "study.json", "config")["config"].partition(":")[0]
    if not Path(file).is_file():
        raise ValueError(f"study {file!r} is not a file: run this where {file!r} is.")
    module = runpy.run_path(file)
    if "report" not in module:
        raise ValueError(f"study {file!r} defines no report().")
    return list(module["report"](workdir))


def _learning_curve(workdir: Path, rows: list[dict[str, float]]) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    train = [(r["step"], r["nonprivate/loss"]) for r in rows if "nonprivate/loss" in r]
    private = any(f"{PRIVATE}eval/nll" in r for r in rows)
    begin = f"{PRIVATE}eval/" if private else "eval/"
    held = [r for r in rows if f"{begin}nll" in r]
    if not held:
        raise ValueError(f"workdir={str(workdir)!r}: metrics.jsonl holds no evaluation.")
    if train:
        left.plot(*zip(*train), color="0.75", label="training batches (not for release)")
    steps = [r["step"] for r in held]
    held_out = "held out of the private data (not for release)" if private else "held-out data"
    left.plot(steps, [r[f"{begin}nll"] for r in held], "o-", color="C0", label=held_out)
    left.set(xlabel="step (one noisy update)", ylabel="cross-entropy [nats]", title="Loss")
    right.plot(steps, [100 * r[f"{begin}accuracy"] for r in held], "o-", color="C0", label=held_out)
    right.set(xlabel="step (one noisy update)", ylabel="accuracy [%]", title="Accuracy")
    right.set_ylim(0, 100)
    final = _read(workdir, "eval.json")
    if "class_names" in final or f"{PRIVATE}class_names" in final:  # not of a language model
        names = lookup(final, "class_names")[1]
        uniform = {"color": "0.4", "linestyle": ":", "linewidth": 1}
        chance = f"all {len(names)} classes equally likely"
        left.axhline(np.log(len(names)), **uniform, label=chance)
        right.axhline(100 / len(names), **uniform, label=f"chance, {100 / len(names):.3g} %")
    if all("epsilon" in r for r in held):
        twin = right.twinx()
        twin.plot(steps, [r["epsilon"] for r in held], "--", color="C3")
        twin.set_ylabel("epsilon spent (dashed)", color="C3")
        twin.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        _phase_borders(workdir, axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="lower right" if axes is right else "best")
    return _save(figure, workdir, "learning_curve.png")


def _phase_borders(workdir: Path, axes: plt.Axes) -> None:
    """Marks where phases begin, and names them, if there are several."""
    phases = _read(workdir, "identity.json").get("phases", {})
    end = 0
    for name, phase in phases.items() if len(phases) > 1 else ():
        axes.axvline(end, color="C2", linewidth=1)
        axes.annotate(
            name.partition("_")[2], (end, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
            textcoords="offset points", va="bottom", rotation=20, fontsize="x-small", color="C2",
        )  # fmt: skip
        axes.set_title(axes.get_title(), pad=24)  # above the names
        end += phase["steps"]


def _read(workdir: Path, name: str) -> dict[str, Any]:
    path = workdir / name
    return read_object(path) if path.is_file() else {}


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of Wilson's 95 % interval of shares of counts > 0."""
    z = 1.96
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return center - half, center + half


def _reliability(workdir: Path) -> Path:
    text = (workdir / "eval.json").read_text()
    final = json.loads(text)
    name, shown = lookup(final, "reliability")
    bins = {field: np.asarray(values) for field, values in shown.items()}
    count, confidence, accuracy = bins["count"], bins["confidence"], bins["accuracy"]
    edges = np.linspace(0, 1, len(count) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.4, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    width = edges[1] - edges[0]
    few = count < _FEW
    top.plot([0, 1], [0, 1], "--", color="0.5", label="perfect calibration")
    for some, color, label in (
        (~few, "C0", "accuracy, 95 % interval"),
        (few & (count > 0), "0.75", f"bins of fewer than {_FEW} examples"),
    ):
        if some.any():
            middle, share = edges[:-1][some] + width / 2, accuracy[some]
            top.bar(middle, share, width, color=color, alpha=0.6, edgecolor="white", label=label)
            line = "0.25" if color == "C0" else color
            top.vlines(middle, *_wilson(share, count[some]), color=line)
            dot = "C1" if color == "C0" else "0.55"
            top.plot(confidence[some], share, "o", color=dot, clip_on=False, zorder=3)
    top.plot([], [], "o", color="C1", label="the same, at its mean confidence")
    top.set(
        ylabel="accuracy", ylim=(0, 1), xlim=(0, 1),
        title=f"Reliability on held-out data{' (not for release)' if PRIVATE in name else ''}\n"
        f"ECE {100 * lookup(final, 'ece')[1]:.1f} %, MCE {100 * lookup(final, 'mce')[1]:.1f} %",
    )  # fmt: skip
    top.title.set_fontsize("medium")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    bottom.bar(edges[:-1], count, width, align="edge", color="0.6", edgecolor="white")
    bottom.axhline(_FEW, color="0.4", linestyle=":", linewidth=1)
    bottom.set(
        xlabel="confidence (largest predicted probability)", ylabel="examples", yscale="log",
        ylim=(0.8, None),
    )  # fmt: skip
    return _save(figure, workdir, "reliability.png", shows=text)


def _confusion(workdir: Path) -> Path | None:
    """Draws each class's shares of predictions; None for more classes than a figure can show."""
    final = _read(workdir, "eval.json")
    try:
        name, counts = lookup(final, "confusion")
    except KeyError:
        return None
    names, counts = lookup(final, "class_names")[1], np.asarray(counts)
    side = 3 + 0.4 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the true class [%]", shrink=0.8)
    for (row, column), share in np.ndenumerate(shares):
        if counts[row, column] and len(names) <= _WRITTEN:
            axes.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize="small",
                color="white" if share > 55 else "black",
            )  # fmt: skip
    short = [label if len(label) <= 20 else f"{label[:9]}…{label[-10:]}" for label in names]
    axes.set_xticks(range(len(names)), short, rotation=90)
    axes.set_yticks(range(len(names)), short)
    axes.set(
        xlabel="predicted class", ylabel="true class",
        title=f"{counts.sum():,} held-out examples"
        f"{' (not for release)' if PRIVATE in name else ''}",
    )  # fmt: skip
    return _save(figure, workdir, "confusion.png", shows=json.dumps(final))


def _save(figure: plt.Figure, workdir: Path, name: str, *, shows: str = "") -> Path:
    path = Workdir(workdir).save_figure(name, figure, shows=shows)
    plt.close(figure)
    return path


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument(
        "workdirs", nargs="+", type=cli.path, metavar="WORKDIR", help="of runs, studies"
    )


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    for workdir in args.workdirs:
        rebuild = study if (workdir / "study.json").is_file() else figures
        for path in rebuild(workdir):
            print(path)
    return 0
