"""One of the two processes of `test_multiprocess.py`: ADDRESS PROCESS_ID DIRECTORY.

DIRECTORY/resumed holds a run that was stopped before step FIRST.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path

from tiny import tiny_config

from dpjax import build
from dpjax.commands import cli
from dpjax.config import default
from dpjax.runtime import Workdir, compilation, hosts
from dpjax.training import loop

# Twenty steps of two phases by random allocation, whose bound adapts and whose parameters are
# averaged; the physical batch divides neither by two processes nor by eight devices.
STEPS = 20
FIRST = 5  # the step from which the two processes resume, in the second phase
CHANGES = {
    "epochs": 2.5, "checkpoint_every": 10, "eval_every": 10, "physical_batch": 61,
    "finetune": "film", "lp__fraction": 0.2, "ema": 0.9, "dp__adaptive__quantile": 0.5,
    "dp__sampler": "random_allocation",
}  # fmt: skip


def config_file(path, **changes):
    """Writes the config as a file."""
    path.write_text(
        "from tiny import tiny_config\n"
        f"def get_config(arg=None): return tiny_config(**{ ({**CHANGES, **changes})!r})\n"
    )
    return path


def counting(run, log):
    """The run, with every row that this process reads put into `log`."""
    read = run.train.source.read

    def noting(rows):
        log.extend(rows.tolist())
        return read(rows)

    source = run.train.source._replace(read=noting)
    return run._replace(train=dataclasses.replace(run.train, source=source))


def mistake_of_one(process, directory):
    """One host's mistake ends both with its message."""
    size = "minni" if process == 1 else "mini"
    file = config_file(directory / f"config_{process}.py", model__size=size)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["train", f"--config={file}", f"--workdir={directory / 'typo'}"])
    return {"code": code, "said": said.getvalue()}


def language_model(directory):
    """Trains the config that the test put there."""
    config = default()
    with config.unlocked():
        config.update(json.loads((directory / "language.json").read_text()))
    loop.train(build.build(config), Workdir(directory / "language"))


def main(address, process, directory):
    compilation.keep_on_disk()
    hosts.start(address, 2, process)
    if (directory / "language.json").exists():
        return language_model(directory)
    hosts.start, start = lambda *arguments: None, hosts.start
    result = {"mistake": mistake_of_one(process, directory)}
    hosts.start = start

    run, rows = build.build(tiny_config(**CHANGES)), []
    other = run.config.copy_and_resolve_references()
    other.seed = process
    data = run.train.select(range(process, len(run.train)))
    loop.code_digest, code_digest = lambda: f"edited on {process}", loop.code_digest
    try:
        loop.train(run._replace(config=other, train=data), Workdir(directory / "other"))
    except hosts.Disagreement as error:
        result["disagreement"] = str(error)
    loop.code_digest = code_digest

    released = run.config.copy_and_resolve_references()
    released.private_seed = None
    workdir = Workdir(directory / "release")
    workdir.create(released)
    result["private_seed"] = loop._private_seed(run._replace(config=released), workdir)

    asked = hosts.catch_signals()

    def stop(step):
        if step == FIRST + 1 and process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(step)

    try:
        loop.train(counting(run, rows), Workdir(directory / "resumed"), stop=stop)
    except loop.Preempted as error:
        result["preempted"] = str(error)
    result["rows"] = rows
    (directory / f"result_{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
