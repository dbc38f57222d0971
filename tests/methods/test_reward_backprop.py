"""Reward back-propagation: golden values, live steps, what trains and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    SoftBrightness,
    all_tensors,
    assert_close_tensors,
    assert_same_tensors,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.likelihood import VariancePreserving
from diffalign.methods.reward_backprop import RewardBackpropConfig, sampler_steps, shaped_loss
from diffalign.rewards.panel import Panel
from diffalign.training.online.rollout import sampling_mode

SCHEDULE = VariancePreserving(torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=torch.float64))
TIMES, NEXT = torch.tensor([3, 2, 1, 0]), torch.tensor([2, 1, 0, -1])


def linear(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda sample, times: theta * sample


def start() -> Tensor:
    return torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)


def test_h4_shapes() -> None:
    rewards = torch.tensor([-1, 0.5, 2.5], dtype=torch.float64)
    relu = 1e-3 * shaped_loss(rewards, "relu", 2.0)
    assert relu.tolist() == pytest.approx([0.003, 0.0015, 0.0], abs=1e-12)
    assert float(relu.mean()) == pytest.approx(0.0015, abs=1e-12)
    one_minus = 0.01 * shaped_loss(torch.tensor([0.25, 0.28, 0.30]).double(), "one_minus")
    assert one_minus.tolist() == pytest.approx([0.0075, 0.0072, 0.007], abs=1e-9)
    assert shaped_loss(rewards, "l1", 2.0).tolist() == [3.0, 1.5, 0.5]
    assert shaped_loss(rewards).tolist() == [1.0, -0.5, -2.5]
    with pytest.raises(ValueError, match="shape: expected one of negative"):
        shaped_loss(rewards, "square")


GOLDEN = {1: -0.936883725524, 2: -2.493724884521, 3: -4.074008508365, 4: -6.712760240593}
STOPPED = {1: -0.936883725524, 2: -2.605670504878, 3: -4.501986554196, 4: -8.052496811413}


@pytest.mark.parametrize("live", [1, 2, 3, 4])
@pytest.mark.parametrize(("stop", "golden"), [(False, GOLDEN), (True, STOPPED)])
def test_h4b_gradient_through_a_chain(live: int, stop: bool, golden: dict[int, float]) -> None:
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    first = 4 - live
    with torch.no_grad():
        sample, _ = sampler_steps(linear(theta), SCHEDULE, start(), TIMES[:first], NEXT[:first])
    final, steps = sampler_steps(
        linear(theta), SCHEDULE, sample, TIMES[first:], NEXT[first:], stop_input_gradient=stop
    )
    assert float(final.detach()) == pytest.approx(3.908806276913, abs=1e-9) and len(steps) == live
    (slope,) = torch.autograd.grad(final.sum(), theta)
    assert float(slope) == pytest.approx(golden[live], abs=1e-9)


def test_h4c_refl() -> None:
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        sample, _ = sampler_steps(linear(theta), SCHEDULE, start(), TIMES[:2], NEXT[:2])
    assert float(sample) == pytest.approx(3.924360069484, abs=1e-9)
    clean = SCHEDULE.to_x0(theta * sample, sample, TIMES[2:3])
    assert float(clean.detach()) == pytest.approx(3.919778410976, abs=1e-9)
    (slope,) = torch.autograd.grad(clean.sum(), theta)
    assert float(slope) == pytest.approx(-2.569096724667, abs=1e-9)


def test_h4d_lv() -> None:
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.5, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    time = torch.zeros(2, dtype=torch.long)
    noisy = SCHEDULE.add_noise(torch.full_like(noise, 1.2), noise, time)
    assert noisy.flatten().tolist() == pytest.approx([1.281418720250, 0.946008523627], abs=1e-9)
    clean = SCHEDULE.to_x0(theta * noisy, noisy, time).flatten()
    assert clean.tolist() == pytest.approx([1.226514582100, 0.905475494221], abs=1e-9)
    slopes = [float(torch.autograd.grad(x, theta, retain_graph=True)[0]) for x in clean]
    assert slopes == pytest.approx([-0.293977616102, -0.217029239696], abs=1e-9)


def backprop(folder: Path, family: str = "sd", **options: Any) -> Any:
    values: dict[str, Any] = {"rows": pair_rows(4), "peft_config": lora_config(), "seed": 1}
    values |= {"per_device_train_batch_size": 2, "num_inference_steps": 4} | options
    return make_trainer(folder, family, "reward_backprop", **values)


def gradient(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.setup()
    batch = trainer.prepare(first_batch(trainer))
    loss, _ = trainer.compute_loss(batch)
    trainer.network.zero_grad()
    loss.mean().backward()
    named = trainer.network.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


MODES: list[dict[str, Any]] = [
    {"mode": "refl"},
    {"mode": "refl", "refl_steps": [0.25, 0.75], "eta": 1.0},
    {"mode": "draft"},
    {"mode": "draft_k", "live_steps": 2},
    {"mode": "draft_lv", "lv_samples": 3},
    {"mode": "alignprop", "eta": 1.0},
    {"mode": "alignprop", "alignprop_start": "uniform", "stop_input_gradient": True},
]


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_mode_trains_the_network_alone(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if family == "sd3" and options.get("eta"):
        options = options | {"eta": 0.7}
    trainer = backprop(tmp_path, family, max_steps=2, kl_weight=0.1, **options)
    scorer = trainer.reward.scorer
    trainer.setup()
    frozen = all_tensors(trainer.backbone.component("vae"))
    before, weight = trained_tensors(trainer), scorer.tower.weight.clone()
    trainer.train()
    assert_same_tensors(all_tensors(trainer.backbone.component("vae")), frozen)
    assert torch.equal(scorer.tower.weight, weight) and scorer.tower.weight.grad is None
    after = trained_tensors(trainer)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    entry = trainer.state.log_history[-1]
    assert 0 <= entry["pixels/clamped"] <= 1 and entry["kl"] >= 0


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_reward_rises(family: str, tmp_path: Path) -> None:
    trainer = backprop(
        tmp_path, family, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4
    )
    before = trainer.evaluate(pair_rows(4))
    trainer.train()
    after = trainer.evaluate(pair_rows(4))
    assert after["eval/soft_brightness"] > before["eval/soft_brightness"]


def test_samples_are_those_of_the_pipelines_sampler(tmp_path: Path) -> None:
    """The steps before the live ones and these together are one rollout."""
    values = {}
    for mode in ({"mode": "draft"}, {"mode": "draft_k", "live_steps": 1}, {"mode": "alignprop"}):
        trainer = backprop(tmp_path / mode["mode"], **mode)
        batch = trainer.prepare(first_batch(trainer))
        with torch.no_grad(), sampling_mode(trainer.network):
            values[mode["mode"]] = trainer._images(batch)[0]
    for latents in values.values():
        torch.testing.assert_close(latents, values["draft"], rtol=1e-4, atol=1e-4)


def test_limits(tmp_path: Path) -> None:
    _, whole = gradient(backprop(tmp_path / "draft", mode="draft"))
    _, all_steps = gradient(backprop(tmp_path / "all", mode="draft_k", live_steps=4))
    assert_same_tensors(whole, all_steps)
    _, one = gradient(backprop(tmp_path / "one", mode="draft_k", live_steps=1))
    fixed = {"mode": "alignprop", "start_mean": 0.75 + 1e-6, "start_std": 1e-9}
    _, last = gradient(backprop(tmp_path / "last", **fixed))
    assert_same_tensors(one, last)
    _, doubled = gradient(backprop(tmp_path / "doubled", live_steps=1, reward_weight=2.0))
    assert_close_tensors(
        doubled, {name: 2 * value for name, value in one.items()}, rtol=1e-4, atol=1e-8
    )
    assert any(not torch.equal(one[name], whole[name]) for name in one)


def test_a_constant_reward_gives_no_gradient(tmp_path: Path) -> None:
    trainer = backprop(tmp_path)
    trainer.reward.scorer.tower.weight.zero_()
    _, values = gradient(trainer)
    assert values and all(not value.any() for value in values.values())


@pytest.mark.parametrize("mode", ["draft_k", "draft_lv", "alignprop"])
def test_a_step_does_not_depend_on_its_split(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": mode, "max_steps": 2}
    whole = backprop(tmp_path / "whole", per_device_train_batch_size=4, **options)
    parts = backprop(
        tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options
    )
    whole.train(), parts.train()
    assert_close_tensors(trained_tensors(whole), trained_tensors(parts), rtol=1e-2, atol=2e-4)


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    _, plain = gradient(backprop(tmp_path / "plain", live_steps=2))
    _, saved = gradient(backprop(tmp_path / "saved", live_steps=2, gradient_checkpointing=True))
    assert_close_tensors(plain, saved, rtol=1e-4, atol=1e-7)


def test_drawn_starts(tmp_path: Path) -> None:
    for options, allowed in (
        ({"mode": "refl", "num_inference_steps": 40}, range(30, 40)),
        ({"mode": "alignprop", "num_inference_steps": 50}, range(1, 50)),
        ({"mode": "alignprop", "alignprop_start": "uniform"}, range(4)),
        ({"mode": "draft_k", "live_steps": 3}, [1]),
        ({"mode": "draft"}, [0]),
    ):
        trainer = backprop(tmp_path, **options)
        starts = []
        for step in range(300):
            trainer.state.global_step = step
            starts.append(trainer.first_live_step())
        assert set(starts) <= set(allowed)
        if options["mode"] == "alignprop" and options.get("num_inference_steps") == 50:
            mean = sum(starts) / len(starts)
            assert 40 < mean < 43 and len(set(starts)) > 10
        elif options["mode"] in ("refl", "alignprop"):
            assert set(starts) == set(allowed)


def test_data_keep_their_error(tmp_path: Path) -> None:
    trainer = backprop(tmp_path, pretrain_weight=0.5, max_steps=1)
    assert trainer.train_dataset.kind == "single"
    batch = trainer.prepare(first_batch(trainer))
    loss, metrics = trainer.compute_loss(batch)
    errors = trainer.policy.errors(batch)[:, 0]
    torch.testing.assert_close(metrics["errors/data"], errors.detach())
    torch.testing.assert_close(loss, -metrics["reward"] + 0.5 * errors)


# Panels


def panel(rule: Any = "weighted_sum", watch: bool = False, **options: Any) -> Any:
    entries: list[dict[str, Any]] = [
        {"name": "soft", "scorer": SoftBrightness(), "weight": 3.0},
        {"name": "again", "scorer": SoftBrightness(), "weight": 1.0},
    ]
    if watch:
        entries.append({"name": "truth", "scorer": "jpeg_compressibility", "role": "eval"})
    for entry in entries[:2]:
        entry["normalize"] = {"kind": "affine", "mean": 0.25, "std": 0.5}
    return Panel(entries, rule, **options)


def test_a_panel_is_a_weighted_sum(tmp_path: Path) -> None:
    pixels = torch.rand(3, 3, 16, 16, requires_grad=True)
    score = SoftBrightness().score_tensor(pixels, ["a"] * 3)
    combined = panel().score_tensor(pixels, ["a"] * 3)
    torch.testing.assert_close(combined.float(), (score - 0.25) / 0.5 * 4)
    (slope,) = torch.autograd.grad(combined.sum(), pixels)
    assert (slope != 0).all()
    trainer = backprop(
        tmp_path, max_steps=2, logging_steps=2, options={"scorers": panel(watch=True)}
    )
    trainer.train()
    assert "watched/truth" in trainer.state.log_history[-1]
    assert {"eval/soft", "eval/again", "eval/truth"} <= trainer.evaluate(pair_rows(1)).keys()


def test_what_gives_no_gradient_is_refused(tmp_path: Path) -> None:
    for scorers, words in (
        ("shapes", r"shapes gives no gradient; take one of .*shapes-clip"),
        (panel("winrate"), "combine.method: winrate compares images and has no gradient"),
        (
            panel({"method": "min", "center": True}),
            "combine.method: centred min compares images .* mean_minus_std without center",
        ),
        (panel(placement="offload"), "placement: offload frees a scorer"),
        ([SoftBrightness(), SoftBrightness()], "2 scorers have no common scale"),
        (lambda images, prompts: torch.zeros(len(images)), "gives no gradient"),
        ([], "scorers"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            backprop(tmp_path, options={"scorers": scorers})
    entries = [{"name": "truth", "scorer": "shapes", "normalize": "none"}]
    with pytest.raises(ConfigError, match=r"truth \(shapes\) gives no gradient; give it the role"):
        backprop(tmp_path, options={"scorers": Panel(entries, {"method": "weighted_sum"})})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"live_steps": 0}, "live_steps"),
        ({"live_steps": 60}, r"live_steps: expected at most num_inference_steps \(50\), got 60"),
        ({"mode": "draft_lv", "eta": 1.0}, "draft_lv adds noise of its own"),
        ({"refl_steps": [0.9, 0.2]}, "refl_steps: expected two shares, the smaller one first"),
        ({"refl_steps": [0.9, 1.2]}, "refl_steps"),
        ({"reward_weight": 0.0}, "reward_weight: 0 leaves no reward"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RewardBackpropConfig(**options)


def test_the_cost_is_told_beforehand(tmp_path: Path) -> None:
    trainer = backprop(tmp_path, live_steps=3)
    notes = "\n".join(trainer.notes)
    assert "graph: up to 3 passes of 4 rows" in notes and "gradient_checkpointing" in notes
    assert not any("WARNING" in note for note in backprop(tmp_path, live_steps=1).notes)
