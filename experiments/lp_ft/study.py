"""Linear probing, then full fine-tuning, under one budget (Ke et al., 2402.18905), as a study.

    python -m experiments.run_study --config=experiments/lp_ft/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (MNIST digits, the shipped ViT
pretrained on UCI digits; ten seeds of a random head), "tuned" (fewer digits, the rate tuned for
every head, epsilon and share), "text" (20 Newsgroups with MiniLM, tuned alike) and "paper"
(CIFAR-10, a ViT pretrained on ImageNet; pass --data_dir and --weights). All runs of one epsilon
have the same epochs and the same budget; the share of linear probing divides the epochs, with one
sigma for both phases. A zero head reduces the same misalignment as probing does, so it is the
control for the random head. In some runs of "laptop", LoRA of rank 8 replaces full fine-tuning.

At the sizes "tuned" and "text" one seed tries every rate on its own part of the held-out data. The
report picks the best rate of every share from its runs, and compares the runs of the other seeds at
these rates, which `_TUNED` repeats as `chosen` so that no other runs are made. At the other sizes
all shares use one rate. The distortion of the features (`distortion`) is measured on test images.
The theory treats two-layer networks under Langevin dynamics with bounds of our own, see `langevin`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from ml_collections import ConfigDict

from dpjax import build, data, models
from dpjax.config import default
from experiments import study
from experiments.lp_ft import distortion
from experiments.lp_ft import theory as lp_ft_theory
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["get_config", "measure", "report", "sweep", "theory"]

_VIT = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
_TEXT = {"max_length": 16}
_RATE = "optimizer.learning_rate"

# Accuracies in %: by (epsilon, then, head), by share, by seed.
_Accuracies = dict[tuple[Any, ...], dict[float, dict[int, float]]]


class _Grid(NamedTuple):
    """Epsilons, shares of probing, seeds of the random head, which matters, and of the rest."""

    epsilons: tuple[float, ...]
    shares: tuple[float, ...]
    random_seeds: int
    seeds: int
    lora_shares: tuple[float, ...]


_GRID = {
    "smoke": _Grid((2.0,), (0.0, 0.5), 1, 1, (0.5,)),
    "laptop": _Grid((0.5, 2.0), (0.0, 0.25, 0.5, 0.75, 1.0), 10, 3, (0.0, 0.5, 1.0)),
    "paper": _Grid((0.5, 1.0, 2.0, 8.0), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 5, 5, (0.0, 0.5, 1.0)),
}
_TESTED = 1000  # test images on which features are compared


class _Tuned(NamedTuple):
    """A study whose rate is tuned for every head, epsilon and share, on one seed of its own.

    Attributes:
        epsilons: budgets.
        shares: of probing.
        rates: of a head, tried at every share but 1.
        probing_rates: of a head, tried at share 1.
        probing: maps head and epsilon to the best rate of share 1, with which the head is probed
            at the other shares; empty if probing has the rate of what follows.
        splits: held-out data for the choice of the rate, and for the results.
        seeds: of the results.
        chosen: maps head and epsilon to the rate of every share that the tuning seed preferred.
    """

    epsilons: tuple[float, ...]
    shares: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]
    probing_rates: dict[str, tuple[float, ...]]
    probing: dict[tuple[str, float], float]
    splits: tuple[str, str]
    seeds: int
    chosen: dict[tuple[str, float], tuple[float, ...]]


_TUNING_SEED = 100
_TUNED = {
    "tuned": _Tuned(
        (0.5, 2.0, 8.0), (0.0, 0.25, 0.5, 0.75, 1.0),
        {"random": (1.3e-3, 4e-3, 1.2e-2, 3.6e-2), "zero": (1.3e-3, 4e-3, 1.2e-2)},
        {"random": (4e-3, 1.2e-2, 3.6e-2, 0.11), "zero": (4e-3, 1.2e-2, 3.6e-2, 0.11)}, {},
        ("test[:1000]", "test[1000:4000]"), 5,
        {
            ("random", 0.5): (0.012, 0.012, 0.012, 0.012, 0.036),
            ("random", 2.0): (0.012, 0.012, 0.012, 0.012, 0.036),
            ("random", 8.0): (0.004, 0.012, 0.004, 0.004, 0.036),
            ("zero", 0.5): (0.004, 0.004, 0.0013, 0.004, 0.036),
            ("zero", 2.0): (0.004, 0.004, 0.004, 0.004, 0.036),
            ("zero", 8.0): (0.004, 0.004, 0.004, 0.004, 0.036),
        },
    ),
    "text": _Tuned(
        (2.0, 8.0, 32.0), (0.0, 0.25, 0.5, 0.75, 1.0),
        {"random": (3e-4, 1e-3, 3e-3, 9e-3), "zero": (3e-4, 1e-3, 3e-3, 9e-3)},
        {"random": (9e-3, 2.7e-2, 8.1e-2, 0.24), "zero": (9e-3, 2.7e-2, 8.1e-2, 0.24)},
        {
            ("random", 2.0): 8.1e-2, ("zero", 2.0): 8.1e-2,
            ("random", 8.0): 8.1e-2, ("zero", 8.0): 8.1e-2,
            ("random", 32.0): 2.7e-2, ("zero", 32.0): 2.7e-2,
        },
        ("test[:500]", "test[500:1000]"), 3,
        {
            ("random", 2.0): (0.003, 0.003, 0.003, 0.003, 0.081),
            ("random", 8.0): (0.003, 0.003, 0.001, 0.003, 0.081),
            ("random", 32.0): (0.003, 0.003, 0.001, 0.001, 0.027),
            ("zero", 2.0): (0.0003, 0.003, 0.003, 0.003, 0.081),
            ("zero", 8.0): (0.001, 0.003, 0.003, 0.003, 0.081),
            ("zero", 32.0): (0.0003, 0.003, 0.001, 0.0003, 0.027),
        },
    ),
}  # fmt: skip
_HEADS = ("random", "zero")

# CIFAR-10, accuracy in % (their code); ResNet-18 at B = 64 for 20 epochs.
_PUBLISHED = {
    "ResNet-18, epsilon 0.76": ((0.0, 48.0), (0.25, 50.0), (0.5, 52.0), (0.75, 50.0), (1.0, 40.0)),
    "WRN-40, epsilon 1": ((0.0, 69.0), (0.2, 72.2), (0.38, 72.0), (0.6, 71.2), (0.8, 68.7),
                          (1.0, 61.3)),
}  # fmt: skip

_METRICS: dict[str, Metric] = {
    "accuracy [%]": lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "feature shift": lambda r: r.measured.get("shift", math.nan),
    "CKA to initial": lambda r: r.measured.get("cka", math.nan),
    "alignment at start": lambda r: r.measured.get("alignment_start", math.nan),
    "alignment at end": lambda r: r.measured.get("alignment_end", math.nan),
}
_FIELDS = {
    "epsilon": "dp.epsilon",
    "then": "finetune",
    "head": "model.head_init",
    "LP share": "lp.fraction",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg, *_TUNED)
    config = default()
    config.finetune = "full"
    config.checkpoint_every = 10_000
    config.log_every = 10
    options = _TINY
    if chosen in _TUNED:
        config.eval_every = 10_000
    if chosen == "paper":
        config.data.name = "cifar10"
        config.model.size = "b16"
        config.batch_size = 1000
        config.epochs = 30.0
        config.dp.bound = 0.1
        config.optimizer.name = "sgd"
        config.optimizer.learning_rate = 0.5
        options = {}
    elif chosen in ("laptop", "tuned"):
        config.data.name = "mnist5k"
        config.model.weights = "vit_mini_digits"
        config.epochs = 5.0
        config.physical_batch = 320
        config.optimizer.learning_rate = 3e-3
        options = _VIT
        if chosen == "tuned":
            config.data.name = "mnist"
            config.data.train_split = "train[:2000]"
            config.epochs = 3.0
    elif chosen == "text":
        config.data.name = "20newsgroups"
        config.data.train_split = "train[:1000]"
        config.model.name = "text_encoder"
        config.model.size = config.model.weights = "minilm_l6"
        config.epochs = 2.0
        options = _TEXT
    else:
        config.data.name = "digits"
        config.dp.delta = 1e-4
        config.batch_size = 400
        config.epochs = 2.0
        config.physical_batch = 448
        config.dp.method = "vmap"  # compiles sooner
    with config.unlocked():
        config.model.options = dict(options)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    size = study.size(arg, *_TUNED)
    if size in _TUNED:
        yield from _tuned(_TUNED[size])
        return
    grid = _GRID[size]
    for seed in range(grid.random_seeds):
        for epsilon in grid.epsilons:
            common = {"seed": seed, "private_seed": seed, "dp.epsilon": epsilon}
            for head in ("random", "zero") if seed < grid.seeds else ("random",):
                for share in grid.shares if (arg, head) != ("smoke", "zero") else grid.shares[:1]:
                    yield {**common, "model.head_init": head, "lp.fraction": share}
        for share in grid.lora_shares if seed < grid.seeds else ():
            yield {
                "seed": seed, "private_seed": seed, "dp.epsilon": grid.epsilons[0],
                "finetune": "lora:8", "model.head_init": "random", "lp.fraction": share,
            }  # fmt: skip


def _tuned(grid: _Tuned) -> Iterator[Row]:
    """Yields all rates of the tuning seed, then the preferred ones of the seeds of the results."""
    for share in grid.shares:  # outermost: a run that differs in values only compiles nothing
        for head in _HEADS:
            for epsilon in grid.epsilons:
                for rate in (grid.probing_rates if share == 1 else grid.rates)[head]:
                    yield _point(grid, head, epsilon, share, rate, _TUNING_SEED)
    for seed in range(grid.seeds):
        for number, share in enumerate(grid.shares):
            for (head, epsilon), rates in grid.chosen.items():
                yield _point(grid, head, epsilon, share, rates[number], seed)


def _point(grid: _Tuned, head: str, epsilon: float, share: float, rate: float, seed: int) -> Row:
    point = {
        "seed": seed, "private_seed": seed, "dp.epsilon": epsilon, "model.head_init": head,
        "lp.fraction": share, _RATE: rate,
        "data.test_split": grid.splits[0 if seed == _TUNING_SEED else 1],
    }  # fmt: skip
    if grid.probing and 0 < share < 1:
        point["lp.learning_rate"] = grid.probing[head, epsilon]
    return point


def theory(arg: str | None = None) -> Row:
    """Simulates two-layer networks beside their bounds, see `experiments.lp_ft.theory`."""
    return {} if arg in _TUNED else lp_ft_theory.compute(study.size(arg))


def measure(run: build.Run, initial: models.Params, final: models.Params) -> Row:
    """Measures how far the features of test images moved, and whether the head fits them.

    Of texts nothing is measured.
    """
    model = build.model.model(run.config.model, run.test.num_classes)
    spec = model.input
    if not isinstance(spec, models.InputSpec):
        return {}
    chosen = np.arange(min(_TESTED, len(run.test)))
    batch = run.test.get(chosen)
    prepare = functools.partial(
        data.preprocess, image_size=spec.image_size, mean=spec.mean, std=spec.std,
        channels=spec.channels,
    )  # fmt: skip
    inputs = jax.jit(jax.vmap(prepare))(jnp.asarray(batch["input"]))
    features = jax.jit(model.features)
    before, after = (np.asarray(features(p, inputs), np.float64) for p in (initial, final))
    kernels = [np.asarray(p[model.head]["kernel"], np.float64) for p in (initial, final)]
    return {
        "shift": distortion.relative_shift(before, after),
        "cka": distortion.linear_cka(before, after),
        "alignment_start": distortion.alignment(before, batch["label"], kernels[0]),
        "alignment_end": distortion.alignment(after, batch["label"], kernels[1]),
    }


def report(workdir: Path) -> list[Path]:
    """Rebuilds all tables and figures from the files of the runs."""
    results = study.read(workdir)
    started, rates = _at_tuned_rates([r for r in results if r.config])
    rows = study.summarize(started, _FIELDS, _METRICS)
    accuracies = _by_share(started)
    parts: list[str | Table | Figure] = [
        "Held-out data, mean ± half width of the 95 % interval over seeds. Features are compared "
        "on test images.",
        *([Table("rates", "Accuracy of the tuning seed by rate; the best rate is used below for "
                 "all other seeds, a choice that is declared and not charged", rates)]
          if rates else []),
        "## Accuracy by the share of linear probing, at a fixed total budget",
        Table("shares", "All runs of one epsilon have the same epochs, sigma and budget", rows),
        *_share_figure(rows),
        Table("best_share", "Best share by mean accuracy, and its lead over shares 0 and 1, seed "
              "by seed", _best(accuracies)),
        Table("gains", "Gain of every share over share 0, and how much larger it is than at the "
              "largest epsilon, seed by seed", _gains(accuracies)),
        Table("zero_head", "Zero head without probing against a random head at its best share, "
              "seed by seed", _zero_head(accuracies)),
        Table("published", "Published: CIFAR-10 (Ke et al., their code)",
              [{"model": name, "LP share": share, "accuracy [%]": value}
               for name, values in _PUBLISHED.items() for share, value in values]),
        *_distortion_figure(rows),
    ]  # fmt: skip
    theory_file = workdir / "theory.json"
    if theory_file.is_file() and (simulated := json.loads(theory_file.read_text())):
        parts += [
            "## Theory: two-layer networks under Langevin dynamics",
            *lp_ft_theory.parts(simulated),
        ]
    return study.write(workdir, "Linear probing, then full fine-tuning", parts, results)


def _at_tuned_rates(started: list[Result]) -> tuple[list[Result], list[Row]]:
    """Returns the runs at the rates that the tuning seed prefers, and the choice; else all runs."""
    cells: dict[tuple[object, ...], dict[float, float]] = {}
    for r in started:
        if r.config["seed"] == _TUNING_SEED and r.status == "finished":
            by_rate = cells.setdefault(_cell(r), {})
            by_rate[study.field(r, _RATE)] = 100 * r.evaluation["accuracy"]
    if not cells:
        return started, []
    best = {cell: max(by_rate, key=lambda rate: by_rate[rate]) for cell, by_rate in cells.items()}
    rows = []
    for cell, by_rate in cells.items():
        ends = {min(by_rate): "the lowest", max(by_rate): "the highest"}
        tried = ", ".join(f"{by_rate[rate]:.1f} at {rate:g}" for rate in sorted(by_rate))
        rows.append(dict(zip(_FIELDS, cell)) | {
            "best rate": best[cell], "of those tried": ends.get(best[cell], "inside"),
            "accuracy [%]": tried,
        })  # fmt: skip
    return [
        r for r in started
        if r.config["seed"] != _TUNING_SEED and study.field(r, _RATE) == best.get(_cell(r))
    ], rows  # fmt: skip


def _cell(result: Result) -> tuple[Any, ...]:
    return tuple(study.field(result, name) for name in _FIELDS.values())


def _by_share(started: list[Result]) -> _Accuracies:
    """Accuracy in % of finished runs: by (epsilon, then, head), by share and by seed."""
    study.check_budgets(started, ("dp.epsilon",))
    settings: _Accuracies = {}
    for r in started:
        if r.status == "finished":
            *key, share = _cell(r)
            by_seed = settings.setdefault(tuple(key), {}).setdefault(share, {})
            by_seed[r.config["seed"]] = 100 * r.evaluation["accuracy"]
    return settings


def _best_share(by_share: dict[float, dict[int, float]]) -> float:
    return max(by_share, key=lambda share: float(np.mean(list(by_share[share].values()))))


def _minus(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    return {seed: first[seed] - second[seed] for seed in sorted(set(first) & set(second))}


def _paired(name: str, differences: dict[int, float]) -> Row:
    mean, half = study.interval(list(differences.values()))
    return {name: mean, f"{name} ±": half}


def _best(accuracies: _Accuracies) -> list[Row]:
    """The best share of every setting, and the paired gains over shares 0 and 1."""
    rows = []
    for key, by_share in accuracies.items():
        best = _best_share(by_share)
        row: Row = dict(zip(_FIELDS, key)) | {"best LP share": best}
        for share in (0.0, 1.0):
            gains = _minus(by_share[best], by_share.get(share, {}))
            row |= _paired(f"gain over share {share:g} [points]", gains)
        rows.append(row | {"seeds": len(by_share[best])})
    return rows


def _gains(accuracies: _Accuracies) -> list[Row]:
    """The paired gain of every share over share 0; and minus that at the largest epsilon."""
    largest = max((key[0] for key in accuracies), default=None)
    rows = []
    for (epsilon, *rest), by_share in accuracies.items():
        loose = accuracies.get((largest, *rest), {})
        for share in sorted(set(by_share) - {0.0}):
            gain = _minus(by_share[share], by_share.get(0.0, {}))
            there = _minus(loose.get(share, {}), loose.get(0.0, {}))
            row: Row = dict(zip(_FIELDS, (epsilon, *rest, share)))
            row |= _paired("gain over share 0 [points]", gain)
            if epsilon != largest:
                row |= _paired("minus that at the largest epsilon", _minus(gain, there))
            rows.append(row)
    return rows


def _zero_head(accuracies: _Accuracies) -> list[Row]:
    rows = []
    for (epsilon, then, head), by_share in accuracies.items():
        if head == "random" and 0.0 in (zero := accuracies.get((epsilon, then, "zero"), {})):
            best = _best_share(by_share)
            row: Row = {"epsilon": epsilon, "then": then, "best LP share, random head": best}
            rows.append(
                row | _paired("zero head gains [points]", _minus(zero[0.0], by_share[best]))
            )
    return rows


def _curves(rows: list[Row]) -> dict[tuple[object, ...], list[Row]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["epsilon"], row["then"], row["head"]), []).append(row)
    return found


def _share_figure(rows: list[Row]) -> list[Figure]:
    epsilons = sorted({row["epsilon"] for row in rows})
    if not epsilons:
        return []
    figure, panels = plt.subplots(
        1, len(epsilons), figsize=(4.5 * len(epsilons) + 1, 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, epsilon in zip(panels[0], epsilons):
        for (at, then, head), members in _curves(rows).items():
            if at == epsilon:
                half = np.nan_to_num([row["accuracy [%] ±"] for row in members])
                axes.errorbar(
                    [row["LP share"] for row in members], [row["accuracy [%]"] for row in members],
                    half, marker="o", capsize=3, label=f"{then}, {head} head",
                    linestyle="-" if then == "full" else "--",
                )  # fmt: skip
        axes.set(xlabel="share of epochs that probe", title=f"epsilon = {epsilon:g}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out accuracy [%]")
    panels[0][0].legend(fontsize=8)
    caption = "Accuracy by share of linear probing; bars: 95 % intervals over seeds"
    return [Figure("shares", caption, figure)]


def _distortion_figure(rows: list[Row]) -> list[Figure]:
    if not rows or math.isnan(rows[0]["feature shift"]):
        return []
    shown = ("feature shift", "CKA to initial", "alignment at end")
    figure, panels = plt.subplots(1, len(shown), figsize=(13, 4), layout="constrained")
    lowest = min(row["epsilon"] for row in rows)
    for axes, name in zip(panels, shown):
        for (epsilon, then, head), members in _curves(rows).items():
            if epsilon == lowest:
                half = np.nan_to_num([row[f"{name} ±"] for row in members])
                axes.errorbar(
                    [row["LP share"] for row in members], [row[name] for row in members], half,
                    marker="o", capsize=3, label=f"{then}, {head} head",
                    linestyle="-" if then == "full" else "--",
                )  # fmt: skip
        axes.set(xlabel="share of epochs that probe", ylabel=name)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    caption = f"Distortion of the features of test images at epsilon = {lowest:g}"
    return [Figure("distortion", caption, figure)]
