"""Which layers to fine-tune at equal epsilon (Cattan et al., arXiv 2210.02156), as a study.

    python -m experiments.run_study --config=experiments/layers/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (MNIST digits, the shipped ViT
pretrained on UCI digits, three seeds), "votes" (fewer sets and digits, with votes), "text" (the
same sets on 20 Newsgroups with the six blocks of MiniLM) and "paper" (CIFAR-100, ViT-B/16
pretrained on ImageNet-21k, epsilon 2, delta 1e-5). The paper's layer lists were not available to
us: the sets here are our own.

All sets have the same mechanism: N, q, T and sigma do not depend on the trained layers. Therefore
repeat-and-select can charge the choice among them (`dpjax.dp.repeat_and_select`). The choice made
by this study is declared, not charged. The report also says what charging it would have cost, and
conversely, which epsilon a run would have had if the search had met the budget. The sizes "votes"
and "text" have runs of that epsilon too, from which the accuracy of charged searches follows.
Beside the sets, the sizes "laptop", "votes" and "text" have `vote:1` and `vote:2`, which train the
blocks that a noised vote of the examples picks: that choice is charged, within the same epsilon. A
charged search is

    dpjax search --config=experiments/layers/study.py:charged \\
        --workdir=DIR --charge=10

whose points are those of "laptop" without votes and fixed seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from ml_collections import ConfigDict

from dpjax import build, models
from dpjax.config import default
from dpjax.dp import repeat_and_select
from dpjax.models import finetune
from dpjax.search import proposals
from experiments import study
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["get_config", "measure", "report", "sweep"]

_RATE = "optimizer.learning_rate"
_VIT = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}

_FEW = ("head", "blocks:last:1", "blocks:last:2", "full", "vote:1", "vote:2")

# Layer sets, learning rates, seeds.
_GRID: dict[str, tuple[tuple[str, ...], tuple[float, ...], int]] = {
    "smoke": (("head", "film"), (3e-2,), 2),
    "laptop": (
        ("head", "film", "bias", "blocks:first:1", "blocks:last:1", "blocks:last:2", "lora:8",
         "full"),
        (2e-3, 6e-3, 1.8e-2), 3,
    ),
    "votes": ((*_FEW, "blocks:first:1"), (4e-3, 1.2e-2), 3),
    "text": (_FEW, (1e-3, 4e-3), 3),
    "paper": (
        ("head", "film", "bias", *(f"blocks:{end}:{k}" for k in (1, 2, 4, 8)
                                   for end in ("first", "last")),
         "film+blocks:last:1", "film+blocks:last:2", "lora:8", "lora:16", "film+lora:8",
         "regex:attn/+head", "full"),
        tuple(float(f"{1e-5 * 1000 ** (k / 7):.3g}") for k in range(8)), 3,
    ),
}  # fmt: skip
_VOTES = ("vote:1", "vote:2")  # charged within the budget; in no search that is charged
_PUBLISHED = [
    {
        "data": "CIFAR-100, ImageNet pretraining", "epsilon": 2.0, "delta": 1e-5,
        "accuracy [%]": 77.9, "layers": "chosen by their search, not public to us",
    }
]  # fmt: skip
_MEANS = (2.0, 5.0, 10.0)  # numbers of runs at which a charged search is priced
# By the mean number of runs, the epsilon of a run in a search of epsilon 2; the report checks it.
_SEARCHES = {"votes": {2.0: 1.752}, "text": {2.0: 1.755}}

_ACC = "accuracy [%]"
_METRICS: dict[str, Metric] = {
    _ACC: lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "ECE [%]": lambda r: 100 * r.evaluation["ece"],
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`, or "charged"."""
    chosen = "laptop" if arg == "charged" else study.size(arg, "votes", "text")
    config = default()
    config.checkpoint_every = 10_000
    config.log_every = 10
    config.dp.epsilon = 2.0
    options = {"image_size": 224}
    if chosen == "paper":
        config.data.name = "cifar100"
        config.model.size = "b16"
        config.model.weights = "vit_b16_augreg"
        config.batch_size = 4096
        config.physical_batch = 512
        config.epochs = 30.0
    elif chosen in ("laptop", "votes"):
        config.model.weights = "vit_mini_digits"
        config.physical_batch = 320
        config.epochs = 5.0
        options = _VIT
        if chosen == "votes":
            config.data.name = "mnist"
            config.data.train_split, config.data.test_split = "train[:2000]", "test[1000:4000]"
            config.epochs = 3.0
            config.eval_every = 10_000
    elif chosen == "text":
        config.data.name = "20newsgroups"
        config.data.train_split, config.data.test_split = "train[:1000]", "test[500:1500]"
        config.model.name = "text_encoder"
        config.model.size = config.model.weights = "minilm_l6"
        config.epochs = 2.0
        config.eval_every = 10_000
        options = {"max_length": 16}
    else:
        config.data.name = "digits"
        config.dp.delta = 1e-4
        config.batch_size = 200
        config.physical_batch = 256
        config.epochs = 2.0
        options = _TINY
    with config.unlocked():
        config.model.options = dict(options)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    sets, rates, seeds = _GRID["laptop" if arg == "charged" else study.size(arg, "votes", "text")]
    values: dict[str, Sequence[Any]] = {"private_seed": range(seeds)}
    if arg == "charged":
        values = {}
    elif arg in (None, "laptop"):
        sets = (*sets, *_VOTES)
    # Seeds vary fastest: runs that differ in values only compile nothing.
    yield from proposals.grid({"finetune": sets, _RATE: rates, **values})
    named = [name for name in sets if name not in _VOTES]
    for epsilon in _SEARCHES.get(arg or "", {}).values():
        yield from proposals.grid(
            {"dp.epsilon": [epsilon], "finetune": named, _RATE: rates, **values}
        )


