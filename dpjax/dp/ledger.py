"""What was really executed, and the privacy statement made from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import log_ndtr, ndtr

from dpjax.dp import accounting, sampling
from dpjax.dp.mechanism import Mechanism, epsilon_of, shared_accountant
from dpjax.dp.noise import GaussianState

__all__ = [
    "AUDIT", "BudgetExceeded", "Ledger", "Phase", "gdp_mu", "noise_draws", "publishable",
    "statement", "to_markdown",
]  # fmt: skip

SEED_POLICIES = {
    "os_entropy": "OS entropy: drawn once for this run and kept secret with its checkpoints",
    "fixed": "fixed seed: for study, not for release",
}


class BudgetExceeded(RuntimeError):
    """Raised instead of executing a step that the budget does not cover."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One mechanism of a run, and how many of its steps were executed.

    Attributes:
        name: for people.
        mechanism: what is paid for.
        steps_done: executed steps.
        part: which part of the data it reads. Phases on one part compose. Different parts must be
            disjoint, and which part an example is in may depend on the example itself, never on
            which other examples there are.
    """

    name: str
    mechanism: Mechanism
    steps_done: int = 0
    part: str = "train"


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The executed steps of a run, phase after phase. Immutable; `charge` returns a new one.

    Attributes:
        phases: the phases in the order they run.
        epsilon: the budget in nats.
        delta: the budget's delta.

    Guarantees:
        No ledger exists whose executed steps exceed a phase's planned steps, or whose planned
        composition exceeds the budget. An example is in one part of the data. The phases that read
        a part compose; the run costs what its most expensive part does (parallel composition:
        adding or removing an example changes one part, and whatever reads another part learns of
        it only through releases that the first part has paid for). An example that replaces
        another may be in another part, so under "replace_one" there is one part.
    """

    phases: tuple[Phase, ...]
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases=() must hold a phase at least.")
        # The largest part: at a delta of 1 / N or more, a mechanism may publish an example.
        num_examples = max(p.mechanism.num_examples for p in self.phases)
        accounting.check_budget(self.epsilon, self.delta, num_examples=num_examples)
        shared_accountant([p.mechanism for p in self.phases])  # raises
        parts = sorted({p.part for p in self.phases})
        if len(parts) > 1 and self.relation == "replace_one":
            raise ValueError(
                f"parts={parts} must be one part under the relation 'replace_one': an example "
                "that replaces another may change two."
            )
        planned = max(self.planned_by_part().values())
        if not planned <= self.epsilon * (1 + 1e-9):
            raise ValueError(
                f"the planned steps cost epsilon={planned:.6g}, more than the budget "
                f"epsilon={self.epsilon:.6g} at delta={self.delta:g}."
            )
        self._check_steps()

    def _check_steps(self) -> None:
        for phase in self.phases:
            if not _is_count(phase.steps_done):
                raise ValueError(
                    f"steps_done={phase.steps_done!r} of phase {phase.name!r} must be a whole "
                    "number >= 0."
                )
            if phase.steps_done > phase.mechanism.steps:
                raise BudgetExceeded(
                    f"phase {phase.name!r} would execute step {phase.steps_done} of "
                    f"{phase.mechanism.steps}: the privacy budget is spent."
                )

    @property
    def relation(self) -> str:
        """The neighboring relation of the guarantee."""
        return self.phases[0].mechanism.relation

    @property
    def accountant(self) -> str:
        """The tightest accountant that knows all phases."""
        return shared_accountant([p.mechanism for p in self.phases])

    @property
    def steps_done(self) -> int:
        """Executed steps over all phases."""
        return sum(p.steps_done for p in self.phases)

    @property
    def steps_planned(self) -> int:
        """Steps paid for over all phases."""
        return sum(p.mechanism.steps for p in self.phases)

    def charge(self, phase: int, steps: int = 1) -> Ledger:
        """Returns the ledger after `steps` more steps of a phase, to be called BEFORE they run.

        Args:
            phase: its position in `phases`, from 0.
            steps: how many, >= 1.

        Raises:
            BudgetExceeded: the phase has fewer steps left.
            ValueError: an argument that is not a whole number, or is out of range.
        """
        if not _is_count(phase) or phase >= len(self.phases):
            raise ValueError(
                f"phase={phase!r} must be a whole number in 0..{len(self.phases) - 1}."
            )
        if not _is_count(steps) or not steps:
            raise ValueError(f"steps={steps!r} must be a whole number >= 1.")
        charged = list(self.phases)
        done = charged[phase].steps_done + steps
        charged[phase] = dataclasses.replace(charged[phase], steps_done=done)
        # The plan was checked at construction and has not changed: only the counts are checked.
        ledger = object.__new__(Ledger)
        for name, value in (
            ("phases", tuple(charged)), ("epsilon", self.epsilon), ("delta", self.delta),
        ):  # fmt: skip
            object.__setattr__(ledger, name, value)
        ledger._check_steps()
        return ledger

    def spent(self) -> float:
        """Returns epsilon (nats) of the executed steps at the budget's delta.

        It is a guarantee for a number of steps that was fixed beforehand; `guaranteed_by_part` is
        one for any.
        """
        return max(self.spent_by_part().values())

    def planned_by_part(self) -> dict[str, float]:
        """Returns epsilon (nats) of all planned steps, for an example of each part of the data."""
        return self._cost_by_part([p.mechanism.steps for p in self.phases])

    def guaranteed_by_part(self) -> dict[str, float]:
        """Returns what a run may claim that ended here, for an example of each part of the data.

        A run that ends early may do so because of what it released. Its outcome is then that of
        the whole plan, of which it shows a part, and costs what the plan does. A part of the data
        that no step has read costs nothing.
        """
        read = {phase.part for phase in self.phases if phase.steps_done}
        planned = self.planned_by_part()
        return {part: epsilon if part in read else 0.0 for part, epsilon in planned.items()}

    def spent_by_part(self) -> dict[str, float]:
        """Returns epsilon (nats) for an example of each part of the data."""
        return self._cost_by_part([p.steps_done for p in self.phases])

    def membership(self) -> dict[str, float]:
        """Bounds how well an adversary can guess whether one example took part in the whole plan.

        Every pair (epsilon, delta) of the accountant bounds the trade-off between the two errors of
        such a guess (Dong, Roth, Su 2019, arXiv 1905.02383, proposition 2.5); here a pair for each
        of several deltas, from the budget's up to 0.1.

        Returns:
            "tpr_at_fpr_0.001": an upper bound on the share of members that are recognized, if at
            most 0.001 of non-members are taken for members. "gdp_mu": the smallest mu such that
            mu-GDP allows all of these pairs.
        """
        # Charging changes nothing of the plan: one computation for all statements of a run.
        return dict(_membership(tuple((p.mechanism, p.part) for p in self.phases), self.delta))

    def _cost_by_part(self, steps: Sequence[int]) -> dict[str, float]:
        """Epsilon of so many steps of each phase, by part."""
        mechanisms = [p.mechanism for p in self.phases]
        return _cost_by_part(mechanisms, [p.part for p in self.phases], steps, self.delta)


