"""How long commands take to start.

    python benchmarks/start.py [--against REVISION] [--rounds 5] [--output FILE]

Every row is a new process: the import, and the help of every command, which imports
what the command needs to read its options and no more. With --against the same is
measured in a worktree of another revision, and the two take turns. Medians of the
rounds, in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from leaderboard import ROOT

from diffalign.cli.entry import COMMANDS, Group


def rows() -> dict[str, list[str]]:
    """Row -> arguments of Python."""
    found = {"import diffalign": ["-c", "import diffalign"]}
    found["diffalign --help"] = ["-m", "diffalign", "--help"]
    for entry in COMMANDS:
        for command in entry.commands if isinstance(entry, Group) else (entry,):
            name = [entry.name, command.name] if isinstance(entry, Group) else [command.name]
            found[f"diffalign {' '.join(name)} --help"] = ["-m", "diffalign", *name, "--help"]
    return found


def seconds(arguments: list[str], tree: Path) -> float | None:
    """One start, None if the tree has no such command."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    return time.perf_counter() - begin if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "start.md")
    options = parser.parse_args()
    title, _, text = (__doc__ or "").partition("\n\n")
    with tempfile.TemporaryDirectory() as folder:
        trees = {"seconds": ROOT}
        if options.against:
            other = Path(folder) / "other"
            subprocess.run(
                ["git", "worktree", "add", "-q", "--detach", str(other), options.against],
                cwd=ROOT,
                check=True,
            )
            trees[f"at {options.against}"] = other
        head = [*trees, "ratio"] if len(trees) > 1 else [*trees]
        lines = [f"# {title.rstrip('.')}", "", text.strip("\n"), ""]
        lines += [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for name, arguments in rows().items():
            taken: dict[str, list[float | None]] = {tree: [] for tree in trees}
            for _ in range(options.rounds):
                for tree, place in trees.items():
                    taken[tree].append(seconds(arguments, place))
            medians = [
                None if None in values else median(v for v in values if v is not None)
                for values in taken.values()
            ]
            cells = ["-" if value is None else f"{value:.2f}" for value in medians]
            if len(medians) > 1:
                both = medians[0] is not None and medians[1] is not None
                cells.append(f"{medians[0] / medians[1]:.2f}" if both else "-")  # type: ignore[operator]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        if options.against:
            remove = ["git", "worktree", "remove", "--force", str(Path(folder) / "other")]
            subprocess.run(remove, cwd=ROOT, check=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
