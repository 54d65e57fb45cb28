"""The settings that `head_grid` tries, and how one block of them is trained and scored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpjax import build, dp, heads
from dpjax import config as configs
from dpjax.dp import least_squares
from dpjax.heads import FeatureSet

__all__ = [
    "DELTA",
    "SCALE",
    "Block",
    "Ridges",
    "Row",
    "grid",
    "least_squares_scores",
    "points",
    "scores",
    "train",
]

DELTA = 1e-5
SCALE = 8.0  # norm of an example's features, see `heads.normalize`

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """Runs that share everything but epsilon, clip bound, learning rate and seed.

    Attributes:
        center: whether each example's features are centered, see `heads.normalize`.
        optimizer: "adam" or "momentum".
        steps: T.
        fraction: B / N; 1 for full batches.
        bounds: clip bounds.
        rates: learning rates.
    """

    center: bool
    optimizer: str
    steps: int
    fraction: float
    bounds: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        features = "centered" if self.center else "plain"
        return f"{features} {self.optimizer} T={self.steps} B/N={self.fraction:g}"

    @classmethod
    def from_json(cls, values: Row) -> Block:
        """Inverse of `dataclasses.asdict` through JSON."""
        return cls(**{**values, "bounds": tuple(values["bounds"]), "rates": tuple(values["rates"])})


@functools.cache  # one factory, one compilation
def _transform(name: str, steps: int, *, private: bool) -> heads.Optimizer:
    config = configs.default().optimizer
    with config.unlocked():
        config.name = "sgd" if name == "momentum" else name
        config.options = {"momentum": 0.9} if name == "momentum" else {}
    return build.optimizer.optimizer(config, steps, private=private)


@dataclasses.dataclass(frozen=True)
class Ridges:
    """Closed-form heads, every ridge from one release.

    Attributes:
        shares: of the budget that the covariance takes.
        ridges: in units of the spectral norm of its noise.
        intercept: constant feature, beside features of norm 1.
    """

    shares: tuple[float, ...] = (0.4, 0.6, 0.8)
    ridges: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0)
    intercept: float = 0.1

    name = "least squares"


def grid(*, private: bool, quick: bool) -> list[Block]:
    """Returns the settings that are tried at every epsilon."""
    if quick:
        return [Block(True, "adam", 30, 1.0, (2.0,), (0.02, 0.05))]
    if not private:
        rates = (0.01, 0.02, 0.05)
        return [Block(center, "adam", 300, 1.0, (1.0,), rates) for center in (False, True)]
    rates = (0.006, 0.012, 0.024)
    return [
        Block(False, "adam", 100, 1.0, (2.0,), rates),
        Block(True, "adam", 100, 1.0, (1.0, 2.0, 4.0), rates),
        Block(True, "adam", 200, 1.0, (1.0, 2.0), rates[:2]),
        Block(True, "adam", 400, 0.25, (2.0,), (0.003, 0.006)),
        Block(True, "momentum", 100, 1.0, (2.0,), (2.0, 4.0, 8.0)),
    ]


def points(
    block: Block, examples: int, epsilons: Iterable[float], seeds: Iterable[int]
) -> tuple[list[heads.Point], list[Row]]:
    """The points of a block on so many examples, and what describes each."""
    made, rows = [], []
    for epsilon in epsilons:
        mechanism = None
        if epsilon < math.inf:
            mechanism = dp.calibrated(
                epsilon=epsilon,
                delta=DELTA,
                num_examples=examples,
                batch_size=round(block.fraction * examples),
                steps=block.steps,
            )
        for bound in block.bounds if mechanism else (math.inf,):
            rule = dp.flat(bound, normalized=True) if mechanism else None
            for rate in block.rates:
                for seed in seeds:
                    made.append(heads.Point(rate, seed, rule, mechanism))
                    rows.append(
                        {"epsilon": epsilon, "bound": bound, "learning_rate": rate, "seed": seed}
                    )
    return made, rows


def train(block: Block, train_set: FeatureSet, made: Sequence[heads.Point]) -> heads.Heads:
    """Trains the heads of one block."""
    batch_size = round(block.fraction * len(train_set))
    private = made[0].mechanism is not None
    return heads.train_heads(
        train_set,
        made,
        steps=block.steps,
        batch_size=batch_size,
        optimizer=_transform(block.optimizer, block.steps, private=private),
        at_once=12,
    )


def scores(trained: heads.Heads, held: FeatureSet) -> Iterator[Row]:
    """Held-out metrics of each head, of its last iterate and of its average."""
    last, average = (heads.evaluate(p, held) for p in (trained.params, trained.average))
    for one, other in zip(last, average, strict=True):
        yield {
            readout: {name: found[name] for name in ("accuracy", "nll", "ece")}
            for readout, found in (("last", one), ("average", other))
        }


def least_squares_scores(
    ridges: Ridges,
    train_set: FeatureSet,
    held: FeatureSet,
    epsilons: Iterable[float],
    seeds: Iterable[int],
) -> Iterator[Row]:
    """Releases the moments and solves for every ridge; features are centered, of norm 1."""
    inputs, others = (_with_intercept(s, ridges.intercept) for s in (train_set, held))
    sums = least_squares.moments(
        jnp.asarray(inputs),
        jnp.asarray(train_set.labels),
        jnp.ones(len(inputs), bool),
        num_classes=train_set.num_classes,
        bound=math.hypot(1.0, ridges.intercept),
    )
    for epsilon in epsilons:
        sigma = 0.0
        if epsilon < math.inf:
            sigma = dp.calibrated(
                epsilon=epsilon,
                delta=DELTA,
                num_examples=len(inputs),
                batch_size=len(inputs),
                steps=1,
            ).noise_multiplier
        for share in ridges.shares if sigma else ridges.shares[:1]:
            for seed in seeds:
                noisy = least_squares.release(
                    sums, sigma, covariance_share=share, key=dp.seeds.noise_key(seed)
                )
                # Without noise the floor is 0: the ridge is then in units of examples.
                unit = least_squares.noise_floor(noisy) or 1.0
                kernels = least_squares.solve(noisy, [unit * ridge for ridge in ridges.ridges])
                for ridge, kernel in zip(ridges.ridges, np.asarray(kernels), strict=True):
                    right = (others @ kernel).argmax(axis=1) == held.labels
                    yield {
                        "block": ridges.name,
                        "epsilon": epsilon,
                        "share": share,
                        "ridge": ridge,
                        "seed": seed,
                        "last": {"accuracy": float(right.mean())},
                    }


def _with_intercept(features_: FeatureSet, intercept: float) -> np.ndarray:
    column = np.full((len(features_), 1), intercept, np.float32)
    return np.concatenate([features_.values / np.float32(SCALE), column], axis=1)
