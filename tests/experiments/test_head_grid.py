"""The study of heads on cached features, on made-up features."""

import json
import math
import os

import numpy as np
import pytest

from dpjax import data, heads
from dpjax.build import fields
from experiments.head_grid import blocks as head_blocks
from experiments.head_grid import grid as head_grid

EXAMPLES = 150


def made_up(seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(EXAMPLES) % 3
    dataset = data.from_arrays(
        "blobs",
        rng.integers(0, 256, (EXAMPLES, 1, 1, 1), dtype=np.uint8),
        labels,
        class_names=("a", "b", "c"),
    )
    values = 3 * np.eye(3, 6)[labels] + rng.normal(size=(EXAMPLES, 6))
    return dataset, heads.FeatureSet(values, labels, 3, "blobs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study and its directory."""
    path = tmp_path_factory.mktemp("study") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            head_grid, "load_features", lambda config, split, *, mirror: made_up(len(split))
        )
        assert run(path) == 0
    return path


def run(path, *more):
    arguments = [f"--workdir={path}", "--quick", "--epsilons=4,inf", "--seeds=1,2", *more]
    return head_grid.main(arguments)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_files(finished):
    tuned, final = rows(finished / "tuning.jsonl"), rows(finished / "final.jsonl")
    block = head_blocks.grid(private=True, quick=True)[0]
    trained = [row for row in tuned if row["block"] == block.name]
    assert len(trained) == len(block.bounds) * len(block.rates) * 2  # tuning seeds
    for epsilon in (4.0, math.inf):
        for method in ("trained", "least squares"):
            same = [r for r in final if (r["epsilon"], r["method"]) == (epsilon, method)]
            assert [r["seed"] for r in same] == [1, 2]
            assert all(r["last"]["accuracy"] > 0.5 for r in same)
    private = [r for r in final if r["method"] == "trained" and r["epsilon"] == 4]
    assert all(3.9 < r["epsilon_spent"] <= 4 for r in private)
    assert private[0]["last"]["nll"] != private[1]["last"]["nll"]
    text = (finished / "table.md").read_text()
    assert text.count("\n") == 2 + 4
    assert "| 4 | private |" in text
    assert "| inf | not private |" in text


def test_statement(finished):
    facts = json.loads((finished / "privacy-4.json").read_text())
    assert facts["steps_done"] == facts["steps_planned"] == 30
    assert facts["epsilon"] <= 4
    assert facts["num_examples"] == EXAMPLES
    assert facts["seed_policy"].startswith("fixed seed")
    assert any("hyperparameters" in item for item in facts["not_charged"])


def test_the_best_on_held_out_data_is_trained(finished):
    tuned = rows(finished / "tuning.jsonl")
    for row in rows(finished / "final.jsonl"):
        closed = row["method"] != "trained"
        chosen = head_grid.best(tuned, row["epsilon"], closed_form=closed)
        assert chosen["held_out"] == row["held_out"]
        assert all(chosen[k] == row[k] for k in ("share", "ridge", "learning_rate") if k in row)
    tuning = [
        {"block": "b", "epsilon": 1.0, "rate": rate, "seed": seed, "last": {"accuracy": accuracy}}
        for rate, seed, accuracy in [(1, 1, 0.5), (1, 2, 0.7), (2, 1, 0.9), (2, 2, 0.2)]
    ]
    assert head_grid.best(tuning, 1.0, closed_form=False)["rate"] == 1
    with pytest.raises(ValueError, match="epsilon=2: nothing was tuned"):
        head_grid.best(tuning, 2, closed_form=False)


def test_what_is_there_is_not_done_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(
        head_grid, "load_features", lambda config, split, *, mirror: made_up(len(split))
    )
    monkeypatch.setattr(head_grid, "train", None)
    before = {name: (finished / name).read_text() for name in os.listdir(finished)}
    assert run(finished) == 0
    assert {name: (finished / name).read_text() for name in os.listdir(finished)} == before
    assert before["table.md"] in capsys.readouterr().out


def test_the_table_is_rebuilt_from_files_alone(finished, capsys):
    (finished / "table.md").unlink()
    assert head_grid.main([f"--workdir={finished}", "--stages=report"]) == 0
    assert (finished / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stages=tuen"], "stages='tuen' must be one of"),
        (["--config=nothing.py"], "config='nothing.py' is neither a file nor one of"),
        (["--weights=efficientnet_lite9"], "efficientnet_lite9"),
        (["--epsilons=0"], "epsilon=0"),
        (["--epsilons=one"], "one"),
    ],
)
def test_mistakes(more, message, tmp_path, capsys):
    argument = f"--config={os.path.dirname(os.path.dirname(__file__))}/../configs/quickstart.py"
    if "--epsilons=0" in more:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_grid, "load_features", lambda config, split, *, mirror: made_up(1))
            assert head_grid.main([argument, f"--workdir={tmp_path}", "--quick", *more]) == 2
    else:
        assert head_grid.main([argument, f"--workdir={tmp_path}", *more]) == 2
    assert message in capsys.readouterr().err


def test_full_grid_is_well_formed():
    for private in (True, False):
        blocks = head_blocks.grid(private=private, quick=False)
        assert len({block.name for block in blocks}) == len(blocks)
        for block in blocks:
            values = json.loads(json.dumps(head_blocks.dataclasses.asdict(block)))
            assert head_blocks.Block.from_json(values) == block


@pytest.mark.real_data
def test_cifar10_features():
    """Eight images of CIFAR-10 through EfficientNet-Lite0; $DPJAX_DATA_DIR holds the data set."""
    config = fields.load(
        f"{os.path.dirname(os.path.dirname(__file__))}/../configs/cifar10.py:lite0"
    )
    try:
        dataset, found = head_grid.load_features(config, "test[:8]", mirror=True)
    except (ValueError, FileNotFoundError) as error:
        pytest.skip(str(error))
    assert found.values.shape == (8, 1280)
    np.testing.assert_array_equal(found.labels, dataset.labels)
