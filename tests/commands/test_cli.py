"""One command: every verb has help, every mistake is one line, and a closed pipe ends quietly."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dpjax import config
from dpjax.build import fields
from dpjax.commands import cli

ROOT = Path(__file__).parents[2]
VERBS = (
    "audit", "export", "models", "plan", "predict", "prepare", "report", "search", "sweep", "train",
)  # fmt: skip
PLAN = ["plan", "--num_examples=500", "--epochs=2", "--epsilon=1", "--delta=1e-5"]
CONFIG = """
from dpjax.config import default

def get_config(arg=None):
    config = default()
    {line}
    return config
"""


def program(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", *argv], text=True, timeout=120, check=False, cwd=ROOT,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert f"\n    dpjax {verb}" in capsys.readouterr().out


def test_the_overview_names_every_verb(capsys):
    for flag in ("--help", "-h"):
        assert cli.main([flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        verbs = [line.split()[0] for line in lines if line.startswith("  ") and "--" not in line]
        assert tuple(verbs) == VERBS


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "dpjax: which command?"),
        (["trian"], "dpjax: 'trian' is not a command. Did you mean 'train'?"),
        (["--workdir=x"], "dpjax: '--workdir=x' is not a command."),
        (["train", "--workdri=x"], "--workdri is not a flag of this command. Did you mean '--work"),
        (["train", "--config=quickstart"], "required: --workdir"),
        (["train", "--config=quickstrt", "--workdir=x"], "Did you mean 'quickstart'?"),
        (["train", "--config=quickstart:none", "--workdir=x"], "quickstart.py, line "),
        (["train", "--config=quickstart", "--workdir=x", "--config.dp.epsilno=1"], "'epsilon'"),
        (["train", "--config=quickstart", "--workdir=x", "--config.seed"], "needs a value"),
        (["train", "--config=quickstart", "--workdir=x", "--config.seed=a"], "a whole number"),
        (["train", "--config=quickstart", "--workdir=x", "extra"], "arguments: extra"),
        (["train", "--config=quickstart", "--workdir=x", "--sweep_index=0"], "defines no sweep()"),
        (["sweep", "--config=quickstart", "--workdir=x", "--restart"], "--restart is not a flag"),
        (["report", "--config.seed=1"], "dpjax report: --config.seed is not a flag"),
        (["report", "/nowhere"], "has no metrics.jsonl"),
        (["export", "a", "b", "--format=tim"], "Did you mean 'timm'?"),
        (["prepare", "cifar10"], "required: --source"),
        (["audit", "--config=quickstart", "--workdir=x", "--canaries=gradiant"], "'gradient'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"dpjax {argv[0]}: " if argv and argv[0] in VERBS else "dpjax: ")
    assert text in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def get_config(:", "c.py, line 1: syntax error"),
        ("import nothing_of_this_name", "line 1, `import nothing_of_this_name`: ModuleNotFound"),
        ("x = 1", "defines no get_config()"),
        ("def get_config(): pass", "must return a config that starts from dpjax.config.default"),
        ("def get_config(): return {'dp': None}", "got dict"),
        (CONFIG.format(line="config.dp.epsilom = 1.0"), "line 6, `config.dp.epsilom = 1.0`: there "
         "is no field 'epsilom': did you mean 'epsilon'?"),
        (CONFIG.format(line="config.epochs = 'many'"), "line 6, `config.epochs = 'many'`"),
        (CONFIG.format(line="config = config.copy_and_resolve_references(); config.unlock(); "
         "config.model.optoins = {}"), "config.model has no field 'optoins': did you mean 'opti"),
        (CONFIG.format(line="config.data = {'name': 'x'}"), "config.data has no field "),
        (CONFIG.format(line="raise ValueError('two\\n lines')"), "c.py, line 6: two"),
    ],
)  # fmt: skip
def test_an_error_in_a_config_file_is_one_line_that_names_the_line(source, text, tmp_path, capsys):
    (tmp_path / "c.py").write_text(source)
    argv = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]
    assert cli.main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dpjax train: ")
    assert err.count("\n") == 1
    assert text in err


def overridden(*overrides, file="quickstart"):
    flags = [f"--config.{text}" for text in overrides]
    return cli.config(cli.parser("train").parse([f"--config={file}", "--workdir=w", *flags]))


def test_no_budget_and_an_infinite_one_mean_not_private():
    assert overridden("dp=None").dp is None
    assert overridden("dp.epsilon=inf").dp is None
    assert overridden("dp.epsilon=3").dp.epsilon == 3.0


def leaves(node, above=""):
    for name, value in node.items():
        path = f"{above}{name}"
        yield from leaves(value, f"{path}.") if hasattr(value, "items") else [(path, value)]


def test_every_optional_field_takes_none_and_no_other_does():
    for path, value in leaves(config.default()):
        if value is None:
            assert dict(leaves(overridden(f"{path}=None")))[path] is None
        else:
            with pytest.raises(ValueError, match=rf"config\.{path}=None must be"):
                overridden(f"{path}=None")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.options.b1=0.8", 0.8),
        ("optimizer.options.nesterov=true", True),
        ("model.options.width=32", 32),
        ("dp.bound_schedule=((0.0,0.1),(0.95,20))", ((0.0, 0.1), (0.95, 20))),
        ("dp.bound_schedule=[[0.0, 1]]", ((0.0, 1),)),
        ("batch_size=auto", "auto"),
        ("batch_size=128", 128),
        ("data.subset=0.2", 0.2),
        ("data.flip=True", True),
        ("microbatch=4", 4),
        ("epochs=2", 2.0),
        ("finetune=lora:4", "lora:4"),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(override, value):
    path = override.partition("=")[0]
    found = dict(leaves(overridden(override)))[path]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("closed", ["stdout", pytest.param("stderr", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_is_no_error(closed):
    reader, writer = os.pipe()
    os.close(reader)
    done = program("dpjax", *PLAN, **{closed: writer})
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr in ("", None)


@pytest.mark.parametrize(
    ("stream", "argv", "code"),
    [
        ("stdout", ["train", "--help"], 0),
        ("stdout", ["--help"], 0),
        ("stdout", ["plan", "--help"], 0),
        ("stderr", ["train", "--workdri=x"], 2),
        ("stderr", ["report", "/nowhere"], 2),
    ],
)
def test_a_closed_pipe_does_not_change_the_exit_code(stream, argv, code, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, stream, closed)
        assert cli.main(argv) == code


def test_what_is_shipped_is_what_the_repository_has():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = setup["tool"]["setuptools"]
    assert setup["project"]["scripts"] == {"dpjax": "dpjax.__main__:main"}
    assert tools["package-dir"] == {"dpjax.configs": "configs"}
    folders = {".".join(path.parent.relative_to(ROOT).parts)
               for path in (ROOT / "dpjax").rglob("__init__.py")}  # fmt: skip
    assert set(tools["packages"]) == folders | {"dpjax.configs"}
    assert set(fields.shipped()) == {path.stem for path in (ROOT / "configs").glob("*.py")}


def test_the_old_way_to_train_is_the_same_command():
    done = program("dpjax.train", "--config=quickstart")
    assert (done.returncode, done.stderr.startswith("dpjax train: ")) == (2, True)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config=quickstart", "--workdir=gs://bucket/run"],
        ["train", "--config=quickstart", "--workdir=s3://bucket", "--sweep_index=0"],
        ["audit", "--config=quickstart", "--workdir=gs://bucket/run"],
        ["sweep", "--config=quickstart", "--workdir=gs://bucket/run"],
        ["search", "--config=quickstart", "--workdir=gs://bucket/run"],
        ["report", "gs://bucket/run"],
        ["predict", "--workdir=gs://bucket/run", "--input=."],
        ["plan", "--plot=gs://bucket/x.png"],
        ["train", "--config=quickstart", "--workdir=w", "--config.data.data_dir=gs://b/d"],
        ["export", "gs://bucket/run", "m.safetensors"],
        ["export", ".", "https://host/m.safetensors"],
    ],
    ids=" ".join,
)
def test_a_url_is_refused_before_anything_starts(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    # The second has no sweep(), which is said first.
    assert "is a URL" in said or "defines no sweep()" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_home_of_the_user_is_known_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(CONFIG.format(line="config.epochs = -1.0"))
    assert cli.main(["train", "--config=~/own.py", "--workdir=~/run"]) == 2
    assert "epochs=-1.0" in capsys.readouterr().err
    for argv in (
        ["report", "~/run"],
        ["predict", "--workdir=~/run", "--input=."],
        ["export", "~/run", "m.safetensors"],
    ):
        assert cli.main(argv) == 2
        assert str(tmp_path / "run") in capsys.readouterr().err, argv
