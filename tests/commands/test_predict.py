"""From a folder of photos to predictions: the trained model, its exports, and unreadable inputs."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

import dpjax
from dpjax import build, data, models
from dpjax.build import predictor
from dpjax.commands import cli
from dpjax.commands.export import export

COLORS = {"dusk": (40, 20, 90), "noon": (220, 210, 160), "dawn": (230, 120, 110)}
CONFIG = """
from tiny import tiny_config

def get_config():
    options = {{"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14, "channels": 3}}
    config = tiny_config(
        data__name="skies", data__data_dir={data!r}, data__host_image_size=16, data__pad=1,
        model__options=options, dp__delta=1e-3, dp__epsilon=20.0, dp__temperature__share=0.2,
        batch_size=60, physical_batch=60, epochs=4.0, eval_every=100, ema=0.5,
        optimizer__learning_rate=0.02)
    return config
"""


def photo(rng, color, size=(22, 18)):
    noise = rng.integers(-15, 16, (*size, 3))
    return Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def skies(tmp_path_factory):
    """Photos, and the directory of a run on them, all by the commands of the guide."""
    root = tmp_path_factory.mktemp("skies")
    rng = np.random.default_rng(0)
    for split, count in (("train", 50), ("test", 20)):
        for name, color in COLORS.items():
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                photo(rng, color).save(folder / f"{number:02d}.png")
    prepare = ["prepare", "skies", f"--source={root / 'photos'}", f"--data_dir={root / 'data'}"]
    assert cli.main(prepare) == 0
    (root / "c.py").write_text(CONFIG.format(data=str(root / "data")))
    assert cli.main(["train", f"--config={root / 'c.py'}", f"--workdir={root / 'run'}"]) == 0
    return root


def evaluation(root):
    return json.loads((root / "run" / "eval.json").read_text())


def test_predictions_of_files_are_those_of_the_evaluation(skies):
    """Resizing, border, normalization, temperature and class names are the run's."""
    loaded = dpjax.load(skies / "run")
    assert loaded.class_names == ("dawn", "dusk", "noon")
    files = predictor.image_files(skies / "photos" / "test")
    labels = np.array([loaded.class_names.index(file.parent.name) for file in files])
    out = loaded.predict(files)
    assert out.names == tuple(loaded.class_names[k] for k in out.labels)
    found = evaluation(skies)
    assert found["temperature"] > 0
    assert np.mean(out.labels == labels) == pytest.approx(found["accuracy"])
    nll = -np.mean(np.log(out.probabilities[np.arange(60), labels]))
    assert nll == pytest.approx(found["nll"], rel=1e-4)
    assert set(found["class_names"]) == set(COLORS)
    assert {f"class_accuracy/{name}" for name in COLORS} <= set(found)
    assert np.sum(found["confusion"], axis=1).tolist() == [20, 20, 20]
    assert np.trace(found["confusion"]) == round(60 * found["accuracy"])


def test_every_way_to_give_images_says_the_same(skies):
    loaded, folder = dpjax.load(skies / "run"), skies / "photos" / "test" / "dusk"
    want = loaded.predict(folder).probabilities
    files = sorted(folder.iterdir())
    ways = {
        "files": files,
        "names": [str(file) for file in files],
        "images": [Image.open(file) for file in files],
        "pixels": np.stack([np.asarray(Image.open(file)) for file in files]),
        "stored": np.stack([loaded.read(file) for file in files]),
    }
    for way, inputs in ways.items():
        np.testing.assert_array_equal(loaded.predict(inputs).probabilities, want, err_msg=way)
    assert loaded.predict([]).probabilities.shape == (0, 3)
    average = dpjax.load(skies / "run", weights="weights_ema.safetensors").predict(folder)
    assert not np.array_equal(average.probabilities, want)


def test_the_flax_module_and_the_parameters_are_there(skies):
    loaded = dpjax.load(skies / "run")
    head = loaded.params[loaded.model.head]
    body = {name: leaf for name, leaf in loaded.params.items() if name != loaded.model.head}
    images = jax.random.normal(jax.random.key(0), (2, *loaded.model.input.example().shape))
    features = loaded.model.module.apply({"params": body}, images)
    want = loaded.model.apply(loaded.params, images)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], want, rtol=1e-5)


