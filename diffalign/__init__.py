"""diffalign: text-to-image diffusion models that follow human preferences.

Every name is imported on first use: ``import diffalign`` itself loads no torch.

Example:
    ```python
    import diffalign

    print(diffalign.__version__)
    ```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"
_moved.install()

_EXPORTS = {
    "CtrlUConfig": "methods.ctrl_u",
    "CtrlUTrainer": "methods.ctrl_u",
    "D3POConfig": "methods.d3po",
    "D3POTrainer": "methods.d3po",
    "DCPOConfig": "methods.dcpo",
    "DCPOTrainer": "methods.dcpo",
    "DiffusionKTOConfig": "methods.diffusion_kto",
    "DiffusionKTOTrainer": "methods.diffusion_kto",
    "DiffusionNPOConfig": "methods.diffusion_npo",
    "DiffusionNPOTrainer": "methods.diffusion_npo",
    "DiffusionDROConfig": "methods.diffusion_dro",
    "DiffusionDROTrainer": "methods.diffusion_dro",
    "DiffusionORPOConfig": "methods.diffusion_orpo",
    "DiffusionORPOTrainer": "methods.diffusion_orpo",
    "MaPOConfig": "methods.mapo",
    "MaPOTrainer": "methods.mapo",
    "PPDConfig": "methods.ppd",
    "PPDTrainer": "methods.ppd",
    "RankDPOConfig": "methods.rankdpo",
    "RankDPOTrainer": "methods.rankdpo",
    "DiffusionDPOConfig": "methods.diffusion_dpo",
    "DiffusionDPOTrainer": "methods.diffusion_dpo",
    "RewardConfig": "reward_training.config",
    "RewardTrainer": "reward_training.trainer",
    "RewardBackpropConfig": "methods.reward_backprop",
    "RewardBackpropTrainer": "methods.reward_backprop",
    "SelfNPOConfig": "methods.self_npo",
    "SelfNPOTrainer": "methods.self_npo",
    "SePPOConfig": "methods.seppo",
    "SePPOTrainer": "methods.seppo",
    "SPOConfig": "methods.spo",
    "SPOTrainer": "methods.spo",
    "SFTConfig": "methods.sft",
    "SFTTrainer": "methods.sft",
    "AWMConfig": "methods.awm",
    "AWMTrainer": "methods.awm",
    "DGPOConfig": "methods.dgpo",
    "DGPOTrainer": "methods.dgpo",
    "DiffusionNFTConfig": "methods.diffusion_nft",
    "DiffusionNFTTrainer": "methods.diffusion_nft",
    "GRPOConfig": "methods.grpo",
    "GRPOTrainer": "methods.grpo",
    "DataConfig": "data.config",
    "ValidationConfig": "training.sections",
    "TrainerCallback": "training.callbacks",
    "load_preferences": "data.load",
    "load_users": "generation.users",
    "list_scorers": "rewards.registry",
    "load_scorer": "rewards.registry",
    "register_scorer": "rewards.registry",
    "compare": "evaluation.compare",
    "compare_guidance": "evaluation.guidance_sweep",
    "FKSteering": "steering.fk_steering",
    "NegativeGuidance": "generation.guidance",
    "UserError": "errors",
}
__all__ = [
    "AWMConfig",
    "AWMTrainer",
    "CtrlUConfig",
    "CtrlUTrainer",
    "D3POConfig",
    "D3POTrainer",
    "DCPOConfig",
    "DCPOTrainer",
    "DGPOConfig",
    "DGPOTrainer",
    "DataConfig",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DiffusionDROConfig",
    "DiffusionDROTrainer",
    "DiffusionKTOConfig",
    "DiffusionKTOTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "DiffusionNPOConfig",
    "DiffusionNPOTrainer",
    "DiffusionORPOConfig",
    "DiffusionORPOTrainer",
    "FKSteering",
    "GRPOConfig",
    "GRPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "NegativeGuidance",
    "PPDConfig",
    "PPDTrainer",
    "RankDPOConfig",
    "RankDPOTrainer",
    "RewardBackpropConfig",
    "RewardBackpropTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SPOConfig",
    "SPOTrainer",
    "SePPOConfig",
    "SePPOTrainer",
    "SelfNPOConfig",
    "SelfNPOTrainer",
    "TrainerCallback",
    "UserError",
    "ValidationConfig",
    "__version__",
    "compare",
    "compare_guidance",
    "list_scorers",
    "load_preferences",
    "load_scorer",
    "load_users",
    "register_scorer",
]

if TYPE_CHECKING:
    from .data.config import DataConfig
    from .data.load import load_preferences
    from .errors import UserError
    from .evaluation.compare import compare
    from .evaluation.guidance_sweep import compare_guidance
    from .generation.guidance import NegativeGuidance
    from .generation.users import load_users
    from .methods.awm import AWMConfig, AWMTrainer
    from .methods.ctrl_u import CtrlUConfig, CtrlUTrainer
    from .methods.d3po import D3POConfig, D3POTrainer
    from .methods.dcpo import DCPOConfig, DCPOTrainer
    from .methods.dgpo import DGPOConfig, DGPOTrainer
    from .methods.diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
    from .methods.diffusion_dro import DiffusionDROConfig, DiffusionDROTrainer
    from .methods.diffusion_kto import DiffusionKTOConfig, DiffusionKTOTrainer
    from .methods.diffusion_nft import DiffusionNFTConfig, DiffusionNFTTrainer
    from .methods.diffusion_npo import DiffusionNPOConfig, DiffusionNPOTrainer
    from .methods.diffusion_orpo import DiffusionORPOConfig, DiffusionORPOTrainer
    from .methods.grpo import GRPOConfig, GRPOTrainer
    from .methods.mapo import MaPOConfig, MaPOTrainer
    from .methods.ppd import PPDConfig, PPDTrainer
    from .methods.rankdpo import RankDPOConfig, RankDPOTrainer
    from .methods.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer
    from .methods.self_npo import SelfNPOConfig, SelfNPOTrainer
    from .methods.seppo import SePPOConfig, SePPOTrainer
    from .methods.sft import SFTConfig, SFTTrainer
    from .methods.spo import SPOConfig, SPOTrainer
    from .reward_training.config import RewardConfig
    from .reward_training.trainer import RewardTrainer
    from .rewards.registry import list_scorers, load_scorer, register_scorer
    from .steering.fk_steering import FKSteering
    from .training.callbacks import TrainerCallback
    from .training.sections import ValidationConfig


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
