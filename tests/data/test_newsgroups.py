"""20 Newsgroups from files of the official layout, made here; the command line."""

import io
import tarfile

import numpy as np
import pytest

from dpjax import data
from dpjax.commands import cli
from dpjax.data.prepare import SOURCES


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def newsgroups(path, groups=("alt.atheism", "comp.graphics", "sci.med")):
    files = {}
    for split, size in (("train", 6), ("test", 2)):
        for group in groups:
            for number in range(size):
                text = f"From: someone\nSubject: caf\xe9 {group} {number}\n\nWords {number}.\n"
                name = f"20news-bydate-{split}/{group}/{50000 + number}"
                files[name] = text.encode("latin-1")
    return tar(path, files)


def lengths(texts):
    return np.stack([np.frombuffer(t.encode("utf-32-le")[:120], np.int32) for t in texts])


def test_newsgroups_text_and_labels(tmp_path):
    source = newsgroups(tmp_path / "20news-bydate.tar.gz")
    data.prepare_archive("newsgroups20", source, data_dir=tmp_path, checked=False)
    train = data.load_text("newsgroups20", data_dir=tmp_path, tokenize=lengths)
    assert (len(train), train.shape, train.num_classes) == (18, (30,), 3)
    assert train.class_names[1] == "comp.graphics"
    batch = train.get(np.array([0, 5, -1]))
    assert batch["input"].dtype == np.int32
    assert not batch["input"][2].any()
    text = batch["input"][0].tobytes().decode("utf-32-le")
    assert text.startswith("From: someone\nSubject: caf\xe9")
    assert data.subset(train, 2, seed=0).get(np.arange(6))["input"].shape == (6, 30)


@pytest.mark.parametrize(
    "tokenize",
    [lambda t: np.zeros((len(t), 3)), lambda t: np.zeros(len(t), int), lambda t: [[1]]],
)
def test_newsgroups_wrong_tokenizer(tmp_path, tokenize):
    source = newsgroups(tmp_path / "a.tgz")
    data.prepare_archive("newsgroups20", source, data_dir=tmp_path, checked=False)
    with pytest.raises(ValueError, match="tokenize returned"):
        data.load_text("newsgroups20", data_dir=tmp_path, tokenize=tokenize)


def test_command(tmp_path, capsys, monkeypatch):
    source = newsgroups(tmp_path / "a.tgz")
    flags = ["newsgroups20", f"--source={source}", f"--data_dir={tmp_path}"]
    assert cli.main(["prepare", *flags]) == 2
    assert "holds {'train': 18, 'test': 6} texts of 3 classes, not" in capsys.readouterr().err
    monkeypatch.setitem(
        SOURCES,
        "newsgroups20",
        type(SOURCES["newsgroups20"])("", SOURCES["newsgroups20"].read, None),
    )
    assert cli.main(["prepare", *flags]) == 0
    assert "{'train': 18, 'test': 6}" in capsys.readouterr().out
