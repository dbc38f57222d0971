"""What the two embedded pipelines share: their training loop and their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from diffalign.shapes.tokenizer import MAX_LENGTH
from tools.shapes.captioned_images import PretrainConfig

TEXT_WIDTH = 64
"""Width of every CLIP text encoder."""


def clip_text_config(tokenizer: CLIPTokenizer, projection_dim: int) -> CLIPTextConfig:
    """Describe a CLIP text encoder for the entries of a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        projection_dim=projection_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fit(
    config: PretrainConfig,
    parameters: list[torch.nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    description: str,
) -> None:
    """Train with AdamW and a one-cycle schedule, and keep the moving average.

    Args:
        config (`PretrainConfig`): steps, learning rate and seed.
        parameters (`list`): changed in place. At the end they are the exponential
            moving average of their values.
        loss (callable): computes the loss of one batch, which it draws with the given
            generator.
        description (`str`): of the progress bar.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.denoiser_learning_rate, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.denoiser_learning_rate, total_steps=config.denoiser_steps, pct_start=0.1
    )
    average = EMAModel(parameters, decay=0.995)
    generator = torch.Generator().manual_seed(config.seed + 1)
    bar = tqdm(range(config.denoiser_steps), desc=description, mininterval=5)
    for _ in bar:
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        average.step(parameters)
        bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
    average.copy_to(parameters)


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline as half-precision safetensors."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        values = json.loads(path.read_text())
        # A component that was itself loaded remembers from where.
        values.pop("_name_or_path", None)
        if path.parent.name.startswith("text_encoder"):
            # transformers loads a model in the dtype its config names, diffusers in
            # float32: make a plain `from_pretrained` consistent.
            values["dtype"] = "float32"
        path.write_text(json.dumps(values, indent=2) + "\n")
