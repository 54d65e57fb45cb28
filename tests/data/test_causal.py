"""Text to windows: what is predicted, what is counted, and whose it is."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from causal import byte_tokenizer, corpus

from dpjax import data, models
from dpjax.data.prepare.builders import records_builder
from dpjax.data.prepare.write import prepare_builder

SPEC = models.TextSpec(8, 257, causal=True)


@pytest.fixture
def codec(tmp_path):
    return models.text_codec(str(byte_tokenizer(tmp_path)), SPEC)


def load(folder, codec, **changes):
    arguments = {"split": "train", "codec": codec, "length": 8, "unit": None, **changes}
    return data.load_causal(str(folder), **arguments)


def written(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "train.jsonl").write_text(text)
    return folder


def test_every_token_but_the_first_is_predicted_once(codec):
    text = "twenty bytes of text"
    ids = [*codec.encode(text).ids, codec.end]
    parts = data.windows("", text, codec, 8)
    assert parts.shape == (3, 3, 8)
    tokens, targets, sizes = parts.transpose(1, 0, 2).reshape(3, -1)
    real = targets >= 0
    np.testing.assert_array_equal(tokens[real], ids[:-1])
    np.testing.assert_array_equal(targets[real], ids[1:])
    np.testing.assert_array_equal(real, np.arange(24) < 20)
    # One byte a token, none for the end.
    np.testing.assert_array_equal(sizes[real], [1] * 19 + [0])
    assert not sizes[~real].any()


@pytest.mark.parametrize("text", ["aé", "日本語 text", "🙂🙂"])
def test_bytes_of_a_text_are_all_counted(codec, text):
    parts = data.windows("", text, codec, 8)
    ends = codec.encode(text).ends
    first = ends[0]  # of the token that nothing predicts
    assert parts[:, 2].sum() == len(text.encode()) - first
    assert ends == sorted(ends)
    assert codec.decode(codec.encode(text).ids) == text


def test_a_prompt_is_read_and_not_predicted(codec):
    parts = data.windows("ask", "say", codec, 16, "<{prompt}>{response}!")
    tokens, targets, sizes = parts[0]
    shown = codec.decode([t for t in targets if t > 0])
    assert codec.decode(tokens[:9].tolist()) == "<ask>say!"
    assert shown == "say!"
    assert targets[8] == codec.end
    assert sizes.sum() == len("say!")
    # Windows in which nothing is predicted are none.
    long = data.windows("x" * 41, "yes", codec, 8)
    assert len(long) == 1
    assert [t for t in long[0, 1] if t >= 0] == [*codec.encode("yes").ids, codec.end]


def test_a_long_record_is_cut_or_one_unit_of_windows(tmp_path, codec):
    lines = [{"text": "short"}, {"text": "long " * 8}, {"text": "short"}]
    folder = written(tmp_path, *lines, "")
    cut = load(folder, codec)
    assert len(cut) == 3
    assert cut.shape == (3, 8)
    split = load(folder, codec, long_records="split")
    units = data.Units(split, 2)
    # Equal records are records of their own.
    assert sorted(units.counts().tolist()) == [1, 1, 5]
    both = units.batch(np.array([0, 1, 2]), seed=0, step=0)
    assert both["input"].shape == (3, 2, 3, 8)
    assert both["record"].sum() == 4


def test_a_removed_record_changes_nothing_about_others(tmp_path, codec):
    lines = [{"text": f"record {n} " * 4} for n in (1, 2, 2, 3)]
    whole = data.Units(load(written(tmp_path, *lines), codec, long_records="split"), 2)
    for gone in range(4):
        rest = [line for number, line in enumerate(lines) if number != gone]
        part = data.Units(load(written(tmp_path, *rest), codec, long_records="split"), 2)
        left = {key.tobytes(): i for i, key in enumerate(whole.keys)}
        assert len(part) == 3
        for index, key in enumerate(part.keys):
            one = part.batch(np.array([index]), seed=3, step=5)
            other = whole.batch(np.array([left[key.tobytes()]]), seed=3, step=5)
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_units_are_named_by_a_field(tmp_path, codec):
    split = load(corpus(tmp_path), codec, unit="author", long_records="split")
    assert set(split.units) == {f"author {n}" for n in range(20)}


def test_text_files_are_records(tmp_path, codec):
    folder = tmp_path / "train" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("one record\nof two lines")
    (tmp_path / "train" / "b.txt").write_text("another")
    (tmp_path / "train" / "c.md").write_text("not read")
    dataset = load(tmp_path, codec, long_records="split")
    assert len(set(dataset.units)) == 2
    assert (
        data.load_causal(
            tmp_path.name, split="train", data_dir=tmp_path.parent, codec=codec, length=8
        ).digest
        == load(tmp_path, codec).digest
    )
    with pytest.raises(ValueError, match=r"data\.unit='author'"):
        load(tmp_path, codec, unit="author")


def test_a_unit_is_called_by_its_name_without_blanks(tmp_path, codec):
    records = [{"text": "a b", "who": who} for who in ("ann", " ann ", "bob")]
    assert sorted(set(load(written(tmp_path, *records), codec, unit="who").units)) == ["ann", "bob"]
    with pytest.raises(ValueError, match=r"line 1: data\.unit='who'"):
        load(written(tmp_path, {"text": "a b", "who": " "}), codec, unit="who")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a', "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ({"txt": "a b"}, "line 2: must have text, or prompt and response.*it has txt"),
        ({"text": 3}, "line 2: must have text"),
        ({"prompt": "a"}, "line 2: must have text"),
        ({"text": "a b", "response": "c"}, "line 2: must have text"),
        ({"text": ""}, "line 2: a record needs two tokens"),
        (r'{"text": "a \ud83d"}', r"line 2: surrogates not allowed, such as '\\ud83d'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, codec, line, message):
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, {"text": "good"}, line), codec)


def test_missing_files_units_and_templates_are_named(tmp_path, codec):
    corpus(tmp_path)
    with pytest.raises(ValueError, match=r"neither tain\.jsonl.*Did you mean 'train'"):
        load(tmp_path, codec, split="tain")
    with pytest.raises(ValueError, match=r"line 1: data\.unit='writer'"):
        load(tmp_path, codec, unit="writer")
    for template in ("{prompt}", "{response}{prompt}", "{prompt}{response}{response}"):
        with pytest.raises(ValueError, match=r"data\.template="):
            data.check_template(template)


def test_the_end_of_text_is_that_of_the_tokenizer(tmp_path):
    path = str(byte_tokenizer(tmp_path))
    assert models.text_codec(path, SPEC).end == 0
    assert (
        models.text_codec(path, SPEC, end="a").end
        == models.text_codec(path, SPEC).encode("a").ids[0]
    )
    with pytest.raises(ValueError, match="has no token '</x>'"):
        models.text_codec(path, SPEC, end="</x>")
    with pytest.raises(ValueError, match="257 tokens, but the model has vocab_size=100"):
        models.text_codec(path, models.TextSpec(8, 100, causal=True))


def stored(folder, name, features, rows):
    """Writes a TFDS data set with a split "train"."""
    kinds = {key: tfds.features.Text() if kind is str else tfds.features.Scalar(np.int64)
             for key, kind in features.items()}  # fmt: skip
    records = [(number, dict(zip(features, row))) for number, row in enumerate(rows)]
    prepare_builder(records_builder(name, "made up", kinds, lambda: {"train": records}), folder)


def test_a_tfds_data_set_is_read_like_lines(tmp_path, codec):
    texts = [f"text {number}" for number in range(5)]
    stored(tmp_path, "notes", {"text": str, "writer": np.int64, "title": str},
           [(text, number // 2, "no") for number, text in enumerate(texts)])  # fmt: skip
    written(tmp_path, *({"text": text, "writer": n // 2} for n, text in enumerate(texts)))
    for unit in (None, "writer"):
        lines = load(tmp_path, codec, unit=unit)
        found = load("notes", codec, unit=unit, data_dir=tmp_path)
        some = load("notes", codec, unit=unit, data_dir=tmp_path, split="train[3:]+train[:1]")
        order = np.argsort([w.tobytes() for w in lines.source.read(np.arange(5))])
        again = np.argsort([w.tobytes() for w in found.source.read(np.arange(5))])
        for field in ("units", "source"):
            one, other = (x.units if field == "units" else x.source.keys for x in (lines, found))
            np.testing.assert_array_equal(np.asarray(one)[order], np.asarray(other)[again])
        assert len(some) == 3
    with pytest.raises(ValueError, match=r"data\.unit='author' must be a feature of 'notes'"):
        load("notes", codec, unit="author", data_dir=tmp_path)


def test_prompt_and_response_of_a_tfds_data_set_are_told_apart(tmp_path, codec, monkeypatch):
    stored(tmp_path, "dialogues", {"prompt": str, "response": str}, [("ask", "say")])
    monkeypatch.setenv("DPJAX_DATA_DIR", str(tmp_path))
    (window,) = load("dialogues", codec).source.read(np.arange(1))
    written(tmp_path, {"prompt": "ask", "response": "say"})
    (expected,) = load(tmp_path, codec).source.read(np.arange(1))
    np.testing.assert_array_equal(window, expected)
    stored(tmp_path, "pairs", {"one": str, "two": str}, [("a", "b")])
    with pytest.raises(ValueError, match="text=None must name one Text feature of 'pairs'"):
        load("pairs", codec)
