"""Text to the token ids a text encoder reads, with the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from dpjax.models.model import TextSpec

__all__ = ["Tokenize", "tokenizer"]

Tokenize = Callable[[Sequence[str]], np.ndarray]


def tokenizer(path: str, spec: TextSpec) -> Tokenize:
    """A tokenizer from a `tokenizer.json`.

    Args:
      path: the file, such as `locate("minilm_l6_tokenizer")`.
      spec: the input of the model it is for.

    Returns:
      A function from texts to int32 ids `[texts, max_length]`, cut and padded with `pad_id`.

    Raises:
      ImportError: the `tokenizers` library is not installed.
      FileNotFoundError: there is no such file.
      ValueError: it is no tokenizer, or has another vocabulary or padding than the model.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs the tokenizers library: pip install tokenizers.") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer file {path}.")
    try:
        made = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}.") from error
    if made.get_vocab_size() > spec.vocab_size:
        raise ValueError(
            f"{path} has {made.get_vocab_size()} tokens, the model vocab_size={spec.vocab_size}."
        )
    padding = made.id_to_token(spec.pad_id)
    if padding is None:
        raise ValueError(f"{path} has no token for pad_id={spec.pad_id}.")
    made.enable_truncation(max_length=spec.max_length)
    made.enable_padding(length=spec.max_length, pad_id=spec.pad_id, pad_token=padding)

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = [encoding.ids for encoding in made.encode_batch(list(texts))]
        return np.asarray(ids, np.int32).reshape(-1, spec.max_length)

    return tokenize
