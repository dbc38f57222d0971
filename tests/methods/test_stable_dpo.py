"""Options against errors that both rise: the safeguard of the chosen image."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    Snapshots,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    method_rows,
)

from diffalign.errors import ConfigError
from diffalign.likelihood import VariancePreserving, denoising_errors, winner_safeguard
from diffalign.methods.diffusion_dpo import DiffusionDPOConfig, diffusion_dpo_loss, safeguarded


def g1b() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy samples and targets of one pair."""
    x0 = torch.tensor([[1, 0, -1, 0.5], [0, 1, 0.5, -0.5]], dtype=torch.float64)
    noise = torch.tensor([[0.5, -0.5, 1, 0]], dtype=torch.float64).expand(2, 4)
    schedule = VariancePreserving(torch.tensor([0.64], dtype=torch.float64))
    times = torch.zeros(2, dtype=torch.long)
    return schedule.add_noise(x0, noise, times), schedule.target(x0, noise, times)


@pytest.mark.parametrize(
    ("strength", "share", "slope"),
    [
        (0.0, 1.0, 0.524979187479),
        (0.2, 1.0, 0.524979187479),
        (0.6, 0.728476821192, 0.471525180807),
        (0.9, 0.182119205298, 0.363965289333),
        (1.0, 0.0, None),
    ],
)
def test_h6b_safeguard(strength: float, share: float, slope: float | None) -> None:
    noisy, target = g1b()
    k = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    prediction = k * noisy
    factor = winner_safeguard(prediction, target, strength)
    assert factor.tolist() == pytest.approx([share], abs=1e-9) and not factor.requires_grad
    chosen, rejected = denoising_errors(prediction, target)
    scaled = rejected.detach() + factor * (rejected - rejected.detach())
    policy = torch.stack([chosen, scaled[0]])[None]
    reference = denoising_errors(0.4 * noisy, target)[None]
    loss = diffusion_dpo_loss(policy, reference, beta=10)
    assert float(loss.detach()) == pytest.approx(0.744396660074, abs=1e-9)
    loss.sum().backward()
    if slope is not None:
        assert float(k.grad) == pytest.approx(slope, abs=1e-9)


def test_residuals_that_do_not_agree_keep_the_whole_gradient() -> None:
    target = torch.zeros(6, 2)
    prediction = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0], [1, 0], [0, 0]])
    assert winner_safeguard(prediction, target, 1.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9, 1.0])
