"""The train loop: effects at the edge, everything else pure.

Training goes block by block. A block's steps are charged to the ledger, and the ledger is on disk,
before the first of them runs; so a crash can only make the statement report too much, never too
little. Batches and noise are functions of (seed, step): a resumed run executes the very steps the
lost run would have, and replays nothing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dpjax import data, dp, finetune, metrics, rng, sharding
from dpjax.build import Phase, Run
from dpjax.dp import ledger as dp_ledger
from dpjax.models import Params
from dpjax.step import Hyper, Steps, TrainState, eval_step, make_steps
from dpjax.storage import Workdir

__all__ = ["TrainingFailed", "describe", "train"]


_ADVICE = (
    "parameters or held-out loss are not finite after step {step}: lower "
    "optimizer.learning_rate={config.optimizer.learning_rate}."
)


class TrainingFailed(RuntimeError):
    """Raised when parameters are no longer finite; what was spent is in the statement."""


class _Chunk(NamedTuple):
    """One physical chunk, ready for the devices."""

    batch: dict[str, np.ndarray]
    last: bool  # of its step


def train(run: Run, workdir: Workdir) -> dict[str, Any]:
    """Trains, evaluates and writes the results.

    Args:
        run: from `build.build`.
        workdir: new, or a run of the same config, which is then resumed.

    Returns:
        The final evaluation, flat names to values.

    Raises:
        ValueError: the work directory holds another run.
        TrainingFailed: parameters became non-finite.
        dp.BudgetExceeded: a step beyond the budget was asked for.
    """
    config = run.config
    mesh = sharding.make_mesh()
    workdir.check(config)
    workdir.create(config, keep=config.keep_checkpoints)
    private_seed = _private_seed(run, workdir)
    evaluate = _evaluator(run, mesh)
    params, ledger = run.params, run.ledger
    try:
        for index, phase in enumerate(run.phases):
            params, ledger = _run_phase(
                run, phase, index, params, ledger, private_seed, workdir, mesh, evaluate
            )
    finally:
        workdir.close()
    sums = evaluate(params)
    results = metrics.summarise(sums)
    workdir.write("eval.json", {**results, "reliability": metrics.reliability(sums)._asdict()})
    workdir.save_weights(run.merge(params))
    return results


def _run_phase(
    run: Run,
    phase: Phase,
    index: int,
    params: Params,
    ledger: dp.Ledger | None,
    private_seed: int,
    workdir: Workdir,
    mesh: Mesh,
    evaluate: Callable[[Params], metrics.EvalSums],
) -> tuple[Params, dp.Ledger | None]:
    """Executes one phase from its start or from its last checkpoint."""
    config = run.config
    steps = make_steps(
        run.loss_fn,
        phase.optimizer,
        mesh,
        private=run.rule is not None,
        method=config.dp.method if config.dp is not None else "auto",
        microbatch_size=config.microbatch,
    )
    hyper = _hyper(run, phase, index, private_seed)
    trainable, frozen = jax.device_put(
        finetune.split(params, phase.trainable), sharding.replicated(mesh)
    )
    state = steps.init(trainable, hyper)
    start = 0
    restored = workdir.restore(state)
    if restored is not None:
        start, state = restored
        workdir.drop_metrics_after(start)
        if ledger is not None:
            ledger = ledger.charge(index, start)
    chunks = data.prefetch(_chunks(run, phase, private_seed, mesh, start), size=4)
    bar = tqdm(
        total=phase.steps, initial=start, desc=phase.name, unit="step", file=sys.stderr,
        dynamic_ncols=True, disable=jax.process_index() != 0,
    )  # fmt: skip
    with chunks, bar:
        for begin, end in _blocks(config, phase.steps, start):
            if ledger is not None:
                ledger = ledger.charge(index, end - begin)
                _write_statement(run, ledger, workdir)
            state = _run_block(
                run, steps, state, frozen, hyper, chunks, begin, end, workdir, bar, mesh
            )
            if end % config.checkpoint_every == 0 or end == phase.steps:
                workdir.save(end, state)
            if end % _eval_every(config, phase.steps) == 0 or end == phase.steps:
                results = metrics.summarise(evaluate(finetune.join(state.trainable, frozen)))
                row = {f"eval/{name}": value for name, value in results.items()}
                if ledger is not None:
                    row["epsilon"] = ledger.spent()
                workdir.append_metrics(end, {**row, "idle_fraction": chunks.idle_fraction})
                bar.set_postfix(_postfix(row))
                if not math.isfinite(results["nll"]):
                    raise TrainingFailed(_ADVICE.format(step=end, config=config))
    return finetune.join(state.trainable, frozen), ledger


def _run_block(
    run: Run,
    steps: Steps,
    state: TrainState,
    frozen: Params,
    hyper: Hyper,
    chunks: Iterator[_Chunk],
    begin: int,
    end: int,
    workdir: Workdir,
    bar: Any,
    mesh: Mesh,
) -> TrainState:
    """Executes steps begin..end-1. Facts are fetched one step late, so the devices never wait."""
    pending: tuple[int, dict[str, jax.Array]] | None = None
    clock = time.perf_counter()
    for step in range(begin, end):
        totals = steps.zeros(state.trainable)
        number = jnp.asarray(step, jnp.int32)
        while True:
            chunk = next(chunks)
            batch = sharding.to_mesh(chunk.batch, mesh)
            totals = steps.accumulate(totals, state.trainable, frozen, batch, number, hyper)
            if chunk.last:
                break
        state, facts = steps.update(state, totals, hyper)
        if pending is not None:
            _log(run, workdir, *pending, time.perf_counter() - clock)
            pending, clock = None, time.perf_counter()
        if (step + 1) % run.config.log_every == 0 or step + 1 == end:
            pending = (step + 1, facts)
        bar.update()
    if pending is not None:
        _log(run, workdir, *pending, time.perf_counter() - clock)
    return state


def _log(
    run: Run, workdir: Workdir, step: int, facts: dict[str, jax.Array], seconds: float
) -> None:
    """Writes one step's row, and stops a run whose parameters are not finite."""
    got = {name: float(value) for name, value in jax.device_get(facts).items()}
    count = max(got["count"], 1.0)
    row = {
        "nonprivate/loss": got["loss"] / count,
        "nonprivate/batch_size": got["count"],
        "nonprivate/dropped_examples": got["dropped"],
        "examples_per_second": got["count"] / seconds,
    }
    if run.rule is not None:
        row["nonprivate/grad_norm"] = got["norm"] / count
        row["nonprivate/clipped_fraction"] = got["clipped"] / count
    workdir.append_metrics(step, row)
    if not got["finite"]:
        raise TrainingFailed(_ADVICE.format(step=step, config=run.config))


def _blocks(config: Any, total: int, start: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of stretches that end at every checkpoint and every evaluation."""
    every = (config.checkpoint_every, _eval_every(config, total))
    while start < total:
        end = min([total, *((start // n + 1) * n for n in every)])
        yield start, end
        start = end


def _eval_every(config: Any, total: int) -> int:
    return config.eval_every or max(1, total // 10)


def _chunks(run: Run, phase: Phase, private_seed: int, mesh: Mesh, start: int) -> Iterator[_Chunk]:
    """Reads this host's rows of every physical chunk from step `start` on."""
    size = _physical(run, mesh)
    rows = sharding.local_rows(size, mesh)
    seed = rng.sampler_seed(private_seed)
    for step in range(start, phase.steps):
        if phase.mechanism is not None:
            indices = phase.mechanism.indices(seed, step)
        else:
            prob = run.config.batch_size / len(run.train)
            indices = dp.sampling.poisson(
                seed, step, num_examples=len(run.train), sampling_prob=prob
            )
        cut = dp.chunks(indices, size)
        for number, chunk in enumerate(cut):
            mine = chunk[rows]
            batch = run.train.get(mine)
            batch["index"] = np.maximum(mine, 0).astype(np.int32)
            batch["mask"] = mine >= 0
            yield _Chunk(batch, last=number == len(cut) - 1)


def _physical(run: Run, mesh: Mesh) -> int:
    """The physical batch, rounded up to whole microbatches on every device."""
    unit = mesh.size * (run.config.microbatch or 1)
    return -(-run.config.physical_batch // unit) * unit


def _evaluator(run: Run, mesh: Mesh) -> Callable[[Params], metrics.EvalSums]:
    """Returns the function that sums metrics over the whole held-out set."""
    step = eval_step(run.apply, run.train.num_classes, mesh)
    size = 4 * _physical(run, mesh)
    rows = sharding.local_rows(size, mesh)

    def evaluate(params: Params) -> metrics.EvalSums:
        total = None
        for chunk in dp.chunks(np.arange(len(run.test)), size):
            mine = chunk[rows]
            batch = sharding.to_mesh({**run.test.get(mine), "mask": mine >= 0}, mesh)
            sums = step(params, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise ValueError("the held-out set is empty.")
        return jax.device_get(total)

    return evaluate


def _hyper(run: Run, phase: Phase, index: int, private_seed: int) -> Hyper:
    """Traced values of a phase; each phase has a noise key of its own."""
    private = phase.mechanism is not None
    return Hyper(
        learning_rate=jnp.asarray(phase.learning_rate, jnp.float32),
        noise_multiplier=jnp.asarray(
            phase.mechanism.noise_multiplier if phase.mechanism else 0.0, jnp.float32
        ),
        rule=run.rule,
        noise_key=jax.random.fold_in(rng.noise_key(private_seed), index) if private else None,
        augment_key=jax.random.fold_in(rng.public_key(run.config.seed, "augment"), index),
    )


def _private_seed(run: Run, workdir: Workdir) -> int:
    """Returns the run's secret: from the config, from an earlier start, or from the system."""
    if run.ledger is None:
        return run.config.seed
    if run.config.private_seed is not None:
        return int(run.config.private_seed)
    if workdir.exists("private_seed.json"):
        return int(workdir.read("private_seed.json")["private_seed"])
    seed = rng.draw_private_seed()
    workdir.write("private_seed.json", {"private_seed": seed}, secret=True)
    return seed


def _write_statement(run: Run, ledger: dp.Ledger, workdir: Workdir) -> None:
    config = run.config
    facts = dp.statement(
        ledger,
        clipping=(
            f"{config.dp.clipping}, bound {config.dp.bound}"
            f"{', normalised to sensitivity 1' if config.dp.normalised else ''}"
        ),
        seed_policy="os_entropy" if config.private_seed is None else "fixed",
        released=[
            "the trained parameters in weights.safetensors and in every checkpoint",
            "the number of executed steps, and every evaluation on held-out data",
        ],
        not_charged=[
            "rows named nonprivate/... in metrics.jsonl: losses, norms and sizes of private "
            "batches",
            "the choice of hyperparameters, if private data was used to make it",
            "the number of training examples, which is taken as public",
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
    workdir.write("privacy.json", facts)
    workdir.write("privacy.md", dp_ledger.to_markdown(facts))


def _postfix(row: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": row["eval/nll"], "acc": row["eval/accuracy"]}
    if "epsilon" in row:
        shown["eps"] = row["epsilon"]
    return {name: f"{value:.3g}" for name, value in shown.items()}


def describe(run: Run) -> str:
    """Returns the plan of a run as aligned text, one fact a line."""
    config, phase = run.config, run.phases[0]
    trainable, frozen = finetune.split(run.params, phase.trainable)
    rows: dict[str, Any] = {
        "data set": f"{run.train.name}, split {run.train.split} (held out: {run.test.split})",
        "examples N": f"{len(run.train):,} (held out {len(run.test):,})",
        "classes": run.train.num_classes,
        "model": f"{config.model.name} {config.model.size}, weights {config.model.weights}",
        "parameters": f"{finetune.count(trainable):,} trainable ({config.finetune}), "
        f"{finetune.count(frozen):,} frozen",
        "steps T": f"{phase.steps:,} ({config.epochs:g} epochs)",
        "batch": f"{config.batch_size:,} expected, {config.physical_batch:,} physical",
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
            "sigma sqrt(T)": f"{mechanism.cumulative_noise:.2f}",
            "clipping": f"{config.dp.clipping}, bound {config.dp.bound:g}, "
            f"{'normalised' if config.dp.normalised else 'not normalised'}",
            "seed": "OS entropy"
            if config.private_seed is None
            else dp_ledger.SEED_POLICIES["fixed"],
        }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
