"""The report of the study on hard tasks: every claim with a verdict, from the runs' lines alone.

    python -m experiments.clip_batch.hard_report DIR

A cell's settings are chosen by the accuracy on the tuning half of the held-out data, and what is
reported is that on the other half. All intervals are 95 % t-intervals of differences paired over
the private seeds. A claim is shown, or refuted, where the interval of the difference that it is
about excludes zero in the claimed direction, or in the other, and undecided elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from experiments import study
from experiments.clip_batch import figures, hard
from experiments.study import Figure, Row, Table

__all__ = ["Cells", "cells", "claims", "class_mix", "interior", "main", "one_bound", "parts",
           "rate_slopes", "scaling", "small_classes"]  # fmt: skip

_GROUPS = ((1, 9), (10, 49), (50, 199), (200, 10**9))  # sizes of classes in the training data
Key = tuple[int, float]  # B, C
Cells = dict[Key, list[Row]]  # runs with the result's seeds, at the best rate


def cells(rows: Sequence[Row], task: str, line: str, epsilon: float) -> Cells:
    """Returns the final runs of every (B, C), in the order of their seeds."""
    found: Cells = {}
    for row in rows:
        here = (row["task"], row.get("line"), row["role"], row.get("epsilon"))
        if here == (task, line, "result", epsilon):
            found.setdefault((row["B"], row["C"]), []).append(row)
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in found.items()}


def _best(found: Cells, *, B: int | None = None, C: float | None = None) -> Key:
    """The (B, C) of the best mean accuracy on the half that tunes; of a given B or C, if given."""
    kept = [key for key in found if (B is None or key[0] == B) and (C is None or key[1] == C)]
    return max(kept, key=lambda key: np.mean([run["tuning_accuracy"] for run in found[key]]))


def _rival(found: Cells, key: Key, *, B: int | None = None, C: float | None = None) -> Key:
    """What a cell is compared with: another B at its best C, or another C at the same B.

    At the same B, because which of several good B a C gets is chance, which no interval here has.
    """
    same = (key[0], C)
    return same if C is not None and same in found else _best(found, B=B, C=C)  # type: ignore[return-value]


def _mean(runs: Sequence[Row], name: str = "accuracy") -> float:
    return 100 * float(np.mean([run[name] for run in runs]))


def _gap(one: Sequence[Row], other: Sequence[Row], name: str = "accuracy") -> tuple[float, float]:
    """Mean of one minus other in points, seed by seed, and the half width of its interval."""
    return study.interval([100 * (a[name] - b[name]) for a, b in zip(one, other, strict=True)])


def verdict(gap: float, half: float) -> str:
    """What an interval says about a difference that a claim has above zero.

    >>> verdict(1.0, 0.4), verdict(-1.0, 0.4), verdict(0.3, 0.4)
    ('shown', 'refuted', 'undecided')
    """
    if math.isnan(half) or abs(gap) <= half:
        return "undecided"
    return "shown" if gap > 0 else "refuted"


def alike(gap: float, half: float) -> str:
    """What an interval says about a claim that two settings differ by at most a point.

    >>> alike(0.2, 0.5), alike(3.0, 0.5), alike(0.8, 0.5)
    ('shown', 'refuted', 'undecided')
    """
    if math.isnan(half):
        return "undecided"
    return "shown" if abs(gap) + half <= 1 else "refuted" if abs(gap) - half > 1 else "undecided"


def interior(rows: Sequence[Row], task: str, epsilon: float) -> Row:
    """Where the optimum of a task's grid lies: inside, or at an end, in each of the three axes."""
    found = cells(rows, task, "flat", epsilon)
    size, bound = _best(found)
    row: Row = {"task": task, "epsilon": epsilon, "B*": size, "C*": bound,
                "rate*": found[size, bound][0]["rate"]}  # fmt: skip
    for axis, value in (("B", size), ("C", bound)):
        values = sorted({key["BC".index(axis)] for key in found})
        ends = {values[0]: "lowest", values[-1]: "highest", found_n(rows, task): "full batch"}
        row[f"{axis}* is"] = ends.get(value, "inside")
        good = [value]
        for other in set(values) - {value}:
            loss, half = _gap(
                found[size, bound], found[_rival(found, (size, bound), **{axis: other})]
            )
            good += [other] if loss <= half else []
        row |= {f"{axis}* low": min(good), f"{axis}* high": max(good)}
    tried = sorted({r["rate"] for r in rows if (r["task"], r.get("line"), r.get("epsilon")) ==
                    (task, "flat", epsilon) and (r["B"], r["C"]) == (size, bound)})  # fmt: skip
    row["rate is"] = "inside" if tried[0] < row["rate*"] < tried[-1] else "at an end"
    runs = found[size, bound]
    mean, half = study.interval([100 * run["accuracy"] for run in runs])
    row |= {"accuracy [%]": mean, "accuracy [%] ±": half, "macro [%]": _mean(runs, "macro")}
    return row


