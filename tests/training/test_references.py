"""References and what identifies a run: no dropout, the same kind of model, caches and
checkpoints that know whose values they hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from tiers import by_default
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    lora_config,
    make_trainer,
    next_batch,
    pair_rows,
    trained_tensors,
)
from tiny_families import size_of

from diffalign import cli
from diffalign.data import convert, load_preferences
from diffalign.errors import ConfigError, UserError
from diffalign.training.build import trainable_parameters
from diffalign.training.estimate import example_condition
from diffalign.training.evaluate import float32_layers


def first_batch(trainer: Any) -> Any:
    trainer.setup()
    return trainer.prepare(next(trainer.micro_batches(next_batch(trainer))))


REFERENCES = [
    ("diffusion_dpo", {}, True),
    ("diffusion_dpo", {}, False),
    ("d3po", {"reference": "iterated"}, True),
    ("seppo", {}, True),
    ("seppo", {"ref_strategy": "latest"}, True),
]


@pytest.mark.parametrize(("method", "options", "lora"), REFERENCES)
def test_a_reference_never_drops_anything(
    method: str, options: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    """Two predictions at one point are bit-equal; the policy keeps its dropout."""
    pipe = build_pipeline("sd")
    for block in pipe.unet.modules():
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.3
    config = lora_config(dropout=0.5) if lora else None
    trainer = make_trainer(tmp_path, method=method, model=pipe, peft_config=config, **options)
    batch = first_batch(trainer)
    with torch.no_grad():
        for parameter in trainable_parameters(trainer.network):
            parameter += 0.05 * torch.randn_like(parameter)
    if hasattr(trainer.reference_model, "take"):
        trainer.reference_model.take()
    noisy = batch.x0.flatten(0, 1)
    times = torch.full((len(noisy),), 400)
    condition = {
        name: value.repeat_interleave(batch.k, 0)[: len(noisy)]
        for name, value in batch.condition.items()
    }
    first, second = (trainer.reference.predict(noisy, times, condition) for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        policy = [trainer.policy.predict(noisy, times, condition) for _ in range(2)]
    assert not torch.equal(*policy)


def test_references_of_another_kind_are_refused(tmp_path: Path) -> None:
    policy = build_pipeline("sd")

    def refused(words: str, reference: Any, family: str = "sd", model: Any = policy) -> None:
        with pytest.raises(ConfigError, match=words):
            make_trainer(
                tmp_path,
                family,
                model=model,
                peft_config=lora_config(),
                options={"ref_model": reference},
            )

    refused("ref_model: .* predicts v_prediction, the policy epsilon", build_pipeline("sd_v"))
    refused("ref_model: .* is of another model family", build_pipeline("sdxl"))
    refused("ref_model: .* is of another model family", build_pipeline("sd3"))
    refused("ref_model: is the policy's own pipeline", policy)
    shared = build_pipeline("sd", seed=1)
    shared.unet = policy.unet
    refused("ref_model: is the policy's own pipeline", shared)
    for changes in (
        {"beta_end": 0.02},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 500},
    ):
        other = build_pipeline("sd", seed=1)
        other.scheduler = DDIMScheduler.from_config(other.scheduler.config, **changes)
        refused("ref_model: .* has another noise schedule", other)
    assert make_trainer(
        tmp_path,
        model=policy,
        peft_config=lora_config(),
        options={"ref_model": build_pipeline("sd", seed=1)},
    )


@pytest.mark.nightly
def test_precomputed_errors_belong_to_their_reference_and_autoencoder(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "precompute_ref_errors": True,
        "ref_error_draws": 2,
        "peft_config": lora_config(),
        "max_steps": 1,
    }

    def notes(**more: Any) -> str:
        trainer = make_trainer(tmp_path, **options, **more)
        trainer.setup()
        trainer.precompute_reference_errors()
        return next(note for note in trainer.notes if note.startswith("reference errors"))

    assert notes().endswith("computed") and notes().endswith("read back")
    other = build_pipeline("sd", seed=1)
    assert notes(options={"ref_model": other}).endswith("computed")
    assert notes(options={"ref_model": build_pipeline("sd", seed=1)}).endswith("read back")
    assert notes(options={"ref_model": build_pipeline("sd", seed=2)}).endswith("computed")
    assert notes().endswith("computed")
    changed = build_pipeline("sd")
    changed.vae = build_pipeline("sd", seed=3).vae
    assert notes(model=changed).endswith("computed")
    assert notes(mixed_precision="bf16").endswith("computed")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_latent_cache_knows_its_precision(family: str, tmp_path: Path) -> None:
    """A float32 run on a cache that a bf16 run filled trains as without a cache."""
    options: dict[str, Any] = {"peft_config": lora_config(), "max_steps": 2}
    crop = {"center_crop": True, "random_flip": False}
    plain = make_trainer(tmp_path / "plain", family, data=crop, **options)
    plain.train()
    cached = {"cache_latents": str(tmp_path / "cache"), **crop}
    make_trainer(tmp_path / "half", family, data=cached, mixed_precision="bf16", **options).train()
    full = make_trainer(tmp_path / "full", family, data=cached, **options)
    full.train()
    assert_close_tensors(trained_tensors(full), trained_tensors(plain), rtol=1e-4, atol=1e-6)


def test_sdxl_encodes_in_float32_in_a_bf16_run(tmp_path: Path) -> None:
    """And draws: its pipeline decodes what it was not made for."""
    half = make_trainer(
        tmp_path / "half", "sdxl", peft_config=lora_config(), mixed_precision="bf16", max_steps=1
    )
    full = make_trainer(tmp_path / "full", "sdxl", peft_config=lora_config(), max_steps=1)
    latents = [first_batch(trainer).x0.float() for trainer in (half, full)]
    torch.testing.assert_close(*latents, rtol=1e-6, atol=1e-6)
    assert (
        half.backbone.component("vae").dtype == torch.float32
        and half.backbone.component("text_encoder").dtype == torch.bfloat16
    )
    other = make_trainer(
        tmp_path / "sd", "sd", peft_config=lora_config(), mixed_precision="bf16", max_steps=1
    )
    first_batch(other)
    assert other.backbone.component("vae").dtype == torch.bfloat16
    pipe = half.backbone.pipeline(network=half.network)
    images = pipe("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


CHANGES: list[dict[str, Any]] = [
    {"peft_config": lora_config(use_rslora=True)},
    {"peft_config": lora_config(use_dora=True)},
    {"peft_config": lora_config(alpha_pattern={"to_q": 3})},
    {"peft_config": lora_config(rank_pattern={"to_q": 2})},
    {"peft_config": lora_config(exclude_modules=["to_v"])},
    {"mixed_precision": "bf16"},
    {"options": {"ref_model": "other"}},
    {"model": "vae"},
]


@pytest.mark.parametrize(
    "change",
    CHANGES,
    ids=lambda change: str({k: v for k, v in change.items() if k != "peft_config"} or "lora"),
)
def test_another_lora_reference_precision_or_autoencoder_is_not_resumed(
    change: dict[str, Any], tmp_path: Path
) -> None:
    make_trainer(tmp_path, peft_config=lora_config(), max_steps=1, save_steps=1).train()
    values: dict[str, Any] = {"peft_config": lora_config(), **change}
    if values.get("model") == "vae":
        values["model"] = build_pipeline("sd")
        values["model"].vae = build_pipeline("sd", seed=1).vae
    if "options" in values:
        values["options"] = {"ref_model": build_pipeline("sd", seed=1)}
    trainer = make_trainer(tmp_path, max_steps=2, **values)
    with pytest.raises(UserError, match="belongs to another run"):
        trainer.train(resume_from_checkpoint="latest")


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    import json

    make_trainer(tmp_path, peft_config=lora_config(), max_steps=1, save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    record = json.loads(file.read_text())
    for name in ("lora_form", "reference", "autoencoder", "precision"):
        del record["identity"][name]
    file.write_text(json.dumps(record))
    assert (
        make_trainer(tmp_path, peft_config=lora_config(), max_steps=2).train("latest").global_step
        == 2
    )


def test_the_written_config_repeats_the_run(tmp_path: Path) -> None:
    """Patterns and the reference model too, through the command."""
    data = str(convert(load_preferences(pair_rows(4), verbose=False), tmp_path / "pairs"))
    build_pipeline("sd").save_pretrained(tmp_path / "model")
    build_pipeline("sd", seed=1).save_pretrained(tmp_path / "ref")
    lora = {"r": 4, "alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 9}}
    run = {
        "method": "diffusion_dpo",
        "model": str(tmp_path / "model"),
        "ref_model": str(tmp_path / "ref"),
        "lora": lora,
        "data": {"dataset_name": data, "resolution": 32},
        "train": {
            "output_dir": str(tmp_path / "one"),
            "max_steps": 2,
            "beta": 100,
            "learning_rate": 1e-3,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.run(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    written = tmp_path / "one" / "config.yaml"
    values = yaml.safe_load(written.read_text())
    assert values["lora"]["rank_pattern"] == {"to_q": 2} and values["ref_model"] == str(
        tmp_path / "ref"
    )
    assert "does not repeat" not in written.read_text()
    assert (
        cli.run(["train", "--config", str(written), "--train.output_dir", str(tmp_path / "two")])
        == 0
    )
    from safetensors.torch import load_file

    assert_same_tensors(
        *(
            load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
            for name in ("one", "two")
        )
    )


def test_what_the_config_cannot_hold_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "b",
        peft_config=lora_config(exclude_modules=["to_v"]),
        max_steps=1,
        options={
            "ref_model": build_pipeline("sd", seed=1),
            "optimizers": (lambda p: torch.optim.SGD(p, 1e-3), None),
        },
    )
    trainer.train()
    first = (tmp_path / "b" / "config.yaml").read_text().splitlines()[0]
    assert first == (
        "# This file alone does not repeat the run: it was given the model, a pipeline object, "
        "ref_model, a pipeline object, the data, passed as train_dataset, optimizers, "
        "peft_config.exclude_modules in Python."
    )


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_bf16_run_starts_at_log_2(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Policy and reference are equal before the first step, also with DoRA, whose norms
    peft rounds."""
    config = lora_config(
        target_modules=["to_q", "to_k", "conv_in"] if family == "sd" else None, **options
    )
    trainer = make_trainer(
        tmp_path,
        family,
        peft_config=config,
        mixed_precision="bf16",
        beta=5000.0,
        per_device_train_batch_size=4,
    )
    with torch.no_grad():
        policy, reference = trainer.errors(first_batch(trainer))
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("lora", [True, False])
def test_a_bf16_run_says_how_much_is_rounding(
    lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, measured on a batch; without any effect on the run."""
    options: dict[str, Any] = {
        "mixed_precision": "bf16",
        "max_steps": 2,
        "beta": 5000.0,
        "per_device_train_batch_size": 4,
    }
    options["peft_config"] = lora_config(dropout=0.3) if lora else None
    trainer = make_trainer(tmp_path / "a", **options)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rounding: ")]
    assert len(said) == 1 and "bf16 alone moves the logit of the same weights by " in said[0]
    spread = float(said[0].split(" by ")[1].split()[0])
    assert 0.001 < spread < 50
    silent = make_trainer(tmp_path / "b", **options)
    silent.data_kind = "single"  # what makes it leave the measurement out
    silent.train_dataset = trainer.train_dataset
    silent.train()
    assert "rounding: " not in capsys.readouterr().out
    assert_same_tensors(trained_tensors(trainer), trained_tensors(silent))
    make_trainer(tmp_path / "c", **{**options, "mixed_precision": "no"}).train()
    assert "rounding: " not in capsys.readouterr().out


def all_values(network: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


@by_default(lambda family, dora: (family, dora) in (("sd", True), ("flux", False)))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z-image", "qwen-image", "sana"])
def test_layers_in_float32_are_a_copy_in_float32(family: str, dora: bool, tmp_path: Path) -> None:
    """And have their own weights again afterwards."""
    trainer = make_trainer(
        tmp_path, family, mixed_precision="bf16", peft_config=lora_config(use_dora=dora),
        data={"resolution": size_of(family)},
    )  # fmt: skip
    trainer.setup()
    network, backbone = trainer.network.eval(), trainer.backbone
    noisy = torch.randn(2, *backbone.latent_shape(size_of(family), size_of(family)))
    condition = example_condition(backbone, 2, torch.float32)
    inputs = noisy, torch.tensor([300.0, 300.0]), condition
    copied = copy.deepcopy(network).float()
    vars(copied).pop("forward", None)
    before = {name: (value.data_ptr(), value.dtype) for name, value in all_values(network)}
    with torch.no_grad():
        expected = backbone.predict(copied, *inputs)
        # Z-Image's embedding of the time looks at the precision inside it.
        with float32_layers(network, 2**25 if family == "z-image" else 0):
            result = backbone.predict(network, *inputs)
    assert torch.equal(result, expected)
    assert before == {name: (value.data_ptr(), value.dtype) for name, value in all_values(network)}
    assert any(dtype == torch.bfloat16 for _, dtype in before.values())
    with pytest.raises(TypeError), float32_layers(network):
        network()
    assert before == {name: (value.data_ptr(), value.dtype) for name, value in all_values(network)}


def test_the_rounding_is_measured_within_one_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of different sizes are no batch; the unmeasurable never ends a run."""
    from tiny import picture

    rows = [
        {
            "prompt": "a",
            "chosen": picture(200, i, 32).resize(size),
            "rejected": picture(40, i, 32).resize(size),
        }
        for i, size in enumerate([(32, 64), (64, 32)] * 4)
    ]
    options: dict[str, Any] = {
        "mixed_precision": "bf16",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "rows": rows,
    }
    options |= {
        "data": {"aspect_ratio_buckets": "32,64;64,32", "resolution": None},
        "peft_config": lora_config(),
    }
    trainer = make_trainer(tmp_path / "a", **options)
    trainer.train()
    said = capsys.readouterr().out
    assert "rounding: bf16 alone moves" in said
    assert trainer.evaluate(rows)["eval/loss"] > 0
    other = make_trainer(tmp_path / "b", **options)
    other.setup()
    other.sampling_policy.errors = lambda *_: 1 / 0
    other._measure_rounding()
    assert other.notes[-1].startswith("rounding: not measured (ZeroDivisionError")


def test_the_autoencoders_identity_is_that_of_the_given_one(tmp_path: Path) -> None:
    """Not of what bf16 has cast it to: a resume that casts it later is the same run."""
    crop = {"center_crop": True, "random_flip": False, "cache_latents": str(tmp_path / "cache")}
    options: dict[str, Any] = {
        "peft_config": lora_config(),
        "mixed_precision": "bf16",
        "data": crop,
    }
    make_trainer(tmp_path / "run", max_steps=1, save_steps=1, **options).train()
    assert make_trainer(tmp_path / "run", max_steps=2, **options).train("latest").global_step == 2


def test_patterns_may_hold_fractions(tmp_path: Path) -> None:
    make_trainer(
        tmp_path, peft_config=lora_config(alpha_pattern={"to_q": 8.5}), max_steps=1
    ).train()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lora"]["alpha_pattern"] == {
        "to_q": 8.5
    }
