"""Film reviews from files of the package's layout, made here."""

import numpy as np
import pytest
from test_newsgroups import tar

from dpjax import data

LINES = "1\t2.26\tA fine film.\n2\t-0.6\tTepid caf\xe9 biopic\n3\t0.0\tNeither\n" + "".join(
    f"{k}\t{(-1) ** k}.0\tSentence {k}\t\n" for k in range(4, 24)
)


def lengths(texts):
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
        data.load_text("movie_reviews", split=split, data_dir=tmp_path, tokenize=lengths)
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
