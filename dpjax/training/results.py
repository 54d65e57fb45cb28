"""Evaluates a run on held-out data, and writes the files of a finished one.

A private softmax temperature is also fitted here, on examples reserved for it, and divided into
the weights of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpjax import dp, metrics
from dpjax.build import Run, Temperature, predictor
from dpjax.data import Dataset
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, save_weights, unflatten
from dpjax.runtime import Workdir, hosts, sharding
from dpjax.step import TrainState
from dpjax.training import feed

__all__ = ["evaluation", "finish", "fit_temperature", "overlay", "prefix", "row", "scale_head"]


def prefix(run: Run) -> str:
    """Returns `eval/`, or `nonprivate/eval/` if the evaluations read the training split."""
    return f"{metrics.PRIVATE}eval/" if run.evaluates_on_private_data else "eval/"


def row(run: Run, evaluate: feed.Evaluator, state: TrainState, frozen: Params) -> dict[str, float]:
    """Returns `eval/accuracy` and so on, and `eval/ema/...` of the average if one is kept.

    The names begin with `nonprivate/` if the held-out data overlap the private training split.
    """

    def measure(begin: str, trainable: Params) -> dict[str, float]:
        params = finetune.join(run.layout.gather(trainable), frozen)
        return _named(begin, metrics.summarize(evaluate(params), run.train.class_names))

    begin = prefix(run)
    average = {} if state.average is None else measure(f"{begin}ema/", state.average)
    return {**measure(begin, state.trainable), **average}


def finish(
    run: Run,
    workdir: Workdir,
    params: Params,
    state: TrainState | None,
    *,
    evaluate: feed.Evaluator,
    private_seed: int,
) -> dict[str, Any]:
    """Evaluates and writes the released files: the weights and, if kept, their average.

    Args:
        run: trained, with the temperature's release already charged.
        workdir: of the run.
        params: all parameters.
        state: state after the last step.
        evaluate: sums metrics over the held-out data.
        private_seed: of the run.

    Returns:
        The content of `eval.json`: metrics of weights.safetensors, `ema/...` of
        weights_ema.safetensors and, if a temperature was fitted, its value and
        `before_temperature/...`. Only weights.safetensors contains the temperature. Metrics are
        labeled `nonprivate/` if the held-out data overlap the private training split.

    Raises:
        dp.BudgetExceeded: more noise was drawn than the statement on disk covers.
    """
    names = run.train.class_names
    if run.ledger is not None and state is not None:
        _check_draws(run, workdir, state)

    def merged(params: Params) -> Params:
        with run.layout.on_host():
            return run.merge(jax.tree.map(np.asarray, params))

    def measured(params: Params) -> metrics.EvalSums | metrics.TokenSums:
        return evaluate(run.layout.place_frozen(params))

    weights, sums = merged(params), measured(params)
    results = metrics.summarize(sums, names)
    if run.temperature is not None:
        value = fit_temperature(
            run, run.temperature, params, private_seed=private_seed, size=evaluate.size
        )
        weights = scale_head(weights, run.model.head, value)
        changed = ("nll", "brier", "ece", "mce", "adaptive_ece")
        before = {f"before_temperature/{name}": results[name] for name in changed}
        sums = measured(scale_head(params, run.model.head, value))
        results = {**metrics.summarize(sums, names), **before}
    if workdir.writes:
        save_weights(weights, workdir.path / "weights.safetensors")
    if state is not None and state.average is not None:
        average = overlay(params, run.layout.gather(state.average))
        results |= _named("ema/", metrics.summarize(measured(average), names))
        if workdir.writes:
            save_weights(merged(average), workdir.path / "weights_ema.safetensors")
    workdir.write("model.json", predictor.description(run))
    released = {} if run.temperature is None else {"temperature": value}  # under the guarantee
    content = evaluation(run, results, sums) | released
    workdir.write("eval.json", content)
    return {name: value for name, value in content.items() if isinstance(value, float)}


def evaluation(
    run: Run, results: Mapping[str, float], sums: metrics.EvalSums | metrics.TokenSums
) -> dict[str, Any]:
    """Returns the content of `eval.json`: metrics and what figures show, each under its label."""
    if isinstance(sums, metrics.TokenSums):  # a language model has no classes to draw
        return metrics.labeled(results, run.evaluates_on_private_data)
    shown = metrics.diagrams(sums, run.train.class_names)
    names = {"class_names": shown.pop("class_names")}
    return {**metrics.labeled({**results, **shown}, run.evaluates_on_private_data), **names}


def _check_draws(run: Run, workdir: Workdir, state: TrainState) -> None:
    """Compares what the noise transform and the step have counted with plan and statement."""
    last = run.phases[-1].training
    planned = sum(phase.steps for phase in run.phases if phase.training == last)
    drawn, steps = dp.noise_draws(state.opt), int(state.step)
    charged = hosts.first(workdir.read("privacy.json")["steps_done"] if workdir.writes else None)
    held = 0 if run.vote is None else run.vote.mechanism.steps
    if drawn != planned or steps > charged - held:
        raise dp.BudgetExceeded(
            f"{drawn} draws of noise in a training of {planned} steps, {steps} steps in all, but "
            f"the statement covers {charged}."
        )


def overlay(params: Params, changes: Params) -> Params:
    """Returns parameters with some leaves replaced."""
    return unflatten({**flatten(params), **flatten(changes)})


def _named(begin: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{begin}{name}": value for name, value in values.items()}


def fit_temperature(
    run: Run, fitted: Temperature, params: Params, *, private_seed: int, size: int
) -> float:
    """Fits the temperature of trained parameters privately; every host makes the same call.

    Args:
        run: trained.
        fitted: the reserved examples, and the mechanism, which the caller has charged.
        params: all parameters.
        private_seed: of the run.
        size: rows of a chunk, over all hosts.
    """
    return dp.fit_temperature(
        _logits(run, fitted.data, params, size),
        fitted.data.labels,
        mechanism=fitted.mechanism,
        bound=fitted.bound,
        key=seeds.noise_key(private_seed, "temperature"),
    )


def scale_head(params: Params, head: str, temperature: float) -> Params:
    """Returns plain weights with the temperature divided into the head, which is a dense layer."""
    dense: Mapping[str, Any] = params[head]
    return {**params, head: {name: leaf / temperature for name, leaf in dense.items()}}


def _logits(run: Run, examples: Dataset, params: Params, size: int) -> np.ndarray:
    """Logits `[examples, classes]` on every host."""
    mesh = run.layout.mesh
    predict = jax.jit(run.apply, out_shardings=sharding.replicated(mesh))
    rows = sharding.local_rows(size, mesh)
    parts = []
    for chunk in dp.chunks(np.arange(len(examples)), size):
        batch = sharding.to_mesh({"input": examples.get(chunk[rows])["input"]}, mesh)
        parts.append(np.asarray(predict(params, batch["input"]))[chunk >= 0])
    return np.concatenate(parts)
