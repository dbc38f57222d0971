"""LoRA files of kohya's scripts, ComfyUI, peft and diffusers: the same LoRA in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file, save_file
from tiers import by_default
from tiny import build_pipeline, lora_config, make_trainer

from diffalign import cli
from diffalign.backbones import load_backbone
from diffalign.backbones.lora import load_lora, lora_state
from diffalign.backbones.lora_formats import (
    FORMATS,
    LoraLayer,
    LoraWeights,
    default_file,
    fuse,
    read_lora,
    split,
    write_lora,
)
from diffalign.backbones.lora_names import NAMINGS
from diffalign.errors import UserError

FILE = "pytorch_lora_weights.safetensors"
FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux2-klein", "z-image", "qwen-image")


def pipeline(family: str) -> Any:
    """A tiny pipeline. SDXL has two residual blocks per resolution, as always."""
    pipe = build_pipeline(family)
    if family == "sdxl":
        torch.manual_seed(0)
        config = {**pipe.unet.config, "layers_per_block": 2}
        pipe.unet = UNet2DConditionModel.from_config(config).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(family: str, folder: Path, **options: Any) -> LoraWeights:
    """A LoRA with random weights on the family's default layers, as a run saves it."""
    backbone = load_backbone(pipeline(family))
    network = backbone.load_network(torch.float32)
    config = lora_config(target_modules=backbone.lora_targets, **options)
    config.init_lora_weights = False
    torch.manual_seed(5)
    network.add_adapter(config)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
        if "magnitude" in name:
            parameter.data = 1 + torch.rand_like(parameter)
    folder.mkdir(parents=True)
    backbone.save_lora(str(folder), network, lora_state(network))
    return read_lora(folder, "--lora", backbone.source.pipeline_class_name)


def assert_same(found: LoraWeights, expected: LoraWeights) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert torch.equal(other.down, layer.down) and torch.equal(other.up, layer.up), name
        assert other.alpha == layer.alpha
        assert (other.magnitude is None) == (layer.magnitude is None)
        assert layer.magnitude is None or torch.equal(other.magnitude, layer.magnitude)


def draw(pipe: Any) -> np.ndarray:
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
    call = load_backbone(pipe).call_arguments({**call, "prompt": "a cat", "guidance_scale": 2.0})
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images[0]


@by_default(lambda family, form, dora: dora == (form == "kohya"))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_bit_equal(family: str, form: Any, dora: bool, tmp_path: Path) -> None:
    """There and back, and the file loads into the pipeline with the same images."""
    lora = saved(family, tmp_path / "run", use_dora=dora)
    target = default_file(tmp_path / form, form)
    if dora and family == "sd3" and form in ("kohya", "comfy"):
        # The last block's text stream has no query in the default layers.
        with pytest.raises(UserError, match="a DoRA of some of the layers that the format fuses"):
            write_lora(lora, target, form)
        assert not target.exists()
        return
    write_lora(lora, target, form)
    assert_same(read_lora(target, "--lora", lora.naming.pipelines[0]), lora)
    images = []
    for place in (tmp_path / "run", target):
        pipe = pipeline(family)
        load_lora(pipe, place, "x", "--lora")
        images.append(draw(pipe))
    np.testing.assert_allclose(images[1], images[0], atol=2e-5)
    assert np.abs(images[0] - draw(pipeline(family))).max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux2-klein", "z-image", "qwen-image"])
def test_plain_diffusers_reads_kohyas_names(family: str, tmp_path: Path) -> None:
    lora = saved(family, tmp_path / "run")
    write_lora(lora, tmp_path / "kohya" / FILE, "kohya")
    images = []
    for folder in ("run", "kohya"):
        pipe = pipeline(family)
        pipe.load_lora_weights(str(tmp_path / folder), weight_name=FILE)
        images.append(draw(pipe))
    np.testing.assert_allclose(images[1], images[0], atol=2e-5)


def test_peft_reads_its_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    lora = saved("sd", tmp_path / "run", rank_pattern={"to_q": 2}, alpha_pattern={"to_v": 3})
    write_lora(lora, tmp_path / "peft", "peft")
    tuned = PeftModel.from_pretrained(pipeline("sd").unet, str(tmp_path / "peft")).eval()
    pipe = pipeline("sd")
    pipe.load_lora_weights(str(tmp_path / "run"))
    noisy, times = torch.randn(1, 4, 16, 16), torch.tensor([300])
    text = torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        found = tuned(noisy, times, encoder_hidden_states=text).sample
        expected = pipe.unet(noisy, times, encoder_hidden_states=text).sample
    torch.testing.assert_close(found, expected)


