"""Options of pair methods that use scores, and beta that moves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import (
    assert_same_tensors,
    brightness,
    first_batch,
    lora_config,
    make_trainer,
    method_rows,
    pair_rows,
    ranked_rows,
)

from diffalign.data import load_preferences
from diffalign.errors import ConfigError
from diffalign.likelihood import implicit_rewards
from diffalign.methods.diffusion_dpo import DiffusionDPOConfig, diffusion_dpo_loss, score_factors
from diffalign.methods.rankdpo import phi_from_scores
from diffalign.rewards import win_rates
from diffalign.training.auto_beta import RATE, SPAN, AutoBeta

POLICY = torch.tensor([[0.100, 0.102], [0.200, 0.100]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.1005, 0.1010], [0.1990, 0.1004]], dtype=torch.float64)


def scored_rows(count: int = 8, method: str = "diffusion_dpo") -> list[dict[str, Any]]:
    rows = method_rows(method, count)
    for place, row in enumerate(rows):
        row |= {"chosen_score": 0.5 + 0.1 * place, "rejected_score": 0.2}
    return rows


def scored(folder: Path, method: str = "diffusion_dpo", **options: Any) -> Any:
    values: dict[str, Any] = {"rows": scored_rows(8, method), "peft_config": lora_config()}
    values |= {"per_device_train_batch_size": 2, "seed": 3} | options
    return make_trainer(folder, "sd", method, **values)


# SmPO's margins


def test_h6e_score_factors() -> None:
    scores = torch.tensor([[0.5, 0.0], [0.3, 0.3]], dtype=torch.float64)
    factors = score_factors(scores, scale=10, score_range=[0.0, 1.0])
    assert factors.tolist() == pytest.approx([2.449186624037, 0.0], abs=1e-9)
    scaled = score_factors(scores * 0.16 + 0.1, scale=10, score_range=[0.1, 0.26])
    assert scaled.tolist() == pytest.approx(factors.tolist(), abs=1e-9)
    assert torch.equal(score_factors(scores.flip(1), scale=10, score_range=[0.0, 1.0]), -factors)
    loss = diffusion_dpo_loss(POLICY, REFERENCE, beta=2000, factors=factors)
    assert loss.tolist() == pytest.approx([0.025063619167, 0.693147180560], abs=1e-9)


def test_a_factor_is_a_beta_per_pair() -> None:
    factors = torch.tensor([0.5, 3.0], dtype=torch.float64)
    loss = diffusion_dpo_loss(POLICY, REFERENCE, beta=2000, factors=factors)
    for row, beta in enumerate((1000, 6000)):
        pair = slice(row, row + 1)
        alone = diffusion_dpo_loss(POLICY[pair], REFERENCE[pair], beta=beta)
        assert float(loss[row]) == pytest.approx(float(alone), abs=1e-12)


def test_the_range_of_scores_comes_from_the_data(tmp_path: Path) -> None:
    trainer = scored(tmp_path, score_margin=10.0)
    assert trainer.score_range == pytest.approx((0.2, 1.2))
    loss, metrics = trainer.compute_loss(first_batch(trainer))
    scores = first_batch(trainer).scores
    expected = 10 * (2 * torch.sigmoid(scores[:, 0] - scores[:, 1]) - 1)
    torch.testing.assert_close(metrics["score_margin/factor"], expected)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-6)
    assert any("scores run from 0.2 to 1.2" in note for note in trainer.notes)
    given = scored(tmp_path / "given", score_margin=10.0, score_range=[0.0, 2.0])
    assert given.score_range == [0.0, 2.0]


def test_ranked_lists_bring_scores(tmp_path: Path) -> None:
    trainer = scored(tmp_path, rows=ranked_rows(8), score_margin=2.0)
    assert first_batch(trainer).scores.tolist() == [[1.0, 0.0]] * 2
    assert trainer.score_range == (0.0, 1.0)


@pytest.mark.parametrize("method", ["diffusion_dpo", "dcpo", "diffusion_npo"])
@pytest.mark.parametrize(
    "options", [{"score_margin": 5.0}, {"loss_type": "regression"}], ids=lambda o: next(iter(o))
)
def test_methods_train_with_scores(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = scored(tmp_path, method, max_steps=2, **options)
    trainer.train()
    assert all(math.isfinite(entry["train/loss"]) for entry in trainer.state.log_history)


def test_inverted_pairs_have_inverted_scores() -> None:
    dataset = load_preferences(scored_rows(2), verbose=False)
    assert dataset[1].scores == pytest.approx((0.6, 0.2))
    assert dataset.with_inverted_preferences()[1].scores == pytest.approx((-0.2, -0.6))
    assert dataset.score_range() == pytest.approx((0.2, 0.6))
    assert dataset.has_scores and not load_preferences(pair_rows(2), verbose=False).has_scores
    assert not dataset.as_kind("single").has_scores


def test_a_pair_without_a_score_has_no_gradient(tmp_path: Path) -> None:
    rows = scored_rows(2)
    rows[0]["chosen_score"] = None
    for options in ({"score_margin": 5.0, "score_range": [0.0, 1.0]}, {"loss_type": "regression"}):
        trainer = scored(tmp_path, rows=rows, **options)
        batch = first_batch(trainer)
        place = batch.row_ids.index(0)
        assert math.isnan(float(batch.scores[place, 0]))
        policy, reference = trainer.errors(batch)
        policy = policy.detach().requires_grad_()
        factors, targets = trainer._from_scores(batch.scores)
        loss = diffusion_dpo_loss(
            policy, reference, beta=500, loss_type=trainer.args.loss_type,
            factors=factors, targets=targets,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.isfinite().all()
        assert policy.grad[place].tolist() == [0.0, 0.0] and policy.grad[1 - place].abs().sum() > 0


def test_scores_that_cannot_be_read_are_missing() -> None:
    rows = scored_rows(1)
    rows[0]["chosen_score"] = "much"
    scores = load_preferences(rows, verbose=False)[0].scores
    assert scores is not None and math.isnan(scores[0]) and scores[1] == 0.2


@pytest.mark.parametrize("loss_type", ["linear", "regression"])
def test_margins_have_no_meaning_for_these_losses(loss_type: str) -> None:
    with pytest.raises(ConfigError, match="score_margin: it has no meaning for loss_type"):
        DiffusionDPOConfig(score_margin=2.0, loss_type=loss_type)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"loss_type": "regression"}, "train.loss_type"),
        ({"score_margin": 1.0}, "train.score_margin"),
    ],
)
def test_scores_must_be_there(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chosen_score and rejected_score") as error:
        scored(tmp_path, rows=pair_rows(4), **options)
    assert error.value.field == field


def test_a_range_must_be_known(tmp_path: Path) -> None:
    rows = scored_rows(4)
    for row in rows:
        row["chosen_score"] = row["rejected_score"]
    with pytest.raises(ConfigError, match="the scores are all equal; set the lowest"):
        scored(tmp_path, rows=rows, score_margin=1.0)
    for limits in ([1.0, 0.0], [0.0], []):
        with pytest.raises(ConfigError, match="score_range: expected the lowest and the highest"):
            DiffusionDPOConfig(score_range=limits)


def test_pairs_drawn_online_have_scores(tmp_path: Path) -> None:
    data = {"online": {"every": 1, "k": 2, "num_inference_steps": 2, "rollout_batch_size": 4}}
    trainer = scored(
        tmp_path, score_margin=4.0, score_range=[0.0, 255.0], max_steps=1, data=data,
        options={"scorers": brightness},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-1]["score_margin/factor"] > 0


# CaPO's calibrated rewards


def test_h6g_calibrated_win_rates() -> None:
    scores = torch.tensor([[0.5, 0.0, -1.0, 2.0]], dtype=torch.float64)
    rates = win_rates(scores[..., None], calibrate="sigmoid")
    expected = [0.540819777067, 0.409267389817, 0.166264272785, 0.883648560331]
    assert rates[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert phi_from_scores(scores, "calibrated")[0].tolist() == pytest.approx(expected, abs=1e-9)
    target = rates[0, 3] - rates[0, 2]
    # beta 1400 and these errors give z = 0.7.
    policy = torch.tensor([[0.1, 0.1]], dtype=torch.float64)
    reference = torch.tensor([[0.101, 0.1]], dtype=torch.float64)
    rewards = implicit_rewards(policy, reference, 1400)
    assert float(rewards[0, 0] - rewards[0, 1]) == pytest.approx(0.7, abs=1e-12)
    loss = diffusion_dpo_loss(
        policy, reference, beta=1400, loss_type="regression", targets=target[None]
    )
    assert float(loss) == pytest.approx(0.000302213454, abs=1e-9)


def test_calibration_of_groups_with_missing_scores() -> None:
    scores = torch.tensor([[0.5, math.nan, -1.0], [2.0, 2.0, 2.0], [math.nan, 1.0, math.nan]])
    rates = win_rates(scores[..., None], calibrate="sigmoid")
    first = float(torch.sigmoid(torch.tensor(1.5)))
    assert rates[0, [0, 2]].tolist() == pytest.approx([first, 1 - first], abs=1e-6)
    assert rates[0, 1].isnan() and rates[1].tolist() == [0.5] * 3 and float(rates[2, 1]) == 0.5
    torch.testing.assert_close(
        win_rates(1e6 * scores[..., None], calibrate="sigmoid"),
        win_rates(scores[..., None]), equal_nan=True, rtol=0, atol=1e-6,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="calibrate: expected wins or sigmoid, got 'soft'"):
        win_rates(scores[..., None], calibrate="soft")


def test_data_calibrate() -> None:
    rows = ranked_rows(1)
    rows[0] |= {"first": [2.0, 0.0, 1.0], "second": [0.3, 0.2, 0.1]}
    columns = ["first", "second"]
    table = torch.tensor([[[2.0, 0.3], [0.0, 0.2], [1.0, 0.1]]], dtype=torch.float64)
    for calibrate in ("wins", "sigmoid"):
        data = load_preferences(rows, score_columns=columns, calibrate=calibrate, verbose=False)
        expected = win_rates(table, calibrate=calibrate)[0].tolist()
        assert data[0].scores == pytest.approx(expected)
    with pytest.raises(ConfigError, match=r"data.calibrate: expected one of wins, sigmoid"):
        load_preferences(rows, score_columns=columns, calibrate="x", verbose=False)


def test_regression_needs_targets() -> None:
    with pytest.raises(ValueError, match="targets"):
        diffusion_dpo_loss(POLICY, REFERENCE, beta=1.0, loss_type="regression")
    targets = torch.tensor([1.5, -1.4], dtype=torch.float64)
    loss = diffusion_dpo_loss(POLICY, REFERENCE, beta=2000, loss_type="regression", targets=targets)
    assert loss.tolist() == pytest.approx([0.0, 0.0], abs=1e-20)


# beta: auto


def test_beta_follows_the_factor() -> None:
    accelerator, beta = Accelerator(), AutoBeta(start=100.0, target=0.4)
    beta.add(torch.tensor([0.2, 0.9]), torch.tensor([1.0, 0.0]))  # the second is a tie
    beta.add(torch.tensor([0.3]), torch.tensor([2.0]))
    beta.step(accelerator)
    assert beta.value == pytest.approx(100 * math.exp(RATE * (0.25 - 0.4)))
    before = beta.value
    beta.step(accelerator)  # nothing was counted
    beta.add(torch.tensor([math.nan]), torch.tensor([1.0]))
    beta.step(accelerator)
    assert beta.value == before
    for factor, limit in ((1.0, 100 * SPAN), (0.0, 100 / SPAN)):
        for _ in range(300):
            beta.add(torch.tensor([factor]), torch.ones(1))
            beta.step(accelerator)
        assert beta.value == pytest.approx(limit)


@pytest.mark.parametrize("method", ["diffusion_dpo", "dcpo", "diffusion_npo"])
def test_auto_beta_holds_the_factor_and_is_logged(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "sd", method, rows=method_rows(method, 8), peft_config=lora_config(),
        per_device_train_batch_size=4, beta="auto", beta_start=100.0, gradient_factor=0.3,
        max_steps=3,
    )  # fmt: skip
    trainer.evaluate(method_rows(method, 2))  # not a step
    trainer.train()
    logged = [entry["beta"] for entry in trainer.state.log_history]
    assert logged[0] == 100.0 and logged[0] < logged[1] < logged[2] < trainer.beta
    assert trainer.beta == trainer.auto_beta.value


def test_auto_beta_resumes_bit_equal(tmp_path: Path) -> None:
    options = {"beta": "auto", "beta_start": 300.0, "save_steps": 2, "save_total_limit": None}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 4}
    scored(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    checkpoint = tmp_path / "part" / "checkpoint-2"
    assert json.loads((checkpoint / "auto_beta.json").read_text())["beta"] != 300.0
    again = scored(tmp_path / "part", resume_from_checkpoint=str(checkpoint), **options)
    again.train()
    name = "pytorch_lora_weights.safetensors"
    whole, part = (load_file(tmp_path / folder / name) for folder in ("whole", "part"))
    assert_same_tensors(part, whole)


def test_auto_beta_belongs_to_the_sigmoid() -> None:
    with pytest.raises(ConfigError, match="auto moves the beta of loss_type sigmoid, got ipo"):
        DiffusionDPOConfig(beta="auto", loss_type="ipo")
    with pytest.raises(ConfigError, match="beta"):
        DiffusionDPOConfig(beta="automatic")  # type: ignore[arg-type]
