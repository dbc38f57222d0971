"""Diffusion-DRO: golden values, the sampler that stops early, and SFT as a limit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_same_tensors, first_batch, lora_config, make_trainer

from diffalign.errors import ConfigError
from diffalign.likelihood import VariancePreserving, denoising_errors
from diffalign.methods.diffusion_dro import DiffusionDROConfig, dro_loss, shifted_grid
from diffalign.training.online.rollout import sampling_mode, transition


def test_h1_losses_and_gradients() -> None:
    policy = [[0.100, 0.002], [0.100, 0.004], [0.100, 0.0000], [0.090, 0.010]]
    reference = [[0.105, 0.001], [0.0985, 0.001], [0.1005, 0.0006], [0.095, 0.002]]
    m = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    r = torch.tensor(reference, dtype=torch.float64)
    change = (m - r).detach()
    gaps = (change[:, 0] - change[:, 1]).tolist()
    assert gaps == pytest.approx([-0.006, -0.0015, 0.0001, -0.013], abs=1e-9)
    loss = dro_loss(m, r, margin=1e-3)
    assert loss.tolist() == pytest.approx([0, 0, 0.0011, 0], abs=1e-9)
    assert float(loss.detach().mean()) == pytest.approx(0.000275, abs=1e-9)
    loss.sum().backward()
    assert m.grad is not None
    assert m.grad.T.tolist() == [[0, 0, 1, 0], [0, 0, -1, 0]]


def test_h1b_tensors() -> None:
    x0 = torch.tensor([[1, -1, 0.5, 0]], dtype=torch.float64)
    noise = torch.tensor([[0.5, -0.5, 1, 0]], dtype=torch.float64)
    schedule = VariancePreserving(torch.tensor([0.64], dtype=torch.float64))
    time = torch.zeros(1, dtype=torch.long)
    expert = schedule.add_noise(x0, noise, time)
    assert expert.tolist() == [pytest.approx([1.1, -1.1, 1.0, 0])]
    sample = torch.tensor([[0.2, -0.4, 0.6, 1.0]], dtype=torch.float64)
    noisy, target = torch.cat([expert, sample]), torch.cat([noise, 0.45 * sample])
    policy = denoising_errors(0.5 * noisy, target)[None]
    reference = denoising_errors(0.4 * noisy, target)[None]
    assert policy[0].tolist() == pytest.approx([0.06375, 0.000975], abs=1e-9)
    assert reference[0].tolist() == pytest.approx([0.0918, 0.000975], abs=1e-9)
    assert dro_loss(policy, reference, margin=0.001).tolist() == [0.0]
    assert float(dro_loss(policy, reference, margin=0.1)) == pytest.approx(0.07195, abs=1e-9)


def test_limits_of_the_loss() -> None:
    errors = torch.rand(8, 2, dtype=torch.float64)
    assert dro_loss(errors, errors, margin=0.02).tolist() == pytest.approx([0.02] * 8)
    other = torch.rand(8, 2, dtype=torch.float64)
    change = errors - other
    gap = change[:, 0] - change[:, 1]
    swapped = dro_loss(errors.flip(1), other.flip(1), margin=0.0)
    torch.testing.assert_close(swapped, torch.relu(-gap))
    with pytest.raises(ValueError, match=r"expected \(g, 2\)"):
        dro_loss(errors[:, :1], errors[:, :1], margin=0.0)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_times_cover_the_whole_range(steps: int) -> None:
    schedule = VariancePreserving(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    ratio = 1000 // steps
    uniforms = (torch.arange(ratio, dtype=torch.float64) + 0.5) / ratio
    own = torch.arange(steps).flip(0) * ratio
    times = shifted_grid(schedule, own, uniforms)
    assert (times.diff(dim=1) == -ratio).all()
    assert sorted(times.flatten().tolist()) == list(range(ratio * steps))
    assert torch.equal(shifted_grid(schedule, own, uniforms, False), own.expand(ratio, -1))
    sigmas = torch.linspace(1, 0.1, steps, dtype=torch.float64)
    moved = shifted_grid(schedule=object(), times=sigmas, uniforms=uniforms)  # type: ignore[arg-type]
    assert (moved[:, 0] == 1).all() and (moved.diff(dim=1) < 0).all() and (moved > 0).all()


def dro(folder: Path, family: str = "sd", lora: bool = True, **options: Any) -> Any:
    values: dict[str, Any] = {"num_inference_steps": 4, "margin": 1e-3}
    values |= {"per_device_train_batch_size": 4}
    values |= {"peft_config": lora_config() if lora else None, "seed": 2} | options
    return make_trainer(folder, family, "diffusion_dro", **values)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stopping_early_equals_a_whole_trajectory(
    family: str, guidance: float, tmp_path: Path
) -> None:
    trainer = dro(
        tmp_path, family, guidance_scale=guidance, rollout_batch_size=3,
        per_device_train_batch_size=8,
    )  # fmt: skip
    batch = first_batch(trainer)
    prepared = trainer.prepare(batch)
    draws = [
        torch.rand(2, generator=g, dtype=torch.float64) for g in batch.generators("diffusion_dro")
    ]
    grid = trainer.make_grid(4, 0.0)
    times = shifted_grid(trainer.schedule, grid.times, torch.stack(draws)[:, 1])
    assert len({int(4 * draw[0]) for draw in draws}) > 1
    empty = trainer.data_pipeline.builder.unconditional(batch.condition)
    for row, draw in enumerate(draws):
        stream = batch.generators("diffusion_dro")[row]
        torch.rand(2, generator=stream, dtype=torch.float64)
        sample = torch.randn((1, *batch.x0.shape[2:]), generator=stream)
        condition, nothing = (
            {n: v[row : row + 1] for n, v in c.items()} for c in (batch.condition, empty)
        )
        with torch.no_grad(), sampling_mode(trainer.network):
            for step in range(4):
                time = times[row, step : step + 1]
                model_time = trainer.schedule.model_times(time)
                output = trainer.sampling_policy.predict(sample, model_time, condition)
                if guidance > 1:
                    other = trainer.sampling_policy.predict(sample, model_time, nothing)
                    output = other + guidance * (output - other)
                if step == int(4 * draw[0]):
                    break
                following = times[row, step + 1 : step + 2]
                sample = transition(trainer.schedule, output, sample, time, following, 0.0)[
                    0
                ].float()
        assert prepared.times[row] == time[0]
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(prepared.extra["policy_sample"][row : row + 1], sample, **close)
        torch.testing.assert_close(prepared.extra["sampler_output"][row : row + 1], output, **close)


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.network.zero_grad()
    loss.mean().backward()
    return {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_first_update_is_that_of_sft(family: str, lora: bool, tmp_path: Path) -> None:
    """Where policy, snapshot and reference are equal, d = 0 and m_P has no gradient."""
    trainer = dro(tmp_path, family, lora)
    batch = trainer.prepare(first_batch(trainer))
    loss, metrics = trainer.compute_loss(batch)
    torch.testing.assert_close(loss.detach(), torch.full((4,), 1e-3), rtol=1e-4, atol=0)
    assert metrics["errors/policy"].abs().max() < 1e-9 and metrics["dro/active"].tolist() == [1] * 4
    own = gradients(trainer, loss)
    sft = gradients(trainer, trainer.policy.errors(batch)[:, 0])
    assert own.keys() == sft.keys()
    for name, value in sft.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-7)


def test_an_older_snapshot_gives_the_ranking_term_a_gradient(tmp_path: Path) -> None:
    for sync_every, moves in ((1, False), (3, True)):
        trainer = dro(tmp_path / str(sync_every), sync_every=sync_every, max_steps=2)
        trainer.train()
        batch = trainer.prepare(first_batch(trainer))
        _, metrics = trainer.compute_loss(batch)
        assert bool((metrics["errors/policy"] > 1e-9).all()) is moves
        assert (trainer.snapshot is not None) is moves


def test_a_snapshot_is_taken_when_due_and_resumes_bit_equal(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sync_every": 3,
        "max_steps": 5,
        "save_steps": 2,
        "save_total_limit": None,
    }
    whole = dro(tmp_path / "whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2" / "sampler.safetensors"
    start = load_file(checkpoint)
    assert not torch.equal(next(iter(start.values())), next(iter(whole.snapshot.weights.values())))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "part" / f"checkpoint-{step}", ignore_errors=True)
    again = dro(
        tmp_path / "part", resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"), **options
    )
    again.train()
    name = "pytorch_lora_weights.safetensors"
    assert_same_tensors(load_file(tmp_path / "part" / name), load_file(tmp_path / "whole" / name))
    assert_same_tensors(again.snapshot.weights, whole.snapshot.weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": -1.0}, "margin"),
        ({"sync_every": 0}, "sync_every"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"precompute_ref_errors": True}, "precompute_ref_errors: the reference is run on samples"),
        ({"timestep_sampling": "uniform"}, "timestep_sampling: the times are those of the sampler"),
        ({"min_timestep": 100}, "timestep_sampling: the times are those of the sampler"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DiffusionDROConfig(**options)


def test_online_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot train on pairs that the policy draws"):
        dro(tmp_path, data={"online": {"scorers": ["shapes"]}})


@pytest.mark.parametrize("family", ["sd", "sd3", "z-image"])
def test_a_guidance_of_one_is_none_in_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dro(tmp_path, family, data={"resolution": 32})
    rows: list[int] = []
    predict = trainer.backbone.predict

    def watched(network: Any, noisy: Any, times: Any, condition: Any) -> Any:
        rows.append(len(noisy))
        return predict(network, noisy, times, condition)

    monkeypatch.setattr(trainer.backbone, "predict", watched)
    trainer.prepare(first_batch(trainer))
    assert max(rows) <= 4  # and not twice as many
