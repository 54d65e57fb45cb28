"""The default config is locked, and two configs can be compared field by field."""

import pytest

from dpjax import config as config_lib


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
