"""What the tests of language models share: a tokenizer of bytes, and a small corpus."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as kinds

from dpjax.config import default

END = "<|endoftext|>"
VOCABULARY = 257  # all bytes and the end
NAMES = ("ann", "bob", "cyd", "dan", "eve")


def byte_tokenizer(folder):
    """Writes a tokenizer.json whose tokens are single bytes, as byte-level BPE has without merges.

    The end is token 0, as in SmolLM2.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    library = tokenizers.Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    path = folder / "tokenizer.json"
    library.save(str(path))
    return path


def corpus(folder, count=60, seed=0, **fields):
    """Writes train.jsonl and test.jsonl of short lines that a model can learn."""
    rng = np.random.default_rng(seed)
    for split, size in (("train", count), ("test", 12)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for number in range(size):
                one, other = rng.choice(NAMES, 2, replace=False)
                line = {"text": f"{one} met {other} at noon", "author": f"author {number // 3}"}
                file.write(json.dumps({**line, **fields}) + "\n")
    return folder


def causal_config(folder, **changes):
    """A run of a few seconds: two blocks of width 32, bytes for tokens."""
    config = default()
    config.task = "causal_lm"
    config.data.name = str(corpus(folder))
    config.data.tokenizer = str(byte_tokenizer(folder))
    config.model.name, config.model.size = "decoder", "tiny"
    with config.unlocked():
        config.model.options = {
            "vocab_size": VOCABULARY, "width": 32, "heads": 2, "kv_heads": 1, "mlp": 48,
            "max_length": 24, "tied": False,
        }  # fmt: skip
    config.batch_size, config.physical_batch, config.epochs = 16, 16, 2.0
    config.dp.delta, config.private_seed = 1e-3, 1
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        with config.unlocked():
            (config[section] if section else config)[field] = value
    return config
