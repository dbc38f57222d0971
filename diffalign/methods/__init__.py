"""The preference methods, one file per paper.

A new method adds its file and one line to `METHODS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.config import TrainingConfig
    from ..training.trainer import Trainer

METHODS: dict[str, str] = {
    "awm": "awm:AWM",
    "ctrl_u": "ctrl_u:CtrlU",
    "d3po": "d3po:D3PO",
    "dcpo": "dcpo:DCPO",
    "dgpo": "dgpo:DGPO",
    "diffusion_dpo": "diffusion_dpo:DiffusionDPO",
    "diffusion_dro": "diffusion_dro:DiffusionDRO",
    "diffusion_kto": "diffusion_kto:DiffusionKTO",
    "diffusion_nft": "diffusion_nft:DiffusionNFT",
    "diffusion_npo": "diffusion_npo:DiffusionNPO",
    "diffusion_orpo": "diffusion_orpo:DiffusionORPO",
    "grpo": "grpo:GRPO",
    "mapo": "mapo:MaPO",
    "ppd": "ppd:PPD",
    "rankdpo": "rankdpo:RankDPO",
    "reward_backprop": "reward_backprop:RewardBackprop",
    "seppo": "seppo:SePPO",
    "spo": "spo:SPO",
    "self_npo": "self_npo:SelfNPO",
    "sft": "sft:SFT",
}
"""Module and class prefix of each method, by its name in a run file.

The module holds the classes ``<Prefix>Config`` and ``<Prefix>Trainer``.
"""


def _load(method: str, suffix: str) -> type:
    module, prefix = METHODS[method].split(":")
    return getattr(import_module(f".{module}", __name__), prefix + suffix)


def config_class(method: str) -> type[TrainingConfig]:
    """Import the config class of a method.

    Args:
        method (`str`): A key of `METHODS`.
    """
    return _load(method, "Config")


def trainer_class(method: str) -> type[Trainer]:
    """Import the trainer class of a method.

    Args:
        method (`str`): A key of `METHODS`.
    """
    return _load(method, "Trainer")
