"""SePPO: golden values, anchors, past checkpoints, own samples, resuming, mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    FAMILIES,
    assert_same_tensors,
    first_batch,
    learning_rate,
    lora_config,
    make_trainer,
    pair_rows,
    trained_tensors,
)

from diffalign import SePPOConfig
from diffalign.errors import ConfigError, UserError
from diffalign.methods.diffusion_dpo import diffusion_dpo_loss
from diffalign.methods.seppo import anchors, seppo_loss

F64 = torch.float64


def tensor(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def small(folder: Path, family: str = "sd", **options: Any) -> Any:
    options.setdefault("per_device_train_batch_size", 2)
    return make_trainer(
        folder, family, "seppo", peft_config=options.pop("peft_config", lora_config()), **options
    )


def test_golden_values() -> None:
    """beta T omega = 1000 on plain differences is beta 2000 here."""
    policy, reference = (
        tensor((0.100, 0.0520), (0.101, 0.0520)),
        tensor((0.101, 0.0515), (0.100, 0.0515)),
    )
    assert anchors(policy[:, 0] - reference[:, 0]).tolist() == [1, -1]
    assert seppo_loss(policy, reference, beta=2000.0).tolist() == pytest.approx(
        [0.201413277983, 1.701413277983], abs=1e-9
    )
    indicator = seppo_loss(policy, reference, beta=2000.0, anchor="indicator")
    assert float(indicator[1]) == pytest.approx(1.313261687518, abs=1e-9)


def test_invariants() -> None:
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.rand(50, 2, generator=draw, dtype=F64) for _ in range(2))
    dpo = diffusion_dpo_loss(policy, reference, beta=3.0)
    torch.testing.assert_close(
        seppo_loss(policy, reference, beta=3.0, anchor_values=torch.ones(50)), dpo
    )
    better = policy[:, 0] < reference[:, 0]
    torch.testing.assert_close(seppo_loss(policy, reference, beta=3.0)[better], dpo[better])
    zero = torch.tensor([0.0], dtype=F64)
    assert (
        anchors(zero).item() == 1
        and anchors(zero, zero=0.0).item() == 0
        and anchors(zero, "indicator").item() == 1
    )
    equal = tensor((0.1, 0.2))
    assert float(seppo_loss(equal, equal, beta=10.0)) == pytest.approx(0.693147180560)


def test_gradients_and_the_detached_anchor() -> None:
    policy, reference = (
        tensor((0.100, 0.0520), (0.101, 0.0520)).requires_grad_(),
        tensor((0.101, 0.0515), (0.100, 0.0515)),
    )
    loss = seppo_loss(policy, reference, beta=2000.0)
    loss.sum().backward()
    a, slope = torch.tensor([1.0, -1.0], dtype=F64), 1000 * (1 - torch.exp(-loss.detach()))
    torch.testing.assert_close(policy.grad, torch.stack([slope, -a * slope], 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rival_is_the_references_own_image(tmp_path: Path, family: str) -> None:
    trainer = small(
        tmp_path, family, max_steps=2, pool_save_steps=1, ref_strategy="initial", learning_rate=2e-2
    )
    trainer.train()
    raw = first_batch(trainer)
    batch = trainer.prepare(raw)
    assert (
        batch.x0.shape[1] == 2
        and torch.equal(batch.x0[:, :1], raw.x0)
        and torch.equal(batch.noise[:, 0], batch.noise[:, 1])
    )
    trainer.pool.strategy = "latest"
    latest = trainer.prepare(raw)
    assert trainer.pool.current == 2 and not torch.equal(latest.x0[:, 1], batch.x0[:, 1])
    # By hand: the network under the pool's weights.
    with trainer.pool.in_place(trainer.pool.kept[0]):
        errors = trainer.sampling_policy.errors(batch)
    trainer.pool.strategy = "initial"
    trainer.prepare(raw)
    torch.testing.assert_close(trainer.reference_errors(batch), errors.detach())


def test_policy_and_reference_are_equal_at_the_first_step(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    trainer.setup()
    batch = trainer.prepare(first_batch(trainer))
    policy, reference = trainer.errors(batch)
    assert torch.equal(policy.detach(), reference)
    _, metrics = trainer.compute_loss(batch)
    assert metrics["anchor/better"].tolist() == [1, 1]


def test_the_pool(tmp_path: Path) -> None:
    trainer = small(
        tmp_path,
        max_steps=6,
        pool_save_steps=1,
        pool_size=3,
        learning_rate=1e-2,
        save_steps=2,
        save_total_limit=None,
    )
    trainer.train()
    assert trainer.pool.members == [0, 5, 6] and set(trainer.pool.kept) == {0, 5, 6}
    files = sorted(int(path.stem) for path in (tmp_path / "pool").glob("*.safetensors"))
    assert files == list(range(7))
    now = load_file(tmp_path / "pool" / "00000006.safetensors")
    assert_same_tensors(now, {name: t for name, t in trained_tensors(trainer).items()})
    drawn = {trainer.pool.choose(0, step) for step in range(30)}
    assert drawn == {0, 5, 6}
    assert trainer.pool.choose(0, 4) == trainer.pool.choose(0, 4)


@pytest.mark.nightly
@by_default(values=1)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resuming_takes_the_pool_along(tmp_path: Path, lora: bool) -> None:
    options = {
        "max_steps": 6,
        "pool_save_steps": 2,
        "save_steps": 1,
        "save_total_limit": None,
        "anchor_samples": 3,
    }
    options |= {"peft_config": lora_config() if lora else None, "learning_rate": 1e-2}
    whole = small(tmp_path / "a", **options)
    whole.train()
    for step in (3, 4):
        folder = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a", folder)
        resumed = small(
            folder, resume_from_checkpoint=str(folder / f"checkpoint-{step}"), **options
        )
        resumed.train()
        assert_same_tensors(trained_tensors(resumed), trained_tensors(whole))
        assert resumed.pool.members == whole.pool.members
    (tmp_path / "b3" / "pool" / "00000002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00000002.safetensors is missing \(1 of"):
        small(
            tmp_path / "b3", resume_from_checkpoint=str(tmp_path / "b3" / "checkpoint-4"), **options
        ).train()


@by_default(lambda family, lora: family == "sd" and lora)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_it_learns_the_winners(tmp_path: Path, family: str, lora: bool) -> None:
    """Their denoising error falls, at draws that were not trained on."""
    config = lora_config(r=8, alpha=16) if lora else None
    rate = learning_rate(family, lora)
    options = {
        "max_steps": 16,
        "pool_save_steps": 4,
        "learning_rate": rate,
        "per_device_train_batch_size": 4,
    }
    trainer = small(tmp_path, family, peft_config=config, **options)
    winners = first_batch(trainer)  # sets up

    def error() -> float:
        fixed = [
            trainer.data_pipeline.builder([trainer.data_pipeline.reader[(99, i)] for i in range(4)])
        ]
        with torch.no_grad():
            return sum(float(trainer.sampling_policy.errors(batch).mean()) for batch in fixed)

    before = error()
    trainer.train()
    assert len(winners) == 4 and error() < before


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    small(tmp_path / "run").dry_run()
    assert not (tmp_path / "run").exists()


def test_winners_alone_are_enough(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "image": row["chosen"]} for row in pair_rows()]
    trainer = small(tmp_path, rows=rows, shared_noise=False)
    trainer.train()
    batch = trainer.prepare(first_batch(trainer))
    assert not torch.equal(batch.noise[:, 0], batch.noise[:, 1])


def test_mistakes(tmp_path: Path) -> None:
    for words, options in (
        ("ref_strategy: expected one of random, initial, latest", {"ref_strategy": "best"}),
        ("anchor: expected one of sign, indicator", {"anchor": "x"}),
        ("pool_size", {"pool_size": 1}),
        ("zero_anchor: expected one of 0.0, 1.0", {"zero_anchor": 0.5}),
        ("precompute_ref_errors: the reference changes", {"precompute_ref_errors": True}),
    ):
        with pytest.raises(ConfigError, match=words):
            SePPOConfig(**options)
    with pytest.raises(UserError, match="single data"):
        small(tmp_path, rows=[{"prompt": "x"}])
