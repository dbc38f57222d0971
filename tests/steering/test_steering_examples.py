"""The example in the docstring of `FKTextSteering` runs as it stands.

That of `FKSteering` is run in tests/test_public_examples.py.
"""

from __future__ import annotations

from docstrings import run_examples

from diffalign.steering.text import FKTextSteering


def test_the_example_runs() -> None:
    run_examples(FKTextSteering)
