"""Loading prepared TFDS data sets by name, and what is said when they are not as they should be."""

import io
import shutil
import socket
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dpjax import data
from dpjax.data.prepare import prepare_builder

FIXED = {
    "image": tfds.features.Image(shape=(12, 9, 3)),
    "label": tfds.features.ClassLabel(num_classes=2),
}
SIZES = {"train": 40, "validation": 10, "test": 5}


def photo(row, height=12, width=9, mode="RGB", kind="PNG"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.RandomState(row).randint(0, 256, shape).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return pixels, buffer.getvalue()


def toy_builder(records, features=None, name="toy_photos"):
    """A builder class over {split: [record]}."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Toy."""

        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    features
                    or {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                    }
                ),
                supervised_keys=("image", "label") if not features else None,
            )

        def _split_generators(self, dl_manager):
            return {
                split: ((i, record) for i, record in enumerate(items))
                for split, items in records.items()
            }

        def _generate_examples(self):
            raise NotImplementedError

    Toy.name = name
    return Toy


def record(row, **kwargs):
    return {"image": photo(row, **kwargs)[1], "label": row % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """toy_photos: sizes and formats vary; toy_fixed: 12x9."""
    root = tmp_path_factory.mktemp("data")
    start, varying, fixed = 0, {}, {}
    for split, size in SIZES.items():
        rows = range(start, start + size)
        varying[split] = [
            record(r, height=10 + r % 5, width=16, kind="JPEG" if r % 3 else "PNG") for r in rows
        ]
        fixed[split] = [record(r) for r in rows]
        start += size
    prepare_builder(toy_builder(varying), root)
    shape = {
        "image": tfds.features.Image(shape=(12, 9, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    prepare_builder(toy_builder(fixed, shape, "toy_fixed"), root)
    return root


@pytest.fixture
def copied(data_dir, tmp_path):
    shutil.copytree(data_dir / "toy_fixed", tmp_path / "toy_fixed")
    return tmp_path


def test_load_reads_what_was_written(data_dir):
    dataset = data.load("toy_fixed", data_dir=data_dir)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (40, (12, 9, 3), 2)
    assert dataset.class_names == ("cat", "dog")
    written = {photo(row)[0].tobytes(): row % 2 for row in range(40)}
    batch = dataset.get(np.arange(40))
    found = {image.tobytes(): label for image, label in zip(batch["input"], batch["label"])}
    assert found == written
    np.testing.assert_array_equal(batch["label"], dataset.labels)
    assert "tensorflow" not in sys.modules


def test_on_demand_equals_in_memory(data_dir):
    spec = data.ImageSpec(image_size=8)
    held = data.load("toy_photos", data_dir=data_dir, spec=spec)
    lazy = data.load("toy_photos", data_dir=data_dir, spec=spec, memory_limit=0)
    indices = np.array([[7, -1, 39], [0, 7, 21]])
    for key in ("input", "label"):
        np.testing.assert_array_equal(held.get(indices)[key], lazy.get(indices)[key])
    assert held.digest == lazy.digest
    assert held.digest != data.load("toy_photos", split="test", data_dir=data_dir, spec=spec).digest
    other = data.ImageSpec(image_size=8, resample="nearest")
    assert held.digest != data.load("toy_photos", data_dir=data_dir, spec=other).digest


def test_on_demand_through_chunks(data_dir):
    spec = data.ImageSpec(image_size=8)
    lazy = data.load("toy_photos", data_dir=data_dir, spec=spec, memory_limit=0)
    steps = np.random.RandomState(0).randint(-1, 40, (10, 2, 8))
    with data.read_ahead(lazy, steps) as batches:
        for indices, batch in zip(steps, batches, strict=True):
            np.testing.assert_array_equal(batch["label"], lazy.get(indices)["label"])
            np.testing.assert_array_equal(batch["mask"], indices >= 0)


def test_splits_merge_and_slice(data_dir):
    whole = data.load("toy_fixed", split="train + validation", data_dir=data_dir)
    train = data.load("toy_fixed", data_dir=data_dir)
    assert len(whole) == 50
    np.testing.assert_array_equal(whole.labels[:40], train.labels)
    first = data.load("toy_fixed", split="train[:25%]", data_dir=data_dir)
    assert first.digest == train.select(np.arange(10)).digest
    last = data.load("toy_fixed", split="train[25%:]", data_dir=data_dir)
    assert last.digest == train.select(np.arange(10, 40)).digest


def test_name_with_a_version(data_dir):
    assert len(data.load("toy_fixed:1.2.0", data_dir=data_dir)) == 40
    with pytest.raises(ValueError, match=r"version 1.0.0 is not among \['1.2.0'\]"):
        data.load("toy_fixed:1.0.0", data_dir=data_dir)
    with pytest.raises(ValueError, match="must have the form name"):
        data.load("toy_fixed:latest", data_dir=data_dir)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "toy_fixd"}, "dataset='toy_fixd' is unknown. Did you mean 'toy_fixed'"),
        ({"name": "cifar11"}, "dataset='cifar11' is unknown. Did you mean 'cifar10'"),
        (
            {"name": "cifar10"},
            "not prepared in data_dir=.*dpjax prepare cifar10 --source=FILE",
        ),
        ({"name": "cassava"}, "not prepared in .*tfds build cassava --file_format=array_record"),
        ({"split": "trian"}, r"'trian' must be one of \['test', .*\]. Did you mean 'train'"),
        ({"split": "train+dev"}, "'dev' must be one of"),
        ({"split": "train[:half]"}, "split=.* cannot be read"),
        ({"split": ""}, "must be one of"),
        ({"split": "train+train"}, "must not contain an example twice"),
        ({"split": "train[:60%]+train[50%:]"}, "must not contain an example twice"),
        ({"split": "train[:0]"}, "has no examples"),
        ({"name": "toy_photos"}, "image_size=None must be a number"),
        ({"spec": data.ImageSpec(label_key="lable")}, "label_key='lable' must be .*'label'"),
        ({"spec": data.ImageSpec(image_key="label")}, "image_key='label' must be one of"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_mistakes_are_named_before_anything_is_read(data_dir, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": "toy_fixed", "data_dir": data_dir, **change})


def test_missing_data_dir(tmp_path):
    with pytest.raises(ValueError, match=r"not prepared in data_dir=.*which does not exist"):
        data.load("cifar10", data_dir=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def shard(root, split="train"):
    return next((root / "toy_fixed" / "1.2.0").glob(f"*{split}*"))


def break_missing(root):
    shard(root).unlink()


def break_cut(root):
    path = shard(root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_empty(root):
    shard(root).write_bytes(b"")


def break_other(root):
    shutil.copy(shard(root, "test"), shard(root))


def break_info(root):
    (root / "toy_fixed" / "1.2.0" / "dataset_info.json").unlink()


def break_json(root):
    path = root / "toy_fixed" / "1.2.0" / "features.json"
    path.write_text(path.read_text()[:20])


@pytest.mark.parametrize(
    "damage",
    [break_missing, break_cut, break_empty, break_other, break_info, break_json],
)
def test_half_written_data_is_noticed(copied, damage):
    damage(copied)
    with pytest.raises(ValueError, match=r"is half-written: .*Delete it and prepare it again"):
        data.load("toy_fixed", data_dir=copied)


def test_an_interrupted_preparation_is_noticed(copied):
    (copied / "toy_fixed" / "1.2.0").rename(copied / "toy_fixed" / "incomplete.AB12CD_1.2.0")
    with pytest.raises(ValueError, match=r"half-written .*interrupted, or is still running"):
        data.load("toy_fixed", data_dir=copied)


def test_a_format_without_random_access_is_refused(copied):
    path = copied / "toy_fixed" / "1.2.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    for file in path.parent.glob("*array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    with pytest.raises(ValueError, match=r"file_format='tfrecord' .* has no random access"):
        data.load("toy_fixed", data_dir=copied)


@pytest.mark.parametrize("memory_limit", [0, 2**20])
@pytest.mark.parametrize("damage", ["cut", "garbage", "size"])
def test_an_unreadable_image_is_named_by_its_index(tmp_path, memory_limit, damage):
    good = photo(3)[1]
    bad = {"cut": good[:200], "garbage": b"not an image", "size": photo(0, 5, 5)[1]}[damage]
    features = {
        "image": tfds.features.Image(shape=(12, 9, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    records = [record(row) for row in range(6)]
    records[4]["image"] = bad
    prepare_builder(toy_builder({"train": records}, features), tmp_path)
    source = tfds.builder_from_directory(tmp_path / "toy_photos" / "1.2.0").as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    index = next(row for row in range(6) if source[row]["image"] == bad)

    def read_all():
        dataset = data.load("toy_photos", data_dir=tmp_path, memory_limit=memory_limit)
        # Held in memory, or cut, it is noticed before; a whole PNG of another size when it is read.
        assert memory_limit == 0
        assert damage == "size"
        dataset.get(np.arange(6))

    with pytest.raises(ValueError, match=f"image {index} of 'toy_photos' split 'train' cannot"):
        read_all()


def test_labels_out_of_range_in_the_data(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(12, 9, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    records = [record(row) for row in range(4)]
    records[2]["label"] = -1
    prepare_builder(toy_builder({"train": records}, features), tmp_path)
    with pytest.raises(ValueError, match=r"label=-1 of example \d in 'toy_photos' .*\[0, 2\)"):
        data.load("toy_photos", data_dir=tmp_path)


def test_several_labels_need_a_choice(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(12, 9, 3)),
        "fine": tfds.features.ClassLabel(num_classes=4),
        "coarse": tfds.features.ClassLabel(num_classes=2),
    }
    records = [{"image": photo(r)[1], "fine": r % 4, "coarse": r % 2} for r in range(4)]
    builder = toy_builder({"train": records}, features)
    prepare_builder(builder, tmp_path)
    with pytest.raises(ValueError, match=r"label_key=None must name one .*\['coarse', 'fine'\]"):
        data.load("toy_photos", data_dir=tmp_path)
    spec = data.ImageSpec(label_key="fine")
    assert data.load("toy_photos", data_dir=tmp_path, spec=spec).num_classes == 4


def test_the_network_is_not_touched(data_dir, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a connection was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data.load("toy_fixed", data_dir=data_dir)
    with pytest.raises(ValueError, match="not prepared"):
        data.load("cassava", data_dir=data_dir)


def test_several_configs_need_a_choice(copied):
    (copied / "two" / "a").mkdir(parents=True)
    shutil.copytree(copied / "toy_fixed" / "1.2.0", copied / "two" / "a" / "1.2.0")
    with pytest.raises(ValueError, match=r"dataset='two' must name one of its configs: \['a'\]"):
        data.load("two", data_dir=copied)
    assert len(data.load("two/a", data_dir=copied)) == 40


def test_a_damaged_record_is_named(copied):
    path = shard(copied)
    content = bytearray(path.read_bytes())
    middle = len(content) // 8  # the index at the end stays whole, so opening notices nothing
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(record|image) \d+ of 'toy_fixed' split 'train' cannot"):
        data.load("toy_fixed", data_dir=copied)
