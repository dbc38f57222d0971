"""Tiny pipelines for steering: those of `tiny`, a Flux, and random schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny import build_pipeline, small_vae

from diffalign import FKSteering

STOCHASTIC = {
    "ddim": ("DDIMScheduler", {}, {"eta": 1.0}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "dpm_sde_1": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        {},
    ),
    "dpm_sde_2": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        {},
    ),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 1.0}),
    "sa_solver": ("SASolverScheduler", {}, {}),
}
DETERMINISTIC = {
    "ddim_eta_0": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm_single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    """The pipeline with another scheduler, made from the configuration of its own."""
    import diffusers

    base = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    cls = getattr(diffusers, name)
    pipe.scheduler = cls.from_config({**base, "clip_sample": False, **options})
    return pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family(name: str) -> Any:
    """A tiny pipeline of `tiny.FAMILIES` or ``flux``, without a progress bar."""
    return quiet(flux() if name == "flux" else build_pipeline(name))


def flux(seed: int = 0) -> Any:
    """A Flux whose text encoders are left out: prompts come as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = small_vae(
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def call_options(name: str, prompts: int = 2) -> dict[str, Any]:
    """What the call needs beside prompts, for two cheap steps of a tiny image."""
    if name != "flux":
        return {"height": 32, "width": 32, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(0)
    return {
        "height": 32,
        "width": 32,
        "prompt_embeds": torch.randn(prompts, 5, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(prompts, 32, generator=generator),
    }


PROMPTS = [
    "a small red circle on the left of a gray background",
    "a large blue star in the center of a white background",
]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(images, prompts) -> torch.Tensor:
    return torch.tensor([np.asarray(image, dtype=np.float64).mean() for image in images])


def steer(
    pipe: Any,
    prompts=PROMPTS,
    *,
    name: str = "sd",
    steps: int = 6,
    call: dict | None = None,
    **options: Any,
):
    options = {
        "num_particles": 4,
        "lmbda": 4.0,
        "ess_threshold": 1.0,
        "resample_steps": (1, 3),
    } | options
    arguments = (
        {"num_inference_steps": steps, "seed": 0} | call_options(name, len(prompts)) | (call or {})
    )
    return FKSteering(pipe, options.pop("scorer", brightness), **options)(prompts, **arguments)


def stacked(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for row in result.images for image in row])


def zeros(images, prompts) -> torch.Tensor:
    return torch.zeros(len(images))
