"""`train:` of a run file: what every method shares."""

from __future__ import annotations

from typing import Annotated, Literal

from ..config.ranges import BatchSize, Count, Decay, NotNegative, Positive, Range, Share, count
from ..config.section import check_fields, config_section
from ..errors import ConfigError


@config_section
class TrainingConfig:
    """Arguments of the one training loop; every method's config inherits them.

    Example:
        ```python
        from diffalign.training.config import TrainingConfig

        args = TrainingConfig(max_steps=2000, gradient_accumulation_steps=4)
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
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """LoRA: load the frozen network quantised: nf4 (4 bits, by bitsandbytes, on a CUDA
    GPU) | int8 | fp8 (8 bits, by torchao). pip install diffalign[quantization]."""
    layerwise_casting: bool = False
    """LoRA: store the frozen linear layers in 8 bits (float8_e4m3fn) and cast each
    while it runs. Autograd keeps the cast weights until the backward pass unless
    `gradient_checkpointing` is on."""
    compile: bool = False
    """Compile the repeated blocks of the network. The first step takes a minute or
    more, the others less time."""
    attention: str = "native"
    """Attention backend by diffusers' names: native | xformers | flash | _flash_3 |
    sage | ..."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights. `save_model` writes
    it."""
    ema_decay: Share = 0.9999
    """Decay of that average."""
    ema_warmup: bool = True
    """The average follows quickly at first, as in diffusers: step n has a decay of at
    most (1 + n) / (10 + n), 0.991 at step 1000. false: `ema_decay` from the first step
    on, starting at the base weights."""
    offload_ema: bool = False
    """Keep the average on the CPU."""
    offload: Literal["none", "group"] = "none"
    """group: text encoders, the autoencoder and a frozen copy as the reference stay on
    the CPU, and come to the GPU layer by layer when they run."""
    offload_reference: bool = False
    """Full fine-tuning: keep the frozen reference copy on the CPU between its forward
    passes."""
    precompute_ref_errors: bool = False
    """Compute the reference's errors once before training, for `ref_error_draws` draws
    of noise and timestep per row. Epochs then cycle through these draws, and the
    reference is not run while training."""
    ref_error_draws: BatchSize = 4
    """Draws of (noise, timestep) per row with `precompute_ref_errors`."""
    proportion_empty_prompts: Share = 0.0
    """Share of groups trained with the empty prompt (keeps guidance working); one draw
    per group."""
    shared_noise: bool = True
    """One noise for all images of a group, as in the published codes."""
    noise_offset: NotNegative[float] = 0.0
    """Adds a constant per channel to the noise, before it is shared."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "turbo", "refiner", "grid"] = (
        "auto"
    )
    """auto (uniform; logit_normal for flow models) | uniform | logit_normal | turbo |
    refiner | grid. One draw per group. turbo trains on SDXL-Turbo's four timesteps,
    whose noise schedule is rescaled to zero terminal SNR. grid trains on the times of
    the model's own sampler alone, for models that draw in a few steps."""
    min_timestep: Annotated[int, count(0, 999)] = 0
    """Cleanest timestep that trains, of 1000; for flow models 1000 sigma."""
    max_timestep: Annotated[int, count(1, 1000)] = 1000
    """Noisiest end of the timesteps that train, of 1000. Between both they are drawn as
    `timestep_sampling` says."""
    timestep_shift: Literal["pipeline", "none"] | Positive[float] = "pipeline"
    """Flow models: shift of the sigmas that training draws. pipeline: that of the
    model's own sampler at this resolution | none | a number, of which 1 is none."""
    grid_steps: Count | None = None
    """Steps of the sampler for `timestep_sampling: grid`; null: the default of the
    model's pipeline."""
    embedded_guidance: NotNegative[float] | None = None
    """Guidance that networks with an input for it (Flux.1-dev, Flux.2-dev) are given,
    the reference too; null: the `guidance_scale` of a run that samples, else the
    default of the model's pipeline."""
    logit_mean: float = 0.0
    """Mean of the logit-normal; above 0 means noisier, as in the SD3 paper (diffusers'
    scripts count from the noisy end)."""
    logit_std: Positive[float] = 1.0
    """Standard deviation of the logit-normal."""
    snr_gamma: Positive[float] | None = None
    """Min-SNR weight on policy and reference errors alike; null for none."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean | sum over the elements of a latent; `beta` is meant for mean."""
    logging_steps: Count = 10
    """Log every so many optimizer steps, averaged over them."""
    eval_steps: Count | None = None
    """Evaluate on the evaluation data every so many optimizer steps; null: only when
    `evaluate` is called."""
    report_to: str = "none"
    """Tracker by accelerate's names: tensorboard | wandb | trackio | swanlab | comet_ml
    | mlflow | ... | all | none."""
    project: str = "diffalign"
    """Tracker project."""
    run_name: str | None = None
    """Tracker run name."""
    save_steps: Count | None = None
    """Write `checkpoint-<step>` every so many optimizer steps; null: only at the end
    and when interrupted."""
    save_total_limit: Count | None = 2
    """Keep this many newest checkpoints; null keeps all."""
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint folder: go on where it stopped."""
    force_resume: bool = False
    """Resume even though method, model or dataset differ from the checkpoint's."""
    divergence_patience: Count = 20
    """Warn when the chosen error stays above the reference's for so many logs in a
    row."""
    stop_on_divergence: bool = False
    """Stop (with a checkpoint) instead of warning."""
    ddp_timeout: Count = 7200
    """Seconds that processes wait for each other, e.g. while the first one draws the
    validation images. Then the run fails."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError("max_steps", "set either max_steps or num_train_epochs, not both")
        if self.min_timestep >= self.max_timestep:
            raise ConfigError(
                "min_timestep",
                f"expected one below max_timestep ({self.max_timestep}), got {self.min_timestep}",
            )
        windowed = (self.min_timestep, self.max_timestep) != (0, 1000)
        if windowed and self.timestep_sampling in ("turbo", "refiner"):
            raise ConfigError(
                "min_timestep",
                f"timestep_sampling: {self.timestep_sampling} has timesteps of its own; leave out "
                "min_timestep and max_timestep",
            )
        if not self.output_dir:
            raise ConfigError("output_dir", "expected a folder, got an empty name")

    @property
    def error_beta(self) -> float | None:
        """The `beta` that multiplies denoising errors. None for methods without one.

        Its strength depends on the size of a latent, so the run prints what it means.
        """
        return None
