"""Metric sums against a plain loop, scikit-learn, and hand-made cases."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax import metrics

CLASSES, BINS = 5, 15


def draw(seed, batch=97, scale=3.0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, classes)).astype(np.float32) * scale
    labels = rng.integers(0, classes, size=batch).astype(np.int32)
    return logits, labels, rng.random(batch) < 0.8


def sums_of(logits, labels, mask=None, classes=CLASSES, bins=BINS):
    mask = np.ones(len(labels), bool) if mask is None else mask
    function = jax.jit(metrics.eval_sums, static_argnums=(3, 4))
    return function(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask), classes, bins)


def loop(logits, labels, mask, bins=BINS):
    """Every metric by its definition, one example at a time, in float64."""
    rows = []
    for z, y, real in zip(logits.astype(np.float64), labels, mask):
        if real:
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            hot = np.arange(len(p)) == y
            rows.append((y, p[y], p.max(), int(p.argmax() == y), np.sum((p - hot) ** 2)))
    n = len(rows)
    gaps, weights = [], []
    for b in range(bins):
        inside = [r for r in rows if b / bins < r[2] <= (b + 1) / bins]
        if inside:
            gaps.append(abs(np.mean([r[3] for r in inside]) - np.mean([r[2] for r in inside])))
            weights.append(len(inside) / n)
    out = {
        "accuracy": np.mean([r[3] for r in rows]),
        "nll": -np.mean([math.log(r[1]) for r in rows]),
        "brier": np.mean([r[4] for r in rows]),
        "ece": np.dot(gaps, weights),
        "mce": max(gaps),
        "adaptive_ece": adaptive(rows, bins),
    }
    for label in sorted({r[0] for r in rows}):
        out[f"class_accuracy/{label}"] = np.mean([r[3] for r in rows if r[0] == label])
    return out


def adaptive(rows, bins):
    """Levels of confidence in turn, each to the bin of its middle example."""
    levels, passed, gaps = {}, 0, [0.0] * bins
    for row in rows:
        levels.setdefault(math.ceil(row[2] * 960 - 1e-6), []).append(row[3] - row[2])
    for _, level in sorted(levels.items()):
        middle = passed + len(level) / 2
        gaps[min(bins - 1, math.floor(middle * bins / len(rows)))] += sum(level)
        passed += len(level)
    return sum(map(abs, gaps)) / len(rows)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 8.0]), st.sampled_from([1, 7, 15]))
def test_every_metric_is_its_definition(seed, scale, bins):
    logits, labels, mask = draw(seed, scale=scale)
    ours = metrics.summarize(sums_of(logits, labels, mask, bins=bins))
    assert ours == pytest.approx(loop(logits, labels, mask, bins), rel=2e-5, abs=2e-6)


def test_against_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    logits, labels, _ = draw(3, batch=600)
    sums = sums_of(logits, labels)
    ours = metrics.summarize(sums)
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64)
    guess = probs.argmax(1)
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, guess))
    probs /= probs.sum(1, keepdims=True)
    assert ours["nll"] == pytest.approx(sklearn_metrics.log_loss(labels, probs), rel=1e-5)
    hot = np.eye(CLASSES)[labels]
    assert ours["brier"] == pytest.approx(np.mean(np.sum((probs - hot) ** 2, axis=1)), rel=1e-5)
    recalls = sklearn_metrics.recall_score(labels, guess, average=None)
    assert [ours[f"class_accuracy/{k}"] for k in range(CLASSES)] == pytest.approx(list(recalls))
    accuracy, confidence = calibration.calibration_curve(guess == labels, probs.max(1), n_bins=BINS)
    diagram = metrics.reliability(sums)
    seen = diagram.count > 0
    assert diagram.accuracy[seen] == pytest.approx(accuracy, abs=1e-6)
    assert diagram.confidence[seen] == pytest.approx(confidence, abs=1e-6)
    assert ours["mce"] == pytest.approx(np.abs(accuracy - confidence).max(), abs=1e-6)


def test_the_confusion_matrix_counts_labels_by_predictions():
    logits, labels, mask = draw(7)
    want = np.zeros((CLASSES, CLASSES), int)
    for label, guess in zip(labels[mask], logits[mask].argmax(1)):
        want[label, guess] += 1
    found = metrics.diagrams(sums_of(logits, labels, mask), "abcde")
    assert found["confusion"] == want.tolist()
    assert found["class_names"] == list("abcde")
    many = metrics.eval_sums(jnp.zeros((2, 51)), jnp.zeros(2, int), jnp.ones(2, bool), 51)
    assert "confusion" not in metrics.diagrams(many, [str(k) for k in range(51)])


def test_classes_are_called_by_their_names():
    logits, labels, mask = draw(8)
    sums = sums_of(logits, labels, mask)
    numbered, named, twice = (
        metrics.summarize(sums, names) for names in ((), "edcba", ("b", "b", "c", "0", "d"))
    )
    assert [name for name in named if "class" in name] == [f"class_accuracy/{c}" for c in "edcba"]
    assert list(named.values()) == list(numbered.values())
    assert twice == numbered  # two classes are called b: then the name 0 could be one, too


def test_chunks_add_to_the_whole():
    logits, labels, mask = draw(1)
    whole = sums_of(logits, labels, mask)
    cuts = [slice(0, 40), slice(40, 41), slice(41, 97)]
    parts = [sums_of(logits[c], labels[c], mask[c]) for c in cuts]
    joined = parts[0] + parts[1] + parts[2]
    assert isinstance(joined, metrics.EvalSums)
    for mine, theirs in zip(joined, whole):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    with pytest.raises(TypeError):
        joined + (1,)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_is_exactly_nothing(junk):
    logits, labels, mask = draw(2)
    clean = sums_of(logits, labels, mask)
    logits = np.where(mask[:, None], logits, np.float32(junk))
    labels = np.where(mask, labels, 10**6).astype(np.int32)
    for mine, theirs in zip(sums_of(logits, labels, mask), clean):
        assert np.array_equal(mine, theirs)
    nothing = sums_of(logits, labels, np.zeros_like(mask))
    assert all(np.all(np.asarray(value) == 0) for value in nothing)


def test_shapes_types_and_low_precision_logits():
    logits, labels, mask = draw(4)
    sums = sums_of(jnp.asarray(logits, jnp.bfloat16), labels, mask, bins=9)
    assert {value.dtype for value in sums} == {jnp.dtype(jnp.float32)}
    bins = [(9,), (9,), (9,), (960, 3)]
    assert [v.shape for v in sums] == [(), (), (), (), (5,), (5,), *bins, (5, 5)]
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16).astype(jnp.float32))
    assert metrics.summarize(sums) == pytest.approx(loop(rounded, labels, mask, 9), rel=1e-4)


def test_certain_and_uniform_predictions_fall_in_the_right_bins():
    certain = metrics.reliability(sums_of(np.eye(5, dtype=np.float32) * 1e4, np.arange(5)))
    assert certain.count.tolist() == [0] * (BINS - 1) + [5]
    assert certain.accuracy[-1] == certain.confidence[-1] == 1
    assert not certain.accuracy[:-1].any()
    assert np.array_equal(certain.edges, np.linspace(0, 1, BINS + 1))
    # Exactly on an edge, 1/4 with 4 bins: the bin to the left, as (0, 1/4] is closed on the right.
    flat = sums_of(np.zeros((8, 4), np.float32), np.arange(8) % 4, classes=4, bins=4)
    assert np.asarray(flat.bin_count).tolist() == [8, 0, 0, 0]
    summary = metrics.summarize(flat)
    assert summary["nll"] == pytest.approx(math.log(4))
    assert summary["ece"] == pytest.approx(0, abs=1e-6)


def test_an_overconfident_model():
    # Always sure, right three times in four: both calibration errors are 1/4.
    logits = np.tile(np.array([[40.0, 0, 0, 0, 0]], np.float32), (4, 1))
    summary = metrics.summarize(sums_of(logits, np.array([0, 0, 0, 1])))
    assert summary["ece"] == summary["mce"] == pytest.approx(0.25)
    assert summary["class_accuracy/0"] == 1
    assert summary["class_accuracy/1"] == 0
    assert "class_accuracy/2" not in summary  # no example, and so no number
    json.loads(json.dumps(summary, allow_nan=False))


def test_bins_of_the_adaptive_error_are_equally_full():
    # 150 confidences, no two on one level: ten examples to a bin.
    rng = np.random.default_rng(0)
    confidence = rng.permutation(0.3 + 0.004 * np.arange(150))
    labels = (rng.random(150) > 0.6).astype(np.int32)
    probs = np.stack([confidence, *[(1 - confidence) / 4] * 4], axis=1)
    order = np.argsort(confidence)
    parts = np.split((labels == 0)[order] - confidence[order], BINS)
    found = metrics.summarize(sums_of(np.log(probs), labels))
    assert found["adaptive_ece"] == pytest.approx(sum(abs(p.sum()) for p in parts) / 150, abs=1e-6)
    assert abs(found["adaptive_ece"] - found["ece"]) > 0.01


def test_a_diverged_model_shows():
    logits, labels, _ = draw(5)
    logits[3] = np.nan
    summary = metrics.summarize(sums_of(logits, labels))
    assert math.isnan(summary["nll"])
    assert math.isnan(summary["ece"])
    assert math.isnan(summary["brier"])
    assert math.isnan(summary["adaptive_ece"])
    labels[4] = CLASSES
    assert math.isnan(metrics.summarize(sums_of(draw(5)[0], labels))["nll"])


def test_errors():
    logits, labels, mask = draw(6)
    with pytest.raises(ValueError, match=r"logits of shape \(97, 5\) must be \[batch, 6\]"):
        sums_of(logits, labels, mask, classes=6)
    with pytest.raises(ValueError, match=r"labels of shape \(96,\)"):
        sums_of(logits, labels[:-1], mask)
    with pytest.raises(ValueError, match="bins=0 must be >= 1"):
        sums_of(logits, labels, mask, bins=0)
    with pytest.raises(ValueError, match=r"count=0\.0 must be > 0"):
        metrics.summarize(sums_of(logits, labels, np.zeros_like(mask)))