def measure(run: build.Run, initial: Any, final: Any) -> Row:
    """Counts trained and frozen parameters; after a vote, those that moved and those that did not.

    Args:
        run: whose phases say what trains, or what stood to vote.
        initial: parameters before training, as plain weights.
        final: those after it.
    """
    trainable, frozen = finetune.split(run.params, run.phases[-1].trainable)
    if run.vote is not None:
        before, after = models.flatten(initial), models.flatten(final)
        moved = {name for name in before if np.any(np.asarray(before[name] != after[name]))}
        trainable, frozen = finetune.split(run.params, lambda path: path in moved)
    return {"trainable": finetune.count(trainable), "frozen": finetune.count(frozen)}


def report(workdir: Path) -> list[Path]:
    """Rebuilds all tables and figures from the files of the runs."""
    results = study.read(workdir)
    every = [r for r in results if r.config]
    started = [r for r in every if "dp.epsilon" not in r.overrides]
    searched = [r for r in every if "dp.epsilon" in r.overrides and r.status == "finished"]
    grid = study.summarize(started, {"layers": "finetune", "learning rate": _RATE}, _METRICS)
    sets = _best_rates(grid, started)
    parts: list[str | Table | Figure] = [
        "Which layers are fine-tuned is a hyperparameter of its own under privacy. The layer sets "
        "are ours, not those of the paper. Accuracy on held-out data, mean ± half width of the "
        "95 % interval over private seeds. The choice of the set and of the learning rate, on the "
        "same held-out data, is declared and not charged: see the end.",
        "## Layer sets, each at its best learning rate",
        Table("sets", "By accuracy", sets),
        *_figure(sets),
        Table("published", "Published (Cattan et al.)", _PUBLISHED),
        "## Every learning rate",
        Table("rates", "All of the grid", grid),
        *_votes(started, sets),
        "## What the search costs",
        _declared(grid, started),
        Table("cost", "Repeat-and-select over a geometric number of runs: epsilon of the search at "
              "the noise that was used, and of one run if the search keeps the budget",
              _costs(started)),
        *_searched(started, searched),
    ]  # fmt: skip
    return study.write(workdir, "Which layers to fine-tune", parts, results)


def _best_rates(grid: Sequence[Row], results: Sequence[Result]) -> list[Row]:
    """The best learning rate of every layer set, best set first, with its size and its loss."""
    sizes = {r.config["finetune"]: r.measured for r in results if r.measured}
    best: dict[str, Row] = {}
    for row in grid:
        before = best.get(row["layers"])
        if not math.isnan(row[_ACC]) and (before is None or row[_ACC] > before[_ACC]):
            best[row["layers"]] = row
    found = sorted(best.values(), key=lambda row: -row[_ACC])
    by_seed = {row["layers"]: _seeds(results, row) for row in found}
    rows = []
    for row in found:
        first, mine = by_seed[found[0]["layers"]], by_seed[row["layers"]]
        loss, half = study.interval([first[s] - mine[s] for s in sorted(set(first) & set(mine))])
        size = sizes.get(row["layers"], {"trainable": 0, "frozen": 0})
        rows.append({
            "layers": row["layers"], "trained parameters": size["trainable"],
            "share [%]": 100 * size["trainable"] / max(1, sum(size.values())),
            **{name: value for name, value in row.items() if name != "layers"},
            "below the best [points]": loss, "below the best [points] ±": half,
        })  # fmt: skip
    return rows