def found_n(rows: Sequence[Row], task: str) -> int:
    """The number of training examples of a task."""
    return next(row["N"] for row in rows if row["task"] == task)


def claims(rows: Sequence[Row], task: str) -> list[Row]:
    """The claims about one task: what each says, the paired difference, and the verdict."""
    epsilons = sorted({r["epsilon"] for r in rows if (r["task"], r.get("line")) == (task, "flat")})
    tight, loose = epsilons[0], epsilons[-1]
    made: list[Row] = []

    def add(
        claim: str, epsilon: float, what: str, gap: tuple[float, float],
        judge: Callable[[float, float], str] = verdict,
    ) -> None:  # fmt: skip
        made.append({"task": task, "claim": claim, "epsilon": epsilon, "difference": what,
                     "points": gap[0], "points ±": gap[1], "verdict": judge(*gap)})  # fmt: skip

    at = {epsilon: cells(rows, task, "flat", epsilon) for epsilon in epsilons}
    best = {epsilon: _best(found) for epsilon, found in at.items()}
    for name, claim in (("C", "a tighter epsilon wants a larger C"),
                        ("B", "a tighter epsilon wants a smaller B")):  # fmt: skip
        low, high = (best[epsilon]["BC".index(name)] for epsilon in (tight, loose))
        rival = _rival(at[tight], best[tight], **{name: high})
        gap = _gap(at[tight][best[tight]], at[tight][rival])
        sign = 1 if (low > high) == (name == "C") else -1  # where it lies on the claim's side
        what = f"{name} = {low:g} minus {high:g}, the best at epsilon {loose:g}"
        points = (0.0, 0.0) if low == high else (sign * gap[0] + 0.0, gap[1])
        # A best value that the result's seeds deny is no evidence for the other side.
        word = verdict(*points)
        sided = word if word == ("shown" if sign > 0 else "refuted") else "undecided"
        add(claim, tight, what, points, lambda gap, half, sided=sided: sided)
    full = found_n(rows, task)
    for epsilon in (tight, loose):
        found, here = at[epsilon], best[epsilon]
        if any(key[0] == full for key in found):
            add("few epochs: the full batch loses", epsilon, f"B = {here[0]} minus {full}, each at "
                "its best C", _gap(found[here], found[_best(found, B=full)]))  # fmt: skip
        least = min(key[1] for key in found)
        small = _rival(found, here, C=least)
        add("a small C starves the hard classes (macro accuracy)", epsilon,
            f"C = {here[1]:g} minus {least:g}",
            _gap(found[here], found[small], "macro"))  # fmt: skip
        automatic = cells(rows, task, "automatic", epsilon)
        if automatic:
            theirs = automatic[_rival(automatic, here, C=1.0)]
            add("AUTO-S is worse than a tuned C", epsilon, f"C = {here[1]:g} minus AUTO-S",
                _gap(found[here], theirs))  # fmt: skip
            add("AUTO-S is within a point of a tiny C", epsilon,
                f"AUTO-S minus C = {least:g}", _gap(theirs, found[small]), alike)  # fmt: skip
        others = {line: _at(rows, task, line, epsilon, here[0])
                  for line in ("tanh", "corrected", "scaled")}  # fmt: skip
        for line, text in (("tanh", "tanh clipping"), ("corrected", "Adam with corrected moments"),
                           ("scaled", "scale-then-privatize")):  # fmt: skip
            if others[line]:
                add(f"{text} beats flat clipping and Adam", epsilon, f"{line} minus flat",
                    _gap(others[line], found[here]))  # fmt: skip
        if others["scaled"] and others["corrected"]:
            add("scale-then-privatize beats Adam with corrected moments", epsilon,
                "scaled minus corrected", _gap(others["scaled"], others["corrected"]))  # fmt: skip
    return made


