"""`diffalign estimate`: what a run takes, before it is run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..backbones import Backbone, load_backbone
from ..config.ranges import count
from ..config.yaml_text import read_yaml_file
from ..errors import ConfigError, UserError
from ..methods import trainer_class
from ..recipe import RunConfig, load_run
from ..training.data_pipeline import build_transform
from ..training.estimate import CONTEXT, GIB, Estimate, Layout, advice, estimate, gpu_memory
from ..training.memory import check_combinations
from ..training.online.on_policy import OnPolicyConfig
from ..training.online.trajectory_trainer import TrajectoryConfig
from ..training.start_lora import read_start_lora
from .launch import accelerate_config
from .results import Result

UNKNOWN = {
    "ctrl_u": "it trains a ControlNet beside the frozen network",
    "ppd": "it trains an adapter for users in the frozen network",
    "reward_backprop": "it keeps several passes of the sampler, the autoencoder and the scorer",
}
"""Methods that train something else than a step of the network."""
LIST_LENGTH = 4
"""Images of a ranked list, where only the data could tell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument("--config", type=Path, help="run file; its fields may follow as options")
    parser.add_argument("--gpu", help="memory of a GPU (24GB) or its name (RTX4090, H100, ...)")
    parser.add_argument(
        "--num_gpus", type=count(), default=1, help="GPUs, each with the run's batch (default 1)"
    )
    parser.add_argument(
        "--accelerate_config",
        help="ddp (default), fsdp2, hsdp or an accelerate file: how several GPUs share the run; "
        "DeepSpeed is not estimated",
    )


def run(options: argparse.Namespace) -> Result:
    """Estimate the run and print what it takes.

    Args:
        options (`argparse.Namespace`): Options of the command. `overrides` are fields
            of the run file.

    Returns:
        `Result`, whose exit code is 1 where the run does not fit the GPU.

    Raises:
        UserError: A field cannot be used, or the model's configs cannot be read.
    """
    if options.config is None and not options.overrides:
        raise UserError("--config: name a run file, e.g. configs/diffusion_dpo/sdxl_lora.yaml")
    memory = None if options.gpu is None else gpu_memory(options.gpu)
    config = load_run(options.config, options.overrides)
    layout = read_layout(options.accelerate_config, options.num_gpus)
    result = estimate_run(config, layout)
    text = lines(config, result, options.num_gpus)
    facts: dict[str, Any] = {
        "parameters": result.parameters,
        "trainable_parameters": result.trainable,
        "flops_per_step_and_gpu": result.flops * config.train.gradient_accumulation_steps,
        "bytes": result.bytes,
        "peak_bytes": result.peak,
    }
    if memory is None:
        return Result("\n".join(text), facts)
    needed = result.peak / GIB + CONTEXT
    fits = needed <= memory
    facts |= {"needed_gib": needed, "gpu_gib": memory, "fits": fits}
    text.append(
        f"GPU: {needed:.1f} GiB with {CONTEXT:g} GiB for CUDA, of {memory:g} GiB: "
        + ("fits" if fits else "does not fit")
    )
    if not fits:
        changes = [
            (words, estimate_run(changed, layout)) for words, changed in alternatives(config)
        ]
        if layout.processes > 1 and not layout.is_sharded:
            spread = Layout(layout.processes, layout.processes)
            changes.append(("--accelerate_config fsdp2", estimate_run(config, spread)))
        facts["advice"] = advice(changes, result)
        text += ["what to change, one at a time:", *(f"  {line}" for line in facts["advice"])]
    return Result("\n".join(text), facts, 0 if fits else 1)


