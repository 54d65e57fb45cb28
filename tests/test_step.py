"""The step on a mesh: one collective, the same result on any number of devices, no copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import collectives

from dpjax import dp
from dpjax.dp.noise import standard_normal
from dpjax.runtime import compilation, sharding
from dpjax.step import Hyper, at_bound, carry_over, make_steps, moving_average

SIZE = 16


def loss_fn(params, example):
    hidden = jnp.tanh(example["input"] @ params["body"]["kernel"] + params["body"]["bias"])
    logits = hidden @ params["head"]["kernel"]
    return -jax.nn.log_softmax(logits)[example["label"]]


def parameters():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "body": {"kernel": draw(6, 8), "bias": draw(8)},
        "head": {"kernel": draw(8, 3)},
    }


def batch(layout, rows=SIZE, real=None):
    rng = np.random.default_rng(1)
    values = {
        "input": rng.normal(size=(rows, 6)).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
        "identity": np.arange(rows, dtype=np.uint32),
        "mask": np.arange(rows) < (rows if real is None else real),
    }
    return sharding.to_mesh(values, layout.mesh)


def adam(hyper):
    return dp.adam(1e-2, hyper.noise_multiplier, SIZE, key=hyper.noise_key)


def sgd(hyper):
    return dp.sgd(1.0, hyper.noise_multiplier, SIZE, key=hyper.noise_key)


def hyper(**changes):
    base = Hyper(
        learning_rate=jnp.float32(1e-2),
        noise_multiplier=jnp.float32(0.5),
        rule=dp.flat(0.5),
        noise_key=jax.random.key(3),
        augment_key=jax.random.key(4),
        batch_size=jnp.float32(SIZE),
    )
    return base._replace(**changes)


@functools.cache
def compiled(text, devices, method, microbatch_size, optimizer):
    layout = sharding.layout(text, jax.devices()[:devices])
    return layout, make_steps(
        loss_fn, optimizer, layout, private=True, method=method, microbatch_size=microbatch_size
    )


def make(text="replicated", devices=8, method="vmap", microbatch_size=None, optimizer=adam):
    layout, steps = compiled(text, devices, method, microbatch_size, optimizer)
    params = parameters()
    state = steps.init(sharding.place(params, layout.shardings(params)), hyper())
    return layout, steps, state


def run(layout, steps, state, count=3):
    for step in range(count):
        whole, totals = steps.begin(state)
        for _ in range(2):
            totals = steps.accumulate(
                totals, whole, {}, batch(layout, real=13), jnp.int32(step), hyper()
            )
        state, facts = steps.update(state, totals, hyper())
    return state, facts


@pytest.fixture(scope="module")
def on_one_device():
    return run(*make(devices=1))


@pytest.mark.parametrize("text", ["replicated", "fsdp", "fsdp:head"])
@pytest.mark.parametrize("devices", [2, 8])
def test_same_result_on_any_number_of_devices(on_one_device, text, devices):
    want, want_facts = on_one_device
    layout, steps, state = make(text, devices)
    got, facts = run(layout, steps, state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), got, want)
    assert float(facts["count"]) == float(want_facts["count"]) == 26
    for leaf, place in zip(jax.tree.leaves(got), jax.tree.leaves(layout.shardings(got))):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize("text", ["replicated", "fsdp"])
@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_one_collective_a_step_outside_the_microbatch_loop(text, method):
    layout, steps, state = make(text, method=method, microbatch_size=1)
    whole, totals = steps.begin(state)
    arguments = (totals, whole, {}, batch(layout), jnp.int32(0), hyper())
    accumulate = steps.accumulate.lower(*arguments).compile()
    assert " while(" in accumulate.as_text()  # the loop is there, and holds no collective
    assert collectives(accumulate) == []
    update = collectives(steps.update.lower(state, totals, hyper()).compile())
    # Spread leaves are scattered in one piece; whole leaves and the facts are summed in another.
    assert sorted(update) == ["all-reduce"] + ["reduce-scatter"] * (text == "fsdp")


def test_collectives_of_large_leaves_are_not_split():
    """XLA merges small collectives by itself; one vector is one whatever its size."""
    layout = sharding.layout("replicated")
    like = [jax.ShapeDtypeStruct((8, 2**22), jnp.float32) for _ in range(3)]
    program = jax.jit(lambda t: sharding.sum_over_devices(t, [-1] * 3, layout.mesh)).lower(like)
    assert program.as_text().count("stablehlo.all_reduce") == 1


def test_noise_is_drawn_once_in_the_global_view():
    """Without examples an update is noise alone, of the accounted scale, on any layout."""
    moves = []
    for text, devices in (("replicated", 1), ("fsdp", 8)):
        layout, steps, state = make(text, devices, optimizer=sgd)
        before = jax.device_get(state.trainable)
        whole, totals = steps.begin(state)
        empty = batch(layout, real=0)
        totals = steps.accumulate(totals, whole, {}, empty, jnp.int32(0), hyper())
        after, _ = steps.update(state, totals, hyper())
        moves.append(
            np.concatenate(
                [np.ravel(a - b) for a, b in zip(jax.tree.leaves(after.trainable),
                                                 jax.tree.leaves(before))]
            )
        )  # fmt: skip
    for other in moves[1:]:
        np.testing.assert_allclose(other, moves[0], rtol=1e-5, atol=1e-7)
    want = 0.5 * 0.5 / SIZE
    assert abs(np.std(moves[0]) / want - 1) < 6 / np.sqrt(2 * moves[0].size)


def test_state_and_totals_are_donated():
    layout, steps, state = make()
    whole, totals = steps.begin(state)
    after = steps.accumulate(totals, whole, {}, batch(layout), jnp.int32(0), hyper())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(totals))
    steps.update(state, after, hyper())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_traced_values_never_recompile():
    layout, steps, state = make()
    state, _ = run(layout, steps, state, 1)
    with compilation.counting() as count:
        whole, totals = steps.begin(state)
        now = hyper(learning_rate=jnp.float32(7.0), rule=dp.flat(0.3))
        totals = steps.accumulate(totals, whole, {}, batch(layout), jnp.int32(1), now)
        steps.update(state, totals, now)
    assert not {"accumulate", "update"} & set(count.times)


def test_parameters_that_are_not_finite_are_reported_a_step_later():
    layout, steps, state = make(devices=2)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.trainable)
    _, facts = run(layout, steps, state._replace(trainable=bad), 1)
    assert facts["diverged"] > 0
    _, facts = run(*make(devices=2), 1)
    assert facts["diverged"] == 0


def adaptive_hyper(**changes):
    """Bound and average in the state; the noise of the count can be told from the count."""
    return hyper(
        ema_decay=jnp.float32(0.9),
        adaptive=dp.quantile_bound(0.5, rate=0.5, lower_bound=0.01),
        count_noise=jnp.float32(3.0),
        count_key=jax.random.key(5),
        **changes,
    )


def run_adaptive(text, devices, count=3):
    """Returns the states before and after each step, and the facts."""
    layout, steps, _ = make(text, devices, optimizer=sgd)
    params = parameters()
    now = adaptive_hyper()
    state = steps.init(sharding.place(params, layout.shardings(params)), now)
    seen, facts = [jax.device_get(state)], []
    for step in range(count):
        whole, totals = steps.begin(state)
        for _ in range(2):
            totals = steps.accumulate(
                totals, whole, {}, batch(layout, real=13), jnp.int32(step), at_bound(now, state)
            )
        state, found = steps.update(state, totals, now)
        seen.append(jax.device_get(state))
        facts.append(jax.device_get(found))
    return layout, state, seen, facts


@pytest.fixture(scope="module")
def adaptive_on_one_device():
    return run_adaptive("replicated", 1)


@pytest.mark.parametrize("text", ["replicated", "fsdp"])
def test_bound_and_average_are_the_same_on_a_mesh(adaptive_on_one_device, text):
    layout, state, seen, _ = run_adaptive(text, 8)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
    jax.tree.map(close, seen, adaptive_on_one_device[2])
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(layout.shardings(state))):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_the_bound_follows_the_noised_count_and_nothing_else(adaptive_on_one_device):
    _, _, seen, facts = adaptive_on_one_device
    for step, found in enumerate(facts):
        assert "below" not in found  # the count leaves noised, as the next bound, or not at all
        before, after = seen[step].bound, seen[step + 1].bound
        assert found["bound"] == before
        below = 26 - found["clipped"]
        noise = 3.0 * standard_normal(jax.random.fold_in(jax.random.key(5), step))
        share = (below - 13 + noise) / SIZE + 0.5
        assert after == pytest.approx(before * np.exp(-0.5 * (share - 0.5)), rel=1e-5)
        without_noise = before * np.exp(-0.5 * ((below - 13) / SIZE))
        assert abs(after / without_noise - 1) > 1e-4
    assert 0 < facts[0]["clipped"] < 26  # there is something to count


def test_noise_and_sensitivity_follow_the_bound():
    """An empty batch is noise alone, in units of the state's bound and not of the rule's."""
    layout, steps, _ = make(devices=2, optimizer=sgd)
    params = parameters()
    state = steps.init(sharding.place(params, layout.shardings(params)), adaptive_hyper())
    for bound in (0.5, 4.0):
        before = jax.device_get(state.trainable)
        place = state.bound.sharding
        state = state._replace(bound=jax.device_put(jnp.float32(bound), place))
        now = at_bound(adaptive_hyper(), state)
        whole, totals = steps.begin(state)
        totals = steps.accumulate(totals, whole, {}, batch(layout, real=0), jnp.int32(0), now)
        state, _ = steps.update(state, totals, adaptive_hyper())
        moved = jax.tree.map(lambda a, b: np.ravel(a - b), jax.device_get(state.trainable), before)
        moved = np.concatenate(jax.tree.leaves(moved))
        want = 0.5 * bound / SIZE
        assert abs(np.std(moved) / want - 1) < 6 / np.sqrt(2 * moved.size)


def test_the_average_is_that_of_the_iterates(adaptive_on_one_device):
    _, _, seen, _ = adaptive_on_one_device
    want = seen[0].trainable
    for step, state in enumerate(seen[1:]):
        want = moving_average(want, state.trainable, 0.9, step)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.average, want)
        assert np.abs(want["head"]["kernel"] - state.trainable["head"]["kernel"]).max() > 1e-4


def test_an_adapting_bound_never_recompiles():
    with compilation.counting() as count:
        run_adaptive("replicated", 8)
    assert count.beyond_first("accumulate", "update") == 0


def test_the_next_training_starts_with_an_optimizer_of_its_own():
    before, _ = run(*make(devices=2), 2)
    noise, (adam_state, *rest) = before.opt
    head = lambda tree: {"head": tree["head"]}  # noqa: E731
    adam_state = adam_state._replace(mu=head(adam_state.mu), nu=head(adam_state.nu))
    probed = before._replace(
        trainable=head(before.trainable),
        opt=(noise, (adam_state, *rest)),
        average={"head": {"kernel": jnp.full((8, 3), 7.0)}},
        bound=jnp.float32(0.3),
    )
    fresh = make(devices=2)[2]
    fresh = fresh._replace(average=fresh.trainable, bound=jnp.float32(1.0))
    got = carry_over(fresh, probed, moments=False)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got.opt))
    assert (got.step, got.bound) == (2, jnp.float32(0.3))
    assert np.all(got.average["head"]["kernel"] == 7)
    np.testing.assert_array_equal(got.average["body"]["kernel"], parameters()["body"]["kernel"])


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_the_moving_average_is_that_of_its_definition(decay):
    iterates = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    average = {"w": jnp.zeros(3)}
    want = np.zeros(3)
    for step, iterate in enumerate(iterates):
        average = moving_average(average, {"w": iterate}, decay, jnp.int32(step))
        weight = min(decay, (1 + step) / (10 + step))
        want = weight * want + (1 - weight) * iterate
    np.testing.assert_allclose(average["w"], want, atol=1e-5)
    if decay == 0:
        np.testing.assert_array_equal(average["w"], iterates[-1])
