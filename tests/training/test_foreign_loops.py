"""Whole optimizer steps and saved files against plain loops around diffusers, peft and
torch.

The loops below share no code with the package but the recorded draws (latents, noise,
timesteps). Captions are encoded by the pipelines' own `encode_prompt`. Nightly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import (
    RESOLUTION,
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    captioned_rows,
    make_trainer,
    pair_rows,
    picture,
    trained_tensors,
)
from torch import Tensor
from transformers.optimization import Adafactor

pytestmark = pytest.mark.nightly

FAMILIES = ("sd", "sd_v", "sdxl", "sd3")
STEPS, RATE = 3, 1e-3
Output = Callable[..., Tensor]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]}


def name_of(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


class Loop:
    """A hand-written loop: its networks, optimizer and a recorded run's draws."""

    rtol = 2e-4  # of losses

    def __init__(self, folder: Path, family: str, method: str, lora: bool, **options: Any) -> None:
        config = LoraConfig(**LORA) if lora else None
        values = {
            "max_steps": STEPS,
            "learning_rate": RATE,
            "per_device_train_batch_size": 2,
            "peft_config": config,
        } | options
        self.family = family
        self.trainer = make_trainer(folder, family, method, **values)
        self.batches: list[Any] = []
        self.raw: list[Any] = []
        self._record()
        self.trainer.setup()
        self._record_norms()
        start = {n: p.clone() for n, p in self.trainer.network.state_dict().items()}
        self.trainer.train()
        self.pipe = build_pipeline(family)
        self.network = getattr(self.pipe, name_of(self.pipe)).train()
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        if config is not None:
            self.network.requires_grad_(False)
            self.network.add_adapter(LoraConfig(**LORA))
        self.network.load_state_dict(start)
        self.start = start
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    def _record(self) -> None:
        compute, prepare = self.trainer.compute_loss, self.trainer.prepare

        def watched(batch: Any) -> Any:
            loss = compute(batch)
            kept = copy.deepcopy(batch)
            pool = getattr(self.trainer, "reference_model", None)
            kept.extra["member"] = getattr(pool, "current", None)
            self.batches.append((kept, loss[0].detach().clone()))
            return loss

        def watched_prepare(batch: Any) -> Any:
            self.raw.append(copy.deepcopy(batch))
            return prepare(batch)

        self.trainer.compute_loss, self.trainer.prepare = watched, watched_prepare

    def _record_norms(self) -> None:
        clip, self.norms = self.trainer.accelerator.clip_grad_norm_, []

        def watched(*args: Any) -> Any:
            norm = clip(*args)
            self.norms.append(norm.detach().clone())
            return norm

        self.trainer.accelerator.clip_grad_norm_ = watched

    def captions(self, texts: list[str]) -> dict[str, Tensor]:
        """The pipeline's own embeddings of captions."""
        pipe, options = self.pipe, {"device": "cpu", "num_images_per_prompt": 1}
        if self.family in ("sd", "sd_v"):
            embeds = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **options)[0]
            return {"embeds": embeds}
        more = {} if self.family == "sdxl" else {"prompt_2": None, "prompt_3": None}
        found = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **more, **options)
        return {"embeds": found[0], "pooled": found[2]}

    def empty(self, count: int) -> dict[str, Tensor]:
        """The unconditional embeddings that the pipeline guides with."""
        if self.family == "sdxl":  # `force_zeros_for_empty_prompt` is set
            return {name: torch.zeros_like(v) for name, v in self.captions(["a"] * count).items()}
        return self.captions([""] * count)

    def output(
        self, network: Any, noisy: Tensor, times: Tensor, given: dict[str, Tensor]
    ) -> Tensor:
        """The network's output, called as diffusers' training scripts call it."""
        if self.family == "sd3":
            return network(
                hidden_states=noisy,
                timestep=times.float() * 1000,
                encoder_hidden_states=given["embeds"],
                pooled_projections=given["pooled"],
                return_dict=False,
            )[0]
        more: dict[str, Any] = {}
        if self.family == "sdxl":
            size = (RESOLUTION, RESOLUTION)
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(noisy), 1)
            more["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": ids}
        embeds = given["embeds"]
        return network(noisy, times, encoder_hidden_states=embeds, return_dict=False, **more)[0]

    def errors(self, network: Any, batch: Any, texts: list[str]) -> Tensor:
        """Mean squared errors (g, k); `texts` has g * k captions, group after group."""
        k, scheduler = batch.x0.shape[1], self.pipe.scheduler
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(k)
        if self.family == "sd3":
            sigma = times.float().reshape(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        else:
            noisy = scheduler.add_noise(x0, noise, times)
            target = scheduler.get_velocity(x0, noise, times) if self.family == "sd_v" else noise
        output = self.output(network, noisy, times, self.captions(texts))
        errors = F.mse_loss(output.float(), target.float(), reduction="none").mean((1, 2, 3))
        return errors.unflatten(0, (-1, k))

    def both(self, batch: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Errors of policy and reference."""
        with torch.no_grad():
            reference = self.errors(self.reference, batch, texts)
        return self.errors(self.network, batch, texts), reference

    def guided(
        self, network: Any, x: Tensor, times: Tensor, texts: list[str], scale: float
    ) -> Tensor:
        """Classifier-free guidance in two calls."""
        full = self.output(network, x, times, self.captions(texts))
        nothing = self.output(network, x, times, self.empty(len(texts)))
        return nothing + scale * (full - nothing)

    def run(self, loss_of: Callable[[Any], Tensor], passes: int = 1) -> None:
        """Trains on the recorded batches; compares losses, gradient norms, weights."""
        assert len(self.batches) == STEPS * passes
        for number, (batch, recorded) in enumerate(self.batches):
            loss = loss_of(batch)
            torch.testing.assert_close(loss.detach(), recorded, rtol=self.rtol, atol=self.rtol / 10)
            (loss.mean() / passes).backward()
            if (number + 1) % passes == 0:
                norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                torch.testing.assert_close(norm, self.norms.pop(0), rtol=2e-3, atol=1e-7)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.after_step((number + 1) // passes)
        mine = dict(self.trainer.network.named_parameters())
        pairs = [(name, p, self.start[name]) for name, p in self.network.named_parameters()]
        moved = max(float((p - before).detach().abs().max()) for _, p, before in pairs)
        assert moved > 1e-3
        # Adam divides by the size of the gradient. A weight whose gradient is round-off
        # may therefore move anywhere by the learning rate; one in 1,000 may be such.
        outside = torch.cat(
            [
                ~torch.isclose(mine[name], p, rtol=1e-3, atol=0.03 * moved).flatten()
                for name, p, _ in pairs
            ]
        )
        assert outside.float().mean() <= 1e-3
        for name, p, _ in pairs:
            torch.testing.assert_close(mine[name], p, rtol=1e-3, atol=2 * RATE)

    def after_step(self, step: int) -> None:
        """What a loop does between steps."""


class ScheduledLoop(Loop):
    """Adafactor as the SDXL script sets it, under one step of warm-up and a cosine."""

    def __init__(self, *args: Any, **options: Any) -> None:
        schedule = {"optim": "adafactor", "lr_scheduler": "cosine", "warmup_steps": 1}
        super().__init__(*args, **schedule, max_steps=STEPS, **options)
        self.optimizer = Adafactor(
            self.trained, lr=RATE, scale_parameter=False, relative_step=False, warmup_init=False
        )
        self.after_step(0)

    def after_step(self, step: int) -> None:
        rate = step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))
        self.optimizer.param_groups[0]["lr"] = RATE * rate


every_family = pytest.mark.parametrize("family", FAMILIES)
lora_or_full = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


def pair_captions(batch: Any) -> list[str]:
    return [text for text in batch.prompts for _ in range(batch.x0.shape[1])]


def dpo(beta: float, policy: Tensor, reference: Tensor) -> Tensor:
    """diffusers' train_diffusion_dpo.py, per pair."""
    difference = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -F.logsigmoid(-0.5 * beta * difference)


@lora_or_full
@every_family
def test_diffusion_dpo(family: str, lora: bool, tmp_path: Path) -> None:
    loop = Loop(tmp_path, family, "diffusion_dpo", lora, beta=300.0)
    loop.run(lambda batch: dpo(300.0, *loop.both(batch, pair_captions(batch))))


@pytest.mark.parametrize("passes", [2, 3])
def test_diffusion_dpo_with_accumulation(passes: int, tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, "sd", "diffusion_dpo", True, beta=300.0, gradient_accumulation_steps=passes
    )
    loop.run(lambda batch: dpo(300.0, *loop.both(batch, pair_captions(batch))), passes)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusion_dpo_with_adafactor_and_a_schedule(family: str, tmp_path: Path) -> None:
    loop = ScheduledLoop(tmp_path, family, "diffusion_dpo", True, beta=300.0)
    loop.run(lambda batch: dpo(300.0, *loop.both(batch, pair_captions(batch))))


@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_diffusion_dpo_with_min_snr(family: str, tmp_path: Path) -> None:
    data = {"random_flip": True, "center_crop": False}
    rows = pair_rows(size=48)
    loop = Loop(
        tmp_path, family, "diffusion_dpo", True, beta=300.0, snr_gamma=5.0, data=data, rows=rows
    )

    def loss(batch: Any) -> Tensor:
        bar = loop.pipe.scheduler.alphas_cumprod[batch.times]
        snr = bar / (1 - bar)
        weight = snr.clamp(max=5) / (snr + 1 if family == "sd_v" else snr)
        policy, reference = loop.both(batch, pair_captions(batch))
        return dpo(300.0, weight[:, None] * policy, weight[:, None] * reference)

    loop.run(loss)


def test_diffusion_npo_is_the_pair_exchanged(tmp_path: Path) -> None:
    exchanged = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]}
        for r in pair_rows()
    ]
    loop = Loop(tmp_path, "sd", "diffusion_npo", True, beta=300.0)
    dpo_run = Loop(tmp_path / "dpo", "sd", "diffusion_dpo", True, beta=300.0, rows=exchanged)
    for (inverted, _), (batch, _) in zip(loop.batches, dpo_run.batches, strict=True):
        assert torch.equal(inverted.x0, batch.x0)
    loop.run(lambda batch: dpo(300.0, *loop.both(batch, pair_captions(batch))))


