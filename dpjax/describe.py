"""A run in words: its plan, its privacy statement, and what must not change when it is resumed."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from dpjax import dp, finetune, rng
from dpjax.build import Run
from dpjax.dp import ledger as dp_ledger
from dpjax.models import Params

__all__ = ["describe", "identity", "ledger_after", "statement"]


def describe(run: Run) -> str:
    """Returns the plan of a run as aligned text, one fact a line."""
    config, phase = run.config, run.phases[-1]
    trainable, frozen = finetune.split(run.params, phase.trainable)
    rows: dict[str, Any] = {
        "data set": f"{run.train.name}, split {run.train.split} (held out: {run.test.split})",
        "examples N": f"{len(run.train):,} (held out {len(run.test):,})",
        "classes": run.train.num_classes,
        "model": f"{config.model.name} {config.model.size}, weights {config.model.weights}",
        "parameters": f"{finetune.count(trainable):,} trainable ({config.finetune}), "
        f"{finetune.count(frozen):,} frozen",
        "steps T": f"{sum(p.steps for p in run.phases):,} ({config.epochs:g} epochs"
        + "".join(f", {p.name} {p.steps:,}" for p in run.phases if len(run.phases) > 1)
        + ")",
        "batch": f"{config.batch_size:,} expected, {config.physical_batch or 'as many as fit'} "
        "physical",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
    }
    mechanism = phase.mechanism
    if mechanism is None:
        rows["privacy"] = "NONE: dp=None trains without privacy"
    else:
        rows |= {
            "budget": f"epsilon {config.dp.epsilon:g}, delta {config.dp.delta:g}",
            "neighbouring": mechanism.relation,
            "sampler": f"{mechanism.sampler}, q = {mechanism.sampling_prob:.6g}",
            "accountant": mechanism.accountant,
            "noise sigma": f"{mechanism.noise_multiplier:.4f}",
            "sigma sqrt(T)": f"{_cumulative_noise(run):.2f}",
            "clipping": f"{config.dp.clipping}, bound {config.dp.bound:g}, "
            f"{'normalised' if config.dp.normalised else 'not normalised'}",
            "clipping engine": _engine(run, trainable, frozen),
            "seed": "OS entropy"
            if config.private_seed is None
            else dp_ledger.SEED_POLICIES["fixed"],
        }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _cumulative_noise(run: Run) -> float:
    """sigma sqrt(T) over all phases."""
    squares = [p.mechanism.cumulative_noise**2 for p in run.phases if p.mechanism is not None]
    return math.sqrt(sum(squares))


def _engine(run: Run, trainable: Params, frozen: Params) -> str:
    """Says once which engine clips, and how many leaves take which route through it."""
    one = run.train.get(np.array([0]))
    example = {name: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for name, v in one.items()}
    example["key"] = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        return run.loss_fn(finetune.join(params, frozen), example)

    if run.config.dp.method == "vmap":
        return "vmap, as asked"
    reason = dp.bookkeeping.why_not(loss, trainable, example)
    if reason is not None:
        return f"vmap: {reason}"
    routes = collections.Counter(r.route for r in dp.bookkeeping.plan(loss, trainable, example))
    return "bookkeeping, leaves by route: " + ", ".join(
        f"{route} {count}" for route, count in routes.most_common()
    )


def ledger_after(run: Run, steps: int) -> dp.Ledger:
    """Returns the ledger of a run that has executed `steps` steps, phase after phase.

    Raises:
        dp.BudgetExceeded: the budget does not cover them.
    """
    ledger = run.ledger
    if ledger is None:
        raise ValueError("a run without privacy has no ledger.")
    for index, phase in enumerate(run.phases):
        ledger = ledger.charge(index, min(steps, phase.steps))
        steps -= min(steps, phase.steps)
    return ledger


def statement(run: Run, ledger: dp.Ledger) -> dict[str, Any]:
    """Returns the privacy statement of a run whose executed steps are in `ledger`."""
    config = run.config
    return dp.statement(
        ledger,
        clipping=(
            f"{config.dp.clipping}, bound {config.dp.bound}"
            f"{', normalised to sensitivity 1' if config.dp.normalised else ''}"
        ),
        seed_policy="os_entropy" if config.private_seed is None else "fixed",
        released=[
            "the trained parameters in weights.safetensors and in every checkpoint",
            "the number of executed steps, and every evaluation on public held-out data",
        ],
        not_charged=[
            "rows named nonprivate/... in metrics.jsonl: losses, norms and sizes of private "
            "batches",
            "the choice of hyperparameters, if private data was used to make it",
            "the number of training examples, which is taken as public",
            *(
                ["the evaluations: they are made on a part of the private training split"]
                if config.data.holdout is not None
                else []
            ),
            *(
                ["the choice of the training subset, which balances private labels"]
                if config.data.subset is not None
                else []
            ),
            "private_seed.json: whoever reads it can undo the noise. Keep it as secret as the data"
            if config.private_seed is None
            else "the private seed, which stands in config.json: its readers can undo the noise",
        ],
    )


def identity(run: Run, private_seed: int) -> dict[str, Any]:
    """Returns what a checkpoint of this run may only be continued with, as JSON values."""
    facts: dict[str, Any] = {
        "seed": run.config.seed,
        "data": run.train.digest,
        "num_examples": len(run.train),
        "phases": {
            f"{index}_{phase.name}": dataclasses.asdict(phase.mechanism)
            if phase.mechanism is not None
            else {"steps": phase.steps}
            for index, phase in enumerate(run.phases)
        },
    }
    if run.rule is not None and run.ledger is not None:
        facts |= {
            "epsilon": run.ledger.epsilon,
            "delta": run.ledger.delta,
            "private_seed": rng.digest(private_seed),
            "clipping": {
                "kind": run.rule.kind,
                "grouping": run.rule.grouping.__name__,
                "bound": np.asarray(run.rule.threshold).tolist(),
                "gamma": float(run.rule.gamma),
                "normalised": run.rule.normalised,
            },
        }
    return facts
