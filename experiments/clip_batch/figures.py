"""Figures of the study `clip_batch`, from rows and runs read back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from dpjax.runtime import read_jsonl
from experiments import study
from experiments.clip_batch import clip_diagnosis
from experiments.study import Figure, Result, Row

__all__ = ["automatic", "cumulative_noise", "gradients", "heatmaps", "nearest", "optima"]

_ACC = "accuracy [%]"


def heatmaps(tasks: Mapping[str, Sequence[Row]]) -> list[Figure]:
    """A figure per task, accuracy over (C, B), one panel per epsilon, three in a row."""
    found = []
    for number, (name, rows) in enumerate(tasks.items()):
        epsilons = sorted({row["epsilon"] for row in rows})
        if not epsilons:
            continue
        wide, high = (len({row[axis] for row in rows}) for axis in ("C", "B"))
        finite = [row[_ACC] for row in rows if math.isfinite(row[_ACC])]
        limits = (min(finite), max(finite)) if finite else None
        across = min(3, len(epsilons))
        down = math.ceil(len(epsilons) / across)
        figure, panels = plt.subplots(
            down, across, squeeze=False, layout="constrained",
            figsize=(max(6.0, (1.6 + 0.62 * wide) * across), max(3.4, (1.8 + 0.5 * high) * down)),
        )  # fmt: skip
        for axes in panels.flat[len(epsilons) :]:
            axes.set_axis_off()
        for axes, epsilon in zip(panels.flat, epsilons):
            cells = {(row["C"], row["B"]): row for row in rows if row["epsilon"] == epsilon}
            study.heatmap(
                axes, {cell: row[_ACC] for cell, row in cells.items()}, limits=limits,
                text="{:.1f}",
                xlabel="clip bound C [gradient norm]",
                ylabel="batch size B [examples]" if axes in panels[:, 0] else "",
                title=f"{_ACC}, epsilon = {epsilon:g}",
            )  # fmt: skip
            for text, row in zip(axes.texts, cells.values(), strict=True):
                text.set_text(f"{text.get_text()}\n({row['learning rate']:.2g})")
                text.set_fontsize(7)
        figure.suptitle(f"{name}: held-out accuracy, and (the learning rate that gave it)")
        caption = (
            f"{name}: held-out accuracy by C and B, each cell at its best learning rate, which is "
            "in brackets; all panels share one scale of colors"
        )
        found.append(Figure(f"grid_{number}", caption, figure))
    return found


def optima(rows: Sequence[Row]) -> list[Figure]:
    """C* and B* against epsilon, with the values that are not worse."""
    rows = [row for row in rows if row["epsilon"] < math.inf]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tasks = [t for t in tasks if sum(row["task"] == t for row in rows) > 1]
    if not tasks:
        return []
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, symbol in zip(panels, ("C*", "B*")):
        values = [row[f"{symbol} {end}"] for row in rows for end in ("low", "high")]
        limits = (min(values) / 3, max(values) * 3)  # first: equal values have no limits
        axes.set(xscale="log", yscale="log", xlabel="epsilon", ylim=limits)
        for number, task in enumerate(tasks):
            mine = [row for row in rows if row["task"] == task]
            shift = 1.06 ** (number - (len(tasks) - 1) / 2)  # apart, so that none hides another
            at = [shift * row["epsilon"] for row in mine]
            (line,) = axes.plot(at, [row[symbol] for row in mine], "o-", label=task)
            for x, row in zip(at, mine):
                ends = (row[f"{symbol} low"], row[f"{symbol} high"])
                axes.plot([x, x], ends, color=line.get_color(), lw=1.5)
        epsilons = sorted({row["epsilon"] for row in rows})
        axes.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="best clip bound C* [gradient norm]", title="C* by epsilon")
    panels[1].set(ylabel="best batch size B* [examples]", title="B* by epsilon")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = (
        "Best clip bound and batch size by mean accuracy; bars reach over the values of the grid "
        "that are not worse at 95 %, seed by seed"
    )
    return [Figure("optima", caption, figure)]


def cumulative_noise(tasks: Mapping[str, Sequence[Row]]) -> list[Figure]:
    """Accuracy at the best C and rate against sigma sqrt(T), a point per B."""
    shown = {n: rows for n, rows in tasks.items() if len({row["B"] for row in rows}) > 1}
    if not shown:
        return []
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(max(6, 5 * columns), 4 * lines), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, rows) in zip(panels.flat, shown.items()):
        for number, epsilon in enumerate(sorted({row["epsilon"] for row in rows})):
            best: dict[int, Row] = {}
            for row in rows:
                if row["epsilon"] == epsilon and math.isfinite(row[_ACC]):
                    before = best.get(row["B"])
                    if before is None or row[_ACC] > before[_ACC]:
                        best[row["B"]] = row
            points = [best[size] for size in sorted(best)]
            at, value = [p["sigma sqrt(T)"] for p in points], [p[_ACC] for p in points]
            half = np.nan_to_num([p[f"{_ACC} ±"] for p in points])
            color = f"C{number}"
            _bars(axes, at, value, half, color=color, label=f"epsilon = {epsilon:g}")
            for point, x, y in zip(points, at, value):
                axes.annotate(
                    f"{point['B']:g}", (x, y), (4, -11), textcoords="offset points", fontsize=7,
                    color=color,
                )  # fmt: skip
        axes.set(xscale="log", xlabel="cumulative noise sigma sqrt(T) [clip bounds]",
                 ylabel="held-out accuracy [%]", title=name)  # fmt: skip
        axes.title.set_fontsize(10)
        axes.margins(x=0.12, y=0.08)
        axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    caption = "Accuracy of each B (numbers) at its best C and learning rate, by cumulative noise"
    return [Figure("cumulative_noise", caption, figure)]


def automatic(rows: Sequence[Row]) -> list[Figure]:
    """Gain of tuning C over AUTO-S, against the accuracy reached, a measure of difficulty."""
    if not rows:
        return []
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for number, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        mine = sorted((r for r in rows if r["task"] == task), key=lambda r: r["flat, tuned [%]"])
        at = [row["flat, tuned [%]"] for row in mine]
        gap = [row["gap [points]"] for row in mine]
        half = np.nan_to_num([row["gap [points] ±"] for row in mine])
        _bars(axes, at, gap, half, color=f"C{number}", label=task)
        for row, x, y in zip(mine, at, gap):
            axes.annotate(f"eps {row['epsilon']:g}", (x, y), (5, 5), textcoords="offset points",
                          fontsize=8, color=f"C{number}")  # fmt: skip
    axes.axhline(0, color="0.5", lw=1)
    axes.margins(x=0.1)
    axes.set(xlabel="accuracy of tuned flat clipping [%]: easier to the right",
             ylabel="flat minus AUTO-S [points]", title="What tuning C gains")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    caption = "Flat at its best (B, C, learning rate) minus AUTO-S at its best (B, learning rate)"
    return [Figure("automatic", caption, figure)]


def _bars(axes: plt.Axes, xs: Any, ys: Any, halves: Any, *, color: str, label: str) -> None:
    """A line with error bars; unlike `errorbar` it takes bars that are all of length 0."""
    axes.plot(xs, ys, "o-", color=color, label=label)
    for x, y, half in zip(xs, ys, halves):
        axes.plot([x, x], [y - half, y + half], color=color, lw=1.5)


def nearest(results: Sequence[Result], bound: float) -> Result:
    """The run whose clip bound is nearest, on a logarithmic scale."""
    return min(results, key=lambda r: abs(math.log(study.field(r, "dp.bound") / bound)))


def gradients(number: int, name: str, results: Sequence[Result]) -> list[Figure]:
    """Statistics of the gradients of one task: norms, classes, and the parts of the error."""
    epsilons = sorted({study.field(r, "dp.epsilon") for r in results})
    wide = max(6.5, 4.2 * len(epsilons))
    norms, upper = plt.subplots(
        2, len(epsilons), figsize=(wide, 7), squeeze=False, layout="constrained"
    )
    classes, middle = plt.subplots(
        2, len(epsilons), figsize=(wide, 7.4), squeeze=False, layout="constrained"
    )
    errors, lower = plt.subplots(
        1, len(epsilons), figsize=(wide, 4.4), squeeze=False, layout="constrained", sharey=True
    )
    for column, epsilon in enumerate(epsilons):
        mine = [r for r in results if study.field(r, "dp.epsilon") == epsilon]
        mine.sort(key=lambda r: float(study.field(r, "dp.bound")))
        best = max(mine, key=lambda r: float(r.evaluation["accuracy"]))
        _norms(upper[0][column], best, epsilon)
        _clipped(upper[1][column], mine)
        _weights(middle[0][column], mine, epsilon)
        _by_class(middle[1][column], mine)
        _error(lower[0][column], best, epsilon)
    norms.legend(*upper[1][0].get_legend_handles_labels(), loc="outside right lower")
    classes.legend(*middle[0][0].get_legend_handles_labels(), loc="outside right upper")
    errors.legend(*lower[0][0].get_legend_handles_labels(), loc="outside right upper")
    titles = ("gradient norms and clipping over training", "classes", "error of one step")
    found = []
    for figure, kind, title in zip(
        (norms, classes, errors), ("norms", "classes", "error"), titles, strict=True
    ):
        figure.suptitle(f"{name}: {title} (NOT private)")
        caption = f"{name}: {title}. NOT private: read off a sample of raw gradients."
        found.append(Figure(f"nonprivate_{kind}_{number}", caption, figure))
    return found


def _norms(axes: plt.Axes, run: Result, epsilon: float) -> None:
    steps, values = run.measured["steps"], np.array(run.measured["norms"])
    middle = len(clip_diagnosis.LEVELS) // 2
    axes.fill_between(steps, values[:, 0], values[:, -1], alpha=0.2, color="C0", label="5 to 95 %")
    axes.fill_between(steps, values[:, 1], values[:, -2], alpha=0.35, color="C0",
                      label="25 to 75 %")  # fmt: skip
    axes.plot(steps, values[:, middle], "o-", color="C0", label="median")
    bound = study.field(run, "dp.bound")
    axes.axhline(bound, ls="--", color="C3", label=f"C = {bound:g}, the most accurate")
    axes.set(yscale="log", xlabel="step", ylabel="gradient norm", title=f"epsilon = {epsilon:g}")
    axes.set_ylim(bottom=min(bound, values.min()) / 4)  # room for the legend
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left", ncols=2)


def _shades(results: Sequence[Result]) -> list[Any]:
    colors = plt.get_cmap("viridis")
    return [colors(0.9 * k / max(1, len(results) - 1)) for k in range(len(results))]


def _label(run: Result) -> str:
    return f"C = {study.field(run, 'dp.bound'):g}"


def _clipped(axes: plt.Axes, results: Sequence[Result]) -> None:
    for run, color in zip(results, _shades(results)):
        rows = [r for r in read_jsonl(run.path / "metrics.jsonl")
                if "nonprivate/clipped_fraction" in r]  # fmt: skip
        axes.plot([r["step"] for r in rows], [r["nonprivate/clipped_fraction"] for r in rows],
                  ".-", ms=4, color=color, label=_label(run))  # fmt: skip
    axes.set(xlabel="step", ylabel="clipped fraction of a batch", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _weights(axes: plt.Axes, results: Sequence[Result], epsilon: float) -> None:
    """w_y(C) in the middle of training, classes from the least to the most accurate."""
    for run, color in zip(results, _shades(results)):
        order = np.argsort(run.measured["class_accuracy"])
        weights = np.array(run.measured["class_weights"])[-2][order]
        axes.plot(1 + np.arange(len(order)), weights, "o-", ms=3, color=color, label=_label(run))
    step = results[0].measured["steps"][-2]
    axes.set(yscale="log", xlabel="class, by rising accuracy of the run",
             ylabel=f"weight w_y(C) at step {step}", title=f"epsilon = {epsilon:g}")  # fmt: skip
    axes.grid(alpha=0.3)


def _by_class(axes: plt.Axes, results: Sequence[Result]) -> None:
    """Accuracy of the hardest, the middle and the easiest third of the classes against C."""
    accuracy = 100 * np.array([r.measured["class_accuracy"] for r in results])
    order = np.argsort(accuracy.mean(axis=0))
    bounds = [study.field(r, "dp.bound") for r in results]
    for part, color, label in zip(
        np.array_split(order, 3), ("C3", "0.5", "C2"), ("hardest", "middle", "easiest")
    ):
        for number, which in enumerate(part):
            axes.plot(bounds, accuracy[:, which], ".-", color=color, alpha=0.55, lw=1,
                      label=f"{label} third of the classes" if number == 0 else None)  # fmt: skip
    axes.set(xscale="log", xlabel="clip bound C", ylabel="held-out accuracy of a class [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _error(axes: plt.Axes, run: Result, epsilon: float) -> None:
    """Parts of the squared error at the moment before the last, against C."""
    found, at = run.measured, clip_diagnosis.BOUNDS
    parts = {name: np.array(found[name][-2]) for name in ("noise", "clipping", "sampling")}
    total = sum(parts.values())
    for (name, values), color in zip(parts.items(), ("C1", "C0", "C2")):
        axes.plot(at, np.where(values > 0, values, np.nan), color=color, label=name)
    axes.plot(at, total, color="k", lw=2, label="total")
    axes.axvline(found["best_bound"][-2], color="k", ls=":", label="C* of least error")
    axes.axvline(study.field(run, "dp.bound"), color="C3", ls="--", label="C of best accuracy")
    axes.set(xscale="log", yscale="log", xlabel="clip bound C", ylabel="mean squared error",
             title=f"epsilon = {epsilon:g}, step {found['steps'][-2]}")  # fmt: skip
    least = np.nanmin(total)
    axes.set_ylim(least / 100, least * 1e4)
    axes.grid(alpha=0.3)
