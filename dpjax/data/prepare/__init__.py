"""Turns published archives, image folders and images shipped in packages into TFDS data sets."""

from dpjax.data.prepare.atomic import prepare_builder
from dpjax.data.prepare.builders import EMBEDDED
from dpjax.data.prepare.sources import SOURCES, prepare

__all__ = [
    "EMBEDDED",
    "SOURCES",
    "prepare",
    "prepare_builder",
]
