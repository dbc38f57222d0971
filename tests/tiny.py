"""Tiny randomly initialised pipelines of every supported family, and tiny preference
data, built in code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.generation.pipelines import base_pipeline
from diffalign.methods import METHODS
from diffalign.rewards.images import Preprocess
from diffalign.rewards.model_scorer import ModelScorer
from diffalign.rewards.spec import ScorerSpec
from diffalign.shapes.tokenizer import build_tokenizer
from diffalign.training.callbacks import TrainerCallback

FAMILIES = ("sd", "sd_v", "sdxl", "sd3", "shapes-flow")
FLOW = ("sd3", "shapes-flow")
"""Flow matching. ``shapes-flow`` is the embedded model, the others are random."""
WEIGHTS = {"ctrl_u": "diffusion_pytorch_model", "ppd": "user_adapter"}
"""File of the trained weights, where a run with a LoRA config trains something else."""
UNETS = ("sd", "sd_v", "sdxl")
"""Families with ControlNets."""
METHOD_NAMES = sorted(METHODS, key=lambda name: name != "diffusion_dpo")
"""Diffusion-DPO is first: it meets all families and settings by default, others one."""


def learning_rate(family: str, lora: bool) -> float:
    """Rates with which a few steps learn: trained weights bear smaller ones."""
    rate = 1e-2 if lora else 3e-3
    return rate / 10 if family == "shapes-flow" else rate


RESOLUTION = 32


def small_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        **options,
    )


def clip_text(cls: Any, tokenizer: Any, hidden: int, projection: int) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet(cross: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def build_pipeline(family: str, seed: int = 0) -> Any:
    """A pipeline of `FAMILIES`: SD1 (epsilon), SD2 (v), SDXL (two encoders, size
    conditioning), SD3 (flow matching), or the embedded SD3; or one of
    `tiny_families.TRANSFORMERS`."""
    if family == "shapes-flow":
        return base_pipeline(family)
    if family not in FAMILIES:
        from tiny_families import build_transformer_pipeline

        return build_transformer_pipeline(family, seed)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    if family in ("sd", "sd_v"):
        return StableDiffusionPipeline(
            vae=small_vae(),
            text_encoder=clip_text(CLIPTextModel, tokenizer, 16, 16).eval(),
            tokenizer=tokenizer,
            unet=_unet(16),
            scheduler=_ddim("v_prediction" if family == "sd_v" else "epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sdxl":
        unet = _unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=1,
        )
        return StableDiffusionXLPipeline(
            vae=small_vae(),
            text_encoder=clip_text(CLIPTextModel, tokenizer, 16, 16).eval(),
            text_encoder_2=clip_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
            tokenizer=tokenizer,
            tokenizer_2=build_tokenizer(),
            unet=unet,
            scheduler=_ddim(),
        )
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(shift_factor=0.0609),
        text_encoder=clip_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(CLIPTextModelWithProjection, tokenizer, 16, 16).eval(),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def picture(value: int, seed: int, size: int = RESOLUTION) -> Image.Image:
    """A picture of about one brightness with a little texture."""
    noise = np.random.default_rng(seed).integers(-12, 13, (size, size, 3))
    return Image.fromarray(np.clip(value + noise, 0, 255).astype(np.uint8))


def pair_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Separable pairs: the chosen image is bright, the rejected one dark."""
    prompts = [
        "a small red circle on the left of a gray background",
        "a large blue star in the center of a white background",
    ]
    return [
        {
            "prompt": prompts[i % 2],
            "chosen": picture(210, i, size),
            "rejected": picture(40, 1000 + i, size),
        }
        for i in range(count)
    ]


