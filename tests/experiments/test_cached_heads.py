"""Heads on cached features leave the files, and are the heads, of the train loop."""

import json

import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, models
from dpjax.runtime import Workdir, read_jsonl
from dpjax.training import loop
from experiments import cached_heads
from experiments.cached_heads import Job


def head_config(**changes):
    return tiny_config(**{"finetune": "head", "optimizer__learning_rate": 0.05, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune": "film"},
        {"dp": None},
        {"private_seed": None},
        {"data__shift": 1},
        {"data__pad": 1},
        {"dp__bound_schedule": ((0.0, 1.0), (0.5, 2.0))},
        {"dp__temperature__share": 0.2},
        {"dp__adaptive__quantile": 0.5},
        {"lp__fraction": 0.5},
        {"ema": 0.9},
    ],
    ids=str,
)
def test_what_the_engine_does_not_know_takes_the_loop(changes):
    assert cached_heads.fits(head_config())
    assert not cached_heads.fits(head_config(**changes))


def test_heads_of_texts_are_trained_on_features_too():
    text = {"model__name": "text_encoder", "model__size": "minilm_l6", "model__options": {}}
    assert cached_heads.fits(head_config(**text))
    # The output layer of a language model is pretrained, and reads every token.
    decoder = {"model__name": "decoder", "model__size": "tiny"}
    assert not cached_heads.fits(head_config(**{**text, **decoder}))


def test_groups_share_all_but_what_is_batched(tmp_path):
    rates = [head_config(optimizer__learning_rate=r, dp__bound=r, private_seed=3) for r in (1, 2)]
    others = [head_config(dp__clipping="global"), head_config(seed=1)]
    jobs = [Job(c, tmp_path / str(i)) for i, c in enumerate(rates + others)]
    found = cached_heads.groups(jobs)
    assert [[job.path.name for job in group] for group in found] == [["0", "1"], ["2"], ["3"]]


@pytest.mark.slow
def test_files_and_head_are_those_of_the_loop(tmp_path):
    configs = [head_config(dp__bound=b, dp__epsilon=e) for b, e in ((1.0, 2.0), (0.3, 4.0))]
    jobs = [Job(c, tmp_path / f"{i:03d}") for i, c in enumerate(configs)]
    seen = []

    def measure(run, initial, final):
        seen.append((initial["head"]["kernel"], final["head"]["kernel"]))
        return {"bound": run.config.dp.bound}

    cached_heads.train_group(jobs, measure)
    for job, config, (before, after) in zip(jobs, configs, seen, strict=True):
        assert np.any(np.asarray(before) != np.asarray(after))
        assert json.loads((job.path / "measured.json").read_text()) == {"bound": config.dp.bound}
    other = tmp_path / "loop"
    loop.train(build.build(configs[1]), Workdir(other))
    mine = jobs[1].path
    for name in ("config.json", "privacy.json", "privacy.md"):
        assert (mine / name).read_text() == (other / name).read_text()
    ours, theirs = (models.read_tensors(p / "weights.safetensors") for p in (mine, other))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-5)
    ours, theirs = (json.loads((p / "eval.json").read_text()) for p in (mine, other))
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(ours["nll"], theirs["nll"], rtol=1e-4)
    np.testing.assert_allclose(ours["accuracy"], theirs["accuracy"], atol=0.011)
    ours, theirs = (
        [r["nonprivate/loss"] for r in read_jsonl(p / "metrics.jsonl") if "nonprivate/loss" in r]
        for p in (mine, other)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"dp__bound_schedule": ((0.0, 0.1), (0.5, 20.0))}, marks=pytest.mark.slow),
        {"dp__temperature__share": 0.3, "data__subset": 0.5},
    ],
    ids=str,
)
def test_the_loop_on_features_is_the_loop(tmp_path, changes):
    config = head_config(**changes)
    assert cached_heads.fits_loop(config)
    assert not cached_heads.fits(config)
    run = build.build(config)
    cached_heads.train_one(cached_heads.built(config), Workdir(tmp_path / "features"))
    loop.train(run, Workdir(tmp_path / "inputs"))
    ours, theirs = (
        {
            path.name: json.loads(path.read_text())
            for path in (tmp_path / name).glob("*.json")
            if path.name in ("eval.json", "privacy.json", "model.json", "config.json")
        }
        for name in ("features", "inputs")
    )
    assert len(ours) == 4
    mine, other = ours.pop("eval.json"), theirs.pop("eval.json")
    assert ours == theirs
    assert mine.keys() == other.keys()
    for name in {"nll", "brier", "temperature"} & mine.keys():
        assert mine[name] == pytest.approx(other[name], rel=1e-4)
    ours, theirs = (
        models.read_tensors(tmp_path / name / "weights.safetensors")
        for name in ("features", "inputs")
    )
    assert set(ours) == {"head/kernel", "head/bias"}
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_what_no_feature_shows_takes_the_loop_on_inputs():
    for changes in ({"data__shift": 1}, {"lp__fraction": 0.5}, {"finetune": "film"}):
        assert not cached_heads.fits_loop(head_config(**changes))


def test_divergence_is_told(tmp_path):
    # Batches of two: the noise is not divided by much, and a few steps leave the range of float32.
    config = head_config(
        optimizer__name="sgd", optimizer__learning_rate=3e38, batch_size=2, epochs=0.05
    )
    job = Job(config, tmp_path / "000")
    cached_heads.train_group([job])
    assert "not finite" in (tmp_path / "000.failed").read_text()
    assert not (job.path / "eval.json").exists()
