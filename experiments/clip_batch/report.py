"""Tables of the study `clip_batch`; the figures are in `figures.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dpjax.build import planner
from experiments import study
from experiments.clip_batch import figures
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["hard_classes", "one_for_all", "optima", "parts", "planned", "task_name"]

_BY = {
    "epsilon": "dp.epsilon", "clipping": "dp.clipping", "B": "batch_size", "C": "dp.bound",
    "learning rate": "optimizer.learning_rate",
}  # fmt: skip
_ACC = "accuracy [%]"
_METRICS: dict[str, Metric] = {
    _ACC: lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "sigma sqrt(T)": lambda r: (
        r.privacy["noise_multiplier"] * r.privacy["steps_planned"] ** 0.5 if r.privacy else math.nan
    ),
}
_PUBLISHED = [
    ("CIFAR-100, ViT-Ti, film", 81.8, 85.6), ("CIFAR-100, ViT-B, film", 90.5, 93.1),
    ("CIFAR-100, ViT-B, full", 87.7, 92.3), ("CIFAR-100 10 %, ViT-Ti, film", 47.8, 78.1),
    ("CIFAR-100 10 %, ViT-Ti, full", 37.3, 74.4), ("SUN397, ViT-Ti, film", 54.4, 66.6),
    ("CIFAR-10, ViT-B, film", 98.7, 98.8),
]  # fmt: skip


def task_name(result: Result) -> str:
    """Data, backbone and parameter set in words."""
    subset = study.field(result, "data.subset")
    share = "" if subset is None else f" {100 * subset:g} %"
    model = f"{study.field(result, 'model.name')} {study.field(result, 'model.size')}"
    return f"{study.field(result, 'data.name')}{share}, {model}, {study.field(result, 'finetune')}"


def parts(results: Sequence[Result], noise: Sequence[Row]) -> list[str | Table | Figure]:
    """Yields the parts of the report, from the finished runs."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        if result.config:
            tasks.setdefault(task_name(result), []).append(result)
    grids = {name: study.summarize(found, _BY, _METRICS) for name, found in tasks.items()}
    cells = {name: best_rates(grid) for name, grid in grids.items()}
    flat = {name: [c for c in found if c["clipping"] == "flat"] for name, found in cells.items()}
    best = [row for name, found in tasks.items() for row in optima(name, found)]
    common = one_for_all(tasks)
    automatic = [row for name, found in tasks.items() for row in against_automatic(name, found)]
    found: list[str | Table | Figure] = [
        "Accuracy on held-out data; mean ± half width of the 95 % interval over private seeds "
        "(batches and noise). What is best was chosen on the same held-out data: it is a little "
        "too high, and it is not charged to the privacy budget.",
        "## Batch size and clip bound, each cell at its best learning rate",
        *figures.heatmaps(flat),
        Table("cells", "Every cell at its best learning rate",
              [{"task": name, **row} for name, rows in cells.items() for row in rows]),
        Table("published", "Published anchors (Rehn et al., 40 epochs, single runs, tuned on test)",
              [{"task": t, "epsilon 1 [%]": a, "epsilon 8 [%]": b} for t, a, b in _PUBLISHED]),
        "## The best bound and the best batch size by epsilon",
        "C* and B* are of the best mean accuracy. From low to high are the values that are not "
        "worse: the 95 % interval of what their best cell loses, seed by seed, reaches zero.",
        Table("optima", "C*(epsilon) and B*(epsilon)", best),
        *figures.optima(best),
        "## What the planner would have picked",
        "From N, epochs, epsilon and delta alone, among the same batch sizes; C and the learning "
        "rate are the best for its B.",
        Table("planner", "Accuracy at the planner's B against B*",
              [row for name, found in tasks.items() for row in planned(name, found)]),
        "## One (C, B) for all",
        Table("one_for_all", "The pair of least mean loss, against each task's own; learning rates "
              "tuned in both", common),
        "## Cumulative noise",
        Table("noise", "sigma (sigma sqrt(T)) for N = 50,000, delta = 1e-5, 8 epochs: by the "
              "paper's steps and by ours, round(E N / B)", noise),
        *figures.cumulative_noise(flat),
        "## Automatic against tuned flat clipping, by difficulty",
        "Difficulty is the accuracy that tuned flat clipping reaches: fewer examples and a tighter "
        "epsilon make it harder. The gap is paired over seeds.",
        Table("automatic", "AUTO-S, flat at its best C, and flat at the smallest C of the grid",
              sorted(automatic, key=lambda row: -row["flat, tuned [%]"])),
        *figures.automatic(automatic),
    ]  # fmt: skip
    starved = [row for name, found in tasks.items() for row in hard_classes(name, found)]
    found += [
        "## Hard classes",
        "Thirds of the classes by held-out accuracy over all C, at B* and the best rate of each C. "
        "The gain is that of the largest C that is not worse over all classes (C* high), seed by "
        "seed.",
        Table("classes", "What a small clip bound costs the hard classes", starved),
    ]
    shown = {name: [r for r in found if r.measured] for name, found in tasks.items()}
    shown = {name: found for name, found in shown.items() if found}
    if shown:
        found += [
            "## What the gradients look like: NOT private",
            "From raw gradients of a sample of the private training data, for one batch size, "
            "learning rate and seed. They explain; choosing C by them would not be private.",
            Table("fixed_point", "C* of least mean squared error, not private, beside the C of the "
                  "best accuracy", _fixed_points(shown, best)),
        ]  # fmt: skip
        for number, (name, looked) in enumerate(shown.items()):
            found += figures.gradients(number, name, looked)
    return found


