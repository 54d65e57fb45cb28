"""The report of `heads`, rebuilt from DIR/runs.jsonl alone.

    python -m experiments.allocation.report DIR

Writes DIR/report.md, its tables as Markdown and CSV, and two figures.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt

from dpjax.build import planner
from experiments import study
from experiments.allocation.heads import DELTA, EPOCHS, Row, read
from experiments.study import Figure, Table

__all__ = ["Cell", "cells", "main", "paired", "parts", "published", "regrets"]


class Cell(NamedTuple):
    """The runs of one task, sampler, budget and batch size, at their searched learning rate.

    Attributes:
        task, sampler, epsilon, batch_size, steps, num_examples: what they are.
        noise_multiplier: sigma.
        rate: the learning rate.
        inside: whether the search tried a higher and a lower rate.
        accuracy: by private seed.
    """

    task: str
    sampler: str
    epsilon: float
    batch_size: int
    steps: int
    num_examples: int
    noise_multiplier: float
    rate: float
    inside: bool
    accuracy: Mapping[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracy.values())))


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Groups runs into cells, in the order of their fields."""
    groups: dict[tuple[str, str, float, int], list[Row]] = {}
    for row in rows:
        key = (row["task"], row["sampler"], row["epsilon"], row["B"])
        groups.setdefault(key, []).append(row)
    found = []
    for key, group in sorted(groups.items()):
        result = [row for row in group if row["role"] == "result"]
        tried = {row["rate"] for row in group}
        rate = result[0]["rate"]
        found.append(Cell(
            *key, steps=result[0]["T"], num_examples=result[0]["N"],
            noise_multiplier=result[0]["noise_multiplier"], rate=rate,
            inside=min(tried) < rate < max(tried),
            accuracy={row["seed"]: row["accuracy"] for row in result},
        ))  # fmt: skip
    return found


Setting = tuple[str, str, float]  # task, sampler, epsilon


def settings(found: Iterable[Cell]) -> dict[Setting, list[Cell]]:
    """Cells by task, sampler and epsilon, by rising batch size."""
    groups: dict[Setting, list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.task, cell.sampler, cell.epsilon), []).append(cell)
    return {key: sorted(group, key=lambda c: c.batch_size) for key, group in groups.items()}


# --- Allocation against Poisson sampling ----------------------------------------------------------


def paired(found: Sequence[Cell]) -> list[Row]:
    """What allocation gains over Poisson sampling in each task and budget.

    At Poisson sampling's best batch size, where it looks best, and over all batch sizes but the
    full batch, where the two are one mechanism. Gains are paired over seeds.
    """
    groups, rows = settings(found), []
    for task, epsilon in sorted({(c.task, c.epsilon) for c in found}):
        poisson, allocation = (
            {c.batch_size: c for c in groups.get((task, sampler, epsilon), [])}
            for sampler in ("poisson", "random_allocation")
        )
        both = [b for b in poisson if b in allocation and _alike(poisson[b], allocation[b])]
        if not both:
            continue
        best = max(both, key=lambda b: poisson[b].mean)
        one, half = study.interval(_gains(poisson[best], allocation[best]))
        by_seed = np.mean([_gains(poisson[b], allocation[b]) for b in both], axis=0)
        every, spread = study.interval(by_seed)
        less = [
            1 - allocation[b].noise_multiplier * allocation[b].steps**0.5
            / (poisson[b].noise_multiplier * poisson[b].steps**0.5) for b in both
        ]  # fmt: skip
        rows.append({
            "task": task, "epsilon": epsilon, "best B": best,
            "Poisson [%]": 100 * poisson[best].mean,
            "allocation [%]": 100 * allocation[best].mean,
            "gain at it [points]": 100 * one, "gain at it [points] ±": 100 * half,
            "mean gain over B [points]": 100 * every, "mean gain over B [points] ±": 100 * spread,
            "less noise [%]": f"{100 * min(less):.1f} to {100 * max(less):.1f}",
        })  # fmt: skip
    return rows


