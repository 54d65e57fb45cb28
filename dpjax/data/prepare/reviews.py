"""10,568 sentences from movie reviews, with sentiment rated by a crowd."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dpjax.data.prepare.archives import iter_members
from dpjax.data.prepare.builders import Text, text_builder
from dpjax.data.subsets import stratified_indices

__all__ = ["builder_class"]

_FILE = "movieReviewSnippets_GroundTruth.txt"
_INNER = "hutto_ICWSM_2014.tar.gz"
_TEST_SHARE, _SPLIT_SEED = 0.2, 20240


def builder_class(source: Path, expected: dict[str, int] | None) -> Any:
    """Returns the TFDS builder "movie_reviews" of the archive of vaderSentiment 3.3.2 (MIT).

    Features: `text` (one sentence), `label` (0 negative, 1 positive: the sign of the mean of 20
    ratings; the 37 sentences with a mean of zero are omitted) and `id`. The test split is a fifth
    of each class, drawn with a fixed seed.

    Args:
        source: vaderSentiment-3.3.2.tar.gz, or a directory with its ground truth file.
        expected: sentences per split; None skips the check.

    Raises:
        ValueError: the source cannot be read or has other contents.

    Source: Hutto and Gilbert, ICWSM 2014.
    """
    sentences = _sentences(source)
    labels = np.array([sentence.label for sentence in sentences])
    test = stratified_indices(labels, _TEST_SHARE, seed=_SPLIT_SEED)
    splits = {"train": np.setdiff1d(np.arange(len(labels)), test), "test": test}
    counts = {split: len(rows) for split, rows in splits.items()}
    if expected is not None and counts != expected:
        raise ValueError(f"it holds {counts} sentences, not {expected}.")

    return text_builder(
        "movie_reviews",
        "Sentences from film reviews, negative or positive.",
        ("negative", "positive"),
        {split: [sentences[row] for row in rows] for split, rows in splits.items()},
    )


def _sentences(source: Path) -> list[Text]:
    """Returns the sentences whose mean rating is not zero, in the order of the file."""
    table = b""
    for path, content in iter_members(source, lambda p: p.name in (_FILE, _INNER)):
        table = content if path.name == _FILE else _from_inner(content)
    if not table:
        raise ValueError(f"it holds neither {_FILE} nor {_INNER}.")
    sentences = []
    for line in table.decode("latin-1").splitlines():
        key, mean, text = line.split("\t", 2)
        if float(mean) != 0:
            sentences.append(Text(key, text.strip(), int(float(mean) > 0)))
    return sentences


def _from_inner(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.extractfile(f"{_INNER.removesuffix('.tar.gz')}/{_FILE}")
        return member.read() if member else b""
