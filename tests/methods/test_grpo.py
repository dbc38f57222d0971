"""GRPO: golden H5c and H5d, the guard's ratio, windows, rounds, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import brightness, build_pipeline, lora_config, make_trainer, next_batch

from diffalign import GRPOConfig, GRPOTrainer, register_scorer
from diffalign.errors import ConfigError, UserError
from diffalign.likelihood import flow_sde_step, gaussian_log_prob
from diffalign.methods.grpo import grpo_loss, guard_log_ratios, step_kl, window_steps
from diffalign.training.online.rollout import transition


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(values: torch.Tensor, expected: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(values, double(expected), rtol=0, atol=atol)


def test_h5c_clipped_loss() -> None:
    new = double([-0.12, -0.10, -0.15, -0.11]).requires_grad_()
    old = double([-0.12005, -0.0997, -0.1503, -0.11])
    loss = grpo_loss(new - old, double([1.5, -1.2, 0.7, -6]), clip_range=1e-4)
    close(loss, [-1.500075001875, 1.19988, -0.70007, 5])
    close(loss.mean(), 0.999933749531)
    loss.sum().backward()
    assert new.grad is not None
    close(new.grad, [-1.500075001875, 0, 0, 5])
    ratios = double([1.5, 0.5, 1.5, 0.5]).log()
    close(grpo_loss(ratios, double([1, 1, -1, -1]), clip_range=0.2), [-1.2, -0.5, 1.5, 0.8])


def test_at_the_old_policy_the_gradient_is_the_advantage() -> None:
    log_probs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = grpo_loss(log_probs, double([2.0, 0.0, -0.5]))
    close(loss.detach(), [-2.0, 0.0, 0.5])
    loss.sum().backward()
    assert log_probs.grad is not None
    close(log_probs.grad, [-2.0, 0.0, 0.5])


def h5b(velocity: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return flow_sde_step(
        model_output=double([velocity]),
        sample=double([[1.0, -0.5]]),
        sigma=0.8,
        sigma_prev=0.7,
        eta=0.7,
    )


def test_h5d_divergences() -> None:
    (mean, std), (ref_mean, _) = h5b([0.2, 0.4]), h5b([0.25, 0.3])
    close((mean - ref_mean).square().mean(), 9.68765625e-05)
    pair = {"policy": mean, "reference": ref_mean}
    close(step_kl("x", **pair, std=std, dt=double([-0.1])), [2.471340880e-05], 1e-14)
    close(step_kl("exact", **pair, std=std, dt=double([-0.1])), [2.471340880e-04], 1e-13)
    outputs = {"policy": double([[0.2, 0.4]]), "reference": double([[0.25, 0.3]])}
    close(step_kl("v", **outputs), [0.00625])
    for kind in ("x", "exact"):
        same = step_kl(kind, policy=mean, reference=mean, std=std, dt=double([-0.1]))
        assert same.tolist() == [0.0]
    with pytest.raises(ValueError, match="kind: expected x, exact or v, got 'k3'"):
        step_kl("k3", **pair)
    with pytest.raises(ValueError, match="x: needs std and dt"):
        step_kl("x", **pair, std=std)


def test_the_guard_is_unbiased() -> None:
    (mean, std), (old_mean, _) = h5b([0.2, 0.4]), h5b([0.25, 0.3])
    sample = double([[0.9, -0.6]])
    new, old = (gaussian_log_prob(sample, m, std) for m in (mean, old_mean))
    close((new - old).exp(), [1.004549844925])
    close(guard_log_ratios(new, old, mean, old_mean, std).exp(), [1.002121391584])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((100_000, 2), generator=generator, dtype=torch.float64)
    many = old_mean + std * noise
    means = [m.expand_as(many) for m in (mean, old_mean)]
    probs = [gaussian_log_prob(many, m, std) for m in means]
    plain = float((probs[0] - probs[1]).mean())
    guarded = guard_log_ratios(probs[0], probs[1], means[0], means[1], std)
    bias = -float((mean - old_mean).square().mean() / (2 * std.square()))
    assert plain == pytest.approx(bias, abs=3e-4)
    assert float(guarded.mean()) == pytest.approx(0.0, abs=1.5e-4)


def test_windows() -> None:
    steps = torch.tensor([1, 2, 4, 7, 8])
    assert window_steps(steps, None, "random", 3, seed=0) is steps

    def rounds(kind: str, count: int = 2, seed: int = 0) -> list[list[int]]:
        drawn = [window_steps(steps, count, kind, n, seed=seed, rounds=2) for n in range(40)]
        return [window.tolist() for window in drawn]

    assert rounds("progressive")[:10] == [
        [1, 2], [1, 2], [2, 4], [2, 4], [4, 7], [4, 7], [7, 8], [7, 8], [1, 2], [1, 2],
    ]  # fmt: skip
    assert {tuple(w) for w in rounds("consecutive")} == {(1, 2), (2, 4), (4, 7), (7, 8)}
    assert len({tuple(w) for w in rounds("random")}) == 10
    assert all(w == sorted(w) for w in rounds("random"))
    assert rounds("random") == rounds("random") != rounds("random", seed=1)


def micro(trainer: Any) -> list[Any]:
    return list(trainer.micro_batches(next_batch(trainer)))


FAST = {"num_inference_steps": 4, "images_per_prompt": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("family", "dynamics"),
    [("sd", "ddim"), ("sd3", "flow_sde"), ("sd3", "dance_sde"), ("sd3", "cps")],
)
def test_recorded_log_probabilities_are_recomputed(
    family: str, dynamics: str, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, family, "grpo", peft_config=lora_config(), dynamics=dynamics, eta=0.6,
        kl_weight=0.1, kl_type="exact" if dynamics != "cps" else "v", **FAST,
    )  # fmt: skip
    batches = micro(trainer)
    # The last step of a flow is not trained. That of this UNet has noise.
    trained = 4 if family == "sd" else 3
    assert len(batches) == trainer.trained_steps == trained
    seen = set()
    for batch in batches:
        policy = trainer.step_log_probs(batch, trainer.policy)
        torch.testing.assert_close(
            policy.detach(), batch.extra["recorded"].to(policy), rtol=1e-5, atol=1e-5
        )
        seen |= set(batch.times.tolist())
        loss, metrics = trainer.compute_loss(batch)
        expected = -batch.extra["advantages"].mean(1)
        torch.testing.assert_close(loss.detach(), expected.to(loss), rtol=1e-3, atol=1e-3)
        assert float(metrics["policy/kl"].abs().max()) == 0.0
    assert seen == set(trainer.rollout.grid.times[:trained].tolist())


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_only_the_window_is_stochastic(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, family, "grpo", peft_config=lora_config(), num_sde_steps=1, shared_init=True,
        window="progressive", window_rounds=1, **FAST,
    )  # fmt: skip
    trainer.setup()
    for number in (0, 1, 2, 3):
        trainer.begin_round(number)
        batch = next(trainer.source.unsampled(trainer.data_pipeline))
        drawn, scores = trainer.sample(batch)
        window = number % (4 if family == "sd" else 3)
        known = ~torch.isnan(drawn.log_probs).all(dim=0).all(dim=0)
        assert known.nonzero()[:, 0].tolist() == [window]
        states = drawn.states
        # Images of a prompt share their initial noise, so they part at the window. The
        # other states are not held.
        same = (states - states[:, :1]).abs().flatten(3).amax((0, 1, 3)) == 0
        held = sorted({window, window + 1, 4})
        assert drawn.state_numbers.tolist() == held
        assert same.tolist() == [step <= window for step in held]
        whole = trainer.finish_round(trainer.reward_function, [(batch, drawn, scores)])[0]
        for part in trainer.micro_batches(whole):
            assert set(part.times.tolist()) == {trainer.rollout.grid.times[window].item()}


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_steps_of_a_window_are_trained_at_their_own_states(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, family, "grpo", peft_config=lora_config(), num_sde_steps=2, ratio="guard", **FAST
    )
    trainer.setup()
    for number in range(4):
        trainer.begin_round(number)
        steps = trainer.usable_steps(trainer.rollout.grid)
        batch = next(trainer.source.unsampled(trainer.data_pipeline))
        drawn, scores = trainer.sample(batch)
        whole = trainer.finish_round(trainer.reward_function, [(batch, drawn, scores)])[0]
        assert whole.extra["means"].shape[2] == len(steps) == 2
        assert whole.extra["states"].shape[2] == len({*(steps + 1).tolist(), *steps.tolist(), 4})
        for part in trainer.micro_batches(whole):
            statistics = trainer.step_statistics(part, trainer.policy)
            recorded = part.extra["recorded"].to(statistics.log_probs)
            torch.testing.assert_close(statistics.log_probs, recorded, rtol=1e-5, atol=1e-5)
            means = part.extra["recorded_means"].flatten(0, 1).to(statistics.means)
            torch.testing.assert_close(statistics.means, means, rtol=1e-4, atol=1e-5)


def test_an_evaluation_draws_deterministically(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "sd3", "grpo", peft_config=lora_config(), shared_init=True, **FAST
    )
    trainer.setup()
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    drawn, _ = trainer.sample(batch, purpose="evaluation")
    assert torch.isnan(drawn.log_probs).all()
    assert torch.equal(drawn.final[:, 0], drawn.final[:, 1])


def test_the_unconditional_branch_can_be_left_without_gradient(tmp_path: Path) -> None:
    """Then the gradient is the conditional branch's times the guidance scale."""
    gradients = {}
    for name, options in {
        "whole": {"uncond_gradient": True},
        "conditional": {"uncond_gradient": False},
    }.items():
        trainer = make_trainer(
            tmp_path / name, "sd3", "grpo", peft_config=lora_config(), guidance_scale=3.0, **FAST,
            **options,
        )  # fmt: skip
        batch = micro(trainer)[0]
        statistics = trainer.step_statistics(batch, trainer.policy, **{
            "unconditional_gradient": options["uncond_gradient"]
        })  # fmt: skip
        statistics.outputs.sum().backward()
        gradients[name] = {
            n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None
        }
        outputs = statistics.outputs.detach()
        gradients[name]["outputs"] = outputs
    torch.testing.assert_close(
        gradients["whole"]["outputs"], gradients["conditional"]["outputs"], rtol=1e-4, atol=1e-5
    )
    rows = batch.condition
    k = batch.noisy.shape[1]
    conditional = trainer.policy.predict(
        batch.noisy.flatten(0, 1),
        trainer.schedule.model_times(batch.times.repeat_interleave(k)),
        {n: v.repeat_interleave(k, 0) for n, v in rows.items()},
    )
    trainer.network.zero_grad()
    (3.0 * conditional.float()).sum().backward()
    for name, parameter in trainer.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients["conditional"][name], parameter.grad, rtol=1e-3, atol=1e-5
            )
    differs = [
        not torch.allclose(gradients["whole"][n], gradients["conditional"][n], rtol=1e-2)
        for n in gradients["conditional"]
        if n != "outputs" and gradients["whole"][n].abs().max() > 1e-6
    ]
    assert any(differs)