def _at(rows: Sequence[Row], task: str, line: str, epsilon: float, size: int) -> list[Row]:
    """The final runs of a line at one B and the best C; of several stabilities, the best one."""
    names = sorted({r["line"] for r in rows if r.get("line", "").split()[:1] == [line]})
    found = [cells(rows, task, name, epsilon) for name in names]
    runs = [one[_best(one, B=size)] for one in found if any(key[0] == size for key in one)]
    return max(runs, key=lambda runs: _mean(runs, "tuning_accuracy"), default=[])


def scaling(rows: Sequence[Row], task: str) -> list[Row]:
    """Scale-then-privatize by its stability and C, at the B of the best cell of flat clipping.

    Returns:
        A row per budget, stability and C: accuracy, and what it has more than flat clipping.
    """
    names = sorted({r["line"] for r in rows if r.get("line", "").startswith("scaled ")
                    and r["task"] == task}, key=lambda name: -float(name.split()[1]))  # fmt: skip
    made = []
    for epsilon in sorted({r["epsilon"] for r in rows if r.get("line") in names}):
        plain = cells(rows, task, "flat", epsilon)
        best = _best(plain)
        for name in names:
            found = cells(rows, task, name, epsilon)
            for size, bound in sorted(found):
                if size == best[0]:
                    runs = found[size, bound]
                    gain, half = _gap(runs, plain[best])
                    made.append({
                        "task": task, "epsilon": epsilon, "B": size,
                        "stability": float(name.split()[1]), "C": bound,
                        "rate": runs[0]["rate"], "accuracy [%]": _mean(runs),
                        "gain over flat [points]": gain, "gain over flat [points] ±": half,
                    })  # fmt: skip
    return made


def rate_slopes(rows: Sequence[Row], task: str) -> list[Row]:
    """The exponent p of the best rate ~ B^p, at the best C of every (epsilon, B)."""
    epsilons = sorted({r["epsilon"] for r in rows if (r["task"], r.get("line")) == (task, "flat")})
    slopes = []
    for epsilon in epsilons:
        found = cells(rows, task, "flat", epsilon)
        sizes = sorted({key[0] for key in found})
        if len(sizes) < 3:
            return []
        rates = [found[_best(found, B=size)][0]["rate"] for size in sizes]
        slopes.append(float(np.polyfit(np.log(sizes), np.log(rates), 1)[0]))
    mean, half = study.interval(slopes)
    inside = abs(mean - 0.5) <= half
    word = "undecided" if inside and abs(mean) <= half else "shown" if inside else "refuted"
    return [{
        "task": task, "exponent of B": mean, "exponent of B ±": half,
        "by epsilon": "/".join(f"{s:.2f}" for s in slopes), "sqrt(B)": word,
    }]  # fmt: skip


def small_classes(rows: Sequence[Row], task: str) -> list[Row]:
    """Accuracy by the size of the classes in the training data, at the least, best and AUTO-S C."""
    facts = _reference(rows, task)
    sizes = np.array(facts["class_sizes"])
    made = []
    for epsilon in sorted({r["epsilon"] for r in rows if r["task"] == task and "epsilon" in r}):
        found = cells(rows, task, "flat", epsilon)
        _, bound = _best(found)
        for c in sorted({key[1] for key in found}):
            runs = found[_best(found, C=c)]
            row: Row = {"task": task, "epsilon": epsilon, "C": c, "best": "*" if c == bound else ""}
            for name, label in (("accuracy", "micro [%]"), ("macro", "macro [%]")):
                mean, half = study.interval([100 * run[name] for run in runs])
                row |= {label: mean, f"{label} ±": half}
            for low, high in _GROUPS:
                members = [k for k in range(len(sizes)) if low <= sizes[k] <= high]
                label = f"{low} to {high}" if high < 10**9 else f"{low} and more"
                values = [100 * value for run in runs if (value := _of(run, members, facts)) >= 0]
                if values:
                    mean, half = study.interval(values)
                    row |= {f"classes of {label} [%]": mean, f"classes of {label} [%] ±": half}
            made.append(row)
    return made


