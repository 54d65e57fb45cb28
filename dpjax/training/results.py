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
from dpjax.runtime import Workdir, sharding
from dpjax.step import TrainState
from dpjax.training import feed

__all__ = ["finish", "fit_temperature", "overlay", "prefix", "row", "scale_head"]


def prefix(run: Run) -> str:
    """Returns the prefix of evaluation metrics: `nonprivate/` if they read the training split."""
    return "nonprivate/eval/" if run.evaluates_on_private_data else "eval/"


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
        `before_temperature/...`. Only weights.safetensors contains the temperature.
    """
    names = run.train.class_names
    weights, sums = run.merge(params), evaluate(params)
    results = metrics.summarize(sums, names)
    if run.temperature is not None:
        value = fit_temperature(
            run, run.temperature, params, private_seed=private_seed, size=evaluate.size
        )
        weights = scale_head(weights, run.model.head, value)
        before = {f"before_temperature/{name}": results[name] for name in ("nll", "ece", "mce")}
        sums = evaluate(scale_head(params, run.model.head, value))
        results = {**metrics.summarize(sums, names), "temperature": value, **before}
    if workdir.writes:
        save_weights(weights, workdir.path / "weights.safetensors")
    if state is not None and state.average is not None:
        average = overlay(params, run.layout.gather(state.average))
        results |= _named("ema/", metrics.summarize(evaluate(average), names))
        if workdir.writes:
            save_weights(run.merge(average), workdir.path / "weights_ema.safetensors")
    workdir.write("model.json", predictor.description(run))
    # A language model has no classes to draw diagrams of.
    shown = metrics.diagrams(sums, names) if isinstance(sums, metrics.EvalSums) else {}
    workdir.write("eval.json", {**results, **shown})
    return results


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
