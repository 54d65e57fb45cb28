"""Two processes of two devices, one process of eight, one of one: the same run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import two_processes
import yaml
from causal import causal_config
from tiny import on_devices, tiny_config

from dpjax import build, models
from dpjax.dp import sampling, seeds
from dpjax.runtime import Workdir, hosts, read_jsonl, sharding
from dpjax.training import loop

LAUNCH = Path(__file__).parents[2] / "configs" / "launch"

# Parameters that start at zero move by 1e-3 a step: 1e-8 is far below the rounding of one step.
CLOSE = {"rtol": 1e-5, "atol": 1e-8}


def start(*command, **environment):
    """Starts a command with two host devices."""
    here = os.path.dirname(os.path.dirname(__file__))
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "PYTHONPATH": f"{here}:{os.path.dirname(here)}",
            **on_devices(2),
            **environment,
        },
    )  # fmt: skip


def said(children):
    """Waits until they end without an error; returns what each of them printed."""
    try:
        texts = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), texts
    return texts


def free_port():
    """One that process 0 can listen at."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


def assert_close(one, other):
    """Both the parameters and their average."""
    for file in ("weights.safetensors", "weights_ema.safetensors"):
        got = models.read_tensors(other / file)
        for name, value in models.read_tensors(one / file).items():
            np.testing.assert_allclose(got[name], value, err_msg=name, **CLOSE)


@pytest.fixture(scope="module")
def run():
    return build.build(tiny_config(**two_processes.CHANGES))


@pytest.fixture(scope="module")
def eight(run, tmp_path_factory):
    """The run on eight devices of this process."""
    path = tmp_path_factory.mktemp("eight") / "w"
    loop.train(run, Workdir(path))
    return path