def _of(run: Mapping[str, Any], members: Sequence[int], facts: Mapping[str, Any]) -> float:
    """Accuracy over all held-out examples of some classes; -1 if there is none."""
    counts = {str(k): facts["held_sizes"][k] for k in members}
    total = sum(counts.values())
    right = sum(counts[k] * run["by_class"].get(k, 0.0) for k in counts)
    return right / total if total else -1.0


def one_bound(rows: Sequence[Row], tasks: Sequence[str]) -> list[Row]:
    """What every task and budget loses at its own B* if one C serves all, that of least loss."""
    found = {}
    for task in tasks:
        mine = [
            r for r in rows if (r["task"], r.get("line"), r["role"]) == (task, "flat", "result")
        ]
        for epsilon in sorted({r["epsilon"] for r in mine}):
            found[task, epsilon] = cells(rows, task, "flat", epsilon)
    shared = set.intersection(*({key[1] for key in cell} for cell in found.values()))

    def lost(cell: Cells, bound: float) -> tuple[float, float]:
        best = _best(cell)
        return _gap(cell[best], cell[_rival(cell, best, C=bound)])

    bound = min(sorted(shared), key=lambda c: sum(lost(cell, c)[0] for cell in found.values()))
    made = []
    for (task, epsilon), cell in found.items():
        gap, half = lost(cell, bound)
        made.append({"task": task, "epsilon": epsilon, "C*": _best(cell)[1], "one C": bound,
                     "lost [points]": gap, "lost [points] ±": half,
                     "one C is worse": verdict(gap, half)})  # fmt: skip
    return made


def class_mix(rows: Sequence[Row]) -> list[Row]:
    """What a larger C gains for classes that are easy and hard to tell apart, alone and mixed.

    Returns:
        A row per budget and task of "20newsgroups easy", "hard" and "mix" that ran: at C* and at
        the least C, both at B*, the accuracy of the easy and of the hard classes.
    """
    groups = {"easy": (hard.EASY, ()), "hard": ((), hard.HARD), "mix": (hard.EASY, hard.HARD)}
    made = []
    for name, (easy, difficult) in groups.items():
        task = f"20newsgroups {name}"
        mine = [r for r in rows if (r["task"], r.get("line")) == (task, "flat")]
        for epsilon in sorted({r["epsilon"] for r in mine}):
            found = cells(rows, task, "flat", epsilon)
            best = _best(found)
            least = min(key[1] for key in found)
            small = found[_rival(found, best, C=least)]
            row: Row = {"task": task, "epsilon": epsilon, "C*": best[1], "least C": least}
            for label, first, count in (
                ("easy", 0, len(easy)),
                ("hard", len(easy), len(difficult)),
            ):
                members = [str(k) for k in range(first, first + count)]
                if members:
                    large, tiny = ([{label: float(np.mean([r["by_class"][k] for k in members]))}
                                    for r in runs] for runs in (found[best], small))  # fmt: skip
                    gain, half = _gap(large, tiny, label)
                    row |= {f"{label} classes [%]": _mean(large, label),
                            f"{label}, gain over the least C": gain,
                            f"{label}, gain over the least C ±": half}  # fmt: skip
            made.append(row)
    return made


