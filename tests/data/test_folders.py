import numpy as np
import pytest

from dpjax import data
from dpjax.commands import prepare
from dpjax.data.images import encode_png


@pytest.fixture
def folder(tmp_path):
    """Two classes with images of different sizes; the pixels tell split, class and number."""
    for i, split in enumerate(("train", "test")):
        for j, label in enumerate(("cat", "dog")):
            path = tmp_path / "pets" / split / label
            path.mkdir(parents=True)
            for k in range(3 - i):
                pixels = np.full((8 + k, 9, 3), 100 * i + 50 * j + k, np.uint8)
                (path / f"{k}.png").write_bytes(encode_png(pixels))
    return tmp_path / "pets"


def test_a_folder_becomes_a_data_set(folder, tmp_path, capsys):
    command = ["my_pets", f"--source={folder}", f"--data_dir={tmp_path / 'data'}"]
    assert prepare.main(command) == 0
    assert "{'test': 4, 'train': 6}" in capsys.readouterr().out
    dataset = data.load(
        "my_pets", split="test", data_dir=tmp_path / "data", spec=data.ImageSpec(image_size=8)
    )
    assert dataset.class_names == ("cat", "dog")
    found = {
        (int(label), int(pixels.max()))
        for label, pixels in zip(dataset.labels, dataset.get(np.arange(4))["input"], strict=True)
    }
    assert found == {(0, 100), (0, 101), (1, 150), (1, 151)}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: [p.unlink() for p in (f / "train" / "dog").iterdir()], "no images of ['dog']"),
        (lambda f: (f / "test" / "dog").rename(f / "test" / "cow"), "'test' has the classes"),
        (lambda f: (f / "train").rename(f / "training"), "train/CLASS/IMAGE"),
        (lambda f: (f / "train" / "cat" / "0.png").write_text("no"), "is not an image"),
    ],
)
def test_a_folder_that_does_not_fit(folder, tmp_path, spoil, words, capsys):
    spoil(folder)
    command = ["my_pets", f"--source={folder}", f"--data_dir={tmp_path / 'data'}"]
    assert prepare.main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_name_that_tfds_cannot_have(folder, tmp_path):
    with pytest.raises(ValueError, match="dataset='My pets' must match"):
        data.prepare_archive("My pets", folder, data_dir=tmp_path)