def _alike(one: Cell, other: Cell) -> bool:
    """Whether two samplers are worth comparing: not full batches, and of the same steps, nearly.

    An epoch of allocation has a whole number of steps; of two thirds of N, it is a full batch.
    """
    close = abs(one.steps - other.steps) <= 0.05 * one.steps
    return close and one.batch_size < one.num_examples


def _gains(one: Cell, other: Cell) -> list[float]:
    seeds = sorted(set(one.accuracy) & set(other.accuracy))
    return [other.accuracy[seed] - one.accuracy[seed] for seed in seeds]


def _together(found: Sequence[Cell]) -> str:
    """One sentence about all pairs of cells."""
    groups = settings(found)
    gains, worse, better = [], 0, 0
    for (task, sampler, epsilon), group in groups.items():
        if sampler != "poisson":
            continue
        others = {c.batch_size: c for c in groups.get((task, "random_allocation", epsilon), [])}
        for cell in group:
            other = others.get(cell.batch_size)
            if other is not None and _alike(cell, other):
                mean, half = study.interval(_gains(cell, other))
                gains.append(100 * mean)
                better += mean > half
                worse += -mean > half
    if not gains:
        return ""
    mean, half = study.interval(gains)
    return (
        f"Over all {len(gains)} pairs of cells, allocation gains {mean:.2f} ± {half:.2f} points. "
        f"It is better at 95 % in {better} of them and worse in {worse}; by chance alone either "
        f"would be {0.025 * len(gains):.0f}."
    )


def noise_figure(found: Sequence[Cell]) -> Iterable[Figure]:
    """The cumulative noise against the batch size, of both samplers, of the largest data set."""
    total = max((c.num_examples for c in found), default=0)
    largest = {c.task for c in found if c.num_examples == total}
    mine = [c for c in found if c.task == min(largest, default="")]
    if not mine:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epsilons = sorted({c.epsilon for c in mine})
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(epsilons)))
    for color, epsilon in zip(colors, epsilons):
        for sampler, style in (("poisson", ".--"), ("random_allocation", ".-")):
            group = settings(mine).get((mine[0].task, sampler, epsilon), [])
            axes.plot(
                [c.batch_size for c in group], [c.noise_multiplier * c.steps**0.5 for c in group],
                style, color=color,
                label=f"epsilon {epsilon:g}" if sampler == "random_allocation" else None,
            )  # fmt: skip
    axes.plot([], [], "k--", label="Poisson")
    axes.plot([], [], "k-", label="random allocation")
    axes.set(xscale="log", yscale="log", xlabel="expected batch size B",
             ylabel="cumulative noise sigma sqrt(T) [clip bounds]",
             title=f"N = {total}, {EPOCHS:g} epochs")  # fmt: skip
    axes.legend(fontsize="small")
    yield Figure("noise", "Cumulative noise against batch size", figure)


# --- Rules for the batch size ---------------------------------------------------------------------

Rule = Callable[[list[Cell]], Cell]


def noise_rule(steps: int, tolerance: float, sampling: float, place: float = 0.0) -> Rule:
    """The planner's rule: enough steps, then a B on the plateau of the noise.

    Args:
        steps: least T.
        tolerance: of the plateau.
        sampling: weight of the noise of sampling, per square root of an epoch.
        place: where on the plateau, from its smallest B (0) to its largest (1) in logarithms.
    """

    def choose(group: list[Cell]) -> Cell:
        enough = [c for c in group if c.steps >= steps] or [group[0]]
        noise = [
            math.hypot(c.noise_multiplier * c.steps**0.5, sampling * EPOCHS**0.5) for c in enough
        ]
        plateau = [c for c, n in zip(enough, noise) if n <= (1 + tolerance) * min(noise)]
        low, high = (math.log(plateau[end].batch_size) for end in (0, -1))
        wanted = low + place * (high - low)
        return min(plateau, key=lambda c: abs(math.log(c.batch_size) - wanted))

    return choose


