"""The law of the samplers, their contract, random access, and the cut into physical chunks."""

import dataclasses
from typing import ClassVar

import dp_accounting as dpa
import numpy as np
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import sampling

ALPHA = 1e-6


def poisson(step, n=200, q=0.1, seed=7):
    return dp.Poisson(num_examples=n, sampling_prob=q).indices(seed, step)


def truncated(most, n=200, q=0.1):
    return dp.TruncatedPoisson(num_examples=n, sampling_prob=q, max_batch_size=most)


def test_poisson_law():
    """Sizes are binomial; inclusion is equal for all examples and independent in pairs."""
    n, q, steps = 200, 0.1, 4000
    member = np.zeros((steps, n))
    for step in range(steps):
        member[step, poisson(step, n, q)] = 1
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() - n * q) < 5 * np.sqrt(n * q * (1 - q) / steps)
    variance = n * q * (1 - q)
    assert abs(sizes.var() / variance - 1) < 5 * np.sqrt(2 / steps)
    counts = member.sum(axis=0)
    statistic = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert stats.chi2.sf(statistic, n) > ALPHA
    pair = (member[:, :-1] * member[:, 1:]).mean(axis=0)
    assert np.abs(pair - q * q).max() < 6 * np.sqrt(q * q / steps)


def test_the_law_check_sees_a_shuffled_epoch():
    """Disjoint batches of one permutation: right frequency, but sizes never vary."""
    order = np.random.default_rng(0).permutation(200).reshape(10, 20)
    sizes = np.array([len(order[t % 10]) for t in range(4000)])
    assert abs(sizes.var() / (200 * 0.1 * 0.9) - 1) > 5 * np.sqrt(2 / 4000)


def test_random_access_and_secrecy():
    np.testing.assert_array_equal(poisson(5), poisson(5))
    assert not np.array_equal(poisson(5), poisson(6))
    assert not np.array_equal(poisson(5, seed=2**127), poisson(5, seed=2**127 + 1))


def test_indices_are_sorted_and_distinct():
    for step in range(50):
        indices = poisson(step)
        assert (np.diff(indices) > 0).all()
        assert indices.dtype == np.int64


def test_empty_and_full_draws():
    sizes = [len(poisson(step, n=5, q=0.1)) for step in range(100)]
    assert min(sizes) == 0
    assert max(sizes) > 1
    np.testing.assert_array_equal(poisson(0, n=5, q=1.0), np.arange(5))


def test_large_sets_are_fast_enough_to_draw_per_step():
    """O(batch), not O(N): a billion examples would not fit in memory otherwise."""
    indices = poisson(2, n=10**9, q=1e-6)
    assert 700 < len(indices) < 1300


def test_fixed_size():
    sampler = dp.FixedSize(num_examples=50, batch_size=10)
    batches = [sampler.indices(3, t) for t in range(2000)]
    assert all(len(set(b)) == 10 for b in batches)
    counts = np.bincount(np.concatenate(batches), minlength=50)
    # A hypergeometric count has a smaller variance than the chi-square's; the bound is safe.
    assert stats.chi2.sf(((counts - 400) ** 2 / 400).sum(), 49) > ALPHA


def test_truncated_poisson_never_exceeds_and_is_poisson_below():
    sizes = [len(truncated(22).indices(1, t)) for t in range(500)]
    full = [len(poisson(t, seed=1)) for t in range(500)]
    assert max(sizes) == 22
    assert sizes == [min(s, 22) for s in full]


def test_the_ends_of_the_ranges():
    for most in (1, 3):
        assert len(truncated(most, n=5, q=1.0).indices(0, 0)) == most
    for size in (1, 5):
        assert len(dp.FixedSize(num_examples=5, batch_size=size).indices(0, 0)) == size
    np.testing.assert_array_equal(dp.FullBatch(num_examples=3).indices(0, 0), [0, 1, 2])
    assert sampling.chunks(np.arange(3), 1).tolist() == [[0], [1], [2]]


