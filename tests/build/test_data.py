"""`config.data` becomes data sets that fit together."""

import numpy as np
import pytest

from dpjax import build, data, models
from dpjax.config import default

SPEC = models.InputSpec(image_size=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def toy(count=6, shape=(4, 4, 3), names=("cat", "dog"), split="train"):
    inputs = np.zeros((count, *shape), np.uint8 if len(shape) == 3 else np.int32)
    labels = np.arange(count) % len(names)
    return data.from_arrays("toy", inputs, labels, class_names=names, split=split)


@pytest.mark.parametrize(
    "held, words",
    [
        ({"names": ("cat", "dog", "cow")}, "label 2 .* is 'cow', but no class of the training"),
        ({"names": ("dog", "cat")}, "label 0 .* is 'dog', but 'cat' in the training data"),
        ({"shape": (5, 4, 3)}, r"inputs uint8 \[5, 4, 3\], but the training .* \[4, 4, 3\]"),
        ({"shape": (4, 4, 1)}, r"inputs uint8 \[4, 4, 1\]"),
        ({"shape": (48,)}, r"inputs int32 \[48\]"),
    ],
)
def test_held_out_data_that_does_not_fit_is_refused(held, words):
    pair = toy(), toy(split="test", **held)
    with pytest.raises(ValueError, match=words):
        build.data.given(default(), pair)
    with pytest.raises(ValueError, match=words):  # before anything is made of a model
        build.build(default(), datasets=pair)


def test_one_class_is_nothing_to_learn():
    with pytest.raises(ValueError, match="'toy' has one class, 'cat': there is nothing to tell"):
        build.build(default(), datasets=(toy(names=("cat",)), toy(split="test", names=("cat",))))


def test_held_out_data_may_lack_a_class():
    pair = toy(), toy(split="test", names=("cat",))
    assert build.data.given(default(), pair) == pair


def test_label_key(tmp_path):
    import tensorflow_datasets as tfds
    from test_load import photo, toy_builder

    features = {
        "image": tfds.features.Image(shape=(12, 9, 3)),
        "fine": tfds.features.ClassLabel(num_classes=4),
        "coarse": tfds.features.ClassLabel(names=["low", "high"]),
    }
    records = [{"image": photo(r)[1], "fine": r % 4, "coarse": r % 4 // 2} for r in range(8)]
    built = toy_builder({"train": records, "test": records[:4]}, features)
    data.prepare.prepare_builder(built, tmp_path)
    config = default()
    config.data.name, config.data.data_dir = "toy_photos", str(tmp_path)
    found = {}
    for key in ("fine", "coarse"):
        config.data.label_key = key
        found[key] = build.data.opened(config, SPEC)[0]
    assert found["coarse"].class_names == ("low", "high")
    np.testing.assert_array_equal(found["coarse"].labels, found["fine"].labels // 2)
    config.data.label_key = "corse"
    with pytest.raises(ValueError, match=r"label_key='corse' must be one of .*mean 'coarse'"):
        build.data.opened(config, SPEC)
    config.data.name = "numpy:zeros"
    with pytest.raises(ValueError, match=r"data.label_key='corse' must be None"):
        build.data.check(config.data)
