"""Models in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_pipeline, lora_config, make_trainer, pair_rows

from diffalign import cli
from diffalign.backbones import load_backbone, single_file
from diffalign.backbones.lora_names import _unet
from diffalign.errors import ConfigError
from diffalign.generation.pipelines import load_pipeline


def original_unet(unet: Any) -> dict[str, torch.Tensor]:
    """The weights by the names of the original code."""
    names = {paths[0]: original for original, paths in _unet(2, 1, original=True).items()}
    state = {}
    for name, tensor in unet.state_dict().items():
        path, _, kind = name.rpartition(".")
        original = names.get(re.sub(r"transformer_blocks\.\d+", "transformer_blocks.{i}", path))
        if path == "conv_norm_out":
            original = "out.0"
        elif ".resnets." in path and path.endswith(("norm1", "norm2")):
            block = names[f"{path.rpartition('.')[0]}.conv1"].removesuffix(".in_layers.2")
            original = f"{block}.{'in_layers.0' if path.endswith('norm1') else 'out_layers.0'}"
        elif ".attentions." in path and original is None:
            head, _, rest = path.partition(".attentions.")
            number, _, inner = rest.partition(".")
            block = names[f"{head}.attentions.{number}.proj_in"].removesuffix(".proj_in")
            original = f"{block}.{inner}"
        assert original is not None, name
        state[f"model.diffusion_model.{original.replace('{i}', '0')}.{kind}"] = tensor.clone()
    return state


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline as a folder, and another UNet of its family in one file."""
    monkeypatch.setattr(single_file, "cache_folder", lambda: tmp_path / "cache")
    build_pipeline("sd").save_pretrained(tmp_path / "base")
    save_file(original_unet(build_pipeline("sd", 7).unet), tmp_path / "mine.safetensors")
    return tmp_path


def test_a_file_is_the_pipeline_with_its_weights(files: Path) -> None:
    """The autoencoder and the encoders, which it lacks, are the base's."""
    file, base = str(files / "mine.safetensors"), str(files / "base")
    backbone = load_backbone(file, base=base)
    assert type(backbone).__name__ == "StableDiffusionBackbone" and backbone.source.name == file
    found = backbone.load_network(torch.float32).state_dict()
    expected = build_pipeline("sd", 7).unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = load_pipeline(file, device="cpu")  # without the base: it has been converted
    for name in ("vae", "text_encoder"):
        mine, theirs = getattr(again, name), getattr(build_pipeline("sd"), name)
        assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
    assert len(list((files / "cache").glob("*/model_index.json"))) == 1
    assert not list((files / "cache").glob("tmp*"))


def test_training_and_drawing_by_a_file(files: Path) -> None:
    file, base = str(files / "mine.safetensors"), str(files / "base")
    trainer = make_trainer(
        files / "run", model=file, rows=pair_rows(4), max_steps=1, peft_config=lora_config(),
        options={"model_base": base},
    )  # fmt: skip
    trainer.train()
    facts = (files / "run" / "config.yaml").read_text()
    assert f"model: {file}" in facts and f"model_base: {base}" in facts
    command = ["sample", "--model", file, "--lora", str(files / "run"), "--prompt", "a cat"]
    command += ["--num_images", "1", "--num_inference_steps", "2", "--output_dir"]
    assert cli.run([*command, str(files / "out")]) == 0
    assert list((files / "out").rglob("*.png"))


def test_z_images_fused_layers_are_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(single_file, "_kind", lambda path, shapes: "z-image-turbo")
    build_pipeline("z-image").save_pretrained(tmp_path / "base")
    state = build_pipeline("z-image", 7).transformer.state_dict()
    original = {}
    for name, tensor in state.items():
        if ".to_q." in name:
            parts = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            original[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            name = name.replace("to_out.0", "out").replace("norm_q", "q_norm")
            name = name.replace("norm_k", "k_norm").replace("all_final_layer.2-1", "final_layer")
            original[name.replace("all_x_embedder.2-1", "x_embedder")] = tensor.clone()
    save_file(original, tmp_path / "z.safetensors")
    backbone = load_backbone(str(tmp_path / "z.safetensors"), base=str(tmp_path / "base"))
    found = backbone.load_network(torch.float32).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_mistakes_are_one_sentence(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_backbone(str(files / "none.safetensors"))
    (files / "old.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        load_backbone(str(files / "old.ckpt"))
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, files / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"is no checkpoint of a family .*lora\.start_from"):
        load_backbone(str(files / "lora.safetensors"))
    whole = load_file(files / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"needs the configs of .*name a pipeline.*model_base"):
        load_backbone(str(files / "mine.safetensors"), base=str(files / "nowhere"))
    save_file({name: whole[name] for name in list(whole)[:40]}, files / "part.safetensors")
    with pytest.raises(ConfigError, match=r"cannot be converted .*weights are missing"):
        load_backbone(str(files / "part.safetensors"), base=str(files / "base"))
    assert not list((files / "cache").glob("*/model_index.json"))


def test_a_file_that_predicts_v_says_so(files: Path, capsys: pytest.CaptureFixture) -> None:
    """By its marker tensors, as SDXL checkpoints of the community have them."""
    state = load_file(files / "mine.safetensors")
    save_file(state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, files / "v.safetensors")
    backbone = load_backbone(str(files / "v.safetensors"), base=str(files / "base"))
    assert backbone.schedule.prediction_type == "v_prediction"
    assert backbone.scheduler.config.rescale_betas_zero_snr
    assert "the file says that it predicts v" in capsys.readouterr().out


def test_a_base_that_changed_is_another_base(files: Path) -> None:
    import json

    file, base = str(files / "mine.safetensors"), files / "base"
    load_backbone(file, base=str(base))
    config = base / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(settings))
    changed = load_backbone(file, base=str(base))
    assert changed.schedule.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="was converted with several bases"):
        load_backbone(file)


def test_quantised_weights_with_scales_are_refused(files: Path) -> None:
    """diffusers would drop the scales, and the weights would be noise."""
    tensors = original_unet(build_pipeline("sd", 7).unet)
    name = next(key for key in tensors if key.endswith("to_q.weight"))
    tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
    save_file(tensors, files / "scaled.safetensors")
    with pytest.raises(ConfigError, match=r"is quantised with scales .*to_q.scale_weight"):
        load_backbone(str(files / "scaled.safetensors"), base=str(files / "base"))
