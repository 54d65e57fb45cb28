"""Fields, their nearest names, and every config file of the repository."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dpjax import config as config_lib

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def leaves(node):
    for value in node.values():
        yield from leaves(value) if isinstance(value, ConfigDict) else [value]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_files(path):
    config = config_lib.load(str(path))
    assert config.is_locked
    assert all(isinstance(v, (int, float, str, bool, tuple, type(None))) for v in leaves(config)), (
        "values only"
    )
    assert set(config) == set(config_lib.default())
    assert f"dpjax train --config={path.stem}" in path.read_text()
    with pytest.raises(ValueError, match="arg="):
        config_lib.load(f"{path}:no such argument")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dp.epsilom", "'epsilon'"),
        ("bacth_size", "'batch_size'"),
        ("dp.epsilon.x", "has no fields"),
        ("dp.zzz", "its fields are"),
    ],
)
def test_unknown_fields(path, text):
    assert text in config_lib.unknown_field(config_lib.default(), path)


def test_known_fields():
    assert config_lib.unknown_field(config_lib.default(), "optimizer.learning_rate") is None


def test_assignment_to_an_unknown_field_fails():
    config = config_lib.default()
    with pytest.raises(AttributeError, match="Did you mean"):
        config.dp.epsilom = 1.0


def test_differences_name_the_field():
    one, other = config_lib.default().to_dict(), config_lib.default().to_dict()
    other["dp"]["epsilon"] = 1.0
    other["dp"]["extra"] = 1
    assert config_lib.differences(one, other) == [
        "config.dp.epsilon: 2.0 != 1.0",
        "config.dp.extra: None != 1",
    ]
    assert config_lib.differences(one, one) == []
