"""A model that is described wrongly is refused under the name of its option."""

from __future__ import annotations

import pytest

from diffalign.errors import ConfigError
from diffalign.evaluation.compare import read_models
from diffalign.evaluation.models import parse_model


@pytest.mark.parametrize("field", ["--base", "--tuned", "models[2]"])
def test_a_bad_scale_names_its_option(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model("runs/lora@1e", field, base=parse_model("shapes", "base"))
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: expected a number behind '@', got '1e'"


def test_a_bad_scale_of_one_of_several_models_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^tuned\[1\]: expected a number behind '@'"):
        read_models("shapes", ["shapes", "runs/lora@--1"])
    with pytest.raises(ConfigError, match="^base: expected a number behind '@'"):
        read_models("shapes@..", ["shapes"])
