"""Clipping bound, convergence and calibration (Bu et al., arXiv 2106.07830), as a study.

    python -m experiments.run_study --config=experiments/calibration/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (MNIST digits, the shipped pretrained
ViT, all parameters, three seeds, eight for the late switch) and "paper" (CIFAR-10, ViT-B/16; pass
--data_dir and --weights). All runs have one budget. DP-SGD is not normalized, as in the paper: for
a small bound R, only eta R matters. Epsilon, epochs and batch size of "paper" are our own choice
where the paper's values were not available.

The sweep has four parts: a grid over R and the learning rate; layerwise and global (keep or drop)
clipping beside flat clipping along eta R = const; a switch of R for the last 5 % of the epochs,
with normalized clipping so that the size of a step does not jump; and a private temperature. For
the theory, see `ntk`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from ml_collections import ConfigDict

from dpjax.config import default
from experiments import study
from experiments.calibration import theory as calibration_theory
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["get_config", "report", "sweep", "theory"]

_VIT = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}

# Bounds R, learning rates eta, eta R of the comparison of clipping styles, seeds.
_GRID: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, int]] = {
    "smoke": ((0.1, 1.0, 10.0), (10.0, 1.0, 0.1), 1.0, 2),
    "laptop": ((0.1, 1.0, 10.0, 100.0), (10.0, 1.0, 0.1, 0.01), 1.0, 3),
    "paper": ((0.1, 1.0, 10.0, 100.0, 1000.0), (1.0, 0.1, 0.01, 0.001), 0.1, 3),
}
_SMALL, _LARGE, _SWITCH = 0.1, 20.0, 0.95  # of the late switch
_TEMPERATURE = 0.1  # share of the training examples

# CIFAR-10, ViT-base, accuracy / ECE / MCE in %, read off the paper's figure; None: it was nan.
_PUBLISHED = {
    (1.0, 0.1): (97.17, 0.9, 58.6), (1.0, 1.0): (96.70, 2.2, 54.0), (1.0, 10.0): (10.0, 89.4, 89.4),
    (1.0, 100.0): None, (1.0, 1000.0): None,
    (0.1, 0.1): (31.39, 12.9, 48.6), (0.1, 1.0): (97.03, 0.7, 38.8),
    (0.1, 10.0): (96.52, 1.9, 53.7),
    (0.1, 100.0): (10.8, 70.5, 81.5), (0.1, 1000.0): None,
    (0.01, 0.1): (11.75, 39.3, 90.7), (0.01, 1.0): (31.39, 12.9, 48.6),
    (0.01, 10.0): (96.61, 1.1, 27.5), (0.01, 100.0): (96.04, 1.1, 38.5),
    (0.01, 1000.0): (10.7, 62.1, 81.2),
    (0.001, 0.1): (10.3, 44.1, 92.4), (0.001, 1.0): (11.75, 39.3, 90.7),
    (0.001, 10.0): (31.39, 12.9, 48.5), (0.001, 100.0): (94.98, 5.2, 35.7),
    (0.001, 1000.0): (91.91, 4.1, 34.8),
}  # fmt: skip

_METRICS: dict[str, Metric] = {
    "accuracy [%]": lambda r: 100 * r.evaluation["accuracy"],
    "ECE [%]": lambda r: 100 * r.evaluation["ece"],
    "MCE [%]": lambda r: 100 * r.evaluation["mce"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
}
_RATE, _BOUND = "optimizer.learning_rate", "dp.bound"
_AXES = {"R": _BOUND, "eta": _RATE}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg)
    config = default()
    config.optimizer.name = "sgd"
    config.dp.normalized = False
    config.dp.epsilon = 2.0
    config.checkpoint_every = 10_000
    config.log_every = 10
    if chosen == "paper":
        config.data.name = "cifar10"
        config.model.size = "b16"
        config.batch_size = 1000
        config.epochs = 5.0
    elif chosen == "laptop":
        config.data.name = "mnist5k"
        config.model.weights = "vit_mini_digits"
        config.model.keep_head = True
        config.epochs = 5.0
        config.physical_batch = 320
    else:
        config.data.name = "digits"
        config.finetune = "head"
        config.dp.delta = 1e-4
        config.batch_size = 200
        config.epochs = 3.0
        config.physical_batch = 256
    with config.unlocked():
        if chosen != "paper":
            config.model.options = dict(_VIT if chosen == "laptop" else _TINY)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    chosen = study.size(arg)
    bounds, rates, product, seeds = _GRID[chosen]
    for seed in range(seeds):
        common = {"private_seed": seed}
        for bound in bounds:
            for rate in rates:
                yield {**common, _BOUND: bound, _RATE: rate}
            for clipping in ("per_layer", "global"):
                yield {**common, "dp.clipping": clipping, _BOUND: bound, _RATE: product / bound}
        late = {**common, "dp.normalized": True, _RATE: product}
        yield {**late, _BOUND: _SMALL}
        if chosen != "smoke" or seed == 0:
            yield {**late, "dp.bound_schedule": ((0.0, _SMALL), (_SWITCH, _LARGE))}
            yield {**late, _BOUND: _SMALL, "dp.temperature.share": _TEMPERATURE}
    # The effect of the switch is small relative to the spread of three seeds.
    for seed in range(seeds, seeds if chosen == "smoke" else 8):
        late = {"private_seed": seed, "dp.normalized": True, _RATE: product}
        yield {**late, _BOUND: _SMALL}
        yield {**late, "dp.bound_schedule": ((0.0, _SMALL), (_SWITCH, _LARGE))}


def theory(arg: str | None = None) -> Row:
    """Computes the table of kernels, and predicted beside measured training curves."""
    return calibration_theory.compute(study.size(arg))


def _share(result: Result) -> float:
    return float(result.config["dp"]["temperature"]["share"])


def report(workdir: Path) -> list[Path]:
    """Rebuilds all tables and figures from the files of the runs."""
    results = study.read(workdir)
    started = [r for r in results if r.config]
    plain = [r for r in started if not r.config["dp"]["normalized"]]
    late = [r for r in started if r.config["dp"]["normalized"] and not _share(r)]
    scaled = [r for r in started if _share(r)]
    flat = [r for r in plain if r.config["dp"]["clipping"] == "flat"]
    grid = study.summarize(flat, _AXES, _METRICS)
    for row in grid:
        row["eta R"] = float(f"{row['R'] * row['eta']:.6g}")
    styles = study.summarize(plain, {"clipping": "dp.clipping", **_AXES}, _METRICS)
    others = {(r["R"], r["eta"]) for r in styles if r["clipping"] != "flat"}
    theory_file = workdir / "theory.json"
    found = json.loads(theory_file.read_text()) if theory_file.is_file() else None
    parts: list[str | Table | Figure] = [
        "All numbers are of held-out data: mean ± half width of the 95 % interval over seeds.",
        "## Bound R and learning rate eta",
        Table("grid", "Flat clipping: equal eta R is equal training while R clips all", grid),
        *_heatmaps(grid),
        Table("published", "Published: CIFAR-10, ViT-base (Bu et al., read off a figure)",
              _published()),
        *_reliability(flat, grid),
        "## Flat, layerwise and global clipping",
        Table("clipping", "At eta R = const; global keeps |g| <= R and drops the rest",
              [r for r in styles if (r["R"], r["eta"]) in others]),
        "## Late switch of R, and temperature scaling",
        Table("late_switch",
              f"R = {_SMALL:g} throughout, or {_LARGE:g} from {_SWITCH:.0%} of the epochs on "
              "(normalized clipping, the same budget)",
              study.summarize(late, {"bound schedule": "dp.bound_schedule"}, _METRICS)),
        Table("temperature",
              f"Temperature fitted privately on {_TEMPERATURE:.0%} of the training data, which "
              "the run does not train on",
              study.summarize(scaled, _AXES, _METRICS | {
                  "temperature": lambda r: r.evaluation["temperature"],
                  "ECE before [%]": lambda r: 100 * r.evaluation["before_temperature/ece"],
                  "MCE before [%]": lambda r: 100 * r.evaluation["before_temperature/mce"],
                  "NLL before [nats]": lambda r: r.evaluation["before_temperature/nll"],
              })),
    ]  # fmt: skip
    if found is not None:
        parts += ["## Theory: kernels of clipped gradient flow", *calibration_theory.parts(found)]
    return study.write(workdir, "Clipping bound and calibration", parts, results)


def _published() -> list[Row]:
    rows = []
    for (rate, bound), values in _PUBLISHED.items():
        numbers = dict(zip(list(_METRICS)[:3], values or (float("nan"),) * 3))
        rows.append({"R": bound, "eta": rate, **numbers, "eta R": float(f"{rate * bound:.6g}")})
    return sorted(rows, key=lambda row: (row["R"], row["eta"]))


def _heatmaps(grid: list[Row]) -> list[Figure]:
    if not grid:
        return []
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes, name, colors in zip(panels, list(_METRICS), ("viridis", "magma_r", "magma_r")):
        study.heatmap(
            axes, {(row["R"], row["eta"]): row[name] for row in grid}, xlabel="clip bound R",
            ylabel="learning rate eta", title=name, limits=(0, 100), cmap=colors, text="{:.1f}",
        )  # fmt: skip
    return [Figure("grid", "Accuracy, ECE and MCE on held-out data by R and eta", figure)]


def _reliability(flat: list[Result], grid: list[Row]) -> list[str | Figure]:
    """Diagrams of the smallest and the largest R, each at its most accurate learning rate."""
    best = {}
    for row in grid:
        if row["runs"] > row["diverged"]:
            before = best.get(row["R"])
            if before is None or row["accuracy [%]"] > before["accuracy [%]"]:
                best[row["R"]] = row
    if not best:
        return []
    figure, panels = plt.subplots(
        2, len(best), figsize=(3.2 * len(best), 5), height_ratios=(3, 1), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for (bound, row), top, bottom in zip(sorted(best.items()), panels[0], panels[1]):
        chosen = [
            r for r in flat
            if r.status == "finished"
            and (study.field(r, _BOUND), study.field(r, _RATE)) == (bound, row["eta"])
        ]  # fmt: skip
        _diagram(top, bottom, chosen)
        top.set_title(
            f"R = {bound:g}, eta = {row['eta']:g}\naccuracy {row['accuracy [%]']:.1f} %\n"
            f"ECE {row['ECE [%]']:.1f} %, MCE {row['MCE [%]']:.1f} %",
            fontsize=9,
        )
    panels[0][0].set_ylabel("accuracy")
    panels[1][0].set_ylabel("examples")
    caption = (
        "Reliability by R at the learning rate of the best mean accuracy (chosen on held-out data, "
        "not charged); bins pooled over seeds"
    )
    return [Figure("reliability", caption, figure)]


def _diagram(top: plt.Axes, bottom: plt.Axes, results: list[Result]) -> None:
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
