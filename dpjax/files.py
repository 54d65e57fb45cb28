"""Files written whole or not at all, text and JSON lines, cache directories, the nearest name."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "cache_dir", "caching", "choose", "did_you_mean", "free_name", "json_lines", "local_path",
    "nearest", "read_object", "read_text", "replacing", "resolve", "returned",
]  # fmt: skip

T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, secret: bool = False) -> Iterator[Path]:
    """Yields an empty file to write, which takes the place of `path` if the block ends well.

    Args:
        path: the file to replace; its directory exists.
        secret: only the owner may read it.

    Guarantees:
        A reader sees the old file or the whole new one, also after a crash. Several processes may
        write the same file: the last one wins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    os.close(os.open(temporary, flags, 0o600 if secret else 0o644))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a crash could keep the new name and lose the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """Reads a file of UTF-8 text, without the mark that Windows programs put in front of it.

    Raises:
        ValueError: naming the file, and what cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number, from 1, and the fields of each object of a JSON-lines file.

    Empty lines are skipped.

    Raises:
        ValueError: a line is not an object in JSON; names the line.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be an object {{...}}, got {line.strip()[:40]!r}.")
        try:  # JSON can name halves of a character, which are no text
            " ".join(value for value in fields.values() if isinstance(value, str)).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {error.reason}, such as {error.object[error.start]!r}."
            ) from error
        yield number, fields


def read_object(path: Path, *fields: str) -> dict[str, Any]:
    """Reads a JSON file that contains one object, with certain fields.

    Raises:
        ValueError: it does not; names the file, which was cut or edited then.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cannot be read: {error}.") from error
    if not isinstance(content, dict) or not set(fields) <= set(content):
        missing = ", ".join(sorted(set(fields) - set(content))) if fields else "fields"
        raise ValueError(f"{path} is damaged: it has no {missing}.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # JSON would keep the last, without a word
        raise ValueError(f"a field occurs twice among {', '.join(name for name, _ in pairs)}")
    return fields


def local_path(field: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path with "~" expanded.

    Args:
        field: that the path was given for, for the message.
        path: of a file or directory on this machine, or on a file system that it has mounted.

    Raises:
        ValueError: it is a URL, which would become a directory of that name, or it is empty, as an
            unset variable of a shell is.
    """
    if not os.fspath(path):
        raise ValueError(f"{field}='' must not be empty.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", os.fspath(path)):
        raise ValueError(
            f"{field}={os.fspath(path)!r} is a URL, but files are on local or mounted file systems "
            "only: mount it (as with gcsfuse or mountpoint-s3), or copy the files."
        )
    return Path(path).expanduser()


def free_name(path: Path) -> Path:
    """Returns the first of PATH.1, PATH.2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def cache_dir(name: str) -> Path:
    """Returns `$DPJAX_CACHE_DIR/name`; `~/.cache/dpjax/name` if that is empty or not set."""
    return Path(os.environ.get("DPJAX_CACHE_DIR") or "~/.cache/dpjax").expanduser() / name


def caching() -> bool:
    """Whether results may be kept on disk: not if DPJAX_CACHE_DIR is set to nothing."""
    return os.environ.get("DPJAX_CACHE_DIR") != ""


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Returns the known name most like `name`; None if none reaches the cutoff in [0, 1]."""
    close = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Returns " Did you mean 'adam'?" for the known name most like `name`, or nothing."""
    near = nearest(name, known, cutoff=cutoff)
    return "" if near is None else f" Did you mean {near!r}?"


def choose(field: str, name: str, table: Mapping[str, Any], *, also: Sequence[str] = ()) -> Any:
    """Returns the entry of a table that the field of a config names.

    Raises:
        ValueError: there is no such entry; lists the names, and what else is `also` allowed, and
            says which name is nearest.
    """
    if name in table:
        return table[name]
    names = ", ".join([*sorted(table), *also])
    raise ValueError(f"{field}={name!r} must be one of {names}.{did_you_mean(name, table)}")


def resolve(field: str, text: str, table: Mapping[str, Any]) -> Any:
    """Returns what the field of a config names: an entry of a table, or a user's function.

    Args:
        field: of the config.
        text: a key of `table`, or "module:function".
        table: our own entries.

    Raises:
        ValueError: it is neither; names the field, its value and the nearest name.
    """
    module, colon, name = str(text).partition(":")
    if not colon:
        return choose(field, text, table, also=["MODULE:FUNCTION of yours"])
    try:
        own = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{field}={text!r} cannot be imported: {reason}.") from error
    found = getattr(own, name, None)
    if not callable(found):
        hint = did_you_mean(name, (key for key, value in vars(own).items() if callable(value)))
        raise ValueError(f"{field}={text!r}: {module} has no function {name!r}.{hint}")
    return found


def returned(field: str, text: str, value: T, kind: type[T]) -> T:
    """Checks the type of what a function that a config names has returned."""
    if not isinstance(value, kind):
        raise ValueError(f"{field}={text!r} must return a {kind.__name__}, not {value!r}.")
    return value
