"""Text for language models: records of files, cut or split into windows of the context's length.

A record is one text file, one line of a JSON-lines file with `text`, or with `prompt` and
`response`, of which only the response is predicted, or one example of a prepared TFDS data set with
such features. A window is int32 `[3, length]`: tokens, the
token to predict after each (-1: none), and how many UTF-8 bytes of text that one adds.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.dataset import Dataset, Source
from dpjax.data.directory import (
    data_dir_or_default,
    find_directory,
    find_feature,
    open_directory,
    split_pieces,
)
from dpjax.data.index import pieces_of, read_records, records_of
from dpjax.files import json_lines, nearest, read_text

__all__ = ["LONG_RECORDS", "Codec", "check_template", "load_causal", "windows"]

LONG_RECORDS = ("cut", "split")


class Codec(Protocol):
    """A tokenizer, see `dpjax.models.TextCodec`."""

    @property
    def end(self) -> int | None:
        """The token that ends a text."""

    def encode(self, text: str, *, special: bool = True) -> Any:
        """Returns `ids`, and `ends`, where each token ends in the text, in bytes."""


class _Record(NamedTuple):
    prompt: str
    response: str
    unit: str | None
    where: str


def check_template(template: str) -> None:
    """Refuses a template without `{prompt}` before `{response}`, each once."""
    parts = [template.find("{prompt}"), template.find("{response}")]
    if not 0 <= parts[0] < parts[1] or any(
        template.count(name) != 1 for name in ("{prompt}", "{response}")
    ):
        raise ValueError(
            f"data.template={template!r} must contain {{prompt}} and then {{response}}, once each."
        )


def load_causal(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    codec: Codec,
    length: int,
    long_records: str = "cut",
    template: str = "{prompt}{response}",
    unit: str | None = None,
) -> Dataset:
    """Reads and tokenizes a split of text.

    Args:
        name: a folder with a file `SPLIT.jsonl`, or with a folder `SPLIT` of `.txt` files, each one
            record; or a TFDS data set prepared in `data_dir`, of which `prompt` and `response` are
            read, else `text`, else its only text.
        split: name of the split; TFDS slicing syntax for such a data set.
        data_dir: where the folder or data set is. None: the folder is here; either is in the
            directory of data sets, see `load`.
        codec: the tokenizer. Its end token, if it has one, ends every record, and is predicted.
        length: tokens of a window.
        long_records: "cut" keeps a record's first window; "split" makes as many windows of it as
            it takes, in which every token but the first is predicted once. The context does not
            reach from one window into the next.
        template: how a prompt and its response become one text. Nothing before `{response}` is
            predicted.
        unit: the field of a line, or the feature, that says whose record it is; None: each record
            is a unit.

    Returns:
        The windows, held in memory, with one class; `units` says whose each of them is. A record
        without a unit of its own is named by its content, so that its name does not depend on other
        records.

    Raises:
        ValueError: the files are missing, or a record is not what it should be; the message names
            the line.
    """
    check_template(template)
    pieces: list[np.ndarray] = []
    units: list[str] = []
    seen: collections.Counter[bytes] = collections.Counter()
    for record in _records(name, data_dir, split, unit):
        parts = windows(record.prompt, record.response, codec, length, template)
        parts = parts if long_records == "split" else parts[:1]
        if not len(parts):
            raise ValueError(f"{record.where}: a record needs two tokens at least, one to predict.")
        pieces.append(parts)
        if record.unit is None:
            digest = hashlib.sha256(f"{record.prompt}\0{record.response}".encode()).digest()
            seen[digest] += 1  # a copy is a record of its own
            owner = f"{digest.hex()} {seen[digest]}"
        else:
            owner = record.unit
        units += [owner] * len(parts)
    if not pieces:
        raise ValueError(f"data.name={name!r}: split {split!r} has no records.")
    table = np.concatenate(pieces)
    keys = [hashlib.sha256(window.tobytes()).digest()[:16] for window in table]
    return Dataset(
        name=name,
        split=split,
        labels=np.zeros(len(table), np.int32),
        class_names=("text",),
        shape=table.shape[1:],
        rows=np.arange(len(table)),
        source=Source(
            lambda rows: table[rows],
            np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
            np.dtype(np.int32),
        ),
        units=np.asarray(units),
    )


def windows(
    prompt: str, response: str, codec: Codec, length: int, template: str = "{prompt}{response}"
) -> np.ndarray:
    """Returns the windows of one record, int32 `[windows, 3, length]`.

    Args:
        prompt: what is given; may be empty.
        response: what is predicted.
        codec: the tokenizer.
        length: tokens of a window.
        template: see `load_causal`.

    Returns:
        Windows one after the other, without those in which nothing is predicted; none if the
        record has less than two tokens.
    """
    before, after = template.split("{response}")
    given = before.replace("{prompt}", prompt)
    first = codec.encode(given) if given else None
    rest = codec.encode(response + after, special=first is None)
    ids = [*(first.ids if first else []), *rest.ids]
    # Bytes before the response do not count, nor do tokens before it.
    ends = [*([0] * len(first.ids) if first else []), *rest.ends]
    start = len(first.ids) if first else 0
    if codec.end is not None and ids[-1:] != [codec.end]:
        ids, ends = [*ids, codec.end], [*ends, ends[-1] if ends else 0]
    tokens, ends_array = np.asarray(ids, np.int32), np.asarray(ends, np.int32)
    count = -(-(len(ids) - 1) // length) if len(ids) > 1 else 0
    out = np.zeros((count, 3, length), np.int32)
    out[:, 1] = -1
    for number, window in enumerate(out):
        at = np.arange(number * length, min((number + 1) * length, len(ids) - 1))
        window[0, : len(at)] = tokens[at]
        window[1, : len(at)] = np.where(at + 1 >= start, tokens[at + 1], -1)
        window[2, : len(at)] = ends_array[at + 1] - ends_array[at]
    return out[np.any(out[:, 1] >= 0, axis=1)]


def _records(
    name: str, data_dir: str | os.PathLike[str] | None, split: str, unit: str | None
) -> Iterator[_Record]:
    home = data_dir_or_default(data_dir)
    here = Path(data_dir or "").expanduser() / Path(name).expanduser()
    root = here if here.is_dir() else home / Path(name).expanduser()
    lines, folder = root / f"{split}.jsonl", root / split
    if lines.is_file():
        yield from _lines(lines, unit)
    elif folder.is_dir():
        if unit is not None:
            raise ValueError(f"data.unit={unit!r}: the text files of {folder} do not say whose.")
        for path in sorted(folder.rglob("*.txt")):
            yield _Record("", read_text(path), None, str(path))
    elif not any(root.glob("*.jsonl")) and (prepared := find_directory(name, home)) is not None:
        yield from _prepared(open_directory(prepared), split, unit)
    else:
        have = sorted({p.stem for p in root.iterdir()}) if root.is_dir() else []
        near = nearest(split, have)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(
            f"data.name={str(here)!r} has neither {split}.jsonl nor a folder {split} of .txt files."
            f"{hint} Nor is it a TFDS data set that is prepared in {str(home)!r}."
        )


def _prepared(builder: Any, split: str, unit: str | None) -> Iterator[_Record]:
    features = builder.info.features
    if unit is not None and (unit not in features or features[unit].shape != ()):
        raise ValueError(
            f"data.unit={unit!r} must be a feature of {builder.info.name!r}, which has "
            f"{', '.join(features)}."
        )
    asked = ("prompt", "response")
    if all(key in features and isinstance(features[key], tfds.features.Text) for key in asked):
        keys = ["prompt", "response"]
    else:
        text = "text" if "text" in features else None
        keys = [find_feature(builder, tfds.features.Text, text, "text")]
    pieces = split_pieces(builder, split)
    sources = {piece.split: records_of(builder, piece.split) for piece in pieces}
    for piece in pieces:
        where = f"{builder.info.name!r} split {piece.split!r}"
        for part in pieces_of(piece.stop - piece.start):
            rows = piece.start + part
            for row, fields in zip(rows, read_records(sources[piece.split], rows, where)):
                texts = [bytes(fields[key]).decode("utf-8", "replace") for key in keys]
                value = None if unit is None else fields[unit]
                owner = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                place = f"record {row} of {where}"
                named = None if unit is None else _owner({unit: str(owner)}, unit, place)
                yield _Record("" if len(texts) == 1 else texts[0], texts[-1], named, place)


def _lines(path: Path, unit: str | None) -> Iterator[_Record]:
    for number, fields in json_lines(path):
        where = f"{path}, line {number}"
        owner = _owner(fields, unit, where)
        if _has(fields, ("text",)) and not _has(fields, ("prompt", "response"), some=True):
            yield _Record("", fields["text"], owner, where)
        elif _has(fields, ("prompt", "response")) and "text" not in fields:
            yield _Record(fields["prompt"], fields["response"], owner, where)
        else:
            raise ValueError(
                f"{where}: must have text, or prompt and response, as strings; it has "
                f"{', '.join(fields) or 'no field'}."
            )


def _has(fields: dict[str, Any], names: Sequence[str], *, some: bool = False) -> bool:
    if some:
        return any(name in fields for name in names)
    return all(isinstance(fields.get(name), str) for name in names)


def _owner(fields: dict[str, Any], unit: str | None, where: str) -> str | None:
    if unit is None:
        return None
    owner = fields.get(unit)
    if not isinstance(owner, (str, int)) or not str(owner).strip():
        raise ValueError(f"{where}: data.unit={unit!r} must be a field with a name or a number.")
    return str(owner).strip()  # as in tables of own data: "ann " is no other person
