"""docs/benchmarks.md, made of benchmarks/*.md: ``python -m tools.benchmarks_page``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Everything that was measured

Made by `python -m tools.benchmarks_page` of the files in `benchmarks/`, each of which a
command wrote. All of it was measured on two CPU cores and on the embedded models: nothing
here says what a method does to a large model or on a GPU. Times and ratios are of runs side
by side.
"""


def date_of(path: Path) -> str:
    """The day on which a file was last committed."""
    command = ["git", "log", "-1", "--format=%cs", "--", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip() or "not committed"


def command_of(text: str) -> str:
    """The first command of a page."""
    found = re.search(r"python benchmarks/[^`\n\[]*", text)
    return found.group().strip() if found else ""


def section(path: Path) -> tuple[str, str, str, str]:
    """Title, command, date and body of one file, its headings one level lower."""
    title, _, body = path.read_text("utf-8").partition("\n")
    body = re.sub(r"^#", "##", body, flags=re.M)
    body = re.sub(r"\]\((?!http)([^)/]+\.(?:png|md))\)", r"](../benchmarks/\1)", body)
    return title.removeprefix("# ").strip(), command_of(body), date_of(path), body.strip("\n")


def anchor(title: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def page() -> str:
    """The whole page."""
    sections = [section(path) for path in sorted((ROOT / "benchmarks").glob("*.md"))]
    lines = [HEAD, "| what | command | date |", "|---|---|---|"]
    for title, command, date, _ in sections:
        lines.append(f"| [{title}](#{anchor(title)}) | `{command}` | {date} |")
    for title, _, _, body in sections:
        lines += ["", f"## {title}", "", body]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "benchmarks.md"
    output.write_text(page(), "utf-8")
