"""The two data sets that arrive with Python packages; preparing atomically and side by side."""

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dpjax import data
from dpjax.data.prepare import builders, write


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


@pytest.mark.parametrize(
    "name, train, test, side",
    [("digits", 1617, 180, 8), pytest.param("mnist5k", 4000, 1000, 28, marks=pytest.mark.slow)],
)
def test_embedded_sets_are_what_the_packages_hold(data_dir, name, train, test, side):
    parts = {split: data.load(name, split=split, data_dir=data_dir) for split in ("train", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": train, "test": test}
    assert parts["train"].shape == (side, side, 1)
    np.testing.assert_array_equal(np.bincount(parts["test"].labels), [test // 10] * 10)
    images, labels = getattr(builders, name)()
    want = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels))
    found = []
    for part in parts.values():
        batch = part.get(np.arange(len(part)))
        found += [(i.tobytes(), int(y)) for i, y in zip(batch["input"], batch["label"])]
    assert sorted(found) == want


def test_digits_values_can_be_got_back(data_dir):
    from sklearn.datasets import load_digits

    pixels = data.load("digits", data_dir=data_dir).get(np.arange(1617))["input"]
    assert pixels.max() == 255
    values = np.rint(pixels * 16.0 / 255)
    assert set(np.unique(values)) <= set(range(17))
    stored = {image.astype(np.uint8).tobytes() for image in values[..., 0]}
    assert stored <= {image.astype(np.uint8).tobytes() for image in load_digits().images}


def pixels_digest(dataset):
    batch = dataset.get(np.arange(len(dataset)))
    parts = batch["input"].tobytes() + batch["label"].astype("<i4").tobytes()
    return hashlib.sha256(parts).hexdigest()[:16]


DIGESTS = {
    "digits/train": "38b4515871c73b8e",
    "digits/test": "4e1eeb25baaaf108",
    "mnist5k/train": "24bb5fd25f549b12",
    "mnist5k/test": "4090823e75d96dd9",
}


@pytest.mark.parametrize("part", DIGESTS)
def test_a_split_is_the_same_on_every_machine(data_dir, part):
    """Pinned, examples and their order: a change would change every published number."""
    name, split = part.split("/")
    assert pixels_digest(data.load(name, split=split, data_dir=data_dir)) == DIGESTS[part]


@pytest.mark.parametrize("damage", ["cut", "no info", "leftover"])
def test_half_written_embedded_data_is_made_again(tmp_path, capsys, damage):
    whole = data.load("digits", data_dir=tmp_path)
    directory = tmp_path / "digits" / "1.0.0"
    if damage == "cut":
        shard = next(directory.glob("*train*"))
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "no info":
        (directory / "dataset_info.json").unlink()
    else:
        directory.rename(tmp_path / "digits" / "incomplete.XX_1.0.0")
    assert data.load("digits", data_dir=tmp_path).digest == whole.digest
    assert ("Preparing it again" in capsys.readouterr().err) == (damage != "leftover")
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_a_failing_generator_leaves_nothing(tmp_path, monkeypatch):
    def broken(pixels):
        raise RuntimeError("disk full")

    monkeypatch.setattr(builders, "encode_png", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        data.load("digits", data_dir=tmp_path)
    assert not list((tmp_path / "digits").glob("*"))
    monkeypatch.undo()
    assert len(data.load("digits", data_dir=tmp_path)) == 1617


def test_it_is_prepared_once(data_dir, monkeypatch):
    data.load("digits", data_dir=data_dir)
    monkeypatch.setattr(write, "_generate", lambda builder: pytest.fail("prepared again"))
    data.load("digits", data_dir=data_dir)


def test_a_bar_is_shown_on_stderr_only(tmp_path, capsys):
    data.load("digits", data_dir=tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Reading digits train: 100%" in shown.err


@pytest.mark.slow
def test_three_processes_prepare_at_once(tmp_path):
    script = """
        import json, sys
        from dpjax import data
        from dpjax.data.prepare import write
        made, generate = [], write._generate
        write._generate = lambda builder: (made.append(1), generate(builder))
        digest = data.load("digits", data_dir=sys.argv[1]).digest
        print(json.dumps({"made": len(made), "digest": digest}))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(data.__file__).parents[2],
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    answers = [json.loads(out) for out, _ in outputs]
    assert sum(answer["made"] for answer in answers) == 1
    assert len({answer["digest"] for answer in answers}) == 1
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data_dir='.*file' cannot be written"):
        data.load("digits", data_dir=tmp_path / "file")


def test_default_data_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("DPJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("DPJAX_CACHE_DIR", str(tmp_path))
    data.load("digits")
    assert (tmp_path / "data" / "digits").is_dir()
    monkeypatch.setenv("DPJAX_DATA_DIR", str(tmp_path / "own"))
    data.load("digits", split="test")
    assert (tmp_path / "own" / "digits").is_dir()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="dataset='digits' ships with the package 'scikit-learn'"):
        data.load("digits", data_dir=tmp_path)
