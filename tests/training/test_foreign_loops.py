"""Whole optimizer steps and saved files against loops around unmodified diffusers, peft and torch classes. Nightly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import build_pipeline, make_trainer

FAMILIES = ("sd", "sd_v", "sdxl", "sd3")
BETA, STEPS, RATE = 300.0, 3, 1e-3


def name_of(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def recorded(trainer: Any) -> list[Any]:
    """The batches that a run trains on."""
    batches, compute = [], trainer.compute_loss

    def watched(batch: Any) -> Any:
        batches.append(copy.deepcopy(batch))
        return compute(batch)

    trainer.compute_loss = watched
    return batches


def predicted(family: str, network: Any, scheduler: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(network's output, target) by diffusers' own scheduler and network, images of a pair after one another."""
    k = batch.x0.shape[1]
    x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
    times = batch.times.repeat_interleave(k)
    given = {name: value if len(value) == len(x0) else value.repeat_interleave(k, 0) for name, value in batch.condition.items()}
    if family == "sd3":
        sigma = times.float().reshape(-1, 1, 1, 1)
        noisy = (1 - sigma) * x0 + sigma * noise
        output = network(
            hidden_states=noisy,
            timestep=times.float() * 1000,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output, noise - x0
    noisy = scheduler.add_noise(x0, noise, times)
    more: dict[str, Any] = {}
    if family == "sdxl":
        more["added_cond_kwargs"] = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["time_ids"]}
    output = network(noisy, times, encoder_hidden_states=given["prompt_embeds"], return_dict=False, **more)[0]
    return output, scheduler.get_velocity(x0, noise, times) if family == "sd_v" else noise


@pytest.mark.nightly
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_of_diffusion_dpo(family: str, lora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"]) if lora else None
    trainer = make_trainer(
        tmp_path, family, peft_config=config, max_steps=STEPS, beta=BETA, learning_rate=RATE, per_device_train_batch_size=2
    )
    batches = recorded(trainer)
    trainer._setup()
    start = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.train()

    pipe = build_pipeline(family)
    network = getattr(pipe, name_of(pipe)).train()
    reference = copy.deepcopy(network).requires_grad_(False)
    if lora:
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"]))
    network.load_state_dict(start)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert len(batches) == STEPS
    for batch in batches:
        output, target = predicted(family, network, pipe.scheduler, batch)
        with torch.no_grad():
            other = predicted(family, reference, pipe.scheduler, batch)[0]
        errors, references = (
            F.mse_loss(value.float(), target.float(), reduction="none").mean((1, 2, 3)).unflatten(0, (-1, 2))
            for value in (output, other)
        )
        difference = (errors[:, 0] - errors[:, 1]) - (references[:, 0] - references[:, 1])
        loss = -F.logsigmoid(-0.5 * BETA * difference).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mine = dict(trainer.network.named_parameters())
    moved = max(float((value - start[name]).abs().max()) for name, value in network.named_parameters())
    assert moved > 1e-3
    for name, value in network.named_parameters():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=0.03 * moved)


SAVED: list[dict[str, Any]] = [
    {"lora_alpha": 7},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9}},
    {"target_modules": ["to_q", "conv_in"]},
    {"target_modules": r".*attn1\.to_[qk]"},
]


@pytest.mark.nightly
@pytest.mark.parametrize("options", SAVED, ids=str)
def test_a_saved_lora_is_the_trained_network_in_plain_diffusers(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], **options})
    trainer = make_trainer(tmp_path, peft_config=config, max_steps=2, learning_rate=2e-2)
    trainer.train()
    pipe = build_pipeline("sd")
    pipe.load_lora_weights(str(tmp_path))
    noisy, times = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    embeds = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trainer.network.eval()
        mine = trainer.network(noisy, times, embeds)[0]
        plain = pipe.unet.eval()(noisy, times, embeds)[0]
        pipe.disable_lora()
        base = pipe.unet(noisy, times, embeds)[0]
    torch.testing.assert_close(plain, mine, rtol=1e-5, atol=1e-6)
    assert float((mine - base).abs().max()) > 1e-4
