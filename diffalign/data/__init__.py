"""Read preference data of any known layout, and check, inspect and convert them.

Start with `load_preferences`. It opens a Hub dataset, a folder, a file or a list of
rows and returns a `PreferenceDataset`, whose items are `Group`s.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "DataConfig": "config",
    "parse_buckets": "config",
    "Group": "dataset",
    "LoadReport": "dataset",
    "PreferenceDataset": "dataset",
    "Layout": "schema",
    "recognise": "schema",
    "load_preferences": "load",
    "Geometry": "transforms",
    "GroupTransform": "transforms",
    "check_resolution": "transforms",
    "convert": "inspect",
    "format_inspection": "inspect",
}
__all__ = [
    "DataConfig",
    "Geometry",
    "Group",
    "GroupTransform",
    "Layout",
    "LoadReport",
    "PreferenceDataset",
    "check_resolution",
    "convert",
    "format_inspection",
    "load_preferences",
    "parse_buckets",
    "recognise",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that this package imports fast.

    `diffalign.data.inspect` stays the module of that name.
    """
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
