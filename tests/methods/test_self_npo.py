"""Self-NPO: golden values, the truncated sampler by hand in every parametrisation,
marginals, prompts alone, EMA, mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import by_default
from tiny import build_pipeline, first_batch, lora_config, make_trainer, pair_rows, trained_tensors

from diffalign import SelfNPOConfig
from diffalign.errors import ConfigError, UserError
from diffalign.likelihood.schedules import RectifiedFlow, VariancePreserving
from diffalign.methods.self_npo import (
    ddim_move,
    guided_output,
    later_times,
    sampling_grid,
    self_npo_loss,
)

FAMILIES = ("sd", "sd_v", "sdxl", "sd3")
F64 = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=F64)


def table(*alphas: float) -> VariancePreserving:
    return VariancePreserving(torch.tensor([a * a for a in alphas], dtype=F64))


def test_golden_values() -> None:
    schedule = table(0.8, 0.6)
    t, s = torch.tensor([0]), torch.tensor([1])
    x_t, z = tensor(1, -0.5), tensor(0.2, -1)
    target = schedule.to_x0(tensor(0.3, 0.1), x_t, t)
    assert target[0].tolist() == pytest.approx([1.025, -0.7])
    x_s = schedule.renoise(x_t, t, s, z)
    assert x_s[0].tolist() == pytest.approx([0.882287565553, -1.036437827766], abs=1e-11)
    student = schedule.to_x0(tensor(0.4, -0.3), x_s, s)
    assert student[0].tolist() == pytest.approx([0.937145942589, -1.327396379610], abs=1e-11)
    assert float(self_npo_loss(student, target)) == pytest.approx(0.356628462519, abs=1e-11)
    assert float(self_npo_loss(student, target, kind="mse")) == pytest.approx(
        0.200672276276, abs=1e-11
    )
    cond, uncond = tensor(0.3, 0.1), tensor(0.2, 0.0)
    assert guided_output(cond, uncond, -1)[0].tolist() == pytest.approx([0.2, 0.0])
    assert guided_output(cond, uncond, -5)[0].tolist() == pytest.approx([-0.2, -0.4])
    assert guided_output(cond, uncond, 0).equal(cond)


@pytest.mark.parametrize("loss_type", ["mse", "huber"])
def test_gradient_is_the_formulas(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, generator=generator, dtype=F64).requires_grad_()
    target = torch.randn(3, 4, generator=generator, dtype=F64)
    self_npo_loss(student, target, kind=loss_type, huber_c=0.1).sum().backward()
    d = (student - target).detach()
    expected = 2 * d / 4 if loss_type == "mse" else d / (d.square() + 0.01).sqrt() / 4
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize(
    "schedule",
    [VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=F64)), RectifiedFlow(shift=3.0)],
)
def test_the_renoised_marginal_is_the_schedules_own(schedule: Any) -> None:
    """x_t of a known x0, moved by an exact sampler and re-noised: mean and variance are
    those of x_s, at every time."""
    count = 40_000
    generator = torch.Generator().manual_seed(1)
    x0, eps, z = (torch.randn(count, 1, generator=generator, dtype=F64) for _ in range(3))
    x0 = 0.5 + 0.2 * x0
    grid = sampling_grid(schedule, 25)
    for index in (4, 12, 24):
        t, u = grid[index].repeat(count), grid[index - 3].repeat(count)
        x_t = schedule.add_noise(x0, eps, t)
        oracle = schedule.target(x0, eps, t)  # what a perfect network says
        moved = ddim_move(schedule, oracle, x_t, t, u)
        torch.testing.assert_close(moved, schedule.add_noise(x0, eps, u))
        s = later_times(schedule, u, torch.rand(count, generator=generator, dtype=F64))
        assert (s > u).all()
        x_s = schedule.renoise(moved, u, s, z)
        alpha, sigma = schedule.alpha_sigma(s)
        noise = (x_s - alpha[:, None] * x0) / sigma[:, None]  # standard normal, whatever s
        assert abs(float(noise.mean())) < 4 / math.sqrt(count)
        assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / count)
        assert abs(float((noise * x0).mean() - noise.mean() * x0.mean())) < 4 * 0.2 / math.sqrt(
            count
        )


def test_grids_and_later_times() -> None:
    vp = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=F64))
    assert sampling_grid(vp, 25)[[0, 1, 24]].tolist() == [39, 79, 999]
    flow = RectifiedFlow(shift=3.0)
    assert sampling_grid(flow, 4).tolist() == pytest.approx([0.5, 0.75, 0.9, 1.0])
    u = torch.tensor([0.0, 0.999999, 0.5], dtype=F64)
    assert later_times(vp, torch.tensor([0, 0, 998]), u).tolist() == [1, 999, 999]
    assert (
        (later_times(flow, torch.full((3,), 0.3, dtype=F64), u) > 0.3)
        & (later_times(flow, u, u) < 1)
    ).all()
    x = torch.randn(2, 3, dtype=F64)
    same = torch.tensor([0, 5])
    assert torch.equal(ddim_move(vp, torch.randn(2, 3, dtype=F64), x, same, same), x)


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen-image", "z-image"])
def test_the_truncated_sampler_walks_at_the_shift_of_the_pipelines(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path, family, "self_npo", num_inference_steps=5, truncation_steps=2,
        rows=[{"prompt": "a"}], data={"resolution": 64}, peft_config=lora_config(),
        per_device_train_batch_size=1,
    )  # fmt: skip
    seen: list[float] = []
    predict = trainer.backbone.predict

    def watched(network: Any, noisy: Any, times: Any, condition: Any) -> Any:
        seen.append(float(times[0]) / 1000)
        return predict(network, noisy, times, condition)

    monkeypatch.setattr(trainer.backbone, "predict", watched)
    trainer.prepare(first_batch(trainer))
    shift = trainer.backbone.timestep_shift(64, 64)
    walked = [shift * x / (1 + (shift - 1) * x) for x in (1.0, 0.8, 0.6)]
    assert sorted({round(t, 6) for t in seen}, reverse=True) == pytest.approx(walked, abs=1e-5)
    if family == "qwen-image":
        assert shift != getattr(trainer.schedule, "shift", None)


@by_default()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("weight", [0.0, -1.0, -5.0])
def test_targets_are_those_of_the_sampler_by_hand(
    tmp_path: Path, family: str, start: str, weight: float
) -> None:
    trainer = make_trainer(
        tmp_path,
        family,
        "self_npo",
        peft_config=lora_config(),
        start=start,
        guidance_weight=weight,
        truncation_steps=3,
        num_inference_steps=5,
        per_device_train_batch_size=3,
    )
    raw = first_batch(trainer)
    batch = trainer.prepare(raw)
    schedule, n = trainer.schedule, len(raw)
    draws = raw.generators("self_npo")
    u = torch.stack([torch.rand(2, generator=g, dtype=F64) for g in draws])
    grid = sampling_grid(schedule, 5)
    index = [4] * n if start == "noise" else [int(x * 5) for x in u[:, 0]]
    empty = {**raw.condition, **trainer.data_pipeline.builder.encode([""] * n)}
    for i in range(n):
        x, t = raw.noise[i : i + 1, 0], grid[index[i]].reshape(1)
        if start == "data":
            x = schedule.add_noise(raw.x0[i : i + 1, 0], x, t)
        for step in (1, 2, 3, None):
            model_t = schedule.model_times(t)
            with torch.no_grad():
                cond, uncond = (
                    trainer.reference.predict(x, model_t, {k: v[i : i + 1] for k, v in c.items()})
                    for c in (raw.condition, empty)
                )
            out = cond + weight * (cond - uncond)
            clean, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
            if step is None:
                break
            low = (
                torch.zeros((), dtype=grid.dtype) if not grid.is_floating_point() else grid[0] / 20
            )
            new = (grid[index[i] - step] if index[i] >= step else low).reshape(1)
            if not torch.equal(new, t):
                x, t = schedule.add_noise(clean, eps, new), new
        torch.testing.assert_close(batch.x0[i, 0], clean[0].float(), rtol=1e-3, atol=1e-3)
        assert batch.times[i] > t[0]
    loss, metrics = trainer.compute_loss(batch)
    assert loss.shape == (n,) and loss.isfinite().all() and metrics["errors/target"].shape == (n,)
    assert not torch.equal(batch.x0, raw.x0)


@by_default(lambda family: family in ("sd", "sd3"))
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_alone_are_enough(tmp_path: Path, family: str) -> None:
    rows = [{"prompt": row["prompt"]} for row in pair_rows()]
    cache = {
        "cache_text_embeddings": str(tmp_path / "cache"),
        "cache_latents": str(tmp_path / "cache"),
    }
    trainer = make_trainer(
        tmp_path / "run", family, "self_npo", rows=rows, data=cache, per_device_train_batch_size=4
    )
    trainer.train()
    assert trainer.state.global_step == 3
    with_images = make_trainer(
        tmp_path / "other", family, "self_npo", rows=pair_rows(), per_device_train_batch_size=4
    )
    with_images.train()
    for a, b in zip(
        trained_tensors(trainer).values(), trained_tensors(with_images).values(), strict=True
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6
        )  # images beside the prompts change nothing


def test_the_average_of_the_student_samples(tmp_path: Path) -> None:
    options = {
        "sampler": "ema",
        "use_ema": True,
        "ema_decay": 0.9,
        "peft_config": lora_config(dropout=0.5),
        "max_steps": 4,
    }
    trainer = make_trainer(tmp_path, "sd", "self_npo", learning_rate=2e-2, **options)
    trainer.train()
    assert trainer.reference is None
    raw = first_batch(trainer)
    weights = trained_tensors(trainer)
    first, again = trainer.prepare(raw), trainer.prepare(raw)
    assert torch.equal(first.x0, again.x0)  # no dropout while sampling
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights.values(), trained_tensors(trainer).values(), strict=True)
    )
    parameters = [p for p in trainer.network.parameters() if p.requires_grad]
    for p, shadow in zip(parameters, trainer.ema.shadow_params, strict=True):
        assert not torch.equal(p.data, shadow)
        p.data.copy_(shadow)
    assert torch.equal(trainer.prepare(raw).x0, first.x0)  # the average drew before, too


def test_another_reference_samples(tmp_path: Path) -> None:
    own = make_trainer(tmp_path / "a", "sd", "self_npo")
    other = make_trainer(
        tmp_path / "b", "sd", "self_npo", options={"ref_model": build_pipeline("sd", seed=9)}
    )
    targets = [trainer.prepare(first_batch(trainer)).x0 for trainer in (own, other)]
    assert not torch.equal(*targets)


def test_mistakes(tmp_path: Path) -> None:
    for words, options in (
        ("start: expected one of noise, data", {"start": "image"}),
        ("loss_type: expected one of mse, huber", {"loss_type": "l1"}),
        ("truncation_steps: 25 of 25 steps truncate nothing", {"truncation_steps": 25}),
        ("sampler: ema draws with the average", {"sampler": "ema"}),
        ("huber_c", {"huber_c": 0.0}),
    ):
        with pytest.raises(ConfigError, match=words):
            SelfNPOConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="single data"):
        make_trainer(tmp_path, "sd", "self_npo", rows=[{"prompt": "x"}], start="data")
    with pytest.raises(ConfigError, match="precompute_ref_errors: Self-NPO has no reference"):
        make_trainer(tmp_path, "sd", "self_npo", precompute_ref_errors=True)
    with pytest.raises(ConfigError, match="aspect_ratio_buckets: prompts without images"):
        make_trainer(
            tmp_path,
            "sd",
            "self_npo",
            data={"resolution": None, "aspect_ratio_buckets": "32,32;32,64"},
        )


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_has_one_rate_or_diffusers_quick_start(tmp_path: Path, warmup: bool) -> None:
    """After 20 equal steps the published average has gone 1.98 % of the way to the
    newest weights' mean; diffusers' almost all of it."""
    from diffalign.training.build import trainable_parameters
    from diffalign.training.optimizer import build_ema, update_ema

    trainer = make_trainer(
        tmp_path,
        method="self_npo",
        peft_config=lora_config(),
        sampler="ema",
        use_ema=True,
        **({"ema_warmup": True} if warmup else {}),
    )
    assert trainer.args.ema_decay == 0.999 and trainer.args.ema_warmup == warmup
    trainer.setup()
    (first, *_) = parameters = trainable_parameters(trainer.network)
    base, ema = first.detach().clone(), build_ema(parameters, trainer.args, torch.device("cpu"))
    expected = base.double().clone()
    for step in range(1, 21):
        with torch.no_grad():
            first += 1.0
        update_ema(ema, parameters, torch.device("cpu"), False)
        decay = min(0.999, step / (9 + step)) if warmup else 0.999
        decay = 0.0 if warmup and step == 1 else decay
        expected = decay * expected + (1 - decay) * first.detach().double()
    torch.testing.assert_close(ema.shadow_params[0].double(), expected, rtol=1e-5, atol=1e-5)
    share = float((ema.shadow_params[0] - base).mean() / 20)
    assert (share > 0.5) if warmup else share == pytest.approx(0.0104, abs=2e-3)
