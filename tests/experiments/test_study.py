"""What all studies share: runs read back, statistics, budgets kept apart, tables and figures."""

import csv
import json
import math

import numpy as np
import pytest
from matplotlib import pyplot as plt

from dpjax.commands import cli
from experiments import study

FIELDS = {"R": "dp.bound", "epsilon": "dp.epsilon"}
METRICS = {"accuracy [%]": lambda r: 100 * r.evaluation["accuracy"]}


def write_run(workdir, index, *, bound=1.0, epsilon=2.0, delta=1e-5, accuracy=0.5, **more):
    """The files of a finished run, as `loop.train` leaves them."""
    path = workdir / f"{index:03d}"
    path.mkdir(parents=True)
    private = None if epsilon is None else {"bound": bound, "epsilon": epsilon, "delta": delta}
    config = {"seed": index, "epochs": 3.0, "data": {"name": "digits"}, "dp": private, **more}
    (path / "config.json").write_text(json.dumps(config))
    if accuracy is not None:
        (path / "eval.json").write_text(json.dumps({"accuracy": accuracy}))
    if epsilon is not None:
        facts = {
            "epsilon": 0.99 * epsilon, "num_examples": 100, "neighboring_relation": "add",
            "steps_done": 5, "steps_planned": 5, "seed_policy": "fixed seed",
        }  # fmt: skip
        (path / "privacy.json").write_text(json.dumps(facts))
    return path


def plan(workdir, count, file="study_file.py"):
    content = {"config": f"{file}:smoke", "points": [{"seed": i} for i in range(count)]}
    (workdir / study.PLAN).write_text(json.dumps(content))


def test_sizes():
    assert [study.size(name) for name in (None, "smoke", "paper")] == ["laptop", "smoke", "paper"]
    with pytest.raises(ValueError, match="Did you mean 'smoke'"):
        study.size("smok")


def test_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5, rel=1e-5)
    assert study.interval([3.0])[0] == 3
    assert math.isnan(study.interval([3.0])[1])
    assert math.isnan(study.interval([])[0])


def test_runs_are_read_back_with_their_status(tmp_path):
    write_run(tmp_path, 0)
    write_run(tmp_path, 1, accuracy=None)
    (tmp_path / "001.failed").write_text("exit 3: parameters are not finite")
    write_run(tmp_path, 2, accuracy=None)
    (tmp_path / "002.failed").write_text("exit 2: no such file")
    write_run(tmp_path, 3, accuracy=None)
    plan(tmp_path, 5)
    found = study.read(tmp_path)
    assert [r.status for r in found] == [
        "finished", "diverged", "exit 2: no such file", "interrupted", "waiting",
    ]  # fmt: skip
    assert study.field(found[0], "dp.bound") == 1.0
    assert found[0].privacy["epsilon"] == 1.98
    with pytest.raises(ValueError, match=r"has no study\.json"):
        study.read(tmp_path / "000")


def test_summary(tmp_path):
    for index, (bound, accuracy) in enumerate([(2.0, 0.5), (1.0, 0.2), (1.0, 0.4), (2.0, None)]):
        write_run(tmp_path, index, bound=bound, accuracy=accuracy)
    (tmp_path / "003.failed").write_text("exit 3: not finite")
    plan(tmp_path, 5)
    first, second = study.summarize(study.read(tmp_path), FIELDS, METRICS)
    assert (first["R"], first["epsilon"], first["runs"], first["diverged"]) == (1.0, 2.0, 2, 0)
    assert first["accuracy [%]"] == pytest.approx(30)
    assert first["accuracy [%] ±"] == pytest.approx(12.7062 * 10, rel=1e-4)
    assert (second["runs"], second["diverged"], second["accuracy [%]"]) == (2, 1, 50)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"epsilon": 1.0}, "dp.epsilon"),
        ({"epsilon": None}, "dp.epsilon"),  # not private
        ({"delta": 1e-6}, "dp.delta"),
        ({"epochs": 4.0}, "epochs"),
        ({"data": {"name": "mnist5k"}}, "data.name"),
    ],
)
def test_budgets_are_not_mixed(tmp_path, other, field):
    write_run(tmp_path, 0)
    write_run(tmp_path, 1, **other)
    plan(tmp_path, 2)
    found = study.read(tmp_path)
    with pytest.raises(ValueError, match=rf"000 and 001 differ in budget: {field}"):
        study.summarize(found, {"R": "dp.bound"}, METRICS)
    # Told apart by the field, they may stand in one table.
    if field != "dp.epsilon" or other["epsilon"] is not None:
        rows = study.summarize(found, {"told": field}, METRICS)
        assert len(rows) == 2
    else:
        assert math.isinf(study.field(found[1], "dp.epsilon"))


