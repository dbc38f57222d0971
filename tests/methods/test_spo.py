"""SPO: choosing pairs, candidates of one state, their log-probabilities, rows of their
own, learning, mistakes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    assert_same_tensors,
    brightness,
    lora_config,
    make_trainer,
    next_batch,
    pair_rows,
    trained_tensors,
)

from diffalign import SPOConfig
from diffalign.errors import ConfigError, UserError
from diffalign.methods.spo import best_and_worst
from diffalign.training.online.rollout import guide


def small(folder: Path, family: str = "sd", **options: Any) -> Any:
    options.setdefault("per_device_train_batch_size", 2)
    return make_trainer(
        folder, family, "spo", peft_config=options.pop("peft_config", lora_config()), **options
    )


def test_the_pair_of_a_step() -> None:
    """Best against worst, kept where the two's softmax probabilities differ by more
    than the threshold."""
    scores = torch.tensor(
        [
            [0.1, 0.9, 0.5],
            [2.0, 1.0, 1.7],
            [1.0, 1.0, 1.0],
            [math.nan, 3.0, 1.0],
            [math.nan, math.nan, 1.0],
        ]
    )
    pair, decided = best_and_worst(scores, 0.3)
    assert pair[:2].tolist() == [[1, 0], [0, 1]] and pair[3].tolist() == [1, 2]
    gap = torch.tensor([0.9, 0.1]).softmax(0)
    assert float(gap[0] - gap[1]) == pytest.approx(math.tanh(0.4))  # 0.380 > 0.3
    assert decided.tolist() == [True, True, False, True, False]
    assert best_and_worst(scores, 0.39)[1].tolist() == [False, True, False, True, False]
    assert best_and_worst(scores, 0.0)[1].tolist() == [True, True, False, True, False]
    assert (
        best_and_worst(scores / 10, 0.39, scale=10.0)[1].tolist()
        == best_and_worst(scores, 0.39)[1].tolist()
    )
    assert not best_and_worst(torch.full((1, 2), math.nan), 0.0)[1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probabilities_are_those_of_the_policy(tmp_path: Path, family: str) -> None:
    """And the policy is exactly its reference before the first step."""
    trainer = small(
        tmp_path, family, images_per_prompt=3, num_inference_steps=4, rollout_batch_size=3
    )
    batch, seen = next_batch(trainer), 0
    for micro in trainer.micro_batches(batch):
        policy = trainer.step_log_probs(micro, trainer.policy)
        torch.testing.assert_close(policy.detach(), micro.extra["recorded"], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(policy.detach(), trainer.step_log_probs(micro, trainer.reference))
        loss, metrics = trainer.compute_loss(micro)
        assert (
            loss.tolist() == pytest.approx([math.log(2)] * 2)
            and metrics["policy/log_ratio"].abs().max() == 0
        )
        assert policy.requires_grad
        seen += 1
    usable = trainer.usable_steps(trainer.rollout.grid)
    assert seen == trainer.trained_steps == len(usable) and usable[0] == 1
    assert all(not value.requires_grad for value in batch.extra.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_rivals_come_from_one_state_and_are_judged_by_their_clean_estimate(
    tmp_path: Path, family: str
) -> None:
    trainer = small(tmp_path, family, num_inference_steps=4, rollout_batch_size=8)
    batch = next_batch(trainer)
    states, pairs, grid = batch.extra["states"], batch.extra["pairs"], trainer.rollout.grid
    usable = trainer.usable_steps(grid)
    assert pairs.shape[:3] == (2, len(usable), 2) and states.shape == pairs[:, :, 0].shape
    for number in range(len(usable) - 1):
        for row in range(2):  # of two candidates one is the next state
            assert any(
                torch.equal(states[row, number + 1], pairs[row, number, i]) for i in range(2)
            )
    empty = trainer.data_pipeline.builder.unconditional(batch.condition)
    for number, step in enumerate(usable.tolist()):
        found = []
        for i in range(2):
            latents = pairs[:, number, i]
            if step + 1 < len(grid):
                times = grid.times[step + 1].expand(2)
                with torch.no_grad():
                    output = guide(
                        trainer.sampling_policy.predict,
                        trainer.schedule,
                        latents,
                        times,
                        batch.condition,
                        empty,
                        2.0,
                    )
                latents = trainer.schedule.to_x0(output, latents, times)
            found.append(brightness(trainer.backbone.decode_latents(latents.float()), None))
        assert (found[0] >= found[1] - 0.01).all() and (found[0] > found[1]).any()
        if step + 1 == len(grid):
            ranked = batch.extra["scores"][..., 0].sort(1, descending=True)[0]
            torch.testing.assert_close(torch.stack(found, 1).float(), ranked, rtol=1e-4, atol=0.01)


def test_a_row_depends_on_itself_alone(tmp_path: Path) -> None:
    """Not on the batch or the chunks. Candidates are judged by their place: no rounding
    shall decide who wins."""
    judged = {
        "images_per_prompt": 3,
        "options": {"scorers": [lambda images, prompts: torch.arange(len(images)).double() % 3]},
    }
    one = next_batch(
        small(tmp_path / "a", rollout_batch_size=1, per_device_train_batch_size=4, **judged)
    )
    two = next_batch(
        small(tmp_path / "b", rollout_batch_size=7, per_device_train_batch_size=2, **judged)
    )
    assert one.row_ids[:2] == two.row_ids and torch.equal(
        one.extra["order"][:2], two.extra["order"]
    )
    for name in ("states", "pairs", "log_probs"):
        torch.testing.assert_close(one.extra[name][:2], two.extra[name], rtol=1e-4, atol=1e-5)


def test_decided_pairs_are_trained_first(tmp_path: Path) -> None:
    trainer = small(
        tmp_path, num_inference_steps=9, timestep_fraction=0.5, per_device_train_batch_size=4
    )
    batch = next_batch(trainer)
    decided = torch.tensor([[False, True, False, True, True, False, False, True]] * 4)
    order = trainer._order(batch, decided)
    assert (
        trainer.trained_steps == order.shape[1] == 4
        and len({tuple(row) for row in order.tolist()}) > 1
    )
    assert all(set(row) == {1, 3, 4, 7} for row in order.tolist())


def test_candidates_that_are_too_alike_teach_nothing(tmp_path: Path) -> None:
    trainer = small(tmp_path, threshold=0.9, score_scale=1e-6, max_steps=1, learning_rate=1e-2)
    batch = next_batch(trainer)
    assert not batch.extra["decided"].any()
    losses = []
    for micro in trainer.micro_batches(batch):
        loss, metrics = trainer.compute_loss(micro)
        losses += loss.tolist()
        assert metrics["judge/ties"].tolist() == [1.0, 1.0]
        loss.sum().backward()
    assert losses == pytest.approx([math.log(2)] * len(losses))
    assert all(not p.grad.any() for p in trainer.network.parameters() if p.requires_grad)


@pytest.mark.nightly
def test_resuming_in_the_middle_of_a_round(tmp_path: Path) -> None:
    options = {
        "steps_per_round": 2,
        "num_inner_epochs": 2,
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": None,
    }
    whole = small(tmp_path / "a", learning_rate=1e-2, **options)
    whole.train()
    for step in (2, 3):
        folder = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a", folder)
        resumed = small(
            folder,
            learning_rate=1e-2,
            resume_from_checkpoint=str(folder / f"checkpoint-{step}"),
            **options,
        )
        resumed.train()
        assert_same_tensors(trained_tensors(resumed), trained_tensors(whole))


@pytest.mark.nightly
def test_it_learns_what_the_judge_wants(tmp_path: Path) -> None:
    """Brighter images, from an untrained network, over a few steps."""
    options = {
        "images_per_prompt": 4,
        "per_device_train_batch_size": 4,
        "num_inference_steps": 4,
        "rollout_batch_size": 16,
    }
    trainer = small(
        tmp_path, max_steps=12, learning_rate=1e-2, beta=10.0, peft_config=None, **options
    )
    before = trainer.evaluate(pair_rows(4))["eval/score_0"]
    trainer.train()
    assert trainer.evaluate(pair_rows(4))["eval/score_0"] > before + 2


def test_mistakes(tmp_path: Path) -> None:
    for words, options in (
        ("eta: expected float > 0: candidates of a deterministic sampler", {"eta": 0.0}),
        (
            "images_per_prompt: expected int >= 2: candidates are compared",
            {"images_per_prompt": 1},
        ),
        ("first_step: expected int in", {"first_step": 20}),
        (r"threshold: expected float in \[0, 1\)", {"threshold": 1.0}),
        ("score_scale", {"score_scale": 0.0}),
        ("reduce: expected one of mean, sum", {"reduce": "max"}),
    ):
        with pytest.raises(ConfigError, match=words):
            SPOConfig(**options)
    with pytest.raises(ConfigError, match="scorers: SPO needs a judge"):
        small(tmp_path, options={"scorers": []}).train()
    with pytest.raises(UserError, match="gave no score for any image"):
        next_batch(
            small(
                tmp_path,
                options={"scorers": lambda images, prompts: torch.full((len(images),), math.nan)},
            )
        )
