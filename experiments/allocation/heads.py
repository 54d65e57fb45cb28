"""Private heads on cached features over batch sizes, budgets and two samplers.

    DPJAX_DATA_DIR=DATA python -m experiments.allocation.heads --workdir=DIR
    python -m experiments.allocation.report DIR

Two questions share these runs. Is random allocation better than Poisson sampling at equal epsilon,
epochs and tuning? And which batch size should the planner choose? So every task is trained by both
samplers at 8 epochs, epsilon 0.5 to 8, delta 1e-5 and all batch sizes B that double from about
N / 64, to the full batch.

The learning rate of every cell (task, sampler, B, epsilon) is searched by the same procedure, by
factors of 2, on one half of the held-out data with two seeds, and goes on until the best rate has
a worse one on both sides. What is reported is the accuracy on the other half with five new seeds.

DIR/runs.jsonl gets one line per run; a block (task, sampler, B) is written at once, and finished
blocks are skipped. The private seeds are fixed and the search is not charged: these runs are for
study, not for release.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dpjax import build, dp, files, heads
from dpjax import config as configs
from dpjax.build import planner
from dpjax.heads import FeatureSet

__all__ = ["TASKS", "Task", "batch_sizes", "block", "main", "opened", "projected", "read",
           "train_heads"]  # fmt: skip

DELTA = 1e-5
EPOCHS = 8.0
EPSILONS = (0.5, 1.0, 2.0, 8.0)
TUNING_SEEDS = (1, 2)
SEEDS = (11, 12, 13, 14, 15)
BOUND = 2.0  # C, where features have the norm `SCALE`: the best of `experiments/head_grid`
SCALE = 8.0
_RATES = 2.0 ** np.arange(-18, 10)  # more than any search has used

Row = dict[str, Any]


class Task(NamedTuple):
    """Data and frozen backbone.

    Attributes:
        overrides: of the default config.
        width: the features are projected to so many random directions, which is faster; None
            keeps them.
        examples: N; the first of the training split.
    """

    overrides: Row
    width: int | None
    examples: int


_LITE0 = {
    "data.name": "cifar10", "model.name": "efficientnet_lite", "model.size": "lite0",
    "model.weights": "efficientnet_lite0", "model.options": {"image_size": 128},
    "data.train_split": "train[:4096]", "data.test_split": "train[4096:8192]",
}  # fmt: skip
_DIGITS = {
    "data.name": "mnist", "model.weights": "vit_mini_digits",
    "model.options": {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7},
}  # fmt: skip
_MINILM = {
    "model.name": "text_encoder", "model.size": "minilm_l6", "model.weights": "minilm_l6",
    "model.options": {"max_length": 32},
}  # fmt: skip
_NEWS = {
    **_MINILM, "data.name": "20newsgroups",
    "data.train_split": "train[:6000]", "data.test_split": "test[:3000]",
}  # fmt: skip
_REUTERS = {**_MINILM, "data.name": "reuters52"}

# All have one N, and their harder versions another, so that they share the calibrated noise.
TASKS = {
    "digits": Task({"data.name": "digits"}, None, 500),  # for the tests: a random backbone
    "cifar10": Task(_LITE0, 192, 3000),
    "mnist": Task(_DIGITS, None, 3000),
    "20newsgroups": Task(_NEWS, 128, 3000),
    "reuters52": Task(_REUTERS, 128, 3000),
    "cifar10_small": Task(_LITE0, 192, 500),
    "mnist_small": Task(_DIGITS, None, 500),
    "20newsgroups_small": Task(_NEWS, 128, 500),
    "reuters52_small": Task(_REUTERS, 128, 500),
}


def opened(task: Task) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
    """Returns normalized features: private, held out for tuning, held out for the result."""
    config = configs.default()
    with config.unlocked():
        for name, value in task.overrides.items():
            config.update_from_flattened_dict({name: None})
            config.update_from_flattened_dict({name: value})
        config.dp = None
    config.batch_size = 1
    run = build.build(config)
    train, held = (
        projected(heads.compute_features(run.model, run.params, dataset), task.width)
        for dataset in (run.train, run.test)
    )
    train = train.select(np.arange(task.examples))
    order = np.random.default_rng(0).permutation(len(held))
    half = len(held) // 2
    return train, held.select(order[:half]), held.select(order[half:])


def projected(features: FeatureSet, width: int | None) -> FeatureSet:
    """Normalizes features, and projects them to `width` random directions, which are public."""
    features = heads.normalize(features, center=True, scale=SCALE)
    if width is None:
        return features
    directions = np.random.default_rng(0).normal(size=(features.width, width))
    values = features.values @ directions.astype(np.float32)
    return heads.normalize(dataclasses.replace(features, values=values), scale=SCALE)


def batch_sizes(num_examples: int) -> list[int]:
    """Candidates of the planner with at most about 512 steps in 8 epochs."""
    return [b for b in planner.candidates(num_examples) if b >= num_examples / 64]


def block(
    name: str,
    sets: tuple[FeatureSet, FeatureSet, FeatureSet],
    sampler: str,
    batch_size: int,
    *,
    epsilons: Sequence[float] = EPSILONS,
    start: dict[float, float],
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
    seeds: Sequence[int] = SEEDS,
) -> list[Row]:
    """Searches the learning rate of every epsilon, and trains with the best.

    Args:
        name: of the task.
        sets: as `opened` returns them.
        sampler: "poisson" or "random_allocation".
        batch_size: B.
        epsilons: budgets.
        start: rate at which the search begins, of every epsilon; replaced by the best one.
        tuning_seeds: private seeds of the search.
        seeds: private seeds of the result.

    Returns:
        One row per run; `accuracy` is that on the half that the search did not see.
    """
    train, tuning, result = sets
    mechanisms = {
        epsilon: dp.calibrated(
            epsilon=epsilon,
            delta=DELTA,
            num_examples=len(train),
            batch_size=batch_size,
            epochs=EPOCHS,
            sampler=sampler if batch_size < len(train) else "full_batch",
        )
        for epsilon in epsilons
    }
    rows: list[Row] = []

    def trained(pairs: Sequence[tuple[float, float]], seeds: Sequence[int], role: str) -> None:
        """Trains (epsilon, rate) pairs with all seeds."""
        for seed in seeds:
            weights = train_heads(train, [(mechanisms[e], rate) for e, rate in pairs], seed)
            for_tuning, for_result = (_accuracies(weights, held) for held in (tuning, result))
            for (epsilon, rate), one, other in zip(pairs, for_tuning, for_result, strict=True):
                rows.append(
                    {
                        "task": name,
                        "sampler": sampler,
                        "N": len(train),
                        "B": batch_size,
                        "T": mechanisms[epsilon].steps,
                        "epsilon": epsilon,
                        "rate": rate,
                        "seed": seed,
                        "role": role,
                        "noise_multiplier": mechanisms[epsilon].noise_multiplier,
                        "tuning_accuracy": float(one),
                        "accuracy": float(other),
                    }
                )

    wanted = [(e, _rate(start[e], offset)) for e in epsilons for offset in (-2, -1, 0, 1, 2)]
    tried: dict[float, dict[float, float]] = {epsilon: {} for epsilon in epsilons}
    while wanted:
        trained(wanted, tuning_seeds, "tuning")
        for epsilon, rate in wanted:
            same = [r for r in rows if (r["epsilon"], r["rate"]) == (epsilon, rate)]
            tried[epsilon][rate] = float(np.mean([r["tuning_accuracy"] for r in same]))
        further = {e: _next(tried[e]) for e in epsilons}
        wanted = [(e, rate) for e, rate in further.items() if rate is not None]
    for epsilon in epsilons:
        start[epsilon] = max(tried[epsilon], key=lambda rate: tried[epsilon][rate])
    trained([(e, start[e]) for e in epsilons], seeds, "result")
    return rows


def train_heads(
    train: FeatureSet, points: Sequence[tuple[dp.Mechanism, float]], seed: int
) -> np.ndarray:
    """DP-Adam on linear heads that share batches, in NumPy.

    `dpjax.heads.train_heads` trains the same heads (a test compares them), but is compiled for
    every number of steps, which here takes longer than all runs of a batch size together.

    Args:
        train: the private data.
        points: mechanism and learning rate of each head; the mechanisms differ in noise only.
        seed: private seed, of batches and noise.

    Returns:
        `[width + 1, points, classes]`, the bias last.
    """
    inputs = np.concatenate([train.values, np.ones((len(train), 1), np.float32)], axis=1)
    norms = np.linalg.norm(inputs, axis=1)
    shape = (inputs.shape[1], len(points), train.num_classes)
    sigmas = np.array([[[m.noise_multiplier]] for m, _ in points], np.float32).reshape(1, -1, 1)
    rates = np.array([rate for _, rate in points], np.float32).reshape(1, -1, 1)
    mechanism, noise = points[0][0], np.random.default_rng([seed, 1])
    weights, mean, square = (np.zeros(shape, np.float32) for _ in range(3))
    drawing = dp.seeds.sampler_seed(seed)
    for step in range(mechanism.steps):
        batch = mechanism.indices(drawing, step)
        x = inputs[batch]
        residual = _softmax((x @ weights.reshape(len(weights), -1)).reshape(-1, *shape[1:]))
        residual[np.arange(len(batch)), :, train.labels[batch]] -= 1
        lengths = norms[batch, None] * np.linalg.norm(residual, axis=2)
        residual *= np.minimum(1 / BOUND, 1 / np.maximum(lengths, 1e-12))[..., None]
        gradient = (x.T @ residual.reshape(len(batch), shape[1] * shape[2])).reshape(shape)
        gradient += sigmas * noise.standard_normal(shape, np.float32)
        gradient /= mechanism.expected_batch_size
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient**2 - square)
        scale = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        weights -= rates * (mean / (1 - 0.9 ** (step + 1))) / scale
    return weights


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _accuracies(weights: np.ndarray, held: FeatureSet) -> np.ndarray:
    """The held-out accuracy of every head."""
    logits = np.einsum("nd,dpk->npk", held.values, weights[:-1], optimize=True) + weights[-1]
    return np.asarray((logits.argmax(axis=2) == held.labels[:, None]).mean(axis=0))


def _rate(rate: float, offset: int) -> float:
    return float(_RATES[int(np.argmin(np.abs(np.log(_RATES / rate)))) + offset])


def _next(tried: dict[float, float]) -> float | None:
    """The rate to try next: the neighbor of a best rate that stands at an edge."""
    best = max(tried, key=lambda rate: tried[rate])
    if best == max(tried):
        return _rate(best, 1)
    return _rate(best, -1) if best == min(tried) else None


def read(workdir: Path) -> list[Row]:
    """Reads the runs of a work directory."""
    return list(_lines(workdir / "runs.jsonl"))


def _lines(path: Path) -> Iterator[Row]:
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="allocation", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--tasks", default=",".join(name for name in TASKS if name != "digits"))
    parser.add_argument("--samplers", default=",".join(planner.SAMPLERS))
    flags = parser.parse_args(argv)
    try:
        _run(flags.workdir, flags.tasks.split(","), flags.samplers.split(","))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(workdir: Path, tasks: Iterable[str], samplers: Sequence[str]) -> None:
    for name in tasks:
        files.choose("tasks", name, TASKS)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        sets = opened(TASKS[name])
        rows = read(workdir)
        done = {(r["task"], r["sampler"], r["B"]) for r in rows}
        start = {sampler: dict.fromkeys(EPSILONS, 2.0**-8) for sampler in samplers}
        jobs = [(b, sampler) for b in batch_sizes(len(sets[0])) for sampler in samplers]
        for batch_size, sampler in tqdm(jobs, desc=name, unit="block", file=sys.stderr):
            if (name, sampler, batch_size) in done:
                ours = (name, sampler, batch_size, "result")
                for row in rows:
                    if (row["task"], row["sampler"], row["B"], row["role"]) == ours:
                        start[sampler][row["epsilon"]] = row["rate"]
                continue
            begin = time.perf_counter()
            found = block(name, sets, sampler, batch_size, start=start[sampler])
            tqdm.write(f"{name} {sampler} B={batch_size}: {len(found)} runs, "
                       f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)  # fmt: skip
            with (workdir / "runs.jsonl").open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    sys.exit(main())
