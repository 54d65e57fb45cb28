"""The figures of a run, from its files alone."""

import json

import matplotlib.text
import numpy as np
import pytest
from scipy import stats

from dpjax.commands import cli, report


def files(path, classes=3, prefix=""):
    """Writes the files of a run that learns in three phases."""
    rng = np.random.default_rng(0)
    path.mkdir()
    confusion = rng.integers(0, 20, (classes, classes)) + np.diag([60] * classes)
    count = rng.integers(0, 60, 15)
    count[:4] = 0
    edges = np.linspace(0, 1, 16)
    confidence = np.where(count > 0, (edges[:-1] + edges[1:]) / 2, 0)
    accuracy = np.round(confidence * 0.9 * count) / np.maximum(count, 1)
    bins = {"edges": edges, "count": count, "confidence": confidence, "accuracy": accuracy}
    final = {
        "accuracy": 0.7,
        "nll": 0.8,
        "ece": 0.05,
        "mce": 0.1,
        "class_names": [f"class {k}" for k in range(classes)],
        "reliability": {name: values.tolist() for name, values in bins.items()},
    }
    if classes <= 50:
        final["confusion"] = confusion.tolist()
    rows = []
    for step in range(0, 41, 4):
        good = 1 - np.exp(-step / 15)
        row = {"accuracy": 1 / classes + 0.5 * good, "nll": np.log(classes) - 0.7 * good}
        row = {f"{prefix}eval/{name}": value for name, value in row.items()}
        rows.append({"step": step, **row, "epsilon": 2 * np.sqrt(step / 40)})
        if step:
            loss = np.log(classes) - 0.6 * good + rng.normal() / 20
            rows.append({"step": step, "nonprivate/loss": loss})
    steps = {"0_linear-probe": 12, "1_train 1": 14, "2_train 2": 14}
    phases = {name: {"steps": number} for name, number in steps.items()}
    (path / "eval.json").write_text(json.dumps({f"{prefix}{k}": v for k, v in final.items()}))
    (path / "identity.json").write_text(json.dumps({"phases": phases}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("prefix", ["", "nonprivate/"])
@pytest.mark.parametrize("classes", [3, 51])
def test_a_run_is_drawn(prefix, classes, tmp_path, monkeypatch, capsys):
    path, drawn, save = files(tmp_path / "run", classes, prefix), [], report._save

    def record(figure, *given, **options):
        drawn.append(words(figure))
        return save(figure, *given, **options)

    monkeypatch.setattr(report, "_save", record)
    assert cli.main(["report", str(path)]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(drawn) == (3 if classes <= 50 else 2)
    assert all((path / name).stat().st_size > 5000 for name in names)
    curve, reliability, *confusion = drawn
    for text in ("train 1", "train 2", f"chance, {100 / classes:.3g} %", "epsilon spent"):
        assert text in curve
    assert "bins of fewer than 20 examples" in reliability
    assert all("class 2" in figure for figure in confusion)
    for figure in drawn:
        figure = figure.replace("training batches (not for release)", "")
        assert ("not for release)" in figure) == bool(prefix)


def test_intervals_are_wilsons():
    counts, hits = np.array([1, 20, 400]), np.array([0, 13, 399])
    low, high = report._wilson(hits / counts, counts)
    for at, (hit, count) in enumerate(zip(hits, counts)):
        want = stats.binomtest(int(hit), int(count)).proportion_ci(method="wilson")
        assert (low[at], high[at]) == pytest.approx((want.low, want.high), abs=1e-4)
