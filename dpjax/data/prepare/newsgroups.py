"""20 Newsgroups, sorted by date, from its official archive: raw text and 20 labels."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from dpjax.data.prepare.archives import iter_members
from dpjax.data.prepare.builders import Text, text_builder

__all__ = ["builder_class"]

_FOLDERS = {"20news-bydate-train": "train", "20news-bydate-test": "test"}


def builder_class(source: Path, expected: dict[str, int] | None) -> Any:
    """Returns the TFDS builder "newsgroups20" of the archive 20news-bydate.tar.gz.

    Features: `text` (the post with its headers From, Subject, Organization, ..., decoded as
    Latin-1), `label` (the group, in alphabetical order) and `id`. The authors of the archive
    removed the headers that name the group; quotes and signatures remain.

    Args:
        source: the archive or a directory of its files.
        expected: posts per split; None skips the check.

    Raises:
        ValueError: the source cannot be read, lacks a split or a group, or has other sizes.
    """
    posts: dict[str, list[Text]] = {split: [] for split in _FOLDERS.values()}
    for path, content in iter_members(source, lambda path: _split(path) is not None):
        split = _split(path)
        if split is not None:
            group = path.parts[-2]
            posts[split].append(Text(f"{group}/{path.name}", content.decode("latin-1"), group))
    counts = {split: len(texts) for split, texts in posts.items()}
    if not all(counts.values()) or (expected is not None and counts != expected):
        raise ValueError(f"it holds {counts} posts, not {expected or 'some of each'}.")
    groups = sorted({str(post.label) for texts in posts.values() for post in texts})
    if expected is not None and len(groups) != 20:
        raise ValueError(f"it holds {len(groups)} groups, not 20: {groups}.")

    return text_builder(
        "newsgroups20",
        "20 Newsgroups: posts to 20 Usenet groups, split by date.",
        groups,
        {split: sorted(texts) for split, texts in posts.items()},
    )


def _split(path: PurePosixPath) -> str | None:
    """Returns the split of .../20news-bydate-train/GROUP/NUMBER; None for any other path."""
    return _FOLDERS.get(path.parts[-3]) if len(path.parts) >= 3 else None
