"""D3PO: golden values, gradients, log-probabilities, rollouts, rounds that resume in
the middle, judges, mistakes."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    FAMILIES,
    assert_same_tensors,
    brightness,
    build_pipeline,
    lora_config,
    make_trainer,
    next_batch,
    pair_rows,
    trained_tensors,
)

from diffalign import D3POConfig
from diffalign.errors import ConfigError, UserError
from diffalign.likelihood.transitions import ddim_step_log_prob
from diffalign.methods.d3po import d3po_loss
from diffalign.training.online.reward_function import (
    RewardFunction,
    majority_preferences,
    pareto_preferences,
    preferences,
)
from diffalign.training.online.rollout import step_log_prob

F64 = torch.float64


def tensor(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def small(folder: Path, family: str = "sd", **options: Any) -> Any:
    options.setdefault("per_device_train_batch_size", 2)
    return make_trainer(
        folder, family, "d3po", peft_config=options.pop("peft_config", lora_config()), **options
    )


def test_golden_losses() -> None:
    ratios = tensor((0.02, -0.03), (0.02, -0.03), (0.2, -0.3), (0.02, -0.03))
    found = d3po_loss(ratios, torch.tensor([1.0, -1.0, 1.0, 0.0]), beta=0.1, clip_range=0.1)
    assert found.tolist() == pytest.approx(
        [0.690650305557, 0.695650305557, 0.683163980852, 0.693147180560], abs=1e-11
    )
    worst = d3po_loss(tensor((-9.0, 9.0), (1e4, -1e4)), torch.tensor([1.0, 1.0]))
    assert worst.tolist() == pytest.approx([0.703231050399, 0.683163980852], abs=1e-11)
    spo = d3po_loss(tensor((0.02, -0.03), (9.0, -9.0), (-9.0, 9.0)), torch.ones(3), beta=10.0)
    assert spo.tolist() == pytest.approx(
        [0.474076984180, 0.126130879913, 2.132837834534], abs=1e-11
    )


def test_golden_log_probability_and_loss_from_it() -> None:
    common = {
        "sample": tensor((1, -0.5)),
        "prev_sample": tensor((1.2, -0.4)),
        "alpha_bar": 0.5,
        "alpha_bar_prev": 0.6,
        "eta": 1.0,
    }
    policy, mean, std = ddim_step_log_prob(model_output=tensor((0.3, 0.1)), **common)
    reference, _, _ = ddim_step_log_prob(model_output=tensor((0.25, 0.15)), **common)
    assert float(std) == pytest.approx(0.365148371670) and float(policy) == pytest.approx(
        -0.030073793881, abs=1e-11
    )
    assert mean[0].tolist() == pytest.approx([1.017985448086, -0.573542446480])
    ratio = float(policy - reference)
    assert ratio == pytest.approx(0.000214845959, abs=1e-11)
    assert float(d3po_loss(tensor((ratio, 0.0)), torch.ones(1))) == pytest.approx(
        0.693136438320, abs=1e-11
    )


def test_gradients() -> None:
    """Against the formula; nothing flows from ties and from clipped ratios."""
    ratios = tensor((0.02, -0.03), (0.05, 0.01), (0.02, -0.03), (0.3, 0.0)).requires_grad_()
    preference = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=F64)
    d3po_loss(ratios, preference, beta=10.0).sum().backward()
    z = 10 * preference * (ratios[:, 0] - ratios[:, 1]).detach()
    factor = -torch.sigmoid(-z) * 10 * preference
    expected = torch.stack([factor, -factor], 1)
    expected[3] = torch.tensor([0.0, float(torch.sigmoid(torch.tensor(-10 * math.log(1.1))) * 10)])
    torch.testing.assert_close(ratios.grad, expected)
    swapped = d3po_loss(ratios.detach().flip(1), -preference, beta=10.0)
    torch.testing.assert_close(swapped, d3po_loss(ratios.detach(), preference, beta=10.0))


@pytest.mark.parametrize("family", ["sd", "sd_v", "sd3"])
def test_log_probability_gradients_against_finite_differences(tmp_path: Path, family: str) -> None:
    trainer = small(tmp_path, family)
    process, grid = trainer.schedule, trainer.sampling_grid()
    draw = torch.Generator().manual_seed(3)
    output, sample, after = (torch.randn(2, 4, 3, 3, generator=draw, dtype=F64) for _ in range(3))
    times, next_times = grid.times[1].expand(2), grid.next_times[1].expand(2)

    def value(out: torch.Tensor) -> torch.Tensor:
        return step_log_prob(process, out, sample, after, times, next_times, 0.7)

    leaf = output.clone().requires_grad_()
    value(leaf).sum().backward()
    for place in ((0, 0, 0, 0), (1, 3, 2, 1)):
        step = torch.zeros_like(output)
        step[place] = 1e-5
        slope = float((value(output + step) - value(output - step)).sum() / 2e-5)
        assert slope == pytest.approx(float(leaf.grad[place]), rel=1e-5)


def test_pareto_preferences() -> None:
    scores = torch.tensor(
        [[[30.0, 10, 6], [20, 8, 5], [40, 4, 4], [30, 10, 6], [math.nan, 99, 99]]]
    )
    found = pareto_preferences(scores)[0]
    assert found[0].tolist() == [0, 1, 0, 0, 0] and found[1].tolist() == [-1, 0, 0, -1, 0]
    assert torch.equal(found, -found.T)
    assert pareto_preferences(torch.tensor([[[1.0], [1.0]]])).abs().sum() == 0


def test_majority_preferences() -> None:
    """Votes 1, 1, -1 are 1; 1, -1, 0 are 0; 0, 0, 1 are 1, whatever the sizes."""
    for differences, expected in (([1, 1, -90], 1), ([5, -1, 0], 0), ([0, 0, 0.1], 1)):
        scores = torch.stack([torch.tensor(differences), torch.zeros(3)])[None]
        assert majority_preferences(scores)[0].tolist() == [[0, expected], [-expected, 0]]
    missing = torch.tensor([[[1.0, 2.0, math.nan], [0.0, 0.0, 0.0]]])
    assert majority_preferences(missing).abs().sum() == 0
    one = torch.randn(3, 4, 1)
    assert torch.equal(majority_preferences(one), pareto_preferences(one))


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probabilities_are_those_of_the_policy(tmp_path: Path, family: str) -> None:
    """And the policy is exactly its reference before the first step."""
    trainer = small(tmp_path, family, images_per_prompt=3, rollout_batch_size=2, guidance_scale=3.0)
    batch = next_batch(trainer)
    seen = 0
    for micro in trainer.micro_batches(batch):
        policy = trainer.step_log_probs(micro, trainer.policy)
        torch.testing.assert_close(policy.detach(), micro.extra["recorded"], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            reference = trainer.step_log_probs(micro, trainer.reference)
        assert torch.equal(policy.detach(), reference)
        loss, metrics = trainer.compute_loss(micro)
        assert (
            loss.tolist() == pytest.approx([math.log(2)] * 2)
            and metrics["policy/log_ratio"].abs().max() == 0
        )
        assert policy.requires_grad
        seen += 1
    assert seen == trainer.trained_steps == int(trainer.rollout.grid.trainable.sum())
    states = batch.extra["states"]
    assert torch.equal(states[:, 0, 0], states[:, 1, 0]) and not torch.equal(
        states[:, 0, -1], states[:, 1, -1]
    )


def test_the_last_step_of_a_grid_without_offset_has_no_density(tmp_path: Path) -> None:
    """Of SDXL: the pipeline of SD sets an offset of 1 itself."""
    from diffusers import DDIMScheduler

    pipe = build_pipeline("sdxl")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    trainer = small(tmp_path, "sdxl", model=pipe, num_inference_steps=4)
    batch = next_batch(trainer)
    grid = trainer.rollout.grid
    assert grid.times[-1] == 0 and grid.trainable.tolist() == [True, True, True, False]
    assert (
        torch.isnan(batch.extra["log_probs"][..., -1]).all()
        and not torch.isnan(batch.extra["log_probs"][..., :-1]).any()
    )
    assert batch.extra["order"].max() == 2 and trainer.passes_per_batch == 3


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_trajectory_depends_on_its_row_alone(tmp_path: Path, family: str) -> None:
    """Not on the batch, the chunks, or how many images there are beside it."""
    one = next_batch(
        small(
            tmp_path / "a",
            family,
            images_per_prompt=2,
            rollout_batch_size=1,
            per_device_train_batch_size=4,
        )
    )
    two = next_batch(
        small(
            tmp_path / "b",
            family,
            images_per_prompt=3,
            rollout_batch_size=5,
            per_device_train_batch_size=2,
        )
    )
    assert one.row_ids[:2] == two.row_ids
    torch.testing.assert_close(
        one.extra["states"][:2], two.extra["states"][:, :2], rtol=1e-4, atol=1e-5
    )


def test_steps_are_shuffled_per_row_and_their_share_is_trained(tmp_path: Path) -> None:
    trainer = small(
        tmp_path, num_inference_steps=10, timestep_fraction=0.5, per_device_train_batch_size=4
    )
    order = next_batch(trainer).extra["order"]
    assert order.shape == (4, 5) and len({tuple(row) for row in order.tolist()}) > 1
    assert all(len(set(row)) == 5 for row in order.tolist()) and trainer.passes_per_batch == 5


ROUND = {
    "steps_per_round": 2,
    "num_inner_epochs": 2,
    "max_steps": 7,
    "save_steps": 1,
    "save_total_limit": None,
}


@by_default(lambda reference, lora: lora and reference == "fixed")
@pytest.mark.parametrize("reference", ["fixed", "iterated"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resuming_in_the_middle_of_a_round(tmp_path: Path, reference: str, lora: bool) -> None:
    options = {
        **ROUND,
        "reference": reference,
        "peft_config": lora_config() if lora else None,
        "learning_rate": 1e-2,
    }
    whole = small(tmp_path / "a", **options)
    whole.train()
    assert whole.source.number == 2  # four optimizer steps each
    for step in (2, 3, 5):
        folder = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a", folder)
        resumed = small(
            folder, resume_from_checkpoint=str(folder / f"checkpoint-{step}"), **options
        )
        resumed.train()
        assert_same_tensors(trained_tensors(resumed), trained_tensors(whole))
    steps = [line["policy/log_ratio"] for line in whole.state.log_history]
    assert steps[0] == 0 and steps[1] > 0 and (steps[4] == 0) == (reference == "iterated")
    if reference == "iterated":
        kept = load_file(tmp_path / "a" / "checkpoint-3" / "reference.safetensors")
        assert set(kept) == set(trained_tensors(whole))


def test_resuming_without_what_the_run_needs(tmp_path: Path) -> None:
    small(tmp_path, max_steps=2, save_steps=1).train()
    with pytest.raises(UserError, match="holds no reference"):
        small(tmp_path, max_steps=3, reference="iterated", resume_from_checkpoint="latest").train()
    (tmp_path / "checkpoint-2" / "rollout-0.safetensors").unlink()
    with pytest.raises(UserError, match="rollout-0.safetensors is missing"):
        small(tmp_path, max_steps=3, resume_from_checkpoint="latest").train()


def test_it_learns_what_the_judge_wants(tmp_path: Path) -> None:
    """Brighter images, from an untrained network, over a few steps."""
    options = {
        "images_per_prompt": 4,
        "per_device_train_batch_size": 4,
        "num_inference_steps": 4,
        "rollout_batch_size": 16,
    }
    trainer = small(
        tmp_path,
        max_steps=5,
        learning_rate=1e-2,
        beta=1.0,
        reduce="mean",
        peft_config=None,
        **options,
    )
    before = trainer.evaluate(pair_rows(4))["eval/score_0"]
    trainer.train()
    assert trainer.evaluate(pair_rows(4))["eval/score_0"] > before + 2


def test_judges(tmp_path: Path) -> None:
    images = [row["chosen"] for row in pair_rows(4)]
    prompts = ["a small red circle on the left of a gray background"] * 4
    single = RewardFunction(brightness)(images, prompts)
    assert single.shape == (4, 1) and RewardFunction("shapes")(images, prompts).shape == (4, 1)
    both = RewardFunction([brightness, lambda i, p: -brightness(i, p)])(images, prompts)
    assert both.shape == (4, 2) and pareto_preferences(both[None]).abs().sum() == 0
    panel = RewardFunction({"rewards": ["shapes", "jpeg_compressibility"], "combine": "zscore"})
    scores = panel(images, prompts)
    assert scores.shape == (4, 2) and panel.combined(scores[None]).shape == (1, 4)
    for rule in ("winrate", "zscore", "weighted_sum"):  # a rule that is named counts for one
        entry = {"scorer": "jpeg_compressibility", "weight": 2.0, "normalize": "none"}
        one = RewardFunction({"rewards": [entry], "combine": rule})
        scores = one(images, prompts)
        columns = {"jpeg_compressibility": scores[:, 0]}
        expected = one.panel.combine(columns, [0] * 4).values.double()
        torch.testing.assert_close(one.combined(scores[None])[0], expected)
    plain = RewardFunction({"rewards": ["jpeg_compressibility"]})
    assert torch.equal(plain.combined(scores[None])[0], scores[:, 0])
    watched = RewardFunction(
        {"rewards": ["jpeg_compressibility", {"scorer": "shapes", "role": "eval"}]}
    )
    scores = watched(images, prompts)
    assert watched.names(2) == ["jpeg_compressibility", "shapes"] and watched.deciding == 1
    assert torch.equal(
        preferences(watched, scores[None], "pareto"), pareto_preferences(scores[None, :, :1])
    )
    assert torch.equal(
        preferences(watched, scores[None], "majority"), majority_preferences(scores[None, :, :1])
    )
    with pytest.raises(UserError, match=r"expected 4 scores for 4 images, got shape \(3, 1\)"):
        RewardFunction(lambda i, p: torch.zeros(3))(images, prompts)
    with pytest.raises(ConfigError, match="scorers: expected scorers"):
        RewardFunction([3])


def test_missing_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def silent(images: Any, prompts: Any) -> torch.Tensor:
        return torch.full((len(images),), math.nan)

    def shy(images: Any, prompts: Any) -> torch.Tensor:
        values = brightness(images, prompts)
        values[: len(values) // 2] = math.nan
        return values

    with pytest.raises(
        UserError, match="scorers: a scorer gave no score for any image of 2 prompts"
    ):
        next_batch(small(tmp_path / "a", options={"scorers": silent}))
    batch = next_batch(small(tmp_path / "b", options={"scorers": shy}, rollout_batch_size=4))
    assert "taken as equal" in capsys.readouterr().out
    assert (
        batch.extra["preference"][0].abs().sum() == 0
        and batch.extra["preference"][1].abs().sum() == 2
    )


def test_mistakes(tmp_path: Path) -> None:
    for words, options in (
        ("eta: with 0 the sampler is deterministic", {"eta": 0.0}),
        ("images_per_prompt: expected int >= 2, got 1", {"images_per_prompt": 1}),
        ("clip_range", {"clip_range": 0.0}),
        ("compare: expected one of pareto, majority, combined", {"compare": "best"}),
        ("reference: expected one of fixed, iterated", {"reference": "none"}),
        ("precompute_ref_errors: there are no fixed images", {"precompute_ref_errors": True}),
    ):
        with pytest.raises(ConfigError, match=words):
            D3POConfig(**options)
    with pytest.raises(ConfigError, match="scorers: D3PO needs a judge"):
        small(tmp_path, options={"scorers": []}).train()
    with pytest.raises(ConfigError, match="num_inference_steps: expected at most 1000"):
        small(tmp_path, num_inference_steps=2000).train()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="empty"):
        small(tmp_path, rows=str(empty))


def test_scoring_beside_sampling() -> None:
    """A thread and turns give the same scores in the same order."""
    from diffalign.training.online.reward_function import ScoreAhead

    images = [row["chosen"] for row in pair_rows(6)]
    found = []
    for pool in (None, ThreadPoolExecutor(1)):
        ahead = ScoreAhead(RewardFunction(brightness), ["x"] * 6, pool)
        for first in (0, 4):
            ahead(first, images[first : first + 4])
        found.append(ahead.result())
    assert torch.equal(*found) and torch.equal(found[0][:, 0], brightness(images, None))
