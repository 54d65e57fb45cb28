"""Heads from cached features: the loop's own heads, grids, and mistakes."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny import tiny_config

from dpjax import build, data, dp, heads, models
from dpjax.runtime import Workdir
from dpjax.step import Hyper
from dpjax.training import loop

STEPS, BATCH, EXAMPLES = 6, 40, 200


def on_cached_features(run):
    """The run whose data sets hold features, and whose model is the head alone."""

    def of_features(dataset):
        values = heads.compute_features(run.model, run.params, dataset).values
        keys = dataset.source.keys[dataset.rows]
        source = data.Source(lambda rows: values[rows], keys, np.dtype(np.float32))
        return dataclasses.replace(
            dataset, shape=values.shape[1:], rows=np.arange(len(dataset)), source=source
        )

    def apply(params, inputs):
        return models.dense_head(params["head"], inputs)

    def loss_fn(params, example):
        return optax.softmax_cross_entropy_with_integer_labels(
            apply(params, example["input"]), example["label"]
        )

    return run._replace(
        train=of_features(run.train), test=of_features(run.test), apply=apply, loss_fn=loss_fn
    )


@pytest.mark.parametrize(
    "case",
    [
        "random allocation, into a second epoch",
        "not private",
        pytest.param("private, loop on cached features", marks=pytest.mark.slow),
    ],
)
def test_equals_the_head_of_the_loop(case, tmp_path):
    config = tiny_config(finetune="head", epochs=1.2)
    if case == "not private":
        config.dp = None
    elif "allocation" in case:
        config.dp.sampler = "random_allocation"
    run = build.build(config)
    loop.train(on_cached_features(run) if "cached" in case else run, Workdir(tmp_path / "w"))
    want = models.read_tensors(tmp_path / "w" / "weights.safetensors")
    phase = run.phases[0]
    seed = config.seed if run.rule is None else config.private_seed
    made = heads.train_heads(
        heads.compute_features(run.model, run.params, run.train),
        [heads.Point(phase.learning_rate, seed, run.rule, phase.mechanism)],
        steps=phase.steps,
        batch_size=config.batch_size,
        optimizer=phase.optimizer,
    )
    for leaf in ("kernel", "bias"):
        assert np.abs(want[f"head/{leaf}"]).max() > 1e-3
        np.testing.assert_allclose(made.params["head"][leaf][0], want[f"head/{leaf}"], atol=1e-5)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, EXAMPLES)
    values = 3 * np.eye(3, 5)[labels] + rng.normal(size=(EXAMPLES, 5))
    return heads.FeatureSet(values, labels, 3, "blobs")


def sgd(hyper: Hyper) -> optax.GradientTransformation:
    if hyper.rule is None:
        return optax.chain(optax.scale(1 / BATCH), optax.sgd(hyper.learning_rate))
    return dp.sgd(hyper.learning_rate, hyper.noise_multiplier, BATCH, key=hyper.noise_key)


def mechanism(sampler="poisson", num_examples=EXAMPLES, **changes):
    size = num_examples if sampler == "full_batch" else BATCH
    drawn = dp.sampling.make(sampler, num_examples=num_examples, batch_size=size)
    fields = {"steps": STEPS, "noise_multiplier": 1.0, **changes}
    return dp.Mechanism(sampler=drawn, **fields)


def point(rate=0.5, seed=1, bound=1.0, **changes):
    return heads.Point(rate, seed, dp.flat(bound), mechanism(**changes))


train = functools.partial(heads.train_heads, steps=STEPS, batch_size=BATCH, optimizer=sgd)

GRID = [
    point(),
    point(rate=2.0),
    point(seed=2),
    point(bound=0.1),
    point(noise_multiplier=0.1),
]


def test_a_grid_is_its_points(blobs):
    together = train(blobs, GRID)
    for index, one in enumerate(GRID):
        alone = train(blobs, [one])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[index], b[0], rtol=1e-5, atol=1e-6)
    kernels = together.params["head"]["kernel"]
    assert all(np.abs(k - kernels[0]).max() > 1e-3 for k in kernels[1:])


def test_a_grid_compiles_once(blobs):
    traces = []

    def counted(hyper):
        traces.append(1)
        return sgd(hyper)

    train(blobs, GRID, at_once=2, optimizer=counted)
    assert len(traces) == 1


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_chunks_of_the_grid_do_not_matter(at_once, blobs):
    want, got = train(blobs, GRID), train(blobs, GRID, at_once=at_once)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_full_batch_and_facts(blobs):
    full = [heads.Point(0.5, seed, dp.flat(1.0), mechanism("full_batch")) for seed in (1, 2)]
    made = train(blobs, full, batch_size=EXAMPLES)
    assert (made.facts["count"] == EXAMPLES).all()
    assert made.facts["loss"][:, 0] == pytest.approx(np.log(3), rel=1e-5)
    assert not np.allclose(made.params["head"]["kernel"][0], made.params["head"]["kernel"][1])
    drawn = train(blobs, [point()]).facts["count"][0]
    seed = dp.seeds.sampler_seed(point().private_seed)
    want = [len(mechanism().indices(seed, step)) for step in range(STEPS)]
    np.testing.assert_array_equal(drawn, want)


def test_learns_without_privacy(blobs):
    made = train(blobs, [heads.Point(1.0, 0)], steps=STEPS * 5)
    scores = heads.evaluate(made.params, blobs)
    assert scores[0]["accuracy"] > 0.85
    assert scores[0]["nll"] < made.facts["loss"][0, 0]


def test_average(blobs):
    still = train(blobs, [point()], ema_decay=0.0)
    jax.tree.map(np.testing.assert_array_equal, still.average, still.params)
    # The first two decays are 1/10 and 2/11, whatever the limit.
    one, two = (train(blobs, [point(steps=n)], steps=n).params["head"]["kernel"] for n in (1, 2))
    mean = train(blobs, [point(steps=2)], steps=2).average["head"]["kernel"]
    np.testing.assert_allclose(mean, 2 / 11 * 0.9 * one + 9 / 11 * two, rtol=1e-4, atol=1e-6)


def test_nothing_is_truncated():
    sizes = [3, 200, 0, 77]
    drawn = heads.batch_indices(lambda step: np.arange(sizes[step]), 4)
    assert drawn.shape == (4, 256)
    assert [(row >= 0).sum() for row in drawn] == sizes
    assert set(drawn[drawn < 0]) == {dp.PADDING}


def test_evaluate_counts_every_example(blobs, monkeypatch):
    monkeypatch.setattr("dpjax.heads.train._EVAL_ROWS", 64)
    params = train(blobs, [point(), point(rate=2.0)]).params
    for index, found in enumerate(heads.evaluate(params, blobs)):
        logits = blobs.values @ params["head"]["kernel"][index] + params["head"]["bias"][index]
        assert found["accuracy"] == pytest.approx((logits.argmax(1) == blobs.labels).mean())


def test_many_heads_of_many_classes_are_evaluated():
    """Of more than 50 classes there is no confusion matrix, and its place is empty."""
    labels = np.arange(52, dtype=np.int32)
    features = heads.FeatureSet(np.eye(52, dtype=np.float32), labels, 52, "diagonal")
    kernels = np.stack([np.eye(52, dtype=np.float32)] * 9)
    found = heads.evaluate({"head": {"kernel": kernels, "bias": np.zeros((9, 52), "f")}}, features)
    assert [scores["accuracy"] for scores in found] == [1.0] * 9


@pytest.mark.parametrize(
    ("points", "changes", "message"),
    [
        ([], {}, "points must not be empty"),
        ([point()], {"steps": 5}, "mechanism.steps=6 must be 5"),
        ([point()], {"batch_size": 41}, "batch_size=41 must be 40"),
        ([point()], {"batch_size": 201}, r"batch_size=201 must be in \[1, 200\]"),
        ([point(), heads.Point(1.0, 0)], {}, "all private or all without"),
        ([point(), point(steps=7)], {}, "may differ in noise_multiplier only"),
        ([point(num_examples=400)], {}, "num_examples=400 must be 200"),
        ([point()], {"ema_decay": 1.0}, "ema_decay=1.0 must be in"),
        ([point()], {"at_once": 0}, "at_once=0 must be >= 1"),
    ],
)
def test_mistakes(points, changes, message, blobs):
    with pytest.raises(ValueError, match=message):
        train(blobs, points, **changes)


def test_point_mistakes():
    with pytest.raises(ValueError, match="learning_rate=-1 must be > 0"):
        heads.Point(-1, 0)
    with pytest.raises(ValueError, match="rule and mechanism must both be given"):
        heads.Point(1.0, 0, rule=dp.flat(1.0))
