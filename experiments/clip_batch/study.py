"""Learning rate, batch size and clip bound together (Rehn et al., arXiv 2510.20616), as a study.

    python -m experiments.run_study --config=experiments/clip_batch/study.py:laptop --workdir=DIR
    dpjax report DIR

Sizes: "smoke" (UCI digits, seconds, for the tests), "laptop" (a head on EfficientNet-Lite0 features
of CIFAR-10 and of its 10 %; norms or all parameters of the shipped ViT on MNIST digits), "text"
(norms, all parameters or LoRA of MiniLM on 1,000 posts of 20 Newsgroups) and "paper"
(ViT-Ti and ViT-B, norms and head; CIFAR-100 and its 10 %, SUN397, Cassava; 20 Newsgroups with
DistilBERT; other parameter sets).
Data is read from $DPJAX_DATA_DIR, and weights have their published names.

DP-Adam at a constant rate with normalized clipping, at fixed epochs: there are round(E N / B)
steps, so that no batch size gets more passes over the data. (E ceil(N/B) steps at q = B/N would run
B = 16,384 for 10.5 epochs instead of 8.) For automatic against tuned flat clipping, difficulty
means fewer training examples and a tighter epsilon. As in the paper, the best setting is chosen on
the data on which it is reported, and this is not charged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpjax import build, dp
from dpjax.build import planner
from dpjax.config import default
from dpjax.dp import accounting
from dpjax.search import proposals
from experiments import study
from experiments.clip_batch import clip_diagnosis
from experiments.clip_batch import report as clip_batch_report
from experiments.study import Row

__all__ = ["Task", "get_config", "measure", "report", "sweep", "theory"]

_RATE, _BATCH, _BOUND, _EPSILON = "optimizer.learning_rate", "batch_size", "dp.bound", "dp.epsilon"


class Task(NamedTuple):
    """Data, backbone and parameter set, and the grid searched on them.

    Attributes:
        overrides: of the base config.
        epsilons: budgets.
        batches: B.
        bounds: C, for flat clipping.
        rates: learning rates.
        automatic: whether AUTO-S runs beside flat clipping.
        seeds: number of private seeds.
    """

    overrides: Row
    epsilons: tuple[float, ...]
    batches: tuple[int, ...]
    bounds: tuple[float, ...]
    rates: tuple[float, ...]
    automatic: bool
    seeds: int


_TINY = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
_MINI = {
    "data.name": "mnist5k",
    "model.name": "vit",
    "model.size": "mini",
    "model.weights": "vit_mini_digits",
    "model.options": {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7},
    "epochs": 3.0,
    "physical_batch": 320,
}
_BOUNDS = (0.1, 3.0, 10.0, 40.0)
_RATES = (0.002, 0.0063, 0.02)
_PAPER_BOUNDS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 50.0)
_PAPER_RATES = tuple(float(f"{1e-5 * 1000 ** (k / 7):.3g}") for k in range(8))


def _paper(num_examples: int, **overrides: Any) -> Task:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    batches = planner.candidates(num_examples)
    return Task(named, (0.5, 1.0, 8.0), batches, _PAPER_BOUNDS, _PAPER_RATES, True, 3)


def _texts(finetune: str, rate: float) -> Task:
    # The better of two rates with one seed at epsilon 8: 3e-3 and 1e-2 for norms, whose rate LoRA
    # has too; 1e-3 and 3e-3 for all parameters.
    return Task({"finetune": finetune}, (1.0, 8.0), (250,), (3.0, 10.0, 30.0), (rate,), False, 3)


_B16 = {"model__size": "b16", "model__weights": "vit_b16_augreg"}
_TASKS: dict[str, tuple[Task, ...]] = {
    "smoke": (
        Task({}, (1.0, 8.0), (100, 400), (0.1, 3.0), (0.03,), True, 2),
        Task({"data.subset": 0.5}, (1.0, 8.0), (100,), (0.1, 3.0), (0.05,), False, 2),
    ),
    "laptop": (
        Task({}, (0.2, 1.0, 8.0), (1024, 4096, 16384, 50000), _BOUNDS, _RATES, True, 5),
        Task({"data.subset": 0.1}, (0.2, 1.0, 8.0), (256, 1024, 4096), _BOUNDS, _RATES, True, 5),
        Task({**_MINI, "finetune": "film"}, (2.0,), (256,), (0.01, 1.0, 100.0), (3e-3,), False, 3),
        Task({**_MINI, "finetune": "full"}, (2.0,), (256,), (0.01, 1.0, 100.0), (3e-3,), False, 3),
    ),
    "text": (_texts("film", 3e-3), _texts("full", 1e-3), _texts("lora:8", 3e-3)),
    "paper": (
        _paper(50_000),
        _paper(50_000, **_B16),
        _paper(5_000, data__subset=0.1),
        _paper(5_000, data__subset=0.1, **_B16),
        _paper(87_002, data__name="sun397"),
        _paper(87_002, data__name="sun397", **_B16),
        _paper(5_656, data__name="cassava", epochs=32.0),
        _paper(5_656, data__name="cassava", epochs=32.0, **_B16),
        _paper(11_314, data__name="newsgroups20", model__name="text_encoder",
               model__size="distilbert_base", model__weights="distilbert_base",
               data__tokenizer="distilbert_base_tokenizer", model__options={},
               physical_batch=64),
        _paper(50_000, finetune="lora:8"),
        _paper(50_000, finetune="full"),
        _paper(50_000, data__name="cifar10", model__name="wide_resnet", model__size="16_4",
               model__weights=None, model__options={}, model__head_init="random",
               finetune="full"),
    ),
}  # fmt: skip

# Of each size: the batch size and the rate at which gradients are looked at. NOT private.
_LOOKED_AT = {("digits", 100, 0.03), ("cifar10", 1024, 0.002), ("mnist5k", 256, 3e-3),
              ("cifar100", 4096, _PAPER_RATES[5]), ("sun397", 4096, _PAPER_RATES[5]),
              ("cassava", 1024, _PAPER_RATES[5])}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    chosen = study.size(arg, "text")
    config = default()
    config.finetune = "head"
    config.epochs = 8.0
    config.checkpoint_every = 10_000
    config.log_every = 4
    options: Row = {}
    if chosen == "paper":
        config.data.name = "cifar100"
        config.model.size = "ti16"
        config.model.weights = "vit_ti16_augreg"
        config.finetune = "film"
        config.physical_batch = 512
        options = {"image_size": 224}
    elif chosen == "text":
        config.data.name = "20newsgroups"
        config.data.train_split, config.data.test_split = "train[:1000]", "test[:1000]"
        config.model.name = "text_encoder"
        config.model.size = "minilm_l6"
        config.model.weights = "minilm_l6"
        config.epochs = 2.0
        config.batch_size = 250
        config.physical_batch = 64
        config.eval_every = 100  # at the end
        options = {"max_length": 16}
    elif chosen == "laptop":
        config.data.name = "cifar10"
        config.model.name = "efficientnet_lite"
        config.model.size = "lite0"
        config.model.weights = "efficientnet_lite0"
        options = {"image_size": 128}
    else:
        config.data.name = "digits"
        config.dp.delta = 1e-4
        config.epochs = 4.0
        options = _TINY
    with config.unlocked():
        config.model.options = dict(options)
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run, seed by seed: what has run so far can be compared."""
    yield from sorted(_points(arg), key=lambda point: point["private_seed"])


