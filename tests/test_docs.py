"""What the documentation tells people to do works."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_broken

from dpjax.commands import cli

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "dpjax" / "guide"
TEXTS = [ROOT / "README.md", *sorted(GUIDE.glob("*.md")), *ROOT.glob("experiments/README.md")]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The `python -m` and `dpjax` commands of all shell blocks, continued lines joined."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    return re.findall(r"(?:python -m|\bdpjax) (\S+)(.*?)(?:#.*|&& .*)?$", joined, re.MULTILINE)


@pytest.mark.slow
def test_api_reference_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", "dpjax", "--docformat",
         "google", "-o", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {p.stem for p in (ROOT / "dpjax").iterdir() if p.suffix == ".py" or p.is_dir()}
    pages = {p.stem for p in (tmp_path / "dpjax").iterdir()}
    assert {m for m in modules if not m.startswith("__")} <= pages
    guide = (tmp_path / "dpjax" / "guide.html").read_text()
    for path in GUIDE.glob("*.md"):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        assert title in guide, path


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_commands_exist(path):
    text = path.read_text()
    for name, flags in commands(text):
        if "." not in name and importlib.util.find_spec(f"dpjax.commands.{name}") is not None:
            cli.parser(name).parse(shlex.split(flags))
        else:
            assert importlib.util.find_spec(name) is not None, name
    for file in re.findall(r"\b(?:configs|experiments|tests|dpjax)/[\w/]+\.(?:py|md)", text):
        assert (ROOT / file).exists(), file


def test_the_map_names_every_module():
    text = TEXTS[0].read_text().split("## Where things are")[1].split("\n## ")[0]
    named = set(re.findall(r"(\w+)(?:\.py|/\s)", text))
    modules = {p.stem for p in (ROOT / "dpjax").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert {m for m in modules if not m.startswith("__")} - named == set()


def run(code):
    names = {"__name__": "documentation"}
    exec(compile(code, "documentation", "exec"), names)
    return names


def test_the_optax_example_of_the_readme_runs():
    (code,) = (b for b in blocks((ROOT / "README.md").read_text(), "python") if "optax" in b)
    names = run(code)
    assert names["mechanism"].epsilon(1e-5) <= 2.0
    assert names["accuracy"] > 0.9
    assert names["statement"]["steps_done"] == names["mechanism"].steps
    assert names["statement"]["epsilon"] <= 2.0


@pytest.mark.slow
def test_the_recipes_for_heads_run(monkeypatch):
    monkeypatch.chdir(ROOT)  # they name a config of the repository
    text = (GUIDE / "recipes.md").read_text().split("## A loop of your own")[0]
    names = run("\n".join(blocks(text, "python")))
    assert len(names["results"]) == len(names["points"])
    assert max(r["accuracy"] for r in names["results"]) > 0.5  # of ten classes


@pytest.mark.slow
def test_the_worked_example_runs(tmp_path, monkeypatch):
    text = (GUIDE / "own_model_and_data.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for code in blocks(text, "python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            Path(name[1]).write_text(code)
        else:
            run(code)
    (first, flags), (second, more) = commands(text)
    assert (first, second) == ("prepare", "train")
    assert (tmp_path / "in_memory" / "privacy.json").is_file()
    # Under a split name of their own, the evaluations are not of the private data.
    assert "eval/nll" in (tmp_path / "in_memory" / "metrics.jsonl").read_text()
    assert "nonprivate/eval" not in (tmp_path / "in_memory" / "metrics.jsonl").read_text()
    assert cli.main([first, *flags.split()]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "dpjax", second, *more.split()],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epsilon" in (tmp_path / "run" / "privacy.md").read_text()


@pytest.mark.parametrize(("library", "title"), [("flax", "NNX"), ("equinox", "Equinox"),
                                                ("haiku", "Haiku")])  # fmt: skip
def test_the_loops_for_other_libraries_run(library, title, capsys):
    pytest.importorskip(library)
    text = (GUIDE / "libraries.md").read_text()
    common, rest = text.split("## NNX")
    sections = dict(zip(["NNX", "Equinox", "Haiku"], re.split("## Equinox|## Haiku", rest)))
    run("\n".join(blocks(common, "python") + blocks(sections[title], "python")))
    assert float(capsys.readouterr().out.split()[-1]) > 0.65  # chance is 0.5


def test_the_catch_table_is_that_of_the_tests():
    assert test_broken.catch_table().strip() in (GUIDE / "evidence.md").read_text()