# Against diffusers' converters of whole checkpoints -----------------------------------


class Checkpoint(dict[str, torch.Tensor]):
    """An original checkpoint, zero where a LoRA changes nothing."""

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.zeros(21504 if ".linear1." in key else 6, 1)

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key) if key in self else self[key]


def change(layer: LoraLayer) -> torch.Tensor:
    return layer.scale * layer.up @ layer.down


def random_lora(family: str, width: int, paths: list[str]) -> LoraWeights:
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for path in paths:
        out = 4 * width if path.endswith("proj_mlp") else width
        layers[f"transformer.{path}"] = LoraLayer(
            torch.randn(2, 5, generator=generator), torch.randn(out, 2, generator=generator), 3.0
        )
    return LoraWeights(layers, NAMINGS[family], "diffusers")


ATTENTION = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
TEXT = [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
PATHS = {
    "sd3": [
        f"transformer_blocks.{i}.{name}"
        for i in (0, 1)
        for name in [*ATTENTION, "ff.net.0.proj", "ff.net.2", *TEXT[:3], "attn2.to_k"]
    ],
    "flux": [
        *[f"transformer_blocks.0.{name}" for name in [*ATTENTION, *TEXT, "ff.net.2"]],
        *[f"transformer_blocks.0.{name}" for name in ("ff_context.net.0.proj", "norm1.linear")],
        *[f"single_transformer_blocks.0.{name}" for name in [*ATTENTION[:3], "proj_mlp"]],
        "single_transformer_blocks.0.proj_out",
    ],
    "flux2": [
        *[f"transformer_blocks.0.{name}" for name in [*ATTENTION, *TEXT, "ff.linear_in"]],
        *[f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")],
    ],
    "z-image": [
        f"{block}.0.{name}"
        for block in ("layers", "noise_refiner", "context_refiner")
        for name in ["attention.to_q", "attention.to_v", "attention.to_out.0", "feed_forward.w2"]
    ],
}
CONVERTERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_original_names_are_those_of_the_checkpoints(family: str, tmp_path: Path) -> None:
    """The change of an original checkpoint, converted by diffusers, is the LoRA's."""
    width = 3072 if family == "flux" else 12  # diffusers' converter has Flux's width in it
    lora = random_lora(family, width, PATHS[family])
    write_lora(lora, tmp_path / FILE, "comfy")
    tensors = load_file(tmp_path / FILE)
    checkpoint = Checkpoint()
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        down, up = tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"]
        weight = float(tensors[name]) / len(down) * up @ down
        checkpoint[f"{layer.removeprefix('diffusion_model.')}.weight"] = weight
    converted = CONVERTERS[family](checkpoint)
    for name, layer in lora.layers.items():
        weight = converted.pop(f"{name.removeprefix('transformer.')}.weight")
        torch.testing.assert_close(weight, change(layer), rtol=1e-5, atol=1e-5)
    left = {name: value for name, value in converted.items() if name.endswith("weight")}
    assert not [name for name, value in left.items() if value.any()]


def test_diffusers_converter_reads_flux_in_kohyas_names(tmp_path: Path) -> None:
    lora = random_lora("flux", 3072, PATHS["flux"])
    write_lora(lora, tmp_path / FILE, "kohya")
    found = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / FILE))
    assert {name.split(".lora_")[0] for name in found} == lora.layers.keys()
    for name, layer in lora.layers.items():
        weight = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        torch.testing.assert_close(weight, change(layer), rtol=1e-5, atol=1e-5)


# Fusing -------------------------------------------------------------------------------


def layer(rank: int, out: int, alpha: float = 4.0, seed: int = 0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, generator=generator)
    return LoraLayer(down, torch.randn(out, rank, generator=generator), alpha)


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([layer(2, 6), layer(2, 6, seed=1), layer(2, 6, seed=2)], (1, 1, 1)),
        ([None, layer(2, 6), None], (1, 1, 1)),
        ([layer(2, 6), layer(3, 6, 6.0), layer(1, 6, 2.0), layer(2, 24)], (1, 1, 1, 4)),
        ([layer(2, 6, 1.0), layer(2, 6, 3.0), None], (1, 1, 1)),
    ],
    ids=["three", "one of three", "ranks", "scales"],
)
def test_a_fused_lora_is_that_of_its_parts(
    parts: list[LoraLayer | None], rows: tuple[int, ...]
) -> None:
    fused = fuse(parts, rows)
    expected = [
        torch.zeros(6 * row, 5) if part is None else change(part)
        for part, row in zip(parts, rows, strict=True)
    ]
    torch.testing.assert_close(change(fused), torch.cat(expected))
    for part, other in zip(parts, split(fused, rows), strict=True):
        assert (part is None) == (other is None)
        if part is not None:
            torch.testing.assert_close(change(other), change(part))