@lora_or_full
@every_family
def test_dcpo_with_two_captions(family: str, lora: bool, tmp_path: Path) -> None:
    rows = captioned_rows()
    loop = Loop(tmp_path, family, "dcpo", lora, beta=300.0, rows=rows)

    def texts(batch: Any) -> list[str]:
        keys = ("chosen_prompt", "rejected_prompt")
        return [rows[row][key] for row in batch.row_ids for key in keys]

    loop.run(lambda batch: dpo(300.0, *loop.both(batch, texts(batch))))


@lora_or_full
@every_family
def test_mapo(family: str, lora: bool, tmp_path: Path) -> None:
    loop = Loop(tmp_path, family, "mapo", lora)

    def loss(batch: Any) -> Tensor:
        """The MaPO repository's loss: snr_value 0.5, 1000 timesteps, beta 0.1."""
        errors = loop.errors(loop.network, batch, pair_captions(batch))
        odds = [e * 0.5 / (torch.exp(e * 0.5) - 1) for e in errors.unbind(1)]
        return errors[:, 0] - 0.1 * F.logsigmoid(1000 * (odds[0] - odds[1]))

    loop.run(loss)


@pytest.mark.parametrize("sign", ["legacy", "correct"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusion_orpo(family: str, sign: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path, family, "diffusion_orpo", True, sign=sign)

    def loss(batch: Any) -> Tensor:
        chosen, rejected = loop.errors(loop.network, batch, pair_captions(batch)).unbind(1)
        odds = chosen - rejected if sign == "legacy" else rejected - chosen
        return chosen - 0.1 * F.logsigmoid(odds)

    loop.run(loss)


@lora_or_full
@every_family
def test_sft(family: str, lora: bool, tmp_path: Path) -> None:
    loop = Loop(tmp_path, family, "sft", lora)
    loop.run(lambda batch: loop.errors(loop.network, batch, list(batch.prompts))[:, 0])


def ragged_rows() -> list[dict[str, Any]]:
    """Lists of 4, 2 and 3 images, some of them tied."""
    scores = ([1.0, 0.5, 0.5, 0.2], [0.9, 0.3], [0.8, 0.4, 0.4])
    prompts = [row["prompt"] for row in pair_rows(6)]
    return [
        {
            "prompt": prompt,
            "images": [picture(int(40 + 170 * s), 10 * i + j) for j, s in enumerate(scores[i % 3])],
            "scores": scores[i % 3],
        }
        for i, prompt in enumerate(prompts)
    ]


@lora_or_full
@every_family
def test_rankdpo_on_ragged_lists_with_ties(family: str, lora: bool, tmp_path: Path) -> None:
    rows = ragged_rows()
    loop = Loop(
        tmp_path, family, "rankdpo", lora, beta=300.0, rows=rows, per_device_train_batch_size=3
    )

    def loss(batch: Any) -> Tensor:
        policy, reference = loop.both(batch, pair_captions(batch))
        losses = []
        for g, row in enumerate(batch.row_ids):
            scores = rows[row]["scores"]
            ranks = [
                1 + sum(other > s for other in scores) + (scores.count(s) - 1) / 2 for s in scores
            ]
            total = policy.new_zeros(())
            for i, a in enumerate(scores):
                for j, b in enumerate(scores):
                    if a <= b:
                        continue
                    gain = abs((2**a - 1) - (2**b - 1))
                    discount = abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j]))
                    ahead = (policy[g, i] - reference[g, i]) - (policy[g, j] - reference[g, j])
                    total = total - gain * discount * F.logsigmoid(-0.5 * 300.0 * ahead)
            losses.append(total)
        return torch.stack(losses)

    loop.run(loss)


