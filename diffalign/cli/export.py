"""`diffalign export`: write a LoRA in the names that another program reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backbones import ModelSource
from ..backbones.lora_formats import FORMATS, default_file, read_lora, write_lora
from ..config.yaml_text import read_yaml_file
from ..errors import ConfigError, UserError
from .results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--lora",
        required=True,
        help="folder of a run, or a LoRA of diffusers, peft, kohya's scripts or ComfyUI",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="comfy: ComfyUI; kohya: kohya-ss/sd-scripts and the programs that read its files; "
        "diffusers: load_lora_weights; peft: PeftModel.from_pretrained",
    )
    parser.add_argument(
        "--model",
        help="base model, needed if the layer names do not identify the model family "
        "(default: that of the run)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a .safetensors file, or a folder for one",
    )


def run(options: argparse.Namespace) -> Result:
    """Read the LoRA and write it.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `Result` with the file.

    Raises:
        UserError: The LoRA cannot be read, the format cannot hold it, or the output is
            there already.
    """
    output: Path = options.output.expanduser()
    is_file = output.suffix == ".safetensors"
    if is_file and options.format == "peft":
        raise ConfigError("--output", f"peft's format is a folder, got the file {str(output)!r}")
    if output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(
            "--output", f"expected a folder or a .safetensors file, got {str(output)!r}"
        )
    file = output if is_file else default_file(output, options.format)
    if file.exists() and (file.is_file() or any(file.iterdir())):
        raise UserError(f"--output: {str(file)!r} exists already; name another")
    lora = read_lora(options.lora, "--lora", pipeline_class(options.lora, options.model))
    write_lora(lora, file, options.format)
    title = f" of {lora.naming.title}" if lora.naming else ""
    text = f"wrote {file}: {len(lora.layers)} layers{title}, {options.format} format"
    return Result(text, {"output": file, "layers": len(lora.layers), "format": options.format})


def pipeline_class(lora: str, model: str | None) -> str | None:
    """Find the class of the pipeline that a LoRA belongs to.

    Args:
        lora (`str`): file or folder, perhaps of a run with its `config.yaml`.
        model (`str`, *optional*): the model, if the user named it.

    Returns:
        `str`, *optional*: None where nothing tells.

    Raises:
        ConfigError: the user's model cannot be found.
    """
    if model is not None:
        return ModelSource(model).pipeline_class_name
    place = Path(lora).expanduser()
    record = (place if place.is_dir() else place.parent) / "config.yaml"
    if not record.is_file():
        return None
    try:
        values = read_yaml_file(record, "--lora")
        return ModelSource(str(values["model"])).pipeline_class_name
    except (UserError, KeyError, TypeError):  # moved, renamed or offline: the names may tell
        return None