def _cost_by_part(
    mechanisms: Sequence[Mechanism], parts: Sequence[str], steps: Sequence[int], delta: float
) -> dict[str, float]:
    """Epsilon of so many steps of each mechanism, by the part of the data that it reads."""
    accountant = shared_accountant(mechanisms)
    rows = list(zip(mechanisms, parts, steps, strict=True))
    return {
        part: epsilon_of(
            [m for m, p, _ in rows if p == part], [n for _, p, n in rows if p == part], delta,
            accountant=accountant,
        )
        for part in dict.fromkeys(parts)
    }  # fmt: skip


@functools.lru_cache(maxsize=16)
def _membership(plan: tuple[tuple[Mechanism, str], ...], delta: float) -> dict[str, float]:
    mechanisms, parts = zip(*plan)
    steps = [mechanism.steps for mechanism in mechanisms]
    pairs = []
    for d in map(float, np.geomspace(min(delta, 0.01), 0.1, 5)):
        pairs.append((max(_cost_by_part(mechanisms, parts, steps, d).values()), d))
    fpr = 0.001
    tpr = min(
        min(math.exp(min(e, 50.0)) * fpr + d, 1 - math.exp(-e) * (1 - d - fpr)) for e, d in pairs
    )
    return {"gdp_mu": max(itertools.starmap(gdp_mu, pairs)), "tpr_at_fpr_0.001": min(tpr, 1.0)}


