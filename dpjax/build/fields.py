"""The fields of a config get their values: from a file, or one by one from the command line.

Every mistake is one line that names the field and, in a file, the line.

>>> config = default()
>>> unknown_field(config, "dp.epsilom")
"config.dp has no field 'epsilom': did you mean 'epsilon'?"
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpjax.config import default
from dpjax.files import did_you_mean, nearest

__all__ = [
    "ConfigFile",
    "assign",
    "assign_text",
    "load",
    "run_file",
    "shipped",
    "unknown_field",
]


class ConfigFile(NamedTuple):
    """A config file that was run: its path, the names it defines, and the argument given with it.

    Attributes:
        path: of the file.
        names: what it defines.
        argument: what followed the colon; None if there was none.
    """

    path: str
    names: dict[str, Any]
    argument: str | None

    def call(self, name: str) -> Any:
        """Calls one of its functions, with the argument if it takes one; generators become lists.

        Raises:
            ValueError: there is no such function, or it raised, naming the file and the line.
        """
        if name not in self.names:
            raise ValueError(f"config={self.path!r} defines no {name}().")
        function = self.names[name]
        with _errors_by_line(self.path):
            takes = inspect.signature(function).parameters
            value = function(self.argument) if takes else function()
            return list(value) if inspect.isgenerator(value) else value


def shipped() -> dict[str, Path]:
    """Returns the files of the configs that come with the package, by name."""
    here = Path(__file__).parents[1]
    installed = here / "configs"  # a checkout has them beside the package
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def run_file(file: str) -> ConfigFile:
    """Runs a config file.

    Args:
        file: "FILE" or "FILE:ARGUMENT"; FILE is a path or, if there is no such file, the name of a
            config that comes with the package.

    Raises:
        ValueError: there is no such file, or it raised, naming the file and the line.
    """
    name, _, argument = os.path.expanduser(file).partition(":")
    path = name if os.path.isfile(name) else str(shipped().get(name, ""))
    if not path:
        hint = did_you_mean(Path(name).stem, shipped())
        raise ValueError(
            f"config={name!r} is neither a file nor one of {', '.join(shipped())}.{hint}"
        )
    with _errors_by_line(path):
        return ConfigFile(path, runpy.run_path(path), argument or None)


def load(file: str) -> ConfigDict:
    """Runs `get_config` of a config file, see `run_file`; the config that it returns is locked.

    Raises:
        ValueError: in one line, what is wrong with the file or with the fields it sets.
    """
    source = run_file(file)
    config = source.call("get_config")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config={source.path!r}: get_config() must return a config that starts from "
            f"dpjax.config.default(), got {type(config).__name__}."
        )
    problem = _wrong_fields(config, default(), "config")
    if problem is not None:
        raise ValueError(f"config={source.path!r}: {problem}")
    return config.lock()


@contextlib.contextmanager
def _errors_by_line(path: str) -> Iterator[None]:
    """Turns whatever a config file raises into one line that names the file and the line."""
    try:
        yield
    except Exception as error:
        where, text = path, str(error).split("\n")[0]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        if isinstance(error, SyntaxError):
            where, text = f"{error.filename}, line {error.lineno}", f"syntax error: {error.msg}"
        elif frames:
            where = f"{path}, line {frames[-1].lineno}"
            if not isinstance(error, ValueError):
                where += f", `{frames[-1].line}`"
        # ml_collections lists all fields and hides the nearest name at the end of the list.
        missing = re.search(r"^\W*(?:Key )?\W*(\w+)\W* does not exist and cannot", str(error))
        near = re.search(r'Did you mean \W*"(\w+)\W*" instead of \W*"(\w+)', str(error))
        if near is not None:
            text = f"there is no field {near[2]!r}: did you mean {near[1]!r}?"
        elif missing is not None:
            text = f"there is no field {missing[1]!r}."
        elif not isinstance(error, (SyntaxError, ValueError)):
            text = f"{type(error).__name__}: {text}"
        raise ValueError(f"{where}: {text}") from error


def _wrong_fields(config: ConfigDict, like: ConfigDict, above: str) -> str | None:
    """Says which field a config lacks, or has though no run would read it; None if there is none.

    A block under `unlocked()` can add any field, misspelled ones too.
    """
    for name in config:
        if name not in like:
            return unknown_field(like, name, above=above)
    for name, value in like.items():
        if name not in config:
            return f"{above} has no field {name!r}: start from dpjax.config.default()."
        section = isinstance(value, ConfigDict) and name != "options"
        if not section or (name == "dp" and config.dp is None):
            continue
        if not isinstance(config[name], ConfigDict):
            return f"{above}.{name}={config[name]!r} must be a section with fields."
        problem = _wrong_fields(config[name], value, f"{above}.{name}")
        if problem is not None:
            return problem
    return None


def unknown_field(config: ConfigDict, path: str, *, above: str = "config") -> str | None:
    """Says what is wrong with a dotted field path, naming the nearest field; None if it exists.

    Sections named `options` take any field: what they go to checks them.
    """
    node: Any = config
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            return f"{above} has no fields (it is {node!r}), got {path!r}."
        if above.endswith(".options"):
            return None
        if name not in node:
            near = nearest(name, node)
            hint = f"did you mean {near!r}?" if near else f"its fields are {', '.join(node)}."
            return f"{above} has no field {name!r}: {hint}"
        node, above = node[name], f"{above}.{name}"
    return None


def assign(config: ConfigDict, path: str, value: Any) -> None:
    """Sets one field of a config that is, and stays, locked.

    Args:
        config: to change.
        path: dotted, such as "dp.epsilon".
        value: of the field's type; None where the field is optional.

    Raises:
        ValueError: an unknown field, naming the nearest, or a value of another type.
    """
    problem = unknown_field(config, path)
    if problem is not None:
        raise ValueError(problem)
    node, name = _node(config, path)
    shown = f"config.{path}={value!r}"
    if value is None and not _optional(path):
        raise ValueError(f"{shown} must be {_KINDS.get(node.get_type(name), 'set')}.")
    free = ".options." in path
    if isinstance(value, Mapping) and not free and name != "options":
        raise ValueError(f"{shown}: set its fields one by one, as in config.{path}.FIELD.")
    try:
        with config.unlocked(), node.ignore_type() if free else contextlib.nullcontext():
            node[name] = ConfigDict(value) if isinstance(value, Mapping) else value
    except (TypeError, ValueError) as error:
        kind = _KINDS.get(node.get_type(name), f"of type {node.get_type(name).__name__}")
        raise ValueError(f"{shown} must be {kind}.") from error


def assign_text(config: ConfigDict, path: str, text: str) -> None:
    """Sets one field from text, as a command line gives it; see `assign`.

    >>> config = default()
    >>> assign_text(config, "optimizer.options.b1", "0.8")
    >>> assign_text(config, "dp.bound_schedule", "((0.0, 1), (0.5, 2))")
    >>> assign_text(config, "dp.epsilon", "one")
    Traceback (most recent call last):
    ValueError: config.dp.epsilon='one' must be a number.
    """
    problem = unknown_field(config, path)
    if problem is not None:
        raise ValueError(problem)
    node, name = _node(config, path)
    free = ".options." in path or name not in node
    assign(config, path, _parse(text, object if free else node.get_type(name)))


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple, such as ((0.0, 1.0), (0.5, 2.0))",
    ConfigDict: "a section with fields",
}
_WORDS = {"true": True, "false": False, "inf": math.inf, "none": None}


def _parse(text: str, kind: type) -> Any:
    """Returns the value that text stands for; the text itself where it is of no use."""
    if text == "None" or kind is str:
        return None if text == "None" else text
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return _tuples(value) if kind is tuple else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _node(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The section that holds a field, and the field's name in it."""
    *above, name = path.split(".")
    return functools.reduce(lambda node, key: node[key], above, config), name


def _optional(path: str) -> bool:
    """Whether a field may be None: it is None by default, or it is `dp`, or no field of ours."""
    if path == "dp" or ".options." in path or unknown_field(default(), path) is not None:
        return True
    node, name = _node(default(), path)
    return node[name] is None
