"""The jinja2 templates: escaping, missing values, and when jinja2 is imported."""

from __future__ import annotations

import subprocess
import sys

import jinja2
import pytest

from diffalign.runtime.templates import environment, render

GROUP = {"prompt": "<script>alert('1')</script>", "images": [{"file": "'x.png", "id": "a&b"}]}


def test_values_are_escaped_in_pages_and_pictures_only() -> None:
    page = render("training/online/templates/round.html", groups=[GROUP])
    assert "<script" not in page and "&lt;script&gt;" in page
    assert 'src="&#39;x.png"' in page and "a&amp;b" in page
    escapes = environment().autoescape
    assert callable(escapes) and escapes("x.svg") and not escapes("card.md")


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="groups"):
        render("training/online/templates/round.html")
    with pytest.raises(jinja2.TemplateNotFound):
        render("evaluation/templates/nothing.html")


def test_every_template_compiles() -> None:
    names = [name for name in environment().list_templates() if "/templates/" in name]
    assert "evaluation/templates/report.html" in names and len(names) >= 5
    for name in names:
        environment().get_template(name)


def test_importing_diffalign_does_not_import_jinja2() -> None:
    code = (
        "import sys, diffalign, diffalign.cli.entry, diffalign.runtime.templates\n"
        "diffalign.cli.entry.build_parser()\n"
        "sys.exit('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