def planned(group: list[Cell]) -> Cell:
    """The choice of `planner.plan` among the batch sizes of a setting."""
    one = group[0]
    plan = planner.plan(
        one.num_examples, EPOCHS, one.epsilon, DELTA, samplers=(one.sampler,),
        batch_sizes=[c.batch_size for c in group],
    )  # fmt: skip
    return next(c for c in group if c.batch_size == plan.batch_size)


published = noise_rule(1, 0.10, 0.0)
former = noise_rule(40, 0.05, 4.0)
FAMILY = {
    parameters: noise_rule(*parameters)
    for parameters in itertools.product(
        (1, 8, 12, 16, 20, 40), (0.05, 0.1, 0.15, 0.2, 0.3), (0.0, 1.0, 2.0, 4.0), (0.0, 0.25, 0.5)
    )
}


def regrets(
    rule: Rule, groups: Mapping[Setting, list[Cell]], *, smooth: bool = False
) -> dict[Setting, float]:
    """Accuracy lost against the best batch size of each setting, by the means or by `smoothed`."""
    found = {}
    for key, group in groups.items():
        if len(group) > 1:
            values = smoothed(group) if smooth else [c.mean for c in group]
            found[key] = max(values) - values[group.index(rule(group))]
    return found


def smoothed(group: Sequence[Cell]) -> list[float]:
    """Means of a cubic in log B through the cells: the best of them is not the luckiest one."""
    sizes = np.log([c.batch_size for c in group])
    means = [c.mean for c in group]
    if len(group) < 5:
        return means
    scaled = (sizes - sizes.mean()) / sizes.std()
    return [float(v) for v in np.polyval(np.polyfit(scaled, means, 3), scaled)]


def _loss(values: Iterable[float]) -> float:
    """What a rule is fitted by: the mean and a fifth of the worst, near the ratio of our goals."""
    array = np.array(list(values))
    return float(array.mean() + array.max() / 5)


def left_out(groups: Mapping[Setting, list[Cell]], *, smooth: bool = False) -> dict[Setting, float]:
    """Regrets of the family's best rule of all other tasks; smaller sets go with their whole."""
    table = {name: regrets(rule, groups, smooth=smooth) for name, rule in FAMILY.items()}

    def data_of(key: Setting) -> str:
        return key[0].split("_")[0]

    found: dict[Setting, float] = {}
    for data in sorted({data_of(key) for key in groups}):
        best = min(
            table,
            key=lambda name: _loss(
                [v for key, v in table[name].items() if data_of(key) != data] or [0.0]
            ),
        )
        found |= {key: v for key, v in table[best].items() if data_of(key) == data}
    return found


def rules_table(groups: Mapping[Setting, list[Cell]]) -> list[Row]:
    """Mean and worst regret of every rule."""
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return []
    table = {name: regrets(rule, groups, smooth=True) for name, rule in FAMILY.items()}
    fitted = min(table, key=lambda name: _loss(table[name].values()))
    steps, tolerance, sampling, place = fitted
    rules = {
        "the planner's": planned,
        "the former: T >= 40, within 5 %, sampling noise 4": former,
        "published: within 10 % of the lowest sigma sqrt(T)": published,
        f"best fit here: T >= {steps}, {tolerance:.0%}, {sampling:g}, at {place:g}": FAMILY[fitted],
    }
    found = {
        name: [regrets(rule, groups, smooth=smooth) for smooth in (True, False)]
        for name, rule in rules.items()
    }
    found["fitted on the other data sets"] = [left_out(groups, smooth=s) for s in (True, False)]
    rows = []
    for name, (curve, means) in found.items():
        row: Row = {"rule": name}
        for what, values in (("curves", curve), ("means", means)):
            row[f"{what}: mean"] = f"{np.mean(list(values.values())):.4f}"
            row[f"{what}: worst"] = f"{max(values.values()):.4f}"
        for sampler in planner.SAMPLERS:
            some = [v for key, v in curve.items() if sampler == key[1]]
            if some:
                row[f"{sampler}: mean"] = f"{np.mean(some):.4f}"
                row[f"{sampler}: worst"] = f"{max(some):.4f}"
        rows.append(row)
    return rows