def on(run, devices, text="replicated"):
    return run._replace(layout=sharding.layout(text, jax.devices()[:devices]))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The directory of the run by the documented command in two processes, and what it printed."""
    path = tmp_path_factory.mktemp("two")
    config = two_processes.config_file(path / "c.py")
    flags = [f"--config={config}", f"--workdir={path / 'w'}"]
    (text,) = said([start(LAUNCH / "two_processes.sh", *flags, PORT=free_port())])
    return path / "w", text


def language_config(folder, **changes):
    """Four steps of LoRA on a decoder whose frozen matrices have 8 bits."""
    config = causal_config(
        folder, finetune="lora:2:attn/|mlp/", epochs=1.0, model__frozen_dtype="int8",
        model__remat=True, **changes,
    )  # fmt: skip
    with config.unlocked():
        config.model.options.update({"width": 64, "mlp": 64})
    return config


def in_two_processes(path):
    """Runs `two_processes.py`."""
    script, where = two_processes.__file__, f"localhost:{free_port()}"
    said([start(sys.executable, script, where, str(k), str(path)) for k in range(2)])


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """The directory in which `two_processes.py` took over from eight devices and one; reports."""
    path = tmp_path_factory.mktemp("resumed")
    for devices, step in ((8, 3), (1, two_processes.FIRST)):
        with pytest.raises(loop.Preempted):
            loop.train(
                on(run, devices),
                Workdir(path / "resumed"),
                stop=lambda now, step=step: now == step,
            )
    in_two_processes(path)
    return path, [json.loads((path / f"result_{k}.json").read_text()) for k in range(2)]


def test_two_processes_give_the_parameters_of_one(recipe, eight):
    assert_close(recipe[0], eight)


def test_every_topology_uses_the_examples_that_were_drawn(recipe, eight, run):
    seed = seeds.sampler_seed(run.config.private_seed)
    steps = [p for p in run.phases for _ in range(p.steps)]
    drawn = [phase.mechanism.sampler.indices(seed, step).size for step, phase in enumerate(steps)]
    assert len(drawn) == two_processes.STEPS
    for path in (recipe[0], eight):
        rows = read_jsonl(path / "metrics.jsonl")
        used = [r["nonprivate/batch_size"] for r in rows if "nonprivate/batch_size" in r]
        assert used == drawn


@pytest.mark.parametrize(("devices", "text"), [(1, "replicated"), (8, "fsdp")])
def test_other_devices_and_layouts_give_them_too(run, eight, devices, text, tmp_path):
    loop.train(on(run, devices, text), Workdir(tmp_path / "w"))
    assert_close(tmp_path / "w", eight)


@pytest.mark.slow
def test_a_language_model_too(tmp_path):
    """Two processes that share out its parameters, eight devices and one."""
    (tmp_path / "language.json").write_text(language_config(tmp_path, sharding="fsdp").to_json())
    in_two_processes(tmp_path)
    run = build.build(language_config(tmp_path))
    for devices in (8, 1):
        loop.train(on(run, devices), Workdir(tmp_path / f"{devices}"))
        got = models.read_tensors(tmp_path / "language" / "weights.safetensors")
        for name, value in models.read_tensors(tmp_path / f"{devices}/weights.safetensors").items():
            np.testing.assert_allclose(got[name], value, err_msg=name, rtol=1e-4, atol=1e-5)


def test_one_host_speaks_and_writes(recipe):
    path, text = recipe
    for words in ("examples N", "held-out evaluation", "results in"):
        assert text.count(words) == 1
    steps = [r["step"] for r in read_jsonl(path / "metrics.jsonl") if "nonprivate/loss" in r]
    assert steps == list(range(1, two_processes.STEPS + 1))
    assert json.loads((path / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_each_host_reads_only_its_share_of_every_chunk(two, run):
    """Hosts read ahead of the steps: what they have read begins with what was executed."""
    mechanism = run.phases[-1].mechanism
    seed = seeds.sampler_seed(run.config.private_seed)

    def share(host, end):
        halves = [
            chunk.reshape(2, -1)[host]
            for step in range(two_processes.FIRST, end)
            for chunk in sampling.chunks(mechanism.sampler.indices(seed, step), 64)
        ]
        return [row for half in halves for row in half.tolist() if row >= 0]

    for host, report in enumerate(two[1]):
        executed = share(host, stopped_at(two[0]))
        assert report["rows"][: len(executed)] == executed
        assert report["rows"] == share(host, two_processes.STEPS)[: len(report["rows"])]


def stopped_at(path):
    return json.loads((path / "resumed" / "privacy.json").read_text())["steps_done"]


@pytest.mark.slow
def test_hosts_that_disagree_are_told_before_any_step(two):
    for report in two[1]:
        assert "config: host 1 has" in report["disagreement"]
        assert "data: host 1 has" in report["disagreement"]
        assert "code: host 1 has" in report["disagreement"]
    assert not (two[0] / "other").exists()


@pytest.mark.slow
def test_a_mistake_of_one_host_ends_all(two):
    for report in two[1]:
        assert report["mistake"]["code"] == 2
        assert "dpjax train: host 1: model.size='minni'" in report["mistake"]["said"]
    assert not (two[0] / "typo").exists()


@pytest.mark.slow
def test_sigterm_to_one_host_saves_all_before_the_same_step(two):
    path, reports = two
    assert reports[0]["preempted"] == reports[1]["preempted"]
    assert reports[0]["preempted"].endswith("the same command resumes.")
    assert two_processes.FIRST < stopped_at(path) < two_processes.STEPS
    assert (path / "resumed" / "checkpoints" / str(stopped_at(path))).is_dir()


@pytest.mark.slow
def test_the_secret_of_a_release_is_drawn_once_for_all_hosts(two):
    path, reports = two
    file = path / "release" / "private_seed.json"
    kept = json.loads(file.read_text())["private_seed"]
    assert [report["private_seed"] for report in reports] == [kept, kept]
    assert kept.bit_length() > 100
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_resume_on_eight_devices_then_one_then_two_processes_then_eight(two, run, eight):
    path = two[0] / "resumed"
    loop.train(run, Workdir(path))
    assert_close(path, eight)
    statements = [json.loads((p / "privacy.json").read_text()) for p in (path, eight)]
    assert statements[0] == statements[1]


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
FLAGS = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4"}


@pytest.mark.parametrize(
    ("environment", "arguments", "called"),
    [
        ({}, (), None),
        (SLURM, (), ()),
        ({**SLURM, "SLURM_NTASKS": "1"}, (), None),  # one task of an array job
        ({"JOB_COMPLETION_INDEX": "3"}, (), None),  # one pod of an array
        ({**FLAGS, "JOB_COMPLETION_INDEX": "3"}, (), ("h:1", 4, 3)),
        ({**FLAGS, "JAX_PROCESS_ID": "2"}, (), ("h:1", 4, 2)),
        ({}, ("h:2", 2, 0), ("h:2", 2, 0)),
        (FLAGS, ("h:2", 2, 0), ("h:2", 2, 0)),
        (SLURM, ("h:2", 2, 0), ("h:2", 2, 0)),
    ],
)
def test_start(environment, arguments, called, monkeypatch):
    for name in {**SLURM, **FLAGS, "JOB_COMPLETION_INDEX": 0, "JAX_PROCESS_ID": 0}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    hosts.start(*arguments)
    assert calls == ([] if called is None else [called])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("h:1", None, 0), "num_processes=None"),
        ((None, 2, 0), "coordinator=None"),
        (("h:1", 2, None), "process_id=None"),
        (("h", 2, 0), "coordinator='h' must be 'host:port'"),
        (("h:1", 2, 2), "process_id=2 must be in"),
    ],
)
def test_half_a_start_is_refused(arguments, text, monkeypatch):
    for name in (*FLAGS, "JOB_COMPLETION_INDEX", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=text):
        hosts.start(*arguments)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' must be a whole number"):
        hosts.start("h:1", None, 0)


def commands(path, **scripts):
    """Puts commands of Slurm's names first on the PATH."""
    path.mkdir()
    for name, script in scripts.items():
        (path / name).write_text("#!/usr/bin/env bash\n" + script)
        (path / name).chmod(0o755)
    return f"{path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


