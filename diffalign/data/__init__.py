"""Preference data: any layout of the field read into one schema, checked, transformed, inspected and converted."""

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
    """Imports on first use: `import diffalign.data` itself costs nothing. (`diffalign.data.inspect` stays the module.)"""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
