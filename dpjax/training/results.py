"""What is measured of a run on held-out data, and what a finished one leaves.

The softmax temperature is fitted here: on data of its own, then put into the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dpjax import dp, metrics
from dpjax.build import Run, Temperature
from dpjax.data import Dataset
from dpjax.dp import seeds
from dpjax.models import Params, finetune, flatten, save_weights, unflatten
from dpjax.runtime import Workdir, sharding
from dpjax.step import TrainState
from dpjax.training import feed

__all__ = ["finish", "fit_temperature", "overlay", "prefix", "row", "scale_head"]

Evaluate = Callable[[Params], metrics.EvalSums]


def prefix(run: Run) -> str:
    """Of the names of evaluations: on a part of the private training split they are not private."""
    return "nonprivate/eval/" if run.evaluates_on_private_data else "eval/"


def row(run: Run, evaluate: Evaluate, state: TrainState, frozen: Params) -> dict[str, float]:
    """Returns `eval/accuracy` and the like, and `eval/ema/...` of the average if there is one.

    On a part of the private training split the names begin with `nonprivate/`.
    """

    def measured(begin: str, trainable: Params) -> dict[str, float]:
        whole = finetune.join(run.layout.gather(trainable), frozen)
        return _named(begin, metrics.summarise(evaluate(whole)))

    begin = prefix(run)
    average = {} if state.average is None else measured(f"{begin}ema/", state.average)
    return {**measured(begin, state.trainable), **average}


def finish(
    run: Run,
    workdir: Workdir,
    params: Params,
    state: TrainState | None,
    *,
    evaluate: Evaluate,
    private_seed: int,
    size: int,
) -> dict[str, Any]:
    """Evaluates and writes what is released: the weights, their average, the temperature.

    Args:
        run: trained, and charged for the temperature too.
        workdir: of the run.
        params: all parameters.
        state: after the last step.
        evaluate: sums metrics over the held-out data.
        private_seed: of the run.
        size: examples in a chunk of an evaluation, over all hosts.

    Returns:
        What stands in `eval.json`: metrics of weights.safetensors, `ema/...` of
        weights_ema.safetensors, and with a temperature (which is in the first of them only) its
        value and `before_temperature/...`.
    """
    weights, sums = run.merge(params), evaluate(params)
    results = metrics.summarise(sums)
    if run.temperature is not None:
        value = fit_temperature(run, run.temperature, params, private_seed=private_seed, size=size)
        weights = scale_head(weights, run.model.head, value)
        before = {f"before_temperature/{name}": results[name] for name in ("nll", "ece", "mce")}
        sums = feed.evaluator(_scaled(run, value), run.layout, size)(params)
        results = {**metrics.summarise(sums), "temperature": value, **before}
    if workdir.writes:
        save_weights(weights, workdir.path / "weights.safetensors")
    if state is not None and state.average is not None:
        average = overlay(params, run.layout.gather(state.average))
        results |= _named("ema/", metrics.summarise(evaluate(average)))
        if workdir.writes:
            save_weights(run.merge(average), workdir.path / "weights_ema.safetensors")
    workdir.write("eval.json", {**results, "reliability": metrics.reliability(sums)._asdict()})
    return results


def overlay(params: Params, changes: Params) -> Params:
    """Returns parameters with some leaves replaced."""
    return unflatten({**flatten(params), **flatten(changes)})


def _named(begin: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{begin}{name}": value for name, value in values.items()}


def fit_temperature(
    run: Run, fitted: Temperature, params: Params, *, private_seed: int, size: int
) -> float:
    """Returns the private temperature of trained parameters; every host calls it alike.

    Args:
        run: trained.
        fitted: its examples and mechanism, which the caller has charged.
        params: all parameters.
        private_seed: of the run.
        size: examples in a chunk, over all hosts.
    """
    return dp.fit_temperature(
        _logits(run, fitted.data, params, size),
        fitted.data.labels,
        mechanism=fitted.mechanism,
        bound=fitted.bound,
        key=seeds.noise_key(private_seed, "temperature"),
    )


def _scaled(run: Run, temperature: float) -> Run:
    """Returns the run whose predictions are divided by the temperature."""
    return run._replace(apply=lambda params, inputs: run.apply(params, inputs) / temperature)


def scale_head(params: Params, head: str, temperature: float) -> Params:
    """Returns plain weights with the temperature in them: the head is dense, see `Model`."""
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