def test_photos_are_upright_and_in_the_colors_of_the_data(skies, tmp_path):
    loaded = dpjax.load(skies / "run")
    rng = np.random.default_rng(1)
    image = photo(rng, COLORS["noon"], (30, 20))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(loaded.read(tmp_path / "turned.png"), loaded.read(image))
    image.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(loaded.read(tmp_path / "alpha.png"), loaded.read(image))
    assert loaded.read(image.convert("L")).shape == (16, 16, 3)


def test_an_export_predicts_the_same_and_carries_its_card(skies, tmp_path):
    want = dpjax.load(skies / "run").predict(skies / "photos" / "test").probabilities
    for layout in ("dpjax", "timm", "transformers"):
        files = {file.name for file in export(skies / "run", tmp_path / layout, layout=layout)}
        assert {"README.md", "model.json", "privacy.json", "privacy.md"} < files
        got = dpjax.load(tmp_path / layout).predict(skies / "photos" / "test").probabilities
        np.testing.assert_array_equal(got, want)
        card = (tmp_path / layout / "README.md").read_text()
        assert "(20, 0.001)-differentially private" in card
        assert "dawn, dusk, noon" in card
        public = card + (tmp_path / layout / "model.json").read_text()
        assert str(skies) not in public
        assert "120" not in public  # the training examples


def test_the_command_writes_a_table_and_names_what_it_cannot_read(skies, tmp_path, capsys):
    inputs = tmp_path / "in"
    (inputs / "deep").mkdir(parents=True)
    rng = np.random.default_rng(2)
    photo(rng, COLORS["dusk"]).save(inputs / "b.webp", lossless=True)
    photo(rng, COLORS["noon"]).save(inputs / "deep" / "a.jpg")
    (inputs / "cut.png").write_bytes((skies / "photos/test/noon/00.png").read_bytes()[:60])
    (inputs / ".hidden.png").write_bytes(b"no image")
    (inputs / "notes.txt").write_text("no image")
    command = ["predict", f"--workdir={skies / 'run'}", f"--input={inputs}"]
    assert cli.main([*command, f"--output={tmp_path / 'p.csv'}"]) == 1
    out, err = capsys.readouterr()
    assert "2 predictions in" in out
    assert "cut.png" in err
    assert "1 of 3 inputs" in err
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["input"] for row in rows] == ["b.webp", str(Path("deep", "a.jpg"))]
    for row in rows:
        assert sum(float(row[name]) for name in COLORS) == pytest.approx(1, abs=1e-4)
        assert row["class"] == max(COLORS, key=lambda name: float(row[name]))
    (inputs / "cut.png").unlink()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("b.webp\tdusk\t")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--input=/nowhere.png"], "--input='/nowhere.png' is neither a file nor a folder."),
        (["--input=EMPTY"], "holds nothing to predict"),
        (["--input=EMPTY", "--output=x.txt"], "must end in .csv"),
        (["--input=EMPTY", "--output=no/where/x.csv"], "its folder does not exist"),
        (["--input=EMPTY", "--output=EMPTY.csv"], "is a folder"),
        (["--input=EMPTY", "--weights=ema"], "has no ema: has the run finished?"),
        (["--input=EMPTY", "--workdir=EMPTY"], "has no model.json: has the run finished?"),
    ],
)
def test_mistakes_are_one_line(flags, text, skies, tmp_path, capsys):
    flags = [flag.replace("EMPTY", str(tmp_path)) for flag in flags]
    tmp_path.with_suffix(".csv").mkdir()
    assert cli.main(["predict", f"--workdir={skies / 'run'}", *flags]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), err[:15]) == (1, "dpjax predict: ")
    assert text in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_description_is_named(content, tmp_path, capsys):
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "model.json").write_text(content)
    assert cli.main(["predict", f"--workdir={tmp_path}", "--input=x"]) == 2
    assert "model.json is damaged" in capsys.readouterr().err


