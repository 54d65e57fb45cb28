"""Linear heads on cached features: a whole training run is one compiled scan over its steps.

The head that comes out is the one `loop.train` would train with the same seeds, for the batches,
the noise, the optimizer and the clipping rules are the same objects; only the features are not
computed again. Learning rate, clip bound, noise multiplier and seeds are traced, so a grid over
them is batched and compiles once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import dp, metrics
from dpjax.dp import linear_head, seeds
from dpjax.heads.cache import FeatureSet
from dpjax.models import Params
from dpjax.step import Hyper, TrainState, apply_updates, draws, fact_sums

__all__ = [
    "ClippedHeadSum",
    "Heads",
    "Optimizer",
    "Point",
    "batch_indices",
    "evaluate",
    "initial_head",
    "train_heads",
]

_CAPACITY_UNIT = 64  # batches are padded to a multiple of this
_EVAL_ROWS = 8192

Optimizer = Callable[[Hyper], optax.GradientTransformation]

ClippedHeadSum = Callable[
    [TrainState, dp.ClipRule, linear_head.Rows, jax.Array], tuple[dp.ClippedSum, dp.PerExample]
]
"""`(state, rule, rows, mask) -> (sum, facts)` of a batch, see `linear_head.clipped_head_sum`."""


def _clipped_sum(
    state: TrainState, rule: dp.ClipRule, rows: linear_head.Rows, mask: jax.Array
) -> tuple[dp.ClippedSum, dp.PerExample]:
    return linear_head.clipped_head_sum(state.trainable, rule, rows, mask)


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a grid.

    Attributes:
        learning_rate: base learning rate.
        private_seed: decides batches and noise, see `rng`.
        rule: clipping rule; None without privacy.
        mechanism: None without privacy. In one grid, all have the same sampler and T.
    """

    learning_rate: float
    private_seed: int
    rule: dp.ClipRule | None = None
    mechanism: dp.Mechanism | None = None

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0 and finite.")
        if (self.rule is None) != (self.mechanism is None):
            raise ValueError("rule and mechanism must both be given, or both be None.")
        if self.mechanism is not None and self.mechanism.count_noise is not None:
            raise ValueError(
                f"mechanism.count_noise={self.mechanism.count_noise} must be None: the bound of a "
                "head does not adapt."
            )


class Heads(NamedTuple):
    """Trained heads, in the order of the points.

    Attributes:
        params: last iterates, `{head: {"kernel": [points, width, classes], "bias": ...}}`.
        average: exponential moving averages of the iterates, the same tree; free post-processing.
        facts: `[points, steps]` each, NOT private: loss (mean over the batch), clipped (fraction),
            count (batch size).
    """

    params: Params
    average: Params
    facts: dict[str, np.ndarray]


def initial_head(width: int, num_classes: int, *, name: str = "head") -> Params:
    """A head of zeros: `{name: {"kernel": [width, classes], "bias": [classes]}}`."""
    kernel, bias = jnp.zeros((width, num_classes)), jnp.zeros((num_classes,))
    return {name: {"kernel": kernel, "bias": bias}}


