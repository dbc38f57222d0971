"""The common tests of training on the transformer families: buckets, precision, lower
losses, recorded log-probabilities, two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import torchrun
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    first_batch,
    lora_config,
    make_trainer,
    next_batch,
    pair_rows,
    picture,
    trained_tensors,
)
from tiny_families import TRANSFORMERS, size_of

LORA = "pytorch_lora_weights.safetensors"
SCRIPT = Path(__file__).parents[1] / "training" / "script.py"
FAMILIES = ["sd3", *TRANSFORMERS]
WITH_LORA = [family for family in FAMILIES if family != "pixart"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def adapters(family: str) -> Any:
    """A LoRA, or None, full training, where the family has no LoRA."""
    return lora_config() if family in WITH_LORA else None


def ragged_pairs(family: str, count: int = 8) -> list[dict[str, Any]]:
    rows = pair_rows(count, size_of(family))
    return [{**row, "prompt": row["prompt"] + " and more" * (i % 3)} for i, row in enumerate(rows)]


@by_default(lambda family: family in ("flux", "qwen-image-21"))
@every_family
def test_mixed_sizes_train_in_buckets(family: str, tmp_path: Path) -> None:
    side = size_of(family)
    wide = side + side // 2 if family != "qwen-image-21" else 2 * side
    rows = pair_rows(4, side)
    for i, row in enumerate(pair_rows(3, side)):
        images = {
            key: picture(60 + 80 * j, i, side).resize((wide, side))
            for j, key in enumerate(("rejected", "chosen"))
        }
        rows.append({**row, **images})
    trainer = make_trainer(
        tmp_path, family, rows=rows, per_device_train_batch_size=2, max_steps=5,
        peft_config=adapters(family), learning_rate=1e-2,
        data={"resolution": None, "aspect_ratio_buckets": f"{side},{side};{side},{wide}"},
    )  # fmt: skip
    trainer.setup()
    shapes, prepare = set(), trainer.prepare

    def recording(batch: Any) -> Any:
        shapes.add(tuple(batch.x0.shape[2:]))
        return prepare(batch)

    trainer.prepare = recording
    trainer.train()
    backbone = trainer.backbone
    assert shapes == {tuple(backbone.latent_shape(side, width)) for width in (side, wide)}
    assert all(math.isfinite(entry["train/loss"]) for entry in trainer.state.log_history)


@by_default(lambda family: family == "z-image")
@every_family
def test_bf16_keeps_trainable_weights_and_errors_in_float32(family: str, tmp_path: Path) -> None:
    """And checkpointed activations change nothing."""
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing), family, peft_config=adapters(family),
            rows=ragged_pairs(family), mixed_precision="bf16", per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing, data={"resolution": size_of(family)},
        )  # fmt: skip
        trainer.train()
        found.append(trained_tensors(trainer))
        assert {tensor.dtype for tensor in found[-1].values()} == {torch.float32}
        assert all(torch.isfinite(tensor).all() for tensor in found[-1].values())
        policy, reference = trainer.errors(first_batch(trainer))
        assert policy.dtype == reference.dtype == torch.float32
    assert_same_tensors(*found)


@by_default(lambda family: family == "sana")
@every_family
def test_loss_falls_on_a_separable_set(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, family, rows=ragged_pairs(family), peft_config=adapters(family), max_steps=16,
        learning_rate=1e-2 if family in WITH_LORA else 1e-3, per_device_train_batch_size=4,
        precompute_ref_errors=True, ref_error_draws=1, data={"resolution": size_of(family)},
    )  # fmt: skip
    before = trainer.evaluate(ragged_pairs(family))
    trainer.train()
    after = trainer.evaluate(ragged_pairs(family))
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["eval/loss"] < before["eval/loss"]
    assert after["eval/rewards/accuracies"] > 0.5 and after["eval/rewards/margins"] > 0


@by_default(lambda family, method: family == "qwen-image" and method == "d3po")
@pytest.mark.parametrize("method", ["d3po", "spo"])
@every_family
def test_recorded_log_probabilities_are_those_of_the_policy(
    family: str, method: str, tmp_path: Path
) -> None:
    """And the policy is exactly its reference before the first step."""
    trainer = make_trainer(
        tmp_path, family, method, rows=[{"prompt": r["prompt"]} for r in ragged_pairs(family, 4)],
        peft_config=adapters(family), images_per_prompt=3, rollout_batch_size=2,
        num_inference_steps=4, guidance_scale=3.0, per_device_train_batch_size=2,
        data={"resolution": size_of(family)},
    )  # fmt: skip
    for micro in trainer.micro_batches(next_batch(trainer)):
        policy = trainer.step_log_probs(micro, trainer.policy)
        torch.testing.assert_close(policy.detach(), micro.extra["recorded"], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(policy.detach(), trainer.step_log_probs(micro, trainer.reference))


STEADY = {"max_steps": 3, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
"""An epsilon that keeps Adam from magnifying rounding."""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family trained by two processes, one pair each per step."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(SCRIPT, "families", folder, 2, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("family", WITH_LORA)
def test_two_processes_are_one_process(family: str, two_processes: Path, tmp_path: Path) -> None:
    """With prompts of different lengths, so that the batches differ in theirs."""
    make_trainer(
        tmp_path, family, rows=ragged_pairs(family), peft_config=lora_config(),
        per_device_train_batch_size=4, data={"resolution": size_of(family)}, **STEADY,
    ).train()  # fmt: skip
    one, two = load_file(tmp_path / LORA), load_file(two_processes / family / LORA)
    assert_close_tensors(two, one, rtol=1e-3, atol=1e-5)
    assert max(float(tensor.abs().max()) for key, tensor in one.items() if "lora_B" in key) > 1e-4
