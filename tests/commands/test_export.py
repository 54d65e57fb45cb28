"""What is exported is plain, complete, and never half-written over something else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, models
from dpjax.audit import attack
from dpjax.commands import cli, export
from dpjax.runtime import Workdir
from dpjax.training import loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    options = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14, "pooling": "gap"}
    config = tiny_config(finetune="lora:2", epochs=0.4, model__options=options)
    loop.train(build.build(config), Workdir(path))
    return path


def test_adapters_are_merged_and_the_statement_is_beside(workdir, tmp_path):
    files = export.export(workdir, tmp_path / "m")
    names = {file.name for file in files}
    assert names == {
        "README.md", "model.json", "privacy.json", "privacy.md", "weights.safetensors",
    }  # fmt: skip
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}  # for others to load
    ours = models.read_tensors(tmp_path / "m" / "weights.safetensors")
    want = models.read_tensors(workdir / "weights.safetensors")
    assert not [name for name in ours if "lora" in name]
    assert ours.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(ours[name], value)


def test_timm_layout_loads_back(workdir, tmp_path):
    export.export(workdir, tmp_path / "t", layout="timm")
    export.export(workdir, tmp_path / "m")
    net = build.build(tiny_config()).model
    net = models.vision_transformer(
        models.ViTConfig(16, 1, 2, 16, image_size=14, pooling="gap"), 10
    )
    start = net.init(jax.random.key(1))
    ours, theirs = (
        net.load(start, str(tmp_path / name), head=True)
        for name in ("m/weights.safetensors", "t/model.safetensors")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert "blocks.0.attn.qkv.weight" in models.read_tensors(tmp_path / "t/model.safetensors")


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
    export.export(copied, tmp_path / "m")
    assert json.loads((tmp_path / "m/privacy.json").read_text()) == before
    assert not [p.name for p in (tmp_path / "m").glob("*.*") if b"audit" in p.read_bytes()]
    run.write("audit.json", {**report, "bound": 3.0})
    with pytest.raises(ValueError, match="its audit refutes the claim"):
        export.export(copied, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


def test_private_weights_without_a_statement_are_not_exported(copied, tmp_path):
    stray = (copied / "privacy.json").read_bytes()
    (copied / "privacy.json").unlink()
    with pytest.raises(ValueError, match=r"has no privacy\.json"):
        export.export(copied, tmp_path / "m")
    config = Workdir(copied).read("config.json")
    Workdir(copied).write("config.json", {**config, "dp": None})
    (copied / "privacy.json").write_bytes(stray)  # of whatever was here before
    export.export(copied, tmp_path / "m")
    assert "trained without privacy" in (tmp_path / "m/README.md").read_text()
    assert not list((tmp_path / "m").glob("privacy.*"))


def test_a_damaged_run_leaves_no_half_of_an_export(copied, tmp_path):
    (copied / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is damaged"):
        export.export(copied, tmp_path / "m")
    assert not [path for path in tmp_path.iterdir() if "m" in path.name.split(".")]


def test_metrics_of_private_data_are_not_in_the_card(copied, tmp_path):
    run = Workdir(copied)
    export.export(copied, tmp_path / "public")
    assert "accuracy" in (tmp_path / "public/README.md").read_text().partition("Held out")[2]
    labeled = {f"nonprivate/{name}": value for name, value in run.read("eval.json").items()}
    run.write("eval.json", labeled)
    export.export(copied, tmp_path / "m")
    assert "Held out" not in (tmp_path / "m/README.md").read_text()


def test_mistakes(workdir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for source, target, more, text in (
        (workdir, "full", [], "exists: name a new folder"),
        (tmp_path / "full", "new", [], "has no config.json: has the run finished?"),
        (workdir, "new", ["--format=transformers"], "needs pooling='cls', got 'gap'"),
        (workdir, "new", ["--format=torch"], "must be one of"),
    ):
        assert cli.main(["export", str(source), str(tmp_path / target), *more]) == 2
        assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


@pytest.mark.peers
def test_other_libraries_load_the_folder(workdir, tmp_path):
    torch, timm = (pytest.importorskip(name) for name in ("torch", "timm"))
    import dpjax

    export.export(workdir, tmp_path / "t", layout="timm")
    loaded = dpjax.load(tmp_path / "t")
    net = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    images = np.random.default_rng(0).normal(size=(3, 14, 14, 1)).astype(np.float32)
    with torch.no_grad():
        theirs = net(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(loaded.model.apply(loaded.params, images), theirs, atol=1e-5)
