"""Data of your own: images in class folders, or a table of images or texts."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from PIL import UnidentifiedImageError
from tqdm import tqdm

from dpjax.data.images import decode, encode_png, image_suffixes, open_image
from dpjax.data.index import pieces_of, workers
from dpjax.data.prepare.builders import Record, records_builder
from dpjax.data.prepare.write import Contents, digest_of, listed
from dpjax.files import json_lines, read_text

__all__ = ["is_own", "read_own"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SPLIT = re.compile(r"\w+")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_HIDDEN = {"__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini"}  # and names with a leading dot
_COLOR = (None, None, 3)  # images of own data are stored as color
_ORIENTATION = 0x0112  # EXIF tag


class Row(NamedTuple):
    """One example of a source.

    Attributes:
        name: how its user knows it: path in the source, or file and line of a table.
        split: name of its split.
        key: unique in its split.
        label: name of its class.
        content: file of an image, or a text.
        unit: whose example it is; None if the source does not say.
    """

    name: str
    split: str
    key: str
    label: str
    content: Path | str
    unit: str | None = None


class Picture(NamedTuple):
    """What decoding an image showed; `problem` is empty if it can be taken."""

    digest: str
    size: tuple[int, int] = (0, 0)
    changes: tuple[str, ...] = ()  # what makes the stored image differ from the file
    problem: str = ""
    is_image: bool = True


def is_own(source: Path) -> bool:
    """Whether `source` is a table, a directory of tables, or has class folders under `train`."""
    return bool(_tables(source)) or (source / "train").is_dir()


def read_own(name: str, source: Path, *, skip_broken: bool = False) -> Contents:
    """Reads data of a user's own.

    Args:
        name: name of the data set, in lower case.
        source: one of
            a directory SPLIT/CLASS/IMAGE with a split named train; sub-folders of a class belong to
            the class, as in torchvision;
            a table (.csv, .tsv, .jsonl or .parquet) with columns `label` and either `file`, a path
            relative to the table, or `text`; optional are `split`, by default train, and `unit`;
            a directory of such tables, one per split: train.csv, test.csv.
            Hidden files and folders are ignored. Any format that Pillow reads is taken. PNG and
            JPEG files are stored unchanged, unless they are on their side; others become PNG.
        skip_broken: leave out images that cannot be decoded, and count them.

    Returns:
        The contents. Classes are numbered in alphabetical order, or numerically if all are numbers.

    Raises:
        ValueError: naming the file, line or class.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"dataset={name!r} must match {_NAME.pattern}.")
    skipped: dict[str, list[str]] = {}
    if tables := _tables(source):
        seen: dict[str, str] = {}
        rows = [row for table in tables for row in _table_rows(table, source.is_dir(), seen)]
    else:
        rows = list(_folder_rows(source, skipped))
    if not rows:
        raise ValueError(f"it has no examples{_count(skipped)}.")
    paths = [row for row in rows if isinstance(row.content, Path)]
    if paths and len(paths) < len(rows):
        raise ValueError("some tables have a column file and others text; use one of them.")
    if len({row.unit is None for row in rows}) > 1:
        where = next(row.name for row in rows if row.unit is None)
        raise ValueError(f"{where} has no unit, but others do; all rows must say whose they are.")
    size: Any = (None, None)
    changes: dict[str, tuple[str, ...]] = {}
    if paths:
        rows, digests, size, changes = _pictures(rows, skipped, skip_broken)
    else:
        digests = {row.name: digest_of(row.content, row.label, row.unit) for row in rows}
    classes = _classes(rows, source)
    features: dict[str, Any] = {} if paths else {"id": tfds.features.Text()}
    if rows[0].unit is not None:
        features["unit"] = tfds.features.Text()
    kind = tfds.features.Image(shape=(*size, 3)) if paths else tfds.features.Text()
    features |= {"image" if paths else "text": kind}
    features["label"] = tfds.features.ClassLabel(names=classes)
    splits = dict.fromkeys(sorted({row.split for row in rows}))

    def records(split: str) -> Iterator[Record]:
        for row in rows:
            if row.split == split:
                fields: dict[str, Any] = {"unit": row.unit, "id": row.key, "label": row.label}
                if isinstance(row.content, Path):
                    fields["image"] = _stored(row, digests[row.name], changes[row.name])
                else:
                    fields["text"] = row.content
                yield row.key, {key: fields[key] for key in features}

    builder_class = records_builder(
        name, "Data of the user's own.", features, lambda: {s: records(s) for s in splits}
    )
    notes = [f"taken: {len(rows)} of {len(rows) + sum(map(len, skipped.values()))}"]
    notes += [f"skipped, {why}: {len(names)} ({listed(names)})" for why, names in skipped.items()]
    for change, count in sorted(Counter(c for cs in changes.values() for c in cs).items()):
        notes.append(f"{change}: {count}")
    if "unit" in features:
        units = len({row.unit for row in rows})
        notes.append(f"units: {units}; --config.data.unit=unit protects each as a whole")
    return Contents(builder_class, digests, notes)


