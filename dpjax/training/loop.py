"""The train loop: effects at the edge, everything else pure.

Training goes block by block. A block's steps are charged to the ledger, and the ledger is on disk,
before the first of them runs; so a crash can only make the statement report too much, never too
little. Batches and noise are functions of (seed, step): a resumed run executes the very steps the
lost run would have, and replays nothing. Steps are counted over all phases of a run.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from dpjax import data
from dpjax.build import Run
from dpjax.build.describe import identity, ledger_after, statement
from dpjax.config import differences
from dpjax.dp import seeds, to_markdown
from dpjax.metrics import EvalSums
from dpjax.models import Params, finetune
from dpjax.runtime import (
    Checkpoints,
    OtherRun,
    Unreadable,
    Workdir,
    code_digest,
    compilation,
    digest,
    hosts,
    sharding,
)
from dpjax.step import Hyper, Steps, TrainState, at_bound
from dpjax.training import capacity, feed, phases, results

__all__ = ["Preempted", "TrainingFailed", "train"]

_ADVICE = (
    "parameters or held-out loss are not finite after step {step}: lower "
    "optimizer.learning_rate={config.optimizer.learning_rate}."
)


class TrainingFailed(RuntimeError):
    """Raised when parameters are no longer finite; what was spent is in the statement."""


class Preempted(RuntimeError):
    """Raised when the run was asked to stop; it is saved, and the same command resumes it."""


def train(
    run: Run, workdir: Workdir, *, stop: Callable[[int], bool] = lambda step: False
) -> dict[str, Any]:
    """Trains, evaluates and writes the results; every host calls it alike.

    Args:
        run: from `build.build`.
        workdir: new, or a run of the same config, which is then resumed.
        stop: asked before every step; True saves the run and ends it.

    Returns:
        The final evaluation, flat names to values.

    Raises:
        OtherRun: the work directory or its checkpoint belong to another run.
        hosts.Disagreement: another host holds another run.
        TrainingFailed: parameters became non-finite.
        Preempted: `stop` said so.
        dp.BudgetExceeded: a step beyond the budget was asked for.
        OSError: a file could not be written.
        ValueError: the privacy of the run was planned for other data.
    """
    config = run.config
    workdir.check(config)
    hosts.agree({"config": digest(config), "data": run.train.digest, "code": code_digest()})
    for phase in run.phases:
        if phase.mechanism is not None and phase.mechanism.num_examples != len(run.train):
            raise ValueError(
                f"num_examples={phase.mechanism.num_examples} of phase {phase.name!r} must be that "
                f"of the training data, {len(run.train)}: give `build` the data it is for."
            )
    workdir.create(config)
    private_seed = _private_seed(run, workdir)
    _claim(run, workdir, private_seed)
    size = capacity.physical_batch(run, private_seed)
    eval_size = size if config.physical_batch == "auto" else 4 * size
    evaluate = feed.evaluator(run, run.layout, eval_size)
    with Checkpoints(
        workdir.path / "checkpoints",
        keep=config.keep_checkpoints,
        keep_best=config.keep_best,
        losses=workdir.losses(),
    ) as checkpoints:
        spending = _Spending(run, workdir)
        job = _Job(run, workdir, checkpoints, spending, private_seed, size, evaluate, stop)
        done, params, state = _resume(job)
        workdir.drop_metrics_after(done)
        first = 0
        for index, phase in enumerate(run.phases):
            span = range(first, first + phase.steps)
            first = span.stop
            if span.stop >= done:  # else its outcome is in the checkpoint
                params, state = _run_phase(job, index, span, params, state, done)
    fitting = 0 if run.temperature is None else run.temperature.mechanism.steps
    spending.record(first + fitting)
    return results.finish(
        run, workdir, params, state, evaluate=evaluate, private_seed=private_seed, size=eval_size
    )


class _Spending:
    """The privacy statement on disk, which is written ahead of the steps it reports."""

    def __init__(self, run: Run, workdir: Workdir) -> None:
        self._run, self._workdir = run, workdir
        known = workdir.read("privacy.json") if workdir.exists("privacy.json") else {}
        # A process that was killed may have executed all the steps that it had reported.
        self.charged = self._floor = int(hosts.first(known.get("steps_done", 0)))

    def record(self, steps: int, *, floor: int = 0) -> None:
        """Makes the statement report `steps` steps, or as many as an earlier process reported."""
        self._floor = max(self._floor, floor)
        self.charged = max(self._floor, steps)
        # A run that was stopped before its first step keeps the statement of the steps that it was
        # about to execute: too much, never too little.
        if self._run.ledger is not None and self.charged:
            facts = statement(self._run, ledger_after(self._run, self.charged))
            self._workdir.write("privacy.json", facts)
            self._workdir.write("privacy.md", to_markdown(facts))


class _Job(NamedTuple):
    """What all phases of a run share."""

    run: Run
    workdir: Workdir
    checkpoints: Checkpoints
    spending: _Spending
    private_seed: int
    size: int  # of a physical chunk
    evaluate: Callable[[Params], EvalSums]
    stop: Callable[[int], bool]


def _run_phase(
    job: _Job, index: int, span: range, params: Params, before: TrainState | None, done: int
) -> tuple[Params, TrainState]:
    """Executes the steps of `span` that are not done, from `params` or from a restored state.

    Returns:
        All parameters, and the state after the last step.
    """
    run, config, layout = job.run, job.run.config, job.run.layout
    phase = run.phases[index]
    steps, hyper = phases.prepare(run, index, job.private_seed)
    trainable, frozen = finetune.split(params, phase.trainable)
    frozen = sharding.place(frozen, layout.whole(frozen))
    start = max(span.start, done)
    if before is not None and done > span.start:
        state = before
    else:
        state = phases.first_state(run, index, steps, hyper, trainable, before)
    about = {
        "phase": index,
        "config": digest(config),
        "identity": identity(run, job.private_seed),
    }
    earlier = phases.trained_before(run, index, frozen)

    def save(step: int, loss: float | None = None) -> None:
        tree = {"state": state, "earlier": earlier}
        job.checkpoints.save(step, tree, {**about, "charged": job.spending.charged}, loss)

    chunks = feed.chunks(
        run, phase, layout, seed=seeds.sampler_seed(job.private_seed), size=job.size,
        steps=range(start, span.stop),
    )  # fmt: skip
    bar = tqdm(
        total=span.stop, initial=start, desc=phase.name, unit="step", file=sys.stderr,
        dynamic_ncols=True, disable=not job.workdir.writes,
    )  # fmt: skip
    with data.prefetch(chunks, size=4) as feeding, compilation.counting() as compiled, bar:
        for begin, end in _blocks(config, _total(run), range(start, span.stop)):
            job.spending.record(end)
            began = time.perf_counter()
            state, done = _run_block(job, steps, state, frozen, hyper, feeding, begin, end, bar)
            rate = (done - begin) * phase.batch_size / (time.perf_counter() - began)
            if done < end:
                job.spending.record(done)
                if done not in job.checkpoints.steps():
                    save(done)
                raise Preempted(f"stopped after step {done} as asked; the same command resumes.")
            loss = None
            if end % _eval_every(config, _total(run)) == 0 or end == span.stop:
                row: dict[str, Any] = results.row(run, job.evaluate, state, frozen)
                loss = row[f"{results.prefix(run)}nll"]
                if run.ledger is not None:
                    row["epsilon"] = ledger_after(run, end).spent()
                row["examples_per_second"] = rate
                row["idle_fraction"] = feeding.idle_fraction
                row["recompiles"] = compiled.beyond_first("accumulate", "update")
                job.workdir.append_metrics(end, row)
                bar.set_postfix(_postfix(row, results.prefix(run), rate))
                if not math.isfinite(loss):
                    raise TrainingFailed(_ADVICE.format(step=end, config=config))
            if (
                end % config.checkpoint_every == 0
                or end == span.stop
                or (config.keep_best and loss is not None)
            ):
                save(end, loss)
    return finetune.join(layout.gather(state.trainable), frozen), state


def _run_block(
    job: _Job,
    steps: Steps,
    state: TrainState,
    frozen: Params,
    hyper: Hyper,
    chunks: Iterator[feed.Chunk],
    begin: int,
    end: int,
    bar: Any,
) -> tuple[TrainState, int]:
    """Executes steps begin..end-1, or fewer if asked to stop; returns the state and the next step.

    Facts are fetched one step late, so that the devices never wait for the host.
    """
    pending: tuple[int, int, dict[str, jax.Array]] | None = None
    step = begin
    try:
        for step in range(begin, end):
            if job.stop(step):
                end = step
                break
            whole, totals = steps.begin(state)
            now = at_bound(hyper, state)
            number = jnp.asarray(step, jnp.int32)
            while True:
                chunk = next(chunks)
                batch = sharding.to_mesh(chunk.batch, job.run.layout.mesh)
                totals = steps.accumulate(totals, whole, frozen, batch, number, now)
                if chunk.last:
                    break
            state, facts = steps.update(state, totals, hyper)
            if pending is not None:
                _log(job, *pending)
                pending = None
            if (step + 1) % job.run.config.log_every == 0 or step + 1 == end:
                pending = (step + 1, chunk.rows, facts)
            bar.update()
        if pending is not None:
            _log(job, *pending)
    except Exception:
        with contextlib.suppress(OSError):  # a full disk: the statement reports too much, then
            job.spending.record(step + 1)
        raise
    return state, end


def _log(job: _Job, step: int, rows: int, facts: dict[str, jax.Array]) -> None:
    """Writes one step's row, and stops a run whose parameters are not finite."""
    got = {name: float(value) for name, value in jax.device_get(facts).items()}
    count = max(got["count"], 1.0)
    row = {
        "nonprivate/loss": got["loss"] / count,
        "nonprivate/batch_size": got["count"],
        "nonprivate/dropped_examples": got["dropped"],
        "nonprivate/padding_fraction": 1 - got["count"] / rows,
    }
    if job.run.rule is not None:
        row["nonprivate/grad_norm"] = got["norm"] / count
        row["nonprivate/clipped_fraction"] = got["clipped"] / count
    if "bound" in got:
        row["clip_bound"] = got["bound"]
    job.workdir.append_metrics(step, row)
    if got["diverged"]:
        raise TrainingFailed(_ADVICE.format(step=step - 1, config=job.run.config))


