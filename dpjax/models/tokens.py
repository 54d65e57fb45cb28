"""Turns text into the token ids of a text encoder, with the `tokenizers` library."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dpjax.models.model import TextSpec

__all__ = ["Tokenize", "tokenizer"]

Tokenize = Callable[[Sequence[str]], np.ndarray]


def tokenizer(path: str, spec: TextSpec) -> Tokenize:
    """Returns the tokenizer of a `tokenizer.json`.

    Args:
        path: the file, such as `locate("minilm_l6_tokenizer")`.
        spec: the expected input of the model.

    Returns:
        A function from texts to int32 ids `[texts, max_length]`, truncated or padded with `pad_id`.
        Its attribute `digest` changes with the file, the library and the shape of the ids, so that
        ids can be kept on disk.

    Raises:
        ImportError: the `tokenizers` library is not installed.
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a tokenizer, or its vocabulary or padding does not fit the
            model.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs the tokenizers library: pip install tokenizers.") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer file {path}.")
    try:
        library = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}.") from error
    if library.get_vocab_size() > spec.vocab_size:
        raise ValueError(
            f"{path} has {library.get_vocab_size()} tokens, but the model has "
            f"vocab_size={spec.vocab_size}."
        )
    padding = library.id_to_token(spec.pad_id)
    if padding is None:
        raise ValueError(f"{path} has no token for pad_id={spec.pad_id}.")
    library.enable_truncation(max_length=spec.max_length)
    library.enable_padding(length=spec.max_length, pad_id=spec.pad_id, pad_token=padding)

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = [encoding.ids for encoding in library.encode_batch(list(texts))]
        return np.asarray(ids, np.int32).reshape(-1, spec.max_length)

    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    facts = (tokenizers.__version__, spec.max_length, spec.pad_id, content)
    tokenize.digest = " ".join(map(str, facts))  # type: ignore[attr-defined]
    return tokenize
