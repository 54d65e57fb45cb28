"""Exported weights load back, and carry their statement."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, models
from dpjax.commands import export
from dpjax.runtime import Workdir
from dpjax.training import loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    loop.train(build.build(tiny_config(finetune="lora:2", epochs=0.4)), Workdir(path))
    return path


def test_adapters_are_merged_and_the_statement_is_beside(workdir, tmp_path):
    files = export.export(workdir, tmp_path / "m.safetensors")
    assert {f.name for f in files} == {
        "m.safetensors", "m.privacy.json", "m.privacy.md",
    }  # fmt: skip
    net = build.build(tiny_config()).model
    params = net.load(net.init(jax.random.key(1)), str(tmp_path / "m.safetensors"), head=True)
    assert "lora" not in models.read_tensors(tmp_path / "m.safetensors")
    images = jax.random.normal(jax.random.key(2), (3, *net.input.example().shape))
    assert np.isfinite(net.apply(params, images)).all()


def test_timm_layout_loads_back(workdir, tmp_path):
    export.export(workdir, tmp_path / "t.safetensors", layout="timm")
    export.export(workdir, tmp_path / "m.safetensors")
    net = build.build(tiny_config()).model
    start = net.init(jax.random.key(1))
    ours, theirs = (
        net.load(start, str(tmp_path / f"{name}.safetensors"), head=True) for name in "mt"
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert "blocks.0.attn.qkv.weight" in models.read_tensors(tmp_path / "t.safetensors")


def test_mistakes(workdir, tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        export.export(workdir, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="has no config"):
        export.export(tmp_path, tmp_path / "m.safetensors")
    assert export.main([str(tmp_path), str(tmp_path / "m.safetensors")]) == 2
