"""The softmax temperature of a trained run: fitted on data of its own, put into the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpjax import dp
from dpjax.build.build import Run
from dpjax.build.privacy import Temperature
from dpjax.data import Dataset
from dpjax.dp import seeds
from dpjax.models import Params
from dpjax.runtime import sharding

__all__ = ["fit", "scale_head", "scaled"]


def fit(run: Run, fitted: Temperature, params: Params, *, private_seed: int, size: int) -> float:
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


def scaled(run: Run, temperature: float) -> Run:
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
