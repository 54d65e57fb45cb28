"""Every rule keeps its promise on scalars, and the sums keep it on neighboring batches."""

import dataclasses
import functools

import hypothesis as hp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp

TREE = {"a": jnp.zeros(3), "b": {"c": jnp.zeros((2, 2)), "d": jnp.zeros(())}}

RULES = {
    f"{name}{'/normalized' if normalized else ''}": make(normalized=normalized)
    for normalized in (False, True)
    for name, make in {
        "flat": functools.partial(dp.flat, 0.7),
        "flat_tiny": functools.partial(dp.flat, 1e-5),
        "per_layer": functools.partial(dp.per_layer, 0.7),
        "per_layer_bounds": functools.partial(dp.per_layer, jnp.array([0.1, 2.0, 0.5])),
        "per_block": functools.partial(dp.per_layer, 0.7, grouping=dp.by_prefix(1)),
        "auto_v": functools.partial(dp.automatic, 0.7, gamma=0.0),
        "auto_s": functools.partial(dp.automatic, 0.7, gamma=0.01),
        "auto_s_per_layer": functools.partial(dp.automatic, 0.7, grouping=dp.by_leaf),
        "global": functools.partial(dp.global_, 0.7),
        "global_per_layer": functools.partial(dp.global_, 0.7, grouping=dp.by_leaf),
        "tanh": functools.partial(dp.rule, lambda n, c: c * jnp.tanh(n / c) / n, 0.7),
        "reckless": functools.partial(dp.rule, lambda n, c: 1e30 * jnp.sign(n - 2), 0.7),
        "poor_arithmetic": functools.partial(
            dp.rule, lambda n, c, a: 0 / (n - a) + jnp.inf, 0.7, grouping=dp.by_leaf, a=1.0
        ),
    }.items()
}

norms_strategy = st.lists(
    st.one_of(
        st.floats(0, 2.0**99, width=32),
        st.sampled_from([0.0, 1e-30, 1e-19, 1e-9, 0.7, 0.7000001, 1.0, 1e30, np.inf, np.nan]),
    ),
    min_size=3,
    max_size=3,
)


def promise_broken(rule: dp.ClipRule, norms: list[float]) -> bool:
    """Whether factor * norm exceeds the bound of some group, in float64."""
    groups = rule.num_groups(TREE)
    values = np.array(norms[:groups], np.float32)
    factors = np.asarray(rule.factors(jnp.asarray(values)), np.float64)
    bounds = np.asarray(rule.bounds(groups), np.float64)
    if not np.isfinite(factors).all() or (factors < 0).any():
        return True
    scaled = factors * np.where(factors == 0, 0.0, values.astype(np.float64))
    return not (scaled <= bounds).all()


@pytest.mark.parametrize("name", RULES)
@hp.settings(deadline=None, max_examples=60)
@hp.given(norms=norms_strategy)
@pytest.mark.one_in(2)
def test_scaled_norm_is_within_bound(name, norms):
    assert not promise_broken(RULES[name], norms)


def test_promise_check_can_fail():
    class Lax(dp.ClipRule):
        def factors(self, norms):
            return super().factors(norms) * 1.00001

    lax = Lax(0.7, {}, lambda n, c: c / n, dp.one_group, False)
    assert promise_broken(lax, [5.0])


@pytest.mark.parametrize("name", RULES)
def test_sensitivity_is_the_norm_of_the_bounds(name):
    rule = RULES[name]
    bounds = np.asarray(rule.bounds(rule.num_groups(TREE)), np.float64)
    np.testing.assert_allclose(rule.sensitivity(), np.sqrt((bounds**2).sum()), rtol=1e-6)
    if name.endswith("/normalized"):
        assert rule.sensitivity() == 1.0


def test_factors_follow_the_formulas():
    norm = jnp.array([4.0])
    small = jnp.array([0.25])
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    near(dp.flat(2.0).factors(norm), [0.5])
    near(dp.flat(2.0).factors(small), [1.0])
    near(dp.flat(2.0, normalized=True).factors(norm), [0.25])
    near(dp.flat(2.0, normalized=True).factors(small), [0.5])
    near(dp.automatic(1.0, gamma=0.01).factors(norm), [1 / 4.01])
    near(dp.automatic(3.0, gamma=0.0).factors(norm), [3 / 4])
    near(dp.global_(2.0).factors(norm), [0.0])
    near(dp.global_(2.0).factors(small), [1.0])
    near(dp.global_(2.0, normalized=True).factors(small), [0.5])
    near(dp.flat(0.1).factors(small), [0.4])  # norms below 1 as those above
    near(dp.automatic(3.0, gamma=0.25).factors(small), [6.0])
    near(dp.automatic(gamma=0.0).factors(norm), [1 / 4])  # C = 1 unless told
    layers = dp.per_layer(2.0).factors(jnp.array([4.0, 0.1]))
    near(layers, [2 / np.sqrt(2) / 4, 1.0])
    near(dp.per_layer(jnp.array([1.0, 3.0])).factors(jnp.array([4.0, 6.0])), [0.25, 0.5])


