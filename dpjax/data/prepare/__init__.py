"""Turns published archives, data of your own and images in packages into TFDS data sets."""

from dpjax.data.prepare.builders import EMBEDDED
from dpjax.data.prepare.sources import SOURCES, prepare
from dpjax.data.prepare.write import prepare_builder, summary

__all__ = [
    "EMBEDDED",
    "SOURCES",
    "prepare",
    "prepare_builder",
    "summary",
]
