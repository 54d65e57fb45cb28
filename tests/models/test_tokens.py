"""Text to ids, with a tokenizer made here."""

import json

import numpy as np
import pytest

from dpjax import models

SPEC = models.TextSpec(max_length=6, vocab_size=8, pad_id=0)


@pytest.fixture
def file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_ids_are_cut_and_padded(file):
    ids = models.tokenizer(str(file), SPEC)(["good film", "bad " * 20, "", "what"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, [[2, 4, 6, 3, 0, 0], [2, 5, 5, 5, 5, 3], [2, 3, 0, 0, 0, 0], [2, 1, 3, 0, 0, 0]]
    )
    assert models.tokenizer(str(file), SPEC)([]).shape == (0, 6)


def test_a_tokenizer_of_another_model_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match="7 tokens"):
        models.tokenizer(str(file), models.TextSpec(6, 5))
    with pytest.raises(ValueError, match="pad_id=7"):
        models.tokenizer(str(file), models.TextSpec(6, 8, pad_id=7))
    with pytest.raises(FileNotFoundError, match=r"gone.json"):
        models.tokenizer(str(tmp_path / "gone.json"), SPEC)
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is not a tokenizer"):
        models.tokenizer(str(tmp_path / "bad.json"), SPEC)


def test_the_digest_of_a_tokenizer_names_what_it_computes(file):
    digest = models.tokenizer(str(file), SPEC).digest
    assert models.tokenizer(str(file), SPEC).digest == digest
    assert models.tokenizer(str(file), models.TextSpec(5, 8)).digest != digest
    file.write_text(file.read_text().replace("film", "book"))
    assert models.tokenizer(str(file), SPEC).digest != digest


def described(path, *, pre="smollm", model="gpt2"):
    """Writes a GGUF file that describes bytes and one merge; returns the tokenizer it describes."""
    gguf, tokenizers = pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words, merges = ["<|endoftext|>", *letters, "ab"], ["a b"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return words


def test_a_gguf_file_describes_its_tokenizer(tmp_path):
    words = described(tmp_path / "m.gguf")
    spec = models.TextSpec(8, len(words), causal=True)
    codec = models.text_codec(str(tmp_path / "m.gguf"), spec)
    assert codec.end == 0
    ids = codec.encode("cab 12<|endoftext|>").ids
    assert [words[i] for i in ids] == ["c", "ab", "\u0120", "1", "2", "<|endoftext|>"]
    assert codec.decode(ids) == "cab 12"
    with pytest.raises(ValueError, match="has 258 tokens, but the model has vocab_size=9"):
        models.text_codec(str(tmp_path / "m.gguf"), models.TextSpec(8, 9, causal=True))
    # Its library is one like any other, which an export writes.
    codec.library.save(str(tmp_path / "tokenizer.json"))
    again = models.text_codec(str(tmp_path / "tokenizer.json"), spec)
    assert again.encode("cab 12<|endoftext|>").ids == ids


@pytest.mark.parametrize("kind", [{"pre": "qwen2"}, {"model": "llama"}])
def test_another_tokenizer_of_a_gguf_file_is_refused(kind, tmp_path):
    words = described(tmp_path / "m.gguf", **kind)
    with pytest.raises(ValueError, match=r"Name the tokenizer\.json of the model"):
        models.text_codec(str(tmp_path / "m.gguf"), models.TextSpec(8, len(words), causal=True))
