"""What is exported is plain, complete, and never half-written over something else."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, models
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
