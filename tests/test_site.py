"""The documentation builds as a site, and no page or picture of it is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import ROOT

from diffalign.methods import METHODS

pytest.importorskip("mkdocs")


class Pictures(HTMLParser):
    """Collects the pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        # As in the README: the script, which does not look in the working directory.
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_method_has_a_page(site: Path) -> None:
    for method in METHODS:
        text = (site / "papers" / method / "index.html").read_text()
        assert f"method: {method}" in text


def test_reference_pages_hold_what_there_is(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text()
    assert "diffalign reward average" in commands and "--accelerate_config" in commands
    options = (site / "reference" / "options" / "index.html").read_text()
    assert "train.per_device_train_batch_size" in options and "train.anchor" in options
    trainers = (site / "reference" / "trainers" / "index.html").read_text()
    assert "DiffusionDPOTrainer" in trainers and "RewardTrainer" in trainers


def test_every_picture_is_there_and_described(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        pictures = Pictures()
        pictures.feed(page.read_text())
        for picture in pictures.found:
            source = picture.get("src") or ""
            assert picture.get("alt"), (page, source)
            if not source.startswith("http"):
                assert (page.parent / source).resolve().is_file(), (page, source)
                seen += 1
    assert seen > 10


def test_nothing_is_asked_of_another_server(site: Path) -> None:
    """Also without a connection a page looks as it should."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text()
        )
        assert [url for url in loaded if "github.com" not in url] == [], page