# Two tasks on one node, told what Slurm tells them.
SRUN = """
for k in 0 1; do
  SLURM_PROCID=$k SLURM_LOCALID=$k SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 "$@" &
  pids+=" $!"
done
for pid in $pids; do wait "$pid" || exit; done
"""


@pytest.mark.slow  # `test_start` has how a task is found, `recipe` what it starts
def test_the_recipe_for_slurm_makes_one_run_of_its_tasks(eight, tmp_path):
    """JAX's own detection finds the other task; it makes the port of the job's number."""
    config = two_processes.config_file(tmp_path / "c.py")
    flags = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    slurm = {"PATH": commands(tmp_path / "bin", srun=SRUN), "SLURM_JOB_ID": str(os.getpid())}
    said([start(LAUNCH / "slurm_nodes.sh", *flags, **slurm)])
    assert json.loads((tmp_path / "w/environment.json").read_text())["processes"] == 2
    assert_close(tmp_path / "w", eight)


@pytest.mark.parametrize("code", [0, 2, 75])
@pytest.mark.parametrize("name", ["slurm_nodes.sh", "slurm_array.sh"])
def test_the_recipes_for_slurm_requeue_what_was_saved(name, code, tmp_path):
    path = commands(
        tmp_path / "bin", srun=f'echo "$@" >{tmp_path}/ran; exit {code}',
        scontrol=f'echo "$@" >{tmp_path}/asked',
    )  # fmt: skip
    given = {"PATH": path, "SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    child = start(LAUNCH / name, "--config=a b.py", **given)
    child.communicate(timeout=60)
    assert child.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == (
        "requeue 12\n" if code == 75 else None
    )
    index = " --sweep_index=3" if name == "slurm_array.sh" else ""
    assert (tmp_path / "ran").read_text() == f"python -m dpjax train --config=a b.py{index}\n"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_the_recipes_are_shell_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert "python" in script.read_text()


def test_the_recipe_for_kubernetes_tells_every_pod_its_place(monkeypatch):
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    for entry in pod["containers"][0]["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")  # as Kubernetes sets it
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    hosts.start()
    assert calls == [(f"dpjax-0.{service['metadata']['name']}:29500", spec["completions"], 3)]
    assert spec["parallelism"] == spec["completions"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "dpjax"


def test_one_process_agrees_with_itself():
    hosts.agree({"config": "x"})
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.first(None) is None
