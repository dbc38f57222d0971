"""Weights and models that are truncated, missing or something else: one sentence, exit
code 2, in every command that opens them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_pipeline

from diffalign import cli
from diffalign.backbones import load_backbone
from diffalign.backbones.loading import ModelSource
from diffalign.errors import ConfigError, UserError
from diffalign.generation.pipelines import load_pipeline
from diffalign.likelihood.schedules import schedule_from_scheduler
from diffalign.runtime.weight_files import read_header, what_is_wrong

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    build_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


CONTENTS = {
    "half": lambda data: data[: len(data) // 2],
    "first bytes": lambda data: data[:100],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "web page": lambda data: b"<!DOCTYPE html><html>not found</html>",
    "lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
    "zip": lambda data: b"PK\x03\x04" + data[:500],
    "zeros": lambda data: bytes(2000),
    "json": lambda data: (20).to_bytes(8, "little") + b'["no header at all"]',
}


@pytest.mark.parametrize("damage", CONTENTS)
def test_what_is_wrong_with_a_file(damage, whole, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(CONTENTS[damage]((whole / UNET).read_bytes()))
    assert what_is_wrong(file) and "\n" not in what_is_wrong(file)
    assert what_is_wrong(whole / UNET) is None and len(read_header(whole / UNET).shapes) > 10
    assert (
        what_is_wrong(tmp_path) == "is a folder, not a file"
        and what_is_wrong(tmp_path / "no") == "is not there"
    )


def commands(model: Path, out: Path) -> dict[str, list[Any]]:
    few = ["--num_images", 1, "--num_inference_steps", 2]
    return {
        "sample": ["sample", "--model", model, "--prompt", "x", *few, "--output_dir", out],
        "train": [
            "train",
            "--method",
            "sft",
            "--model",
            model,
            "--data.dataset_name",
            out / "none.jsonl",
            "--train.output_dir",
            out,
        ],
        "compare": [
            "compare",
            "--base",
            model,
            "--tuned",
            "x=shapes",
            "--prompts",
            "shapes-held-out",
            "--max_prompts",
            1,
            "--scorers",
            "shapes",
            *few,
            "--output_dir",
            out,
        ],
    }


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
@pytest.mark.parametrize("damage", ["half", "web page", "lfs", "empty", "gone"])
def test_damaged_components_are_named(part, damage, model, tmp_path, capsys):
    file = model / part
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(CONTENTS[damage](file.read_bytes()))
    code = cli.run([str(a) for a in commands(model, tmp_path / "out")["sample"]])
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and part.split("/")[0] in said
    with pytest.raises(ConfigError, match=part.split("/")[0]):
        ModelSource(str(model)).load(part.split("/")[0])


@pytest.mark.parametrize("command", ["compare"])
def test_other_commands_answer_alike(command, model, tmp_path, capsys):
    (model / UNET).write_bytes(b"<html>")
    assert cli.run([str(a) for a in commands(model, tmp_path / "out")[command]]) == 2
    assert "web page" in capsys.readouterr().err


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_weights_that_a_file_lacks_are_not_drawn_at_random(part, model):
    tensors = load_file(model / part)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, model / part, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks the weights|cannot be loaded"):
        load_pipeline(str(model))
    with pytest.raises(ConfigError, match="lacks the weights|cannot be loaded"):
        ModelSource(str(model)).load(part.split("/")[0])


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"null",
        b"{}",
        b'{"_class_name": 3}',
        b'{"_class_name": "NoSuchPipeline", "unet": ["diffusers", "NoSuchModel"]}',
        b"\xff",
    ],
)
def test_damaged_indices(content, model, tmp_path, capsys):
    (model / "model_index.json").write_bytes(content)
    for name in ("sample", "train"):
        assert cli.run([str(a) for a in commands(model, tmp_path / "out")[name]]) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "part",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("content", [None, b"<html>", b"[1]"])
def test_damaged_configs(part, content, model, tmp_path, capsys):
    (model / part).unlink()
    if content is not None:
        (model / part).write_bytes(content)
    code = cli.run([str(a) for a in commands(model, tmp_path / "out")["sample"]])
    said = capsys.readouterr().err
    assert (code == 2 and "Traceback" not in said) or (code == 0 and content is None)


def as_variant(folder: Path, *parts: str, variant: str = "fp16") -> None:
    for part in parts:
        file = folder / part
        file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


def test_the_variant_that_is_there_is_read(model):
    as_variant(model, UNET, VAE, TEXT)
    assert load_pipeline(str(model)).unet is not None
    source = ModelSource(str(model))
    assert (
        source.load("unet") is not None
        and source.load("text_encoder") is not None
        and source.pipeline_variant() == "fp16"
    )


def test_mixed_folders_are_read_per_component(model):
    as_variant(model, UNET)
    assert ModelSource(str(model), variant="fp16").load("vae") is not None
    assert ModelSource(str(model)).load("unet") is not None
    assert load_pipeline(str(model)).vae is not None


def test_several_variants_are_a_choice(model):
    shutil.copy(model / UNET, model / "unet/diffusion_pytorch_model.ema.safetensors")
    as_variant(model, UNET)
    with pytest.raises(ConfigError, match="variants ema, fp16"):
        ModelSource(str(model)).load("unet")
    assert ModelSource(str(model), variant="ema").load("unet") is not None


@pytest.mark.parametrize("vae", ["/nowhere", "nowhere", "file", "half", "text_encoder"])
def test_autoencoders_that_are_none(vae, model, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    if vae == "half":
        shutil.copytree(model / "vae", tmp_path / "half")
        file = tmp_path / "half/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:900])
    place = model / "text_encoder" if vae == "text_encoder" else tmp_path / vae
    with pytest.raises(ConfigError, match="vae"):
        ModelSource(str(model), vae=str(place)).load("vae")


OTHERS = [
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "KarrasVeScheduler",
    "IPNDMScheduler",
    "ScoreSdeVeScheduler",
]


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_of_other_formulations(name):
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip("not in this version")
    with pytest.raises(UserError, match=f"the scheduler {name} .*not supported"):
        schedule_from_scheduler(cls())


def test_continuous_times_and_unknown_predictions():
    for scheduler in (
        diffusers.EulerDiscreteScheduler(timestep_type="continuous"),
        diffusers.DDIMScheduler.from_config({"prediction_type": "epsilon"}),
    ):
        if scheduler.config.get("timestep_type") == "continuous":
            with pytest.raises(UserError, match="not supported"):
                schedule_from_scheduler(scheduler)
        else:
            assert schedule_from_scheduler(scheduler).prediction_type == "epsilon"
            scheduler.register_to_config(prediction_type="noise")
            with pytest.raises(UserError, match="prediction_type 'noise'"):
                schedule_from_scheduler(scheduler)


def test_names_that_are_no_place(tmp_path, capsys):
    for name in ("x" * 300, "a/b/c", str(tmp_path / "none"), "a\0b", ""):
        assert (
            cli.run(
                ["sample", "--model", name, "--prompt", "x", "--output_dir", str(tmp_path / "o")]
            )
            == 2
        )
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.nightly
def test_mutated_weight_files(whole, tmp_path):
    """600 mutated files: a header that fits its file, or one sentence; a broken index
    never a traceback."""
    data = (whole / TEXT).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator, refused = random.Random(0), 0
    file = tmp_path / "x.safetensors"
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            if generator.random() < 0.3:
                del changed[generator.randrange(len(changed)) :]
                changed = changed or bytearray(b"x")
            else:
                changed[generator.randrange(min(header, len(changed)))] = generator.randrange(256)
        file.write_bytes(bytes(changed))
        reason = what_is_wrong(file)
        refused += reason is not None
        if reason is None:
            read_header(file)
    assert refused > 100


def test_stable_diffusion_3_without_its_t5_encoder(tmp_path):
    """It is saved without the part, which plain `from_pretrained` then asks for."""
    pipe = build_pipeline("sd3")
    pipe.save_pretrained(tmp_path / "m")
    loaded = load_pipeline(str(tmp_path / "m"), device="cpu")
    assert loaded.text_encoder_3 is None and loaded.transformer is not None
    encoded = load_backbone(str(tmp_path / "m")).encode_prompts(["a cat"])
    expected, _, pooled, _ = pipe.encode_prompt(
        ["a cat"], None, None, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(encoded["prompt_embeds"], expected)
    torch.testing.assert_close(encoded["pooled_prompt_embeds"], pooled)
