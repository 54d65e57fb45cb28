"""Tables and figures of the study of calibration, from finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt

from experiments import study
from experiments.study import Figure, Metric, Result, Row

__all__ = ["AXES", "METRICS", "best", "differences", "heatmaps", "reliability", "where"]

METRICS: dict[str, Metric] = {
    "accuracy [%]": lambda r: 100 * r.evaluation["accuracy"],
    "ECE [%]": lambda r: 100 * r.evaluation["ece"],
    "adaptive ECE [%]": lambda r: 100 * r.evaluation["adaptive_ece"],
    "MCE [%]": lambda r: 100 * r.evaluation["mce"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "Brier": lambda r: r.evaluation["brier"],
}
AXES = {"epsilon": "dp.epsilon", "R": "dp.bound", "eta": "optimizer.learning_rate"}


def where(results: Sequence[Result], **values: object) -> list[Result]:
    """Returns the finished runs at some values of `AXES`, named without the section."""
    names = {field.split(".")[1]: field for field in AXES.values()}
    return [
        r for r in results
        if r.status == "finished"
        and all(study.field(r, names[name]) == value for name, value in values.items())
    ]  # fmt: skip


def best(grid: Sequence[Row], metric: str = "accuracy [%]") -> dict[tuple[float, float], Row]:
    """Returns the best row of `grid` for every (epsilon, R): most accurate, or lowest `metric`."""
    sign = 1 if metric == "accuracy [%]" else -1
    rows: dict[tuple[float, float], Row] = {}
    for row in grid:
        place = (row["epsilon"], row["R"])
        if row["runs"] > row["diverged"] and (
            place not in rows or sign * (row[metric] - rows[place][metric]) > 0
        ):
            rows[place] = row
    return dict(sorted(rows.items()))


def differences(results: Sequence[Result], others: Sequence[Result]) -> Row:
    """Returns every metric of `others` minus that of `results`, paired by private seed."""
    first, second = (
        {study.field(r, "private_seed"): r for r in runs if r.status == "finished"}
        for runs in (results, others)
    )
    seeds = sorted(first.keys() & second.keys())
    row: Row = {"pairs": len(seeds)}
    for name, metric in METRICS.items():
        gaps = [metric(second[seed]) - metric(first[seed]) for seed in seeds]
        row[name], row[f"{name} ±"] = study.interval(gaps)
    return row


def heatmaps(grid: Sequence[Row]) -> list[Figure]:
    """Draws every metric by R and eta R, a figure for each epsilon."""
    figures = []
    for epsilon in sorted({row["epsilon"] for row in grid}):
        figure, panels = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
        rows = [row for row in grid if row["epsilon"] == epsilon]
        for axes, name in zip(panels.flat, METRICS):
            study.heatmap(
                axes, {(row["R"], row["eta R"]): row[name] for row in rows},
                xlabel="clip bound R", ylabel="learning rate times bound, eta R", title=name,
                limits=(0, 100) if "%" in name else None,
                cmap="viridis" if name == "accuracy [%]" else "magma_r",
                text="{:.1f}" if "%" in name else "{:.3g}",
            )  # fmt: skip
        caption = f"Held-out data by R and eta R, epsilon {epsilon:g}: equal rows are equal runs"
        figures.append(Figure(f"grid_{epsilon:g}", caption, figure))
    return figures


def reliability(flat: Sequence[Result], rows: Mapping[tuple[float, float], Row]) -> list[Figure]:
    """Draws diagrams of every R at its most accurate learning rate, a figure for each epsilon."""
    figures = []
    for epsilon in sorted({epsilon for epsilon, _ in rows}):
        mine = [row for (at, _), row in rows.items() if at == epsilon]
        figure, panels = plt.subplots(
            2, len(mine), figsize=(3.2 * len(mine), 5), height_ratios=(3, 1), sharex=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for row, top, bottom in zip(mine, panels[0], panels[1]):
            at = {"epsilon": epsilon, "bound": row["R"], "learning_rate": row["eta"]}
            _diagram(top, bottom, where(flat, **at))
            top.set_title(
                f"R = {row['R']:g}, eta = {row['eta']:g}\naccuracy {row['accuracy [%]']:.1f} %\n"
                f"ECE {row['ECE [%]']:.1f} %, MCE {row['MCE [%]']:.1f} %",
                fontsize=9,
            )
        panels[0][0].set_ylabel("accuracy")
        panels[1][0].set_ylabel("examples")
        caption = (
            f"Reliability by R at the learning rate of the best mean accuracy, epsilon {epsilon:g} "
            "(chosen on held-out data, not charged); bins pooled over seeds"
        )
        figures.append(Figure(f"reliability_{epsilon:g}", caption, figure))
    return figures


def _diagram(top: plt.Axes, bottom: plt.Axes, results: Sequence[Result]) -> None:
    bins = [r.evaluation["reliability"] for r in results]
    count = sum(np.asarray(b["count"]) for b in bins)
    some = np.maximum(count, 1)
    accuracy, confidence = (
        sum(np.asarray(b["count"]) * np.asarray(b[name]) for b in bins) / some
        for name in ("accuracy", "confidence")
    )
    edges = np.linspace(0, 1, len(count) + 1)
    used, width = count > 0, edges[1]
    top.plot([0, 1], [0, 1], "--", color="0.5", lw=1)
    top.bar(edges[:-1][used], accuracy[used], width, align="edge", alpha=0.6, edgecolor="white")
    top.plot(confidence[used], accuracy[used], ".", color="C1")
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.bar(edges[:-1], count, width, align="edge", color="0.6", edgecolor="white")
    bottom.set_xlabel("confidence")
