"""docs/papers.md is what the classes say; every option of a method names its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.config.section import field_docs, split_source
from diffalign.methods import METHODS, config_class
from tools.papers import own_fields, page, section


@pytest.mark.parametrize("method", METHODS)
def test_every_own_option_names_its_source(method: str) -> None:
    names, docs = [name for name, _ in own_fields(method)], field_docs(config_class(method))
    assert all(all(split_source(docs[name])) for name in names)
    assert "loss" in section(method) and all(f"`{name}`" in section(method) for name in names)


def test_the_page_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "papers.md"
    assert path.read_text("utf-8") == page(), "run python -m tools.papers"