def best_rates(grid: Iterable[Row]) -> list[Row]:
    """Keeps the best learning rate of every cell (epsilon, clipping, B, C)."""
    found: dict[Any, Row] = {}
    for row in grid:
        key = (row["epsilon"], row["clipping"], row["B"], row["C"])
        if key not in found or _value(row) > _value(found[key]):
            found[key] = row
    return list(found.values())


def _value(row: Row) -> float:
    return -math.inf if math.isnan(row[_ACC]) else float(row[_ACC])


Cell = tuple[Any, ...]  # B, C, learning rate


def _by_seed(
    results: Iterable[Result], clipping: str, keep: Callable[[Cell], bool] = lambda cell: True
) -> dict[float, dict[Cell, dict[int, float]]]:
    """Accuracy [%] by epsilon, cell and seed; 0 where a run diverged."""
    found: dict[float, dict[Cell, dict[int, float]]] = {}
    for r in results:
        if r.status not in ("finished", "diverged") or study.field(r, "dp.clipping") != clipping:
            continue
        names = ("batch_size", "dp.bound", "optimizer.learning_rate")
        cell = tuple(study.field(r, name) for name in names)
        if keep(cell):
            value = 100 * r.evaluation["accuracy"] if r.status == "finished" else 0.0
            seeds = found.setdefault(study.field(r, "dp.epsilon"), {}).setdefault(cell, {})
            seeds[study.field(r, "private_seed")] = value
    return found


def _best(cells: dict[Cell, dict[int, float]]) -> Cell:
    return max(cells, key=lambda cell: float(np.mean(list(cells[cell].values()))))


def optima(name: str, results: Sequence[Result]) -> list[Row]:
    """C* and B* of flat clipping at every epsilon of a task, with the values not worse."""
    rows = []
    for epsilon, cells in sorted(_by_seed(results, "flat").items()):
        at = _best(cells)
        mean, half = study.interval(list(cells[at].values()))
        row: Row = {"task": name, "epsilon": epsilon, _ACC: mean, f"{_ACC} ±": half,
                    "learning rate": at[2]}  # fmt: skip
        for place, symbol in ((1, "C*"), (0, "B*")):
            good = [at[place]]
            for value in {cell[place] for cell in cells} - {at[place]}:
                rival = _best({c: seeds for c, seeds in cells.items() if c[place] == value})
                loss, spread = _paired(cells[at], cells[rival])
                if loss <= spread:  # never for a single seed, which has no interval
                    good.append(value)
            row |= {symbol: at[place], f"{symbol} low": min(good), f"{symbol} high": max(good)}
        rows.append(row)
    return rows


