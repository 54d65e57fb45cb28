"""Runs of a study that train only a head, on features computed once: minutes become seconds.

Most are batched, see `train_group`. One that changes its clip bound on the way, or fits a
temperature, takes the train loop, which then reads features in place of inputs (`train_one`).

A run writes the same files as `dpjax.training.loop`, with the same head up to rounding (see
`dpjax.heads`), except that there are no checkpoints and `weights.safetensors` contains only the
head.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpjax import build, dp, heads, metrics, models
from dpjax.build import describe, predictor
from dpjax.config import default, differences
from dpjax.data import Dataset, Source
from dpjax.models import Params, TextSpec, dense_head
from dpjax.runtime import Workdir
from dpjax.training import loop, results

__all__ = ["Job", "built", "fits", "fits_loop", "groups", "train_group", "train_one"]

# Fields in which the runs of one group may differ: they are batched, and compile once.
_BATCHED = ("optimizer.learning_rate", "dp.bound", "dp.epsilon", "private_seed")
# Fields that the engine of heads knows; a run that changes another one takes the train loop.
_KNOWN = (
    "seed", "private_seed", "data.name", "data.data_dir", "data.train_split", "data.test_split",
    "data.subset", "data.holdout", "data.tokenizer", "finetune", "dp.epsilon", "dp.delta",
    "dp.clipping", "dp.bound", "dp.normalized", "dp.gamma", "dp.sampler", "batch_size", "epochs",
    "log_every", "physical_batch", "microbatch", "eval_every", "checkpoint_every", "dp.method",
    "keep_checkpoints",
)  # fmt: skip
_KNOWN_TREES = ("model.", "optimizer.")
_LOOPED = ("dp.bound_schedule", "dp.temperature.")  # which the loop knows, on features too


@dataclasses.dataclass(frozen=True)
class Job:
    """One point: its config, and where its files go."""

    config: ConfigDict
    path: Path


def fits(config: ConfigDict) -> bool:
    """Whether `dpjax.heads` can do a run: it trains a new head, and needs no more than features."""
    return _fits(config, _KNOWN_TREES)


def fits_loop(config: ConfigDict) -> bool:
    """Whether `train_one` can do a run."""
    return _fits(config, (*_KNOWN_TREES, *_LOOPED))


def _fits(config: ConfigDict, trees: tuple[str, ...]) -> bool:
    if config.finetune != "head" or config.dp is None or config.private_seed is None:
        return False
    spec = build.model.model(config.model, 1).input
    if isinstance(spec, TextSpec) and spec.causal:  # its head is its table of words
        return False
    changed = [text.split(":")[0].removeprefix("config.") for text in _changes(config)]
    return all(name in _KNOWN or name.startswith(trees) for name in changed)


def _changes(config: ConfigDict) -> list[str]:
    return differences(default().to_dict(), config.to_dict())


def groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Groups jobs that can be trained together."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        shared = job.config.copy_and_resolve_references()
        with shared.unlocked():
            for name in _BATCHED:
                shared.update_from_flattened_dict({name: None})
        found.setdefault(json.dumps(shared.to_dict(), sort_keys=True), []).append(job)
    return list(found.values())


def train_group(
    jobs: list[Job], measure: Callable[[build.Run, Any, Any], Any] | None = None
) -> None:
    """Trains the jobs of one group and writes the files of each run, `eval.json` last.

    Args:
        jobs: one of `groups`.
        measure: see `run_study`; None measures nothing.

    Raises:
        ValueError: a mistake in a config, before anything is written.
    """
    runs = [_run(job, built) for job, built in _built(jobs)]
    for job, run in zip(jobs, runs, strict=True):
        workdir = Workdir(job.path)
        workdir.check(job.config)
        workdir.create(job.config)
        facts = describe.run_statement(run, describe.ledger_after(run, _steps(run)))
        workdir.write("privacy.json", facts)  # ahead of the steps it reports
        workdir.write("privacy.md", dp.ledger.to_markdown(facts))
    first = runs[0]
    train, test = (
        heads.compute_features(first.model, first.params, d) for d in (first.train, first.test)
    )
    head = first.params[first.model.head]
    trained = heads.train_heads(
        train,
        [_point(run) for run in runs],
        steps=_steps(first),
        batch_size=first.config.batch_size,
        optimizer=first.phases[0].optimizer,
        head={first.model.head: head},
    )
    for index, (job, run) in enumerate(zip(jobs, runs, strict=True)):
        mine = jax.tree.map(lambda x, at=index: jnp.asarray(x[at]), trained.params)
        facts = {name: values[index] for name, values in trained.facts.items()}
        _write(run, Workdir(job.path), mine, facts, test, measure)


def train_one(
    run: build.Run, workdir: Workdir, *, stop: Callable[[int], bool] = lambda step: False
) -> None:
    """Trains a head through the train loop, which reads features in place of inputs.

    Args:
        run: from `built`, of a config that `fits_loop`.
        workdir: of the run.
        stop: see `loop.train`.

    Raises:
        loop.TrainingFailed: the parameters became non-finite.
    """
    name = run.model.head
    apply, loss_fn = _of_features(name)
    train, test = _features(_shared(run.config))
    fitted = run.temperature
    if fitted is not None:  # features are computed once, of all: both parts pick theirs
        fitted = fitted._replace(data=dataclasses.replace(train, **_place(fitted.data)))
    on_features = run._replace(
        train=dataclasses.replace(train, **_place(run.train)),
        test=test,
        temperature=fitted,
        params={name: run.params[name]},
        apply=apply,
        loss_fn=loss_fn,
    )
    loop.train(on_features, workdir, stop=stop)
    workdir.write("model.json", predictor.description(run))


@functools.lru_cache(maxsize=1)
def _features(config: str) -> list[Dataset]:
    """Returns training and held-out data of `_opened`, whose stored inputs are now features."""
    run, made = _opened(config), []
    for dataset in (run.train, run.test):
        values = heads.compute_features(run.model, run.params, dataset).values
        table = np.zeros((dataset.rows.max() + 1, values.shape[1]), np.float32)
        table[dataset.rows] = values
        source = Source(table.__getitem__, dataset.source.keys, table.dtype)
        made.append(dataclasses.replace(dataset, shape=values.shape[1:], source=source))
    return made


def _place(part: Dataset) -> dict[str, np.ndarray]:
    return {"rows": part.rows, "labels": part.labels}


@functools.lru_cache(maxsize=1)  # the same functions for all runs: they compile once
def _of_features(head: str) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    def apply(params: Params, values: jax.Array) -> jax.Array:
        return dense_head(params[head], values)

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        logits = apply(params, example["input"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    return apply, loss_fn


def _built(jobs: list[Job]) -> list[tuple[Job, build.Run]]:
    """Returns the run of each job; jobs of one epsilon share data, model and calibration."""
    made: dict[float, build.Run] = {}
    for job in jobs:
        if job.config.dp.epsilon not in made:
            made[job.config.dp.epsilon] = built(job.config)
    return [(job, made[job.config.dp.epsilon]) for job in jobs]


def _shared(config: ConfigDict) -> str:
    """Returns what decides data, weights and model of a run."""
    shared = default()
    with shared.unlocked():
        for name in ("seed", "data", "model", "finetune"):
            shared[name] = config[name]
        shared.dp = None
    shared.batch_size = 1
    return json.dumps(shared.to_dict(), sort_keys=True)


def built(config: ConfigDict) -> build.Run:
    """Like `build.build`, but does not open the data and weights of the last run again."""
    opened = _opened(_shared(config))
    train, fitted = build.privacy.temperature(config, opened.train)
    tuning = build.model.finetuning_set(config.finetune)(opened.model)
    sizes, plan = build.schedules.batch_sizes(config, len(train))
    phases = build.schedules.phases(config, tuning, sizes, len(train))
    return opened._replace(
        config=config,
        train=train,
        rule=build.privacy.clip_rule(config.dp, phases[0].bound),
        temperature=fitted,
        batch_plan=plan,
        phases=phases,
        ledger=build.privacy.ledger(config, phases, fitted),
    )


@functools.lru_cache(maxsize=1)
def _opened(config: str) -> build.Run:
    return build.build(ConfigDict(json.loads(config)))


def _run(job: Job, built: build.Run) -> build.Run:
    rate, bound = job.config.optimizer.learning_rate, job.config.dp.bound
    return built._replace(
        config=job.config,
        rule=build.privacy.clip_rule(job.config.dp),
        phases=tuple(p._replace(learning_rate=rate, bound=bound) for p in built.phases),
    )


def _steps(run: build.Run) -> int:
    return run.phases[0].steps


def _point(run: build.Run) -> heads.Point:
    phase = run.phases[0]
    return heads.Point(phase.learning_rate, run.config.private_seed, run.rule, phase.mechanism)


def _write(
    run: build.Run,
    workdir: Workdir,
    head: Any,
    facts: dict[str, np.ndarray],
    test: heads.FeatureSet,
    measure: Callable[[build.Run, Any, Any], Any] | None,
) -> None:
    (leaves,) = head.values()
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves.values()):
        workdir.path.with_suffix(".failed").write_text("exit 3: parameters are not finite")
        return
    sums = _sums(leaves, jnp.asarray(test.values), jnp.asarray(test.labels))
    names = run.train.class_names
    found = metrics.summarize(sums, names)
    workdir.drop_metrics_after(0)
    steps = _steps(run)
    for step in range(1, steps + 1):
        if step % run.config.log_every == 0 or step == steps:
            row = {f"nonprivate/{new}": float(facts[old][step - 1]) for old, new in _LOGGED}
            workdir.append_metrics(step, row)
    begin = results.prefix(run)
    last = {f"{begin}{name}": value for name, value in found.items()}
    workdir.append_metrics(steps, last | {"epsilon": workdir.read("privacy.json")["epsilon"]})
    models.save_weights(head, workdir.path / "weights.safetensors")
    if measure is not None:
        workdir.write("measured.json", measure(run, run.params, {**run.params, **head}))
    workdir.write("model.json", predictor.description(run))
    workdir.write("eval.json", results.evaluation(run, found, sums))


_LOGGED = (("loss", "loss"), ("clipped", "clipped_fraction"), ("count", "batch_size"))


@jax.jit
def _sums(head: Any, inputs: jax.Array, labels: jax.Array) -> metrics.EvalSums:
    logits = inputs @ head["kernel"]
    logits = logits + jnp.broadcast_to(head["bias"], logits.shape)
    return metrics.eval_sums(logits, labels, jnp.ones(labels.shape, bool), logits.shape[1])