def _votes(results: Sequence[Result], sets: Sequence[Row]) -> list[str | Table]:
    """What the votes picked, how clearly, what they cost, and what they lose to the best set.

    Raises:
        ValueError: a run with a vote spent more than its budget.
    """
    rows = []
    for result in results:
        file = result.path / "vote.json"
        if result.status != "finished" or result.privacy is None or not file.is_file():
            continue
        known, held = json.loads(file.read_text()), result.privacy["phases"][0]
        rows.append({
            "layers": result.config["finetune"], "seed": study.field(result, "private_seed"),
            "learning rate": study.field(result, _RATE), "picked": known["finetune"],
            **{f"votes for {name}": votes for name, votes in known["votes"].items()},
            "sigma of the vote": held["noise_multiplier"],
            "sigma of training": result.privacy["phases"][1]["noise_multiplier"],
        })  # fmt: skip
    if not rows:
        return []
    return ["## The vote for the blocks, which is charged",
            Table("charged", "A vote against the best set named in advance, each at its best rate, "
                  "paired over seeds; epsilon is the whole of a run, vote included",
                  _against_declared(results, sets)),
            Table("votes", "Noised sums of the votes, whose noise is sigma", rows)]  # fmt: skip


def _against_declared(results: Sequence[Result], sets: Sequence[Row]) -> list[Row]:
    declared = next((row for row in sets if row["layers"] not in _VOTES), None)
    rows = []
    for row in sets:
        if row["layers"] not in _VOTES or declared is None:
            continue
        voted, best = _seeds(results, row), _seeds(results, declared)
        gain, half = study.interval([voted[s] - best[s] for s in sorted(set(voted) & set(best))])
        spent = [
            r.privacy for r in results
            if r.privacy and r.status == "finished" and r.config["finetune"] == row["layers"]
        ]  # fmt: skip
        epsilon, budget = (max(p[name] for p in spent) for name in ("epsilon", "epsilon_budget"))
        if epsilon > budget:
            raise ValueError(f"{row['layers']} spent epsilon={epsilon}, above budget {budget}.")
        rows.append({
            "layers": row["layers"], "best set": declared["layers"], "epsilon": epsilon,
            "vote minus best set [points]": gain, "vote minus best set [points] ±": half,
        })  # fmt: skip
    return rows


def _searched(declared: Sequence[Result], results: Sequence[Result]) -> list[str | Table]:
    """Accuracy of charged searches of the budget against the declared choice, see the caption.

    Raises:
        ValueError: a search costs more than the budget.
    """
    declared_points = _points(declared)
    if not declared_points:
        return []
    rows = []
    for one in sorted({study.field(r, "dp.epsilon") for r in results}, reverse=True):
        runs = [r for r in results if study.field(r, "dp.epsilon") == one]
        mean = next(m for s in _SEARCHES.values() for m, value in s.items() if value == one)
        statement = runs[0].privacy or {}
        budget, run = declared[0].privacy or {}, repeat_and_select.mechanisms(statement)
        total = repeat_and_select.epsilon(run, statement["delta"], mean=mean)
        if total > budget["epsilon_budget"]:
            raise ValueError(f"a search of {mean:g} runs of epsilon={one} costs {total}.")
        charged = _points(runs)
        seeds = _shared_seeds(charged, declared_points)
        if len(seeds) < 2:  # another seed than the one that chooses is needed
            continue
        loss, half = study.interval(
            [_expected(charged, s, mean) - _expected(declared_points, s) for s in seeds]
        )
        rows.append({
            "runs in the mean": mean, "epsilon of one run": one, "epsilon in all": total,
            "accuracy [%]": np.mean([_expected(charged, s, mean) for s in seeds]),
            "declared choice [%]": np.mean([_expected(declared_points, s) for s in seeds]),
            "charged minus declared [points]": loss, "charged minus declared [points] ±": half,
        })  # fmt: skip
    if not rows:
        return []
    caption = (
        "Searches over sets and rates whose whole cost is the budget, against the best of all "
        "points at the budget, which is not charged. Each seed chooses in turn; the accuracy is "
        "that of the other seeds at the chosen point, in expectation over a search's draws"
    )
    return [Table("searched", caption, rows)]


