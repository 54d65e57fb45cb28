"""The command line that all verbs share.

A verb is a module beside this one: its docstring is its help and begins with a summary,
`add_arguments(parser)` declares its flags, and `run(args)` returns its exit code. Nothing else has
to know of it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from dpjax import __version__
from dpjax.config import without_infinite_budget
from dpjax.files import did_you_mean, local_path

__all__ = ["Mistake", "Parser", "config", "main", "mistakes", "parser", "path"]

_INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended


class Mistake(Exception):
    """A user's mistake: reported in one line, with exit code 2."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Says that errors raised inside are a user's mistakes; as a block or as a decorator."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise Mistake(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An argument parser of one verb, which raises `Mistake` and knows the nearest flag.

    Args:
        verb: the command.
        help: its docstring.
    """

    def __init__(self, verb: str, help: str) -> None:
        self._flags: list[str] = []
        self._takes_overrides = False
        super().__init__(
            prog=f"dpjax {verb}", description=help, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self._flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def add_config(self, *, required: bool = True) -> None:
        """Adds `--config=FILE` and `--config.FIELD=VALUE`; `config(args)` returns what they say."""
        self.add_argument(
            "--config", required=required, metavar="FILE[:ARG]",
            help="config file, or the name of one that comes with dpjax, such as quickstart; "
            "--config.FIELD=VALUE sets a field, as in --config.dp.epsilon=1",
        )  # fmt: skip
        self._takes_overrides = True

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses the flags of the verb.

        Raises:
            Mistake: naming the flag, and the nearest one if there is no such flag.
        """
        overrides = [text for text in argv if text.startswith("--config.")]
        rest = [text for text in argv if text not in overrides]
        known = [*self._flags, "--config.FIELD"] if self._takes_overrides else self._flags
        for flag in [text.partition("=")[0] for text in (rest if self._takes_overrides else argv)]:
            if flag.startswith("--") and flag not in self._flags:
                hint = did_you_mean(flag, known) or f" Its flags are {', '.join(known)}."
                raise Mistake(f"{flag} is not a flag of this command.{hint}")
        for text in overrides:
            if "=" not in text:
                raise Mistake(f"{text} needs a value: {text}=VALUE.")
        return self.parse_args(rest, argparse.Namespace(overrides=overrides))

    def error(self, message: str) -> Any:
        raise Mistake(message)


def path(text: str) -> Path:
    """The type of arguments that name a file or directory: "~" is expanded, a URL refused."""
    try:
        return local_path("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def config(args: argparse.Namespace) -> ConfigDict:
    """Returns the config that `--config` names, with the fields that the command line sets."""
    from dpjax.build import fields  # takes seconds to import

    loaded = fields.load(args.config)
    for text in args.overrides:
        path, _, value = text.removeprefix("--config.").partition("=")
        fields.assign_text(loaded, path, value)
    return without_infinite_budget(loaded)


class _Stream:
    """A text stream whose reader may leave, as `head` does: what is written then goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._open():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._open():
            self._stream.flush()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dpjax VERB ...`.

    Args:
        argv: verb and flags; by default those of this process.

    Returns:
        The exit code: that of the verb, or 2 for a user's mistake.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    # As with `python -m`, a config may name modules of the directory that the user is in.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    out: Any = sys.stdout and _Stream(sys.stdout)  # None where it was closed from the start
    err: Any = sys.stderr and _Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        name = "dpjax"
        try:
            verb, *flags = _checked(given)
            name = f"dpjax {verb}"
            args = parser(verb).parse(flags)
            code: int = _module(verb).run(args)
        except Mistake as error:
            print(f"{name}: {' '.join(str(error).split())}", file=err)
            code = 2
        except SystemExit as done:  # --help, --version
            code = int(done.code or 0)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        if out is not None:
            out.flush()
    return code


def parser(verb: str) -> Parser:
    """Returns the parser of a verb."""
    module = _module(verb)
    made = Parser(verb, module.__doc__)
    module.add_arguments(made)
    return made


def _module(verb: str) -> Any:
    return importlib.import_module(f"dpjax.commands.{verb}")


def _checked(given: Sequence[str]) -> Sequence[str]:
    """The command line, if it begins with a verb; help and version are printed here."""
    verbs = _verbs()
    first = given[0] if given else ""
    if first in ("-h", "--help"):
        width = max(map(len, verbs))
        lines = [f"  {verb:<{width}}  {summary}" for verb, summary in verbs.items()]
        print(_HELP.format(verbs="\n".join(lines)))
        raise SystemExit(0)
    if first == "--version":
        print(f"dpjax {__version__}")
        raise SystemExit(0)
    if first not in verbs:
        what = f"{first!r} is not a command." if first else "which command?"
        hint = did_you_mean(first, verbs)
        raise Mistake(f"{what}{hint} Commands: {', '.join(verbs)}; see dpjax --help.")
    return given


def _verbs() -> dict[str, str]:
    """Every verb and its summary, read from its file: importing them all would take seconds."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in files}
    return {verb: doc.partition("\n")[0] for verb, doc in docs.items() if verb != "cli"}


_HELP = """usage: dpjax COMMAND [--flag=value ...]

Fine-tunes pretrained models under differential privacy.

{verbs}

`dpjax COMMAND --help` lists the flags of a command. To begin:

  dpjax train --config=quickstart --workdir=/tmp/dpjax-quickstart"""
