"""Fine-tune pretrained models under differential privacy, in JAX."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpjax.build.predictor import Predictor

__version__ = "0.1.0"


def load(directory: str | os.PathLike[str], *, weights: str | None = None) -> Predictor:
    """Loads a finished or exported run, to predict with it; see `dpjax.build.predictor.load`."""
    from dpjax.build import predictor  # takes seconds to import, which `dpjax.dp` does not need

    return predictor.load(directory, weights=weights)