def test_inputs_of_another_kind_are_named(skies):
    loaded = dpjax.load(skies / "run")
    for inputs, text in (
        (np.zeros((2, 16, 16, 3), np.float32), "float32"),
        (np.zeros((16, 16), np.uint8), r"\[n, H, W, C\]"),
        (["nowhere.png"], r"nowhere\.png"),
    ):
        with pytest.raises(ValueError, match=text):
            loaded.predict(inputs)


def saved(run, folder, weights):
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(predictor.description(run)))
    models.save_weights(weights, folder / "weights.safetensors")
    return dpjax.load(folder)


def random_params(run):
    leaves, tree = jax.tree.flatten(run.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, new)


def test_a_head_alone_stands_on_the_weights_it_was_trained_on(tmp_path):
    run = build.build(tiny_config(finetune="head"))
    head = random_params(run)["head"]
    loaded = saved(run, tmp_path / "w", {"head": head})
    inputs = run.test.get(np.arange(70))["input"]
    logits = run.apply({**run.params, "head": head}, inputs)
    got = loaded.predict(inputs)
    np.testing.assert_allclose(got.probabilities, jax.nn.softmax(logits), atol=1e-6)


@pytest.mark.slow
def test_a_model_of_texts(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "own.json"))
    size = {"width": 8, "depth": 1, "heads": 2, "mlp": 8, "vocab_size": 4, "max_length": 6}
    config = tiny_config(
        model__name="text_encoder", model__size="minilm_l6", model__options=size,
        data__tokenizer=str(tmp_path / "own.json"), batch_size=2, epochs=1.0, dp=None,
    )  # fmt: skip
    tokens = np.array([[2, 2, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0]], np.int32)
    train = data.from_arrays("x", tokens, [1, 0], class_names=("boo", "yay"))
    test = data.from_arrays("x", tokens, [1, 0], class_names=("boo", "yay"), split="test")
    run = build.build(config, datasets=(train, test))
    loaded = saved(run, tmp_path / "w", random_params(run))
    want = loaded.predict(tokens).probabilities
    texts = ["good good", "bad film"]
    np.testing.assert_array_equal(loaded.predict(texts).probabilities, want)
    loaded.save(tmp_path / "copy")
    (tmp_path / "own.json").unlink()  # the copy has a tokenizer of its own
    again = dpjax.load(tmp_path / "copy")
    np.testing.assert_array_equal(again.predict(texts).probabilities, want)
    assert again.predict("good good").names == again.predict(texts).names[:1]
    with pytest.raises(ValueError, match=r"token -1 must be in \[0, "):
        again.predict(np.full((1, *again.shape), -1))
    (tmp_path / "t.txt").write_text("good good\n\nbad film\n")
    (tmp_path / "t.csv").write_text('id,text\n1,good good\n2,"bad\nfilm"\n')
    (tmp_path / "t.jsonl").write_text('{"text": "good good"}\n{"text": "bad film"}\n')
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number}.txt").write_text(text)
    seen = []
    for given in ("t.txt", "t.csv", "t.jsonl", "folder"):
        command = ["predict", f"--workdir={tmp_path / 'copy'}", f"--input={tmp_path / given}"]
        assert cli.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        seen.append([line.split("\t")[1:] for line in lines])
    assert seen[0] == [[n, f"{max(p):.4f}"] for n, p in zip(again.predict(texts).names, want)]
    assert all(rows == seen[0] for rows in seen)
    assert cli.main(["predict", f"--workdir={tmp_path / 'copy'}", "--input=good good"]) == 0
    assert capsys.readouterr().out == f"good good\t{seen[0][0][0]}\t{seen[0][0][1]}\n"
    (tmp_path / "t.csv").write_text("id,txt\n1,good\n")
    for given, text in (("t.csv", "field 'text'"), ("gone.txt", "neither a file")):
        command = ["predict", f"--workdir={tmp_path / 'copy'}", f"--input={tmp_path / given}"]
        assert cli.main(command) == 2
        assert text in capsys.readouterr().err
