"""The train loop. It does the reading and writing; everything it calls in between is pure.

Training runs in blocks of steps. Before a block starts, its steps are charged and the privacy
statement is written to disk, so after a crash the statement may report too many steps but never too
few. Batches and noise are functions of (seed, step): a resumed run executes the steps that the
interrupted run would have executed, and repeats none with other noise. Steps are counted over all
phases of a run.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from dpjax import data
from dpjax.build import Run
from dpjax.build.describe import identity, ledger_after, run_statement
from dpjax.dp import seeds, to_markdown
from dpjax.models import Params, finetune
from dpjax.runtime import (
    Checkpoints,
    OtherRun,
    Unreadable,
    Workdir,
    code_digest,
    compilation,
    hosts,
    json_digest,
    rows,
)
from dpjax.step import TrainState
from dpjax.training import capacity, check, feed, phases, results, vote

__all__ = ["Preempted", "TrainingFailed", "train"]

_ADVICE = (
    "parameters or held-out loss are not finite after step {step}: lower "
    "optimizer.learning_rate={config.optimizer.learning_rate}."
)


class TrainingFailed(RuntimeError):
    """Raised when parameters are no longer finite; the statement reports the steps that ran."""


class Preempted(RuntimeError):
    """Raised after a requested stop: the run is saved, and the same command resumes it."""


def train(
    run: Run, workdir: Workdir, *, stop: Callable[[int], bool] = lambda step: False
) -> dict[str, Any]:
    """Trains, evaluates and writes the results; every host makes the same call.

    Args:
        run: from `build.build`.
        workdir: a new directory, or one with a run of the same config, which is then resumed.
        stop: called with the step number before every step; True saves the run and stops.

    Returns:
        The final evaluation, flat names to values.

    Raises:
        dp.EngineMismatch: the clipping engine is wrong about this model.
        OtherRun: the work directory or its checkpoint belongs to another run, or another process
            works there.
        hosts.Disagreement: another host has another config, other data or other code.
        TrainingFailed: parameters became non-finite.
        Preempted: `stop` returned True.
        dp.BudgetExceeded: the next step would exceed the budget.
        OSError: a file could not be written.
        rows.CannotWrite: what `config.log_to` names cannot be opened.
        ValueError: the mechanism was planned for another number of examples.
    """
    config = run.config
    workdir.check(config)
    # Salted, for the message: a plain digest would confirm a guess of the private data.
    salt = hosts.first(secrets.token_hex(16))
    data_digest = json_digest([salt, run.train.digest])
    hosts.agree({"config": json_digest(config), "data": data_digest, "code": code_digest()})
    for phase in run.phases:
        if phase.mechanism is not None and phase.mechanism.num_examples != len(run.train):
            raise ValueError(
                f"num_examples={phase.mechanism.num_examples} of phase {phase.name!r} must equal "
                f"the {len(run.train)} training examples: call `build` with the data to train on."
            )
    check.engines(run)  # before the directory exists: a mismatch leaves nothing behind
    with workdir.lock():
        workdir.create(config)
        return _train(run, workdir, stop)


def _train(run: Run, workdir: Workdir, stop: Callable[[int], bool]) -> dict[str, Any]:
    """Trains in a directory that no other process uses."""
    config = run.config
    private_seed = _private_seed(run, workdir)
    name = workdir.claim(identity(run, private_seed))
    spending = _Spending(run, workdir)
    if run.vote is not None:
        spending.record(0)  # on disk before the vote, which precedes the first step
        run = vote.decided(run, workdir, private_seed)
        check.engines(run)  # on what trains now, which is less than what stood to vote
    prepared = phases.prepare(run, private_seed)
    size = capacity.physical_batch(config, prepared, run.params, run.train)
    eval_size = size if config.physical_batch == "auto" else 4 * size
    evaluate = feed.Evaluator(run.apply, run.test, run.train.num_classes, run.layout, eval_size)
    with (
        contextlib.ExitStack() as stack,
        Checkpoints(
            workdir.path / "checkpoints",
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            losses=workdir.losses(),
        ) as checkpoints,
    ):
        job = _Job(
            run, workdir, checkpoints, spending, private_seed, name, prepared, size, evaluate, stop
        )
        done, params, state = _resume(job)
        workdir.drop_metrics_after(done or -1)
        job = job._replace(write=_writers(job, stack, done))
        for index, one in enumerate(prepared):
            # A phase that ended at `done` is entered too: it executes no step, but rebuilds all
            # parameters from its final state. What earlier phases trained is in the checkpoint.
            if one.span.stop >= done:
                params, state = _run_phase(job, index, params, state, done)
    # The temperature's release is charged before it is made, like a step.
    fitting = 0 if run.temperature is None else run.temperature.mechanism.steps
    spending.record(_total(run) + fitting)
    return results.finish(run, workdir, params, state, evaluate=evaluate, private_seed=private_seed)


class _Spending:
    """The privacy statement on disk, always written before the steps it reports."""

    def __init__(self, run: Run, workdir: Workdir) -> None:
        self._run, self._workdir = run, workdir
        known = workdir.read("privacy.json") if workdir.exists("privacy.json") else {}
        # A killed process may have executed every step that it had reported, so a later statement
        # must never report fewer. A vote is no step of training, but one of the ledger.
        first = 0 if run.vote is None else run.vote.mechanism.steps
        self.charged = self._floor = max(0, int(hosts.first(known.get("steps_done", 0))) - first)

    def record(self, steps: int, *, floor: int = 0) -> None:
        """Writes a statement of `steps` steps, or of as many as an earlier process reported."""
        self._floor = max(self._floor, floor)
        self.charged = max(self._floor, steps)
        # A run that was stopped before its first step keeps the statement of the steps that it was
        # about to execute: too much, never too little.
        if self._run.ledger is not None and (self.charged or self._run.vote is not None):
            facts = run_statement(self._run, ledger_after(self._run, self.charged))
            self._workdir.write("privacy.json", facts)
            self._workdir.write("privacy.md", to_markdown(facts))


class _Job(NamedTuple):
    """The objects that all phases of a run share."""

    run: Run
    workdir: Workdir
    checkpoints: Checkpoints
    spending: _Spending
    private_seed: int
    name: str  # of the run, in its directory and its checkpoints
    prepared: tuple[phases.Prepared, ...]
    size: int  # of a physical chunk
    evaluate: feed.Evaluator
    stop: Callable[[int], bool]
    write: rows.Write = lambda step, values: None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a row to `metrics.jsonl`, and to what `config.log_to` names."""
        self.workdir.append_metrics(step, values)
        self.write(step, values)


