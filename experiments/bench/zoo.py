"""What clipping costs on eight models of the zoo (`tests/zoo`), at sizes that take time.

    python -m experiments.bench.zoo                       # all, some minutes
    python -m experiments.bench.zoo --models=vit,gpt --rounds=3

The columns are those of `experiments.bench.idioms`: compile time, median time and XLA's temporaries
over the plain gradient's, and the share of parameters that is differentiated per example.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench import idioms

sys.path.append(str(Path(__file__).parents[2] / "tests" / "zoo"))  # where the models are
import sequences
import vision

__all__ = ["MODELS", "main"]

MODELS: dict[str, Callable[[], Any]] = {
    make.__name__: functools.partial(make, **sizes)
    for make, sizes in (
        (vision.vit, {"n": 8, "width": 192, "depth": 4, "heads": 3, "image": 64, "patch": 8}),
        (vision.mixer, {"n": 16, "width": 192, "depth": 4, "image": 32}),
        (vision.convnext, {"n": 8, "width": 96, "depth": 4, "image": 32}),
        (vision.resnet, {"n": 8, "width": 64, "depth": 3, "image": 32}),
        (vision.efficientnet, {"n": 8, "width": 32, "depth": 4, "image": 32}),
        (sequences.gpt, {"n": 8, "vocab": 8192, "width": 256, "depth": 4, "tokens": 64}),
        (sequences.lstm, {"n": 16, "width": 256, "tokens": 32}),
        (sequences.experts, {"n": 16, "experts": 8, "width": 128, "tokens": 64}),
    )
}

_MODELS = flags.DEFINE_list("models", list(MODELS), "Models to measure")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    print(idioms.head("model"), flush=True)
    for name in _MODELS.value:
        found = idioms.measure(name, MODELS[name](), flags.FLAGS.rounds)
        print(idioms.row(name, found), flush=True)


if __name__ == "__main__":
    app.run(main)
