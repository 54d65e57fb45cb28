"""Canaries: examples that are put into a run so that an attacker can look for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp, models
from dpjax.build import Run
from dpjax.data import Dataset, Source, Units
from dpjax.dp import seeds
from dpjax.models import Params

__all__ = ["CANARIES", "UNUSED", "Game", "likelihoods", "make"]

CANARIES = ("gradient", "mislabeled", "random")

_LEAF = "audit_canaries"  # the extra parameter: one coordinate per gradient canary
_BEYOND = 100.0  # norm of a canary's gradient over the clip bound

UNUSED = 20_000
"""Coordinates beside those of gradient canaries that nothing moves but noise."""


class Game(NamedTuple):
    """A run that can take canaries.

    Attributes:
        run: the run, with what its canaries need.
        inputs: `[canaries, ...]` raw inputs.
        labels: `[canaries]`.
    """

    run: Run
    inputs: np.ndarray
    labels: np.ndarray

    def data(self, included: np.ndarray) -> Dataset | Units:
        """The run's examples and the canaries that are in; a canary is a unit of its own."""
        whole = self.run.train
        train = whole.records if isinstance(whole, Units) else whole
        size = len(train.source.keys)

        def read(rows: np.ndarray) -> np.ndarray:
            out = np.empty((len(rows), *train.shape), self.inputs.dtype)
            added = rows >= size
            out[added] = self.inputs[rows[added] - size]
            if not added.all():
                out[~added] = train.source.read(rows[~added])
            return out

        unknown = np.zeros((len(self.labels), 16), np.uint8)
        chosen = np.flatnonzero(included)
        units = None
        if train.units is not None:
            units = np.concatenate([train.units.astype(str), [f"canary {i}" for i in chosen]])
        both = dataclasses.replace(
            train,
            labels=np.concatenate([train.labels, self.labels[chosen]]),
            class_names=(*train.class_names, *["canary"] * len(self.labels)),
            rows=np.concatenate([train.rows, size + chosen]),
            source=Source(read, np.concatenate([train.source.keys, unknown]), train.source.dtype),
            units=units,
        )
        return Units(both, whole.limit) if isinstance(whole, Units) else both

    def watched(self, params: Params) -> np.ndarray | None:
        """The coordinates of gradient canaries, then those that nothing moves; None for others."""
        return np.asarray(params[_LEAF]) if _LEAF in params else None

    def scores(self, params: Params) -> np.ndarray:
        """How much each canary looks like it took part, `[canaries]`, from the last parameters."""
        if (moved := self.watched(params)) is not None:
            return moved[: len(self.labels)]
        return _losses(self, self.run.params) - _losses(self, params)


def likelihoods(
    path: np.ndarray, canaries: int, probs: np.ndarray, strengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores gradient canaries by all checkpoints, as an attacker who sees every step would.

    Between two checkpoints a coordinate moves by a sum of noisy gradients, weighted by whatever the
    optimizer does. If that is linear, the triangular root of the movements' covariance undoes it:
    what is left is the noisy gradient of each stretch in units of its noise, and its likelihood
    ratio follows. Half of the unused coordinates estimate the covariance. The others are treated
    like the canaries, so that a canary that took no part has their law, whatever the optimizer is.

    Args:
        path: `[checkpoints + 1, coordinates]`, from the first to the last, canaries first.
        canaries: how many there are.
        probs: `[checkpoints]`, the probability that a canary was in a stretch.
        strengths: `[checkpoints]`, how far it then moves the sum, in units of its noise.

    Returns:
        Scores of the canaries, and of the other half of the unused coordinates.
    """
    moves = np.diff(path.astype(np.float64), axis=0)
    half = canaries + (path.shape[1] - canaries) // 2
    covariance = np.atleast_2d(np.cov(moves[:, half:]))
    size = np.trace(covariance) / len(moves)
    if not (np.isfinite(size) and size > 0):  # no noise at all, or none that is finite
        total = path[-1] - path[0]
        return total[:canaries], total[canaries:half]
    root = np.linalg.cholesky(covariance + 1e-9 * size * np.eye(len(moves)))
    noisy = np.linalg.solve(root, moves[:, :half])
    c, q = strengths[:, None], probs[:, None]
    # log(1 - q + q exp(c z - c^2 / 2)), which must not overflow.
    with np.errstate(divide="ignore"):
        scores = np.logaddexp(np.log1p(-q), np.log(q) + c * noisy - c * c / 2).sum(0)
    return scores[:canaries], scores[canaries:]


def make(run: Run, canaries: str, count: int) -> Game:
    """Prepares a run for canaries of one kind.

    Args:
        run: private.
        canaries: one of `CANARIES`; see `dpjax.audit`.
        count: how many.

    """
    generator = np.random.default_rng(run.config.seed)  # canaries are public; their coins are not
    classes, kind = run.train.num_classes, run.train.source.dtype
    if canaries == "gradient":
        return Game(
            _with_leaf(run, count), np.zeros((count, *run.train.shape), kind),
            classes + np.arange(count),
        )  # fmt: skip
    if canaries == "random":
        spec = run.model.input
        top = spec.vocab_size if isinstance(spec, models.TextSpec) else 256
        inputs = generator.integers(0, top, (count, *run.train.shape)).astype(kind)
        return Game(run, inputs, generator.integers(0, classes, count))
    batch = run.test.get(generator.choice(len(run.test), count, replace=False))
    wrong = (batch["label"] + generator.integers(1, classes, count)) % classes
    return Game(run, batch["input"], wrong)


def _with_leaf(run: Run, count: int) -> Run:
    """Gives a run `count` parameters that only gradient canaries move, one each, and others."""
    rule, classes = run.rule, run.train.num_classes
    # Of a norm just within the bound and one far beyond it, that of which the rule keeps more:
    # global clipping drops what is beyond its bound.
    norm = max(_BEYOND, 0.999, key=lambda times: _kept(rule, times))
    norm *= min(phase.bound for phase in run.phases)

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        rest = {name: leaf for name, leaf in params.items() if name != _LEAF}
        index = example["label"].reshape(-1)[0] - classes  # the first record's, of a unit
        real = run.loss_fn(rest, {**example, "label": jnp.where(index < 0, example["label"], 0)})
        return jnp.where(index < 0, real, -norm * params[_LEAF][jnp.maximum(index, 0)])

    return run._replace(
        params={**run.params, _LEAF: jnp.zeros(count + UNUSED, jnp.float32)},
        loss_fn=loss_fn,
        phases=tuple(p._replace(trainable=_and_leaf(p.trainable)) for p in run.phases),
    )


def _kept(rule: dp.ClipRule | None, times: float) -> float:
    """What a rule leaves of a gradient of `times` its bound."""
    if rule is None:
        return times
    norm = times * float(jnp.linalg.norm(jnp.atleast_1d(rule.threshold)))
    return float(jnp.sum(rule.factors(jnp.array([norm])) * norm))


def _and_leaf(trainable: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda path: path == _LEAF or trainable(path)


def _losses(game: Game, params: Params) -> np.ndarray:
    """Losses of the canaries, `[canaries]`; one key, so that augmentations are the same."""
    examples = {"input": jnp.asarray(game.inputs), "label": jnp.asarray(game.labels, jnp.int32)}
    key = seeds.public_key(game.run.config.seed, "audit")

    @jax.jit
    def losses(params: Params) -> jax.Array:
        return jax.lax.map(
            lambda e: game.run.loss_fn(params, {**e, "key": key}), examples, batch_size=64
        )

    return np.asarray(losses(params))
