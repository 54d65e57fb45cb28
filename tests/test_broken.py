"""Trainers that are broken on purpose, the checks that catch them, and the product passing all.

A trainer is a handful of parts. Every check is a function of a trainer, so that one and the same
check judges the product's parts (used from optax, and through the train step on two devices) and
the broken ones. `catch_table` makes the documentation's table from what is tested here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import lower_bound
from dpjax.dp.noise import GaussianState, gaussian_noise
from dpjax.runtime import sharding
from dpjax.step import Hyper, Totals, make_steps

NUM, BATCH, STEPS, CHUNK, WIDTH = 200, 100, 4, 64, 2000
ALPHA = 1e-7  # false alarms of one statistical check; seeds are fixed
MECHANISM = dp.calibrated(epsilon=1.0, delta=1e-5, num_examples=NUM, batch_size=BATCH, steps=STEPS)
SIGMA = MECHANISM.noise_multiplier
PARAMS = {"a": jnp.zeros(WIDTH), "b": jnp.zeros(WIDTH)}
FROZEN = {"f": jnp.zeros(())}


def loss_fn(params, example):
    """The gradient of example i is its scale times coordinate i; `f` moves with all of them."""
    return example["input"] * (params["a"][example["label"]] + params["f"])


def trainable_loss(params, example):
    return loss_fn({**params, **FROZEN}, example)


class Trainer(NamedTuple):
    """The parts of a private trainer.

    Attributes:
        indices: step -> indices of its batch.
        rows: indices -> physical chunks, -1 is padding.
        clipped: (scales [NUM], chunk) -> ClippedSum.
        start: () -> state of the noise.
        update: (sum, realized size, state) -> (movement, state).
        charge: ledger -> ledger, before every step.
    """

    indices: Callable[[int], np.ndarray]
    rows: Callable[[np.ndarray], np.ndarray]
    clipped: Callable[[np.ndarray, np.ndarray], dp.ClippedSum]
    start: Callable[[], Any]
    update: Callable[[dp.ClippedSum, int, Any], tuple[Any, Any]]
    charge: Callable[[dp.Ledger], dp.Ledger]


def batch_of(scales, chunk):
    return {
        "input": jnp.asarray(scales, jnp.float32)[np.maximum(chunk, 0)],
        "label": jnp.asarray(np.maximum(chunk, 0), jnp.int32),
    }


def clipping(rule, loss=trainable_loss, params=PARAMS):
    summed = jax.jit(dp.clipped_sum(loss, rule, method="vmap"))

    def clipped(scales, chunk):
        return summed(params, batch_of(scales, chunk), jnp.asarray(chunk >= 0))[0]

    return clipped


def noise(factor=1.0):
    return dp.gaussian(factor * SIGMA, BATCH, key=jax.random.key(7))


def by(transform):
    """Parts `start` and `update` of a noise transform."""
    return {
        "start": lambda: transform.init(PARAMS),
        "update": lambda total, size, state: transform.update(total, state),
    }


FROM_OPTAX = Trainer(
    indices=lambda step: MECHANISM.sampler.indices(11, step),
    rows=lambda indices: dp.chunks(indices, CHUNK),
    clipped=clipping(dp.flat(1.0)),
    charge=lambda ledger: ledger.charge(0),
    **by(MECHANISM.transform(key=jax.random.key(7))),
)


def through_the_step():
    """The product as the train loop uses it, on two devices."""
    layout = sharding.layout("replicated", jax.devices()[:2])
    hyper = Hyper(
        learning_rate=jnp.float32(1.0), noise_multiplier=jnp.float32(SIGMA), rule=dp.flat(1.0),
        noise_key=jax.random.key(7), augment_key=jax.random.key(8), batch_size=jnp.float32(BATCH),
    )  # fmt: skip

    def sgd(hyper):
        return dp.sgd(1.0, hyper.noise_multiplier, hyper.batch_size, key=hyper.noise_key)

    steps = make_steps(trainable_loss, sgd, layout, private=True, method="vmap")
    start = lambda: steps.init(sharding.place(PARAMS, layout.shardings(PARAMS)), hyper)  # noqa: E731

    def clipped(scales, chunk):
        whole, totals = steps.begin(start())
        batch = {k: np.asarray(v) for k, v in batch_of(scales, chunk).items()}
        batch |= {"identity": batch["label"], "mask": chunk >= 0}
        batch = sharding.to_mesh(batch, layout.mesh)
        grads = steps.accumulate(totals, whole, {}, batch, jnp.int32(0), hyper).grads
        value = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).sum(axis=0)), grads.value)
        return dp.ClippedSum(value, jnp.asarray(np.asarray(grads.sensitivity)[0]))

    def update(total, size, state):
        _, totals = steps.begin(state)
        first = lambda x: np.stack([np.asarray(x), np.zeros_like(x)])  # noqa: E731
        value = sharding.to_mesh(jax.tree.map(first, total.value), layout.mesh)
        both = sharding.to_mesh({"s": np.full(2, np.asarray(total.sensitivity))}, layout.mesh)
        before = jax.device_get(state.trainable)
        state, _ = steps.update(state, Totals(dp.ClippedSum(value, both["s"]), totals.facts), hyper)
        return jax.tree.map(np.subtract, before, jax.device_get(state.trainable)), state

    return FROM_OPTAX._replace(clipped=clipped, start=start, update=update)


# --- The checks ----------------------------------------------------------------------------------


def summed(trainer, scales, indices):
    parts = [trainer.clipped(scales, chunk) for chunk in trainer.rows(np.asarray(indices))]
    return functools.reduce(lambda a, b: a + b, parts)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def no_gradient():
    return dp.ClippedSum(PARAMS, jnp.asarray(1.0))


def is_gaussian(samples, scale):
    """Whether neither the variance (chi-square) nor the shape (KS) rejects N(0, scale^2)."""
    statistic = (samples**2).sum() / scale**2
    tails = stats.chi2.cdf(statistic, samples.size), stats.chi2.sf(statistic, samples.size)
    return min(tails) > ALPHA and stats.kstest(samples / scale, "norm").pvalue > ALPHA


def noise_has_the_accounted_scale(trainer):
    movement, _ = trainer.update(no_gradient(), BATCH, trainer.start())
    return is_gaussian(flat(movement), SIGMA / BATCH)


def noise_is_fresh_in_every_leaf_and_step(trainer):
    state, draws = trainer.start(), []
    for _ in range(2):
        movement, state = trainer.update(no_gradient(), BATCH, state)
        draws += [np.ravel(leaf) for leaf in jax.tree.leaves(movement)]
    if not all(np.any(d) for d in draws):
        return True  # no noise at all is another check's business
    correlation = np.corrcoef(draws)[np.triu_indices(len(draws), 1)]
    return bool(np.abs(correlation).max() * np.sqrt(WIDTH) < stats.norm.isf(ALPHA))


def an_empty_batch_is_noise(trainer):
    total = summed(trainer, np.ones(NUM), np.zeros(0, np.int64))
    movement, _ = trainer.update(total, 0, trainer.start())
    return is_gaussian(flat(movement), SIGMA / BATCH)


OUTLIER = np.where(np.arange(NUM) == 5, 1e4, 0.1)


def one_example_moves_the_sum_by_at_most_the_bound(trainer):
    everyone = np.arange(10)
    whole = summed(trainer, OUTLIER, everyone)
    for leaver in (0, 5):
        rest = summed(trainer, OUTLIER, np.delete(everyone, leaver))
        if np.linalg.norm(flat(whole.value) - flat(rest.value)) > float(whole.sensitivity) * 1.001:
            return False
    return True


def the_bound_is_spent_on_what_trains(trainer):
    norm = np.linalg.norm(flat(summed(trainer, OUTLIER, np.array([5])).value))
    return norm > 0.999


def a_step_reads_each_drawn_example_once(trainer):
    for step in range(20):
        indices = trainer.indices(step)
        rows = trainer.rows(indices)
        if not np.array_equal(np.sort(rows[rows >= 0]), np.sort(np.unique(indices))):
            return False
    return True


def batches_follow_the_accounted_sampler(trainer):
    """Sizes are Binomial(N, q), and every example is drawn at rate q."""
    draws, q = 1000, MECHANISM.sampling_prob
    member = np.zeros((draws, NUM))
    for step in range(draws):
        member[step, trainer.indices(step)] = 1
    sizes, variance = member.sum(axis=1), NUM * q * (1 - q)
    mean = (sizes.mean() - NUM * q) / np.sqrt(variance / draws)
    spread = sizes.var(ddof=1) * (draws - 1) / variance
    tails = stats.chi2.cdf(spread, draws - 1), stats.chi2.sf(spread, draws - 1)
    return min(*tails, stats.norm.sf(abs(mean))) > ALPHA


def the_division_is_by_the_expected_size(trainer):
    for size in (1, BATCH, 2 * BATCH):
        value = {name: leaf + size for name, leaf in PARAMS.items()}
        total = dp.ClippedSum(value, jnp.asarray(1.0))
        moved, _ = trainer.update(total, size, trainer.start())
        still, _ = trainer.update(no_gradient(), size, trainer.start())
        if not np.allclose(flat(moved) - flat(still), size / BATCH, rtol=1e-3):
            return False
    return True


def no_step_passes_the_budget(trainer):
    ledger = dp.Ledger((dp.Phase("train", MECHANISM),), epsilon=1.0, delta=1e-5)
    try:
        for _ in range(STEPS + 1):
            ledger = trainer.charge(ledger)
    except dp.BudgetExceeded:
        return ledger.steps_done == STEPS
    return False


def an_audit_finds_no_contradiction(trainer):
    """One run in which every example is a canary (arXiv 2305.08846) against the claimed epsilon."""
    coins = np.random.default_rng(3).random(NUM) < 0.5
    state, moved = trainer.start(), np.zeros(NUM)
    for step in range(STEPS):
        drawn = trainer.indices(step)
        drawn = drawn[coins[drawn]]
        movement, state = trainer.update(
            summed(trainer, np.full(NUM, 1e4), drawn), len(drawn), state
        )
        moved += np.asarray(movement["a"])[:NUM]
    bound = lower_bound.one_run(moved, coins, delta=1e-5)
    return bound.epsilon <= MECHANISM.epsilon(1e-5)


CHECKS = (
    noise_has_the_accounted_scale,
    noise_is_fresh_in_every_leaf_and_step,
    an_empty_batch_is_noise,
    one_example_moves_the_sum_by_at_most_the_bound,
    the_bound_is_spent_on_what_trains,
    a_step_reads_each_drawn_example_once,
    batches_follow_the_accounted_sampler,
    the_division_is_by_the_expected_size,
    no_step_passes_the_budget,
    an_audit_finds_no_contradiction,
)


# --- What is broken ------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "parameters"),
    meta_fields=("function", "grouping", "normalized"),
)
class Unclipped(dp.ClipRule):
    """The mistake: factors of 1 whatever the norm."""

    def factors(self, norms):
        return jnp.ones_like(norms)


def clipped_after_the_mean(scales, chunk):
    real = chunk[chunk >= 0]
    mean = np.zeros(WIDTH)
    np.add.at(mean, real, np.asarray(scales)[real] / max(len(real), 1))
    clipped = mean / max(1.0, np.linalg.norm(mean))
    value = {**PARAMS, "a": jnp.asarray(len(real) * clipped, jnp.float32)}
    return dp.ClippedSum(value, jnp.asarray(1.0))


def frozen_in_the_norm(scales, chunk):
    total = FROZEN_TOO(scales, chunk)
    return dp.ClippedSum({k: total.value[k] for k in PARAMS}, total.sensitivity)


FROZEN_TOO = clipping(dp.flat(1.0), loss_fn, {**PARAMS, **FROZEN})


@functools.cache
def drawn_on_every_device():
    """Each of four devices draws for itself, and the draws are summed as the gradients are."""
    everywhere = sharding.partition(-1)

    def local(key):
        mine = jax.random.fold_in(key, jax.lax.axis_index(sharding.AXIS))
        return jax.tree.map(lambda z: jax.lax.psum(z, sharding.AXIS), gaussian_noise(mine, PARAMS))

    mesh = sharding.make_mesh(jax.devices()[:4])
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    )


def noise_of_every_device(total, size, state):
    key = jax.random.fold_in(jax.random.key(7), state.step)
    noise = jax.device_get(drawn_on_every_device()(key))
    value = jax.device_get(total.value)
    movement = jax.tree.map(lambda s, z: (s + SIGMA * z) / BATCH, value, noise)
    return movement, GaussianState(state.step + 1)


def same_noise_in_every_step(total, size, state):
    return noise().update(total, state)[0], state


def same_noise_in_every_leaf(total, size, state):
    key = jax.random.fold_in(jax.random.key(7), state.step)
    draw = jax.random.normal(key, (WIDTH,))
    movement = jax.tree.map(lambda s: (s + SIGMA * draw) / BATCH, total.value)
    return movement, GaussianState(state.step + 1)


def divided_by_the_realized_size(total, size, state):
    movement, state = noise().update(total, state)
    return jax.tree.map(lambda m: m * (BATCH / max(size, 1)), movement), state


def skipping_empty_batches(total, size, state):
    return noise().update(total, state) if size else (PARAMS, state)


def shuffled(step):
    epoch, part = divmod(step, NUM // BATCH)
    return np.random.default_rng(epoch).permutation(NUM)[part * BATCH : (part + 1) * BATCH]


def wrapped(indices):
    """Fills the last chunk up with examples instead of padding."""
    rows = dp.chunks(indices, CHUNK)
    again = np.resize(indices if len(indices) else [-1], rows.size)
    return np.where(rows >= 0, rows, again.reshape(rows.shape))


class Broken(NamedTuple):
    """A broken trainer, and the checks that catch it (all of them, and no others)."""

    parts: dict[str, Any]
    caught_by: set[Callable[[Trainer], bool]]


scale, fresh, empty = CHECKS[:3]
moves, spent, once, sampler, division, budget, audited = CHECKS[3:]

BROKEN = {
    "no noise": Broken(by(noise(0.0)), {scale, empty, audited}),
    "half the noise": Broken(by(noise(0.5)), {scale, empty}),
    "1/sqrt(2) of the noise": Broken(by(noise(0.5**0.5)), {scale, empty}),
    "noise drawn on every device": Broken({"update": noise_of_every_device}, {scale, empty}),
    "one key for all steps": Broken({"update": same_noise_in_every_step}, {fresh}),
    "one key for all leaves": Broken({"update": same_noise_in_every_leaf}, {fresh}),
    "no clipping": Broken({"clipped": clipping(Unclipped(**vars(dp.flat(1.0))))}, {moves, audited}),
    "clipping after the mean": Broken({"clipped": clipped_after_the_mean}, {moves, audited}),
    "frozen layers in the norm": Broken({"clipped": frozen_in_the_norm}, {spent}),
    "an example used twice": Broken({"rows": wrapped}, {once, moves}),
    "shuffling accounted as Poisson": Broken({"indices": shuffled}, {sampler}),
    "truncation unaccounted": Broken(
        {"indices": lambda step: MECHANISM.sampler.indices(11, step)[:BATCH]}, {sampler}
    ),
    "division by the realized size": Broken(
        {"update": divided_by_the_realized_size}, {division, empty}
    ),
    "empty batches skipped": Broken({"update": skipping_empty_batches}, {empty}),
    "budget overrun": Broken({"charge": lambda ledger: ledger}, {budget}),
}


def catch_table() -> str:
    """Returns what catches what, as Markdown."""
    said = lambda check: check.__name__.replace("_", " ")  # noqa: E731
    lines = ["| broken on purpose | caught by |", "|---|---|"]
    for name, broken in BROKEN.items():
        lines.append(f"| {name} | {'; '.join(said(c) for c in CHECKS if c in broken.caught_by)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("product", [lambda: FROM_OPTAX, through_the_step])
def test_the_product_passes_every_check(product):
    trainer = product()
    assert [check.__name__ for check in CHECKS if not check(trainer)] == []


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.one_in(3)
def test_broken_trainers_are_caught(name):
    broken = BROKEN[name]
    trainer = FROM_OPTAX._replace(**broken.parts)
    caught = {check.__name__ for check in CHECKS if not check(trainer)}
    assert caught == {check.__name__ for check in broken.caught_by}
    assert caught


def test_every_check_is_needed():
    assert set(CHECKS) == set().union(*(broken.caught_by for broken in BROKEN.values()))
    assert len(catch_table().splitlines()) == len(BROKEN) + 2
