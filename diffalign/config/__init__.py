"""How a dataclass becomes YAML, options and help. Knows no section of a run file."""
