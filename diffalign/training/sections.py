"""The sections `lora`, `validation` and `hub` of a run file."""

from __future__ import annotations

import re
from dataclasses import field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..config.ranges import BatchSize, Count, Decay, Range, Seed, Steps, count, read_scales
from ..config.section import config_section
from ..config.yaml_text import shown
from ..errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig


_Rank = Annotated[int, count(1, 65_536)]
_Alpha = Annotated[int | float, Range(0.0, 1e9, above=True, below=True, words="a number above 0")]


@config_section
class LoraSection:
    """`lora:` of a run file, with peft's names. Without it all weights are trained.

    Example:
        ```python
        from diffalign.training.sections import LoraSection

        lora = LoraSection(r=8, rank_pattern={"to_q": 4})
        assert lora.to_peft().lora_alpha == 8
        ```
    """

    r: _Rank = 16
    """Rank."""
    alpha: _Alpha | None = None
    """Scale numerator; the update is multiplied by alpha / r. None takes r."""
    dropout: Decay = 0.0
    """Dropout on the input of the adapters while training."""
    target_modules: list[str] | str | None = None
    """Names (or one regular expression) of the layers that get adapters. None takes the
    family's default: the attention, and for most large transformers the MLPs too
    (docs/models.md)."""
    init: Literal["gaussian", "default"] = "gaussian"
    """How A is drawn: `gaussian` (diffusers' choice) or `default` (peft's
    Kaiming-uniform). B starts at zero in both."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    use_rslora: bool = False
    """Rank-stabilised scaling alpha / sqrt(r)."""
    rank_pattern: dict[str, _Rank] = field(default_factory=dict)
    """Other ranks for layers whose names match, e.g. `{to_q: 8}`."""
    alpha_pattern: dict[str, _Alpha] = field(default_factory=dict)
    """Other alphas for layers whose names match."""
    start_from: str | None = None
    """Go on from this LoRA: a run, a file or a Hub id, of diffusers, peft, kohya's
    scripts or ComfyUI. Its layers, ranks and alphas are taken, and the reference is the
    model with it. Only `dropout` may stand beside it."""

    def __post_init__(self) -> None:
        _check_targets(self.target_modules)
        if self.start_from is None:
            return
        for other in fields(self):
            value = getattr(self, other.name)
            plain = {} if other.name.endswith("_pattern") else other.default
            if other.name not in ("start_from", "dropout") and value != plain:
                raise ConfigError(
                    other.name,
                    f"{shown(value)} cannot be set beside start_from, whose file has its own; "
                    "leave it out",
                )

    def to_peft(self) -> LoraConfig:
        from peft import LoraConfig

        alpha: Any = self.r if self.alpha is None else self.alpha  # floats work as well
        return LoraConfig(
            r=self.r,
            lora_alpha=alpha,
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
            f"expected names of layers, got {shown(targets)}; leave it out for the default layers",
        )


@config_section
class ValidationConfig:
    """`validation:` of a run file: images of base and tuned model while training.

    Both draw from the same seeds. With `scorers` the images are scored. Without the
    section there is no validation.

    Example:
        ```python
        from diffalign import ValidationConfig

        validation = ValidationConfig(prompts="shapes", scorers=["shapes"])
        assert validation.validation_steps == 200
        ```
    """

    validation_prompts: list[str] = field(default_factory=list)
    """Prompts to draw."""
    prompts: str | None = None
    """In place of `validation_prompts`: a prompt set or file as for `diffalign
    compare`, e.g. `shapes` or `partiprompts`."""
    max_prompts: Count | None = None
    """Use so many of `prompts`, evenly over the set."""
    scorers: list[str] = field(default_factory=list)
    """Scorers of the drawn images; logged with the win-rate against the base and its
    interval. Take others than those that train."""
    keep_best: str | None = None
    """One of `scorers`: the weights with its highest mean are kept in `best/`."""
    guard: list[str] = field(default_factory=list)
    """Those of `scorers` that guard a run with a reward against hacking it. Empty for
    all that do not train."""
    on_hacking: Literal["stop", "warn", "rollback", "off"] = "stop"
    """What to do when the reward rises while a guard falls beyond the interval of its
    change: stop: end with the best weights | warn | rollback: go back to the best
    weights and on at half the learning rate, at most twice | off."""
    num_validation_images: BatchSize = 2
    """Images per prompt."""
    validation_steps: Count = 200
    """Draw every N optimizer steps, and at the end."""
    validation_seed: Seed = 0
    """Seed of the first image; image i of a prompt has seed + i under both models."""
    num_inference_steps: Steps | None = None
    """Sampler steps; None takes the pipeline's default."""
    guidance_scale: float | None = None
    """Guidance; None takes the pipeline's default."""
    guidance_scales: list[float] = field(default_factory=list)
    """In place of `guidance_scale`: draw and score at each of these, e.g. [1, 3, 7].
    The best one of each model is chosen by the first scorer on half of the prompts, and
    the models are compared at these on the other half."""

    def __post_init__(self) -> None:
        if self.guidance_scales:
            self.guidance_scales = read_scales(self.guidance_scales)
            if self.guidance_scale is not None:
                raise ConfigError("guidance_scale", "it cannot be combined with guidance_scales")
            if not self.scorers:
                raise ConfigError("guidance_scales", "name scorers, which choose the best scale")
        if self.prompts is not None and self.validation_prompts:
            raise ConfigError("prompts", "give validation_prompts or prompts, not both")
        if not self.validation_prompts and self.prompts is None:
            raise ConfigError(
                "validation_prompts",
                "expected at least one prompt; leave the whole section out for no validation",
            )
        unknown = [name for name in self.guard if name not in self.scorers]
        if unknown:
            names = ", ".join(self.scorers) or "none"
            raise ConfigError("guard", f"expected some of scorers ({names}), got {unknown[0]!r}")
        if self.keep_best is not None and self.keep_best not in self.scorers:
            names = ", ".join(self.scorers) or "none"
            raise ConfigError(
                "keep_best", f"expected one of scorers ({names}), got {self.keep_best!r}"
            )

    def pipe_kwargs(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        named = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in named.items() if value is not None}


@config_section
class HubConfig:
    """`hub:` of a run file.

    Example:
        ```python
        from diffalign.training.sections import HubConfig

        hub = HubConfig(push_to_hub=True, hub_model_id="user/name")
        assert hub.hub_model_id == "user/name"
        ```
    """

    push_to_hub: bool = False
    """Upload the result when training ends."""
    hub_model_id: str | None = None
    """Repository, `user/name`; None takes the output folder's name."""
    hub_private_repo: bool = False
    """Create the repository as private."""