def test_equal_scores_are_dropped_and_counted(tmp_path: Path) -> None:
    def judge(images: Any, prompts: Any) -> torch.Tensor:
        bright = "bright" in prompts[0]
        return brightness(images, prompts) if bright else torch.ones(len(images)).double()

    prompts = ["a bright cat", "a dark dog"]
    trainer = make_trainer(
        tmp_path, "sd", "grpo", peft_config=lora_config(), options={"scorers": [judge]},
        rows=[{"prompt": p} for p in prompts], rollout_batch_size=3, **FAST,
    )  # fmt: skip
    batch = next_batch(trainer)
    by_prompt = dict(zip(batch.prompts, batch.weights.tolist(), strict=True))
    assert by_prompt == {"a bright cat": 2.0, "a dark dog": 0.0}
    _, metrics = trainer.compute_loss(next(trainer.micro_batches(batch)))
    equal = dict(zip(batch.prompts, metrics["judge/equal_groups"].tolist(), strict=True))
    assert equal == {"a bright cat": 0.0, "a dark dog": 1.0}


def test_equal_scores_count_against_past_rewards(tmp_path: Path) -> None:
    def judge(images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([float("cat" in prompt) for prompt in prompts], dtype=torch.float64)

    trainer = make_trainer(
        tmp_path, "sd", "grpo", peft_config=lora_config(), options={"scorers": [judge]},
        rows=[{"prompt": p} for p in ("a cat", "a dog")], advantage="ddpo", **FAST,
    )  # fmt: skip
    batch = next_batch(trainer)
    assert batch.weights.tolist() == [1.0, 1.0]
    assert sorted(batch.extra["advantages"].mean(1).sign().tolist()) == [-1.0, 1.0]


def test_a_prompt_that_one_of_two_scorers_does_not_score_trains(tmp_path: Path) -> None:
    """As with the OCR reward, which scores prompts with quoted text alone."""

    @register_scorer("grpo-of-cats", requires=("image", "prompt"))
    def of_cats(images: Any, prompts: Any) -> list[float]:
        return [0.5 if "cat" in prompt else math.nan for prompt in prompts]

    rewards = {"rewards": ["grpo-of-cats", "jpeg_compressibility"]}
    for advantage, scored in (("flow_grpo", 2), ("mix_grpo", 1)):
        trainer = make_trainer(
            tmp_path / advantage, "sd", "grpo", peft_config=lora_config(), advantage=advantage,
            options={"scorers": rewards}, rows=[{"prompt": p} for p in ("a cat", "a dog")], **FAST,
        )  # fmt: skip
        batch = next_batch(trainer)
        assert int((batch.extra["advantages"].abs().sum(1) > 0).sum()) == scored
        assert int((batch.weights > 0).sum()) == scored


def test_one_infinite_reward_is_one_missing_score(tmp_path: Path) -> None:
    def judge(images: Any, prompts: Any) -> torch.Tensor:
        scores = torch.arange(len(images)).double()
        return scores.masked_fill(scores == 1, -torch.inf)

    trainer = make_trainer(
        tmp_path, "sd", "grpo", peft_config=lora_config(), options={"scorers": [judge]},
        rollout_batch_size=6, **FAST,
    )  # fmt: skip
    advantages = next_batch(trainer).extra["advantages"]
    assert advantages[0, 1] == 0
    assert advantages[0, 0] < 0 < advantages[0, 2] and (advantages[1] != 0).any()


def test_a_silent_group_of_one_process_is_reported_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffalign.training.online import policy_sampler

    trainer = make_trainer(tmp_path, "sd", "grpo", peft_config=lora_config(), **FAST)
    batch = next_batch(trainer)

    def finish() -> None:
        check = policy_sampler.RoundCheck(trainer.accelerator, trainer.reward_function)
        check.add(batch, [], torch.full((len(batch), 3, 1), torch.nan))
        check.finish()

    with pytest.raises(UserError, match="gave no score for any image of 2 prompts"):
        finish()
    # Another process has scores.
    gathered: list[Any] = [[], [("a bird", False)]]
    monkeypatch.setattr(policy_sampler, "gather_object", lambda rows: rows + gathered.pop(0))
    finish()
    assert capsys.readouterr().out.count("no score for any image of") == 2


def test_an_image_without_a_score_has_no_advantage(tmp_path: Path) -> None:
    def judge(images: Any, prompts: Any) -> torch.Tensor:
        scores = torch.arange(len(images)).double() % 3
        return scores.masked_fill(scores == 1, torch.nan)

    trainer = make_trainer(
        tmp_path, "sd", "grpo", peft_config=lora_config(), options={"scorers": [judge]},
        rollout_batch_size=6, **FAST,
    )  # fmt: skip
    advantages = next_batch(trainer).extra["advantages"]
    assert advantages[:, 1].tolist() == [0.0, 0.0]
    assert (advantages[:, 0] < 0).all() and (advantages[:, 2] > 0).all()


@pytest.mark.parametrize("advantage", ["ddpo", "gdpo", "mix_grpo", "dance_grpo", "group"])
def test_every_rule_trains_and_resumes(advantage: str, tmp_path: Path) -> None:
    """In the middle of a round, and with the past rewards of DDPO."""

    def second(images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([float(np.asarray(image).std()) for image in images]).double()

    options: dict[str, Any] = {
        "peft_config": lora_config(),
        "advantage": advantage,
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": None,
        "steps_per_round": 2,
        "options": {"scorers": [brightness, second]},
        "ratio": "guard" if advantage == "group" else "plain",
        **FAST,
    }
    make_trainer(tmp_path / "a", "sd", "grpo", **options).train()
    resumed = make_trainer(
        tmp_path / "b", "sd", "grpo",
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"), **options,
    )  # fmt: skip
    resumed.train()
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(t.abs().max() > 0 for name, t in one.items() if "lora_B" in name)
    logged = [json.loads(line) for line in (tmp_path / "a/logs/metrics.jsonl").open()]
    # The second step of a round is no longer at the policy that drew.
    assert logged[0]["policy/log_ratio"] < 1e-6 < logged[1]["policy/log_ratio"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora.dropout: GRPO clips the ratio"):
        GRPOTrainer(
            "shapes",
            args=GRPOConfig(output_dir=str(tmp_path)),
            train_dataset=[{"prompt": "a"}],
            scorers=brightness,
            peft_config=lora_config(dropout=0.1),
        )
    with pytest.raises(ConfigError, match="images_per_prompt: 1 has nothing to be compared with"):
        GRPOConfig(images_per_prompt=1)
    assert GRPOConfig(images_per_prompt=1, advantage="ddpo").images_per_prompt == 1
    with pytest.raises(ConfigError, match="eta: with 0 the sampler is deterministic"):
        GRPOConfig(eta=0.0)
    with pytest.raises(ConfigError, match="clip_range"):
        GRPOConfig(clip_range=1.0)
    with pytest.raises(ConfigError, match=r"sde_steps: expected steps in \[0, 9\], got 10"):
        GRPOConfig(sde_steps=[1, 10])
    with pytest.raises(ConfigError, match="ratio: guard needs a variance"):
        GRPOConfig(dynamics="cps", ratio="guard")

    def trainer(family: str = "sd", **options: Any) -> Any:
        return make_trainer(tmp_path, family, "grpo", peft_config=lora_config(), **options)

    with pytest.raises(ConfigError, match="train.dynamics: cps is not for this model, which pred"):
        trainer(dynamics="cps")
    with pytest.raises(ConfigError, match="train.dynamics: ddim is not for this model, which is"):
        trainer("sd3", dynamics="ddim")
    with pytest.raises(ConfigError, match="train.sde_steps: step 2 of 3 is deterministic"):
        trainer("sd3", sde_steps=[0, 2])
    with pytest.raises(ConfigError, match="train.num_sde_steps: expected at most 2 steps, got 3"):
        trainer("sd3", num_sde_steps=3)
    with pytest.raises(ConfigError, match="train.kl_type: x is for flows"):
        trainer(kl_weight=0.1, kl_type="x")
    with pytest.raises(ConfigError, match="eta: expected a number from 0 to 1 for cps"):
        GRPOConfig(dynamics="cps", eta=1.5)
    with pytest.raises(ConfigError, match="window: progressive needs num_sde_steps"):
        GRPOConfig(window="progressive")
    for options in ({"ratio": "guard"}, {"dynamics": "cps"}):
        with pytest.raises(ConfigError, match="reduce: sum cannot be combined with ratio: guard"):
            GRPOConfig(reduce="sum", **options)
    with pytest.raises(ConfigError, match="ref_model: train.kl_weight is 0, so it would not be"):
        trainer(options={"ref_model": build_pipeline("sd", seed=1)})

    def silent(images: Any, prompts: Any) -> torch.Tensor:
        return torch.full((len(images),), torch.nan)

    with pytest.raises(UserError, match="gave no score for any image"):
        trainer(options={"scorers": [silent]}).train()


def test_the_last_step_of_a_flow_is_deterministic(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "sd3", "grpo", peft_config=lora_config(), **FAST)
    batch = next_batch(trainer)
    grid = trainer.rollout.grid
    assert trainer.stochastic_steps("rollout").tolist() == [True, True, True, False]
    state, after = batch.extra["states"][:, 0, -2], batch.extra["states"][:, 0, -1]
    velocity = (after - state) / float(grid.next_times[-1] - grid.times[-1])
    mean, std = transition(
        trainer.schedule, velocity, state, grid.times[-1:], grid.next_times[-1:], 0.0
    )
    torch.testing.assert_close(mean.float(), after, rtol=1e-4, atol=1e-5)
    assert math.isclose(float(std.max()), 0.0)
