"""`diffalign env`: versions and devices, for a bug report."""

from __future__ import annotations

import argparse
import platform

from ..runtime.versions import versions
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: none.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """


def run(options: argparse.Namespace) -> Result:
    """Print the versions of the packages, the platform and the devices.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with versions, platform and devices.
    """
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        **versions(),
        "platform": platform.platform(),
        "devices": ", ".join(devices) or f"cpu ({torch.get_num_threads()} threads)",
    }
    return Result("\n".join(f"- {name}: {value}" for name, value in facts.items()), facts)