def test_no_step_in_output_space_raises_the_chosen_error(strength: float) -> None:
    """The chosen error falls by at least `strength` of what it would alone."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(200, 5, generator=generator)
    prediction[1::2] = 3 * prediction[1::2] + prediction[::2]
    target = torch.zeros_like(prediction)
    factor = winner_safeguard(prediction, target, strength)
    chosen, rejected = prediction[::2], prediction[1::2]
    change = (chosen * (chosen - factor[:, None] * rejected)).sum(1)
    assert (change >= strength * chosen.square().sum(1) - 1e-4).all()


@pytest.mark.parametrize("method", ["diffusion_dpo", "dcpo", "diffusion_npo"])
def test_the_loss_stays_and_the_rejected_gradient_shrinks(method: str, tmp_path: Path) -> None:
    results: dict[Any, Any] = {}
    for strength in (None, 0.0, 1.0):
        trainer = make_trainer(
            tmp_path / str(strength), "sd", method, rows=method_rows(method, 4), seed=1,
            per_device_train_batch_size=2, peft_config=lora_config(), preserve_winner=strength,
        )  # fmt: skip
        loss, metrics = trainer.compute_loss(trainer.prepare(first_batch(trainer)))
        loss.sum().backward()
        gradient = torch.cat(
            [w.grad.flatten() for w in trainer.network.parameters() if w.grad is not None]
        )
        results[strength] = loss.detach(), gradient, metrics.get("preserve_winner/share")
    plain, weak, strong = results.values()
    assert torch.equal(plain[0], weak[0]) and torch.equal(plain[0], strong[0])
    assert plain[2] is None and strong[2].shape == (2,)
    assert (strong[2] <= weak[2]).all() and (strong[2] < 1).any()
    assert not torch.equal(plain[1], strong[1])


def test_it_trains_with_precomputed_reference_errors_and_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "sd", rows=method_rows("diffusion_dpo", 4), precompute_ref_errors=True,
        peft_config=lora_config(), preserve_winner=0.9, max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert all(0 <= x["preserve_winner/share"] <= 1 for x in trainer.state.log_history)


@pytest.mark.parametrize("value", [-0.1, 1.5, "much"])
def test_a_strength_is_a_share(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        DiffusionDPOConfig(preserve_winner=value)  # type: ignore[arg-type]
    assert error.value.field == "preserve_winner"


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("sampling", ["auto", "logit_normal", "grid"])
def test_timesteps_lie_in_the_window(family: str, sampling: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, family, rows=method_rows("diffusion_dpo", 16), peft_config=lora_config(),
        per_device_train_batch_size=16, timestep_sampling=sampling, grid_steps=20,
        min_timestep=400, max_timestep=750,
    )  # fmt: skip
    shares = trainer.schedule.fraction(first_batch(trainer).times)
    assert ((shares >= 0.4) & (shares <= 0.75)).all() and shares.unique().numel() > 2


def test_a_window_that_holds_no_timestep(tmp_path: Path) -> None:
    for words, options in (
        (r"min_timestep: expected one below max_timestep \(300\), got 300",
         {"min_timestep": 300, "max_timestep": 300}),
        ("min_timestep: timestep_sampling: turbo has timesteps of its own",
         {"min_timestep": 300, "timestep_sampling": "turbo"}),
        ("max_timestep", {"max_timestep": 1001}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            DiffusionDPOConfig(**options)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, "sd", timestep_sampling="grid", grid_steps=4, min_timestep=990)
    with pytest.raises(ConfigError, match="none of the sampler's 4 timesteps lies from 990"):
        first_batch(trainer)


# A reference that follows the policy


def blended(folder: Path, decay: float | None, lora: bool = True, **options: Any) -> Any:
    return make_trainer(
        folder, "sd", rows=method_rows("diffusion_dpo", 8), per_device_train_batch_size=2,
        peft_config=lora_config() if lora else None, reference_decay=decay, seed=5, **options,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["train/loss"] for entry in trainer.state.log_history]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_ends_of_the_average(lora: bool, tmp_path: Path) -> None:
    """1 never moves: the fixed reference. 0 is the policy before the step: log 2."""
    fixed = losses(blended(tmp_path / "fixed", None, lora, max_steps=4))
    still = losses(blended(tmp_path / "still", 1.0, lora, max_steps=4))
    following = losses(blended(tmp_path / "following", 0.0, lora, max_steps=4))
    assert still == pytest.approx(fixed, rel=1e-5)
    assert following == pytest.approx([math.log(2)] * 4, rel=1e-5)
    assert fixed[-1] != pytest.approx(math.log(2), rel=1e-4)


def test_the_average_is_that_of_the_weights(tmp_path: Path) -> None:
    snapshots = Snapshots()
    trainer = blended(tmp_path, 0.7, max_steps=3, options={"callbacks": [snapshots]})
    trainer.train()
    for name, weight in trainer.reference_model.weights.items():
        expected = snapshots.weights[0][name]
        for later in snapshots.weights[1:]:
            expected = 0.7 * expected + 0.3 * later[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


def test_an_average_resumes_bit_equal(tmp_path: Path) -> None:
    steps = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    blended(tmp_path / "whole", 0.8, **steps).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    checkpoint = str(tmp_path / "part" / "checkpoint-2")
    blended(tmp_path / "part", 0.8, resume_from_checkpoint=checkpoint, **steps).train()
    name = "pytorch_lora_weights.safetensors"
    whole, part = (load_file(tmp_path / folder / name) for folder in ("whole", "part"))
    assert_same_tensors(part, whole)


def test_a_fixed_reference_and_an_average_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precompute_ref_errors: with reference_decay"):
        blended(tmp_path, 0.9, precompute_ref_errors=True)
    with pytest.raises(ConfigError, match="reference_decay: cannot be combined with ref_model"):
        blended(tmp_path, 0.9, options={"ref_model": build_pipeline("sd")})


@pytest.mark.parametrize("z", [-3.0, 0.0, 3.0, 6.0])
@pytest.mark.parametrize(
    ("options", "winner"),
    [
        ({}, 0),
        ({"label_smoothing": 0.1}, 0),
        ({"loss_type": "ipo"}, 0),
        ({"loss_type": "dmpo"}, 0),
        ({"loss_type": "regression", "targets": torch.tensor([1.0])}, 0),
        ({"factors": torch.tensor([-1.0])}, 1),
    ],
)
def test_the_better_image_is_preserved_whatever_the_loss(
    options: dict[str, Any], winner: int, z: float
) -> None:
    """A step raises the better image's error only where the loss asks for it."""
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    prediction = torch.stack([weights * 0.5, weights * torch.tensor([0.9, 1.0])])
    target = torch.zeros_like(prediction)
    errors = denoising_errors(prediction, target)[None]
    beta = 10.0
    shift = torch.tensor([[2 * z / beta, 0.0]])  # of the margin
    reference = errors.detach() + shift

    def loss_of(policy: torch.Tensor) -> torch.Tensor:
        return diffusion_dpo_loss(policy, reference, beta=beta, **options)

    chosen = torch.tensor([winner])
    share = winner_safeguard(prediction, target, 0.9, chosen).to(errors)
    policy, used = safeguarded(errors, share, chosen, loss_of)
    assert torch.equal(policy.detach(), errors.detach())
    (step,) = torch.autograd.grad(loss_of(policy).sum(), weights, retain_graph=True)
    (own,) = torch.autograd.grad(errors[0, winner], weights, retain_graph=True)
    probe = errors.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(probe).sum(), probe)
    change = -float(step @ own)
    if float(slope[0, winner]) >= 0:  # the loss lowers this error
        assert change <= 1e-9 and float(used) < 1
    else:
        assert float(used) == 1
