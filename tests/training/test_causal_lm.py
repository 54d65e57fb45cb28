"""A language model trained through the real loop, with its statement, and what comes after."""

import json

import jax
import numpy as np
import pytest
from causal import VOCABULARY, byte_tokenizer, causal_config

import dpjax
from dpjax import build
from dpjax.commands import cli, report
from dpjax.runtime import Workdir
from dpjax.training import loop


def train(config, folder):
    run = build.build(config)
    return run, loop.train(run, Workdir(folder))


def test_a_private_run_of_windows_states_its_unit(tmp_path):
    config = causal_config(
        tmp_path, finetune="lora:4:attn/|mlp/", data__long_records="split", data__unit_records=2,
        data__holdout=0.2,
    )  # fmt: skip
    run, results = train(config, tmp_path / "run")
    assert "units by 'record'" in build.describe.describe(run)
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["epsilon"] <= 2
    assert "one training record, with all of its windows" in json.dumps(statement)
    # The part that is held out is private data too.
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "nonprivate/eval/perplexity" in rows
    assert '"eval/perplexity"' not in rows
    assert [path.name for path in report.figures(tmp_path / "run")] == ["learning_curve.png"]
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format=transformers"]
    assert cli.main(arguments) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"privacy.md", "model.safetensors", "config.json", "tokenizer.json"} <= names
    kinds = ("nll", "perplexity", "bits_per_byte", "accuracy")
    assert set(results) >= {f"nonprivate/{kind}" for kind in kinds}


@pytest.mark.slow
def test_it_learns_and_generates(tmp_path, capsys):
    config = causal_config(tmp_path, dp=None, epochs=25.0)
    config.optimizer.learning_rate = 5e-3
    _, results = train(config, tmp_path / "run")
    assert results["perplexity"] < 3 < VOCABULARY
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/bits_per_byte" in row for row in rows)
    speak = build.generator.load(tmp_path / "run")
    (greedy,) = speak(["ann met "], temperature=0.0, max_tokens=30)
    assert greedy.endswith(" at noon")
    assert speak(["ann met "], temperature=0.0, max_tokens=30, stop=(" noon", " at")) == [
        greedy.removesuffix(" at noon")
    ]
    several = speak(["ann met ", "", "é"], seed=3, top_p=0.9, max_tokens=8)
    assert several == speak(["ann met ", "", "é"], seed=3, top_p=0.9, max_tokens=8)
    assert len(several) == 3
    for layout in ("dpjax", "transformers"):
        folder = str(tmp_path / layout)
        assert cli.main(["export", str(tmp_path / "run"), folder, f"--format={layout}"]) == 0
        assert "trained without privacy" in (tmp_path / layout / "README.md").read_text()
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # the export has its own
        again = build.generator.load(folder)
        jax.tree.map(np.testing.assert_array_equal, again.params, speak.params)
        byte_tokenizer(tmp_path)
        capsys.readouterr()
        asked = ["--input=ann met ", "--temperature=0", "--max_tokens=30", "--stop= at"]
        assert cli.main(["predict", f"--workdir={folder}", *asked]) == 0
        assert capsys.readouterr().out == f"ann met {greedy.removesuffix(' at noon')}\n"
    with pytest.raises(ValueError, match="has the run finished"):
        build.generator.load(tmp_path)
    with pytest.raises(ValueError, match="is a language model"):
        dpjax.load(tmp_path / "run")


def test_user_level_text(tmp_path):
    config = causal_config(
        tmp_path, data__unit="author", data__unit_records=3, finetune="head", epochs=1.0,
        batch_size=5,
    )  # fmt: skip
    run = build.build(config)
    assert len(run.train) == 20
    with pytest.raises(ValueError, match="writer"):
        build.build(causal_config(tmp_path, data__unit="writer"))
