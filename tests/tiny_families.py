"""Tiny randomly initialised pipelines of the transformer families, built in code."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tiny import RESOLUTION, clip_text, small_vae
from tokenizers.pre_tokenizers import ByteLevel

from diffalign.shapes.tokenizer import build_t5_tokenizer, build_tokenizer

TRANSFORMERS = (
    "flux",
    "flux-schnell",
    "chroma",
    "flux2-klein",
    "flux2-klein-distilled",
    "z-image",
    "qwen-image",
    "qwen-image-21",
    "sana",
    "pixart",
)
"""Every family beside those of `tiny.FAMILIES`."""
SIZES = {"qwen-image-21": 64}
"""Side of an image in pixels, where it is not `RESOLUTION`."""

_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|vision_start|>", "<|vision_end|>",
]  # fmt: skip
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def size_of(family: str) -> int:
    """Side of the family's images in pixels."""
    return SIZES.get(family, RESOLUTION)


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with the special tokens and a chat template of Qwen."""
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *_SPECIAL])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token=_SPECIAL[0], extra_special_tokens=_SPECIAL[1:]
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _language_model(layers: int = 2, width: int = 16) -> dict[str, Any]:
    return {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }


def _t5(width: int = 16) -> Any:
    tokenizer = build_t5_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval(), tokenizer


def _shifting(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def _flux(guidance: bool) -> Any:
    t5, t5_tokenizer = _t5()
    tokenizer = build_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=_shifting() if guidance else diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(shift_factor=0.1),
        text_encoder=clip_text(transformers.CLIPTextModel, tokenizer, 16, 16).eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def _chroma() -> Any:
    t5, tokenizer = _t5()
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(shift_factor=0.1),
        text_encoder=t5,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _flux2(distilled: bool) -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    # The pipeline reads the layers 9, 18 and 27.
    config = transformers.Qwen3Config(**{**_language_model(28, 8), "head_dim": 4})
    return diffusers.Flux2KleinPipeline(
        scheduler=_shifting(),
        vae=vae,
        text_encoder=transformers.Qwen3ForCausalLM(config).eval(),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=small_vae(shift_factor=0.1),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_language_model())).eval(),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )


def _qwen_image() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_language_model(),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config=vision,
    )
    return diffusers.QwenImagePipeline(
        scheduler=_shifting(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )


def _qwen_image_21() -> Any:
    from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import QwenImage21Pipeline

    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1,
        temperal_downsample=[False] * 4, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0], is_residual=False,
    )  # fmt: skip
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, context_in_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={
            **_language_model(),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config=vision,
    )
    tokenizer = byte_tokenizer()
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=_CHAT,
    )
    return QwenImage21Pipeline(
        scheduler=_shifting(),
        vae=vae,
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config).eval(),
        processor=processor,
        transformer=transformer,
    )


def _sana() -> Any:
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=16, sample_size=16,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(**_language_model())
        ).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart() -> Any:
    t5, tokenizer = _t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=8, sample_size=16, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=small_vae(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, clip_sample=False, steps_offset=1
        ),
    )


_BUILDERS: dict[str, Any] = {
    "flux": lambda: _flux(True),
    "flux-schnell": lambda: _flux(False),
    "chroma": _chroma,
    "flux2-klein": lambda: _flux2(False),
    "flux2-klein-distilled": lambda: _flux2(True),
    "z-image": _z_image,
    "qwen-image": _qwen_image,
    "qwen-image-21": _qwen_image_21,
    "sana": _sana,
    "pixart": _pixart,
}


def build_transformer_pipeline(family: str, seed: int = 0) -> Any:
    """A tiny pipeline of one of `TRANSFORMERS`, with weights that show every input.

    Zero-initialised layers get random weights, since they would hide mistakes.
    """
    torch.manual_seed(seed)
    pipe = _BUILDERS[family]()
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