def planned(name: str, results: Sequence[Result]) -> list[Row]:
    """The planner's batch size of every epsilon, and what it loses against B*."""
    rows = []
    for epsilon, cells in sorted(_by_seed(results, "flat").items()):
        sizes = sorted({cell[0] for cell in cells})
        mine = [r for r in results if r.privacy and study.field(r, "dp.epsilon") == epsilon]
        if len(sizes) < 2 or not mine:
            continue
        total, delta = mine[0].privacy["num_examples"], study.field(mine[0], "dp.delta")
        epochs = study.field(mine[0], "epochs")
        # As the runs do it: a batch of all examples or more is the full batch.
        within = {min(size, total): size for size in sizes}
        chosen = planner.plan(total, epochs, epsilon, delta, batch_sizes=list(within)).batch_size
        best = _best(cells)
        at = _best({c: seeds for c, seeds in cells.items() if c[0] == within[chosen]})
        loss, half = _paired(cells[best], cells[at])
        rows.append({
            "task": name, "epsilon": epsilon, "B, planner": chosen, "B*": best[0],
            "accuracy [%]": float(np.mean(list(cells[at].values()))),
            "lost [points]": loss, "lost [points] ±": half,
        })  # fmt: skip
    return rows


def one_for_all(tasks: dict[str, list[Result]]) -> list[Row]:
    """The loss of each task and epsilon if one (C, B) serves all; learning rates are tuned."""
    found = {
        (name, epsilon): cells
        for name, results in tasks.items()
        for epsilon, cells in _by_seed(results, "flat").items()
        if len({cell[0] for cell in cells}) > 1
    }
    if not found:
        return []
    shared = set.intersection(*({cell[:2] for cell in cells} for cells in found.values()))
    if not shared:
        return []

    def tuned(cells: dict[Cell, dict[int, float]], pair: Cell) -> Cell:
        return _best({cell: seeds for cell, seeds in cells.items() if cell[:2] == pair})

    def mean_loss(pair: Cell) -> float:
        losses = [_paired(c[_best(c)], c[tuned(c, pair)])[0] for c in found.values()]
        return float(np.mean(losses))

    pair = min(sorted(shared), key=mean_loss)
    rows = []
    for (name, epsilon), cells in sorted(found.items()):
        mine, common = _best(cells), tuned(cells, pair)
        loss, half = _paired(cells[mine], cells[common])
        rows.append({
            "task": name, "epsilon": epsilon,
            "own B": mine[0], "own C": mine[1], "own [%]": np.mean(list(cells[mine].values())),
            "B": pair[0], "C": pair[1], "common [%]": np.mean(list(cells[common].values())),
            "lost [points]": loss, "lost [points] ±": half,
        })  # fmt: skip
    return rows


