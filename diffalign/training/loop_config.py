"""Settings of the training loop, which diffusion models and rewards share.

It imports no torch: the command line makes its help from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from ..config.ranges import BatchSize, Count, Decay, NotNegative, Positive, Range, count
from ..config.section import check_fields, config_section
from ..config.yaml_text import expand_home
from ..errors import ConfigError


@config_section
class LoopConfig:
    """Arguments of the one training loop.

    Example:
        ```python
        from diffalign.training.loop_config import LoopConfig

        args = LoopConfig(max_steps=2000, gradient_accumulation_steps=4)
        assert args.lr_scheduler == "constant"
        ```
    """

    output_dir: str = "diffalign-out"
    """Folder of the run: weights, checkpoints, logs, samples, config.yaml, model
    card."""
    overwrite_output_dir: bool = False
    """Allow `output_dir` to hold another run. That run's files are moved aside."""
    seed: Annotated[int, count(0, 2**32 - 1)] = 0  # numpy takes no larger one
    """Seed of everything. The same seed gives the same weights on the same machine with
    equal threads and processes."""
    data_seed: Annotated[int, count(0, 2**63 - 1)] | None = None
    """Seed of the data order alone. None takes `seed`."""
    max_steps: Count | None = None
    """Optimizer steps. Set this or `num_train_epochs`; with neither, one epoch is
    run."""
    num_train_epochs: Annotated[float, Range(0, 1e6, above=True, capped=True)] | None = None
    """Passes over the data, if `max_steps` is unset."""
    per_device_train_batch_size: BatchSize = 1
    """Groups (pairs, lists) per device and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Positive[float] = 1e-5
    """The learning rate as it is: never scaled by batch size or devices."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = "constant"
    """constant | constant_with_warmup | linear | cosine | cosine_with_restarts |
    polynomial, as in diffusers."""
    warmup_steps: NotNegative[int] = 0
    """Linear warm-up in optimizer steps, whatever the number of processes."""
    optim: Literal["adamw", "adamw_fused", "adamw_8bit", "adafactor", "prodigy"] = "adamw"
    """adamw | adamw_fused (one kernel for all weights) | adamw_8bit (pip install
    diffalign[optim]) | adafactor | prodigy (pip install diffalign[optim])."""
    adam_beta1: Decay = 0.9
    """First moment decay."""
    adam_beta2: Decay = 0.999
    """Second moment decay."""
    adam_epsilon: Positive[float] = 1e-8
    """Denominator floor."""
    weight_decay: NotNegative[float] = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: Positive[float] | None = 1.0
    """Gradient clipping by global norm; null for none."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """no | fp16 | bf16: autocast of the forward passes. Trainable weights and losses
    stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    logging_steps: Count = 10
    """Log every N optimizer steps, averaged over them."""
    eval_steps: Count | None = None
    """Evaluate on the evaluation data every N optimizer steps; null: only when
    `evaluate` is called."""
    report_to: str = "none"
    """Tracker by accelerate's names: tensorboard | wandb | trackio | swanlab | comet_ml
    | mlflow | ... | all | none."""
    project: str = "diffalign"
    """Tracker project."""
    run_name: str | None = None
    """Tracker run name."""
    save_steps: Count | None = None
    """Write `checkpoint-<step>` every N optimizer steps; null: only at the end
    and when interrupted."""
    save_total_limit: Count | None = 2
    """Keep this many newest checkpoints; null keeps all."""
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint folder: go on where it stopped."""
    force_resume: bool = False
    """Resume even though method, model or dataset differ from the checkpoint's."""
    ddp_timeout: Count = 7200
    """Seconds that processes wait for each other, e.g. while the first one draws the
    validation images. Then the run fails."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError("max_steps", "set either max_steps or num_train_epochs, not both")
        if not self.output_dir:
            raise ConfigError("output_dir", "expected a folder, got an empty name")
        if Path(self.project).is_absolute() or ".." in Path(self.project).parts:
            raise ConfigError("project", f"expected a name, got the path {self.project!r}")
        self.output_dir = expand_home(self.output_dir)
