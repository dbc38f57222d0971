"""The examples in the docstrings of the steering classes run as they stand."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import pytest

from diffalign import FKSteering
from diffalign.steering.text import FKTextSteering


@pytest.mark.parametrize("sampler", [FKSteering, FKTextSteering])
def test_the_example_runs(sampler: Any) -> None:
    blocks = re.findall(
        r"^ *```python\n(.*?)^ *```$", inspect.getdoc(sampler) or "", flags=re.M | re.S
    )
    assert blocks
    for block in blocks:
        exec(textwrap.dedent(block), {})
