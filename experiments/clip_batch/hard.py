"""Learning rate, batch size and clip bound on hard tasks (Rehn et al., arXiv 2510.20616).

    DPJAX_DATA_DIR=DATA python -m experiments.clip_batch.hard --workdir=DIR
    python -m experiments.clip_batch.hard_report DIR

DATA holds `20newsgroups`, `reuters52` and `cifar10`, see `dpjax prepare`. A head is trained by
DP-Adam on cached features of a frozen backbone: texts of many classes, one of them very
unbalanced, images of which few are there, and mixes of classes that are easy and hard to tell
apart. At 8 epochs, T = round(E N / B), the grid is that of
`BOUNDS`, the batch sizes of the task and its full batch, and `EPSILONS`. The rate of every cell is
searched by factors of 8, then of 2, with two seeds and on one half of the held-out data, until the
best rate has a worse one on both sides. What is reported is the accuracy on the other half, with
five new seeds. The search is not charged to the budget, and the private seeds are fixed: these runs
are for study, not for release.

DIR/runs.jsonl gets a line per run. A block (task, line, B) is written at once, and finished blocks
are skipped. DIR/nonprivate.jsonl holds what reads raw gradients, see `look`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dpjax import build, dp, files, heads
from dpjax import config as configs
from dpjax.heads import FeatureSet
from dpjax.runtime import compilation
from experiments.allocation.heads import projected
from experiments.clip_batch import diagnostics, rules, scaled
from experiments.clip_batch.clip_diagnosis import BOUNDS as LOOKED_BOUNDS
from experiments.clip_batch.clip_diagnosis import LEVELS

__all__ = [
    "EASY", "HARD", "LINES", "TASKS", "Line", "Task", "block", "look", "main", "opened", "read",
    "reference",
]  # fmt: skip

DELTA = 1e-5
EPOCHS = 8.0
EPSILONS = (0.25, 0.5, 1.0, 2.0, 8.0)
BOUNDS = (1e-3, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # a gradient's norm is at most about 11
TUNING_SEEDS = (1, 2)
SEEDS = (11, 12, 13, 14, 15)
_RATES = 2.0 ** np.arange(-20, 8)  # more than any search has used
_START = 2.0**-7
# Far apart: a head from zero says the same at any small rate, and a search of neighbors alone ends
# in that plateau.
_FIRST = (-6, -3, 0, 3, 6)
_LOOKED = 768  # examples whose gradients are looked at

Row = dict[str, Any]
Cell = tuple[float, float]  # epsilon, C


class Task(NamedTuple):
    """Data and frozen backbone.

    Attributes:
        overrides: of the default config.
        batches: B, besides the full batch.
        width: the features are projected to so many random directions, which is faster; None
            leaves them as they are.
        classes: the only classes that stay, by name; none for all.
    """

    overrides: Row
    batches: tuple[int, ...]
    width: int | None = None
    classes: tuple[str, ...] = ()


class Line(NamedTuple):
    """How gradients are clipped, and what the noised mean goes into.

    Attributes:
        rule: of `rules.RULES`.
        optimizer: its name.
        bounds: C; one that plays no part is 1.
        epsilons: budgets.
        stability: of scale-then-privatize, see `scaled`; None does not scale.
    """

    rule: str
    optimizer: str
    bounds: tuple[float, ...]
    epsilons: tuple[float, ...] = EPSILONS
    stability: float | None = None


_MINILM = {
    "model.name": "text_encoder", "model.size": "minilm_l6", "model.weights": "minilm_l6",
    "model.options": {"max_length": 48},
}  # fmt: skip
_MPNET = {
    "model.name": "text_encoder", "model.size": "mpnet_base", "model.weights": "mpnet_base",
    "model.options": {"max_length": 24}, "data.tokenizer": "mpnet_base_tokenizer",
    "data.train_split": "train[:1500]", "data.test_split": "test[:1000]",
}  # fmt: skip
_LITE2 = {
    "data.name": "cifar10", "data.test_split": "test[:4000]", "model.name": "efficientnet_lite",
    "model.size": "lite2", "model.weights": "efficientnet_lite2",
    "model.options": {"image_size": 96},
}  # fmt: skip
# Groups of five fields, and five of one field that even people mix up.
EASY = ("misc.forsale", "rec.sport.hockey", "sci.space", "soc.religion.christian",
        "talk.politics.mideast")  # fmt: skip
HARD = ("comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware", "comp.windows.x")  # fmt: skip
_NEWS = {**_MINILM, "data.name": "20newsgroups"}
TASKS = {
    "digits": Task({"data.name": "digits"}, (400,)),  # for the tests: a random backbone
    "20newsgroups": Task(_NEWS, (256, 1024, 4096)),
    "reuters52": Task({**_MINILM, "data.name": "reuters52"}, (128, 512, 2048)),
    "20newsgroups mpnet": Task({**_MPNET, "data.name": "20newsgroups"}, (128, 512)),
    "reuters52 mpnet": Task({**_MPNET, "data.name": "reuters52"}, (128, 512)),
    "cifar10 1 %": Task({**_LITE2, "data.subset": 0.01}, (32, 128), 320),
    "cifar10 10 %": Task({**_LITE2, "data.subset": 0.1}, (128, 512, 2048), 320),
    "cifar10 100 %": Task(_LITE2, (1024, 8192), 320),
    "20newsgroups easy": Task(_NEWS, (128, 512), classes=EASY),
    "20newsgroups hard": Task(_NEWS, (128, 512), classes=HARD),
    "20newsgroups mix": Task(_NEWS, (128, 512), classes=EASY + HARD),
}
_FEW = (0.1, 1.0, 3.0, 10.0)
_SMALL = (1e-3, 1e-2, 0.1, 1.0)  # larger ones, once scaled, feed noise back into their own scale
_FEW_BUDGETS = (0.25, 1.0, 8.0)
LINES = {
    "flat": Line("flat", "adam", BOUNDS),
    "automatic": Line("automatic", "adam", (1.0,)),
    "tanh": Line("tanh", "adam", _FEW, _FEW_BUDGETS),
    "corrected": Line("flat", "adam_corrected", _FEW, _FEW_BUDGETS),
    **{
        f"scaled {e:g}": Line("not normalized", "adam", _SMALL, _FEW_BUDGETS, e)
        for e in (1e-2, 1e-3, 1e-4)
    },
}


def opened(task: Task) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
    """Returns normalized features: private, held out for tuning, held out for the result."""
    config = configs.default()
    with config.unlocked():
        for name, value in task.overrides.items():
            *above, last = name.split(".")
            node = config
            for key in above:
                node = node[key]
            node[last] = value
        config.dp = None
    config.batch_size = 1
    run = build.build(config)
    names = run.train.class_names
    train, held = (
        _only(
            projected(heads.compute_features(run.model, run.params, dataset), task.width),
            [names.index(name) for name in task.classes],
        )
        for dataset in (run.train, run.test)
    )
    order = np.random.default_rng(0).permutation(len(held))
    half = len(held) // 2
    return train, held.select(order[:half]), held.select(order[half:])


def _only(features: FeatureSet, classes: Sequence[int]) -> FeatureSet:
    """Keeps some classes, which are numbered in this order; none keeps all."""
    if not classes:
        return features
    kept = features.select(np.flatnonzero(np.isin(features.labels, classes)))
    labels = np.argmax(kept.labels[:, None] == np.asarray(classes), axis=1)
    return dataclasses.replace(kept, labels=labels, num_classes=len(classes))


class _Trainer:
    """Trains points of one block in batches of one shape, and scores them on both halves."""

    def __init__(
        self, sets: tuple[FeatureSet, FeatureSet, FeatureSet], line: Line, batch_size: int,
        epsilons: Sequence[float], at_once: int,
    ) -> None:  # fmt: skip
        self._train, *self._held = sets
        self._line, self._size, self._at_once = line, batch_size, at_once
        examples = len(self._train)
        self.mechanisms = {
            epsilon: dp.calibrated(
                epsilon=epsilon, delta=DELTA, num_examples=examples, batch_size=batch_size,
                epochs=EPOCHS, sampler="poisson" if batch_size < examples else "full_batch",
            )
            for epsilon in epsilons
        }  # fmt: skip
        self.steps = self.mechanisms[epsilons[0]].steps

    def heads(self, jobs: Sequence[tuple[Cell, float]], seeds: Sequence[int]) -> heads.Heads:
        """One head for every seed and (cell, rate), in this order."""
        make = rules.RULES[self._line.rule]
        points = [
            heads.Point(rate, seed, make(bound), self.mechanisms[epsilon])
            for seed in seeds
            for (epsilon, bound), rate in jobs
        ]
        ways: Row = {"optimizer": _optimizer(self._line.optimizer, self.steps)}
        if self._line.stability is not None:
            stability = self._line.stability
            ways = {"optimizer": scaled.optimizer(stability),
                    "clipped_sum": scaled.clipped_sum(stability)}  # fmt: skip
        return heads.train_heads(
            self._train, points, steps=self.steps, batch_size=self._size, at_once=self._at_once,
            **ways,
        )  # fmt: skip

    def rows(
        self, jobs: Sequence[tuple[Cell, float]], seeds: Sequence[int], role: str
    ) -> list[Row]:
        """Trains, and returns a row per run."""
        short = -len(jobs) % self._at_once
        padded = [*jobs, *[jobs[-1]] * short]  # one shape: compiled once
        fits = self.heads(padded, seeds)
        scores = [heads.evaluate(fits.params, held) for held in self._held]
        found = []
        for number, (one, other) in enumerate(zip(*scores, strict=True)):
            seed, place = seeds[number // len(padded)], number % len(padded)
            if place >= len(jobs):
                continue
            (epsilon, bound), rate = jobs[place]
            found.append({
                "B": self._size, "T": self.steps, "epsilon": epsilon, "C": bound, "rate": rate,
                "seed": seed, "role": role, "tuning_accuracy": one["accuracy"],
                "noise_multiplier": self.mechanisms[epsilon].noise_multiplier,
                **_scores(other, classes=role == "result"),
            })  # fmt: skip
        return found


def _scores(found: Mapping[str, float], *, classes: bool) -> Row:
    by_class = {k.split("/")[1]: v for k, v in found.items() if k.startswith("class_accuracy/")}
    kept: Row = {name: found[name] for name in ("accuracy", "nll", "ece")}
    kept["macro"] = float(np.mean(list(by_class.values())))
    return {**kept, "by_class": {k: round(v, 6) for k, v in by_class.items()}} if classes else kept


@functools.cache  # one factory, one compilation
def _optimizer(name: str, steps: int, *, private: bool = True) -> heads.Optimizer:
    config = configs.default().optimizer
    config.name = name
    return build.optimizer.optimizer(config, steps, private=private)


def block(
    sets: tuple[FeatureSet, FeatureSet, FeatureSet],
    line: Line,
    batch_size: int,
    *,
    epsilons: Sequence[float] | None = None,
    start: dict[Cell, float],
    at_once: int = 8,
) -> list[Row]:
    """Searches the rate of every cell (epsilon, C), and trains with the best.

    Args:
        sets: as `opened` returns them.
        line: rule, optimizer and bounds.
        batch_size: B.
        epsilons: budgets, if not those of the line.
        start: rate at which the search of a cell begins, where it is known; the best ones are put
            into it.
        at_once: heads trained together.

    Returns:
        A row per run; `accuracy` is that on the half that the search did not see.
    """
    epsilons = line.epsilons if epsilons is None else epsilons
    trainer = _Trainer(sets, line, batch_size, epsilons, at_once)
    cells = [(epsilon, bound) for epsilon in epsilons for bound in line.bounds]
    tried: dict[Cell, dict[float, float]] = {cell: {} for cell in cells}
    rows: list[Row] = []
    wanted = [(cell, _near(start.get(cell, _START), offset)) for cell in cells for offset in _FIRST]
    while wanted:
        found = trainer.rows(wanted, TUNING_SEEDS, "tuning")
        rows += found
        for cell, rate in wanted:
            mine = [r["tuning_accuracy"] for r in found
                    if (r["epsilon"], r["C"], r["rate"]) == (*cell, rate)]  # fmt: skip
            tried[cell][rate] = float(np.mean(mine))
        following = {cell: _following(tried[cell]) for cell in cells}
        wanted = [(cell, rate) for cell, rate in following.items() if rate is not None]
    best = [(cell, max(tried[cell], key=tried[cell].__getitem__)) for cell in cells]
    start.update(best)
    return rows + trainer.rows(best, SEEDS, "result")


def _near(rate: float, offset: int) -> float:
    place = int(np.argmin(np.abs(np.log(_RATES / rate)))) + offset
    return float(_RATES[min(max(place, 0), len(_RATES) - 1)])


def _following(tried: Mapping[float, float]) -> float | None:
    """The neighbor of the best rate that has not been tried yet, if there is one."""
    best = max(tried, key=tried.__getitem__)
    return next((r for r in (_near(best, 1), _near(best, -1)) if r not in tried), None)


def reference(sets: tuple[FeatureSet, FeatureSet, FeatureSet]) -> Row:
    """Returns what a head reaches without privacy: its rate is searched in the same way."""
    train, *held = sets
    size, steps = min(512, len(train)), max(60, round(30 * len(train) / min(512, len(train))))
    tried: dict[float, float] = {}
    found: dict[float, Mapping[str, float]] = {}
    rate: float | None = _START
    while rate is not None:
        fits = heads.train_heads(
            train, [heads.Point(rate, 1)], steps=steps, batch_size=size,
            optimizer=_optimizer("adam", steps, private=False), at_once=1,
        )  # fmt: skip
        one, other = (heads.evaluate(fits.params, half)[0] for half in held)
        tried[rate], found[rate] = one["accuracy"], other
        rate = _following(tried)
    best = max(tried, key=tried.__getitem__)
    return {
        "role": "nonprivate", "N": len(train), "rate": best, **_scores(found[best], classes=True),
        "class_sizes": np.bincount(train.labels, minlength=train.num_classes).tolist(),
        "held_sizes": np.bincount(held[1].labels, minlength=train.num_classes).tolist(),
    }  # fmt: skip


def look(sets: tuple[FeatureSet, FeatureSet, FeatureSet], rows: Sequence[Row]) -> list[Row]:
    """What gradients look like at the start and at the end, at the best B and C. NOT private.

    Args:
        sets: as `opened` returns them.
        rows: of the line "flat" of one task.

    Returns:
        A row per budget of the extreme two: quantiles of the norms, weights of the classes w_y(C)
        and parts of one step's squared error, see `diagnostics`; lists over (start, end).
    """
    train, _, held = sets
    sample = np.sort(np.random.default_rng(0).permutation(len(train))[:_LOOKED])
    batch = {"x": jnp.asarray(train.values[sample]), "y": jnp.asarray(train.labels[sample])}
    known = sorted({row["epsilon"] for row in rows})
    found = []
    for epsilon in (known[0], known[-1]):
        results = [r for r in rows if (r["epsilon"], r["role"]) == (epsilon, "result")]
        means: dict[tuple[int, float, float], list[float]] = {}
        for row in results:
            key = (row["B"], row["C"], row["rate"])
            means.setdefault(key, []).append(row["tuning_accuracy"])
        size, bound, rate = max(means, key=lambda key: float(np.mean(means[key])))
        trainer = _Trainer(sets, LINES["flat"], size, (epsilon,), 1)
        fits = trainer.heads([((epsilon, bound), rate)], SEEDS[:1])
        last = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), fits.params)
        mechanism = trainer.mechanisms[epsilon]
        row = {"epsilon": epsilon, "B": size, "C": bound, "T": trainer.steps, "levels": LEVELS,
               "bounds": LOOKED_BOUNDS, "norms": [], "clipped": [], "best_bound": [],
               "noise": [], "clipping": [], "sampling": [], "weights": [],
               "by_class": _scores(heads.evaluate(fits.params, held)[0], classes=True)["by_class"],
               }  # fmt: skip
        for params in (heads.initial_head(train.width, train.num_classes), last):
            (head,) = params.values()
            products = diagnostics.gram(_loss, head, batch)
            setting: Row = {
                "noise_multiplier": mechanism.noise_multiplier, "num_examples": len(train),
                "sampling_prob": mechanism.sampling_prob,
                "dimension": sum(leaf.size for leaf in head.values()),
            }  # fmt: skip
            norms = diagnostics.norms(products)
            row["norms"].append(np.quantile(norms, LEVELS).tolist())
            row["clipped"].append(float(np.mean(norms > bound)))
            row["best_bound"].append(diagnostics.best_bound(products, **setting))
            errors = [diagnostics.error(products, c, **setting) for c in LOOKED_BOUNDS]
            for name in ("noise", "clipping", "sampling"):
                row[name].append([getattr(e, name) for e in errors])
            weights = {
                f"{c:g}": diagnostics.class_weights(norms, np.asarray(batch["y"]), c,
                                                    train.num_classes).tolist()
                for c in BOUNDS
            }  # fmt: skip
            row["weights"].append(weights)
        found.append(row)
    return found


def _loss(head: Any, example: dict[str, jax.Array]) -> jax.Array:
    logits = example["x"] @ head["kernel"] + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def read(path: Path) -> list[Row]:
    """Reads a file of JSON lines; an absent one has none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows in one write, so that no block is there in part."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="hard", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--tasks", default=",".join(name for name in TASKS if name != "digits"))
    usual = [name for name, line in LINES.items() if line.stability is None]
    parser.add_argument("--lines", default=",".join(usual))
    flags = parser.parse_args(argv)
    compilation.keep_on_disk()
    try:
        run(flags.workdir, flags.tasks.split(","), flags.lines.split(","))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    workdir: Path,
    tasks: Sequence[str],
    lines: Sequence[str],
    *,
    epsilons: Sequence[float] | None = None,
    at_once: int = 8,
) -> None:
    """Runs the blocks that are missing.

    Raises:
        ValueError: an unknown task or line.
    """
    for name in tasks:
        files.choose("tasks", name, TASKS)
    for name in lines:
        files.choose("lines", name, LINES)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        sets = opened(TASKS[name])
        rows = [row for row in read(workdir / "runs.jsonl") if row["task"] == name]
        if not any(row["role"] == "nonprivate" for row in rows):
            _append(workdir / "runs.jsonl", [{"task": name, **reference(sets)}])
        sizes = [len(sets[0]), *reversed(TASKS[name].batches)]  # the quick ones first
        for line in lines:
            _run_line(workdir, name, line, sets, sizes, rows, epsilons, at_once)
        flat = [r for r in read(workdir / "runs.jsonl")
                if (r["task"], r.get("line")) == (name, "flat")]  # fmt: skip
        seen = {row["task"] for row in read(workdir / "nonprivate.jsonl")}
        if flat and name not in seen:
            looked = look(sets, flat)
            _append(workdir / "nonprivate.jsonl", [{"task": name, **row} for row in looked])


def _run_line(
    workdir: Path, name: str, line: str, sets: tuple[FeatureSet, FeatureSet, FeatureSet],
    sizes: Sequence[int], rows: Sequence[Row],
    epsilons: Sequence[float] | None, at_once: int,
) -> None:  # fmt: skip
    """Runs the missing blocks of a task and a line, every batch size in turn."""
    start: dict[Cell, float] = {}
    done = {row["B"] for row in rows if row.get("line") == line}
    for row in rows:
        if (row.get("line"), row["role"]) == (line, "result"):
            start[row["epsilon"], row["C"]] = row["rate"]
    for size in tqdm(sizes, desc=f"{name}, {line}", unit="block", file=sys.stderr):
        if size in done:
            continue
        begin = time.process_time()
        made = block(sets, LINES[line], size, epsilons=epsilons, start=start, at_once=at_once)
        spent = round(time.process_time() - begin, 1)
        about = {"task": name, "line": line, "N": len(sets[0])}
        made[0]["block_cpu_seconds"] = spent
        _append(workdir / "runs.jsonl", [{**about, **row} for row in made])


if __name__ == "__main__":
    sys.exit(main())