def _writers(job: _Job, stack: contextlib.ExitStack, done: int) -> rows.Write:
    """Opens what `config.log_to` names on process 0; if that fails, all processes raise."""
    write, problem = job.write, None
    if job.workdir.writes:
        try:
            writers = rows.opened(
                job.run.config.log_to, job.workdir.path, name=job.name, after=done
            )
            write = stack.enter_context(writers)
        except rows.CannotWrite as error:
            problem = str(error)
    problem = hosts.first(problem)
    if problem is not None:
        raise rows.CannotWrite(problem)
    return write


def _run_phase(
    job: _Job, index: int, params: Params, before: TrainState | None, done: int
) -> tuple[Params, TrainState]:
    """Executes the steps of a phase that have not been executed yet.

    Args:
        job: shared objects.
        index: number of the phase.
        params: all parameters at its start.
        before: the state restored from a checkpoint, or the last state of the previous phase.
        done: steps executed before this process began.

    Returns:
        All parameters, and the state after the last step.
    """
    run, config = job.run, job.run.config
    prepared = job.prepared[index]
    phase, span = prepared.phase, prepared.span
    start = max(span.start, done)
    frozen, state = prepared.begin(params, before, restored=done > span.start)
    about = {"phase": index, "run": job.name}
    earlier = prepared.earlier(frozen)

    def save(step: int, loss: float | None = None) -> None:
        tree = {"state": state, "earlier": earlier}
        job.checkpoints.save(step, tree, {**about, "charged": job.spending.charged}, loss)

    if not done and not index:  # what training starts from, as step 0
        row = results.row(run, job.evaluate, state, frozen)
        job.log(0, row if run.ledger is None else {**row, "epsilon": 0.0})

    chunks = feed.physical_chunks(
        run.train, phase, run.layout, seed=seeds.sampler_seed(job.private_seed), size=job.size,
        steps=range(start, span.stop), first=span.start,
    )  # fmt: skip
    bar = tqdm(
        total=span.stop, initial=start, desc=phase.name, unit="step", file=sys.stderr,
        dynamic_ncols=True, disable=not job.workdir.writes,
    )  # fmt: skip
    with data.Prefetcher(chunks, size=4) as feeding, compilation.counting() as compiled, bar:
        for begin, end in _blocks(config, _total(run), range(start, span.stop)):
            job.spending.record(end)  # on disk before the block's first step runs
            began = time.perf_counter()
            state, done = _run_block(job, prepared, state, frozen, feeding, begin, end, bar)
            rate = (done - begin) * phase.batch_size / (time.perf_counter() - began)
            if done < end:  # `stop` returned True; the rest of the block was not executed
                job.spending.record(done)
                if done not in job.checkpoints.steps():
                    save(done)
                raise Preempted(f"stopped after step {done} as asked; the same command resumes.")
            loss = None
            if end % _eval_every(config, _total(run)) == 0 or end == span.stop:
                row = results.row(run, job.evaluate, state, frozen)
                loss = row[f"{results.prefix(run)}nll"]
                if run.ledger is not None:
                    row["epsilon"] = ledger_after(run, end).spent()
                row["examples_per_second"] = rate
                row["idle_fraction"] = feeding.idle_fraction
                row["recompiles"] = compiled.beyond_first("accumulate", "update")
                job.log(end, row)
                bar.set_postfix(_postfix(row, results.prefix(run), rate))
                if not math.isfinite(loss):
                    raise TrainingFailed(_ADVICE.format(step=end, config=config))
            if (
                end % config.checkpoint_every == 0
                or end == span.stop
                or (config.keep_best and loss is not None)
            ):
                save(end, loss)
    _, frozen = prepared.split(params)  # of the host: on the devices they may be sharded
    return finetune.join(run.layout.gather(state.trainable), frozen), state


