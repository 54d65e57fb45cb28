"""Linear probing, then full fine-tuning, under one budget (Ke et al., 2402.18905), as a study.

    python -m experiments.run_study --config=experiments/lp_ft/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (MNIST digits, the shipped ViT
pretrained on UCI digits; ten seeds of a random head) and "paper" (CIFAR-10, a ViT pretrained on
ImageNet; pass --data_dir and --weights). All runs of one epsilon have the same epochs and the same
budget; the share of linear probing divides the epochs, with one sigma for both phases. A zero head
reduces the same misalignment as probing does, so it is the control for the random head. In some
runs, LoRA of rank 8 replaces full fine-tuning.

All shares use one learning rate; unlike in the paper, it is not tuned per share. The distortion of
the features (`distortion`) is measured on test images. The theory treats two-layer networks under
Langevin dynamics with bounds of our own, see `langevin`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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

# CIFAR-10, accuracy in % (their code); ResNet-18 at B = 64 for 20 epochs.
_PUBLISHED = {
    "ResNet-18, epsilon 0.76": ((0.0, 48.0), (0.25, 50.0), (0.5, 52.0), (0.75, 50.0), (1.0, 40.0)),
    "WRN-40, epsilon 1": ((0.0, 69.0), (0.2, 72.2), (0.38, 72.0), (0.6, 71.2), (0.8, 68.7),
                          (1.0, 61.3)),
}  # fmt: skip

_METRICS: dict[str, Metric] = {
    "accuracy [%]": lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "feature shift": lambda r: r.measured["shift"],
    "CKA to initial": lambda r: r.measured["cka"],
    "alignment at start": lambda r: r.measured["alignment_start"],
    "alignment at end": lambda r: r.measured["alignment_end"],
}
_FIELDS = {
    "epsilon": "dp.epsilon",
    "then": "finetune",
    "head": "model.head_init",
    "LP share": "lp.fraction",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg)
    config = default()
    config.finetune = "full"
    config.checkpoint_every = 10_000
    config.log_every = 10
    if chosen == "paper":
        config.data.name = "cifar10"
        config.model.size = "b16"
        config.batch_size = 1000
        config.epochs = 30.0
        config.dp.bound = 0.1
        config.optimizer.name = "sgd"
        config.optimizer.learning_rate = 0.5
    elif chosen == "laptop":
        config.data.name = "mnist5k"
        config.model.weights = "vit_mini_digits"
        config.epochs = 5.0
        config.physical_batch = 320
        config.optimizer.learning_rate = 3e-3
    else:
        config.data.name = "digits"
        config.dp.delta = 1e-4
        config.batch_size = 400
        config.epochs = 2.0
        config.physical_batch = 448
        config.dp.method = "vmap"  # compiles sooner
    with config.unlocked():
        if chosen != "paper":
            config.model.options = dict(_VIT if chosen == "laptop" else _TINY)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    grid = _GRID[study.size(arg)]
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


def theory(arg: str | None = None) -> Row:
    """Simulates two-layer networks beside their bounds, see `experiments.lp_ft.theory`."""
    return lp_ft_theory.compute(study.size(arg))


def measure(run: build.Run, initial: models.Params, final: models.Params) -> Row:
    """Measures how far the features of test images moved, and whether the head fits them."""
    model = build.model.model(run.config.model, run.test.num_classes)
    chosen = np.arange(min(_TESTED, len(run.test)))
    batch = run.test.get(chosen)
    spec = model.input
    if not isinstance(spec, models.InputSpec):
        raise ValueError(f"model.name={run.config.model.name!r} must be a model of images.")
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
    started = [r for r in results if r.config]
    rows = study.summarize(started, _FIELDS, _METRICS)
    parts: list[str | Table | Figure] = [
        "Held-out data, mean ± half width of the 95 % interval over seeds. Features are compared "
        "on test images.",
        "## Accuracy by the share of linear probing, at a fixed total budget",
        Table("shares", "All runs of one epsilon have the same epochs, sigma and budget", rows),
        *_share_figure(rows),
        Table("best_share", "Best share by mean accuracy, and its lead over share 0, seed by seed",
              _best(started)),
        Table("published", "Published: CIFAR-10 (Ke et al., their code)",
              [{"model": name, "LP share": share, "accuracy [%]": value}
               for name, values in _PUBLISHED.items() for share, value in values]),
        *_distortion_figure(rows),
    ]  # fmt: skip
    theory_file = workdir / "theory.json"
    if theory_file.is_file():
        parts += ["## Theory: two-layer networks under Langevin dynamics",
                  *lp_ft_theory.parts(json.loads(theory_file.read_text()))]  # fmt: skip
    return study.write(workdir, "Linear probing, then full fine-tuning", parts, results)


def _best(started: list[Result]) -> list[Row]:
    """The best share of every setting, and the paired gain over share 0."""
    study.check_budgets(started, ("dp.epsilon",))
    settings: dict[tuple[object, ...], dict[float, dict[int, float]]] = {}
    for r in started:
        if r.status == "finished":
            key = tuple(study.field(r, name) for name in list(_FIELDS.values())[:3])
            by_share = settings.setdefault(key, {})
            by_seed = by_share.setdefault(study.field(r, "lp.fraction"), {})
            by_seed[r.config["seed"]] = 100 * r.evaluation["accuracy"]
    rows = []
    for key, by_share in settings.items():
        best = max(by_share, key=lambda share: float(np.mean(list(by_share[share].values()))))
        common = sorted(set(by_share[best]) & set(by_share.get(0.0, {})))
        gains = [by_share[best][seed] - by_share[0.0][seed] for seed in common]
        row: Row = dict(zip(_FIELDS, key)) | {"best LP share": best}
        row["gain over share 0 [points]"], row["gain over share 0 [points] ±"] = study.interval(
            gains
        )
        rows.append(row | {"paired seeds": len(gains)})
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
    if not rows:
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
