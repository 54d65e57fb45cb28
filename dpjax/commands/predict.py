"""Predict classes with a finished run, or with an exported one.

    dpjax predict --workdir=DIR --input=photos --output=preds.csv

INPUT is an image, or a folder of images (sub-folders included); for a model of texts, it is a text,
a .txt file with one text a line, a .csv or .jsonl file with a column or field "text", or a folder
of .txt files with one text each. Prints the class of every input and its probability; --output
writes a CSV file with the probabilities of all classes. A temperature that the run fitted privately
is part of its weights. A language model continues every text, by up to --max_tokens tokens, and
--output gets its continuations.
Exit codes: 0 all predicted, 1 some inputs could not be read and are named, 2 a mistake.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpjax.commands import cli
from dpjax.files import json_lines, read_text

_ROWS = 256  # read and predicted together


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--workdir", required=True, help="of a finished run, or of an export")
    parser.add_argument("--input", required=True, help="file, folder or text")
    parser.add_argument("--output", type=cli.path, metavar="CSV", help="where all probabilities go")
    parser.add_argument(
        "--weights", metavar="FILE", help="of the workdir, such as weights_ema.safetensors",
    )  # fmt: skip

    parser.add_argument(
        "--max_tokens", type=int, default=64, help="of a language model: the most tokens to add"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the most likely token"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="share of the probability to sample from"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a continuation"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    from dpjax.build import generator, predictor
    from dpjax.files import replacing

    if args.output is not None:
        args.output = args.output.expanduser()
        if args.output.suffix != ".csv":
            raise ValueError(f"--output={str(args.output)!r} must end in .csv.")
        if args.output.is_dir():
            raise ValueError(f"--output={str(args.output)!r} is a folder.")
        if not args.output.parent.is_dir():
            raise ValueError(f"--output={str(args.output)!r}: its folder does not exist.")
    if generator.is_language_model(args.workdir):
        return _generate(args)
    trained = predictor.load(args.workdir, weights=args.weights)
    read = _images if trained.tokenize is None else _texts
    items = read(args.input)
    if not items:
        raise ValueError(f"--input={args.input!r} holds nothing to predict.")
    table, unreadable = _table(trained, items)
    if args.output is None:
        for name, label, p in table:
            print(f"{' '.join(name.split())}\t{label}\t{max(p):.4f}")  # one line, whatever the text
    else:
        with replacing(args.output) as temporary, temporary.open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["input", "class", *trained.class_names])
            rows.writerows([name, label, *(f"{x:.6g}" for x in p)] for name, label, p in table)
        print(f"{len(table)} predictions in {args.output}")
    if unreadable:
        print(f"dpjax predict: {unreadable} of {len(items)} inputs not read", file=sys.stderr)
    return int(unreadable > 0)


def _generate(args: argparse.Namespace) -> int:
    from dpjax.build import generator
    from dpjax.files import replacing

    speak = generator.load(args.workdir, weights=args.weights)
    items = _texts(args.input)
    if not items:
        raise ValueError(f"--input={args.input!r} holds nothing to continue.")
    texts = speak(
        [text for _, text in items], max_tokens=args.max_tokens, temperature=args.temperature,
        top_p=args.top_p, stop=args.stop, seed=args.seed,
    )  # fmt: skip
    if args.output is None:
        print("\n".join(before + after for (_, before), after in zip(items, texts)))
        return 0
    with replacing(args.output) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["input", "continuation"])
        rows.writerows((name, after) for (name, _), after in zip(items, texts))
    print(f"{len(texts)} continuations in {args.output}")
    return 0


def _table(trained: Any, items: list[tuple[str, Any]]) -> tuple[list[tuple[str, str, Any]], int]:
    """Returns (input, class, probabilities) of what can be read, and how many inputs cannot."""
    table: list[tuple[str, str, Any]] = []
    for start in range(0, len(items), _ROWS):
        names, inputs = [], []
        for name, item in items[start : start + _ROWS]:
            try:
                inputs.append(trained.read(item))
                names.append(name)
            except ValueError as error:
                print(f"dpjax predict: {error}", file=sys.stderr)
        said = trained.predict(inputs)
        table += zip(names, said.names, said.probabilities)
    return table, len(items) - len(table)


def _images(given: str) -> list[tuple[str, Any]]:
    """Returns name and path of every image."""
    from dpjax.build.predictor import image_files

    path = Path(given).expanduser()
    if path.is_dir():
        return [(str(file.relative_to(path)), file) for file in image_files(path)]
    if not path.is_file():
        raise ValueError(f"--input={given!r} is neither a file nor a folder.")
    return [(given, path)]


def _texts(given: str) -> list[tuple[str, Any]]:
    """Returns name and text of every text."""
    path = Path(given).expanduser()
    if len(given) < 256 and path.is_dir():
        files = sorted(path.rglob("*.txt"))
        return [(str(file.relative_to(path)), read_text(file)) for file in files]
    if len(given) < 256 and path.is_file():
        return list(_records(path))
    if path.suffix in (".txt", ".csv", ".jsonl") and not given.count(" "):
        raise ValueError(f"--input={given!r} is neither a file nor a folder.")
    return [(given, given)]


def _records(path: Path) -> Iterator[tuple[str, str]]:
    rows: Iterable[tuple[int, Any]]
    if path.suffix == ".jsonl":
        rows = json_lines(path)
    elif path.suffix == ".csv":
        text = io.StringIO(read_text(path), newline="")  # a quoted text may have several lines
        rows = ((reader.line_num, row) for reader in [csv.DictReader(text)] for row in reader)
    else:
        yield from ((line, line) for line in read_text(path).split("\n") if line.strip())
        return
    for number, row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{path}, line {number}: has no text in its field 'text'.")
        yield row["text"], row["text"]
