"""Exported weights load back, and carry their statement."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, files, models
from dpjax.audit import attack
from dpjax.commands import cli, export
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


@pytest.fixture
def copied(workdir, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(workdir, tmp_path / "copy"))


def test_the_result_of_an_audit_stays_behind(copied, tmp_path):
    """Publishing it costs the claimed epsilon once more."""
    run = Workdir(copied)
    before = run.read("privacy.json")
    report = {
        "bound": 0.5, "claimed_epsilon": 2.0, "confidence": 0.95, "runs": 1, "count": 9,
        "canaries": "gradient",
    }  # fmt: skip
    run.write("audit.json", report)
    attack.attach(SimpleNamespace(config=tiny_config(audit__count=9)), run)
    assert "audit" in (copied / "privacy.md").read_text()
    assert (copied / "privacy.md").stat().st_mode & 0o077 == 0
    export.export(copied, tmp_path / "m.safetensors")
    assert json.loads((tmp_path / "m.privacy.json").read_text()) == before
    assert "audit" not in (tmp_path / "m.privacy.md").read_text()
    run.write("audit.json", {**report, "bound": 3.0})
    with pytest.raises(ValueError, match="its audit refutes the claim"):
        export.export(copied, tmp_path / "other.safetensors")
    assert not list(tmp_path.glob("other*"))


def test_no_statement_stays_beside_other_weights(workdir, copied, tmp_path):
    target = tmp_path / "m.safetensors"
    export.export(workdir, target)
    (copied / "privacy.json").unlink()
    with pytest.raises(ValueError, match=r"has no privacy\.json"):  # of a private run
        export.export(copied, target)
    assert (tmp_path / "m.privacy.json").exists()  # nothing was touched
    config = Workdir(copied).read("config.json")
    Workdir(copied).write("config.json", {**config, "dp": None})
    assert export.export(copied, target) == [target]
    assert not list(tmp_path.glob("m.privacy.*"))


@pytest.mark.parametrize("at", ["m.safetensors", "m.privacy.json", "m.privacy.md"])
def test_an_export_that_is_cut_leaves_no_file_half_written(at, workdir, tmp_path, monkeypatch):
    export.export(workdir, tmp_path / "m.safetensors")
    whole = {p.name: p.read_bytes() for p in tmp_path.glob("m.*")}

    @contextlib.contextmanager
    def cut(path, **options):
        with files.replacing(path, **options) as temporary:
            yield temporary
            if path.name == at:
                raise KeyboardInterrupt

    monkeypatch.setattr(export, "replacing", cut)
    with pytest.raises(KeyboardInterrupt):
        export.export(workdir, tmp_path / "m.safetensors")
    left = {p.name: p.read_bytes() for p in tmp_path.glob("*m.*")}
    assert left.items() <= whole.items()
    assert at == "m.safetensors" or at not in left


def test_mistakes(workdir, tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        export.export(workdir, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="has no config"):
        export.export(tmp_path, tmp_path / "m.safetensors")
    assert cli.main(["export", str(tmp_path), str(tmp_path / "m.safetensors")]) == 2
