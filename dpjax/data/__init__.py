"""Random-access data sets: preparing, opening, choosing subsets, and feeding them to the step."""

from dpjax.data import prepare
from dpjax.data.causal import LONG_RECORDS, check_template, load_causal, windows
from dpjax.data.dataset import Dataset, Source, distinct_rows, from_arrays, splits_overlap
from dpjax.data.directory import open_directory
from dpjax.data.images import ImageSpec, fit, image_suffixes, open_image
from dpjax.data.load import load, load_text, stored_examples
from dpjax.data.prefetch import Prefetcher, read_ahead
from dpjax.data.prepare import prepare as prepare_archive
from dpjax.data.preprocess import chain, preprocess, random_crop, random_flip, random_shift
from dpjax.data.subsets import holdout, random_share, subset
from dpjax.data.units import Units

__all__ = [
    "LONG_RECORDS",
    "Dataset",
    "ImageSpec",
    "Prefetcher",
    "Source",
    "Units",
    "chain",
    "check_template",
    "distinct_rows",
    "fit",
    "from_arrays",
    "holdout",
    "image_suffixes",
    "load",
    "load_causal",
    "load_text",
    "open_directory",
    "open_image",
    "prepare",
    "prepare_archive",
    "preprocess",
    "random_crop",
    "random_flip",
    "random_share",
    "random_shift",
    "read_ahead",
    "splits_overlap",
    "stored_examples",
    "subset",
    "windows",
]
