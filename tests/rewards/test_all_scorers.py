"""The common tests of every scorer: one finite number per image that depends on nothing
else, and a true gradient."""

from __future__ import annotations

import pytest
from models import MODELS, load_tiny

from diffalign import load_scorer
from diffalign.rewards.testing.check import check_scorer

SIMPLE = ["jpeg_compressibility", "jpeg_incompressibility", "shapes"]


@pytest.mark.parametrize("name", MODELS)
def test_neural_scorers(name, tmp_path):
    report = check_scorer(load_tiny(name, tmp_path))
    report.raise_if_failed()
    states = {check.name: check.status for check in report.checks}
    assert states["gradient"] == "passed" and list(states.values()).count("skipped") == 0


@pytest.mark.parametrize("name", SIMPLE)
def test_programmatic_scorers(name):
    report = check_scorer(load_scorer(name))
    report.raise_if_failed()
    assert {check.name: check.status for check in report.checks}["gradient"] == "skipped"
