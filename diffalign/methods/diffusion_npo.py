"""Diffusion-NPO: Wang et al. 2025, arXiv 2505.11245, Diffusion-DPO on swapped pairs.

    loss = Diffusion-DPO's, with chosen and rejected exchanged

The result is a *negative* model, which draws what people do not like.
`diffalign.generation.guidance` subtracts it in the unconditional branch of guidance.
Any other pair or ranked method is inverted by `data.invert_preferences: true`.

The official SD1.5 script has no 1/2, so its beta 500 is 1000 here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ..config.ranges import Positive
from ..config.section import config_section
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer


@config_section
class DiffusionNPOConfig(DiffusionDPOConfig):
    """`train:` for `method: diffusion_npo`.

    Example:
        ```python
        from diffalign import DiffusionNPOConfig

        # A negative model guides with the empty prompt, so it must have seen it.
        args = DiffusionNPOConfig(output_dir="runs/npo", proportion_empty_prompts=0.2)
        assert args.beta == 2000
        ```
    """

    beta: Positive[float] | Literal["auto"] = 2000.0
    """In Diffusion-DPO's convention (official: SDXL 2000; SD1.5 500 without the 1/2,
    1000 here). Source: official scripts: SDXL 2000; SD1.5 500 without the 1/2, which is
    1000 here."""


class DiffusionNPOTrainer(DiffusionDPOTrainer):
    """Trains a negative model on pairs: it prefers the rejected image.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import DiffusionNPOConfig, DiffusionNPOTrainer

        trainer = DiffusionNPOTrainer(
            model="shapes",
            args=DiffusionNPOConfig(output_dir="runs/npo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "diffusion_npo"
    _name = "Diffusion-NPO"
    _tag_names = ("diffusion-npo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned "
        "Generation of Diffusion Models",
        "id": "2505.11245",
        "citation": """@inproceedings{wang2025diffusionnpo,
  title     = {Diffusion-NPO: Negative Preference Optimization for Better Preference
               Aligned Generation of Diffusion Models},
  author    = {Wang, Fu-Yun and Shui, Yunhao and Piao, Jingtan and Sun, Keqiang and
               Li, Hongsheng},
  booktitle = {ICLR},
  year      = {2025}
}""",
    }
    _not_public: ClassVar[str] = (
        "The training file that the official README names; the inversion of the SPO variant."
    )
    config_class = DiffusionNPOConfig
    inverted = True
    args: DiffusionNPOConfig