def gdp_mu(epsilon: float, delta: float) -> float:
    """Returns the mu > 0 at which a Gaussian mechanism of sensitivity mu is (epsilon, delta)."""

    def delta_of(log_mu: float) -> float:  # arXiv 1905.02383, corollary 2.13
        mu = math.exp(log_mu)
        tail = log_ndtr(-epsilon / mu - mu / 2)
        return float(ndtr(-epsilon / mu + mu / 2) - math.exp(min(epsilon + tail, 0.0)))

    low, high = -20.0, 5.0  # delta_of rises
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) < delta else (low, middle)
    return math.exp(high)


def _is_count(value: Any) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= 0


def _noise_in_words(mechanisms: Sequence[Mechanism]) -> str:
    sizes = {m.secure_size for m in mechanisms}
    if None in sizes:
        return "Gaussian, float32, JAX threefry2x32 (not a cryptographic generator)"
    return (
        "secure: integers drawn from ChaCha20 under a 256-bit key and added to an exact sum of "
        "integers; each is within 2^-71, in total variation, of a Gaussian rounded to integers, "
        "and delta includes that distance. The guarantee holds for all bits of what is released. "
        "It assumes that ChaCha20 cannot be told from random bits, and that a gradient has the "
        "same bits in whatever row of a batch it is computed. Batches are drawn by Philox, which "
        "is not cryptographic"
    )


def noise_draws(state: Any) -> int:
    """Returns how many times the noise transforms in an optimizer's state have drawn noise.

    Args:
        state: any tree that holds states of `dp.gaussian`, such as that of an optax chain.

    Raises:
        ValueError: there is no state of a noise transform in it.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, GaussianState))
    counts = [int(leaf.step) for leaf in leaves if isinstance(leaf, GaussianState)]
    if not counts:
        raise ValueError("the optimizer state holds no state of a noise transform.")
    return sum(counts)


def statement(
    ledger: Ledger,
    *,
    clipping: str,
    seed_policy: str,
    released: Sequence[str],
    not_charged: Sequence[str],
    unit: str = "one training example",
    state: Any = None,
) -> dict[str, Any]:
    """Returns the privacy statement of a run as JSON-able values.

    Args:
        ledger: what was executed.
        clipping: the clipping rule in words.
        seed_policy: "os_entropy" or "fixed".
        released: what the guarantee covers.
        not_charged: what used private data outside the budget.
        unit: what neighboring data sets differ in, and the mechanism samples.
        state: the optimizer's state after the last step, or a list of the last states of all
            phases. Where given, the ledger must cover every draw of noise that it counts.

    Returns:
        The contents of `privacy.json`. `epsilon` is what the released results may claim: of a run
        that ended early, what was planned; `epsilon_of_steps_done` is that of the executed steps.
        Where all phases agree, `noise_multiplier` and the like are numbers, else lists in phase
        order.

    Raises:
        ValueError: no step was charged, or fewer than `state` executed; an unknown seed policy.
    """
    if state is not None and noise_draws(state) > ledger.steps_done:
        raise ValueError(
            f"{noise_draws(state)} steps drew noise, but {ledger.steps_done} are charged: charge "
            "every step before it runs, and keep the ledger that `charge` returns."
        )
    if not ledger.steps_done:
        raise ValueError(
            f"0 of {ledger.steps_planned} steps are charged: there is nothing to state. `charge` "
            "returns a new ledger; keep it, as in `ledger = ledger.charge(0)`."
        )
    if seed_policy not in SEED_POLICIES:
        raise ValueError(f"seed_policy={seed_policy!r} must be one of {sorted(SEED_POLICIES)}.")
    mechanisms = [p.mechanism for p in ledger.phases]

    def each(name: str) -> Any:
        values = [m.sampler.title if name == "sampler" else getattr(m, name) for m in mechanisms]
        return values[0] if len(set(values)) == 1 else values

    by_part = ledger.guaranteed_by_part()
    return {
        "epsilon": max(by_part.values()),
        "epsilon_of_steps_done": ledger.spent(),
        "delta": ledger.delta,
        "epsilon_budget": ledger.epsilon,
        "epsilon_by_part": by_part,
        "membership": ledger.membership(),
        "unit_of_privacy": unit,
        "neighboring_relation": ledger.relation,
        "sampler": each("sampler"),
        "accountant": ledger.accountant,
        "noise_multiplier": each("noise_multiplier"),
        "gradient_noise_multiplier": each("gradient_noise_multiplier"),
        "sampling_prob": each("sampling_prob"),
        "expected_batch_size": each("expected_batch_size"),
        "num_examples": each("num_examples"),
        "steps_done": ledger.steps_done,
        "steps_planned": ledger.steps_planned,
        "phases": [
            {
                **dataclasses.asdict(p.mechanism.sampler),
                "sampler": p.mechanism.sampler.title,
                "sampler_class": sampling.name_of(type(p.mechanism.sampler)),
                "sampling_prob": p.mechanism.sampling_prob,
                "num_examples": p.mechanism.num_examples,
                "noise_multiplier": p.mechanism.noise_multiplier,
                "gradient_noise_multiplier": p.mechanism.gradient_noise_multiplier,
                "count_noise": p.mechanism.count_noise,
                "secure_size": p.mechanism.secure_size,
                "name": p.name,
                "part": p.part,
                "steps_done": p.steps_done,
                "steps_planned": p.mechanism.steps,
            }
            for p in ledger.phases
        ],
        "clipping": clipping,
        "noise": _noise_in_words(mechanisms),
        "seed_policy": SEED_POLICIES[seed_policy],
        "released": list(released),
        "not_charged": list(not_charged),
    }


AUDIT = "the audit's line in this statement"
"""How the item of `not_charged` begins that says what publishing an audit's result costs."""