def _difficulty(rows: Sequence[Row], tasks: Sequence[str], found: Sequence[Row]) -> list[Figure]:
    """C* against the accuracy without privacy: does a hard task want a larger C?"""
    easy = {task: 100 * _reference(rows, task)["accuracy"] for task in tasks}
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    epsilons = sorted({row["epsilon"] for row in found})
    for number, epsilon in enumerate(epsilons):
        mine = [row for row in found if row["epsilon"] == epsilon]
        shift = 0.25 * (number - (len(epsilons) - 1) / 2)
        at = [easy[row["task"]] + shift for row in mine]
        axes.plot(at, [row["C*"] for row in mine], "o", color=f"C{number}", label=f"{epsilon:g}")
        for x, row in zip(at, mine):
            axes.plot([x, x], [row["C* low"], row["C* high"]], color=f"C{number}", lw=1.5)
    for task in tasks:
        axes.annotate(task, (easy[task], 1.01), xycoords=("data", "axes fraction"), rotation=35,
                      va="bottom", ha="left", fontsize=8)  # fmt: skip
    axes.set(yscale="log", xlabel="accuracy without privacy [%]: easier to the right",
             ylabel="best clip bound C* [gradient norm]")  # fmt: skip
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="epsilon", fontsize=8)
    caption = ("Best clip bound, with the bounds that are not worse at 95 %, against the accuracy "
               "that a head reaches without privacy")  # fmt: skip
    return [Figure("difficulty", caption, figure)]


