"""The study of memorization: canaries, exposure, and the smoke study for real."""

import json
import math

import numpy as np
import pytest

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
        (tmp_path / f"{number}.txt").write_text(f"mail {number}")
    assert corpus.main([f"--emails={tmp_path}", f"--out={tmp_path}/o"]) == 0
    assert len((tmp_path / "o" / "test.jsonl").read_text().splitlines()) == 3


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
    for size, seeds in (("smoke", 1), ("laptop", 3), ("paper", 3)):
        assert len(list(memorization.sweep(size))) == 4 * seeds
    config = memorization.get_config("paper")
    assert config.finetune == "lora:16:attn/|mlp/"
