"""What every method promises for every model family, with LoRA and full weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import torchrun
from safetensors.torch import load_file
from tiers import by_default
from tiny import (
    FAMILIES,
    FLOW,
    METHOD_NAMES,
    UNETS,
    WEIGHTS,
    Snapshots,
    all_tensors,
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    by_place,
    first_batch,
    learning_rate,
    lora_config,
    make_trainer,
    method_rows,
    pair_rows,
)

from diffalign import load_users
from diffalign.backbones.base import ATTENTION_TARGETS
from diffalign.methods import config_class, trainer_class
from diffalign.recipe import load_run, run_to_dict

MOVED = ("lora_B", ".to_v.", "controlnet_mid_block")
"""Parts of names of weights that start at zero."""
SAMPLING = (
    "awm", "d3po", "diffusion_dro", "diffusion_nft", "grpo", "reward_backprop", "seppo", "spo",
)  # fmt: skip
"""Methods that train on samples of their own."""
every_method = pytest.mark.parametrize("method", METHOD_NAMES)
every_family = pytest.mark.parametrize("family", FAMILIES)
lora_and_full = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


def in_turns(method: str, family: str, lora: bool) -> bool:
    """Every method meets one family, every family Diffusion-DPO; LoRA and full take
    turns."""
    number, kind = METHOD_NAMES.index(method), FAMILIES.index(family)
    if number == kind == 0:
        return True
    return 0 in (number, kind) and (number + kind) % 2 == int(lora)


def skip_without_controlnet(method: str, family: str) -> None:
    if method == "ctrl_u" and family not in UNETS:
        pytest.skip("ControlNets are for UNets here")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    prompt = pair_rows(1)[0]["prompt"]
    images = pipe(
        prompt,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=generator,
        output_type="np",
    ).images
    return images[0]


@by_default(in_turns)
@every_method
@every_family
@lora_and_full
def test_steps_train_all_that_is_trainable_and_nothing_else(
    tmp_path: Path, method: str, family: str, lora: bool
) -> None:
    skip_without_controlnet(method, family)
    model, snapshots = build_pipeline(family), Snapshots()
    parts = {
        name: part for name, part in model.components.items() if isinstance(part, torch.nn.Module)
    }
    frozen = {name: all_tensors(part) for name, part in parts.items()}
    trainer = make_trainer(
        tmp_path / "run", family, method, model=model, peft_config=lora_config() if lora else None,
        max_steps=2, options={"callbacks": [snapshots]}
    )  # fmt: skip
    trainer.train()
    start, first, second = snapshots.weights
    network = trainer.backbone.network_name
    if method == "ctrl_u":  # the network of the pipeline is frozen
        # Outputs start at zero, so what is before them has no gradient at first.
        assert changed(start, first) and all("controlnet_" in n for n in changed(start, first))
        assert len(changed(first, second)) > len(start) / 2
    elif method == "ppd":
        assert all(name.startswith("user_adapter.") for name in start)
        # The values start at zero, so the keys have no gradient before they have moved.
        assert changed(start, first) == {name for name in start if ".to_v." in name}
        assert changed(first, second) == set(start)
        now = all_tensors(parts[network])
        now = {name: value for name, value in now.items() if not name.startswith("user_adapter.")}
        assert_same_tensors(now, frozen.pop(network))
    elif lora:
        # B starts at zero, so A has no gradient before B has moved.
        assert all("lora_" in name for name in start)
        assert changed(start, first) == {name for name in start if "lora_B" in name}
        assert changed(first, second) == set(start)
        now = {
            name.replace(".base_layer", ""): value
            for name, value in all_tensors(parts[network]).items()
            if "lora_" not in name
        }
        assert_same_tensors(now, frozen.pop(network))
    else:
        assert start.keys() == dict(parts[network].named_parameters()).keys()
        # The queries of SD3's last text stream reach no output.
        last = len(getattr(parts[network], "transformer_blocks", [])) - 1
        unread = (
            f"transformer_blocks.{last}.attn.{part}." for part in ("add_q_proj", "norm_added_q")
        )
        idle = {name for prefix in unread for name in start if name.startswith(prefix)}
        assert changed(start, first) == set(start) - idle
        frozen.pop(network)
    for name, before in frozen.items():
        assert_same_tensors(all_tensors(parts[name]), before)


@every_family
@lora_and_full
def test_policy_is_the_reference_before_training(tmp_path: Path, family: str, lora: bool) -> None:
    trainer = make_trainer(
        tmp_path,
        family,
        peft_config=lora_config(dropout=0.3) if lora else None,
        per_device_train_batch_size=2,
        beta=5000.0,
    )
    batch = first_batch(trainer)
    policy, reference = trainer.errors(batch)
    assert policy.requires_grad and not reference.requires_grad
    assert torch.equal(policy, reference)
    loss, metrics = trainer.compute_loss(batch)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-7)
    assert metrics["rewards/margins"].tolist() == [0.0, 0.0]
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


# Methods that sample while they learn have no fixed set; their own tests show it.
@by_default(
    lambda method, family, lora: (
        method == METHOD_NAMES[0] and (family, lora) in (("sd", True), ("sd3", False))
    )
)
@pytest.mark.parametrize("method", [m for m in METHOD_NAMES if m not in SAMPLING])
@every_family
@lora_and_full
def test_loss_falls_on_a_separable_set(
    tmp_path: Path, method: str, family: str, lora: bool
) -> None:
    skip_without_controlnet(method, family)
    # A random UNet says little about brightness through its attention: its convolutions
    # get adapters, too.
    targets = (
        None if family in FLOW else [*ATTENTION_TARGETS, "conv_in", "conv1", "conv2", "conv_out"]
    )
    # The same noise and timestep in every epoch, those of `evaluate`.
    one_draw = (
        {"precompute_ref_errors": True, "ref_error_draws": 1}
        if not trainer_class(method).reference_free
        else {}
    )
    trainer = make_trainer(
        tmp_path / "run",
        family,
        method,
        peft_config=lora_config(r=8, alpha=16, target_modules=targets) if lora else None,
        max_steps=16,
        learning_rate=learning_rate(family, lora),
        per_device_train_batch_size=4,
        **one_draw,
    )
    before = trainer.evaluate(method_rows(method))
    trainer.train()
    after = trainer.evaluate(method_rows(method))
    if method == "dgpo":  # its loss is an error, weighted less the better a list is ranked
        assert after["eval/rewards/margins"] > before["eval/rewards/margins"]
    else:
        assert after["eval/loss"] < before["eval/loss"]
    if method == "diffusion_dpo":
        assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert after["eval/rewards/accuracies"] == 1.0
        assert after["eval/rewards/margins"] > 0


@by_default(
    lambda method, family, lora: method == METHOD_NAMES[0] and in_turns(method, family, lora)
)
@every_method
@every_family
@lora_and_full
def test_trained_weights_draw_the_same_in_plain_diffusers(
    tmp_path: Path, method: str, family: str, lora: bool
) -> None:
    """Also where a LoRA holds attention and convolutions, whose keys diffusers names in
    two ways."""
    if method == "ctrl_u":
        pytest.skip("test_ctrl_u.py draws with ControlNets")
    base = draw(build_pipeline(family))
    targets = ATTENTION_TARGETS if family in FLOW else [*ATTENTION_TARGETS, "conv_in", "conv1"]
    config = lora_config(target_modules=targets) if lora else None
    trainer = make_trainer(
        tmp_path / "run", family, method, peft_config=config, max_steps=3, learning_rate=2e-2
    )
    trainer.train()
    trainer.network.eval()
    trained = draw(trainer.backbone.pipeline(network=trainer.network))
    plain = build_pipeline(family)
    if method == "ppd":  # its weights draw for a user
        mixture = {"ann": 0.5, "bob": 2.0}
        users = load_users(plain, tmp_path / "run")
        with torch.no_grad(), trainer.adapter.users(trainer.adapter.embedding(mixture)[None]):
            trained = draw(trainer.backbone.pipeline(network=trainer.network))
        with users.apply(mixture):
            np.testing.assert_allclose(draw(plain), trained, rtol=0, atol=1e-5)
        assert np.abs(trained - base).max() > 1e-3
        np.testing.assert_allclose(draw(plain), base, rtol=0, atol=1e-5)
        return
    if lora:
        plain.load_lora_weights(tmp_path / "run")
    else:
        absent = (
            {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
        )  # diffusers wants to be told
        plain = type(plain).from_pretrained(tmp_path / "run", **absent)
    np.testing.assert_allclose(draw(plain), trained, rtol=0, atol=1e-5)
    assert np.abs(trained - base).max() > 1e-3  # else the comparison would say nothing


RESUMED = {
    "lora": {
        "peft_config": {"dropout": 0.3},
        "use_ema": True,
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
    },
    "full": {
        "use_ema": True,
        "ema_decay": 0.9,
        "lr_scheduler": "linear",
        "warmup_steps": 1,
        "gradient_accumulation_steps": 2,
    },
    "plain lora": {"peft_config": {}, "proportion_empty_prompts": 0.5, "shared_noise": False},
    "adafactor": {"optim": "adafactor", "max_grad_norm": None},
}


@by_default(
    lambda method, kind: (
        method == METHOD_NAMES[0] or (kind == "lora" and method not in ("d3po", "seppo", "spo"))
    )
)
@every_method
@pytest.mark.parametrize("kind", list(RESUMED))
def test_resumed_run_is_the_uninterrupted_run(tmp_path: Path, method: str, kind: str) -> None:
    options = dict(RESUMED[kind])
    if "peft_config" in options:
        without = {"dropout": 0.0} if method == "grpo" else {}  # which it refuses
        options["peft_config"] = lora_config(**options["peft_config"] | without)
    if method in ("d3po", "grpo", "reward_backprop", "spo"):  # which train at their sampler's steps
        options.pop("proportion_empty_prompts", None)
    options |= {
        "max_steps": 6,
        "save_steps": 3,
        "save_total_limit": None,
        "per_device_train_batch_size": 2,
    }
    make_trainer(tmp_path / "a", "sd", method, **options).train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    resumed = make_trainer(
        tmp_path / "b",
        "sd",
        method,
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"),
        **options,
    )
    assert resumed.train().global_step == 6
    written = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors")]
    assert len(written) >= 3
    for path in written:
        assert_same_tensors(load_file(tmp_path / "b" / path), load_file(tmp_path / "a" / path))
    assert (tmp_path / "b/logs/metrics.jsonl").read_text() == (
        tmp_path / "a/logs/metrics.jsonl"
    ).read_text()
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "b/logs/metrics.jsonl").read_text().splitlines()
    ] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    if options.get("use_ema"):
        names = {p.name for p in (tmp_path / "a" / "checkpoint-6").iterdir()}
        assert "ema.safetensors" in names


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method trained by two processes, one pair each per step."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(
        Path(__file__).parents[1] / "training" / "script.py", "methods", folder, 2, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.nightly
@every_method
def test_two_processes_are_one_process(two_processes: Path, tmp_path: Path, method: str) -> None:
    steady = {"max_steps": 3, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    config = lora_config(target_modules=["to_q", "conv_in"])
    judged = {"options": {"scorers": [by_place]}} if method == "spo" else {}
    make_trainer(
        tmp_path,
        method=method,
        peft_config=config,
        per_device_train_batch_size=4,
        **judged,
        **steady,
    ).train()
    name = WEIGHTS.get(method, "pytorch_lora_weights")
    one, two = (load_file(f / f"{name}.safetensors") for f in (tmp_path, two_processes / method))
    assert_close_tensors(two, one, rtol=1e-3, atol=1e-5)
    moved = [tensor for key, tensor in one.items() if any(x in key for x in MOVED)]
    assert max(float(tensor.abs().max()) for tensor in moved) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_weights_are_exactly_the_reference_in_evaluation(
    tmp_path: Path, family: str
) -> None:
    """Also against a frozen copy, whose rounding must not differ."""
    trainer = make_trainer(tmp_path, family, peft_config=None, per_device_train_batch_size=4)
    found = trainer.evaluate(pair_rows(8))
    assert found["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert found["eval/rewards/accuracies"] == 0.5 and found["eval/rewards/margins"] == 0.0


@by_default()
@every_method
@lora_and_full
def test_config_yaml_is_the_run(tmp_path: Path, method: str, lora: bool) -> None:
    dropout = 0.0 if method == "grpo" else 0.1
    trainer = make_trainer(
        tmp_path / "run", "sd", method, peft_config=lora_config(dropout=dropout) if lora else None,
        max_steps=1, learning_rate=3e-7, snr_gamma=None if method == "ctrl_u" else 5.0
    )  # fmt: skip
    trainer.train()
    run = load_run(tmp_path / "run" / "config.yaml")
    assert run.method == method
    assert type(run.train) is config_class(method) and run.train == trainer.args
    assert run.data == trainer.data_config
    assert (run.lora is not None) is (lora and method not in WEIGHTS)
    if run.lora is not None:
        assert (run.lora.r, run.lora.alpha, run.lora.dropout, run.lora.init) == (
            4,
            8,
            dropout,
            "gaussian",
        )
        assert run.lora.target_modules == sorted(trainer.backbone.lora_targets)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(run_to_dict(run)))
    assert load_run(tmp_path / "again.yaml") == run
