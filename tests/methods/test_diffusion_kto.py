"""Diffusion-KTO: golden values, gradients, the baseline, likes and dislikes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    first_batch,
    labelled_rows,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign.errors import ConfigError, UserError
from diffalign.methods.diffusion_kto import UTILITIES, DiffusionKTOConfig, diffusion_kto_loss

POLICY = torch.tensor([[0.100], [0.102], [0.200], [0.100]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.1005], [0.1010], [0.1990], [0.1004]], dtype=torch.float64)
LABELS = torch.tensor([1.0, -1.0, 1.0, -1.0])


def test_h6a_first_case() -> None:
    loss = diffusion_kto_loss(POLICY, REFERENCE, LABELS, beta=2000, baseline=0.0)
    expected = [0.377540668798, 0.268941421370, 0.731058578630, 0.598687660112]
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert float(loss.mean()) == pytest.approx(0.494057082228, abs=1e-9)


def test_h6a_second_case_and_gradients() -> None:
    policy = (POLICY - 0.0015).requires_grad_()
    options: dict[str, Any] = {"beta": 2000, "baseline": 1.225}
    loss = diffusion_kto_loss(policy, REFERENCE, LABELS, **options)
    expected = [0.315398499677, 0.326292900545, 0.673707099455, 0.662621837170]
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert float(loss.detach().mean()) == pytest.approx(0.494505084212, abs=1e-9)
    loss.sum().backward()
    assert policy.grad is not None
    slopes = [215.922286078, -219.825843599, 219.825843599, -223.554138075]
    assert policy.grad[:, 0].tolist() == pytest.approx(slopes, abs=1e-6)
    policy = policy.detach()
    averse = diffusion_kto_loss(policy, REFERENCE, LABELS, utility="loss_averse", **options)
    expected = [1.378918361360, 1.394959833070, 2.119959833070, 2.086550832870]
    assert averse.tolist() == pytest.approx(expected, abs=1e-9)
    halved = diffusion_kto_loss(policy, REFERENCE, LABELS, undesirable_weight=0.5, **options)
    expected = [0.315398499677, 0.163146450273, 0.673707099455, 0.331310918585]
    assert halved.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("utility", UTILITIES)
def test_limits_and_gradients_of_the_utilities(utility: str) -> None:
    options: dict[str, Any] = {"beta": 300.0, "baseline": 0.2, "utility": utility}
    start = {"sigmoid": 0.5, "loss_averse": 1 + math.log(2), "risk_seeking": 1 - math.log(2)}
    loss = diffusion_kto_loss(
        REFERENCE, REFERENCE, LABELS, beta=300.0, baseline=0.0, utility=utility
    )
    assert loss.tolist() == pytest.approx([start[utility]] * 4)
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: diffusion_kto_loss(p, REFERENCE, LABELS, **options), policy
    )
    slopes = torch.autograd.grad(
        diffusion_kto_loss(policy, REFERENCE, LABELS, **options).sum(), policy
    )[0][:, 0]
    assert (slopes * LABELS > 0).all()  # liked errors fall, disliked ones rise


def test_unknown_utility() -> None:
    with pytest.raises(ValueError, match="utility: expected one of sigmoid"):
        diffusion_kto_loss(POLICY, REFERENCE, LABELS, beta=1.0, baseline=0.0, utility="x")


def kto(folder: Path, **options: Any) -> Any:
    values: dict[str, Any] = {"rows": labelled_rows(8), "peft_config": lora_config(), "seed": 1}
    values |= {"per_device_train_batch_size": 2} | options
    return make_trainer(folder, "sd", "diffusion_kto", **values)


def test_batches_carry_labels_and_pairs_share_their_noise(tmp_path: Path) -> None:
    trainer = kto(tmp_path, per_device_train_batch_size=8)
    batch = first_batch(trainer)
    assert sorted(batch.scores[:, 0].tolist()) == [-1.0] * 4 + [1.0] * 4
    pairs = kto(tmp_path / "pairs", rows=pair_rows(4), per_device_train_batch_size=8)
    batch = first_batch(pairs)
    for row in set(batch.row_ids):
        first, second = (i for i, other in enumerate(batch.row_ids) if other == row)
        assert torch.equal(batch.noise[first], batch.noise[second])
        assert batch.times[first] == batch.times[second]
        assert batch.scores[first] == -batch.scores[second]


def test_the_running_baseline_does_not_depend_on_the_split(tmp_path: Path) -> None:
    """Batch 1 with accumulation 4 is batch 4."""
    whole = kto(tmp_path / "whole", per_device_train_batch_size=4, max_steps=3)
    parts = kto(
        tmp_path / "parts",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    whole.train(), parts.train()
    assert whole.baseline.value == pytest.approx(parts.baseline.value, rel=1e-3)
    assert_close_tensors(trained_tensors(whole), trained_tensors(parts), rtol=1e-3, atol=1e-5)


def test_baselines(tmp_path: Path) -> None:
    running = kto(tmp_path / "running", max_steps=3, beta=5000.0, baseline_decay=0.5)
    running.train()
    logged = [entry["kto/baseline"] for entry in running.state.log_history]
    assert logged[0] == 0.0 and running.baseline.baseline >= 0.0
    running.evaluate(labelled_rows(2))
    assert running.baseline.mean._sums is None  # an evaluation does not count
    batch = kto(tmp_path / "batch", baseline="batch")
    data = first_batch(batch)
    with torch.no_grad():
        for weight in batch.network.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    policy, reference = batch.errors(data)
    rewards = -0.5 * batch.args.beta * (policy - reference)
    _, metrics = batch.compute_loss(data)
    expected = rewards.mean().clamp(min=0).detach().expand(2)
    torch.testing.assert_close(metrics["kto/baseline"], expected, rtol=1e-3, atol=1e-6)


def test_it_resumes_bit_equal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    kto(tmp_path / "whole", **options).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    checkpoint = tmp_path / "part" / "checkpoint-2"
    assert isinstance(json.loads((checkpoint / "kto_baseline.json").read_text())["mean"], float)
    kto(tmp_path / "part", resume_from_checkpoint=str(checkpoint), **options).train()
    name = "pytorch_lora_weights.safetensors"
    whole, part = (load_file(tmp_path / folder / name) for folder in ("whole", "part"))
    assert_same_tensors(part, whole)


def test_precomputed_reference_errors_of_pairs(tmp_path: Path) -> None:
    """Both images of a row have errors of their own: at first all rewards are 0."""
    trainer = kto(
        tmp_path, rows=pair_rows(4), precompute_ref_errors=True, ref_error_draws=1, max_steps=1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/liked"]) < 1e-3 and abs(first["rewards/disliked"]) < 1e-3
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-4)


def test_disliked_images_do_not_train_sft(tmp_path: Path) -> None:
    rows = [{**row, "liked": row["label"]} for row in labelled_rows(8)]
    for row in rows:
        del row["label"]
    trainer = make_trainer(tmp_path, "sd", "sft", rows=rows, peft_config=lora_config())
    assert len(trainer.train_dataset) == 4
    inverted = make_trainer(tmp_path, "sd", "sft", rows=rows, data={"invert_preferences": True})
    assert [g.row_id for g in inverted.train_dataset] == [1, 3, 5, 7]
    # Numbers in a column `label` may be classes: they count where it is mapped.
    flags = make_trainer(tmp_path, "sd", "sft", rows=labelled_rows(8))
    assert len(flags.train_dataset) == 4
    numbers = [{**row, "label": int(row["label"])} for row in labelled_rows(8)]
    unclear = make_trainer(tmp_path, "sd", "sft", rows=numbers)
    assert len(unclear.train_dataset) == 8
    mapped = make_trainer(tmp_path, "sd", "sft", rows=numbers, data={"columns": {"label": "label"}})
    assert len(mapped.train_dataset) == 4


def test_evaluations_of_inverted_data_are_inverted_once(tmp_path: Path) -> None:
    trainer = kto(
        tmp_path, data={"invert_preferences": True},
        options={"eval_dataset": labelled_rows(4)},
    )  # fmt: skip
    assert [group.scores for group in trainer.evaluation_data().dataset] == [
        (-1.0,), (1.0,), (-1.0,), (1.0,),
    ]  # fmt: skip
    assert [group.scores[0] for group in trainer.evaluation_data(labelled_rows(2)).dataset] == [
        -1,
        1,
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "both weights are 0"),
        ({"baseline_decay": 1.0}, "baseline_decay"),
        ({"utility": "convex"}, "utility"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DiffusionKTOConfig(**options)


def test_data_without_labels(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "image": row["image"]} for row in labelled_rows(4)]
    with pytest.raises(UserError, match="needs labelled data.*add a column label"):
        kto(tmp_path, rows=rows)
