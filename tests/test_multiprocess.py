"""Two processes of two devices, one process of eight, one of one: the same run."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import two_processes
from tiny import tiny_config

from dpjax import build, compilation, hosts, loop, models, rng, sharding
from dpjax.dp import sampling
from dpjax.storage import Workdir, read_jsonl

compilation.keep_on_disk()

# Parameters that start at zero move by 1e-3 a step: 1e-8 is far below the rounding of one step.
CLOSE = {"rtol": 1e-5, "atol": 1e-8}


def launch(*commands):
    """Runs one process per command, with two host devices each; returns (code, output) of each."""
    here = os.path.dirname(__file__)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here}:{os.path.dirname(here)}",
        # Every process compiles for itself; optimising would take most of the time.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    children = [
        subprocess.Popen(
            [sys.executable, *command], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        return [(child.communicate(timeout=300)[0], child.returncode)[::-1] for child in children]
    finally:
        for child in children:
            child.kill()


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def weights(path):
    return models.read_tensors(path / "weights.safetensors")


def assert_close(one, other):
    other = weights(other)
    for name, value in weights(one).items():
        np.testing.assert_allclose(other[name], value, err_msg=name, **CLOSE)


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
def two(tmp_path_factory):
    """What two real processes did: their directory and their two reports."""
    path = tmp_path_factory.mktemp("two")
    script, port = two_processes.__file__, str(free_port())
    for code, said in launch(*[(script, port, str(k), str(path)) for k in range(2)]):
        assert code == 0, said
    return path, [json.loads((path / f"result_{k}.json").read_text()) for k in range(2)]


def test_two_processes_give_the_parameters_of_one(two, eight):
    path, _ = two
    assert_close(path / "fresh", eight)
    sizes = [
        [row["nonprivate/batch_size"] for row in read_jsonl(p / "metrics.jsonl") if
         "nonprivate/batch_size" in row]
        for p in (path / "fresh", eight)
    ]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == two_processes.STEPS


@pytest.mark.parametrize(("devices", "text"), [(1, "replicated"), (8, "fsdp")])
def test_other_devices_and_layouts_give_them_too(run, eight, devices, text, tmp_path):
    loop.train(on(run, devices, text), Workdir(tmp_path / "w"))
    assert_close(tmp_path / "w", eight)


def test_each_host_reads_only_its_rows_and_every_example_is_used_once(two, run):
    mechanism = run.phases[0].mechanism
    seed = rng.sampler_seed(run.config.private_seed)
    drawn = np.concatenate([mechanism.indices(seed, t) for t in range(two_processes.STEPS)])
    read = [np.array(report["rows"]) for report in two[1]]
    np.testing.assert_array_equal(np.sort(np.concatenate(read)), np.sort(drawn))
    assert abs(len(read[0]) / len(read[1]) - 1) < 0.5
    # Step by step: the hosts' shares are disjoint.
    assert len(sampling.chunks(mechanism.indices(seed, 0), 64)) > 1


def test_files_are_written_once(two):
    path = two[0] / "fresh"
    steps = [r["step"] for r in read_jsonl(path / "metrics.jsonl") if "nonprivate/loss" in r]
    assert steps == list(range(1, two_processes.STEPS + 1))
    assert json.loads((path / "environment.json").read_text())["processes"] == 2


def test_hosts_that_disagree_are_told_before_any_step(two):
    for report in two[1]:
        said = report["disagreement"]
        assert "config: host 1 has" in said
        assert "data: host 1 has" in said
    assert not (two[0] / "other").exists()


def test_a_mistake_of_one_host_ends_all(two):
    for report in two[1]:
        assert report["mistake"]["code"] == 2
        assert "error: host 1: model.size='minni'" in report["mistake"]["said"]
    assert not (two[0] / "typo").exists()


def test_sigterm_to_one_host_saves_all_before_the_same_step(two):
    path, reports = two
    assert reports[0]["preempted"] == reports[1]["preempted"]
    assert reports[0]["preempted"].endswith("the same command resumes.")
    steps = json.loads((path / "stopped" / "privacy.json").read_text())["steps_done"]
    assert 3 <= steps < two_processes.STEPS
    assert (path / "stopped" / "checkpoints" / str(steps)).is_dir()


def test_resume_on_eight_devices_then_one_then_two_processes(run, eight, tmp_path):
    path = tmp_path / "w"
    for devices, step in ((8, 7), (1, 13)):
        with pytest.raises(loop.Preempted):
            loop.train(on(run, devices), Workdir(path), stop=lambda now, step=step: now == step)
    config = two_processes.config_file(tmp_path / "c.py")
    flags = [f"--config={config}", f"--workdir={path}", f"--coordinator=localhost:{free_port()}"]
    done = launch(
        *[["-m", "dpjax.train", *flags, "--num_processes=2", f"--process_id={k}"] for k in range(2)]
    )
    assert [code for code, _ in done] == [0, 0], done
    assert "held-out evaluation" in done[0][1]
    assert "examples N" not in done[1][1]  # one host speaks
    assert_close(path, eight)
    assert json.loads((path / "privacy.json").read_text()) == json.loads(
        (eight / "privacy.json").read_text()
    )


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


def test_one_process_agrees_with_itself():
    hosts.agree({"config": "x"})
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.first(None) is None
