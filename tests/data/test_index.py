"""The index of a split: used, checked, and computed again where it does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_load import FIXED, photo, record, toy_builder

from dpjax import data
from dpjax.data import directory, index
from dpjax.data.prepare import prepare_builder


@pytest.fixture
def root(tmp_path):
    records = {"train": [record(r) for r in range(40)], "test": [record(r) for r in range(40, 50)]}
    prepare_builder(toy_builder(records, FIXED), tmp_path)
    return tmp_path


def load(root, split="train", **options):
    return data.load("toy_photos", split=split, data_dir=root, **options)


def file(root, split="train"):
    return root / "toy_photos" / "1.2.0" / "index" / f"{split}.npz"


def no_reading(monkeypatch):
    monkeypatch.setattr(index, "_computed", lambda *args: pytest.fail("all records were read"))


def test_the_second_opening_reads_no_record(root, monkeypatch):
    first = load(root)
    no_reading(monkeypatch)
    reads = []
    monkeypatch.setattr(index, "read_records", lambda *args: reads.append(args))
    monkeypatch.setattr("dpjax.data.records.read_records", lambda *args: reads.append(args))
    second = load(root)
    assert (second.digest, reads) == (first.digest, [])
    np.testing.assert_array_equal(second.labels, first.labels)
    np.testing.assert_array_equal(second.identities(np.arange(40)), first.identities(np.arange(40)))


def test_only_the_rows_asked_for_are_read(root, monkeypatch):
    dataset, rows = load(root), []
    real = index.read_records
    monkeypatch.setattr(
        "dpjax.data.records.read_records", lambda r, n, w: (rows.extend(n), real(r, n, w))[1]
    )
    batch = dataset.get(np.array([3, -1, 7, 3]))
    assert sorted(rows) == [3, 7]
    np.testing.assert_array_equal(dataset.get(np.array([3, -1, 7, 3]))["input"], batch["input"])
    assert sorted(rows) == [3, 7]  # they stay in memory


@pytest.mark.parametrize("at", ["every bit of the headers", "cut", "empty", "text"])
def test_a_damaged_index_is_named_and_computed_again(root, capsys, at):
    digest = load(root).digest
    whole = file(root).read_bytes()
    if at == "every bit of the headers":
        places = [whole.find(mark) + k for mark in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"\x93NUMPY")
                  for k in range(0, 22, 3)]  # fmt: skip
        contents = [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places]
    else:
        contents = [{"cut": whole[:-30], "empty": b"", "text": b"hello"}[at]]
    for content in contents:
        file(root).write_bytes(content)
        capsys.readouterr()
        assert load(root).digest == digest
        said = capsys.readouterr().err
        assert file(root).read_bytes() == content or f"{file(root)} is " in said


def test_a_flipped_label_in_an_index_is_noticed(root, capsys):
    dataset = load(root)
    content = bytearray(file(root).read_bytes())
    place = content.find(dataset.labels.astype("<i8").tobytes())
    assert place > 0
    content[place] ^= 1
    file(root).write_bytes(content)
    assert load(root).digest == dataset.digest
    assert "is damaged (BadZipFile" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["label", "image", "order"])
def test_changed_data_changes_the_identity(root, tmp_path_factory, change):
    digest = load(root).digest
    records = [record(r) for r in range(40)]
    if change == "label":
        records[5]["label"] ^= 1
    elif change == "image":
        records[5]["image"] = photo(77)[1]
    else:
        records = records[1:] + records[:1]
    other = tmp_path_factory.mktemp("other")
    prepare_builder(toy_builder({"train": records}, FIXED), other)
    (shard,) = (other / "toy_photos" / "1.2.0").glob("*train*")
    (root / "toy_photos" / "1.2.0" / shard.name).write_bytes(shard.read_bytes())
    assert load(root).digest != digest


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("change", ["label", "image", "damage"])
def test_a_record_that_is_not_the_indexed_one_is_named(root, monkeypatch, change, limit):
    """As in a large file, of which only the ends are compared."""
    monkeypatch.setattr(index, "_fingerprint", lambda *args: "the same")
    dataset = load(root, memory_limit=limit)
    where = next(r for r in range(40) if dataset.labels[r] == 1)
    image = dataset.get(np.array([where]))["input"][0]
    records = [record(r) for r in range(40)]
    number = next(r for r in range(40) if (photo(r)[0] == image).all())
    if change == "label":
        records[number]["label"] = 0
    else:
        records[number]["image"] = photo(77)[1]
    (shard,) = (root / "toy_photos" / "1.2.0").glob("*train*")
    if change == "damage":
        content = bytearray(shard.read_bytes())
        content[len(content) // 8 : len(content) // 8 + 64] = bytes(64)
        shard.write_bytes(content)
    else:
        prepare_builder(toy_builder({"train": records}, FIXED, "other"), root)
        (other,) = (root / "other" / "1.2.0").glob("*train*")
        shard.write_bytes(other.read_bytes())
    again = load(root, memory_limit=limit)
    assert again.digest == dataset.digest
    if change != "damage":
        assert len(again.get(np.delete(np.arange(40), where))["input"]) == 39
    with pytest.raises(ValueError, match=r"(record|image) \d+ of 'toy_photos' split 'train'"):
        again.get(np.arange(40))


def test_an_index_is_as_private_as_the_data(root):
    for shard in (root / "toy_photos" / "1.2.0").glob("*array_record*"):
        shard.chmod(0o640)
    load(root)
    assert file(root).stat().st_mode & 0o777 == 0o640


def test_splits_take_their_part_of_the_index(root):
    whole, train, test = (load(root, split) for split in ("train+test", "train", "test"))
    np.testing.assert_array_equal(whole.labels, np.concatenate([train.labels, test.labels]))
    part = load(root, "test[2:4]+train[:3]")
    np.testing.assert_array_equal(part.labels, [*test.labels[2:4], *train.labels[:3]])
    both = part.get(np.arange(5))["input"]
    np.testing.assert_array_equal(both[:2], test.get(np.array([2, 3]))["input"])
    np.testing.assert_array_equal(both[2:], train.get(np.arange(3))["input"])


def test_pieces_of_one_split_are_joined(root):
    builder = directory.open_directory(root / "toy_photos" / "1.2.0")
    assert directory.split_pieces(builder, "train[:50%]+train[50%:]") == [("train", 0, 40)]
    assert directory.split_pieces(builder, "train[1:3]+test") == [("train", 1, 3), ("test", 0, 10)]


class Letters:
    """A tokenizer that says what it computes."""

    def __init__(self, digest="letters of 8"):
        self.digest, self.calls = digest, 0

    def __call__(self, texts):
        self.calls += 1
        rows = [[ord(c) for c in text[:8].ljust(8)] for text in texts]
        return np.array(rows, np.int32)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"{k} text", "label": k % 2}) + "\n" for k in range(20))
    )
    data.prepare_archive("mails", tmp_path / "t.jsonl", data_dir=tmp_path)
    return tmp_path


def test_tokens_are_kept(texts, monkeypatch):
    first, second, other = Letters(), Letters(), Letters("other")
    one, two, three = (
        data.load_text("mails", data_dir=texts, tokenize=t) for t in (first, second, other)
    )
    assert (first.calls, second.calls, other.calls) == (1, 0, 1)
    assert one.digest == two.digest != three.digest
    np.testing.assert_array_equal(one.get(np.arange(20))["input"], two.get(np.arange(20))["input"])
    part = data.load_text("mails", data_dir=texts, tokenize=second, split="train[5:9]")
    rows = one.select(np.arange(5, 9))
    np.testing.assert_array_equal(part.get(np.arange(4))["input"], rows.get(np.arange(4))["input"])
    assert part.digest == rows.digest
    assert second.calls == 0


def test_damaged_tokens_are_named(texts):
    data.load_text("mails", data_dir=texts, tokenize=Letters())
    (kept,) = (texts / "mails" / "1.0.0" / "index").glob("*.npy")
    content = bytearray(kept.read_bytes())
    content[-20] ^= 1  # of the last text
    kept.write_bytes(content)
    dataset = data.load_text("mails", data_dir=texts, tokenize=Letters())
    dataset.get(np.arange(19))
    with pytest.raises(ValueError, match=r"the tokens of text 19 of 'mails' .* are damaged"):
        dataset.get(np.arange(20))


_SCALE = """
import resource, sys, time
import numpy as np
from dpjax import data
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.perf_counter()
dataset = data.load("many", data_dir=sys.argv[1])
dataset.digest
opened, start = time.perf_counter() - start, time.perf_counter()
memory = peak() - before
rows = np.random.default_rng(0).choice(len(dataset), 1024, replace=False)
batch = dataset.get(rows)
first = time.perf_counter() - start
assert (batch["label"] == rows % 1000).all()
print(f"{len(dataset)} {opened:.2f} {first:.2f} {memory:.0f}")
"""


@pytest.mark.slow
def test_a_million_records_open_in_seconds(tmp_path):
    """1.3 million images of 4x4: opening and digest < 5 s and 200 MB, first 1,024 images < 1 s.

    Making the set and its index takes about ten minutes on one core.
    """
    from array_record.python import array_record_module

    features = {
        "image": tfds.features.Image(shape=(4, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=1000),
    }

    def png(number):
        pixels = np.frombuffer(number.to_bytes(16, "little"), np.uint8).reshape(4, 4, 1)
        return data.images.encode_png(pixels)

    one = {"train": [{"image": png(0), "label": 0}]}
    path = prepare_builder(toy_builder(one, features, "many"), tmp_path)
    builder = tfds.builder_from_directory(path)
    shards, each = 16, 1_300_000 // 16
    next(path.glob("*-of-00001")).unlink()
    for shard in range(shards):
        file = path / f"many-train.array_record-{shard:05d}-of-{shards:05d}"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for number in range(shard * each, (shard + 1) * each):
            example = {"image": png(number), "label": number % 1000}
            writer.write(builder.info.features.serialize_example(example))
        writer.close()
    info = json.loads((path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(each)] * shards
    (path / "dataset_info.json").write_text(json.dumps(info))
    shown = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _SCALE, str(tmp_path)], text=True, check=True,
            stdout=subprocess.PIPE, cwd=Path(data.__file__).parents[2],
        )  # fmt: skip
        shown.append(done.stdout.split())
    total, opened, first, memory = map(float, shown[1])
    assert total == shards * each
    assert (opened < 5, memory < 200, first < 1) == (True, True, True), shown
