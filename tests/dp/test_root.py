"""The searches along one monotone quantity: what they promise, and in how few evaluations."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from dpjax.dp.accounting import root as search


def find(gap, start=0.0, slope=-1.0, **kwargs):
    """What `falling_root` returns, and where it looked."""
    seen = []
    found = search.falling_root(lambda x: seen.append(x) or gap(x), start, slope, **kwargs)
    return found, seen


def bent(root, power):
    return lambda x: -math.copysign(abs(x - root) ** power, x - root)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    st.floats(-9, 9), st.floats(0.2, 5.0), st.floats(-20, 20), st.sampled_from([1e-4, 0.1])
)
def test_a_bent_function_is_bracketed(root, power, start, tol):
    gap = bent(root, power)
    (x, slope), seen = find(gap, start, tol=tol)
    assert gap(x) <= 0 <= gap(x - tol)
    assert x in seen  # and was seen to be so
    assert any(gap(y) > 0 and y >= x - tol * (1 + 1e-9) for y in seen)
    assert -10 <= slope <= -0.1


@pytest.mark.parametrize("rise", [-0.3, -1.0, -3.0])
@pytest.mark.parametrize("start", [0.0, 0.99, 1.01, 2.9])
def test_two_good_predictions_end_the_search(rise, start):
    found, seen = find(lambda x: rise * (x - 1.0), start, rise, tol=1e-3)
    assert found == (pytest.approx(1.0004, abs=1e-9), pytest.approx(rise, rel=1e-6))
    assert find(lambda x: rise * (x - start), start, rise, tol=1e-3)[0] == (start, rise)
    assert seen[0] == start
    assert len(seen) <= 3


def test_few_evaluations():
    """Over bent and straight functions, near and far starts, coarse and fine brackets."""
    roots, powers, starts = (-9, -2.5, 0, 1, 7.3), (0.5, 0.8, 1, 1.25, 2), (-20, -3, 0, 4, 20)
    counts = {
        (root, power, start, tol): len(find(bent(root, power), start, tol=tol)[1])
        for root, power, start, tol in itertools.product(roots, powers, starts, (1e-4, 1e-2, 0.1))
    }
    assert max(counts.values()) <= 51
    assert sum(counts.values()) <= 4_550


@pytest.mark.parametrize("root", [-4.2, 0.0, 3.3])
def test_infinite_values_are_stepped_over(root):
    (x, slope), seen = find(lambda x: math.inf if x < root else -math.inf, tol=0.01)
    assert root <= x <= root + 0.01
    assert slope == -1.0  # nothing was learned of it
    assert len(seen) <= 14
    (x, slope), seen = find(lambda x: math.inf if x < root else root + 0.5 - x, tol=0.01)
    assert root + 0.5 <= x <= root + 0.51
    assert len(seen) <= 7


@pytest.mark.parametrize("start", [-50.0, -1.0, 0.0, 50.0])
def test_floor_and_ceiling(start):
    sides = dict(floor=-2.0, ceiling=3.0, tol=0.01)
    found, low = find(lambda x: -1.0, start, **sides)
    assert found[0] == -2.0
    found, high = find(lambda x: 1.0, start, **sides)
    assert found is None
    assert all(-2 <= x <= 3 for x in low + high)
    assert len(low + high) <= 7
    found, _ = find(lambda x: 2.9999 - x, start, **sides)
    assert 2.9999 <= found[0] <= 3.0
    found, _ = find(lambda x: -1.9999 - x, start, **sides)
    assert -1.9999 <= found[0] <= -1.9899


def test_floor_and_ceiling_by_default():
    for value, last in ((-1.0, -30.0), (1.0, 30.0)):
        assert find(lambda x, value=value: value, tol=0.01)[1][-1] == last


def test_a_zero_is_within():
    assert find(lambda x: 0.0 if x >= 1.0 else 1.0, 1.0, tol=0.1)[0][0] <= 1.1
    assert find(lambda x: -0.0, -30.0, tol=0.1) == ((-30.0, -1.0), [-30.0])


def test_a_flat_function_does_not_make_it_crawl():
    """Steps double while one side is unknown, up to 3."""
    _, seen = find(lambda x: 1e-9 if x < 25 else -1e-9, tol=1e-3)
    assert len(seen) <= 63
    assert max(b - a for a, b in itertools.pairwise(sorted(seen))) <= 3.0 + 1e-3


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.integers(0, 500), st.integers(-3, 500), st.integers(1, 500))
def test_the_largest_integer_is_that_of_a_linear_scan(limit, guess, top):
    seen = []
    fits = lambda n: seen.append(n) or n <= limit  # noqa: E731
    want = min(limit, top)
    assert search.largest_integer(fits, guess=guess, top=top) == want
    assert all(1 <= n <= top for n in seen)
    assert len(seen) == len(set(seen))
    assert len(seen) <= 2 * math.log2(abs(min(max(guess, 1), top) - want) + 1) + 3