def choices(groups: Mapping[Setting, list[Cell]]) -> list[Row]:
    """The best batch size of every setting, and what the planner chose."""
    rows = []
    for (task, sampler, epsilon), group in sorted(groups.items()):
        best, ours = max(group, key=lambda c: c.mean), planned(group)
        gap, half = study.interval(_gains(ours, best))
        rows.append({
            "task": task, "sampler": sampler, "epsilon": epsilon, "best B": best.batch_size,
            "its T": best.steps, "its rate": best.rate, "best [%]": 100 * best.mean,
            "planner's B": ours.batch_size, "lost [points]": 100 * gap,
            "lost [points] ±": 100 * half,
        })  # fmt: skip
    return rows


def accuracy_figure(groups: Mapping[Setting, list[Cell]]) -> Iterable[Figure]:
    """Accuracy against the number of steps, a panel for each task."""
    tasks = sorted({task for task, _, _ in groups})
    if not tasks:
        return
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    epsilons = sorted({epsilon for _, _, epsilon in groups})
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(epsilons)))
    for axes, task in zip(panels.flat, tasks):
        for (name, sampler, epsilon), group in groups.items():
            if name == task:
                style = ".--" if sampler == "poisson" else ".-"
                axes.plot([c.steps for c in group], [100 * c.mean for c in group], style,
                          color=colors[epsilons.index(epsilon)])  # fmt: skip
        axes.set(xscale="log", xlabel="steps T", title=task)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for line in panels:
        line[0].set_ylabel("held-out accuracy [%]")
    names = ", ".join(f"{e:g}" for e in epsilons)
    caption = f"Accuracy against steps at epsilon {names} (dark to light); dashed: Poisson"
    yield Figure("accuracy", caption, figure)


def parts(rows: Sequence[Row]) -> list[str | Table | Figure]:
    """The parts of the report."""
    found = cells(rows)
    groups = settings(found)
    every = [
        {"task": c.task, "sampler": c.sampler, "epsilon": c.epsilon, "B": c.batch_size,
         "T": c.steps, "sigma": c.noise_multiplier, "rate": c.rate, "rate inside": c.inside,
         "accuracy [%]": 100 * c.mean,
         "accuracy [%] ±": 100 * study.interval(list(c.accuracy.values()))[1]}
        for c in found
    ]  # fmt: skip
    inside = sum(c.inside for c in found)
    return [
        f"{len(rows)} runs in {len(found)} cells (task, sampler, epsilon, B); the best rate has "
        f"a higher and a lower one beside it in {inside} of them. Mean ± half width of the 95 % "
        "interval over private seeds, on held-out data that the search for the rate did not see.",
        "## Random allocation against Poisson sampling",
        _together(found),
        Table("paired", "At equal epsilon, epochs and search", paired(found)),
        *noise_figure(found),
        "## Rules for the batch size",
        "Regret: accuracy lost against the best batch size of the same task, sampler and epsilon, "
        "which is known only afterward. The best of noisy means is a lucky one, so the columns "
        "`curves`, and those of one sampler, compare on a cubic in log B through them.",
        Table("rules", "Regret of rules, as fractions of the test set", rules_table(groups)),
        Table("choices", "The planner's choice in every setting", choices(groups)),
        *accuracy_figure(groups),
        "## All cells",
        Table("cells", "At the searched learning rate", every),
    ]


def main(argv: Sequence[str]) -> int:
    """Command line: the work directory; returns the exit code: 0, or 2 for a mistake."""
    if len(argv) != 1 or not (rows := read(Path(argv[0]))):
        print("error: give the work directory of experiments.allocation.heads", file=sys.stderr)
        return 2
    for path in study.write(Path(argv[0]), "Random allocation", parts(rows), []):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