def _paired(one: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Mean difference over common seeds and the half width of its 95 % interval."""
    return study.interval([one[seed] - other[seed] for seed in sorted(set(one) & set(other))])


def against_automatic(name: str, results: Sequence[Result]) -> list[Row]:
    """Tuned flat clipping, flat at the smallest C, and AUTO-S, all at their best B and rate."""
    flat, automatic = _by_seed(results, "flat"), _by_seed(results, "automatic")
    smallest = min((cell[1] for cells in flat.values() for cell in cells), default=0.0)
    tiny = _by_seed(results, "flat", lambda cell: cell[1] == smallest)
    rows = []
    for epsilon in sorted(set(flat) & set(automatic)):
        one, other, least = (
            cells[epsilon][_best(cells[epsilon])] for cells in (flat, automatic, tiny)
        )
        gap, half = _paired(one, other)
        examples = [r.privacy["num_examples"] for r in results if r.privacy]
        rows.append({
            "task": name, "epsilon": epsilon, "N": examples[0] if examples else 0,
            "flat, tuned [%]": float(np.mean(list(one.values()))),
            "AUTO-S [%]": float(np.mean(list(other.values()))),
            "least C": smallest, "flat, least C [%]": float(np.mean(list(least.values()))),
            "gap [points]": gap, "gap [points] ±": half,
        })  # fmt: skip
    return rows


def hard_classes(name: str, results: Sequence[Result]) -> list[Row]:
    """Accuracy of the hardest and the easiest third of the classes at the least C and a large one.

    The large one is the largest that is not worse over all classes, C* high of `optima`.
    """
    rows = []
    for best in optima(name, results):
        large, epsilon = best["C* high"], best["epsilon"]
        cells = _by_seed(results, "flat", lambda cell, size=best["B*"]: cell[0] == size)[epsilon]
        least = min(cell[1] for cell in cells)
        at = {
            bound: _best({c: seeds for c, seeds in cells.items() if c[1] == bound})
            for bound in {cell[1] for cell in cells}
        }
        classes = {bound: _class_accuracies(results, epsilon, cell) for bound, cell in at.items()}
        every = [row for seeds in classes.values() for row in seeds.values()]
        if least == large or not every:
            continue
        order = np.argsort(np.mean(every, axis=0))
        third = max(1, len(order) // 3)
        row: Row = {"task": name, "epsilon": epsilon, "least C": least, "large C": large}
        for label, members in (("hardest", order[:third]), ("easiest", order[-third:])):
            small, wide = (
                {seed: float(np.mean(values[members])) for seed, values in classes[bound].items()}
                for bound in (least, large)
            )
            gain, half = _paired(wide, small)
            row |= {f"{label}, least C [%]": float(np.mean(list(small.values()))),
                    f"{label}, gain [points]": gain, f"{label}, gain [points] ±": half}  # fmt: skip
        rows.append(row)
    return rows


def _class_accuracies(
    results: Iterable[Result], epsilon: float, cell: Cell
) -> dict[int, np.ndarray]:
    """Held-out accuracy [%] of every class, by seed, of the finished flat runs of a cell."""
    fields = ("dp.clipping", "dp.epsilon", "batch_size", "dp.bound", "optimizer.learning_rate")
    found = {}
    for r in results:
        mine = tuple(study.field(r, name) for name in fields) == ("flat", epsilon, *cell)
        if mine and r.status == "finished":
            names = sorted(n for n in r.evaluation if n.startswith("class_accuracy/"))
            found[study.field(r, "private_seed")] = np.array([100 * r.evaluation[n] for n in names])
    return found


def _fixed_points(shown: dict[str, list[Result]], best: Sequence[Row]) -> list[Row]:
    """C* by mean squared error at every moment, of the run whose C is best by accuracy."""
    rows = []
    for name, results in shown.items():
        for row in best:
            mine = [r for r in results if study.field(r, "dp.epsilon") == row["epsilon"]]
            if row["task"] != name or not mine:
                continue
            run = figures.nearest(mine, row["C*"])
            moments = zip(run.measured["steps"], run.measured["best_bound"])
            rows.append({
                "task": name, "epsilon": row["epsilon"], "B": study.field(run, "batch_size"),
                "C of the run": study.field(run, "dp.bound"), "C*, accuracy": row["C*"],
                **{f"C*, error, moment {k}": bound for k, (_, bound) in enumerate(moments)},
                "moments [steps]": "/".join(str(step) for step in run.measured["steps"]),
            })  # fmt: skip
    return rows
