"""The price of protecting people instead of records, as a study.

    python -m experiments.run_study --config=experiments/user_level/study.py:laptop --workdir=DIR
    dpjax report DIR

The same MNIST digits are dealt out to units ("writers") of 1, 4 and 16 records, and the shipped ViT
is fine-tuned on them at one budget. With one record per unit this is the record-level run. A step
reads 1 record, 4 or all of a unit. Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop"
(4,000 MNIST images, three seeds) and "paper" (the same at ten seeds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from ml_collections import ConfigDict

from dpjax import data
from dpjax.config import default
from dpjax.search import proposals
from experiments import study
from experiments.study import Figure, Metric, Row, Table

__all__ = ["get_config", "report", "sweep"]

_HERE = "experiments.user_level.study"
_UNITS = (1, 4, 16)
_RATE, _LIMIT = "optimizer.learning_rate", "data.unit_records"
# Sampling probabilities of a unit, learning rates, seeds.
_GRID: dict[str, tuple[tuple[float, ...], tuple[float, ...], int]] = {
    "smoke": ((0.25,), (3e-3,), 1),
    "laptop": ((0.256,), (3e-3,), 3),
    "paper": ((0.032, 0.064, 0.128, 0.256), (1e-3, 3e-3, 1e-2), 10),
}
_ACC = "accuracy [%]"
_METRICS: dict[str, Metric] = {
    _ACC: lambda r: 100 * r.evaluation["accuracy"],
    "NLL [nats]": lambda r: r.evaluation["nll"],
    "ECE [%]": lambda r: 100 * r.evaluation["ece"],
}


def _dealt(name: str, split: str, per_unit: int) -> data.Dataset:
    """A set of digits whose records are dealt out at random to units of equal size."""
    records = data.load(name, split=split)
    places = np.random.default_rng(0).permutation(len(records))
    return dataclasses.replace(records, units=places // per_unit)


def mnist_1(split: str) -> data.Dataset:
    """MNIST digits, one record per unit."""
    return _dealt("mnist5k", split, 1)


def mnist_4(split: str) -> data.Dataset:
    """MNIST digits in units of 4 records."""
    return _dealt("mnist5k", split, 4)


def mnist_16(split: str) -> data.Dataset:
    """MNIST digits in units of 16 records."""
    return _dealt("mnist5k", split, 16)


def digits_1(split: str) -> data.Dataset:
    """UCI digits, one record per unit."""
    return _dealt("digits", split, 1)


def digits_4(split: str) -> data.Dataset:
    """UCI digits in units of 4 records."""
    return _dealt("digits", split, 4)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    config = default()
    config.checkpoint_every = 10_000
    config.log_every = 10
    config.data.unit = "writer"
    options = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
    if study.size(arg) == "smoke":
        config.dp.delta = 1e-4
        config.epochs = 1.0
        options = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
    else:
        config.model.weights = "vit_mini_digits"
        config.model.keep_head = True
        config.epochs = 10.0
    with config.unlocked():
        config.model.options = dict(options)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    chosen = study.size(arg)
    probs, rates, seeds = _GRID[chosen]
    kind, total, units = ("digits", 1617, (1, 4)) if chosen == "smoke" else ("mnist", 4000, _UNITS)
    for per_unit in units:
        limits = [limit for limit in _UNITS if limit <= per_unit]
        for limit, prob in ((limit, prob) for limit in limits for prob in probs):
            size = round(prob * -(-total // per_unit))
            yield from proposals.grid({
                "private_seed": range(seeds), "data.name": [f"{_HERE}:{kind}_{per_unit}"],
                _LIMIT: [limit], "batch_size": [size], "physical_batch": [max(8, 256 // limit)],
                _RATE: rates,
            })  # fmt: skip


def report(workdir: Path) -> list[Path]:
    """Rebuilds the table and the figure from the files of the runs."""
    results = study.read(workdir)
    by = {"data": "data.name", "records read": _LIMIT, "units in a batch": "batch_size",
          "learning rate": _RATE}  # fmt: skip
    grid = study.summarize([r for r in results if r.config], by, _METRICS)
    rows = [{"records per unit": int(row.pop("data").rpartition("_")[2]), **row} for row in grid]
    best: dict[tuple[int, int], Row] = {}
    for row in rows:
        key = row["records per unit"], row["records read"]
        if key not in best or not row[_ACC] <= best[key][_ACC]:
            best[key] = row
    parts = [
        "The guarantee is about all records of one unit, at one budget. Accuracy on held-out data, "
        "mean ± half width of the 95 % interval over private seeds, which change batches and "
        "noise. Batch size and learning rate are the best of the grid, on the same data: declared, "
        "not charged.",
        Table(
            "best",
            "By size of a unit and records read in a step",
            [best[key] for key in sorted(best)],
        ),
        *_figure(best),
        Table("grid", "All of the grid", rows),
    ]
    return study.write(workdir, "User-level privacy against record-level privacy", parts, results)


def _figure(best: dict[tuple[int, int], Row]) -> list[Figure]:
    if not best:
        return []
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for limit in sorted({limit for _, limit in best}):
        rows = [best[key] for key in sorted(best) if key[1] == limit]
        axes.errorbar(
            [row["records per unit"] for row in rows], [row[_ACC] for row in rows],
            np.nan_to_num([row[f"{_ACC} ±"] for row in rows]), fmt="o-", capsize=3,
            label=f"{limit} read in a step",
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="records per unit", ylabel="held-out accuracy [%]",
        title="The same records at one budget per unit",
    )  # fmt: skip
    axes.set_xticks(_UNITS, [str(n) for n in _UNITS], minor=False)
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="records of a unit")
    return [Figure("accuracy", "Bars are 95 % intervals over private seeds", figure)]