def _postfix(row: dict[str, Any], begin: str, examples_per_second: float) -> dict[str, str]:
    loss, accuracy = row[f"{begin}nll"], row[f"{begin}accuracy"]
    shown = {"loss": loss, "acc": accuracy, "ex/s": examples_per_second}
    if "epsilon" in row:
        shown["eps"] = row["epsilon"]
    return {name: f"{value:.3g}" for name, value in shown.items()}


def _blocks(config: Any, total: int, steps: range) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of stretches that end at every checkpoint and every evaluation."""
    every = (config.checkpoint_every, _eval_every(config, total))
    start = steps.start
    while start < steps.stop:
        end = min([steps.stop, *((start // n + 1) * n for n in every)])
        yield start, end
        start = end


def _eval_every(config: Any, total: int) -> int:
    return config.eval_every or max(1, total // 10)


def _total(run: Run) -> int:
    return sum(phase.steps for phase in run.phases)


def _resume(job: _Job) -> tuple[int, Params, TrainState | None]:
    """Returns (executed steps, parameters, state) of the latest checkpoint that can be read."""
    run, checkpoints = job.run, job.checkpoints
    for step in checkpoints.steps():
        problem = None
        try:
            about = checkpoints.about(step)
            changed = differences(about["identity"], identity(run, job.private_seed), "run")
            if changed:
                raise OtherRun(f"checkpoint {step} is of another run: {'; '.join(changed[:5])}.")
            like = phases.checkpoint_like(run, about["phase"], job.private_seed)
            tree = checkpoints.load(step, like)
        except Unreadable as error:
            problem = str(error)
        problems = [text for text in hosts.gather(problem) if text is not None]
        if not problems:
            job.spending.record(step, floor=about["charged"])
            return step, results.overlay(run.params, tree["earlier"]), tree["state"]
        print(f"warning: {problems[0]}. Falling back to the one before.", file=sys.stderr)
        checkpoints.set_aside(step)
        hosts.gather(None)  # nobody looks before it is done
        checkpoints.reload()
    return 0, run.params, None


def _claim(run: Run, workdir: Workdir, private_seed: int) -> None:
    """Writes what run the directory is of, or compares: the data may have changed under a name."""
    mine = identity(run, private_seed)
    if workdir.exists("identity.json"):
        changed = differences(workdir.read("identity.json"), mine, "run")
        if changed:
            raise OtherRun(f"the workdir is of another run: {'; '.join(changed[:5])}.")
    workdir.write("identity.json", mine)


def _private_seed(run: Run, workdir: Workdir) -> int:
    """Returns the run's secret: from the config, from an earlier start, or from the system."""
    if run.ledger is None:
        return int(run.config.seed)
    if run.config.private_seed is not None:
        return int(run.config.private_seed)
    return int(hosts.first(workdir.private_seed(seeds.draw_private_seed)))