def test_a_fused_lora_without_blocks_is_split_by_rows() -> None:
    """As kohya's scripts train it: one `down` for query, key and value."""
    whole = layer(6, 18)
    parts = split(whole, (1, 1, 1))
    torch.testing.assert_close(torch.cat([change(part) for part in parts]), change(whole))
    assert all(torch.equal(part.down, whole.down) for part in parts)


# The command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model lies in a folder."""
    folder = tmp_path_factory.mktemp("run")
    pipeline("sdxl").save_pretrained(folder / "model")
    trainer = make_trainer(
        folder / "lora", model=str(folder / "model"), family="sdxl", peft_config=lora_config(),
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    return folder / "lora"


def test_export_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model of the run tells SDXL from Stable Diffusion."""
    file = tmp_path / "loras" / "mine.safetensors"
    command = ["export", "--lora", str(run), "--format", "comfy", "--output", str(file)]
    assert cli.run(command) == 0
    assert "48 layers of SDXL, comfy format" in capsys.readouterr().out
    names = {name.partition(".")[0] for name in load_file(file)}
    assert "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0" in names
    assert cli.run(command) == 2
    assert "exists already" in capsys.readouterr().err
    back = ["export", "--lora", str(file), "--format", "diffusers", "--output", str(tmp_path / "b")]
    assert cli.run(back) == 0
    assert_same(read_lora(tmp_path / "b", "--lora"), read_lora(run, "--lora"))


def refusal(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert cli.run(["export", *map(str, options)]) == 2
    return capsys.readouterr().err


def test_mistakes_are_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", tmp_path / "out"]
    assert "there is no file or folder" in refusal(
        capsys, "--lora", tmp_path / "none", "--format", "kohya", *out
    )
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / FILE).read_bytes())
    said = refusal(capsys, "--lora", alone, "--format", "kohya", *out)
    assert "do not tell which family it is of: name its model with --model" in said
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    said = refusal(capsys, "--lora", tmp_path / "half.safetensors", "--format", "peft", *out)
    assert "has only one of the two matrices of 'lora_unet_x'" in said
    odd = {"lora_unet_strange.lora_down.weight": torch.ones(2, 2)}
    odd["lora_unet_strange.lora_up.weight"] = torch.ones(2, 2)
    save_file(odd, tmp_path / "odd.safetensors")
    said = refusal(capsys, "--lora", tmp_path / "odd.safetensors", "--format", "peft", *out)
    assert "has the layer 'lora_unet_strange', which is none of" in said
    save_file({"lora_unet_a.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    said = refusal(capsys, "--lora", tmp_path / "loha.safetensors", "--format", "peft", *out)
    assert "has the tensor 'lora_unet_a.hada_w1_a', which is no part of a LoRA" in said
    said = refusal(
        capsys, "--lora", run, "--format", "peft", "--output", tmp_path / "a.safetensors"
    )
    assert "peft's format is a folder" in said
    said = refusal(capsys, "--lora", run, "--format", "kohya", "--output", tmp_path / "a.ckpt")
    assert "expected a folder or a .safetensors file" in said
    save_file({}, tmp_path / "nothing.safetensors")
    for form in ("peft", "diffusers", "kohya"):
        said = refusal(capsys, "--lora", tmp_path / "nothing.safetensors", "--format", form, *out)
        assert "nothing.safetensors' holds no tensors" in said
    folder = tmp_path / "damaged"
    write_lora(read_lora(run, "--lora"), folder, "peft")
    (folder / "adapter_config.json").write_text("{")
    said = refusal(capsys, "--lora", folder, "--format", "diffusers", *out)
    assert "has a damaged adapter_config.json beside it" in said
    assert not (tmp_path / "out").exists()


def test_a_text_encoders_part_is_kept_or_refused(tmp_path: Path) -> None:
    """Kohya's prefix of SDXL's second encoder; peft's folder has one network."""
    lora = saved("sdxl", tmp_path / "run")
    path = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    lora.layers[path] = layer(2, 6)
    write_lora(lora, tmp_path / "k.safetensors", "kohya")
    key = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    assert key in load_file(tmp_path / "k.safetensors")
    assert_same(read_lora(tmp_path / "k.safetensors", "--lora"), lora)
    with pytest.raises(UserError, match="one network, and this one has a part for text_encoder_2"):
        write_lora(lora, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()


def test_rank_stabilised_scaling_is_in_alpha(tmp_path: Path) -> None:
    """Other programs divide by the rank, not by its root."""
    lora = saved("sd", tmp_path / "run", use_rslora=True)
    first = next(iter(lora.layers.values()))
    assert first.scale == pytest.approx(8 / 4**0.5)


def test_metadata_holds_what_is_not_a_default_alone() -> None:
    from peft import LoraConfig

    from diffalign.backbones.base import portable_metadata

    config = LoraConfig(r=8, lora_alpha=4, target_modules=["to_q"], use_dora=True)
    told = portable_metadata(config.to_dict())
    assert set(told) == {"r", "lora_alpha", "target_modules", "peft_type", "use_dora"}
    again = LoraConfig(**{name: told[name] for name in told if name != "peft_type"})
    assert again.to_dict() == config.to_dict()


def attention(family_width: int, blocks: int = 2) -> dict[str, LoraLayer]:
    """LoRA of attention layers whose names SD3, Flux and Qwen-Image share."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        f"transformer.transformer_blocks.{block}.attn.{name}": LoraLayer(
            torch.randn(2, family_width), torch.randn(family_width, 2), 4.0
        )
        for block in range(blocks)
        for name in names
    }


@pytest.mark.parametrize(
    ("width", "title"), [(96, None), (3072, None), (1536, "Stable Diffusion 3")]
)
def test_names_that_families_share_are_of_none(
    width: int, title: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "shared.safetensors"
    write_lora(LoraWeights(attention(width), None, "diffusers"), file, "diffusers")
    lora = read_lora(file, "--lora")
    assert (lora.naming.title if lora.naming else None) == title
    if title is None:
        with pytest.raises(UserError, match="do not tell which family it is of"):
            write_lora(lora, tmp_path / "out.safetensors", "comfy")
    named = read_lora(file, "--lora", "QwenImagePipeline")
    write_lora(named, tmp_path / "q.safetensors", "comfy")
    assert all("joint_blocks" not in key for key in load_file(tmp_path / "q.safetensors"))
    # A file of ComfyUI with such names says it too.
    tensors = {
        key.replace("transformer.", "diffusion_model.", 1): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, tmp_path / "comfy.safetensors")
    lora = read_lora(tmp_path / "comfy.safetensors", "--lora")
    assert (lora.naming.title if lora.naming else None) == title
    assert read_lora(tmp_path / "comfy.safetensors", "--lora", "QwenImagePipeline").layers


def test_an_alpha_is_of_its_own_layer_alone(tmp_path: Path) -> None:
    """Flux has a layer `proj_out`, whose name ends those of all single blocks."""
    layers = {
        "transformer.proj_out": LoraLayer(torch.randn(8, 6), torch.randn(6, 8), 2.0),
        **{
            f"transformer.single_transformer_blocks.{i}.proj_out": LoraLayer(
                torch.randn(4, 6), torch.randn(6, 4), 4.0
            )
            for i in range(3)
        },
    }
    for form in ("diffusers", "peft"):
        file = tmp_path / (f"{form}.safetensors" if form != "peft" else form)
        write_lora(LoraWeights(layers, NAMINGS["flux"], "kohya"), file, form)
        again = read_lora(file, "--lora").layers
        assert {name: (each.rank, each.alpha) for name, each in again.items()} == {
            name: (each.rank, each.alpha) for name, each in layers.items()
        }


@pytest.mark.parametrize("shape", [(1, 6), (4,), (6, 1, 2)])
def test_scales_of_a_dora_that_are_none_per_output_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 6),
        f"{name}.lora_up.weight": torch.ones(6, 2),
        f"{name}.dora_scale": torch.ones(shape),
    }
    save_file(tensors, tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match=r"DoRA scales of shape .* for a layer with 6 outputs"):
        read_lora(tmp_path / "dora.safetensors", "--lora", "StableDiffusionPipeline")


def test_flux2_is_told_from_flux_by_its_sizes(tmp_path: Path) -> None:
    lora = saved("flux2-klein", tmp_path / "run")
    write_lora(lora, tmp_path / "comfy.safetensors", "comfy")
    again = read_lora(tmp_path / "comfy.safetensors", "--lora")
    assert again.naming is lora.naming
    assert_same(again, lora)
