"""What a config becomes: a `Run` of phases, as objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from dpjax import dp
from dpjax.build.planner import Plan
from dpjax.data import Dataset, Units, splits_overlap
from dpjax.models import Model, Params
from dpjax.runtime.sharding import Layout
from dpjax.step import Hyper, LossFn

__all__ = ["Run", "Temperature", "TrainingPhase", "Vote"]


class TrainingPhase(NamedTuple):
    """One stretch of training: what trains, for how long, under which mechanism.

    Attributes:
        name: "linear-probe" or "train"; with its number, where a training has several phases.
        training: number of the training that it belongs to. The phases of one training are stages
            of a schedule: the train state passes from one to the next unchanged.
        trainable: predicate on parameter paths.
        steps: number of updates.
        batch_size: B, as the config asks for it.
        bound: clip bound C; where it adapts, that of the run's first step.
        mechanism: None without privacy.
        optimizer: makes the transform from traced values; one object for all of a training.
        learning_rate: base learning rate.
        keep_optimizer: whether leaves that the previous training trained keep their optimizer
            state.
    """

    name: str
    training: int
    trainable: Callable[[str], bool]
    steps: int
    batch_size: int
    bound: float
    mechanism: dp.Mechanism | None
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    learning_rate: float
    keep_optimizer: bool = False

    @property
    def expected_batch_size(self) -> float:
        """The size of a batch on average: B, or N / t where an epoch has t steps."""
        return self.batch_size if self.mechanism is None else self.mechanism.expected_batch_size


class Temperature(NamedTuple):
    """How the softmax temperature is fitted after training.

    Attributes:
        data: examples that no phase reads.
        mechanism: of full batches of them.
        bound: on an example's derivative.
    """

    data: Dataset
    mechanism: dp.Mechanism
    bound: float


class Vote(NamedTuple):
    """How the blocks that train are chosen before training.

    Attributes:
        mechanism: one full batch, see `dp.noisy_vote`.
        number: of blocks to pick.
    """

    mechanism: dp.Mechanism
    number: int


class Run(NamedTuple):
    """A run as objects; see `build`.

    Attributes:
        config: the resolved config, for the record.
        train: training data, grouped by unit under user-level privacy; private unless `ledger` is
            None.
        test: held-out data.
        model: the model that runs.
        params: all parameters at the start.
        merge: turns trained parameters into plain weights.
        apply: `(params, stored inputs [batch, ...]) -> logits`, or `metrics.TokenFacts` of a
            language model.
        loss_fn: `(params, example) -> loss` of one example.
        rule: clipping rule, at the first phase's bound; None without privacy.
        adaptive: how the bound follows a quantile; None if it does not.
        temperature: None if no temperature is fitted.
        vote: None if the config says what trains. Else the phases train all candidates, until the
            loop has held the vote.
        batch_plan: why the batch size is what it is, if the config left it to the planner.
        phases: what is executed, in order.
        ledger: nothing executed yet; None without privacy.
        layout: where parameters, optimizer state and batches live.
    """

    config: ConfigDict
    train: Dataset | Units
    test: Dataset
    model: Model
    params: Params
    merge: Callable[[Params], Params]
    apply: Callable[[Params, jax.Array], Any]
    loss_fn: LossFn
    rule: dp.ClipRule | None
    adaptive: dp.QuantileBound | None
    temperature: Temperature | None
    vote: Vote | None
    batch_plan: Plan | None
    phases: tuple[TrainingPhase, ...]
    ledger: dp.Ledger | None
    layout: Layout

    @property
    def evaluates_on_private_data(self) -> bool:
        """Whether the held-out data may be of the training split: its metrics are not private."""
        train, test = self.train, self.test
        return train.name == test.name and splits_overlap(train.split, test.split)