def publishable(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns a `statement` without what the guarantee does not cover: the result of an audit."""
    kept = {name: value for name, value in facts.items() if name != "audit"}
    return {**kept, "not_charged": [i for i in facts["not_charged"] if not i.startswith(AUDIT)]}


_PARTS = (
    "The private data is split into disjoint parts, each example by itself. An example is in one "
    "part only and pays for what reads that part, so the most expensive one counts, not the sum."
)
_RELATIONS = {
    "add_or_remove_one": "adding or removing {unit}",
    "replace_one": "replacing {unit} by another",
}


def _ended_early(facts: dict[str, Any]) -> list[str]:
    done, planned = facts["steps_done"], facts["steps_planned"]
    if done == planned:
        return []
    return [
        f"The run has executed {done} of {planned} steps. The claim is that of the plan, which "
        f"holds whatever made it stop; had {done} steps been the plan, they would cost epsilon "
        f"{facts['epsilon_of_steps_done']:.4g}.",
        "",
    ]


def to_markdown(facts: dict[str, Any]) -> str:
    """Renders a `statement` for people."""
    relation = _RELATIONS[facts["neighboring_relation"]].format(unit=facts["unit_of_privacy"])
    lines = [
        "# Privacy statement",
        "",
        f"The released results are **({facts['epsilon']:.4g}, {facts['delta']:g})-differentially "
        f"private** with respect to {relation}.",
        "",
        f"> {facts['seed_policy']}",
        "",
        *_ended_early(facts),
        "| | |",
        "|---|---|",
    ]
    rows = {
        "budget (epsilon, delta)": f"({facts['epsilon_budget']:g}, {facts['delta']:g})",
        "unit of privacy": facts["unit_of_privacy"],
        "sampler": facts["sampler"],
        "accountant": facts["accountant"],
        "size N of the training data, in units of privacy (public)": facts["num_examples"],
        "sampling probability q": facts["sampling_prob"],
        "expected batch size q N": facts["expected_batch_size"],
        "noise multiplier sigma": facts["noise_multiplier"],
        "of it, for gradients": facts["gradient_noise_multiplier"],
        "steps executed of planned": f"{facts['steps_done']} of {facts['steps_planned']}",
        "clipping": facts["clipping"],
        "noise": facts["noise"],
    }
    if "membership" in facts:
        known = facts["membership"]
        rows["guessing who took part"] = (
            f"recognizes {100 * known['tpr_at_fpr_0.001']:.2g} % of members at most, if 0.1 % of "
            f"others are taken for members (mu = {known['gdp_mu']:.3g} in Gaussian DP, as far as "
            "the accountant shows)"
        )
    if facts["gradient_noise_multiplier"] == facts["noise_multiplier"]:
        del rows["of it, for gradients"]
    if "audit" in facts:
        rows["audit"] = facts["audit"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    if len(facts["epsilon_by_part"]) > 1:
        lines += ["", "## Parts", "", _PARTS, ""]
        lines += [
            f"- {part}: epsilon {spent:.4g}" for part, spent in facts["epsilon_by_part"].items()
        ]
    lines += ["", "## Released under this guarantee", ""]
    lines += [f"- {item}" for item in facts["released"]]
    lines += ["", "## Not charged: outside this guarantee", ""]
    lines += [f"- {item}" for item in facts["not_charged"]]
    return "\n".join(lines) + "\n"
