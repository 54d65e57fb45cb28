"""Where the rows of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, or elsewhere.

A row keeps its names, so what reads private data is named `nonprivate/...` there too. TensorBoard
files stay in the run's directory, readable by their owner; W&B sends the rows to its server unless
WANDB_MODE=offline. Only process 0 writes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from dpjax.files import resolve

__all__ = ["CannotWrite", "Write", "check", "opened"]

Write = Callable[[int, Mapping[str, Any]], None]
"""Writes the row of a step."""


class CannotWrite(ValueError):
    """Raised before the first step if a writer cannot be opened, for want of a login, say."""


class _Writer(Protocol):
    def __call__(self, folder: Path, *, name: str, after: int) -> AbstractContextManager[Write]:
        """Opens it.

        Args:
            folder: of the run.
            name: of the run, 32 hexadecimal digits; equal when it is resumed.
            after: the last step that the rows of an interrupted run may keep.
        """


def check(log_to: str | None) -> None:
    """Refuses a writer that does not exist, or whose package is not installed.

    Raises:
        ValueError: naming the field `log_to` and what to install.
    """
    for name in _names(log_to):
        resolve("log_to", name, _WRITERS)
        if name in _PACKAGES:
            try:
                importlib.import_module(_PACKAGES[name])
            except ImportError as error:
                raise ValueError(
                    f"log_to={log_to!r} needs {_PACKAGES[name]}: pip install {_PACKAGES[name]}."
                ) from error


@contextlib.contextmanager
def opened(log_to: str | None, folder: Path, *, name: str, after: int) -> Iterator[Write]:
    """Yields a function that gives each row to all writers of the field `log_to`.

    Args:
        log_to: names joined by "+"; None: there is none.
        folder: see `_Writer`.
        name: see `_Writer`.
        after: see `_Writer`.

    Raises:
        CannotWrite: naming the field and the reason.
    """
    with contextlib.ExitStack() as stack:
        writes: list[Write] = []
        for text in _names(log_to):
            try:
                writer: _Writer = resolve("log_to", text, _WRITERS)
                writes.append(stack.enter_context(writer(folder, name=name, after=after)))
            except Exception as error:  # whatever a service or a function of the user's raises
                raise CannotWrite(f"log_to={text!r} cannot be opened: {error}") from error

        def write(step: int, values: Mapping[str, Any]) -> None:
            for one in writes:
                one(step, values)

        yield write


def _names(log_to: str | None) -> list[str]:
    return [] if log_to is None else log_to.split("+")


@contextlib.contextmanager
def _tensorboard(folder: Path, *, name: str, after: int) -> Iterator[Write]:
    from tensorboardX import SummaryWriter

    logs = folder / "tensorboard"
    logs.mkdir(mode=0o700, exist_ok=True)
    # TensorBoard hides what an interrupted run wrote from this step on: it is executed again.
    writer = SummaryWriter(str(logs), purge_step=after + 1 if after else None)
    try:

        def write(step: int, values: Mapping[str, Any]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(folder: Path, *, name: str, after: int) -> Iterator[Write]:
    import wandb

    logs = folder / "wandb"
    logs.mkdir(mode=0o700, exist_ok=True)
    run = wandb.init(
        project="dpjax",
        dir=str(folder),
        name=folder.name,
        id=name,
        resume="allow",  # rows of steps that it has are dropped there
        # What is printed, the code and the machine are none of its business.
        settings=wandb.Settings(
            console="off", save_code=False, disable_git=True, silent=True, x_disable_meta=True,
            x_disable_stats=True,
        ),
    )  # fmt: skip
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


_WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