@pytest.mark.parametrize("rule", [dp.flat(2.0), dp.per_layer(2.0), dp.automatic()])
def test_no_parameters_form_no_group(rule):
    assert rule.groups({}) == ()
    assert rule.num_groups({}) == 0
    assert rule.factors(jnp.zeros(0)).shape == rule.thresholds(0).shape == (0,)


def test_groupings():
    assert dp.one_group(TREE) == (0, 0, 0)
    assert dp.by_leaf(TREE) == (0, 1, 2)
    assert dp.by_prefix(1)(TREE) == (0, 1, 1)
    assert dp.by_prefix(1) is dp.by_prefix(1)


def test_bounds_are_traced():
    traces = []

    @jax.jit
    def factors(rule, norms):
        traces.append(rule)
        return rule.factors(norms)

    for bound in (0.1, 1.0, 10.0):
        factors(dp.flat(bound), jnp.array([1.0]))
        factors(dp.flat(jnp.asarray(bound)), jnp.array([1.0]))
    assert len(traces) <= 2  # a Python float and an array differ in weak type only


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: dp.flat(-1), "bound=-1 must be > 0"),
        (lambda: dp.flat(0.0), "bound=0.0"),
        (lambda: dp.flat(float("nan")), "bound=nan"),
        (lambda: dp.flat(float("inf")), "bound=inf"),
        (lambda: dp.flat(1e-12), "bound=1e-12"),
        (lambda: dp.flat(1e39), "bound=1e[+]39 must be <= 1e[+]15"),
        (lambda: dp.rule(lambda n, c: c, 0.0), "bound=0.0"),
        (lambda: dp.flat(jnp.ones(2)), "scalar"),
        (lambda: dp.per_layer(jnp.array([1.0, -2.0])), "bounds="),
        (lambda: dp.automatic(gamma=-0.1), "gamma=-0.1"),
        (lambda: dp.automatic(gamma=jnp.ones(2)), "scalar"),
        (lambda: dp.by_prefix(0), "depth=0"),
        (lambda: dp.per_layer(jnp.ones(2)).factors(jnp.ones(3)), "2 entries"),
        (lambda: dp.per_layer(1.0, grouping=lambda t: (0, 2, 2)).groups(TREE), "without gaps"),
    ],
)
def test_bad_rules(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_rules_can_be_made_inside_jit():
    made = jax.jit(lambda norms: dp.automatic(2.0).factors(norms))(jnp.array([4.0]))
    np.testing.assert_allclose(made, [2 / 4.01], rtol=1e-5)


def test_a_traced_bound_out_of_range_clips_to_nothing():
    for bound in (np.inf, np.nan, -1.0, 3e38):
        found = jax.jit(lambda rule: rule.factors(jnp.array([4.0])))(
            dataclasses.replace(dp.flat(1.0), threshold=bound)
        )
        assert np.isfinite(found).all()
        assert float(found[0]) * 4 <= max(0.0, np.nan_to_num(bound))


def test_a_rule_of_ones_own_is_traced_with_its_parameters():
    soft = functools.partial(dp.rule, lambda n, c, power: c / (n**power + c**power) ** (1 / power))
    run = jax.jit(lambda rule: rule.factors(jnp.array([3.0])))
    rules = [soft(2.0, power=jnp.float32(p)) for p in (1.0, 2.0)]
    found = [float(run(dataclasses.replace(rules[0], parameters=r.parameters))[0]) for r in rules]
    np.testing.assert_allclose(found, [2 / 5, 2 / np.sqrt(13)], rtol=1e-5)
    assert run._cache_size() == 1
    with pytest.raises(TypeError, match="function=3"):
        dp.rule(3, 1.0)


@pytest.mark.parametrize("bound", ["1", None, True, 1j])
def test_bounds_are_numbers(bound):
    with pytest.raises(TypeError, match="must be a number"):
        dp.flat(bound)


def test_chunks_add_without_adding_sensitivity():
    one = dp.ClippedSum({"w": jnp.ones(2)}, jnp.asarray(3.0))
    both = sum([one, one])
    np.testing.assert_array_equal(both.value["w"], [2, 2])
    assert both.sensitivity == 3.0
