"""The study of memorization: canaries, exposure, and the smoke study for real."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import models
from dpjax.commands import cli
from experiments import run_study, study
from experiments.memorization import corpus
from experiments.memorization import study as memorization

FILE = "experiments/memorization/study.py"


def test_exposure_is_that_of_the_definition():
    scores = np.arange(1024.0)
    assert memorization.exposure(scores, 0) == 10
    assert memorization.exposure(scores, 1) == 9
    assert memorization.exposure(scores, 1023) == pytest.approx(0)
    assert memorization.exposure(np.zeros(1024), 5) == pytest.approx(math.log2(1024 / 512.5))
    uniform = [memorization.exposure(scores, i) for i in range(1024)]
    assert np.mean(uniform) == pytest.approx(memorization._CHANCE, abs=0.02)


def test_the_corpus_has_each_canary_in_its_copies_and_no_other_code(tmp_path):
    texts = corpus.messages(60, 0)
    assert not any(char.isdigit() for text in texts for char in text)
    corpus.write(tmp_path, texts[10:], texts[:10])
    lines = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    for one in corpus.canaries():
        mine = [line for line in lines if line["text"] == one.prefix + one.code]
        assert len(mine) == one.copies
        assert len({line["person"] for line in mine}) == 1
    assert len(lines) == 50 + 2 * sum(corpus.COPIES)
    assert len({line["person"] for line in lines}) == 50 + 10
    assert "door code" not in (tmp_path / "test.jsonl").read_text()


def test_the_command_reads_a_folder(tmp_path, capsys):
    assert corpus.main([f"--emails={tmp_path}", f"--out={tmp_path}/o"]) == 2
    assert "has 0 texts" in capsys.readouterr().err
    for number in range(30):
        mail = f"From: a@b\nSubject: s\nContent-Type: text/plain\n\nmail {number}\n"
        (tmp_path / f"{number}.txt").write_text(mail)
    (tmp_path / "html.txt").write_text("From: a@b\nContent-Type: text/html\n\n<p>no text</p>\n")
    (tmp_path / "odd.txt").write_text(
        "Content-Type: text/plain; charset=none\n\nno known letters\n"
    )
    out = f"--out={tmp_path}/o"
    assert corpus.main([f"--emails={tmp_path}", out, "--test=3", "--train=20"]) == 0
    texts = {
        name: [
            json.loads(line)["text"]
            for line in (tmp_path / "o" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "test")
    }
    assert (len(texts["test"]), len(texts["train"])) == (3, 20 + 2 * sum(corpus.COPIES))
    mails = [text for text in texts["test"] + texts["train"] if "door code" not in text]
    assert set(mails) <= {f"mail {number}" for number in range(30)}


@pytest.mark.slow
def test_the_tree_of_digits_gives_every_code_the_likelihood_of_its_tokens(tmp_path):
    pytest.importorskip("tokenizers")
    corpus.write_byte_tokenizer(tmp_path / "t.json")
    shape = models.DecoderConfig(
        vocab_size=257, width=16, depth=2, heads=2, kv_heads=1, mlp=16, tied=False, max_length=48
    )
    net = models.decoder(shape)
    params = jax.tree.map(lambda x: 8 * x, net.init(jax.random.key(0)))  # no two codes alike
    codec = models.text_codec(str(tmp_path / "t.json"), net.input)
    generator = models.Generator(shape, params, codec)
    scores = memorization.code_scores(generator, "Avery's door code is ")
    assert scores.shape == (10_000,)
    assert np.std(scores) > 0.1
    for code in ("0000", "0407", "4071", "9999"):
        ids = codec.encode(f"Avery's door code is {code}").ids
        lines = jax.nn.log_softmax(net.apply(params, jnp.asarray(ids)))
        expected = -sum(float(lines[i - 1, ids[i]]) for i in range(len(ids) - 4, len(ids)))
        assert scores[int(code)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_smoke_study_runs_and_is_rebuilt_from_files(tmp_path, capsys):
    path = tmp_path / "w"
    assert run_study.main([f"--config={FILE}:smoke", f"--workdir={path}"]) == 0
    text = (path / "report.md").read_text()
    assert "4 of 4 runs finished" in text
    units = {r.overrides["data.unit"]: r.privacy for r in study.read(path) if r.privacy}
    assert (units[None]["num_examples"], units["person"]["num_examples"]) == (150 + 62, 150 + 10)
    (path / "exposure.png").unlink()
    assert cli.main(["report", str(path)]) == 0
    capsys.readouterr()
    assert (path / "exposure.png").is_file()


def test_the_sizes_have_their_arms():
    for size, seeds in (("smoke", 1), ("laptop", 1), ("paper", 3)):
        assert len(list(memorization.sweep(size))) == 4 * seeds
    config = memorization.get_config("paper")
    assert config.finetune == "lora:16:attn/|mlp/"
