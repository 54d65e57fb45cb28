"""A config becomes a run: one module for each of its sections, and `build` for the whole."""

from dpjax.build import (
    data,
    describe,
    fields,
    generator,
    loss,
    model,
    next_token,
    optimizer,
    planner,
    predictor,
    privacy,
    schedules,
)
from dpjax.build.build import build
from dpjax.build.run import Run, Temperature, TrainingPhase, Vote

__all__ = [
    "Run",
    "Temperature",
    "TrainingPhase",
    "Vote",
    "build",
    "data",
    "describe",
    "fields",
    "generator",
    "loss",
    "model",
    "next_token",
    "optimizer",
    "planner",
    "predictor",
    "privacy",
    "schedules",
]
