"""Pages of the site that are made of the code, as a hook of mkdocs (see mkdocs.yml)."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

import diffalign
import diffalign.rewards
from diffalign.cli import exit_codes
from diffalign.cli.entry import COMMANDS, Command, Group
from diffalign.cli.results import add_result_arguments
from diffalign.config.section import default_of, field_docs
from diffalign.data import DataConfig
from diffalign.methods import METHODS, config_class
from diffalign.reward_training import RewardConfig
from diffalign.training.config import TrainingConfig
from diffalign.training.loop_config import LoopConfig
from diffalign.training.sections import HubConfig, LoraSection, ValidationConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `mkdocs serve` does not look in the folder where it runs
from tools import papers  # noqa: E402

CODE = "https://github.com/diffalign/diffalign/blob/main/"
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_config(config: Any) -> Any:
    """Give every method its page in the menu."""
    pages = [{papers.trainer_class(name)._name: f"papers/{name}.md"} for name in METHODS]
    for entry in config.nav:
        if "Papers" in entry:
            entry["Papers"] = ["papers.md", *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the pictures that lie elsewhere."""
    made = {
        "index.md": (ROOT / "README.md").read_text("utf-8").replace("](docs/", "]("),
        "reference/commands.md": commands(),
        "reference/options.md": options(),
        "reference/trainers.md": api("Trainers and functions", diffalign, diffalign.__all__),
        "reference/rewards.md": api("Rewards", diffalign.rewards, diffalign.rewards.__all__),
        "reference/exit-codes.md": f"# Exit codes\n\n{exit_codes.__doc__}",
    }
    made |= {f"papers/{name}.md": paper(name) for name in METHODS}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    for picture in (ROOT / "benchmarks").glob("*.png"):
        files.append(
            File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside the site to the repository."""
    here = PurePosixPath(page.file.src_uri).parent
    in_root = page.file.src_uri == "index.md"

    def mended(match: re.Match[str]) -> str:
        target = match[2]
        if target.startswith(("http", "mailto", "#")) or target.startswith("<"):
            return match[0]
        path = _normal("docs" / here / target)
        if in_root and not (ROOT / path).exists():
            path = target  # the README's links start at the root
        inside = path.removeprefix("docs/")
        if path.startswith("docs/") and files.get_file_from_path(inside) is not None:
            return match[0]
        if path.startswith("benchmarks/") and path.endswith(".png"):
            return f"{match[1]}{'../' * (len(here.parts))}{path}{match[3]}"
        return f"{match[1]}{CODE}{path}{match[3]}"

    return LINK.sub(mended, markdown)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


# Pages --------------------------------------------------------------------------------


_OWN_PICTURES = {
    "ppd": "\n\n## What it does\n\n"
    "![Images of the base, of a user who wants lit images and of one who wants flat ones]"
    "(ppd.jpg)\n\n"
    "One embedded model after the recipe below, asked for two of its users: the first eight\n"
    "held-out prompts, from the same noise, at guidance 2. The figures are on the page of the\n"
    "[benchmarks](../benchmarks.md); `benchmarks/personalization.py` draws the picture.\n",
    "ctrl_u": "\n\n## What it does\n\n"
    "![A silhouette, and the images of a ControlNet and of Ctrl-U for it](ctrl_u.jpg)\n\n"
    "The condition, plain ControlNet and Ctrl-U after equal steps: the first eight held-out\n"
    "prompts, from the same noise, at guidance 2. The figures are on the page of the\n"
    "[benchmarks](../benchmarks.md); `benchmarks/conditional.py` draws the picture.\n",
}
"""Method -> what stands under a picture of its own."""


def paper(method: str) -> str:
    """One method: paper, idea and equation, options, and a run file."""
    text = re.sub(r"^## ", "# ", papers.section(method), count=1)
    if (ROOT / "docs" / "papers" / f"{method}.jpg").is_file():
        text += _OWN_PICTURES.get(method) or (
            "\n\n## What it does\n\n"
            f"![Images of the base on the left and after {method} on the right]({method}.jpg)\n\n"
            "The embedded model after the recipe below. Base left, tuned right, from the same\n"
            "noise, each at its own best guidance: the first eight held-out prompts, the first\n"
            "seed of the [leaderboard](../benchmarks.md). People of this world prefer light from\n"
            "above to flat backgrounds, and the base confuses colours and shapes ([the embedded\n"
            "world](../shapes.md)).\n"
        )
    recipe = ROOT / "configs" / method / "shapes.yaml"
    if recipe.is_file():
        text += f"\n\n## A run file\n\n```yaml\n{recipe.read_text('utf-8').rstrip()}\n```\n"
    return text


def table(cls: Any, path: str, but: Any = None) -> list[str]:
    """The fields of a section, without those of another one."""
    known = {field.name for field in dataclasses.fields(but)} if but else set()
    docs, lines = field_docs(cls), ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name not in known:
            text = " ".join(docs.get(field.name, "").split()).replace("|", "\\|")
            lines.append(f"| `{path}.{field.name}` | `{default_of(field)!r}` | {text} |")
    return lines


def options() -> str:
    """Every option of run files."""
    lines = ["# Options of run files", "", "Every field is an option too: `--train.beta 2000`."]
    for title, cls, path, but in (
        ("train: of every run", LoopConfig, "train", None),
        ("train: of diffusion models", TrainingConfig, "train", LoopConfig),
        ("train: of rewards", RewardConfig, "train", LoopConfig),
        ("data", DataConfig, "data", None),
        ("lora", LoraSection, "lora", None),
        ("validation", ValidationConfig, "validation", None),
        ("hub", HubConfig, "hub", None),
    ):
        lines += ["", f"## {title}", "", *table(cls, path, but)]
    for method in METHODS:
        rows = table(config_class(method), "train", TrainingConfig)
        if len(rows) > 2:
            lines += ["", f"## train: of {method}", "", *rows]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The help of every command."""
    lines = ["# Commands", ""]
    for entry in COMMANDS:
        for command in entry.commands if isinstance(entry, Group) else (entry,):
            name = f"{entry.name} {command.name}" if isinstance(entry, Group) else command.name
            lines += [
                f"## diffalign {name}",
                "",
                f"{command.help[0].upper()}{command.help[1:]}.",
                "",
            ]
            lines += ["```text", help_of(command, name), "```", ""]
    return "\n".join(lines)


def help_of(command: Command, name: str) -> str:
    """What `--help` prints."""
    module = import_module(f"diffalign.cli.{command.module}")
    parser = argparse.ArgumentParser(f"diffalign {name}", add_help=not command.own_help)
    module.add_arguments(parser)
    if not command.serves:
        add_result_arguments(parser)
    if command.own_help:
        return str(module._help([])).rstrip()
    parser.epilog = None if name == "reward train" else parser.epilog  # in options.md
    return parser.format_help().rstrip()


def api(title: str, package: Any, names: list[str]) -> str:
    """The public names of a package."""
    lines = [f"# {title}", ""]
    for name in names:
        thing = getattr(package, name)
        module = getattr(thing, "__module__", None)
        if module is not None and module.startswith("diffalign"):
            lines += [f"::: {module}.{thing.__qualname__}", ""]
    return "\n".join(lines)
