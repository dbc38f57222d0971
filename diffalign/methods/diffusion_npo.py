"""Diffusion-NPO: Wang et al. 2025, "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion Models", arXiv 2505.11245.

    loss = Diffusion-DPO's, with chosen and rejected exchanged

The result is a *negative* model: what people do not like, to be subtracted by `diffalign.generation.guidance` in the unconditional branch. This file is Diffusion-DPO inverted; any other pair or ranked
method is inverted by ``data.invert_preferences: true``. The official SD1.5 script has no 1/2: its beta 500 is 1000 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer


@dataclass
class DiffusionNPOConfig(DiffusionDPOConfig):
    """`train:` for `method: diffusion_npo`."""

    beta: float = 2000.0
    """In Diffusion-DPO's convention (official: SDXL 2000; SD1.5 500 without the 1/2, 1000 here)."""


class DiffusionNPOTrainer(DiffusionDPOTrainer):
    """Trains a negative model on pairs, the rejected image preferred."""

    method = "diffusion_npo"
    _name = "Diffusion-NPO"
    _tag_names = ("diffusion-npo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned "
        "Generation of Diffusion Models",
        "id": "2505.11245",
        "citation": """@inproceedings{wang2025diffusionnpo,
  title     = {Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion Models},
  author    = {Wang, Fu-Yun and Shui, Yunhao and Piao, Jingtan and Sun, Keqiang and Li, Hongsheng},
  booktitle = {ICLR},
  year      = {2025}
}""",
    }
    _sources: ClassVar[dict[str, str]] = {
        **DiffusionDPOTrainer._sources,
        "beta": "official scripts: SDXL 2000; SD1.5 500 without the 1/2, which is 1000 here",
    }
    _not_public: ClassVar[str] = (
        "The training file that the official README names; the inversion of the SPO variant."
    )
    config_class = DiffusionNPOConfig
    inverted = True
    args: DiffusionNPOConfig