def ranked_rows(
    count: int = 8, size: int = RESOLUTION, lengths: tuple[int, ...] = (3,)
) -> list[dict[str, Any]]:
    """Separable lists: the brighter, the better; row i has ``lengths[i %
    len(lengths)]`` images."""
    rows = []
    for i, row in enumerate(pair_rows(count, size)):
        k = lengths[i % len(lengths)]
        images = [picture(210 - 170 * j // (k - 1), 100 * j + i, size) for j in range(k)]
        rows.append(
            {
                "prompt": row["prompt"],
                "images": images,
                "scores": [1 - j / (k - 1) for j in range(k)],
            }
        )
    return rows


def captioned_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """The pairs of `pair_rows` with a caption for each image."""
    return [
        {
            **row,
            "chosen_prompt": row["prompt"],
            "rejected_prompt": "a small green cross on the right of a black background",
        }
        for row in pair_rows(count, size)
    ]


def labelled_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Liked (bright) and disliked (dark) images in turns."""
    return [
        {
            "prompt": row["prompt"],
            "image": row["rejected" if i % 2 else "chosen"],
            "label": i % 2 == 0,
        }
        for i, row in enumerate(pair_rows(count, size))
    ]


def conditioned_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Images and the same images with two colors as their conditions."""
    rows = []
    for i, row in enumerate(pair_rows(count, size)):
        image = row["rejected" if i % 2 else "chosen"]
        shade = 245 if i % 2 == 0 else 18
        condition = Image.new("RGB", image.size, (shade,) * 3)
        rows.append({"prompt": row["prompt"], "image": image, "conditioning_image": condition})
    return rows


def user_rows(count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Pairs of two users: ann likes bright images, bob dark ones."""
    rows = []
    for i, row in enumerate(pair_rows(count, size)):
        bright, dark = row["chosen"], row["rejected"]
        chosen, rejected = (dark, bright) if i // 2 % 2 else (bright, dark)
        user = "bob" if i // 2 % 2 else "ann"
        rows.append(row | {"chosen": chosen, "rejected": rejected, "user_id": user})
    return rows


def method_rows(method: str, count: int = 8, size: int = RESOLUTION) -> list[dict[str, Any]]:
    """Rows that a method can train on."""
    rows = {
        "rankdpo": ranked_rows,
        "dgpo": ranked_rows,
        "dcpo": captioned_rows,
        "diffusion_kto": labelled_rows,
    }
    rows |= {"ppd": user_rows, "ctrl_u": conditioned_rows}
    return rows.get(method, pair_rows)(count, size)


def brightness(images: Any, prompts: Any) -> Any:
    """A judge of random images: the mean of their pixels."""
    return torch.tensor(
        [float(np.asarray(image, dtype=np.float64).mean()) for image in images], dtype=torch.float64
    )


class SoftBrightness(ModelScorer):
    """A differentiable judge of random images, with a weight that must not train."""

    spec = ScorerSpec("soft_brightness", "mean of the pixels", requires=("image",),
                      differentiable=True)  # fmt: skip
    preprocess = Preprocess(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tower = torch.nn.Linear(3, 1, bias=False).requires_grad_(False)
        torch.nn.init.constant_(self.tower.weight, 1 / 3)
        self.tower.to(self.device)

    def towers(self) -> Any:
        return [self.tower]

    def text_features(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(len(prompts)),)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tower(pixels.mean((2, 3)))

    def similarity(self, image: torch.Tensor, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return image[:, 0]


def by_place(images: Any, prompts: Any) -> Any:
    """A judge that looks at no pixel: candidates of one prompt by their place, so that
    no rounding decides who wins."""
    return torch.arange(len(images)).double() % 2


def lora_config(r: int = 4, alpha: int = 8, dropout: float = 0.0, **options: Any) -> Any:
    """A LoRA whose alpha is not its rank, so that a lost alpha shows."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", **options
    )


def make_trainer(
    folder: Any,
    family: str = "sd",
    method: str = "diffusion_dpo",
    *,
    peft_config: Any = None,
    rows: Any = None,
    model: Any = None,
    data: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """A trainer of the tiny pipeline: `data` and `args` are config fields, `options`
    are arguments of the trainer itself."""
    from diffalign import DataConfig
    from diffalign.methods import config_class, trainer_class

    values: dict[str, Any] = {
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    } | args
    if method == "seppo":
        values = {"num_inference_steps": 2, "guidance_scale": 2.0, "beta": 100.0} | values
    if method == "diffusion_dro":  # a large margin: every row has a gradient
        values = {"num_inference_steps": 3, "margin": 10.0} | values
    if method == "ctrl_u":  # trains a ControlNet
        peft_config = None
        values = {"consistency": "shapes", "reward_max_timestep": 1000} | values
    if method == "grpo" and peft_config is not None:  # it refuses dropout
        peft_config = copy.deepcopy(peft_config)
        peft_config.lora_dropout = 0.0
    if method == "ppd":  # trains an adapter of its own
        peft_config = None
        values = {"user_dim": 8, "user_tokens": 2, "user_dropout": 0.0} | values
    if method == "reward_backprop":
        values = {"num_inference_steps": 3, "guidance_scale": 2.0} | values
        options = {"scorers": SoftBrightness(), **(options or {})}
    if method == "grpo":
        values = {"num_inference_steps": 3, "guidance_scale": 2.0, "images_per_prompt": 2} | values
    if method in ("awm", "diffusion_nft"):
        values = {"num_inference_steps": 4, "images_per_prompt": 2, "times_per_image": 2} | values
    if method in ("awm", "diffusion_nft", "grpo"):
        options = {"scorers": [brightness], **(options or {})}
    if method == "d3po":
        values = {"num_inference_steps": 3, "guidance_scale": 2.0} | values
        options = {"scorers": [brightness], **(options or {})}
    if method == "spo":
        values = {
            "num_inference_steps": 3,
            "first_step": 1,
            "guidance_scale": 2.0,
            "threshold": 0.0,
            "images_per_prompt": 2,
        } | values
        options = {"scorers": [brightness], **(options or {})}
    if method in ("diffusion_dpo", "diffusion_kto", "diffusion_npo", "dcpo", "ppd", "rankdpo"):
        values.setdefault("beta", 100.0)
    return trainer_class(method)(
        model=build_pipeline(family) if model is None else model,
        args=config_class(method)(output_dir=str(folder), **values),
        train_dataset=method_rows(method) if rows is None else rows,
        peft_config=peft_config,
        data=DataConfig(**{"resolution": RESOLUTION, **(data or {})}),
        **(options or {}),
    )


def trained_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights by name."""
    return {n: p.detach().clone() for n, p in trainer.network.named_parameters() if p.requires_grad}


class Snapshots(TrainerCallback):
    """The trainable weights before the first and after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(trained_tensors(kwargs["trainer"]))

    on_step_end = on_train_begin


def all_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights by name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def first_batch(trainer: Any) -> Any:
    """The batch that a fresh run would train on first."""
    trainer.setup()
    return trainer.data_pipeline.builder(next(trainer.data_pipeline.batches(0)))


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit-equal, name by name."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, (
        f"{len(different)} of {len(expected)} tensors differ, e.g. {different[:3]}"
    )


def assert_close_tensors(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float
) -> None:
    """Equal within tolerances, name by name."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def next_batch(trainer: Any) -> Any:
    """The batch that a run would train on next, as the method prepares it."""
    trainer.setup()
    batches = trainer.source.batches(trainer.data_pipeline, trainer.state.samples_seen)
    return trainer.prepare(next(batches))


def write_world(folder: Path) -> None:
    """Write a tiny model, pairs and a run file, as a user of the commands has them."""
    import yaml

    from diffalign.data import convert, load_preferences

    build_pipeline("sd").save_pretrained(folder / "model")
    convert(load_preferences(pair_rows(6), verbose=False), folder / "pairs")
    values = {
        "method": "diffusion_dpo",
        "model": str(folder / "model"),
        "lora": {"r": 2},
        "data": {"dataset_name": str(folder / "pairs")},
        "train": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": "1e-5",
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
