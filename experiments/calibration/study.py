"""Clipping bound, convergence and calibration (Bu et al., arXiv 2106.07830), as a study.

    python -m experiments.run_study --config=experiments/calibration/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (MNIST digits, the shipped pretrained
ViT, all parameters, three seeds, eight for the late switch), "text" (20 Newsgroups, a head on
MiniLM features of 48 tokens, three epsilons, five seeds, ten for the late switch), "layers" (norms
and head of MiniLM on 1,000 posts of 16 tokens, three seeds: flat and layerwise clipping) and
"paper" (CIFAR-10, ViT-B/16; pass --data_dir and --weights). DP-SGD is not normalized, as in the
paper: for a small bound R, only eta R matters. Epsilon, epochs and batch size of "paper" are our
own choice where the paper's values were not available.

The sweep has four parts: a grid over R and the learning rate; layerwise and global (keep or drop)
clipping beside flat clipping, along eta R = const or (text) on the grid; a switch of R for the last
5 % of the epochs, with normalized clipping so that the size of a step does not jump; and a private
temperature. For the theory, see `ntk`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dpjax.config import default
from experiments import study
from experiments.calibration import tables
from experiments.calibration import theory as calibration_theory
from experiments.calibration.tables import AXES, METRICS
from experiments.study import Figure, Result, Row, Table

__all__ = ["get_config", "report", "sweep", "theory"]

_VIT = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}

# Bounds R, learning rates eta, eta R of the comparison of clipping styles, seeds.
_GRID: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, int]] = {
    "smoke": ((0.1, 1.0, 10.0), (10.0, 1.0, 0.1), 1.0, 2),
    "laptop": ((0.1, 1.0, 10.0, 100.0), (10.0, 1.0, 0.1, 0.01), 1.0, 3),
    "paper": ((0.1, 1.0, 10.0, 100.0, 1000.0), (1.0, 0.1, 0.01, 0.001), 0.1, 3),
}
# Of the text: R and eta R of the grid, and of other epsilons and clipping styles; seeds; eta R and
# seeds of the late switch and temperature.
_TEXT = (
    (0.01, 0.1, 1.0, 3.0, 10.0, 100.0), (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    (0.1, 3.0, 10.0), (3.0, 10.0, 30.0, 100.0, 300.0), 5, (10.0, 30.0), 10,
)  # fmt: skip
# Of the layers: R, eta R, seeds.
_LAYERS = ((0.1, 3.0), (1.0, 3.0), 3)
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

_RATE, _BOUND = "optimizer.learning_rate", "dp.bound"


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg, "text", "layers")
    config = default()
    config.optimizer.name = "sgd"
    config.dp.normalized = False
    config.dp.epsilon = 2.0
    config.checkpoint_every = config.eval_every = 10_000
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
    elif chosen == "text":
        config.data.name = "20newsgroups"
        config.model.name = "text_encoder"
        config.model.size = config.model.weights = "minilm_l6"
        config.finetune = "head"
        config.batch_size = 1024
        config.epochs = 8.0
        config.physical_batch = 1280
    elif chosen == "layers":
        config.data.name = "20newsgroups"
        config.data.train_split, config.data.test_split = "train[:1000]", "test[500:1500]"
        config.model.name = "text_encoder"
        config.model.size = config.model.weights = "minilm_l6"
        config.finetune = "film"
        config.batch_size = 250
        config.epochs = 2.0
    else:
        config.data.name = "digits"
        config.finetune = "head"
        config.dp.delta = 1e-4
        config.batch_size = 200
        config.epochs = 3.0
        config.physical_batch = 256
    with config.unlocked():
        if chosen != "paper":
            options = {
                "laptop": _VIT, "text": {"max_length": 48}, "layers": {"max_length": 16},
                "smoke": _TINY,
            }  # fmt: skip
            config.model.options = dict(options[chosen])
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    chosen = study.size(arg, "text", "layers")
    if chosen in ("text", "layers"):
        yield from _text() if chosen == "text" else _layers()
        return
    bounds, rates, product, seeds = _GRID[chosen]
    for seed in range(seeds):
        common = {"private_seed": seed}
        for bound in bounds:
            for rate in rates:
                yield {**common, _BOUND: bound, _RATE: rate}
            for clipping in ("per_layer", "global"):
                yield {**common, "dp.clipping": clipping, _BOUND: bound, _RATE: product / bound}
        constant, switched, scaled = _late(seed, product)
        yield constant
        if chosen != "smoke" or seed == 0:
            yield from (switched, scaled)
    # The effect of the switch is small relative to the spread of three seeds.
    for seed in range(seeds, seeds if chosen == "smoke" else 8):
        yield from _late(seed, product)[:2]


def _text() -> Iterator[Row]:
    bounds, products, few_bounds, few_products, seeds, late, late_seeds = _TEXT
    for seed, bound, product in itertools.product(range(seeds), bounds, products):
        at = {"private_seed": seed, _BOUND: bound, _RATE: float(f"{product / bound:.6g}")}
        yield at
        if bound in few_bounds and product in few_products:
            yield from ({**at, "dp.epsilon": epsilon} for epsilon in (0.5, 8.0))
            yield from ({**at, "dp.clipping": style} for style in ("per_layer", "global"))
    for seed, product in itertools.product(range(late_seeds), late):
        yield from _late(seed, product)
    # The tightest budget wants lower rates.
    for seed, bound in itertools.product(range(seeds), few_bounds):
        at = {"private_seed": seed, _BOUND: bound, _RATE: float(f"{1 / bound:.6g}")}
        yield {**at, "dp.epsilon": 0.5}


def _layers() -> Iterator[Row]:
    bounds, products, seeds = _LAYERS
    styles = ("flat", "per_layer")
    for seed, style, bound, product in itertools.product(range(seeds), styles, bounds, products):
        rate = float(f"{product / bound:.6g}")
        yield {"private_seed": seed, "dp.clipping": style, _BOUND: bound, _RATE: rate}


def _late(seed: int, product: float) -> tuple[Row, Row, Row]:
    """R constant, R switched, and R constant with a private temperature."""
    late = {"private_seed": seed, "dp.normalized": True, _RATE: product, _BOUND: _SMALL}
    schedule = ((0.0, _SMALL), (_SWITCH, _LARGE))
    return (
        late,
        {**late, "dp.bound_schedule": schedule},
        {**late, "dp.temperature.share": _TEMPERATURE},
    )


def theory(arg: str | None = None) -> Row:
    """Computes the table of kernels, and predicted beside measured training curves; no texts."""
    return {} if arg in ("text", "layers") else calibration_theory.compute(study.size(arg))


def _share(result: Result) -> float:
    return float(result.config["dp"]["temperature"]["share"])


def report(workdir: Path) -> list[Path]:
    """Rebuilds all tables and figures from the files of the runs."""
    results = study.read(workdir)
    started = [r for r in results if r.config]
    plain = [r for r in started if not r.config["dp"]["normalized"]]
    flat = [r for r in plain if r.config["dp"]["clipping"] == "flat"]
    grid = study.summarize(flat, AXES, METRICS)
    for row in grid:
        row["eta R"] = float(f"{row['R'] * row['eta']:.4g}")
    accurate = tables.best(grid)
    theory_file = workdir / "theory.json"
    computed = json.loads(theory_file.read_text()) if theory_file.is_file() else {}
    parts: list[str | Table | Figure] = [
        "All numbers are of held-out data: mean ± half width of the 95 % interval over seeds.",
        "## Bound R and learning rate eta",
        Table("grid", "Flat clipping: equal eta R is equal training while R clips all", grid),
        *tables.heatmaps(grid),
        Table("published", "Published: CIFAR-10, ViT-base (Bu et al., read off a figure)",
              _published()),
        *tables.reliability(flat, accurate),
        Table("equal", "Equal eta R: the next larger R minus this one, paired over seeds",
              _equal(flat, grid)),
        Table("best", "Each R at its most accurate rate (chosen on held-out data, not charged)",
              list(accurate.values())),
        Table("large", "R minus the smallest R, each at its most accurate rate, paired over seeds",
              _large(flat, accurate)),
        Table("large_nll", "The same, each at its rate of the lowest NLL",
              _large(flat, tables.best(grid, "NLL [nats]"))),
        "## Flat, layerwise and global clipping",
        *_styles(plain),
        "## Late switch of R, and temperature scaling",
        *_remedies(started),
    ]  # fmt: skip
    if computed:
        parts += ["## Theory: kernels of clipped gradient flow"]
        parts += calibration_theory.parts(computed)
    return study.write(workdir, "Clipping bound and calibration", parts, results)


def _equal(flat: Sequence[Result], grid: Sequence[Row]) -> list[Row]:
    order = sorted(grid, key=lambda row: (row["epsilon"], row["eta R"], row["R"]))
    return [
        {
            **{name: one[name] for name in ("epsilon", "eta R", "R")}, "next R": other["R"],
            **tables.differences(_at(flat, one), _at(flat, other)),
        }
        for one, other in itertools.pairwise(order)
        if (one["epsilon"], one["eta R"]) == (other["epsilon"], other["eta R"])
    ]  # fmt: skip


def _large(flat: Sequence[Result], rows: Mapping[tuple[float, float], Row]) -> list[Row]:
    smallest = {epsilon: row for (epsilon, _), row in reversed(rows.items())}
    return [
        {
            "epsilon": epsilon, "R": bound, "eta R": row["eta R"],
            **tables.differences(_at(flat, smallest[epsilon]), _at(flat, row)),
        }
        for (epsilon, bound), row in rows.items()
        if row is not smallest[epsilon]
    ]  # fmt: skip


def _at(results: Sequence[Result], row: Row) -> list[Result]:
    at = {"epsilon": row["epsilon"], "bound": row["R"], "learning_rate": row["eta"]}
    return tables.where(results, **at)


def _styles(runs: Sequence[Result]) -> list[Table]:
    """Clipping styles where there is more than flat clipping, and against it, paired."""
    rows = study.summarize(runs, {"clipping": "dp.clipping", **AXES}, METRICS)
    others = [r for r in rows if r["clipping"] != "flat"]
    places = [{name: r[name] for name in AXES} for r in others]
    styles = {name: [r for r in runs if r.config["dp"]["clipping"] == name]
              for name in ("flat", "per_layer", "global")}  # fmt: skip
    paired = [
        {"clipping": r["clipping"], **{name: r[name] for name in AXES},
         **tables.differences(_at(styles["flat"], r), _at(styles[r["clipping"]], r))}
        for r in others
    ]  # fmt: skip
    most = [
        row for style in styles
        for row in tables.best([r for r in rows if r["clipping"] == style]).values()
    ]  # fmt: skip
    return [
        Table("clipping_best", "Each style and R at its most accurate rate", most),
        Table("clipping", "Clipping styles; global keeps |g| <= R and drops the rest",
              [r for r in rows if {name: r[name] for name in AXES} in places]),
        Table("clipping_differences", "Minus flat clipping, paired over seeds", paired),
    ]  # fmt: skip


def _remedies(runs: Sequence[Result]) -> list[Table]:
    normalized = [r for r in runs if r.config["dp"]["normalized"]]
    late = [r for r in normalized if not _share(r)]
    scaled = [r for r in normalized if _share(r)]
    by = {"bound schedule": "dp.bound_schedule", "eta R": _RATE}  # normalized: R = 1
    paired = []
    for rate in sorted({study.field(r, _RATE) for r in normalized}):
        mine = tables.where(late, learning_rate=rate)
        constant = [r for r in mine if not r.config["dp"]["bound_schedule"]]
        switched = [r for r in mine if r.config["dp"]["bound_schedule"]]
        fitted = tables.where(scaled, learning_rate=rate)
        for name, one, other in (
            ("switch", constant, switched),
            ("temperature", constant, fitted),
            ("temperature minus switch", switched, fitted),
        ):
            paired.append({"remedy": name, "eta R": rate, **tables.differences(one, other)})
    return [
        Table("late_switch",
              f"R = {_SMALL:g} throughout, or {_LARGE:g} from {_SWITCH:.0%} of the epochs on "
              "(normalized clipping, the same budget)",
              study.summarize(late, by, METRICS)),
        Table("temperature",
              f"Temperature fitted privately on {_TEMPERATURE:.0%} of the training data, which "
              "the run does not train on",
              study.summarize(scaled, {"eta R": _RATE}, METRICS | {
                  "temperature": lambda r: r.evaluation["temperature"],
                  "ECE before [%]": lambda r: 100 * r.evaluation["before_temperature/ece"],
                  "MCE before [%]": lambda r: 100 * r.evaluation["before_temperature/mce"],
                  "NLL before [nats]": lambda r: r.evaluation["before_temperature/nll"],
              })),
        Table("remedies", "Minus R constant, paired over seeds", paired),
    ]  # fmt: skip


def _published() -> list[Row]:
    rows = []
    for (rate, bound), values in _PUBLISHED.items():
        names = ("accuracy [%]", "ECE [%]", "MCE [%]")
        numbers = dict(zip(names, values or (float("nan"),) * 3))
        rows.append({"R": bound, "eta": rate, **numbers, "eta R": float(f"{rate * bound:.6g}")})
    return sorted(rows, key=lambda row: (row["R"], row["eta"]))
