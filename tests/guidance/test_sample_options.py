"""The options of `diffalign sample` that say how much of which model guides."""

from __future__ import annotations

import argparse

import pytest

from diffalign import cli
from diffalign.cli.entry import build_parser


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["sample", "--prompt", "a red circle", *arguments])


def test_both_shares_are_whole_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse()
    assert (options.positive_share, options.negative_share) == (1.0, 1.0)
    options = parse("--positive_share", "0.5", "--negative_share", "0.7")
    assert (options.positive_share, options.negative_share) == (0.5, 0.7)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new"), [("--alpha", "--positive_share"), ("--beta", "--negative_share")]
)
def test_an_old_name_works_and_says_the_new_one(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(old, "0.5")
    said = capsys.readouterr().err
    assert vars(options)[new.removeprefix("--")] == 0.5
    assert said == f"diffalign: {old} is now called {new}; the old name goes in version 0.3\n"


def test_help_names_the_new_ones_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["sample", "--help"])
    text = capsys.readouterr().out
    assert "--positive_share" in text and "--negative_share" in text
    assert "--alpha" not in text and "--beta" not in text
