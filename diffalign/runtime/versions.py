"""Versions of the libraries that decide what a number means."""

from __future__ import annotations

import platform


def versions() -> dict[str, str]:
    """List the versions of Python and of the libraries that decide a result.

    Returns:
        `dict[str, str]`: library -> version, or ``not installed``.
    """
    from importlib.metadata import PackageNotFoundError, version

    numbers = {"python": platform.python_version()}
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
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers
