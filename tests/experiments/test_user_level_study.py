"""The study of user-level privacy: one budget, units as N, rebuilt from files."""

import pytest

from experiments import run_study, study
from experiments.user_level import study as user_level

FILE = "experiments/user_level/study.py"


@pytest.mark.slow
def test_the_smoke_study_runs_and_every_statement_is_about_units(tmp_path):
    path = tmp_path / "w"
    assert run_study.main([f"--config={FILE}:smoke", f"--workdir={path}"]) == 0
    results = study.read(path)
    sizes = {r.config["data"]["name"]: r.privacy["num_examples"] for r in results}
    assert list(sizes.values()) == [1617, 405]
    assert all("data.unit='writer'" in r.privacy["unit_of_privacy"] for r in results)
    assert f"{len(results)} of {len(results)} runs finished" in (path / "report.md").read_text()
    assert (path / "accuracy.png").is_file()


def test_a_batch_of_units_has_the_same_probability_at_every_size_of_a_unit():
    points = list(user_level.sweep("laptop"))
    sizes = {(p["data.name"][-2:], p["batch_size"]) for p in points}
    assert sizes == {("_1", 1024), ("_4", 256), ("16", 64)}
    assert max(p["data.unit_records"] for p in points) == 16