def test_batches_are_those_of_every_version():
    """A run that is resumed after an upgrade must draw the batches that it would have drawn."""
    assert poisson(5, n=50, q=0.2, seed=3).tolist() == [0, 17, 23, 43, 46]
    assert truncated(4, n=50, q=0.2).indices(3, 5).tolist() == [0, 17, 23, 47]
    fixed = dp.FixedSize(num_examples=50, batch_size=5)
    assert fixed.indices(3, 5).tolist() == [0, 1, 18, 20, 24]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_chunks_hold_every_index_once(size):
    cut = sampling.chunks(np.arange(size), 8)
    assert cut.shape == (max(1, -(-size // 8)), 8)
    np.testing.assert_array_equal(cut[cut >= 0], np.arange(size))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: poisson(0, q=0.0), "sampling_prob=0.0"),
        (lambda: poisson(0, q=1.1), "sampling_prob=1.1"),
        (lambda: poisson(0, n=0), "num_examples=0"),
        (lambda: poisson(-1), "step=-1"),
        (lambda: poisson(0, seed=-1), "seed=-1"),
        (lambda: poisson(0, seed=2**128), "seed="),
        (lambda: poisson(0, n=5.0), "num_examples=5.0"),
        (lambda: dp.FullBatch(num_examples=0), "num_examples=0"),
        (lambda: dp.FixedSize(num_examples=5, batch_size=6), "batch_size=6"),
        (lambda: dp.FixedSize(num_examples=5, batch_size=0), "batch_size=0"),
        (lambda: dp.FixedSize(num_examples=5, batch_size=2.5), "batch_size=2.5"),
        (lambda: sampling.chunks(np.arange(3), 0), "size=0"),
        (lambda: truncated(3, q=0.0), "sampling_prob=0.0"),
        (lambda: truncated(3, q=1.5), "sampling_prob=1.5"),
        (lambda: truncated(0), "max_batch_size=0"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_one_example_is_enough():
    assert len(poisson(0, n=1, q=1.0)) == 1


# --- Samplers of one's own ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own:
    """Poisson batches, accounted for replacing an example; tests break one part at a time."""

    num_examples: int = 100
    sampling_prob: float = 0.1
    title: ClassVar[str] = "Poisson, for replacing one"
    relation: ClassVar[str] = "replace_one"
    accountants: ClassVar[tuple[str, ...]] = ("pld",)

    def indices(self, seed, step):
        law = dp.Poisson(num_examples=self.num_examples, sampling_prob=self.sampling_prob)
        return law.indices(seed, step)

    def event(self, noise_multiplier, steps):
        return dp.accounting.poisson(noise_multiplier, self.sampling_prob, steps)


def own(num_examples, batch_size):
    return Own(num_examples, batch_size / num_examples)


def mechanism_of(sampler):
    return dp.Mechanism(sampler=sampler, steps=3, noise_multiplier=1.0)


def test_a_sampler_of_one_s_own_is_calibrated_and_drawn_from():
    law = {"epsilon": 2.0, "delta": 1e-4, "num_examples": 1000, "batch_size": 100, "steps": 20}
    ours, theirs = dp.calibrated(**law), dp.calibrated(**law, sampler=own)
    assert 1.98 < theirs.epsilon(1e-4) <= 2.0
    # Replacing an example moves the sum twice as far, so the noise of adding one is not enough.
    alike = dataclasses.replace(theirs, noise_multiplier=ours.noise_multiplier)
    assert alike.epsilon(1e-4) == dp.accounting.epsilon(ours.event(), 1e-4, relation="replace_one")
    assert alike.epsilon(1e-4) > 2.5
    np.testing.assert_array_equal(theirs.indices(5, 19), ours.indices(5, 19))
    ledger = dp.Ledger((dp.Phase("train", theirs),), epsilon=2.0, delta=1e-4).charge(0, 20)
    facts = dp.statement(ledger, clipping="", seed_policy="fixed", released=[], not_charged=[])
    assert facts["sampler"] == "Poisson, for replacing one"
    assert facts["neighboring_relation"] == "replace_one"
    assert "Poisson, for replacing one" in dp.to_markdown(facts)


class Mutable:
    title, relation, accountants = Own.title, Own.relation, Own.accountants
    num_examples, sampling_prob = 100, 0.1
    indices, event = Own.indices, Own.event


def broken(**members):
    """`Own` with some members replaced; None takes one away."""
    kept = {
        name: member
        for name, member in {**vars(Own), **members}.items()
        if member is not None and not name.startswith("__")
    }
    made = type("Broken", (), {**kept, "__annotations__": Own.__annotations__})
    for name in ("num_examples", "sampling_prob"):
        setattr(made, name, members.get(name, getattr(Own, name)))
    return dataclasses.dataclass(frozen=True)(made)()


@dataclasses.dataclass(frozen=True)
class Unhashable(Own):
    weights: list = dataclasses.field(default_factory=list)


NO_SAMPLERS = {
    "a name": ("poisson", "sampler='poisson' must be an instance of a frozen dataclass"),
    "a class": (Own, "must be an instance of a frozen dataclass"),
    "not a dataclass": (Mutable(), "must be an instance of a frozen dataclass"),
    "not hashable": (Unhashable(), "must be hashable: unhashable type: 'list'"),
    "no event": (broken(event=None), "sampler Broken lacks event"),
    "no title": (broken(title=None), "sampler Broken lacks title"),
    "no draws": (broken(indices=None), "sampler Broken lacks indices"),
    "no relation": (broken(relation=None), "lacks relation"),
    "no accountants": (broken(accountants=None), "lacks accountants"),
    "draws without a step": (broken(indices=lambda self, seed: 0), "must take .seed, step."),
    "event of one step": (broken(event=lambda self, sigma: 0), "take .noise_multiplier, steps"),
    "more in a step": (broken(event=lambda self, a, b, c: 0), "missing a required argument: 'c'"),
    "event of another kind": (broken(event=lambda self, sigma, steps: 1.0), "not 1.0"),
    "steps not counted": (
        broken(event=lambda self, sigma, steps: dpa.GaussianDpEvent(sigma)),
        "for 1 and for 2 steps: it must count them",
    ),
    "unknown relation": (broken(relation="replace"), "did you mean 'replace_one'"),
    "unknown accountant": (broken(accountants=("prv",)), "accountant='prv' is unknown"),
    "no accountant at all": (broken(accountants=()), "must be a tuple of names"),
    "a string of accountants": (broken(accountants="pld"), "must be a tuple of names"),
    "accountant that cannot": (
        broken(accountants=("pld", "rdp")), "accountant='rdp' with relation='replace_one' cannot"
    ),
    "no examples": (broken(num_examples=0), "num_examples=0"),
    "probability of two": (broken(sampling_prob=2.0), "sampling_prob=2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_SAMPLERS)
def test_a_sampler_without_its_event_cannot_be_written(name):
    mechanism_of(broken())  # nothing is broken
    sampler, text = NO_SAMPLERS[name]
    with pytest.raises(ValueError, match=text):
        mechanism_of(sampler)


@pytest.mark.parametrize(
    "batch",
    [[3, 1], [1, 1], [-1, 2], [2, 100], [0.0, 1.0], [[1, 2]], [True, False], np.array([]), None],
)  # fmt: skip
def test_batches_are_sorted_distinct_examples_or_refused(batch):
    with pytest.raises(ValueError, match=r"Broken\.indices drew .* at step 2: .* in \[0, 100\)"):
        mechanism_of(broken(indices=lambda self, seed, step: batch)).indices(7, 2)


@pytest.mark.parametrize("batch", [[0, 99], np.array([5], np.uint8), np.array([], np.int32)])
def test_batches_are_returned_as_int64(batch):
    drawn = mechanism_of(broken(indices=lambda self, seed, step: batch)).indices(7, 2)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == list(batch)


def make(sampler, **options):
    return sampling.make(sampler, num_examples=100, batch_size=10, **options)


def test_samplers_are_made_by_name_or_by_function():
    assert make("poisson") == dp.Poisson(num_examples=100, sampling_prob=0.1)
    assert make(dp.FixedSize) == dp.FixedSize(num_examples=100, batch_size=10)
    assert make(own) == Own()
    everything = sampling.make("poisson", num_examples=100, batch_size=100)
    assert everything == dp.FullBatch(num_examples=100)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make("poison"), "sampler='poison' is unknown; did you mean 'poisson'"),
        (lambda: make("full_batch"), "batch_size=10 must be 100"),
        (lambda: make("poisson", max_batch_size=9), "unexpected keyword argument 'max_batch_size'"),
        (lambda: make("truncated_poisson"), "missing a required argument: 'max_batch_size'"),
        (lambda: make("truncated_poisson", max_batch_size=None), "max_batch_size=None"),
        (lambda: make(lambda num_examples: Own()), "num_examples=100, batch_size=10.*unexpected"),
        (lambda: make(lambda **_: Own(200)), "not 20 of 200"),
        (lambda: make(lambda **_: Own(100, 0.2)), "not 20 of 100"),
        (lambda: make(lambda **_: "poisson"), "must be an instance of a frozen dataclass"),
    ],
)  # fmt: skip
def test_what_makes_no_such_sampler_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