def _points(results: Sequence[Result]) -> list[dict[int, float]]:
    """Accuracies in % by seed, of every named set and rate that has all seeds."""
    accuracies: dict[Any, dict[int, float]] = {}
    for r in results:
        if r.status == "finished" and r.config["finetune"] not in _VOTES:
            by_seed = accuracies.setdefault((r.config["finetune"], study.field(r, _RATE)), {})
            by_seed[study.field(r, "private_seed")] = 100 * r.evaluation["accuracy"]
    seeds = set().union(*accuracies.values())
    return [by_seed for by_seed in accuracies.values() if set(by_seed) == seeds]


def _shared_seeds(*points: Sequence[dict[int, float]]) -> list[int]:
    """The seeds that all points have; none where there are no points."""
    return sorted(set.intersection(*(set(own[0]) if own else set() for own in points)))


def _expected(points: Sequence[dict[int, float]], seed: int, mean: float = math.inf) -> float:
    """Expected accuracy, by the other seeds, of the point that a seed's accuracies choose.

    Args:
        points: accuracies by seed.
        seed: the one that chooses.
        mean: of the geometric number of random points it chooses from; inf means all points.
    """
    ranked = sorted(points, key=lambda by_seed: by_seed[seed])
    others = [float(np.mean([a for s, a in p.items() if s != seed])) for p in ranked]
    if mean == math.inf:
        return others[-1]
    below = np.arange(len(ranked) + 1) / len(ranked)
    no_better = below / mean / (1 - (1 - 1 / mean) * below)  # P[no run is above this rank]
    return float(np.diff(no_better) @ others)


def _seeds(results: Sequence[Result], row: Row) -> dict[int, float]:
    return {
        study.field(r, "private_seed"): 100 * r.evaluation["accuracy"]
        for r in results
        if r.status == "finished"
        and (r.config["finetune"], study.field(r, _RATE)) == (row["layers"], row["learning rate"])
    }


def _figure(sets: Sequence[Row]) -> list[Figure]:
    """Accuracy against the number of trained parameters."""
    if not sets:
        return []
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ordered = sorted(sets, key=lambda row: row["trained parameters"])
    for number, row in enumerate(ordered):
        half = np.nan_to_num(row[f"{_ACC} ±"])
        axes.errorbar(
            row["trained parameters"], row[_ACC], half, fmt="o", capsize=3,
            color=plt.get_cmap("tab20")(number % 20), label=row["layers"],
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="trained parameters", ylabel="held-out accuracy [%]",
        title="Layer sets at equal epsilon, each at its best learning rate",
    )  # fmt: skip
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", title="layers, fewest first", fontsize=8)
    caption = "Accuracy against trained parameters; bars are 95 % intervals over private seeds"
    return [Figure("parameters", caption, figure)]


def _declared(grid: Sequence[Row], results: Sequence[Result]) -> str:
    runs = sum(r.status in ("finished", "diverged") for r in results)
    return (
        f"{len(grid)} settings (layer set and learning rate) were tried in {runs} runs. That is "
        "**not charged**: the statement of each run covers this run alone. Charged, by drawing the "
        "number of runs and their settings at random and releasing the best run alone, it would "
        "have cost the following."
    )


def _costs(results: Sequence[Result]) -> list[Row]:
    """The price of a charged search over these settings, from the mechanism that all runs share."""
    statements = [
        r.privacy for r in results
        if r.status == "finished" and r.privacy and r.config["finetune"] not in _VOTES
    ]  # fmt: skip
    if not statements:
        return []
    run = repeat_and_select.mechanisms(statements[0])
    if any(repeat_and_select.mechanisms(other) != run for other in statements):
        raise ValueError("the runs differ in their mechanism: they cannot be charged as a search.")
    delta, budget = statements[0]["delta"], statements[0]["epsilon_budget"]
    rows = []
    for mean in _MEANS:
        one = repeat_and_select.epsilon_of_one(run, budget=budget, delta=delta, mean=mean)
        rows.append({
            "runs in the mean": mean, "epsilon of one run": statements[0]["epsilon"],
            "epsilon of the search": repeat_and_select.epsilon(run, delta, mean=mean),
            f"epsilon of one run in a search of {budget:g}": one,
        })  # fmt: skip
    return rows