def _fairness(task: str, found: Sequence[Row]) -> list[Figure]:
    """Micro and macro accuracy, and that of small classes, against C."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [n for n in found[0] if n.startswith("classes of") and not n.endswith("±")]
    for number, epsilon in enumerate(sorted({row["epsilon"] for row in found})):
        mine = [row for row in found if row["epsilon"] == epsilon]
        at = [row["C"] for row in mine]
        for name, style in (("micro [%]", "-"), ("macro [%]", "--")):
            label = f"epsilon {epsilon:g}" if style == "-" else None
            halves = np.nan_to_num([r[f"{name} ±"] for r in mine])
            panels[0].errorbar(at, [r[name] for r in mine], halves, ls=style, marker="o", ms=3,
                               color=f"C{number}", label=label)  # fmt: skip
    last = max(row["epsilon"] for row in found)
    for number, name in enumerate(names):
        mine = [row for row in found if row["epsilon"] == last]
        panels[1].errorbar([r["C"] for r in mine], [r[name] for r in mine],
                           np.nan_to_num([r[f"{name} ±"] for r in mine]), marker="o", ms=3,
                           color=f"C{number}", label=name.removesuffix(" [%]"))  # fmt: skip
    panels[0].set(xscale="log", xlabel="clip bound C", ylabel="accuracy [%]", title="all documents")
    panels[1].set(xscale="log", xlabel="clip bound C", ylabel="accuracy [%]",
                  title=f"by the size of the class, epsilon = {last:g}")  # fmt: skip
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend(title="all classes alike (macro): dashed", fontsize=7, title_fontsize=7,
                     ncols=3, loc="center left", bbox_to_anchor=(0.0, 0.6))  # fmt: skip
    panels[1].legend(fontsize=7)
    figure.suptitle(task)
    caption = f"{task}: micro and macro accuracy, and small classes, by C at the best B of each"
    return [Figure(f"fairness_{task.replace(' ', '_')}", caption, figure)]


def _gradients(looked: Sequence[Row]) -> list[Row]:
    """Norms at start and end, and where one step's error is least. NOT private."""
    made = []
    for row in looked:
        middle = len(row["levels"]) // 2
        order = np.argsort(list(row["by_class"].values()))
        third = max(1, len(order) // 3)
        present = [int(k) for k in row["by_class"]]
        for moment, name in enumerate(("start", "end")):
            weights, norms = np.array(row["weights"][moment]["0.1"])[present], row["norms"][moment]
            made.append({
                "task": row["task"], "epsilon": row["epsilon"], "moment": name, "B": row["B"],
                "C* by accuracy": row["C"], "C* by error": row["best_bound"][moment],
                "norm, median": norms[middle],
                "norm, 5 to 95 %": f"{norms[0]:.3g} to {norms[-1]:.3g}",
                "clipped": row["clipped"][moment],
                "w(0.1), hardest third": float(np.nanmean(weights[order[:third]])),
                "w(0.1), easiest third": float(np.nanmean(weights[order[-third:]])),
            })  # fmt: skip
    return made


def parts(rows: Sequence[Row], looked: Sequence[Row]) -> list[str | Table | Figure]:
    """The parts of the report."""
    done = [r for r in rows if (r.get("line"), r["role"]) == ("flat", "result")]
    tasks = list(dict.fromkeys(r["task"] for r in done))
    if not tasks:
        return ["No block is finished yet."]
    at = {t: sorted({r["epsilon"] for r in done if r["task"] == t}) for t in tasks}
    tops = [interior(rows, t, e) for t in tasks for e in at[t]]
    reference = [{"task": r["task"], "N": r["N"], "classes": len(r["class_sizes"]),
                  "accuracy [%]": 100 * r["accuracy"], "macro [%]": 100 * r["macro"]}
                 for r in rows if r["role"] == "nonprivate"]  # fmt: skip
    grids = {t: [_cell(key, e, runs) for e in at[t]
                 for key, runs in cells(rows, t, "flat", e).items()] for t in tasks}  # fmt: skip
    seconds = sum(r.get("block_cpu_seconds", 0.0) for r in rows)
    found: list[str | Table | Figure] = [
        f"{sum(r['role'] != 'nonprivate' for r in rows):,} heads, {seconds / 60:.0f} minutes of "
        "processor time without the features. Settings are chosen on one half of the held-out "
        "data, accuracies are of the other; five seeds; the choice is not charged.",
        Table("reference", "Without privacy", reference),
        "## Verdicts",
        Table("claims", "Every claim, as a difference that it has above zero",
              [row for t in tasks for row in claims(rows, t)]),
        Table("rates", "Does the best rate grow with sqrt(B)? Exponent, over the budgets",
              [row for t in tasks for row in rate_slopes(rows, t)]),
        *_scaled(rows, tasks),
        "## One C for all",
        Table("one_bound", "What the C of least mean loss costs each task", one_bound(rows, tasks)),
        "## Optima",
        "From low to high are the values whose best cell is not worse, seed by seed.",
        Table("optima", "Best batch size, bound and rate, and whether they are inside of the grid",
              tops),
        *_difficulty(rows, tasks, tops),
        *figures.heatmaps(grids),
    ]  # fmt: skip
    # Small classes beside large ones.
    sizes = {task: _reference(rows, task)["class_sizes"] for task in tasks}
    for task in [t for t in tasks if min(sizes[t]) <= 50 and max(sizes[t]) >= 500]:
        by_size = small_classes(rows, task)
        name = f"small_classes_{task.replace(' ', '_')}"
        found += [f"## Small classes: {task}",
                  Table(name, "By the size of the class in the training data", by_size),
                  *_fairness(task, by_size)]  # fmt: skip
    mixed = class_mix(rows)
    if mixed:
        found += [
            "## Easy and hard classes, alone and mixed",
            "Five groups of five fields, five of one field, and all ten.",
            Table("class_mix", "What C* gains over the least C, in points", mixed),
        ]
    if looked:
        found += ["## Gradients: NOT private", "From raw gradients of 768 training examples at B* "
                  "and C*. w(0.1) is the mean of min(1, 0.1 / norm) over the classes.",
                  Table("nonprivate_gradients", "Norms and the bound of least error, NOT private",
                        _gradients(looked))]  # fmt: skip
    return found


def _scaled(rows: Sequence[Row], tasks: Sequence[str]) -> list[str | Table | Figure]:
    found = [row for task in tasks for row in scaling(rows, task)]
    if not found:
        return []
    return [
        "## Scale-then-privatize",
        "A large stability scales nothing, a small one scales by the noise that the moments hold.",
        Table("scaled", "At the best B of flat clipping", found),
    ]


def _reference(rows: Sequence[Row], task: str) -> Row:
    """The head without privacy, and what is known about the task."""
    return next(r for r in rows if (r["task"], r["role"]) == (task, "nonprivate"))


def _cell(key: Key, epsilon: float, runs: Sequence[Row]) -> Row:
    return {"epsilon": epsilon, "B": key[0], "C": key[1], "learning rate": runs[0]["rate"],
            "accuracy [%]": _mean(runs)}  # fmt: skip


def main(workdir: Path) -> list[Path]:
    """Writes report.md with its tables and figures."""
    rows = hard.read(workdir / "runs.jsonl")
    looked = hard.read(workdir / "nonprivate.jsonl")
    title = "Learning rate, batch size and clip bound on hard tasks"
    return study.write(workdir, title, parts(rows, looked), [])


if __name__ == "__main__":
    for written in main(Path(sys.argv[1])):
        print(written)