def _classes(rows: Sequence[Row], source: Path) -> list[str]:
    """The class names in order, after checking that every split has classes of the training split.

    A class folder without images is a mistake, too.
    """
    by_split: dict[str, set[str]] = {}
    for row in rows:
        by_split.setdefault(row.split, set()).add(row.label)
    if "train" not in by_split:
        raise ValueError(f"it has the splits {sorted(by_split)}, but none named 'train'.")
    for split in by_split:
        folders = _visible(source / split) if not _tables(source) else []
        empty = {path.name for path in folders if path.is_dir()} - by_split[split]
        if empty:
            raise ValueError(f"split {split!r} has no images of {sorted(empty)}.")
    numbers = all(re.fullmatch(r"\d+", label) for label in by_split["train"])
    classes = sorted(by_split["train"], key=(lambda label: (int(label), label)) if numbers else str)
    for split, labels in by_split.items():
        if not _SPLIT.fullmatch(split) or split == "all":
            raise ValueError(f"split {split!r} must have a name of letters, digits and _, not all.")
        if unknown := sorted(labels - set(classes)):
            raise ValueError(
                f"split {split!r} has the classes {sorted(labels)}, not {classes}: "
                f"{unknown} do not occur in training."
            )
    return classes


def _visible(folder: Path) -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name[0] != "." and path.name not in _HIDDEN]


