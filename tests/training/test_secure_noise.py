"""A run with secure noise: the same on every topology, resumable, and its statement says so."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny_config

from dpjax import build
from dpjax.runtime import Workdir, sharding
from dpjax.training import loop


def run_of(devices=8, **changes):
    config = tiny_config(finetune="head", dp__noise="secure", checkpoint_every=1, **changes)
    made = build.build(config)
    return made._replace(layout=sharding.layout(config.sharding, jax.devices()[:devices]))


def weights(path):
    return load_file(path / "weights.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("secure") / "w"
    loop.train(run_of(), Workdir(path))
    return path


def test_the_statement_says_what_is_claimed(finished):
    said = json.loads((finished / "privacy.json").read_text())
    assert said["noise"].startswith("secure: integers drawn from ChaCha20 under a 256-bit key")
    assert said["phases"][0]["secure_size"] == 170  # a head of 16 x 10 and 10
    assert said["epsilon"] <= 2.0
    assert "ChaCha20" in (finished / "privacy.md").read_text()


def test_one_device_and_a_resumed_run_give_the_same_sums_and_noise(finished, tmp_path):
    """Integers: the weights of the head differ by what float32 makes of gradients, not of sums."""
    path = tmp_path / "w"
    with pytest.raises(loop.Preempted):
        loop.train(run_of(1), Workdir(path), stop=lambda now: now == 2)
    assert not (path / "weights.safetensors").exists()
    loop.train(run_of(8, physical_batch=128), Workdir(path))
    one, other = weights(finished), weights(path)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], atol=2e-6)


def test_the_seed_of_a_release_has_256_bits_and_one_reader(tmp_path):
    run = run_of(private_seed=None, epochs=0.13)
    loop.train(run, Workdir(tmp_path / "w"))
    file = tmp_path / "w" / "private_seed.json"
    assert json.loads(file.read_text())["private_seed"].bit_length() > 200
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dp__noise": "secured"}, "Did you mean 'secure'"),
        ({"dp__method": "bookkeeping"}, "dp.method='bookkeeping' must be 'auto' or 'vmap'"),
        ({"dp__temperature__share": 0.1}, r"dp.temperature.share=0.1 must be 0"),
        ({"dp__adaptive__quantile": 0.5}, r"dp.adaptive.quantile=0.5 must be None"),
        ({"dp__delta": 1e-17}, "secure noise of .* numbers needs"),
    ],
)
def test_mistakes(changes, text):
    with pytest.raises(ValueError, match=text):
        build.build(tiny_config(**{"finetune": "head", "dp__noise": "secure", **changes}))