def ddim_log_prob(
    scheduler: Any, output: Tensor, x: Tensor, after: Tensor, times: Tensor, steps: int, eta: float
) -> Tensor:
    """log p of a stored next state by diffusers' DDIM step, as in D3PO's repository."""
    scheduler.set_timesteps(steps)
    found = []
    for i, t in enumerate(times.tolist()):
        still = torch.zeros_like(x[i : i + 1])
        mean = scheduler.step(
            output[i : i + 1], t, x[i : i + 1], eta=eta, variance_noise=still
        ).prev_sample
        variance = scheduler._get_variance(t, t - scheduler.config.num_train_timesteps // steps)
        normal = torch.distributions.Normal(mean, eta * variance**0.5)
        found.append(normal.log_prob(after[i : i + 1]).mean())
    return torch.stack(found)


def flow_log_prob(
    output: Tensor, x: Tensor, after: Tensor, sigma: Tensor, following: Tensor, eta: float
) -> Tensor:
    """The same for flow models, by Flow-GRPO's step."""
    now, then = (v.float().reshape(-1, 1, 1, 1) for v in (sigma, following))
    std = (now / (1 - torch.where(now == 1, then, now))).sqrt() * eta
    dt = then - now
    mean = x * (1 + std**2 / (2 * now) * dt) + output * (1 + std**2 * (1 - now) / (2 * now)) * dt
    return torch.distributions.Normal(mean, std * (-dt).sqrt()).log_prob(after).mean((1, 2, 3))


def step_losses(loop: Loop, batch: Any, steps: int, eta: float, beta: float, clip: float) -> Tensor:
    """D3PO's loss of one recorded step, averaged over the pairs of a prompt."""
    g, k = batch.x0.shape[:2]
    states = batch.noisy.expand(g, k, *batch.noisy.shape[2:]).flatten(0, 1)
    after, times = batch.x0.flatten(0, 1), batch.times.repeat_interleave(k)
    texts = pair_captions(batch)

    def log_probs(network: Any) -> Tensor:
        output = loop.guided(network, states, times, texts, 2.0)
        if loop.family == "sd3":
            following = batch.extra["next_times"].repeat_interleave(k)
            return flow_log_prob(output, states, after, times, following, eta)
        return ddim_log_prob(loop.pipe.scheduler, output, states, after, times, steps, eta)

    policy = log_probs(loop.network)
    with torch.no_grad():
        reference = log_probs(loop.reference)
    ratio = torch.exp(policy - reference).clamp(1 - clip, 1 + clip).unflatten(0, (g, k))
    pairs = []
    for i in range(k):
        for j in range(i + 1, k):
            sign = batch.extra["preference"][:, i, j].to(policy)
            pairs.append(-F.logsigmoid(beta * sign * (ratio[:, i].log() - ratio[:, j].log())))
    return torch.stack(pairs, 1).mean(1)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("images", [2, 3])
@every_family
def test_d3po(family: str, images: int, eta: float, tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, family, "d3po", True, eta=eta, images_per_prompt=images, num_inference_steps=3
    )
    passes = loop.trainer.trained_steps
    loop.rtol = 1e-6  # at beta 0.1 every loss is within 1 % of log 2
    loop.run(lambda batch: step_losses(loop, batch, 3, eta, 0.1, 0.1), passes)


@every_family
def test_spo(family: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path, family, "spo", True, num_inference_steps=4)
    assert all(batch.noisy.shape[1] == 1 for batch, _ in loop.batches)  # one state, two next ones
    passes = loop.trainer.trained_steps
    loop.rtol = 1e-5
    loop.run(lambda batch: step_losses(loop, batch, 4, 1.0, 10.0, 0.1), passes)


class PoolLoop(Loop):
    """Keeps its own past weights, by step, as SePPO's references."""

    past: dict[int, Any]

    def after_step(self, step: int) -> None:
        self.past[step] = copy.deepcopy(self.network).requires_grad_(False)


@pytest.mark.parametrize("anchor", ["sign", "indicator"])
@lora_or_full
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_seppo(family: str, lora: bool, anchor: str, tmp_path: Path) -> None:
    loop = PoolLoop(
        tmp_path, family, "seppo", lora, beta=300.0, anchor=anchor, pool_size=3, pool_save_steps=1
    )
    loop.past = {0: loop.reference}
    used = set()

    def loss(batch: Any) -> Tensor:
        member = batch.extra["member"]
        used.add(member)
        policy = loop.errors(loop.network, batch, pair_captions(batch))
        with torch.no_grad():
            reference = loop.errors(loop.past[member], batch, pair_captions(batch))
        change = (policy - reference)[:, 0].detach()
        worse = -1.0 if anchor == "sign" else 0.0
        a = torch.where(change < 0, 1.0, torch.where(change == 0, 1.0, worse))
        rewards = -0.5 * 300.0 * (policy - reference)
        return -F.logsigmoid(rewards[:, 0] - a * rewards[:, 1])

    loop.run(loss)
    assert used


def truncated_targets(
    loop: Loop, raw: Any, start: str, weight: float, steps: int, truncation: int
) -> Iterator[tuple[Tensor, Any]]:
    """(target, time) of every row by a DDIM (Euler) loop with the starting weights."""
    flow, bars = loop.family == "sd3", getattr(loop.pipe.scheduler, "alphas_cumprod", None)

    def alpha_sigma(t: Any) -> tuple[float, float]:
        if flow:
            return 1 - float(t), float(t)
        bar = float(bars[int(t)])
        return bar**0.5, (1 - bar) ** 0.5

    def clean_and_noise(output: Tensor, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha_sigma(t)
        if flow:
            return x - sigma * output, x + alpha * output
        if loop.family == "sd_v":
            return alpha * x - sigma * output, sigma * x + alpha * output
        return (x - sigma * output) / alpha, output

    shift = 3.0
    grid = [i / steps for i in range(1, steps + 1)]
    grid = [shift * u / (1 + (shift - 1) * u) if flow else round(1000 * u) - 1 for u in grid]
    rest = grid[0] / 20 if flow else 0
    for row, generator in enumerate(raw.generators("self_npo")):
        uniform = float(torch.rand(2, generator=generator, dtype=torch.float64)[0])
        place = steps - 1 if start == "noise" else min(int(uniform * steps), steps - 1)
        x, t = raw.noise[row], grid[place]
        if start == "data":
            alpha, sigma = alpha_sigma(t)
            x = alpha * raw.x0[row] + sigma * x
        times = [grid[place - i] if place >= i else rest for i in range(1, truncation + 1)]
        for following in [*times, None]:
            stamp = torch.tensor([t], dtype=torch.float64 if flow else torch.int64)
            text = [raw.prompts[row]]
            with torch.no_grad():
                full = loop.output(loop.reference, x, stamp, loop.captions(text))
                nothing = loop.output(loop.reference, x, stamp, loop.empty(1))
            clean, noise = clean_and_noise(full + weight * (full - nothing), x, t)
            if following is not None and following != t:
                alpha, sigma = alpha_sigma(following)
                x, t = alpha * clean + sigma * noise, following
        yield clean, t


@pytest.mark.parametrize("kind", ["huber", "mse"])
@pytest.mark.parametrize("weight", [0.0, -1.0, -5.0])
@pytest.mark.parametrize("start", ["noise", "data"])
@every_family
def test_self_npo(family: str, start: str, weight: float, kind: str, tmp_path: Path) -> None:
    loop = Loop(
        tmp_path, family, "self_npo", True, sampler="frozen_ref", start=start, loss_type=kind,
        guidance_weight=weight, num_inference_steps=5, truncation_steps=2,
    )  # fmt: skip
    for raw, (batch, _) in zip(loop.raw, loop.batches, strict=True):
        for row, (target, time) in enumerate(truncated_targets(loop, raw, start, weight, 5, 2)):
            size = float(target.abs().max())
            torch.testing.assert_close(batch.x0[row], target, rtol=1e-4, atol=1e-4 * size)
            assert batch.times[row] > time

    def loss(batch: Any) -> Tensor:
        x, t = batch.noisy[:, 0], batch.times
        output = loop.output(loop.network, x, t, loop.captions(list(batch.prompts)))
        if family == "sd3":
            clean = x - t.float().reshape(-1, 1, 1, 1) * output
        else:
            bar = loop.pipe.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            clean = (x - (1 - bar).sqrt() * output) / bar.sqrt()
            if family == "sd_v":
                clean = bar.sqrt() * x - (1 - bar).sqrt() * output
        difference = (clean - batch.x0[:, 0]).square()
        if kind == "huber":
            difference = (difference + 1e-6).sqrt() - 1e-3
        return difference.mean((1, 2, 3))

    loop.run(loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_draws_of_the_autoencoders_posterior(family: str, tmp_path: Path) -> None:
    rows = pair_rows(64)
    trainer = make_trainer(tmp_path, family, rows=rows, per_device_train_batch_size=64)
    trainer.setup()
    batch = trainer.data_pipeline.builder(next(trainer.data_pipeline.batches(0)))
    vae = build_pipeline(family).vae
    draws = []
    for place, row in enumerate(batch.row_ids):
        for column, name in enumerate(("chosen", "rejected")):
            pixels = torch.from_numpy(np.array(rows[row][name])).permute(2, 0, 1)[None]
            with torch.no_grad():
                posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
            latent = batch.x0[place, column] / vae.config.scaling_factor
            latent = latent + (vae.config.shift_factor or 0.0)
            draws.append((latent - posterior.mean[0]) / posterior.std[0])
    z = torch.stack(draws).flatten()
    count = len(z) ** 0.5
    assert abs(float(z.mean())) < 4 / count and abs(float(z.std()) - 1) < 4 / count


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_dropped_prompts_are_the_pipelines_unconditional_embedding(
    family: str, tmp_path: Path
) -> None:
    rows = pair_rows(240)
    trainer = make_trainer(
        tmp_path, family, rows=rows, per_device_train_batch_size=60, proportion_empty_prompts=0.5
    )
    trainer.setup()
    loop = Loop.__new__(Loop)
    loop.family, loop.pipe = family, build_pipeline(family)
    empty, dropped, times = loop.empty(1), [], []
    batches = trainer.data_pipeline.batches(0)
    for _ in range(4):
        batch = trainer.data_pipeline.builder(next(batches))
        embeds = (
            batch.condition["prompt_embeds"].unflatten(0, (-1, 2))
            if len(batch.condition["prompt_embeds"]) == 2 * len(batch)
            else batch.condition["prompt_embeds"][:, None]
        )
        same = (embeds - empty["embeds"]).abs().flatten(2).amax(2) < 1e-6
        full = loop.captions(list(batch.prompts))["embeds"]
        kept = (embeds - full[:, None]).abs().flatten(2).amax(2) < 1e-5
        assert (same ^ kept).all() and (same == same[:, :1]).all()  # whole pairs
        dropped += same[:, 0].tolist()
        times += batch.times.tolist()
    assert 0.4 < np.mean(dropped) < 0.6
    assert abs(np.corrcoef(dropped, times)[0, 1]) < 0.2


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_d3po_in_bf16_starts_at_its_reference(family: str, lora: bool, tmp_path: Path) -> None:
    """And at what sampling recorded: to the bit, though everything is rounded."""
    config = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(
        tmp_path, family, "d3po", peft_config=config, mixed_precision="bf16", max_steps=1
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["policy/log_ratio"] == 0
    assert first["policy/since_sampling"] < 1e-6


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradient_checkpointing_in_bf16_gives_equal_weights(lora: bool, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing),
            peft_config=LoraConfig(**LORA) if lora else None,
            mixed_precision="bf16",
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        found.append(trained_tensors(trainer))
    assert_same_tensors(*found)


@pytest.mark.parametrize("method", ["diffusion_dpo", "rankdpo"])
def test_precomputed_reference_errors_in_bf16(method: str, tmp_path: Path) -> None:
    found = []
    for precompute in (False, True):
        trainer = make_trainer(
            tmp_path / str(precompute),
            method=method,
            peft_config=LoraConfig(**LORA),
            mixed_precision="bf16",
            precompute_ref_errors=precompute,
            data={"center_crop": True, "random_flip": False},
        )
        trainer.train()
        found.append(trained_tensors(trainer))
    assert_close_tensors(*found, rtol=1e-4, atol=1e-6)


SAVED: list[dict[str, Any]] = [
    {"lora_alpha": 7},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9}},
    {"target_modules": ["to_q", "conv_in"]},
    {"target_modules": r".*attn1\.to_[qk]"},
]


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_a_saved_lora_is_the_trained_network_in_plain_diffusers(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], **options})
    trainer = make_trainer(tmp_path, peft_config=config, max_steps=2, learning_rate=2e-2)
    trainer.train()
    pipe = build_pipeline("sd")
    pipe.load_lora_weights(str(tmp_path))
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([100, 700])
    with torch.no_grad():
        trainer.network.eval()
        mine = trainer.network(noisy, times, embeds)[0]
        plain = pipe.unet.eval()(noisy, times, embeds)[0]
        pipe.disable_lora()
        base = pipe.unet(noisy, times, embeds)[0]
    torch.testing.assert_close(plain, mine, rtol=1e-5, atol=1e-6)
    assert float((mine - base).abs().max()) > 1e-4
