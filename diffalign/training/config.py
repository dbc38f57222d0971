"""`train:` of a run file: what every method shares."""

from __future__ import annotations

from typing import Annotated, Literal

from ..config.ranges import BatchSize, Count, NotNegative, Positive, Share, count
from ..config.section import config_section
from ..errors import ConfigError
from .loop_config import LoopConfig


@config_section
class TrainingConfig(LoopConfig):
    """Arguments that every method's config inherits.

    Example:
        ```python
        from diffalign.training.config import TrainingConfig

        args = TrainingConfig(max_steps=2000, snr_gamma=5.0)
        assert args.timestep_sampling == "auto"
        ```
    """

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
    """Attention backend by diffusers' names: native | _native_cudnn | xformers |
    flash | _flash_3 | sage | ... native leaves cuDNN's kernel out, whose gradients can
    be NaN on Hopper GPUs."""
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
    divergence_patience: Count = 20
    """Warn when the chosen error stays more than a tenth above the reference's for so
    many logs in a row."""
    stop_on_divergence: bool = False
    """Stop (with a checkpoint) instead of warning."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @property
    def error_beta(self) -> float | None:
        """The `beta` that multiplies denoising errors. None for methods without one.

        Its strength depends on the size of a latent, so the run prints what it means.
        """
        return None
