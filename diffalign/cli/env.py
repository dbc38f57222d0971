"""`diffalign env`: versions and devices, for a bug report."""

from __future__ import annotations

import argparse
import platform

from ..runtime.versions import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command: none.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """


def run(options: argparse.Namespace) -> int:
    """Print the versions of the packages, the platform and the devices.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int`: Exit code.
    """
    import torch

    for name, version in versions().items():
        print(f"- {name}: {version}")
    print(f"- platform: {platform.platform()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"- devices: {', '.join(devices) or f'cpu ({torch.get_num_threads()} threads)'}")
    return 0
