"""Writing whole or not at all, cache directories, and the nearest known name."""

import os
import stat
from pathlib import Path

import pytest

from dpjax import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    with files.replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path):
    with files.replacing(path) as temporary:
        temporary.write_text("sec")
        raise KeyboardInterrupt


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with files.replacing(path) as one, files.replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the block that ends last


def test_a_secret_is_the_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        for secret, mode in ((True, 0o600), (False, 0o644)):
            with files.replacing(tmp_path / "x", secret=secret) as temporary:
                assert stat.S_IMODE(temporary.stat().st_mode) == mode
            assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_json_lines_are_numbered_and_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        '\ufeff{"a": "\u2028"}\r\n\r\n{"a": 2}'.encode()
    )  # a mark, and a line in a line
    assert list(files.json_lines(path)) == [(1, {"a": "\u2028"}), (3, {"a": 2})]
    for content, text in (
        (b'{"a": 1}\n[1]', r"line 2: must be an object \{\.\.\.\}, got '\[1\]'"),
        (b"{", "line 1: not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "line 1: not JSON: a field occurs twice among a, b, a"),
        (b"[" * 200_000, "line 1: not JSON"),
        (b"\xff", "cannot be read as UTF-8 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            list(files.json_lines(path))
    with pytest.raises(ValueError, match=r"gone\.jsonl cannot be read"):
        list(files.json_lines(tmp_path / "gone.jsonl"))


def test_a_damaged_object_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert files.read_object(path, "a") == {"a": 1}
    for content, text in (
        ("", r"x\.json is damaged or cannot be read: Expecting value"),
        ("[1]", "it has no fields"),
        ('{"b": 1}', r"x\.json is damaged: it has no a\."),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=text):
            files.read_object(path, *(["a"] if "b" in content else []))
    with pytest.raises(ValueError, match=r"gone\.json is damaged or cannot be read"):
        files.read_object(tmp_path / "gone.json")


def test_no_path_is_not_the_directory_one_is_in():
    assert files.local_path("workdir", ".") == Path(".")
    with pytest.raises(ValueError, match="workdir='' must not be empty"):
        files.local_path("workdir", "")


def test_cache_directories_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DPJAX_CACHE_DIR", str(tmp_path))
    assert files.caching()
    assert files.cache_dir("features") == tmp_path / "features"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for keep in (True, False):  # not set, and set to nothing
        monkeypatch.setenv("DPJAX_CACHE_DIR", "")
        if keep:
            monkeypatch.delenv("DPJAX_CACHE_DIR")
        assert files.caching() == keep
        assert files.cache_dir("data") == tmp_path / "home" / ".cache" / "dpjax" / "data"


def test_the_nearest_name_is_said():
    table = {"adam": 1, "sgd": 2}
    assert files.choose("optimizer.name", "sgd", table) == 2
    with pytest.raises(ValueError, match=r"name='adm' must be one of adam, sgd\. Did you mean 'ad"):
        files.choose("name", "adm", table)
    with pytest.raises(ValueError, match=r"name='lion' must be one of adam, sgd\.$"):
        files.choose("name", "lion", table)
    assert files.nearest("lion", table, cutoff=0) in table