def _folder_rows(source: Path, skipped: dict[str, list[str]]) -> Iterator[Row]:
    def files(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(source).as_posix()
            if path.name[0] == "." or path.name in _HIDDEN:
                skipped.setdefault("hidden", []).append(name)
            elif not path.is_dir():
                yield path
            elif folder.resolve().is_relative_to(path.resolve()):
                skipped.setdefault("a link to a folder above", []).append(name)
            else:
                yield from files(path)

    for path in files(source):
        inside = path.relative_to(source)
        if len(inside.parts) < 3:
            skipped.setdefault("not in SPLIT/CLASS", []).append(inside.as_posix())
            continue
        split, label, *_ = inside.parts
        yield Row(inside.as_posix(), split, inside.relative_to(split).as_posix(), label, path)


def _tables(source: Path) -> list[Path]:
    if source.is_dir():
        if any(path.is_dir() for path in _visible(source / "train")):
            return []  # class folders; a table beside them describes them
        paths = [path for path in _visible(source) if path.suffix.lower() in _TABLES]
        return paths if any(path.stem == "train" for path in paths) else []
    return [source] if source.suffix.lower() in _TABLES and source.is_file() else []


def _table_rows(path: Path, by_stem: bool, seen: dict[str, str]) -> Iterator[Row]:
    split = path.stem if by_stem else "train"
    for line, fields in _table(path):
        where = f"{path.name}:{line}"
        field = "file" if "file" in fields else "text"
        if "label" not in fields or field not in fields or {"file", "text"} <= set(fields):
            raise ValueError(
                f"{where} has the columns {sorted(fields)}; it needs label and either file or "
                "text, and may have unit and split."
            )
        values = {}
        for key in ("label", field, "unit", "split"):
            value = fields.get(key, split if key == "split" else None)
            if key == "unit" and key not in fields:
                continue
            if not isinstance(value, (str, int)) or not str(value).strip():
                raise ValueError(
                    f"{where}: {key} is {value!r}, but must be a text or whole number."
                )
            values[key] = str(value) if key == "text" else str(value).strip()
            try:  # JSON can name halves of a character, which are no text
                values[key].encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: {key} cannot be written: {error.reason}.") from error
        if "\n" in values["label"]:
            raise ValueError(f"{where}: label {values['label']!r} must be one line.")
        content: Path | str = values[field]
        key = f"{path.stem}/{line:09d}"
        if field == "file":
            key, content = values["file"], path.parent / values["file"]
            first = seen.setdefault(os.path.normpath(content), where)
            if first != where:  # twice in a batch, or trained on and tested on
                raise ValueError(f"{where}: {key!r} is already in {first}.")
        name = f"{values['split']}/{key}" if field == "file" else where
        yield Row(name, values["split"], key, values["label"], content, values.get("unit"))


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number and the fields of each row of a table."""
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ValueError(f"{path} needs pyarrow: pip install pyarrow.") from error
        try:
            yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name} is not a complete Parquet file: {error}") from error
        return
    if path.suffix.lower() == ".jsonl":
        yield from json_lines(path)
        return
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path.name} has several columns named {', '.join(twice)}.")
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{path.name}:{reader.line_num} has another number of fields than the header "
                    f"{header.strip()!r}."
                )
            yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{path.name}:{reader.line_num} is not CSV: {error}.") from error


def _pictures(
    rows: Sequence[Row], skipped: dict[str, list[str]], skip_broken: bool
) -> tuple[list[Row], dict[str, str], Any, dict[str, tuple[str, ...]]]:
    """Decodes every image. Returns the rows to take, the digests of all images, the common (height,
    width) or (None, None), and by name what is changed in the stored image."""
    pictures: list[Picture] = []
    with (
        ThreadPoolExecutor(workers(), thread_name_prefix="dpjax-decode") as pool,
        tqdm(desc="Decoding images", total=len(rows), file=sys.stderr) as bar,
    ):
        look = lambda piece: [_picture(rows[row]) for row in piece]  # noqa: E731
        for some in pool.map(look, list(pieces_of(len(rows)))):
            pictures += some
            bar.update(len(some))
    broken, take = [], []
    for row, picture in zip(rows, pictures, strict=True):
        if not picture.is_image:
            skipped.setdefault("not images", []).append(row.name)
        elif picture.problem:
            broken.append(f"{row.name} ({picture.problem})")
        else:
            take.append((row, picture))
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken)} {'file is' if len(broken) == 1 else 'files are'} not an image that can "
            f"be read: {listed(broken)}. Repair or remove it, or leave it out with --skip_broken "
            "(skip_broken=True)."
        )
    if broken:
        skipped["broken"] = broken
    digests = {r.name: p.digest for r, p in zip(rows, pictures, strict=True) if p.is_image}
    sizes = {picture.size for _, picture in take}
    size = sizes.pop() if len(sizes) == 1 else (None, None)
    return [row for row, _ in take], digests, size, {r.name: p.changes for r, p in take}


def _picture(row: Row) -> Picture:
    """Decodes one image."""
    path = Path(row.content)
    try:
        content = path.read_bytes()
    except OSError as error:
        return Picture("", problem=str(error.strerror))
    digest = digest_of(content, row.label, row.unit)
    try:
        changes, image = [], open_image(content)
        if image.getexif().get(_ORIENTATION, 1) != 1:
            changes.append("turned upright, as EXIF says")
        if image.format not in ("PNG", "JPEG", "MPO"):  # MPO: JPEG with a preview after it
            changes.append(f"stored as PNG, from {image.format}")
            if getattr(image, "is_animated", False):
                changes.append("first frame taken")
        height, width, _ = decode(content, _COLOR).shape
    except UnidentifiedImageError:
        known = path.suffix.lower() in image_suffixes()
        problem = "it has the contents of no image" if known else ""
        return Picture(digest, problem=problem, is_image=known)
    except Exception as error:  # Pillow raises a dozen unrelated types on bad bytes
        return Picture(digest, problem=" ".join(str(error).split()))
    return Picture(digest, (height, width), tuple(changes))


def _stored(row: Row, digest: str, changes: Sequence[str]) -> bytes:
    content = Path(row.content).read_bytes()
    if digest_of(content, row.label, row.unit) != digest:
        raise ValueError(f"{row.content} changed while it was prepared; try again.")
    return encode_png(decode(content, _COLOR)) if changes else content


def _count(skipped: dict[str, list[str]]) -> str:
    counts = [f"{len(names)} {why} ({listed(names)})" for why, names in skipped.items()]
    return f", apart from {'; '.join(counts)}" if counts else ""
