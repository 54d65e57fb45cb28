"""Turns text into token ids, with the `tokenizers` library."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpjax.models.model import TextSpec

__all__ = ["Encoded", "TextCodec", "Tokenize", "text_codec", "tokenizer"]

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
    library = _open(path, spec)
    padding = library.id_to_token(spec.pad_id)
    if padding is None:
        raise ValueError(f"{path} has no token for pad_id={spec.pad_id}.")
    library.enable_truncation(max_length=spec.max_length)
    library.enable_padding(length=spec.max_length, pad_id=spec.pad_id, pad_token=padding)

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = [encoding.ids for encoding in library.encode_batch(list(texts))]
        return np.asarray(ids, np.int32).reshape(-1, spec.max_length)

    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    facts = (metadata.version("tokenizers"), spec.max_length, spec.pad_id, content)
    tokenize.digest = " ".join(map(str, facts))  # type: ignore[attr-defined]
    return tokenize


def _open(path: str, spec: TextSpec) -> Any:
    """Opens a tokenizer whose vocabulary fits a model; raises what `tokenizer` does."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs the tokenizers library: pip install tokenizers.") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer file {path}.")
    try:
        described = spec.causal and path.endswith(".gguf")
        library = (_from_gguf if described else tokenizers.Tokenizer.from_file)(path)
    except ImportError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is not a tokenizer: {error}.") from error
    if library.get_vocab_size() > spec.vocab_size:
        raise ValueError(
            f"{path} has {library.get_vocab_size()} tokens, but the model has "
            f"vocab_size={spec.vocab_size}."
        )
    return library


_SPECIAL = 3  # what a GGUF file calls a control token


def _from_gguf(path: str) -> Any:
    """The byte-level tokenizer that a `.gguf` file describes beside its weights."""
    import tokenizers

    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path} needs the gguf package: pip install gguf.") from error
    fields = gguf.GGUFReader(path).fields

    def field(name: str) -> Any:
        if f"tokenizer.ggml.{name}" not in fields:
            raise ValueError(f"it has no field tokenizer.ggml.{name}")
        return fields[f"tokenizer.ggml.{name}"].contents()

    pre = tokenizers.pre_tokenizers
    whole = pre.ByteLevel(add_prefix_space=False)
    splits = {"gpt-2": whole, "smollm": pre.Sequence([pre.Digits(individual_digits=True), whole])}
    if field("model") != "gpt2" or field("pre") not in splits:
        raise ValueError(
            f"its kind is {field('model')!r}, {field('pre')!r}, of which byte-level ones "
            f"({', '.join(splits)}) are read. Name the tokenizer.json of the model"
        )
    words, kinds = field("tokens"), field("token_type")
    merges = [tuple(pair.split(" ")) for pair in field("merges")]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges)
    )
    library.pre_tokenizer = splits[field("pre")]
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(
        [w for w, kind in zip(words, kinds, strict=True) if kind == _SPECIAL]
    )
    return library


# How the tokenizers of published decoders call the token that ends a text.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: the tokens.
        ends: where each token ends in the text, in UTF-8 bytes; it never falls.
    """

    ids: list[int]
    ends: list[int]


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """The tokenizer of a language model, in both directions.

    Attributes:
        library: a `tokenizers.Tokenizer`.
        end: id of the token that ends a text; None if there is none.
    """

    library: Any
    end: int | None

    def encode(self, text: str, *, special: bool = True) -> Encoded:
        """Returns the tokens of a text.

        Args:
            text: any text.
            special: adds what the tokenizer puts around a text, such as a token of its beginning.
        """
        encoding = self.library.encode(text, add_special_tokens=special)
        # Offsets count characters. A special token has none: it ends where the one before it does.
        bytes_before = np.cumsum([0, *(len(char.encode()) for char in text)])
        ends = np.maximum.accumulate([0, *(int(bytes_before[b]) for _, b in encoding.offsets)])
        return Encoded(list(encoding.ids), ends[1:].tolist())

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        text: str = self.library.decode(list(ids), skip_special_tokens=True)
        return text


def text_codec(path: str, spec: TextSpec, *, end: str | None = None) -> TextCodec:
    """Returns the tokenizer of a language model, from its `tokenizer.json`.

    Args:
        path: the file, or a `.gguf` file of weights that describes a byte-level tokenizer of the
            kind "smollm" or "gpt-2".
        spec: the expected input of the model.
        end: the token that ends a text; None takes the first of the usual ones that exists.

    Raises:
        ImportError: the `tokenizers` library, or gguf for such a file, is not installed.
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a tokenizer, does not fit the model, or has no token `end`.
    """
    library = _open(path, spec)
    library.no_truncation()
    library.no_padding()
    ids = [library.token_to_id(token) for token in (_ENDS if end is None else (end,))]
    known = [i for i in ids if i is not None]
    if end is not None and not known:
        raise ValueError(f"{path} has no token {end!r}.")
    return TextCodec(library, known[0] if known else None)