def _points(arg: str | None) -> Iterator[Row]:
    for task in _TASKS[study.size(arg, "text")]:
        common = {
            **{name: (value,) for name, value in task.overrides.items()},
            "private_seed": range(task.seeds), _EPSILON: task.epsilons, _BATCH: task.batches,
        }  # fmt: skip
        yield from proposals.grid({**common, _BOUND: task.bounds, _RATE: task.rates})
        if task.automatic:
            automatic = {"dp.clipping": ("automatic",), _BOUND: (1.0,), _RATE: task.rates}
            yield from proposals.grid({**common, **automatic})


def measure(run: build.Run, initial: Any, final: Any) -> Row:
    """Returns what the gradients of some runs looked like; see `clip_diagnosis`. NOT private."""
    config = run.config
    setting = (config.data.name, config.batch_size, config.optimizer.learning_rate)
    flat = config.dp.clipping == "flat"
    if setting not in _LOOKED_AT or config.private_seed != 0 or not flat:
        return {}
    return clip_diagnosis.of_run(run, initial, final)


def theory(arg: str | None = None) -> Row:
    """Computes sigma and sigma sqrt(T) of the paper's table, by its steps and by ours.

    Its steps are 8 ceil(N/B) at q = 1/ceil(N/B), ours round(8 N/B) at q = B/N; N = 50,000.
    """
    small = study.size(arg, "text") == "smoke"
    total, epochs, delta = 50_000, 8, 1e-5
    rows = []
    for epsilon in (1.0,) if small else (0.5, 1.0, 8.0):
        for batch in (16384, total) if small else (256, 1024, 4096, 16384, total):
            parts = -(-total // batch)
            sigma = accounting.calibrate_noise_multiplier(
                lambda s, q=1 / parts, t=epochs * parts: accounting.poisson(s, q, t),  # type: ignore[misc]
                epsilon=epsilon, delta=delta,
            )  # fmt: skip
            ours = dp.calibrated(
                epsilon=epsilon, delta=delta, num_examples=total, batch_size=batch, epochs=epochs
            )
            rows.append({
                "epsilon": epsilon, "B": batch, "T, paper's": epochs * parts, "sigma": sigma,
                "sigma sqrt(T)": sigma * (epochs * parts) ** 0.5, "T, ours": ours.steps,
                "sigma, ours": ours.noise_multiplier,
                "sigma sqrt(T), ours": ours.cumulative_noise,
            })  # fmt: skip
    return {"noise": rows}


def report(workdir: Path) -> list[Path]:
    """Rebuilds all tables and figures from the files of the runs."""
    results = study.read(workdir)
    file = workdir / "theory.json"
    noise = json.loads(file.read_text())["noise"] if file.is_file() else []
    parts = clip_batch_report.parts(results, noise)
    return study.write(workdir, "Learning rate, batch size and clip bound", parts, results)
