"""20 Newsgroups, sorted by date, from its official archive: raw text and 20 labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from dpjax.data.archives import iter_members

__all__ = ["builder_class"]

_FOLDERS = {"20news-bydate-train": "train", "20news-bydate-test": "test"}
_Post = tuple[str, str, str]  # group, number, text


def builder_class(source: Path, expected: dict[str, int] | None) -> Any:
    """The TFDS builder "newsgroups20" of the archive 20news-bydate.tar.gz.

    Features: `text` (the post with its headers From, Subject, Organization, ..., Latin-1 read as
    text), `label` (the group, named, in alphabetical order) and `id`. The archive's authors removed
    headers that name the group; quotes and signatures remain.

    Args:
      source: the archive or a directory of its files.
      expected: posts per split; None skips the check.

    Raises:
      ValueError: if the source cannot be read, lacks a split or a group, or has other sizes.
    """
    posts: dict[str, list[_Post]] = {split: [] for split in _FOLDERS.values()}
    for path, content in iter_members(source, lambda path: _split(path) is not None):
        split = _split(path)
        if split is not None:
            posts[split].append((path.parts[-2], path.name, content.decode("latin-1")))
    counts = {split: len(found) for split, found in posts.items()}
    if not all(counts.values()) or (expected is not None and counts != expected):
        raise ValueError(f"it holds {counts} posts, not {expected or 'some of each'}.")
    groups = sorted({group for found in posts.values() for group, _, _ in found})
    if expected is not None and len(groups) != 20:
        raise ValueError(f"it holds {len(groups)} groups, not 20: {groups}.")

    class Newsgroups20(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """20 Newsgroups: posts to 20 Usenet groups, split by date."""

        name = "newsgroups20"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "text": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(names=groups),
                    }
                ),
                supervised_keys=("text", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(found) for split, found in posts.items()}

        def _generate_examples(self, found: list[_Post]) -> Iterator[tuple[str, dict[str, Any]]]:
            for group, number, text in sorted(found):
                key = f"{group}/{number}"
                yield key, {"id": key, "text": text, "label": group}

    return Newsgroups20


def _split(path: PurePosixPath) -> str | None:
    """The split of 20news-bydate-train/GROUP/NUMBER, also below a leading directory."""
    return _FOLDERS.get(path.parts[-3]) if len(path.parts) >= 3 else None
