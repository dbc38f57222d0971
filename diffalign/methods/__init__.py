"""One file per paper. `METHODS` is the only list of them: a new method adds one line here and its own file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.config import TrainingConfig
    from ..training.trainer import Trainer

METHODS: dict[str, str] = {
    "d3po": "d3po:D3PO",
    "dcpo": "dcpo:DCPO",
    "diffusion_dpo": "diffusion_dpo:DiffusionDPO",
    "diffusion_npo": "diffusion_npo:DiffusionNPO",
    "diffusion_orpo": "diffusion_orpo:DiffusionORPO",
    "mapo": "mapo:MaPO",
    "rankdpo": "rankdpo:RankDPO",
    "seppo": "seppo:SePPO",
    "spo": "spo:SPO",
    "self_npo": "self_npo:SelfNPO",
    "sft": "sft:SFT",
}
"""Name in a run file -> ``module:Prefix``; the module holds ``<Prefix>Config`` and ``<Prefix>Trainer``."""


def _load(method: str, suffix: str) -> type:
    module, prefix = METHODS[method].split(":")
    return getattr(import_module(f".{module}", __name__), prefix + suffix)


def config_class(method: str) -> type[TrainingConfig]:
    return _load(method, "Config")


def trainer_class(method: str) -> type[Trainer]:
    return _load(method, "Trainer")
