"""Trained towers of a reward: all weights, or a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UserError, one_line
from ...runtime.weight_files import loading_errors

TOWERS = "towers.safetensors"
LORA_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)
_TARGETS = {"q_proj", "k_proj", "v_proj", "out_proj", "qkv", "projection", "query", "key", "value"}
"""Attention projections of transformers' CLIP and BLIP."""
_OPEN_CLIP_TARGETS = {"c_fc", "c_proj"}
"""open_clip's attention is one module without projections of their own, so the
feed-forward layers are taken."""


def tower_list(scorer: Any) -> nn.ModuleList:
    """Return the networks of a scorer as one module."""
    return nn.ModuleList([*scorer.towers(), *scorer.heads()])


def default_targets(towers: nn.Module) -> list[str]:
    """Return the names of the layers that get a LoRA when none are given.

    Raises:
        ConfigError: The towers have no such layers.
    """
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in towers.named_modules()
        if isinstance(module, nn.Linear)
    }
    targets = sorted((names & _OPEN_CLIP_TARGETS) or (names & _TARGETS))
    if not targets:
        raise ConfigError(
            "lora.target_modules",
            f"name the layers; the linear ones are {', '.join(sorted(names)[:12])}",
        )
    return targets


def lora_facts(config: Any) -> dict[str, Any]:
    """Return what a folder must know of a LoRA to read it back."""
    facts = {name: getattr(config, name) for name in LORA_FIELDS}
    if isinstance(facts["target_modules"], Iterable) and not isinstance(
        facts["target_modules"], str
    ):
        facts["target_modules"] = sorted(facts["target_modules"])
    return facts


def add_lora(towers: nn.Module, config: Any) -> Any:
    """Put a LoRA into the towers. Everything else is frozen.

    Args:
        towers (`nn.Module`): Changed in place.
        config (`LoraConfig`): Of peft, with target modules.

    Returns:
        `LoraModel`: peft's handle, for `merge_and_unload`.

    Raises:
        ConfigError: No layer has such a name.
    """
    from peft.tuners.lora import LoraModel

    try:
        return LoraModel(towers, {"default": config}, "default")
    except (ValueError, NotImplementedError) as error:
        reason = one_line(error)
        raise ConfigError(
            "lora.target_modules", f"these layers cannot have a LoRA ({reason})"
        ) from error


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that train, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def put_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the weights of `trained_state`.

    Raises:
        ValueError: Names or shapes differ.
    """
    parameters = dict(network.named_parameters())
    for name, value in state.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"{name} does not fit")
        parameters[name].copy_(value)


def load_towers(scorer: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Put the trained towers of a folder into its base. A LoRA is merged.

    Args:
        scorer: The base, changed in place.
        folder (`Path`): Of the reward.
        facts (`Mapping`): Part `towers` of its `reward.json`.

    Raises:
        UserError: The weights are missing or damaged.
    """
    from safetensors.torch import load_file

    towers = tower_list(scorer)
    handle = None
    errors: Any = (*loading_errors(), KeyError, TypeError, ConfigError)
    try:
        if facts["kind"] == "lora":
            from peft import LoraConfig

            config = LoraConfig(**{name: facts["lora"][name] for name in LORA_FIELDS})
            handle = add_lora(towers, config)
        put_state(towers, load_file(folder / TOWERS))
    except errors as error:
        raise UserError(f"{folder / TOWERS} is damaged ({one_line(error)})") from error
    if handle is not None:
        handle.merge_and_unload()
    towers.requires_grad_(False).eval()
