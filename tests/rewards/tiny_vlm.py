"""A tiny Qwen2-VL with random weights, as transformers 5 writes it: configuration,
tokenizer, processor and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hpsv3_tiny as tiny
import torch


def write_processor(folder: Path, reward: bool = False) -> Any:
    """Configuration, tokenizer, image processor and chat template of the tiny model."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessorPil,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tiny.words(reward)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(), words, Qwen2VLVideoProcessor(), chat_template=tiny.CHAT
    )
    processor.save_pretrained(folder)
    sizes = tiny.sizes(words)
    section = sizes["text"].pop("mrope_section")
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
    text = {**sizes["text"], "rope_parameters": rope, "tie_word_embeddings": False}
    config = Qwen2VLConfig(text_config=text, vision_config=sizes["vision"], **sizes["ids"])
    config.save_pretrained(folder)
    return processor


def write_model(folder: Path) -> Any:
    """The whole model."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    write_processor(folder)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
    with torch.no_grad():  # so that answers differ from image to image
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0 if "lm_head" in name else 3.0)
    model.save_pretrained(folder)
    return model


def write_hpsv3(folder: Path) -> Path:
    """A tiny HPSv3.safetensors in the published layout, beside its base's files."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    words = write_processor(folder).tokenizer
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(words) + 1  # and the reward's token
    shapes = {}
    for name, tensor in Qwen2VLModel(config).state_dict().items():
        old = name.replace("language_model.", "model.") if "language" in name else name
        shapes[old] = tuple(tensor.shape)
    shapes["lm_head.weight"] = (len(words) + 1, tiny.WIDTH)
    for name, tensor in tiny.head().state_dict().items():
        shapes[f"rm_head.{name}"] = tuple(tensor.shape)
    save_file(tiny.state(shapes), folder / "HPSv3.safetensors")
    return folder
