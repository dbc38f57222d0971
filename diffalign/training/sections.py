"""The sections `lora`, `validation` and `hub` of a run file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.ranges import Range, count, finite, seed, steps
from ..config.yaml_text import shown
from ..errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class LoraSection:
    """`lora:` of a run file; the names are peft's. An absent section means full fine-tuning."""

    r: int = 16
    """Rank."""
    alpha: int | float | None = None
    """Scale numerator; the update is multiplied by alpha / r. None takes r."""
    dropout: float = 0.0
    """Dropout on the input of the adapters while training."""
    target_modules: list[str] | str | None = None
    """Names (or one regular expression) of the layers that get adapters. None takes the model family's attention projections."""
    init: str = "gaussian"
    """How A is drawn: `gaussian` (diffusers' choice) or `default` (peft's Kaiming-uniform); B starts at zero in both."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    use_rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(r)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for layers whose names match, e.g. `{to_q: 8}`."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Other alphas for layers whose names match."""

    def __post_init__(self) -> None:
        count(1, 65_536).check("r", self.r)
        if self.alpha is not None and not 0 < self.alpha < 1e9:
            raise ConfigError("alpha", f"expected a number above 0, got {shown(self.alpha)}")
        for name, rank in self.rank_pattern.items():
            count(1, 65_536).check(f"rank_pattern.{name}", rank)
        for name, alpha in self.alpha_pattern.items():
            if not 0 < alpha < 1e9:
                raise ConfigError(
                    f"alpha_pattern.{name}", f"expected a number above 0, got {shown(alpha)}"
                )
        _check_targets(self.target_modules)
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", f"expected float in [0, 1), got {self.dropout}")
        if self.init not in ("gaussian", "default"):
            raise ConfigError("init", f"expected gaussian or default, got {self.init!r}")

    def to_peft(self) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
        )


def _check_targets(targets: Any) -> None:
    """Raises `ConfigError` for names or an expression that can match no layer."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                "target_modules", f"{shown(targets)} is no regular expression ({error})"
            ) from None
    if targets is not None and (not targets or not all(targets)):
        raise ConfigError(
            "target_modules",
            f"expected names of layers, got {shown(targets)}; leave it out for the attention layers",
        )


_VALIDATION_RANGES: dict[str, Range] = {
    "max_prompts": count(),
    "num_validation_images": count(1, 65_536),
    "validation_steps": count(),
    "validation_seed": seed,
    "num_inference_steps": steps,
    "guidance_scale": finite,
}


@dataclass
class ValidationConfig:
    """`validation:` of a run file: base against tuned on the same seeds while training, as a picture and, with `scorers`, as numbers. An
    absent section means none."""

    validation_prompts: list[str] = field(default_factory=list)
    """Prompts to draw."""
    prompts: str | None = None
    """In place of `validation_prompts`: a prompt set or file as for `diffalign compare`, e.g. `shapes` or `partiprompts`."""
    max_prompts: int | None = None
    """Use so many of `prompts`, evenly over the set."""
    scorers: list[str] = field(default_factory=list)
    """Scorers of the drawn images; logged with the win-rate against the base and its interval. Take others than those that train."""
    keep_best: str | None = None
    """One of `scorers`: the weights with its highest mean are kept in `best/`."""
    num_validation_images: int = 2
    """Images per prompt."""
    validation_steps: int = 200
    """Draw every so many optimizer steps, and at the end."""
    validation_seed: int = 0
    """Seed of the first image; image i of a prompt has seed + i under both models."""
    num_inference_steps: int | None = None
    """Sampler steps; None takes the pipeline's default."""
    guidance_scale: float | None = None
    """Guidance; None takes the pipeline's default."""

    def __post_init__(self) -> None:
        if self.prompts is not None and self.validation_prompts:
            raise ConfigError("prompts", "give validation_prompts or prompts, not both")
        if not self.validation_prompts and self.prompts is None:
            raise ConfigError(
                "validation_prompts",
                "expected at least one prompt; leave the whole section out for no validation",
            )
        for name, allowed in _VALIDATION_RANGES.items():
            value = getattr(self, name)
            if value is not None:
                allowed.check(name, value)
        if self.keep_best is not None and self.keep_best not in self.scorers:
            raise ConfigError(
                "keep_best",
                f"expected one of scorers ({', '.join(self.scorers) or 'none'}), got {self.keep_best!r}",
            )

    def pipe_kwargs(self) -> dict[str, Any]:
        named = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class HubConfig:
    """`hub:` of a run file."""

    push_to_hub: bool = False
    """Upload the result when training ends."""
    hub_model_id: str | None = None
    """Repository, `user/name`; None takes the output folder's name."""
    hub_private_repo: bool = False
    """Create the repository as private."""
