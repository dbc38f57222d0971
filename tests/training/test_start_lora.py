"""Runs that go on from a LoRA."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    method_rows,
    pair_rows,
)

from diffalign.backbones.lora_formats import FORMATS, default_file, read_lora, write_lora
from diffalign.errors import ConfigError, UserError
from diffalign.recipe import run_from_dict

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of supervised fine-tuning, with ranks of its own."""
    folder = tmp_path_factory.mktemp("sft")
    trained(folder, "sd", peft_config=lora_config(rank_pattern={"to_q": 2}))
    return folder


def trained(folder: Path, family: str, **options: Any) -> Path:
    values = {"max_steps": 3, "learning_rate": 1e-2, "rows": pair_rows(4), **options}
    make_trainer(folder, family, "sft", **values).train()
    return folder


def going_on(folder: Path, start: Path, family: str = "sd", **options: Any) -> Any:
    start_options = {"start_lora": str(start), **options.pop("options", {})}
    return make_trainer(folder, family, options=start_options, **options)


@by_default()
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_first_step_is_at_the_lora(family: str, form: Any, tmp_path: Path) -> None:
    """Policy and reference are the plain pipeline with it, by any format."""
    first = trained(tmp_path / "sft", family, peft_config=lora_config())
    place = tmp_path / form
    lora = read_lora(first, "--lora", type(build_pipeline(family)).__name__)
    write_lora(lora, default_file(place, form), form)
    trainer = going_on(tmp_path / "run", place, family, rows=pair_rows(4))
    batch = first_batch(trainer)
    policy, reference = trainer.errors(batch)
    assert torch.equal(policy, reference) and policy.requires_grad
    assert trainer.compute_loss(batch)[0].tolist() == pytest.approx([math.log(2)])

    pipe = build_pipeline(family)
    network = getattr(pipe, trainer.backbone.network_name)
    pipe.load_lora_weights(str(first))
    noisy, times = torch.randn(1, *trainer.backbone.latent_shape(32, 32)), torch.tensor([300.0])
    condition = trainer.backbone.encode_prompts(["a cat"])
    condition |= trainer.backbone.geometry_condition([])
    trainer.network.eval()
    with torch.no_grad():
        found = trainer.backbone.predict(trainer.network, noisy, times, condition)
        expected = trainer.backbone.predict(network, noisy, times, condition)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_lora_that_a_run_writes_holds_both(start: Path, tmp_path: Path) -> None:
    trainer = going_on(tmp_path, start, max_steps=3, learning_rate=1e-2, rows=pair_rows(4))
    trainer.train()
    before, after = load_file(start / LORA), load_file(tmp_path / LORA)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    facts = (tmp_path / "config.yaml").read_text()
    assert f"start_from: {start}" in facts and "reference: the starting LoRA" in facts


@by_default(values=1)
@pytest.mark.parametrize("method", ["diffusion_dpo", "d3po", "seppo", "self_npo"])
def test_a_resumed_run_is_the_uninterrupted_run(method: str, start: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rows": method_rows(method, 4), "max_steps": 4, "save_steps": 2, "save_total_limit": None,
    }  # fmt: skip
    going_on(tmp_path / "whole", start, method=method, **options).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    place = str(tmp_path / "part" / "checkpoint-2")
    again = going_on(
        tmp_path / "part", start, method=method, resume_from_checkpoint=place, **options
    )
    assert again.train().global_step == 4
    found, expected = (load_file(tmp_path / name / LORA) for name in ("part", "whole"))
    assert_same_tensors(found, expected)


def test_a_checkpoint_of_a_run_without_it_is_another_run(start: Path, tmp_path: Path) -> None:
    going_on(tmp_path, start, rows=pair_rows(4), max_steps=2, save_steps=1).train()
    plain = make_trainer(
        tmp_path, rows=pair_rows(4), max_steps=2, resume_from_checkpoint="latest",
        peft_config=lora_config(rank_pattern={"to_q": 2}),
    )  # fmt: skip
    with pytest.raises(UserError, match="start_lora is None"):
        plain.train()


def test_the_reference_of_rounds_stays_the_starting_lora(start: Path, tmp_path: Path) -> None:
    """D3PO draws a round for each optimizer step here."""
    rows = [{"prompt": row["prompt"]} for row in pair_rows(4)]
    trainer = going_on(tmp_path, start, method="d3po", rows=rows, max_steps=3, learning_rate=1e-2)
    trainer.setup()
    before = {name: tensor.clone() for name, tensor in trainer.reference_model.weights.items()}
    trainer.train()
    assert_same_tensors(trainer.reference_model.weights, before)


def test_mistakes_are_one_sentence(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r: 8 cannot be set beside start_from"):
        run_from_dict({"method": "sft", "model": "shapes", "lora": {"start_from": "x", "r": 8}})
    with pytest.raises(UserError, match=r"start_from: .*is a LoRA of Stable Diffusion with a UNet"):
        going_on(tmp_path / "a", start, "flux", rows=pair_rows(4))
    with pytest.raises(UserError, match="start_from"):
        going_on(tmp_path / "a", tmp_path / "none.safetensors", rows=pair_rows(4))
    with pytest.raises(ConfigError, match="leave peft_config out"):
        going_on(tmp_path / "a", start, peft_config=lora_config(target_modules=["to_q"]))
    wide = trained(tmp_path / "wide", "sdxl", peft_config=lora_config())
    trainer = going_on(tmp_path / "b", wide, "sd", rows=pair_rows(4))
    with pytest.raises(ConfigError, match="which this model lacks; it belongs to another model"):
        trainer.setup()
    assert not (tmp_path / "a").exists()
