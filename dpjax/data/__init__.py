"""Data sets in random access, their preparation, and the path from disk to the step."""

from dpjax.data.dataset import Dataset, from_arrays
from dpjax.data.datasets import load, load_text
from dpjax.data.images import ImageSpec
from dpjax.data.pipeline import Prefetcher, chunks, prefetch
from dpjax.data.preprocess import chain, preprocess, random_crop, random_flip, random_shift
from dpjax.data.selection import holdout, random_share, subset
from dpjax.data.sources import prepare as prepare_archive

__all__ = [
    "Dataset",
    "ImageSpec",
    "Prefetcher",
    "chain",
    "chunks",
    "from_arrays",
    "holdout",
    "load",
    "load_text",
    "prefetch",
    "prepare_archive",
    "preprocess",
    "random_crop",
    "random_flip",
    "random_share",
    "random_shift",
    "subset",
]