def batch_indices(draw: Callable[[int], np.ndarray], steps: int) -> np.ndarray:
    """Draws the batches of all steps ahead.

    Args:
        draw: maps a step to the indices of its batch, see `step.draws`.
        steps: number of steps.

    Returns:
        int32 `[steps, columns]`, `dp.PADDING` after the end of each batch; the largest batch fits.
    """
    drawn = [draw(step) for step in range(steps)]
    largest = max([1, *(len(batch) for batch in drawn)])
    padded = np.full((steps, -(-largest // _CAPACITY_UNIT) * _CAPACITY_UNIT), dp.PADDING, np.int32)
    for row, batch in zip(padded, drawn):
        row[: len(batch)] = batch
    return padded


def train_heads(
    features: FeatureSet,
    points: Sequence[Point],
    *,
    steps: int,
    batch_size: int,
    optimizer: Optimizer,
    clipped_sum: ClippedHeadSum = _clipped_sum,
    head: Params | None = None,
    ema_decay: float = 0.9,
    at_once: int = 8,
) -> Heads:
    """Trains a head for every point of a grid.

    Args:
        features: the private data, in memory.
        points: the runs; all private, or none.
        steps: T of every run.
        batch_size: expected batch size B; the number of examples for full batches.
        optimizer: as `build.optimizer.optimizer` makes it, for these steps and this batch size.
        clipped_sum: how private gradients are clipped and summed. One of your own may read the
            state of the optimizer, which knows only what was released; its sensitivity is your
            claim. Like `optimizer`, it compiles once for each function.
        head: where every run starts, `initial_head` by default.
        ema_decay: of the average of the iterates, see `step.moving_average`.
        at_once: points trained together; memory grows with it, results do not depend on it.

    Returns:
        The heads.

    Guarantees:
        A point's head is the one that `loop.train` trains with its learning rate, rule, mechanism
        and private seed, up to rounding. Batches of Poisson sampling are never truncated. Each
        point costs its mechanism's epsilon, and nothing here charges it. Points of one seed share
        batches and noise: where two of them are released, their difference may cancel the noise,
        which costs more than the two epsilons.

    Raises:
        ValueError: points that do not fit the arguments or one another, naming the field.
    """
    _check(features, points, steps=steps, batch_size=batch_size)
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay} must be in [0, 1).")
    if at_once < 1:
        raise ValueError(f"at_once={at_once} must be >= 1.")
    head = head or initial_head(features.width, features.num_classes)
    rows = linear_head.rows(features.values, features.labels)
    batches = _batches(points, len(features), steps, batch_size)
    groups = _together(points, batches, at_once)
    size = max(len(group) for group in groups)
    done: dict[int, Any] = {}
    for group in groups:
        padded = [*group, *[group[-1]] * (size - len(group))]  # one shape: compiled once
        hypers = jax.tree.map(
            lambda *x: jnp.stack(x), *[_hyper(points[i], batch_size, ema_decay) for i in padded]
        )
        chosen = batches[points[group[0]].private_seed] if batches else None
        made = jax.device_get(
            _run(
                head, rows, chosen, hypers,
                optimizer=optimizer, clipped_sum=clipped_sum, steps=steps,
            )
        )  # fmt: skip
        for place, index in enumerate(group):
            done[index] = jax.tree.map(lambda x, at=place: x[at], made)
    return Heads(*jax.tree.map(lambda *x: np.stack(x), *[done[i] for i in range(len(points))]))


@functools.partial(jax.jit, static_argnames=("optimizer", "clipped_sum", "steps"))
def _run(
    head: Params,
    rows: linear_head.Rows,
    batches: jax.Array | None,
    hypers: Hyper,
    *,
    optimizer: Optimizer,
    clipped_sum: ClippedHeadSum,
    steps: int,
) -> tuple[Params, Params | None, dict[str, jax.Array]]:
    """All steps of several points on the same batches: (last iterates, averages, facts)."""

    def one(hyper: Hyper) -> tuple[Params, Params | None, dict[str, jax.Array]]:
        transform = optimizer(hyper)

        def step(
            state: TrainState, batch: jax.Array | None
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            here = rows if batch is None else rows.take(batch)
            mask = jnp.ones(here.labels.shape, bool) if batch is None else batch >= 0
            grads: Any
            if hyper.rule is None:
                grads, facts = linear_head.head_sum(state.trainable, here, mask)
            else:
                grads, facts = clipped_sum(state, hyper.rule, here, mask)
            after = apply_updates(transform, grads, state, hyper.ema_decay)
            return after, _summary(facts, hyper.rule)

        start = TrainState(jnp.zeros((), jnp.int32), head, transform.init(head), average=head)
        state, facts = jax.lax.scan(step, start, batches, length=steps)
        return state.trainable, state.average, facts

    return jax.vmap(one)(hypers)


def _summary(facts: dp.PerExample, rule: dp.ClipRule | None) -> dict[str, jax.Array]:
    sums = fact_sums(facts, rule)
    some = jnp.maximum(sums["count"], 1.0)
    # Not the sum over finite losses: a head that diverged is to be seen.
    loss = jnp.sum(facts.loss)
    return {"loss": loss / some, "clipped": sums["clipped"] / some, "count": sums["count"]}


def _hyper(point: Point, batch_size: int, ema_decay: float) -> Hyper:
    """The traced values of a run, as the loop makes them for its first phase."""
    mechanism = point.mechanism
    key = None if mechanism is None else jax.random.fold_in(seeds.noise_key(point.private_seed), 0)
    rule = point.rule
    if rule is not None:
        rule = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rule)
    return Hyper(
        learning_rate=jnp.float32(point.learning_rate),
        noise_multiplier=jnp.float32(mechanism.noise_multiplier if mechanism else 0.0),
        rule=rule,
        noise_key=key,
        augment_key=seeds.public_key(0, "augment"),
        batch_size=jnp.float32(mechanism.expected_batch_size if mechanism else batch_size),
        ema_decay=jnp.float32(ema_decay),
    )


def _is_full(point: Point, num_examples: int, batch_size: int) -> bool:
    if point.mechanism is not None:
        return isinstance(point.mechanism.sampler, dp.FullBatch)
    return batch_size == num_examples


def _batches(
    points: Sequence[Point], num_examples: int, steps: int, batch_size: int
) -> dict[int, jax.Array]:
    """The batches of every private seed, of one shape; empty for full batches."""
    if _is_full(points[0], num_examples, batch_size):
        return {}
    draw = functools.partial(draws, num_examples=num_examples, batch_size=batch_size)
    by_seed = {point.private_seed: point.mechanism for point in points}
    drawn = {
        seed: batch_indices(draw(mechanism, seeds.sampler_seed(seed)), steps)
        for seed, mechanism in sorted(by_seed.items())
    }
    capacity = max(indices.shape[1] for indices in drawn.values())
    return {
        seed: jnp.asarray(np.pad(a, ((0, 0), (0, capacity - a.shape[1])), constant_values=-1))
        for seed, a in drawn.items()
    }


def _together(
    points: Sequence[Point], batches: dict[int, jax.Array], at_once: int
) -> list[list[int]]:
    """Groups of point numbers that see the same batches, at most `at_once` in each."""
    order = sorted(range(len(points)), key=lambda i: points[i].private_seed if batches else 0)
    groups: list[list[int]] = []
    for _, same in itertools.groupby(order, lambda i: points[i].private_seed if batches else 0):
        members = list(same)
        groups += [members[i : i + at_once] for i in range(0, len(members), at_once)]
    return groups


def _check(features: FeatureSet, points: Sequence[Point], *, steps: int, batch_size: int) -> None:
    if not points:
        raise ValueError("points must not be empty.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be >= 1.")
    if not 1 <= batch_size <= len(features):
        raise ValueError(f"batch_size={batch_size} must be in [1, {len(features)}].")
    if len({point.mechanism is None for point in points}) > 1:
        raise ValueError("points must be all private or all without privacy.")
    first = points[0].mechanism
    for point in points:
        if point.mechanism is None or first is None:
            continue
        if dataclasses.replace(point.mechanism, noise_multiplier=1.0) != dataclasses.replace(
            first, noise_multiplier=1.0
        ):
            raise ValueError(f"{point.mechanism} and {first} may differ in noise_multiplier only.")
    if first is None:
        return
    for name, want in (("num_examples", len(features)), ("steps", steps)):
        if getattr(first, name) != want:
            raise ValueError(f"mechanism.{name}={getattr(first, name)} must be {want}.")
    if not dp.sampling.draws_size(first.sampler, batch_size):
        raise ValueError(f"batch_size={batch_size} must be {first.expected_batch_size:g}.")


def evaluate(params: Params, features: FeatureSet) -> list[dict[str, float]]:
    """Metrics of stacked heads on held-out features, one `metrics.summarize` per head.

    Args:
        params: `{head: {"kernel": [points, width, classes], "bias": [points, classes]}}`.
        features: the held-out data.
    """
    ((_, heads),) = params.items()
    points = heads["bias"].shape[0]
    totals: list[metrics.EvalSums | None] = [None] * points
    for rows in dp.chunks(np.arange(len(features)), min(_EVAL_ROWS, len(features))):
        inputs = jnp.asarray(features.values[rows])
        labels = jnp.asarray(features.labels[rows])
        sums = jax.device_get(_eval_sums(heads, inputs, labels, jnp.asarray(rows >= 0)))
        for i in range(points):
            part = jax.tree.map(lambda x, at=i: x[at], sums)
            before = totals[i]
            totals[i] = part if before is None else jax.tree.map(np.add, before, part)
    return [metrics.summarize(total) for total in totals if total is not None]


@jax.jit
def _eval_sums(
    heads: Params, inputs: jax.Array, labels: jax.Array, mask: jax.Array
) -> metrics.EvalSums:
    def one(head: Params) -> metrics.EvalSums:
        logits = inputs @ head["kernel"]
        logits = logits + jnp.broadcast_to(head["bias"], logits.shape)
        sums = metrics.eval_sums(logits, labels, mask, logits.shape[1])
        # Of many classes it is empty, and `lax.map` in batches fails on empty arrays (jax 0.10).
        return sums._replace(confusion=jnp.zeros(()))

    return jax.lax.map(one, heads, batch_size=8)
