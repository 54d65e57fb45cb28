"""Measures of feature distortion, against what they must be in known cases."""

import numpy as np
import pytest

from experiments.lp_ft import distortion

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 5))
LABELS = np.arange(40) % 4


def test_relative_shift():
    assert distortion.relative_shift(FEATURES, FEATURES) == 0
    assert distortion.relative_shift(FEATURES, 3 * FEATURES) == pytest.approx(2)
    assert distortion.relative_shift(np.zeros((2, 3)), np.ones((2, 3))) == pytest.approx(3**0.5)


def test_cka_sees_geometry_only():
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    assert distortion.linear_cka(FEATURES, 7 * FEATURES @ rotation + 2) == pytest.approx(1)
    squashed = FEATURES * [1, 0, 0, 0, 0]
    assert 0 < distortion.linear_cka(FEATURES, squashed) < 0.9
    assert distortion.linear_cka(FEATURES, np.ones((40, 5))) == 0


def test_cka_is_that_of_the_gram_matrices():
    other = RNG.normal(size=(40, 3))
    center = np.eye(40) - 1 / 40
    k, m = (center @ x @ x.T @ center for x in (FEATURES, other))
    want = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
    assert distortion.linear_cka(FEATURES, other) == pytest.approx(want)


def test_alignment():
    means = np.stack([FEATURES[LABELS == c].mean(axis=0) for c in range(4)])
    fits = (means - means.mean(axis=0)).T
    assert distortion.alignment(FEATURES, LABELS, 3 * fits + 1) == pytest.approx(1)
    assert distortion.alignment(FEATURES, LABELS, -fits) == pytest.approx(-1)
    assert distortion.alignment(FEATURES, LABELS, np.zeros((5, 4))) == 0
    with_absent = np.concatenate([fits, np.full((5, 1), 9.0)], axis=1)  # class 4 has no example
    assert distortion.alignment(FEATURES, LABELS, with_absent) == pytest.approx(1)
