"""DiffusionNFT, AWM and DGPO: golden values, gradients, what is drawn and with which
weights, resumed rounds, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import brightness, lora_config, make_trainer, next_batch, ranked_rows

from diffalign import AWMConfig, DiffusionNFTConfig
from diffalign.errors import ConfigError, UserError
from diffalign.likelihood import VariancePreserving
from diffalign.methods.awm import awm_log_probs, awm_loss, stratified_steps
from diffalign.methods.dgpo import dgpo_loss
from diffalign.methods.diffusion_nft import nft_loss, old_decay, optimality, trained_times


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(values: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(values, double(expected), rtol=0, atol=atol)


# DiffusionNFT, golden H5e: a flow at t = 0.6
X0, NOISE = double([[1.0, -1.0, 0.5, 0.0]]), double([[0.5, -0.5, 1.0, -1.0]])
NOISY = 0.4 * X0 + 0.6 * NOISE


def flow_x0(velocity: torch.Tensor) -> torch.Tensor:
    return NOISY - 0.6 * velocity


OLD = 0.5 * NOISY + 0.1
POLICY = 0.6 * NOISY + 0.05


@pytest.mark.parametrize(
    ("r", "expected"), [(0.8, 2.540667), (0.0, 2.50896), (1.0, 2.54859375), (0.5, 2.528776875)]
)
def test_h5e_of_a_flow(r: float, expected: float) -> None:
    close(NOISY, [[0.7, -0.7, 0.8, -0.6]])
    loss = nft_loss(flow_x0(POLICY), flow_x0(OLD), X0, double([r]), beta=1.0)
    close(5 * loss, [expected])


def test_h5e_with_another_beta_and_kl() -> None:
    loss = nft_loss(flow_x0(POLICY), flow_x0(OLD), X0, double([0.8]), beta=0.1)
    close(loss, [5.049017998664])
    close(5 * loss, [25.245089993321])
    close((POLICY - 0.4 * NOISY).square().mean(), 0.0233)


@pytest.mark.parametrize("r", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_h5e_at_the_old_policy_the_gradient_is_that_of_fine_tuning(r: float, beta: float) -> None:
    velocity = OLD.clone().requires_grad_()
    loss = nft_loss(flow_x0(velocity), flow_x0(OLD), X0, double([r]), beta=beta)
    close(5 * loss.detach() * beta, [2.526])
    loss.sum().backward()
    assert velocity.grad is not None
    close(velocity.grad, ((2 * r - 1) / 0.6 * double([[0.2736, -0.216, 0, 0.2304]])).tolist())


def test_h5e_of_a_model_that_predicts_noise() -> None:
    noisy = 0.8 * X0 + 0.6 * NOISE
    old, policy = ((noisy - 0.6 * eps) / 0.8 for eps in (0.5 * noisy, 0.55 * noisy + 0.02))
    close(old, [[0.9625, -0.9625, 0.875, -0.525]])
    close(policy, [[0.90625, -0.93625, 0.8225, -0.5175]])
    close(nft_loss(policy, old, X0, double([0.8]), beta=1.0), [0.402804895762])


def test_h5e_optimality_and_decay() -> None:
    advantages = double([-7, -2.5, 0, 1, 5])
    close(optimality(advantages), [0, 0.25, 0.5, 0.6, 1])
    close(optimality(advantages, mode="positive_only"), [0.5, 0.5, 0.5, 0.6, 1])
    close(optimality(advantages, mode="negative_only"), [0, 0.25, 0.5, 0.5, 0.5])
    close(optimality(advantages, mode="one_only"), [0.5, 0.5, 0.5, 0.6, 0.6])
    close(optimality(advantages, mode="binary"), [0.4, 0.4, 0.5, 0.6, 0.6])
    with pytest.raises(ValueError, match="mode: expected one of all, .* got 'best'"):
        optimality(advantages, mode="best")
    first = {"start": 0, "rate": 0.001, "largest": 0.5}
    assert [old_decay(step, **first) for step in (100, 600)] == [0.1, 0.5]
    second = {"start": 75, "rate": 0.0075, "largest": 0.999}
    assert [old_decay(step, **second) for step in (75, 100, 300)] == [0, 0.1875, 0.999]
    assert trained_times(10) == 9 and trained_times(100) == 99


# AWM, golden H5f
ERRORS, OLD_ERRORS = double([0.04, 0.09, 0.02, 0]), double([0.05, 0.08, 0.03, 0])
TIMES, ADVANTAGES = double([0.5, 0.5, 0.9, 0.9]), double([1, -1, 2, -6])


def awm(weighting: str, **options: float) -> torch.Tensor:
    values = [awm_log_probs(errors, TIMES, weighting) for errors in (ERRORS, OLD_ERRORS)]
    return awm_loss(values[0], values[1], ADVANTAGES, **options)


def test_h5f_losses() -> None:
    loss = awm("uniform")
    close(loss, [-0.202010033417, 0.198009966750, -0.404020066834, 1])
    close(loss.mean(), 0.147994966625)
    for weighting, mean in {
        "t": 0.148595935739,
        "t2": 0.148936710364,
        "huber": 0.146077394269,
        "ghuber": 0.130265177323,
    }.items():
        close(awm(weighting).mean(), mean)
    close(
        awm_log_probs(ERRORS, TIMES, "ghuber"),
        [-0.888102636239, -1.089120559990, -1.342432915630, 0],
    )
    close(awm("ghuber"), [-0.210530762895, 0.193742785412, -0.462151313222, 1])
    close(awm("ghuber", adv_max=5.0, clip_range=1e-5), [-1.00001, 0.99999, -2.00002, 5])
    with pytest.raises(ValueError, match="weighting: expected one of uniform, .* got 't3'"):
        awm("t3")


def test_stratified_steps_are_those_of_the_official_grid() -> None:
    low = stratified_steps(14, 6, torch.zeros(6))
    high = stratified_steps(14, 6, torch.full((6,), 0.999999))
    assert low.tolist() == [1, 2, 4, 6, 8, 10] and high.tolist() == [1, 3, 5, 7, 9, 11]
    few = stratified_steps(4, 2, torch.rand(50, 2))
    assert int(few.min()) >= 1 and int(few.max()) <= 2


# DGPO
def test_dgpo_golden() -> None:
    policy, reference = double([[0.1, 0.102, 0.2, 0.1]]), double([[0.1005, 0.101, 0.199, 0.1004]])
    loss = dgpo_loss(policy, reference, double([[1.5, -0.5, -1.2, 0.2]]), beta=100.0)
    close(loss, [[0.072628915420, -0.024693831243, -0.116206264672, 0.009683855389]])
    close(loss.mean(), -0.014646831276)
    policy, reference = double([[0.1, 0.102]]), double([[0.1005, 0.101]])
    pair = dgpo_loss(policy, reference, double([[1.0, -1.0]]), beta=5000.0)
    close(pair, [[0.002297736991, -0.002343691731]])


def test_dgpo_of_a_pair_is_diffusion_dpo_over_beta() -> None:
    from diffalign.methods.diffusion_dpo import diffusion_dpo_loss

    reference = double([[0.1005, 0.101]])
    gradients = []
    for loss_of in (
        lambda m: dgpo_loss(m, reference, double([[1.0, -1.0]]), beta=500.0).mean(),
        lambda m: diffusion_dpo_loss(m, reference, beta=500.0).mean() / 500.0,
    ):
        errors = double([[0.1, 0.102]]).requires_grad_()
        loss_of(errors).backward()
        assert errors.grad is not None
        gradients.append(errors.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=0)


def test_dgpo_leaves_padding_out(tmp_path: Path) -> None:
    errors = torch.rand(1, 3, dtype=torch.float64)
    sizes = double([[1.0, -1.0, torch.nan]])
    loss = dgpo_loss(errors, errors + 0.1, sizes, beta=10.0)
    short = dgpo_loss(errors[:, :2], errors[:, :2] + 0.1, sizes[:, :2], beta=10.0)
    assert float(loss[0, 2]) == 0.0
    torch.testing.assert_close(loss[:, :2], short)
    with pytest.raises(ValueError, match="advantages: expected one per image"):
        dgpo_loss(errors, errors, sizes[:, :2], beta=10.0)
    rows = ranked_rows(4)
    rows[0] = {**rows[0], "images": rows[0]["images"][:2], "scores": rows[0]["scores"][:2]}
    make_trainer(
        tmp_path, method="dgpo", rows=rows, peft_config=lora_config(), max_steps=2,
        per_device_train_batch_size=4,
    ).train()  # fmt: skip


# Trainers
FAST = {"num_inference_steps": 4, "images_per_prompt": 2, "per_device_train_batch_size": 2}


def small(folder: Path, method: str, family: str = "sd3", **options: Any) -> Any:
    options = {"peft_config": lora_config(), **FAST, **options}
    return make_trainer(folder, family, method, **options)


@pytest.mark.parametrize("method", ["awm", "diffusion_nft"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("solver", ["default", "DPMSolverMultistepScheduler"])
def test_only_final_latents_are_kept_and_the_times_are_the_samplers(
    method: str, family: str, solver: str, tmp_path: Path
) -> None:
    trainer = small(tmp_path, method, family, solver=solver, kl_weight=0.5)
    batch = next_batch(trainer)
    assert batch.extra["samples"].shape[:2] == (2, 2) and batch.extra["samples"].ndim == 5
    assert "states" not in batch.extra
    batches = list(trainer.micro_batches(batch))
    assert len(batches) == trainer.passes_per_batch == 2
    noises = [micro.noise for micro in batches]
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0][:, 0], noises[0][:, 1])
    for micro in batches:
        assert set(micro.times.tolist()) <= set(trainer.rollout.grid.times[:3].tolist())
        loss, metrics = trainer.compute_loss(micro)
        assert loss.shape == (2,) and loss.requires_grad
        assert float(metrics["policy/kl"].abs().max()) == 0.0


def test_two_solvers_end_near_each_other(tmp_path: Path) -> None:
    """At many steps, solvers of first and second order draw the same images."""
    for family in ("sd", "sd3"):
        ends = []
        for solver in ("default", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
            trainer = small(
                tmp_path, "diffusion_nft", family, solver=solver, num_inference_steps=100,
                times_per_image=1,
            )  # fmt: skip
            ends.append(next_batch(trainer).extra["samples"])
        size = ends[0].abs().mean()
        for end in ends[1:]:
            assert float((end - ends[0]).abs().mean() / size) < 0.02, family


def test_at_the_old_policy_nft_is_weighted_fine_tuning(tmp_path: Path) -> None:
    trainer = small(tmp_path, "diffusion_nft", kl_weight=0.0)
    micro = next(trainer.micro_batches(next_batch(trainer)))
    loss, _ = trainer.compute_loss(micro)
    loss.sum().backward()
    gradients = {
        n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None
    }
    trainer.network.zero_grad()
    output, noisy, times = trainer.output_at(micro, trainer.policy)
    x0 = micro.x0.flatten(0, 1)
    difference = trainer.schedule.to_x0(output, noisy, times) - x0
    size = difference.detach().abs().flatten(1).mean(1)
    each = difference.square().flatten(1).mean(1) / size
    good = optimality(micro.extra["advantages"]).flatten()
    (5.0 * (2 * good - 1) * each).view(2, 2).mean(1).sum().backward()
    for name, parameter in trainer.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_nft_leaves_images_without_a_score_out(tmp_path: Path) -> None:
    """Their optimality is 1/2, which would be a judgement."""
    trainer = small(tmp_path, "diffusion_nft", kl_weight=0.5)
    micro = next(trainer.micro_batches(next_batch(trainer)))
    assert micro.extra["judged"].all()
    micro.extra["judged"][0, 0] = 0.0
    loss, metrics = trainer.compute_loss(micro)
    micro.x0[0, 0] = 77.0  # as little as it does in the loss
    again, _ = trainer.compute_loss(micro)
    torch.testing.assert_close(loss[0], again[0], rtol=1e-4, atol=1e-5)
    micro.extra["judged"][0] = 0.0
    assert float(trainer.compute_loss(micro)[0][0].detach()) == 0.0 and "policy/kl" in metrics


def test_the_old_policy_draws_and_follows(tmp_path: Path) -> None:
    trainer = small(
        tmp_path, "diffusion_nft", max_steps=4, learning_rate=1e-2, decay_rate=0.25, max_decay=0.5
    )
    moved: list[float] = []
    trainer.setup()
    start = {n: w.clone() for n, w in trainer.old.weights.items()}
    expected = {n: w.clone() for n, w in start.items()}

    run = type(trainer).on_optimizer_step

    def after(step: int) -> None:
        decay = old_decay(step, start=0, rate=0.25, largest=0.5)
        for name, parameter in trainer.old.parameters.items():
            expected[name].lerp_(parameter.detach(), 1 - decay)
        run(trainer, step)
        moved.append(trainer.old.decay)

    trainer.on_optimizer_step = after
    trainer.train()
    assert moved == [0.25, 0.5, 0.5, 0.5]
    for name, weights in trainer.old.weights.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-7)
    b = [n for n in start if "lora_B" in n]
    assert any(not torch.equal(start[n], trainer.old.weights[n]) for n in b)
    assert any(
        not torch.equal(trainer.old.parameters[n].detach(), trainer.old.weights[n]) for n in b
    )
    # It draws with these weights, and not with those of the policy.
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    drawn, _ = trainer.sample(batch)
    with trainer.old.in_place(trainer.old.weights):
        again = trainer.policy_sampler(trainer.sampler_config())(batch, 2, None, "rollout")[0]
    assert torch.equal(drawn.final, again.final)
    assert not torch.equal(
        drawn.final, trainer.policy_sampler(trainer.sampler_config())(batch, 2, None, "rollout")[
            0
        ].final
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("diffusion_nft", {"max_decay": 0.9, "decay_rate": 0.3}),
        ("awm", {"max_decay": 0.9, "average_rate": 0.3}),
        ("awm", {"off_policy": True, "max_decay": 0.9, "average_rate": 0.3}),
        ("awm", {"average_weight": 0.0, "kl_weight": 0.0}),
    ],
)
def test_a_run_resumed_in_a_round_is_the_uninterrupted_one(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    common = {
        "max_steps": 4,
        "save_steps": 1,
        "save_total_limit": None,
        "steps_per_round": 2,
        "learning_rate": 1e-2,
        **options,
    }
    small(tmp_path / "a", method, "sd", **common).train()
    for stop in (1, 2, 3):
        resumed = small(
            tmp_path / f"b{stop}", method, "sd",
            resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"), **common,
        )  # fmt: skip
        resumed.train()
        one, two = (
            load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("a", f"b{stop}")
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
    logged = [json.loads(line) for line in (tmp_path / "a/logs/metrics.jsonl").open()]
    if method == "awm" and not options.get("off_policy"):
        ratios = [entry["policy/log_ratio"] for entry in logged]
        assert ratios[0] < 1e-6 < ratios[1] and ratios[2] < 1e-6 < ratios[3]


def test_an_evaluation_measures_the_policy_and_not_what_draws(tmp_path: Path) -> None:
    trainer = small(
        tmp_path, "diffusion_nft", max_steps=3, learning_rate=5e-2, decay_rate=0.9, max_decay=0.9
    )
    trainer.train()
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    drawn, _ = trainer.sample(batch, purpose="evaluation")
    policy = trainer.policy_sampler(trainer.sampler_config())(batch, 2, None, "evaluation")[0]
    old = trainer.sampler(batch, 2, None, "evaluation")[0]
    assert torch.equal(drawn.final, policy.final) and not torch.equal(drawn.final, old.final)


def test_full_fine_tuning_keeps_an_old_copy(tmp_path: Path) -> None:
    for method in ("awm", "diffusion_nft"):
        trainer = small(tmp_path / method, method, "sd", peft_config=None, max_steps=2)
        trainer.train()
        part = trainer.old if method == "diffusion_nft" else trainer.average
        assert set(part.weights) == {n for n, _ in trainer.network.named_parameters()}


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="images_per_prompt: 1 has nothing to be compared"):
        DiffusionNFTConfig(images_per_prompt=1)
    with pytest.raises(ConfigError, match="eta: UniPCMultistepScheduler is deterministic"):
        AWMConfig(eta=0.5, solver="UniPCMultistepScheduler")
    with pytest.raises(ConfigError, match="solver: expected one of default, DPMSolver"):
        AWMConfig(solver="euler")
    with pytest.raises(ConfigError, match="times_per_image: expected at most 9, of 10 steps"):
        DiffusionNFTConfig(times_per_image=10)
    with pytest.raises(ConfigError, match="times_per_image: expected at most 2, of 4 steps"):
        AWMConfig(num_inference_steps=4)
    with pytest.raises(UserError, match="needs a judge: name scorers"):
        small(tmp_path, "awm", options={"scorers": []})

    def silent(images: Any, prompts: Any) -> torch.Tensor:
        return torch.full((len(images),), torch.nan)

    with pytest.raises(UserError, match="gave no score for any image"):
        small(tmp_path, "diffusion_nft", options={"scorers": [silent]}).train()


def test_solver_times_are_the_grids(tmp_path: Path) -> None:
    from diffalign.training.online.solvers import build_solver

    for family in ("sd", "sd3"):
        trainer = small(tmp_path, "awm", family)
        grid, schedule = trainer.sampling_grid(), trainer.schedule
        solver = build_solver("DPMSolverMultistepScheduler", schedule, grid.times)
        assert len(solver.timesteps) == 4 and float(solver.sigmas[-1]) == 0.0
        if isinstance(schedule, VariancePreserving):
            assert solver.timesteps.tolist() == grid.times.tolist()
            alpha, sigma = schedule.alpha_sigma(grid.times)
            torch.testing.assert_close(solver.sigmas[:-1], (sigma / alpha).float())
        else:
            torch.testing.assert_close(solver.sigmas[:-1], grid.times.float())
            assert 0.9999 < float(solver.sigmas[0]) < 1.0  # its logarithm is finite


def test_the_judge_is_logged(tmp_path: Path) -> None:
    trainer = small(tmp_path, "diffusion_nft", "sd", max_steps=1)
    trainer.train()
    logged = json.loads((tmp_path / "logs/metrics.jsonl").read_text().splitlines()[0])
    assert {"judge/advantage", "judge/equal_groups", "policy/optimality"} <= set(logged)
    assert any(name.startswith("judge/score") for name in logged)
    assert brightness([], []).numel() == 0
