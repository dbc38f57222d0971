"""Killed at any moment and started again, a command ends as if it had never been
killed. 160 moments in all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = [
    "dpo",
    "best",
    "d3po",
    "seppo",
    "online",
    "ragged",
    "streaming",
    "score",
    "build",
    "compare",
    "recaption",
    "sample",
    "steer",
    "reward",
    "reward_lora",
    "quickstart",
]


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_runs_end_as_the_uninterrupted_one(scenario, tmp_path):
    script = Path(__file__).with_name("crash_moments.py")
    done = subprocess.run(
        [sys.executable, str(script), scenario, "10", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