def test_a_run_that_stopped_early_is_refused(tmp_path):
    path = write_run(tmp_path, 0)
    facts = json.loads((path / "privacy.json").read_text())
    (path / "privacy.json").write_text(json.dumps({**facts, "steps_done": 4}))
    plan(tmp_path, 1)
    with pytest.raises(ValueError, match="000: a finished run executed not all planned steps"):
        study.check_budgets(study.read(tmp_path))


def test_markdown_joins_value_and_interval():
    rows = [{"R": 0.1, "a": 97.123, "a ±": 0.31, "b": math.nan, "b ±": math.nan, "n": 3}]
    lines = study.to_markdown(rows).splitlines()
    assert lines[0] == "| R | a | b | n |"
    assert lines[2] == "| 0.1 | 97.12 ± 0.31 | - | 3 |"


def test_heatmap_shows_every_cell():
    figure, axes = plt.subplots()
    cells = {(0.1, 1.0): 10.0, (1.0, 1.0): 90.0, (1.0, 2.0): math.nan}
    study.heatmap(axes, cells, xlabel="x", ylabel="y", title="t")
    assert sorted(text.get_text() for text in axes.texts) == ["10", "90", "div."]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.1", "1"]
    plt.close(figure)


def test_report_is_rebuilt_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "w"
    write_run(work, 0)
    plan(work, 2)
    assert cli.main(["report", "w"]) == 2
    assert "study 'study_file.py' is not a file" in capsys.readouterr().err
    (tmp_path / "study_file.py").write_text(
        "from matplotlib import pyplot as plt\n"
        "from experiments import study\n"
        "def report(workdir):\n"
        "    results = study.read(workdir)\n"
        "    rows = study.summarize(results, {'R': 'dp.bound'}, {'a': lambda r: 1.5})\n"
        "    figure, axes = plt.subplots()\n"
        "    parts = ['Words.', study.Table('t', 'Caption', rows),\n"
        "             study.Figure('f', 'Curve', figure)]\n"
        "    return study.write(workdir, 'Title', parts, results)\n"
    )
    assert cli.main(["report", "w"]) == 0
    assert capsys.readouterr().out.split() == [f"w/{n}" for n in
                                               ("report.md", "t.md", "t.csv", "f.png")]  # fmt: skip
    text = (work / "report.md").read_text()
    assert "1 of 2 runs finished, 0 diverged." in text
    assert "- missing: 001, waiting: {'seed': 1}" in text
    assert "not for release" in text
    assert next(csv.DictReader((work / "t.csv").read_text().splitlines()))["a"] == "1.5"
    assert (work / "f.png").read_bytes().startswith(b"\x89PNG")


def test_two_tables_of_one_name_would_overwrite_each_other(tmp_path):
    twice = [study.Table("t", "First", [{"a": 1}]), study.Table("t", "Second", [{"a": 2}])]
    with pytest.raises(ValueError, match="must differ from one another"):
        study.write(tmp_path, "Title", twice, [])
    assert not list(tmp_path.iterdir())
