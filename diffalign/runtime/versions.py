"""Versions of the libraries that decide what a number means."""

from __future__ import annotations

import functools
import platform


def versions() -> dict[str, str]:
    """List the versions of Python and of the libraries that decide a result.

    Returns:
        `dict[str, str]`: library -> version, or ``not installed``.
    """
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
        numbers[package] = _version(package)
    return numbers


@functools.cache  # Reading the metadata of seven packages takes as long as a small batch.
def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
