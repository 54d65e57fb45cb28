"""Attacks a run's own guarantee.

The config's run is executed again with canaries among its examples, each in or out by a coin, and
an attacker guesses the coins from what was trained. Too many right guesses refute the claimed
epsilon: the audit reports the largest epsilon that they refute, a lower bound on the true one
(`dpjax.dp.lower_bound`). A bound below the claim is no proof of it, for the attack may be weak.

What is bounded: (epsilon, delta) under adding or removing one example, of a run with the config's
sampler, sampling probability, steps, noise and clipping, on the config's examples and the canaries.
Its event does not depend on the number of examples, so its claim is the config's, and is computed
from the ledger of the audited run. The attacker knows every canary, and sees the parameters at the
start and at the end; of gradient canaries in one run, after every step (512 at most):

- "mislabeled": a held-out input with a wrong label. Score: how much its loss fell.
- "random": random pixels or tokens with a random label. Score: how much its loss fell.
- "gradient": an example whose gradient is along a coordinate of its own, an extra parameter that
  nothing else moves, and far beyond the clip bound. Score: the likelihood ratio of how that
  coordinate moved (`canaries.likelihoods`); with several runs, how far. It is the strongest: a
  worst case that no data set need hold, but that the guarantee covers.

With one run every canary has a coin of its own; with several there is a single canary, in every
second run (arXiv 2101.04535). Of one run, `estimators` in the report has

- "guesses": the right guesses about the coins, and nothing assumed (arXiv 2305.08846);
- "guesses, Gaussian": the same, if the mechanism's trade-off between the errors of a test is that
  of a Gaussian (arXiv 2410.22235);
- "ranks", of gradient canaries: how the scores of those that took part rank among 10,000 further
  coordinates that nothing moves, if the trade-off is Gaussian and the noise of the coordinates
  independent (`lower_bound.ranks_mu`);
- "moments", of gradient canaries: as ranks, of scores that are Gaussian (arXiv 2302.03098). It has
  no guarantee, and decides nothing.

What the audit claims is "ranks" for gradient canaries and "guesses" for others. It refutes the
mu of the plan, of which the claimed epsilon is a consequence: a run is refuted if mu is above the
accountant's. Seeds are never those of the run that is released:
equal noise under other examples would give the examples away. `audit.json` and `audit.png` are made
from runs on the private examples: releasing them costs the claimed epsilon once more for each run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

from dpjax import dp, files
from dpjax.audit.canaries import CANARIES, Game, likelihoods, make
from dpjax.build import Run, TrainingPhase
from dpjax.dp import lower_bound, seeds
from dpjax.models import Params, finetune
from dpjax.runtime import Workdir, hosts
from dpjax.step import TrainState
from dpjax.training import capacity, feed, phases

matplotlib.use("agg")
from matplotlib import pyplot as plt

__all__ = ["attach", "audit", "check", "check_arguments", "line", "refuted", "write"]

_CHECKPOINTS = 512  # the most that an attacker looks at, evenly spread


def audit(
    run: Run,
    *,
    canaries: str = "gradient",
    count: int = 500,
    runs: int = 1,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Audits a run; writes nothing.

    Args:
        run: from `build.build`, private, of a sampler whose claim is about adding or removing an
            example and does not depend on the number of examples, such as "poisson".
        canaries: one of `CANARIES`.
        count: canaries of a single run.
        runs: 1, or an even number >= 4 of runs with one canary in every second one.
        confidence: of the bound, in (0, 1).

    Returns:
        JSON values: `bound` (lower bound on epsilon), `estimators` (bounds by other ways, see the
        module), `confidence`, `claimed_epsilon` and `delta`
        of the audited run, what was done, and the scores.

    Guarantees:
        If the claim holds, `bound > claimed_epsilon` with probability at most 1 - confidence.

    Raises:
        ValueError: an argument or a run that cannot be audited, naming field and value.
    """
    ledger = check(run, canaries=canaries, count=count, runs=runs, confidence=confidence)
    single = runs == 1
    game = make(run, canaries, count if single else 1)
    coins = _coins(run, count) if single else np.arange(runs)[:, None] % 2 == 1
    private_seeds = _private_seeds(run, runs)
    scores, unused = [], np.zeros(0)
    with tqdm(
        total=runs * sum(phase.steps for phase in run.phases), desc="audit", unit="step",
        file=sys.stderr, dynamic_ncols=True, disable=jax.process_index() > 0,
    ) as bar:  # fmt: skip
        for seed, included in zip(private_seeds, coins.reshape(runs, -1), strict=True):
            played = game.run._replace(train=game.data(included))
            params, ledger, path = _train(played, seed, bar, game if single else None)
            if path is None:
                scores.append(game.scores(params))
            else:
                own, unused = likelihoods(path.values, count, *path.laws(run))
                scores.append(own)
    # Scores of a run that diverged are not finite and carry no information: they count as equal.
    found = np.nan_to_num(np.asarray(scores, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    unused = np.nan_to_num(unused, nan=0.0, posinf=0.0, neginf=0.0)
    facts: dict[str, Any] = {}
    if single:
        bound: Any = lower_bound.one_run(found[0], coins, delta=ledger.delta, confidence=confidence)
        facts = _estimates(ledger, bound.epsilon, found[0], coins, unused, confidence)
    else:
        inside = coins[:, 0]
        bound = lower_bound.many_runs(
            found[inside, 0], found[~inside, 0], delta=ledger.delta, confidence=confidence
        )
    return {
        "bound": bound.epsilon,
        **facts,
        "confidence": confidence,
        "claimed_epsilon": ledger.spent(),
        "delta": ledger.delta,
        "neighboring_relation": ledger.phases[0].mechanism.relation,
        "canaries": canaries,
        "count": count if single else 1,
        "runs": runs,
        "attacker_sees": "every canary, and the parameters "
        + ("after every step" if unused.size else "at the start and at the end"),
        "guesses": bound._asdict(),
        "steps_done": ledger.steps_done,
        "num_examples_without_canaries": len(run.train),
        "scores_in": found[coins.reshape(found.shape)],
        "scores_out": found[~coins.reshape(found.shape)],
    }


def _estimates(
    ledger: dp.Ledger,
    guesses: float,
    scores: np.ndarray,
    coins: np.ndarray,
    unused: np.ndarray,
    confidence: float,
) -> dict[str, Any]:
    """The bounds on epsilon of one run by every estimator, and the one that decides."""
    mus = {"guesses, Gaussian": lower_bound.guesses_mu(scores, coins, confidence=confidence)}
    if unused.size:
        for name, estimate in (
            ("ranks", lower_bound.ranks_mu), ("moments", lower_bound.moments_mu),
        ):  # fmt: skip
            mus[name] = estimate(scores[coins], unused, confidence=confidence)
    as_epsilon = {k: lower_bound.gaussian_epsilon(mu, ledger.delta) for k, mu in mus.items()}
    estimators = {"guesses": guesses, **as_epsilon}
    if not unused.size:
        return {"bound": guesses, "estimators": estimators, "mu": mus}
    claimed_mu, claimed = _claimed_mu(ledger), ledger.spent()
    # Epsilon of a Gaussian trade-off and that of the plan agree to a few percent; mu decides.
    if mus["ranks"] > claimed_mu:
        bound = max(estimators["ranks"], math.nextafter(claimed, math.inf))
    else:
        bound = min(estimators["ranks"], claimed)
    return {
        "bound": bound, "estimators": estimators, "mu": mus, "claimed_mu": claimed_mu,
        "unused_coordinates": unused.size,
    }  # fmt: skip


def _claimed_mu(ledger: dp.Ledger) -> float:
    """The smallest mu of which the plan's pairs (epsilon, delta) are those of a Gaussian.

    Ranks are about the middle of the trade-off, where delta is large, too.
    """
    mechanisms = [phase.mechanism for phase in ledger.phases if phase.part == "train"]
    steps = [m.steps for m in mechanisms]
    wide = [(dp.epsilon_of(mechanisms, steps, delta), delta) for delta in (0.15, 0.2, 0.3)]
    # Where epsilon is 0, a smaller delta would do, and the pair says nothing about mu.
    return max([ledger.membership()["gdp_mu"], *(dp.gdp_mu(*pair) for pair in wide if pair[0] > 0)])


def check(run: Run, *, canaries: str, count: int, runs: int, confidence: float) -> dp.Ledger:
    """Refuses what `audit` cannot do, before anything runs; returns the run's ledger."""
    check_arguments(canaries=canaries, count=count, runs=runs, confidence=confidence)
    if run.ledger is None:
        raise ValueError("dp=None: a run without privacy claims nothing to audit.")
    if run.vote is not None:
        raise ValueError(
            f"finetune={run.config.finetune!r}: an audit's runs hold no vote. Audit the blocks "
            "that it picked, the finetune of vote.json."
        )
    if canaries == "mislabeled" and runs == 1 and count > len(run.test):
        raise ValueError(f"count={count} must be <= the {len(run.test)} held-out examples.")
    if canaries == "mislabeled" and run.train.num_classes < 2:
        raise ValueError("canaries='mislabeled' needs two classes or more.")
    for phase in run.ledger.phases:
        sampler = phase.mechanism.sampler
        if sampler.relation != "add_or_remove_one" or not _of_any_size(sampler):
            raise ValueError(
                f"dp.sampler draws {sampler.title!r}: an audit needs a claim about adding or "
                "removing an example that does not depend on N, such as that of 'poisson'."
            )
    return run.ledger


def check_arguments(*, canaries: str, count: int, runs: int, confidence: float) -> None:
    """Refuses arguments that suit no run; no run is needed to see it."""
    files.choose("canaries", canaries, dict.fromkeys(CANARIES))
    if count < 1:
        raise ValueError(f"count={count} must be >= 1.")
    if runs != 1 and (runs < 4 or runs % 2):
        raise ValueError(f"runs={runs} must be 1, or an even number >= 4.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1).")


def refuted(report: dict[str, Any]) -> bool:
    """Whether an audit contradicts the claim."""
    return report["bound"] > report["claimed_epsilon"]


def line(report: dict[str, Any]) -> str:
    """Returns the result of an audit in one sentence, for `privacy.md`."""
    how = f"{report['runs']} runs" if report["runs"] > 1 else f"one run of {report['count']:,}"
    if "claimed_mu" in report:
        how += f": mu {report['mu']['ranks']:.3g} by ranks, {report['claimed_mu']:.3g} by the plan"
    return (
        f"audit: epsilon is at least {report['bound']:.3g} at confidence "
        f"{100 * report['confidence']:g} % ({report['canaries']} canaries, {how}); claimed "
        f"{report['claimed_epsilon']:.4g}. "
        + ("THE CLAIM IS REFUTED." if refuted(report) else "No contradiction, which is no proof.")
    )


def write(report: dict[str, Any], workdir: Path) -> None:
    """Writes `audit.json` and the distributions of the scores, `audit.png`."""
    place = Workdir(workdir)
    place.write("audit.json", report)
    if not place.writes:
        return
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    inside, outside = np.asarray(report["scores_in"]), np.asarray(report["scores_out"])
    edges = np.histogram_bin_edges(np.concatenate([inside, outside]), bins=40).tolist()
    axes.hist(outside, edges, alpha=0.6, color="C0", label=f"out ({outside.size})")
    axes.hist(inside, edges, alpha=0.6, color="C3", label=f"in ({inside.size})")
    axes.set(
        xlabel="score", ylabel="canaries" if report["runs"] == 1 else "runs",
        title=f"{report['canaries']} canaries (not private)\nepsilon at least "
        f"{report['bound']:.3g}, claimed {report['claimed_epsilon']:.4g}",
    )  # fmt: skip
    axes.legend()
    place.save_figure("audit.png", figure)
    plt.close(figure)


def attach(run: Run, workdir: Workdir) -> dict[str, Any]:
    """Audits a finished run as its config says, unless that was done, and states the result.

    Returns:
        The audit's result, as `audit.json` has it.
    """
    wanted = dict(run.config.audit)
    if wanted["runs"] > 1:
        wanted["count"] = 1
    known = workdir.read("audit.json") if workdir.exists("audit.json") else {}
    if any(known.get(name) != value for name, value in wanted.items()):
        write(audit(run, **run.config.audit), workdir.path)
    hosts.gather(None)  # one host wrote it
    report = workdir.read("audit.json")
    facts = {**dp.publishable(workdir.read("privacy.json")), "audit": line(report)}
    facts["not_charged"] += [
        f"{dp.AUDIT}, audit.json and audit.png: made from further runs on the private data "
        f"({wanted['runs']} for each audit), each of which costs the claimed epsilon once more",
    ]
    workdir.write("privacy.json", facts)
    workdir.write("privacy.md", dp.to_markdown(facts))
    return report


class _Path(NamedTuple):
    """What an attacker saw: `values` [checkpoints + 1, coordinates] after `steps`, 0 first."""

    values: np.ndarray
    steps: np.ndarray

    def laws(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Of each stretch: the probability of a canary in it, and how far it moves the sum."""
        per_step = [
            (phase.mechanism.sampling_prob, 1 / phase.mechanism.gradient_noise_multiplier)
            for phase in run.phases if phase.mechanism is not None
            for _ in range(phase.steps)
        ]  # fmt: skip
        prob, strength = np.array(per_step).T
        stretches = [slice(a, b) for a, b in itertools.pairwise(self.steps)]
        inside = [1 - np.prod(1 - prob[s]) for s in stretches]
        moves = [
            np.sum(prob[s] * strength[s]) / p / math.sqrt(s.stop - s.start)
            for s, p in zip(stretches, inside, strict=True)
        ]
        return np.array(inside), np.array(moves)


def _train(
    run: Run, private_seed: int, bar: tqdm, game: Game | None
) -> tuple[Params, dp.Ledger, _Path | None]:
    """Executes a run with the functions of the train loop, and charges it; keeps no files.

    Returns:
        Parameters, ledger and, where the game watches coordinates, where they were on the way.
    """
    ledger, params = run.ledger, run.params
    if ledger is None:
        raise ValueError("dp=None: a run without privacy has no ledger.")
    run = run._replace(phases=tuple(_of_size(phase, len(run.train)) for phase in run.phases))
    prepared = phases.prepare(run, private_seed)
    size = capacity.physical_batch(run.config, prepared, params, run.train)
    seed = seeds.sampler_seed(private_seed)
    state: TrainState | None = None
    total = sum(len(phase.span) for phase in prepared)
    seen = np.unique(np.linspace(0, total, min(total, _CHECKPOINTS) + 1).astype(int))
    path: list[np.ndarray | None] = [] if game is None else [game.watched(params)]
    watches = bool(path) and path[0] is not None
    for index, phase in enumerate(prepared):
        ledger = ledger.charge(index, len(phase.span))
        frozen, state = phase.begin(params, state)
        chunks = feed.physical_chunks(
            run.train,
            phase.phase,
            run.layout,
            seed=seed,
            size=size,
            steps=phase.span,
            first=phase.span.start,
        )
        for step in phase.span:
            state, *_ = phase.execute(state, frozen, step, chunks)
            bar.update()
            if watches and game is not None and step + 1 in seen:
                path.append(game.watched(run.layout.gather(state.trainable)))
        _, frozen = phase.split(params)
        params = finetune.join(run.layout.gather(state.trainable), frozen)
    return params, ledger, _Path(np.array(path), seen) if watches else None


def _of_size(phase: TrainingPhase, num_examples: int) -> TrainingPhase:
    """The phase with its sampler over `num_examples`, at the same probability."""
    if phase.mechanism is None:
        return phase
    sampler = dataclasses.replace(phase.mechanism.sampler, num_examples=num_examples)
    return phase._replace(mechanism=dataclasses.replace(phase.mechanism, sampler=sampler))


def _of_any_size(sampler: dp.Sampler) -> bool:
    """Whether a sampler can draw from more examples, and costs the same then."""
    try:
        more = dataclasses.replace(sampler, num_examples=sampler.num_examples + 1)
        return bool(more.event(1.0, 1) == sampler.event(1.0, 1))
    except (TypeError, ValueError):
        return False


def _coins(run: Run, count: int) -> np.ndarray:
    """A fair coin per canary, from the same source as the noise."""
    return np.random.default_rng(_fresh(run, "coins")).random(count) < 0.5


def _private_seeds(run: Run, count: int) -> list[int]:
    return [_fresh(run, f"run {number}") for number in range(count)]


def _fresh(run: Run, use: str) -> int:
    """A private seed from the operating system; where the run's is fixed, one derived from it."""
    fixed = run.config.private_seed
    if fixed is None:
        return int(hosts.first(seeds.draw_private_seed()))
    text = f"dpjax audit {fixed} {use}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
