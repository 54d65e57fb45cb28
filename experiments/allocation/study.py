"""Random allocation against Poisson sampling when a whole network is fine-tuned, as a study.

    python -m experiments.run_study --config=experiments/allocation/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (all parameters of the shipped ViT on
MNIST digits, 3 epochs at B = 256, five seeds) and "paper" (norms and head of ViT-Ti on CIFAR-100,
8 epochs). Both samplers have the same budget, epochs, batch size and learning rate, and no rate is
searched beyond the grid, which is the same for both. Heads on cached features: see `heads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from dpjax.build import planner
from dpjax.config import default
from dpjax.search import proposals
from experiments import study
from experiments.study import Metric, Result, Row, Table

__all__ = ["get_config", "report", "sweep"]

_RATE = "optimizer.learning_rate"
_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
_VIT = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}

# Budgets, learning rates, seeds.
_GRID: dict[str, tuple[tuple[float, ...], tuple[float, ...], int]] = {
    "smoke": ((2.0,), (3e-2,), 1),
    "laptop": ((0.5, 1.0, 2.0, 8.0), (3e-3,), 5),
    "paper": ((0.5, 1.0, 2.0, 8.0), (5e-4, 1e-3, 2e-3, 4e-3), 5),
}

_ACC = "accuracy [%]"
_METRICS: dict[str, Metric] = {
    _ACC: lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg)
    config = default()
    config.checkpoint_every = 10_000
    config.log_every = 10
    if chosen == "paper":
        config.data.name = "cifar100"
        config.model.size = "ti16"
        config.model.weights = "vit_ti16_augreg"
        config.finetune = "film"
        config.batch_size = 4096
        config.physical_batch = 512
        config.epochs = 8.0
        options = {"image_size": 224}
    elif chosen == "laptop":
        config.model.weights = "vit_mini_digits"
        config.physical_batch = 320
        config.epochs = 3.0
        options = _VIT
    else:
        config.data.name = "digits"
        config.dp.delta = 1e-4
        config.batch_size = 200
        config.physical_batch = 256
        options = _TINY
        config.epochs = 1.0
    with config.unlocked():
        config.model.options = dict(options)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    epsilons, rates, seeds = _GRID[study.size(arg)]
    yield from proposals.grid({
        "private_seed": range(seeds), "dp.epsilon": epsilons, _RATE: rates,
        "dp.sampler": planner.SAMPLERS,
    })  # fmt: skip


def report(workdir: Path) -> list[Path]:
    """Rebuilds the tables from the files of the runs."""
    results = study.read(workdir)
    started = [r for r in results if r.config]
    by = {"epsilon": "dp.epsilon", "sampler": "dp.sampler", "learning rate": _RATE}
    grid = study.summarize(started, by, _METRICS)
    parts: list[str | Table | study.Figure] = [
        "Two samplers at equal epsilon, delta, epochs, batch size and learning rates. Accuracy on "
        "held-out data, mean ± half width of the 95 % interval over private seeds.",
        Table("gains", "What allocation gains over Poisson sampling, paired over seeds, each at "
              "its best learning rate", gains(grid, started)),
        Table("rates", "All of the grid", grid),
    ]  # fmt: skip
    return study.write(workdir, "Random allocation when fine-tuning", parts, results)


def gains(grid: list[Row], results: list[Result]) -> list[Row]:
    """One row per epsilon that both samplers have finished."""
    rows = []
    for epsilon in sorted({row["epsilon"] for row in grid}):
        runs, sigma, row = {}, {}, {"epsilon": epsilon}
        for sampler in planner.SAMPLERS:
            mine = [r for r in grid if (r["epsilon"], r["sampler"]) == (epsilon, sampler)]
            mine = [r for r in mine if r["runs"] > r["diverged"]]
            if not mine:
                break
            best = max(mine, key=lambda r: r[_ACC])
            same = [
                r for r in results
                if r.status == "finished" and study.field(r, "dp.epsilon") == epsilon
                and study.field(r, "dp.sampler") == sampler
                and study.field(r, _RATE) == best["learning rate"]
            ]  # fmt: skip
            runs[sampler] = {study.field(r, "private_seed"): _METRICS[_ACC](r) for r in same}
            (sigma[sampler],) = {
                phase["noise_multiplier"] for r in same for phase in (r.privacy or {})["phases"]
            }
            row |= {f"{sampler} sigma": sigma[sampler], f"{sampler} [%]": best[_ACC]}
        if len(runs) < 2:
            continue
        one, other = (runs[sampler] for sampler in planner.SAMPLERS)
        common = sorted(set(one) & set(other))
        gain, half = study.interval([other[seed] - one[seed] for seed in common])
        rows.append({**row, "gain [points]": gain, "gain [points] ±": half, "seeds": len(common)})
    return rows
