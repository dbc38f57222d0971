"""Versions of the libraries that decide what a number means."""

from __future__ import annotations

import platform


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in (
        "diffalign",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "datasets",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
