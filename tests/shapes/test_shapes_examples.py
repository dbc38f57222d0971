"""The examples in the docstrings of `diffalign.shapes` run as they stand."""

from __future__ import annotations

import inspect
import re
import textwrap

import pytest

from diffalign import shapes


@pytest.mark.parametrize("name", ["Scene", "parse_prompt", "render", "verify"])
def test_the_example_runs(name: str) -> None:
    text = inspect.getdoc(getattr(shapes, name)) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, flags=re.M | re.S)
    assert blocks
    for block in blocks:
        exec(textwrap.dedent(block), dict(vars(shapes)))
