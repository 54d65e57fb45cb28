"""What is measured of a run on held-out data, and what a finished one leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpjax import metrics
from dpjax.build.build import Run
from dpjax.models import Params, finetune, flatten, unflatten
from dpjax.runtime.workdir import Workdir
from dpjax.step import TrainState
from dpjax.training import feed, temperature

__all__ = ["finish", "overlay", "prefix", "row"]

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
        value = temperature.fit(run, run.temperature, params, private_seed=private_seed, size=size)
        weights = temperature.scale_head(weights, run.model.head, value)
        before = {f"before_temperature/{name}": results[name] for name in ("nll", "ece", "mce")}
        sums = feed.evaluator(temperature.scaled(run, value), run.layout, size)(params)
        results = {**metrics.summarise(sums), "temperature": value, **before}
    workdir.save_weights(weights)
    if state is not None and state.average is not None:
        average = overlay(params, run.layout.gather(state.average))
        results |= _named("ema/", metrics.summarise(evaluate(average)))
        workdir.save_weights(run.merge(average), "weights_ema.safetensors")
    workdir.write("eval.json", {**results, "reliability": metrics.reliability(sums)._asdict()})
    return results


def overlay(params: Params, changes: Params) -> Params:
    """Returns parameters with some leaves replaced."""
    return unflatten({**flatten(params), **flatten(changes)})


def _named(begin: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{begin}{name}": value for name, value in values.items()}
