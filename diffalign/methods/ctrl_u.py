"""Ctrl-U: Zhang et al. 2024, arXiv 2410.11236. ControlNet++ and ControlNet within it.

    x^_i = decode(clean estimate at (x_{t_i}, t_i)),   t_1 = t, t_2 = t + time_gap
    p_i  = R(x^_i)                                     of a frozen predictor
    U    = disagreement of p_1 and p_2,  w = exp(-weight_scale U)      per pixel
    loss = mean of m_1 and m_2                         denoising errors of the data
         + reward_weight  mean(w loss(p_1, label))     for t in the reward's window
         + uncertainty_weight  mean(U)                 for t in the reward's window

Both noise levels share noise, image, prompt and condition image. The ControlNet trains.
UNet, autoencoder and R are frozen. `uncertainty: false` is ControlNet++ (Li et al.
2024, arXiv 2404.07987) at one noise level, and `reward_weight: 0` beside it plain
ControlNet training (Zhang et al. 2023, arXiv 2302.05543).

In the official code w has a gradient. Where reward_weight w loss is above
uncertainty_weight it rewards disagreement, so w is a constant here unless
`detach_weight: false`. Its mean over the window divides by the number of rows in it, so
that the loss of a row depends on the others; `normalise: window` does that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from ..backbones.controlnet import load_controlnet, predict_with_control
from ..config.ranges import NotNegative, count
from ..config.section import config_section
from ..errors import ConfigError
from ..rewards.base import Scorer
from ..rewards.consistency import (
    Consistency,
    PaletteSegmentation,
    ScorerConsistency,
    TransformersConsistency,
    consistency_loss,
    uncertainty_reward_loss,
)
from ..shapes.renderer import BACKGROUND_PALETTE, PALETTE
from ..training.batch import Batch
from ..training.build import DTYPES, load_plain_network
from ..training.config import TrainingConfig
from ..training.denoiser import Forward
from ..training.memory import refuse_offload
from ..training.trained_weights import (
    State,
    TrainedWeights,
    gather_network,
    read_network,
    write_network,
)
from ..training.trainer import Trainer


@config_section
class CtrlUConfig(TrainingConfig):
    """`train:` for `method: ctrl_u`.

    Example:
        ```python
        from diffalign import CtrlUConfig

        args = CtrlUConfig(output_dir="runs/ctrl-u", consistency="shapes")
        assert args.uncertainty and args.reward_weight == 0.1
        ```
    """

    consistency: str | None = None
    """Predictor of the condition from an image: shapes (the palette of the embedded
    world) or depth:MODEL of transformers. In Python also `scorers=`, a `Consistency`,
    such as `TransformersConsistency` for segmentation with its palette, or a
    differentiable scorer. Source: official code, UperNet, DeepLabV3 or DPT."""
    controlnet: str | None = None
    """Hub id or folder of the ControlNet to start from. null makes one from the UNet.
    Source: official code starts from a fine-tuned one of the same condition."""
    uncertainty: bool = True
    """false is ControlNet++: one noise level, no weights. Source: paper."""
    reward_weight: NotNegative[float] = 0.1
    """Weight of the consistency. Source: official code, 0.1 (ADE20K), 0.2 (COCO-Stuff),
    1 (depth, edges)."""
    reward_warmup_steps: NotNegative[int] = 0
    """Optimizer steps in which that weight rises from 0. Source: official code,
    5000."""
    uncertainty_weight: NotNegative[float] = 0.1
    """Weight of the disagreement. Source: official code, 0.1 (1 for ADE20K)."""
    weight_scale: NotNegative[float] = 1.0
    """How much an uncertain pixel loses: w = exp(-weight_scale U). Source: official
    code, 1 (0.1 for COCO-Stuff)."""
    reward_min_timestep: Annotated[int, count(0, 1000)] = 0
    """Cleanest timestep that gets the reward, of 1000. Source: official code, 0."""
    reward_max_timestep: Annotated[int, count(0, 1000)] = 400
    """Noisiest timestep that gets the reward. Source: official code, 400 (200 for
    COCO-Stuff)."""
    time_gap: Annotated[int, count(1, 999)] = 1
    """Timesteps between both noise levels. Source: official code, 1."""
    detach_weight: bool = True
    """Whether w is a constant. Source: ours; the official code differentiates it."""
    branches: Literal["one", "both"] = "one"
    """one: the reward of the first prediction | both: the mean of both. Source:
    official code; the paper has both."""
    normalise: Literal["all", "window"] = "all"
    """all: the reward's mean is over all rows | window: over those in the window.
    Source: ours; the official code's is window."""
    target: float = 1.0
    """Of a scorer as the consistency: the score to reach. Source: ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_gamma is not None:
            raise ConfigError("snr_gamma", "Ctrl-U does not support it; set null")
        if self.reward_min_timestep > self.reward_max_timestep:
            raise ConfigError(
                "reward_min_timestep",
                f"expected at most reward_max_timestep ({self.reward_max_timestep}), got "
                f"{self.reward_min_timestep}",
            )


class ControlNetWeights:
    """A ControlNet as diffusers writes it.

    Args:
        network: The ControlNet.
    """

    description = "ControlNet"

    def __init__(self, network: Any) -> None:
        self.network = network

    def gather(self, accelerator: Accelerator, prepared: Module) -> State:
        """See `TrainedWeights.gather`."""
        return gather_network(accelerator, prepared, self.network)

    def write(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write`."""
        write_network(folder, self.network, state)

    def write_checkpoint(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write_checkpoint`."""
        self.write(folder / "controlnet", state)

    def read_checkpoint(self, folder: Path) -> None:
        """See `TrainedWeights.read_checkpoint`."""
        read_network(folder / "controlnet", self.network)


def shapes_consistency() -> PaletteSegmentation:
    """Segmentation by the colors of the embedded world: objects, then backgrounds."""
    colors = [*PALETTE.values(), *BACKGROUND_PALETTE.values()]
    return PaletteSegmentation(torch.tensor(colors, dtype=torch.float32) / 255)


def build_consistency(given: Any, name: str | None, target: float) -> Consistency:
    """Build what reads conditions back, from an object or its name.

    Args:
        given: A `Consistency`, a differentiable scorer, or None.
        name (`str`, *optional*): See `CtrlUConfig.consistency`.
        target (`float`): Of a scorer.

    Raises:
        ConfigError: There is neither, or the name is unknown.
    """
    if isinstance(given, Scorer):
        return ScorerConsistency(given, target)
    if given is not None and hasattr(given, "predict") and hasattr(given, "label"):
        return given
    if given is not None:
        raise ConfigError(
            "scorers",
            f"expected a Consistency or a differentiable scorer, got {type(given).__name__}",
        )
    task, _, model = (name or "").partition(":")
    if name == "shapes":
        return shapes_consistency()
    if task == "depth" and model:
        return TransformersConsistency(model, task)
    raise ConfigError(
        "train.consistency",
        f"expected shapes or depth:MODEL, got {name!r}; other predictors are passed in Python as "
        "scorers=",
    )


class CtrlUTrainer(Trainer):
    """Trains a ControlNet on images with condition images.

    Example:
        ```python
        from diffalign import CtrlUConfig, CtrlUTrainer
        from diffalign.shapes import Scene, render

        scene = Scene("large", "blue", "star", "center", "white")
        row = {"prompt": "a large blue star in the center of a white background"}
        row |= {"image": render(scene), "conditioning_image": render(scene)}
        args = CtrlUConfig(output_dir="runs/ctrl-u", consistency="shapes", max_steps=2)
        trainer = CtrlUTrainer(model="shapes", args=args, train_dataset=[row])
        trainer.train()
        ```
    """

    method = "ctrl_u"
    _name = "Ctrl-U"
    _tag_names = ("ctrl-u", "controlnet")
    _paper: ClassVar[dict[str, str]] = {
        "title": "Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward "
        "Modeling",
        "id": "2410.11236",
        "citation": """@inproceedings{zhang2025ctrlu,
  title     = {Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward
               Modeling},
  author    = {Zhang, Guiyu and Gao, Huan-ang and Jiang, Zijian and Zhao, Hao and
               Zheng, Zhedong},
  booktitle = {ICLR},
  year      = {2025}
}""",
    }
    _not_public: ClassVar[str] = (
        "Seeds of the ablations, and how the paper's equation of two branches became the code's "
        "of one."
    )
    takes_scorers = True
    config_class = CtrlUConfig
    data_kind = "conditioned"
    can_be_online = False
    reference_free = True
    args: CtrlUConfig
    consistency: Consistency | None = None
    """Reads conditions back. None for plain ControlNet training."""
    unet: Module
    """The frozen network."""

    def validate(self) -> None:
        """Refuse what a ControlNet cannot have, and build the consistency.

        Raises:
            ConfigError: There is a LoRA, a validation, a latent cache, or no
                consistency.
        """
        super().validate()
        args = self.args
        refuse_offload(args)
        if self.peft_config is not None:
            raise ConfigError("lora", "Ctrl-U trains a ControlNet; leave the section out")
        if self.validation_config is not None:
            raise ConfigError(
                "validation", "it draws without condition images; leave the section out"
            )
        if self.data_config.cache_latents is not None:
            raise ConfigError(
                "data.cache_latents",
                "cached latents have no condition images beside them; leave it out",
            )
        if args.reward_weight or args.uncertainty:
            self.consistency = build_consistency(self.scorers, args.consistency, args.target)

    def build_network(self) -> Module:
        """Load the frozen UNet, and the ControlNet that trains."""
        args = self.args
        unet = load_plain_network(self.backbone, args, DTYPES[args.mixed_precision])
        self.unet = unet.requires_grad_(False).eval()
        network = load_controlnet(self.backbone, self.unet, args.controlnet)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def build_trained_weights(self) -> TrainedWeights:
        """Build what saves the ControlNet."""
        return ControlNetWeights(self.network)

    def predictor(self, network: Module) -> Forward:
        """Return the function that runs the UNet with the ControlNet."""

        def predict(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return predict_with_control(network, self.unet, noisy, times, condition)

        return predict

    def _later(self, times: Tensor) -> Tensor:
        """The second noise level of each time."""
        if times.is_floating_point():
            return (times + self.args.time_gap / 1000).clamp(max=1.0)
        return (times + self.args.time_gap).clamp(max=self.schedule.num_timesteps - 1)

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the Ctrl-U loss. See `Trainer.compute_loss`."""
        args, rows = self.args, len(batch)
        levels = [batch.times, *([self._later(batch.times)] if args.uncertainty else [])]
        both = replace(
            batch,
            x0=batch.x0.expand(-1, len(levels), *batch.x0.shape[2:]),
            noise=batch.noise[:, :1].expand(-1, len(levels), *batch.noise.shape[2:]),
            condition={n: v.repeat_interleave(len(levels), 0) for n, v in batch.condition.items()},
        )
        times = torch.stack(levels, 1).flatten()
        x0, noise = both.x0.flatten(0, 1), both.noise.flatten(0, 1)
        schedule = self.noising
        noisy = schedule.add_noise(x0, noise, times)
        with self.accelerator.autocast():
            output = self.policy.predict(
                noisy, schedule.model_times(times).to(noisy.device), both.condition
            )
        target = schedule.target(x0, noise, times)
        errors = self.policy.errors_of(both, output, target).mean(1)
        loss, metrics = errors, {"errors/data": errors.detach()}
        if self.consistency is None:
            return loss, metrics
        shares = self.schedule.fraction(batch.times) * 1000
        window = (shares >= args.reward_min_timestep) & (shares <= args.reward_max_timestep)
        active = window.to(errors)
        if not bool(window.any()):
            nothing = torch.full_like(errors, float("nan")).detach()
            return loss, metrics | {"reward": nothing, "uncertainty": nothing}
        # Only the rows in the window are decoded.
        inside = window.to(noisy.device)
        rows_inside = inside.repeat_interleave(len(levels))
        clean = schedule.to_x0(output.float(), noisy, times)[rows_inside]
        prompts = [p for p, kept in zip(batch.prompts, window.tolist(), strict=True) if kept]
        control = batch.condition["control"][inside]
        some = self._consistency(clean, prompts, control, len(levels))
        rewards, uncertainty = (errors.new_zeros(rows).index_put((inside,), x) for x in some)
        warm = 1.0
        if args.reward_warmup_steps:
            warm = min(1.0, (self.state.global_step + 1) / args.reward_warmup_steps)
        term = warm * args.reward_weight * rewards + args.uncertainty_weight * uncertainty
        if args.normalise == "window":
            active = active * rows / active.sum()
        outside = ~window.to(rewards.device)
        metrics["reward"] = rewards.detach().masked_fill(outside, float("nan"))
        metrics["uncertainty"] = uncertainty.detach().masked_fill(outside, float("nan"))
        return loss + active * term, metrics

    def _consistency(
        self, clean: Tensor, prompts: list[str], control: Tensor, levels: int
    ) -> tuple[Tensor, Tensor]:
        """Weighted consistency loss and uncertainty of n rows, (n,)."""
        assert self.consistency is not None
        args, predictor = self.args, self.consistency
        decode: Any = self.backbone.decode_pixels
        if args.gradient_checkpointing and torch.is_grad_enabled():
            pixels = checkpoint(decode, clean, use_reentrant=False)
        else:
            pixels = decode(clean)
        texts = [prompt for prompt in prompts for _ in range(levels)]
        prediction = predictor.predict(pixels, texts).unflatten(0, (len(prompts), levels))
        label = predictor.label(control)
        if levels == 1:
            loss, valid = consistency_loss(prediction[:, 0], label, predictor.kind)
            rewards = loss.sum(1) / valid.sum(1).clamp(min=1)
            return rewards, torch.zeros_like(rewards)
        return uncertainty_reward_loss(
            prediction[:, 0],
            prediction[:, 1],
            label,
            kind=predictor.kind,
            weight_scale=args.weight_scale,
            detach_weight=args.detach_weight,
            branches=args.branches,
        )
