"""The `diffalign` command: `entry.py` with the table, and one file per subcommand."""

from .entry import main, run

__all__ = ["main", "run"]