def read_layout(name: str | None, processes: int) -> Layout:
    """Read how the processes share a network, from a configuration of accelerate.

    Args:
        name (`str`, *optional*): See `diffalign.cli.launch.accelerate_config`.
        processes (`int`): How many there are.

    Raises:
        UserError: The configuration does not exist, or it needs another number.
    """
    if name is None:
        return Layout(processes)
    path = accelerate_config(name)
    values = read_yaml_file(path, "--accelerate_config")
    values = values if isinstance(values, dict) else {}
    if values.get("distributed_type") == "DEEPSPEED":
        raise UserError("--accelerate_config: DeepSpeed is not simulated; take ddp or fsdp2")
    if not values.get("fsdp_config"):
        return Layout(processes)
    mesh = values.get("parallelism_config") or {}
    copies = int(mesh.get("parallelism_config_dp_replicate_size", 1))
    if processes % copies or processes <= copies:
        raise UserError(
            f"--num_gpus: {processes} GPUs cannot hold {copies} copies over several GPUs each "
            f"({path.name})"
        )
    return Layout(processes, processes // copies)


def estimate_run(run: RunConfig, layout: Layout | None = None) -> Estimate:
    """Estimate the run that a run file describes.

    Args:
        run (`RunConfig`): The run.
        layout (`Layout`, *optional*): Its processes. None is one.

    Raises:
        UserError: The model's configs cannot be read, or its family is not known here.
    """
    if run.method in UNKNOWN:
        raise ConfigError("method", f"{run.method} has no estimate yet: {UNKNOWN[run.method]}")
    backbone = _backbone(run)
    trainer, args, data = trainer_class(run.method), run.train, run.data
    peft_config = None
    if run.lora is not None:
        backbone.check_lora()
        peft_config = run.lora.to_peft()
        if run.lora.start_from:
            peft_config = read_start_lora(run.lora.start_from, backbone, 0.0).config
    check_combinations(args, peft_config)
    sizes = build_transform(data, backbone).sizes
    kinds = {
        "pair": 2,
        "ranked": LIST_LENGTH,
        "labelled": 1,
        "conditioned": 1,
        "single": 1,
        "prompt": 1,
    }
    images = kinds[trainer.data_kind]
    if data.online is not None and trainer.data_kind == "ranked":
        images = data.online.k
    if isinstance(args, OnPolicyConfig):
        images = 1 if run.method == "spo" else args.images_per_prompt
    if isinstance(args, TrajectoryConfig) and backbone.guidance_rule.active(args.guidance_scale):
        images *= 2  # steps are trained with guidance, whose two branches are one pass
    with _quiet():
        return estimate(
            backbone,
            args,
            peft_config,
            images_per_group=images,
            has_reference=not trainer.reference_free,
            size=max(sizes, key=lambda size: size[0] * size[1]),
            caches_latents=bool(data.cache_latents) and not _draws(run),
            caches_prompts=bool(data.cache_text_embeddings),
            other_reference=run.ref_model is not None,
            layout=layout,
        )


def _draws(run: RunConfig) -> bool:
    """Whether the images that train are drawn, and decoded in every round."""
    return run.data.online is not None or trainer_class(run.method).data_kind == "prompt"


def _backbone(run: RunConfig) -> Backbone:
    return load_backbone(
        run.model, revision=run.revision, variant=run.variant, vae=run.vae, base=run.model_base
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers about weights that have no content."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def lines(run: RunConfig, result: Estimate, num_gpus: int) -> list[str]:
    """Say what a step takes.

    Args:
        run (`RunConfig`): The run.
        result (`Estimate`): Its estimate.
        num_gpus (`int`): GPUs that train together.
    """
    args = run.train
    steps = args.gradient_accumulation_steps
    rows = result.rows * steps * num_gpus
    text = [
        f"{run.method} on {run.model}: {result.trainable / 1e6:,.1f} of "
        f"{result.parameters / 1e6:,.1f} million parameters train",
        f"step: {result.rows} images in a pass x {steps} passes x {num_gpus} GPUs = {rows} images, "
        f"{result.flops * steps / 1e12:,.2f} TFLOP on each GPU",
        "memory of each GPU at the peak:",
    ]
    for name, size in result.bytes.items():
        text.append(f"  {name:<40} {size / GIB:8.2f} GiB")
    text.append(f"  {'together':<40} {result.peak / GIB:8.2f} GiB")
    if _draws(run) or run.method == "seppo":
        text.append("not counted: drawing and decoding images, and the scorers' own networks")
    return text


def alternatives(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Give changes of a run that save memory, in words and as a run."""
    args, data, lora = run.train, run.data, run.lora

    def trained(**values: Any) -> RunConfig:
        return replace(run, train=replace(args, **values))

    if not args.gradient_checkpointing:
        yield "train.gradient_checkpointing: true", trained(gradient_checkpointing=True)
    if args.mixed_precision == "no":
        yield "train.mixed_precision: bf16", trained(mixed_precision="bf16")
    if args.per_device_train_batch_size > 1:
        half = args.per_device_train_batch_size // 2
        words = f"train.per_device_train_batch_size: {half}, and twice the accumulation"
        passes = 2 * args.gradient_accumulation_steps
        yield words, trained(per_device_train_batch_size=half, gradient_accumulation_steps=passes)
    if lora is None:
        from ..training.sections import LoraSection

        if _backbone(run).supports_lora:
            yield "lora: {r: 16}", replace(run, lora=LoraSection())
    elif not args.quantization and not args.layerwise_casting and not lora.use_dora:
        yield "train.quantization: nf4", trained(quantization="nf4")
        words = "train.layerwise_casting: true"
        if not args.gradient_checkpointing:  # alone it keeps copies for the backward pass
            words += " with train.gradient_checkpointing: true"
        yield words, trained(layerwise_casting=True, gradient_checkpointing=True)
    if not data.cache_text_embeddings:
        cached = replace(data, cache_text_embeddings="cache")
        yield "data.cache_text_embeddings: FOLDER", replace(run, data=cached)
    if not data.cache_latents and not _draws(run):
        yield "data.cache_latents: FOLDER", replace(run, data=replace(data, cache_latents="cache"))
    if args.offload == "none":
        yield "train.offload: group", trained(offload="group")
    if args.optim in ("adamw", "adamw_fused"):
        yield "train.optim: adamw_8bit", trained(optim="adamw_8bit")
