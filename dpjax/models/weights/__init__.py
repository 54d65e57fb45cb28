"""Weight files: finding and reading them, and mapping their tensors to this package's names."""

from dpjax.models.weights.published import WEIGHTS, availability, locate, sha256
from dpjax.models.weights.resample import resample_grid
from dpjax.models.weights.tables import (
    Source,
    Tensors,
    load_plain,
    load_weights,
    loader,
    read_tensors,
    save_weights,
    translate,
)

__all__ = [
    "WEIGHTS",
    "Source",
    "Tensors",
    "availability",
    "load_plain",
    "load_weights",
    "loader",
    "locate",
    "read_tensors",
    "resample_grid",
    "save_weights",
    "sha256",
    "translate",
]
