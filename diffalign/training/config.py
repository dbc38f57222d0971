"""`train:` of a run file: what every method shares."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from dataclasses import dataclass

from ..config.ranges import COUNT, LARGEST
from ..config.yaml_text import shown
from ..errors import ConfigError

_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler": (
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ),
    "optim": ("adamw", "adamw_8bit", "adafactor", "prodigy"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "timestep_sampling": ("auto", "uniform", "logit_normal", "turbo", "refiner"),
    "reduction": ("mean", "sum"),
}
_POSITIVE = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "max_grad_norm",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "ref_error_draws",
    "snr_gamma",
    "logit_std",
    "divergence_patience",
    "ddp_timeout",
    "adam_epsilon",
)
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "noise_offset")
_SHARES = ("proportion_empty_prompts", "ema_decay")
_BETAS = ("adam_beta1", "adam_beta2")
_MOST = {
    "seed": 2**32 - 1,  # numpy takes no larger one
    "data_seed": 2**63 - 1,
    "num_train_epochs": 1e6,
    "per_device_train_batch_size": 65_536,
    "ref_error_draws": 65_536,
    "images_per_prompt": 65_536,
    "rollout_batch_size": 65_536,
    "num_inference_steps": 1000,
}
"""Largest values; others end at `ranges.COUNT` and `ranges.LARGEST`."""


@dataclass
class TrainingConfig:
    """Arguments of the one training loop; every method's config inherits them."""

    output_dir: str = "diffalign-out"
    """Folder of the run: weights, checkpoints, logs, samples, config.yaml, model card."""
    overwrite_output_dir: bool = False
    """Allow `output_dir` to hold another run: that run's files are moved aside, never mixed in."""
    seed: int = 0
    """Seed of everything; the same seed gives the same weights on the same machine with equal threads and processes."""
    data_seed: int | None = None
    """Seed of the data order alone; None takes `seed`."""
    max_steps: int | None = None
    """Optimizer steps. Exactly one of `max_steps` and `num_train_epochs` decides; both unset means one epoch."""
    num_train_epochs: float | None = None
    """Passes over the data, if `max_steps` is unset."""
    per_device_train_batch_size: int = 1
    """Groups (pairs, lists) per device and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-5
    """The learning rate as it is: never scaled by batch size or devices."""
    lr_scheduler: str = "constant"
    """constant | constant_with_warmup | linear | cosine | cosine_with_restarts | polynomial, as in diffusers."""
    warmup_steps: int = 0
    """Linear warm-up in optimizer steps, whatever the number of processes."""
    optim: str = "adamw"
    """adamw | adamw_8bit (pip install diffalign[optim]) | adafactor | prodigy (pip install diffalign[optim])."""
    adam_beta1: float = 0.9
    """First moment decay."""
    adam_beta2: float = 0.999
    """Second moment decay."""
    adam_epsilon: float = 1e-8
    """Denominator floor."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradient clipping by global norm; null for none."""
    mixed_precision: str = "no"
    """no | fp16 | bf16: autocast of the forward passes. Trainable weights and losses stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    attention: str = "native"
    """Attention backend by diffusers' names: native | xformers | flash | _flash_3 | sage | ..."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights; it is what `save_model` writes."""
    ema_decay: float = 0.9999
    """Decay of that average."""
    ema_warmup: bool = True
    """The average follows quickly at first, as in diffusers: step n has a decay of at most (1 + n) / (10 + n), 0.991 at step 1000.
    false: `ema_decay` from the first step on, starting at the base weights."""
    offload_ema: bool = False
    """Keep the average on the CPU."""
    offload_reference: bool = False
    """Full fine-tuning: keep the frozen reference copy on the CPU between its forward passes."""
    precompute_ref_errors: bool = False
    """Compute the reference's errors once before training, for `ref_error_draws` draws of noise and timestep per row; epochs then
    cycle through these draws and the reference is not run while training."""
    ref_error_draws: int = 4
    """Draws of (noise, timestep) per row with `precompute_ref_errors`."""
    proportion_empty_prompts: float = 0.0
    """Share of groups trained with the empty prompt (keeps guidance working); one draw per group."""
    shared_noise: bool = True
    """One noise for all images of a group, as in the published codes."""
    noise_offset: float = 0.0
    """Adds a constant per channel to the noise, before it is shared."""
    timestep_sampling: str = "auto"
    """auto (uniform; logit_normal for flow models) | uniform | logit_normal | turbo | refiner. One draw per group. turbo trains on
    SDXL-Turbo's four timesteps, whose noise schedule is rescaled to zero terminal SNR."""
    logit_mean: float = 0.0
    """Mean of the logit-normal; above 0 means noisier, as in the SD3 paper (diffusers' scripts count from the noisy end)."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal."""
    snr_gamma: float | None = None
    """Min-SNR weight on policy and reference errors alike; null for none."""
    reduction: str = "mean"
    """mean | sum over the elements of a latent; `beta` is meant for mean."""
    logging_steps: int = 10
    """Log every so many optimizer steps, averaged over them."""
    eval_steps: int | None = None
    """Evaluate on the evaluation data every so many optimizer steps; null: only when `evaluate` is called."""
    report_to: str = "none"
    """Tracker by accelerate's names: tensorboard | wandb | trackio | swanlab | comet_ml | mlflow | ... | all | none."""
    project: str = "diffalign"
    """Tracker project."""
    run_name: str | None = None
    """Tracker run name."""
    save_steps: int | None = None
    """Write `checkpoint-<step>` every so many optimizer steps; null: only at the end and when interrupted."""
    save_total_limit: int | None = 2
    """Keep this many newest checkpoints; null keeps all."""
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint folder: go on where it stopped."""
    force_resume: bool = False
    """Resume even though method, model or dataset differ from the checkpoint's."""
    divergence_patience: int = 20
    """Warn when the chosen error stays above the reference's for so many logs in a row."""
    stop_on_divergence: bool = False
    """Stop (with a checkpoint) instead of warning."""
    ddp_timeout: int = 7200
    """Seconds that processes wait for each other, e.g. while the first one draws the validation images; then the run fails."""

    def __post_init__(self) -> None:
        from ..config.section import coerce

        self.output_dir = os.fspath(self.output_dir)  # a Path is as good
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, coerce(getattr(self, f.name), hints[f.name], f.name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    name, f"expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in _POSITIVE:
            self._check(name, lambda v: v > 0, "> 0")
        for name in _NOT_NEGATIVE:
            self._check(name, lambda v: v >= 0, ">= 0")
        for name in _SHARES:
            self._check(name, lambda v: 0 <= v <= 1, "in [0, 1]")
        for name in _BETAS:
            self._check(name, lambda v: 0 <= v < 1, "in [0, 1)")
        for name in ("seed", "data_seed"):
            self._check(name, lambda v: v >= 0, ">= 0")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._check_size(f.name, value)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError("max_steps", "set either max_steps or num_train_epochs, not both")
        if not self.output_dir:
            raise ConfigError("output_dir", "expected a folder, got an empty name")

    def _check(self, name: str, holds: typing.Callable[[float], bool], range_: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            kind = "int" if isinstance(value, int) else "float"
            raise ConfigError(name, f"expected {kind} {range_}, got {shown(value)}")

    def _check_size(self, name: str, value: float) -> None:
        """Refuses numbers that no step survives: NaN, infinite ones, and those that overflow in the layers below."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(name, f"expected a finite number, got {value!r}")
        most = _MOST.get(name, COUNT if isinstance(value, int) else LARGEST)
        if abs(value) > most:
            raise ConfigError(name, f"expected at most {most:g}, got {shown(value)}")