def _run_block(
    job: _Job,
    prepared: phases.Prepared,
    state: TrainState,
    frozen: Params,
    chunks: Iterator[feed.Chunk],
    begin: int,
    end: int,
    bar: Any,
) -> tuple[TrainState, int]:
    """Executes steps begin to end - 1, or fewer if asked to stop.

    Returns:
        The state, and the number of the next step.
    """
    # JAX runs ahead of Python: reading a step's facts waits for that step. They are therefore read
    # only after the next step has been dispatched, so that the devices always have work.
    pending: tuple[int, int, dict[str, jax.Array]] | None = None
    step = begin
    try:
        for step in range(begin, end):
            if job.stop(step):
                end = step
                break
            state, facts, count = prepared.execute(state, frozen, step, chunks)
            if pending is not None:
                _log(job, *pending)
                pending = None
            if (step + 1) % job.run.config.log_every == 0 or step + 1 == end:
                pending = (step + 1, count, facts)
            bar.update()
        if pending is not None:
            _log(job, *pending)
    except Exception:
        # Corrects the statement from the whole block to the steps that may have run. If the disk is
        # full, the statement keeps reporting the whole block, which is too much and so is valid.
        with contextlib.suppress(OSError):
            job.spending.record(step + 1)
        raise
    return state, end


def _log(job: _Job, step: int, rows_read: int, facts: dict[str, jax.Array]) -> None:
    """Writes one step's row, and stops a run whose parameters are not finite."""
    sums = {name: float(value) for name, value in jax.device_get(facts).items()}
    count = max(sums["count"], 1.0)  # a Poisson batch may be empty
    row = {
        "nonprivate/loss": sums["loss"] / count,
        "nonprivate/batch_size": sums["count"],
        "nonprivate/dropped_examples": sums["dropped"],
        "nonprivate/padding_fraction": 1 - sums["count"] / rows_read,
    }
    if job.run.rule is not None:
        row["nonprivate/grad_norm"] = sums["norm"] / count
        row["nonprivate/clipped_fraction"] = sums["clipped"] / count
    if "bound" in sums:
        row["clip_bound"] = sums["bound"]  # may be released: it follows from noisy counts
    job.log(step, row)
    # "diverged" is checked on the parameters before the step: the step before it is to blame.
    if sums["diverged"]:
        raise TrainingFailed(_ADVICE.format(step=step - 1, config=job.run.config))


def _postfix(row: dict[str, Any], begin: str, examples_per_second: float) -> dict[str, str]:
    label = begin.removesuffix("eval/")
    shown = {f"{label}loss": row[f"{begin}nll"], f"{label}acc": row[f"{begin}accuracy"]}
    shown["ex/s"] = examples_per_second
    if "epsilon" in row:
        shown["eps"] = row["epsilon"]
    return {name: f"{value:.3g}" for name, value in shown.items()}


def _blocks(config: Any, total: int, steps: range) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of blocks that end at every checkpoint and every evaluation."""
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
    """Returns (executed steps, parameters, state) of the latest readable checkpoint."""
    run, checkpoints = job.run, job.checkpoints
    for step in checkpoints.steps():
        problem = None
        try:
            about = checkpoints.about(step)
            if about["run"] != job.name:
                raise OtherRun(f"checkpoint {step} belongs to another run.")
            like = phases.checkpoint_like(job.prepared[about["phase"]], run.params)
            tree = checkpoints.load(step, like)
        except Unreadable as error:
            problem = str(error)
        # All hosts must resume from the same step: one that cannot read it is enough to skip it.
        problems = [text for text in hosts.gather(problem) if text is not None]
        if not problems:
            # `privacy.json` may be lost or older than the checkpoint; its own count is the floor.
            job.spending.record(step, floor=about["charged"])
            return step, results.overlay(run.params, tree["earlier"]), tree["state"]
        print(f"warning: {problems[0]}. Falling back to the one before.", file=sys.stderr)
        checkpoints.set_aside(step)
        hosts.gather(None)  # a barrier: host 0 renames before any host lists the directory again
        checkpoints.reload()
    return 0, run.params, None


def _private_seed(run: Run, workdir: Workdir) -> int:
    """Returns the run's secret seed: from the config, an earlier start, or the operating system."""
    if run.ledger is None:
        return int(run.config.seed)
    if run.config.private_seed is not None:
        return int(run.config.private_seed)
    return int(hosts.first(workdir.private_seed(seeds.draw_private_seed)))
