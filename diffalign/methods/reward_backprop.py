"""Reward back-propagation: ReFL, DRaFT and AlignProp.

    ReFL       Xu et al. 2023, arXiv 2304.05977
    DRaFT      Clark et al. 2023, arXiv 2309.17400: DRaFT, DRaFT-K and DRaFT-LV
    AlignProp  Prabhudesai et al. 2023, arXiv 2310.03739

    x^     = an image that the policy draws, with a graph through its live steps
    loss   = reward_weight shape(R(decode(x^), prompt))
             + kl_weight mean |policy - reference|^2        at the live steps
             + pretrain_weight m                            denoising error of the data

    mode       live steps                           x^
    refl       one, drawn from refl_steps           clean estimate at that step
    draft      all                                  the sample
    draft_k    the last live_steps                  the sample
    draft_lv   the last, on lv_samples copies       clean estimates of the copies
    alignprop  from a random step on                the sample

The scorer must be differentiable. Steps before the live ones run without a graph. The
random step of refl and alignprop is the same for all rows of an optimizer step, so that
these share one graph; every other random number belongs to its row. DRaFT-LV adds the
noise of the last step to the finished sample several times and back-propagates through
one prediction for each.

shape is -R (negative), max(target - R, 0) (relu: ReFL, target 2), |R - target| (l1:
AlignProp) or 1 - R (one_minus: AlignProp with HPS).

The graph also runs through the input of every live step, as in AlignProp and DRaFT.
`stop_input_gradient` cuts it there, as DRTune does: each step then has the gradient of
its own prediction alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config.ranges import BatchSize, Count, NotNegative, Positive, Share, count, finite
from ..config.section import config_section
from ..data import PreferenceDataset
from ..errors import ConfigError
from ..likelihood.schedules import NoiseSchedule
from ..runtime.seeds import row_generator
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.data_pipeline import DataPipeline, as_preferences
from ..training.memory import refuse_offload
from ..training.online.differentiable_reward import DifferentiableReward
from ..training.online.on_policy import DRAWN_PROMPTS_TRAIN
from ..training.online.policy_sampler import sample_scores
from ..training.online.reward_function import RewardFunction
from ..training.online.rollout import SamplerConfig, guide, sampling_mode, transition
from ..training.reference import Reference
from ..training.trainer import Trainer

Mode = Literal["refl", "draft", "draft_k", "draft_lv", "alignprop"]
Shape = Literal["negative", "relu", "l1", "one_minus"]
SHAPES = get_args(Shape)
Call = Callable[[Tensor, Tensor], Tensor]


@config_section
class RewardBackpropConfig(TrainingConfig):
    """`train:` for `method: reward_backprop`; the defaults are DRaFT-1's.

    Example:
        ```python
        from diffalign import RewardBackpropConfig

        args = RewardBackpropConfig(output_dir="runs/draft", mode="draft_lv")
        assert args.lv_samples == 2
        ```
    """

    mode: Mode = "draft_k"
    """refl | draft | draft_k | draft_lv | alignprop: which steps keep their graph.
    Source: DRaFT, whose DRaFT-1 is its most used variant."""
    num_inference_steps: Annotated[int, count(2, 1000)] = 50
    """Steps of the sampler. Source: DRaFT and AlignProp, 50; ReFL's code has 40."""
    guidance_scale: float = 7.5
    """Classifier-free guidance, in the graph as well; 1 or below for none. Source:
    DRaFT, 7.5; AlignProp's code 5; ReFL's code none."""
    eta: NotNegative[float] = 0.0
    """Stochasticity of the sampler's steps. Source: DRaFT, 0; ReFL and AlignProp's code
    draw with 1."""
    live_steps: Count = 1
    """draft_k: last steps that keep their graph. Source: DRaFT-1."""
    lv_samples: Count = 2
    """draft_lv: noisy copies of each sample. Source: paper of DRaFT, 2."""
    refl_steps: list[Share] | None = None
    """refl: first and last step that may be live, as shares of the sampler's steps from
    noisy to clean. null is 0.75 to 1. Source: ReFL's code, steps 30 to 39 of 40."""
    alignprop_start: Literal["gaussian", "uniform"] = "gaussian"
    """alignprop: how the first live step is drawn, around start_mean or over all
    steps. Source: AlignProp's code, gaussian."""
    start_mean: Share = 0.84
    """alignprop: mean of the first live step, as a share of the steps. Source:
    AlignProp's code, 42 of 50."""
    start_std: Positive[float] = 0.1
    """alignprop: its standard deviation. Source: AlignProp's code, 5 of 50."""
    stop_input_gradient: bool = False
    """Cut the graph at the input of every live step, as DRTune. Source: ours, off."""
    shape: Shape = "negative"
    """negative | relu | l1 | one_minus: how a score becomes a loss. Source: DRaFT,
    negative; relu is ReFL's; l1 and one_minus are AlignProp's."""
    target: Annotated[float, finite] = 2.0
    """shape: relu and l1: the score to reach, in the scorer's units. Source: ReFL's
    code, 2 in units of ImageReward; AlignProp's code, 10 for the aesthetic score."""
    reward_weight: NotNegative[float] = 1.0
    """Weight of the reward. Source: DRaFT, 1; ReFL's code 1e-3; AlignProp's code
    0.01."""
    kl_weight: NotNegative[float] = 0.0
    """Weight of the squared difference to the reference's prediction at the live steps,
    against over-optimisation. Source: ours, 0 as in all three."""
    pretrain_weight: NotNegative[float] = 0.0
    """Weight of the denoising error of the data's images. Above 0 the data must hold
    images. Source: paper of ReFL alternates both losses; its code has none."""
    rollout_batch_size: BatchSize = 8
    """Images sampled at once before the live steps. Source: ours; it changes no
    sample."""
    scorers: list[str] = field(default_factory=list)
    """Name of the scorer; a run file's `rewards:` section, or the trainer's `scorers`,
    says more. Source: ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proportion_empty_prompts:
            raise ConfigError("proportion_empty_prompts", DRAWN_PROMPTS_TRAIN)
        if self.mode == "draft_k" and self.live_steps > self.num_inference_steps:
            raise ConfigError(
                "live_steps",
                f"expected at most num_inference_steps ({self.num_inference_steps}), got "
                f"{self.live_steps}",
            )
        if self.mode == "draft_lv" and self.eta > 0:
            raise ConfigError(
                "eta", "draft_lv adds noise of its own to a finished sample; set eta to 0"
            )
        limits = self.refl_steps
        if limits is not None and not (len(limits) == 2 and limits[0] <= limits[1]):
            raise ConfigError(
                "refl_steps", f"expected two shares, the smaller one first, got {limits}"
            )
        if self.reward_weight == 0:
            raise ConfigError("reward_weight", "0 leaves no reward to train on; set it above 0")

    @property
    def refl_range(self) -> tuple[int, int]:
        """First and last step of refl, counted from the noisiest, both included."""
        low, high = self.refl_steps or (0.75, 1.0)
        steps = self.num_inference_steps
        first = min(int(low * steps), steps - 1)
        return first, max(first, min(int(high * steps), steps) - 1)


def shaped_loss(rewards: Tensor, shape: str = "negative", target: float = 2.0) -> Tensor:
    """Turn scores into losses.

    Args:
        rewards (`Tensor`): (n,), higher is better.
        shape (`str`, *optional*, defaults to `"negative"`): `negative`, `relu`, `l1` or
            `one_minus`.
        target (`float`, *optional*, defaults to `2.0`): Of `relu` and `l1`.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: Another shape.

    Example:
        ```python
        import torch

        loss = shaped_loss(torch.tensor([-1.0, 0.5, 2.5]), "relu", target=2.0)
        assert loss.tolist() == [3.0, 1.5, 0.0]
        ```
    """
    if shape == "negative":
        return -rewards
    if shape == "relu":
        return torch.relu(target - rewards)
    if shape == "l1":
        return (rewards - target).abs()
    if shape == "one_minus":
        return 1 - rewards
    raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")


@dataclass
class LiveStep:
    """What a live step predicted.

    Attributes:
        sample (`Tensor`): Latents before the step, (n, C, h, w), with their graph.
        times (`Tensor`): Their times, (n,).
        output (`Tensor`): Output of the network, guided, (n, C, h, w).
    """

    sample: Tensor
    times: Tensor
    output: Tensor


def sampler_steps(
    predict: Call,
    schedule: NoiseSchedule,
    sample: Tensor,
    times: Tensor,
    next_times: Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    stop_input_gradient: bool = False,
) -> tuple[Tensor, list[LiveStep]]:
    """Run steps of a sampler, with a graph where gradients are enabled.

    Args:
        predict (`Callable`): Predicts at latents (n, C, h, w) and times (n,).
        schedule (`NoiseSchedule`): Noise schedule of the model.
        sample (`Tensor`): Latents before the first step, (n, C, h, w).
        times (`Tensor`): Times before the steps, (S,).
        next_times (`Tensor`): Times after the steps, (S,). -1 is the clean sample.
        eta (`float`, *optional*, defaults to `0.0`): Stochasticity.
        noise (`Tensor`, *optional*): Noise of each step, (n, S, C, h, w), if eta is
            above 0.
        stop_input_gradient (`bool`, *optional*, defaults to `False`): Cut the graph at
            the network's input.

    Returns:
        `tuple[Tensor, list[LiveStep]]`: The latents after the last step, and each
        step's prediction.
    """
    rows, steps = len(sample), []
    for index, (now, following) in enumerate(zip(times, next_times, strict=True)):
        t, after = now.expand(rows), following.expand(rows)
        output = predict(sample.detach() if stop_input_gradient else sample, t)
        steps.append(LiveStep(sample, t, output))
        mean, std = transition(schedule, output, sample, t, after, eta)
        sample = mean.to(sample.dtype)
        if noise is not None:
            sample = (mean + std * noise[:, index].to(mean)).to(sample.dtype)
    return sample, steps


class RewardBackpropTrainer(Trainer):
    """Trains on prompts with the gradient of a differentiable scorer.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import RewardBackpropConfig, RewardBackpropTrainer

        trainer = RewardBackpropTrainer(
            model="shapes",
            args=RewardBackpropConfig(
                output_dir="runs/draft",
                num_inference_steps=8,
                guidance_scale=2.0,
                max_steps=5,
            ),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers="shapes-clip",
        )
        trainer.train()
        ```
    """

    method = "reward_backprop"
    _name = "reward back-propagation"
    _tag_names = ("reward-backprop", "refl", "draft", "alignprop")
    _paper: ClassVar[dict[str, str]] = {
        "title": "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        "id": "2309.17400",
        "citation": """@inproceedings{clark2024directly,
  title     = {Directly Fine-Tuning Diffusion Models on Differentiable Rewards},
  author    = {Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.},
  booktitle = {ICLR},
  year      = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "DRaFT's code; its learning rate 4e-4 and its other settings are those of the paper."
    )
    config_class = RewardBackpropConfig
    data_kind = "prompt"
    can_be_online = False
    # A reference is built only for the pull to it.
    reference_free = True
    args: RewardBackpropConfig
    reward: DifferentiableReward
    """Scores pixels with a gradient."""

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """Read prompts, or images with `pretrain_weight`.

        See `Trainer.read_dataset`.
        """
        kind = "single" if self.args.pretrain_weight else "prompt"
        return as_preferences(source, self.data_config, kind, split)

    def validate(self) -> None:
        """Build the reward, and say what the gradient will cost.

        Raises:
            ConfigError: There is no scorer, or it has no gradient.
        """
        super().validate()
        args = self.args
        refuse_offload(args)
        scorers = self.scorers if self.scorers is not None else args.scorers
        if not scorers:
            raise ConfigError(
                "train.scorers",
                "reward back-propagation needs a differentiable scorer: name one, or give a "
                "rewards section",
            )
        self.reward = DifferentiableReward(scorers)
        live = self._most_live_steps()
        passes = live * (args.lv_samples if args.mode == "draft_lv" else 1)
        guided = self.backbone.guidance_rule.active(self.guidance_scale)
        rows = args.per_device_train_batch_size * (2 if guided else 1)
        self.notes.append(
            f"graph: up to {passes} passes of {rows} rows, {passes} times the activations of a "
            f"supervised step, then the autoencoder and {', '.join(self.reward.names)}"
        )
        if passes > 1 and not args.gradient_checkpointing:
            self.notes.append(
                "WARNING: without train.gradient_checkpointing every live step keeps all its "
                "activations; set it to true where memory is short"
            )

    def training_reward(self) -> RewardFunction:
        """Return the reward that is followed, see `Trainer.training_reward`."""
        return self.reward.function

    def _most_live_steps(self) -> int:
        args = self.args
        if args.mode == "draft":
            return args.num_inference_steps
        if args.mode == "draft_k":
            return args.live_steps
        if args.mode == "alignprop":
            return args.num_inference_steps - 1
        return 1

    def build_reference(self) -> Reference | None:
        """Build the frozen starting weights, if the run is pulled to them."""
        return self.fixed_reference() if self.args.kl_weight else None

    def first_live_step(self) -> int:
        """Return the first step that keeps its graph, of the current optimizer step."""
        args, steps = self.args, self.args.num_inference_steps
        stream = row_generator(args.seed, self.state.global_step, 0, "reward_backprop-start")
        if args.mode == "refl":
            first, last = args.refl_range
            return first + int(torch.randint(last - first + 1, (1,), generator=stream))
        if args.mode == "alignprop":
            if args.alignprop_start == "uniform":
                return int(torch.randint(steps, (1,), generator=stream))
            for _ in range(1000):
                draw = float(torch.randn(1, generator=stream, dtype=torch.float64))
                start = int(steps * (args.start_mean + args.start_std * draw))
                if 1 <= start < steps:
                    return start
            return steps - 1
        return 0 if args.mode == "draft" else steps - self._most_live_steps()

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Sample to the first live step.

        Args:
            batch (`Batch`): g prompts.

        Returns:
            `Batch`: `extra["start"]` are the latents there, `extra["step_noise"]` the
            noise of the live steps.
        """
        args, device = self.args, batch.x0.device
        streams = batch.generators("reward_backprop")
        shape = batch.x0.shape[2:]
        sample = torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)
        grid, first = self.make_grid(args.num_inference_steps, args.eta), self.first_live_step()
        empty = self._unconditional(batch.condition)
        if args.mode == "draft_lv":
            first = len(grid)  # the whole sample, without a graph
        with sampling_mode(self.network), self.accelerator.autocast():
            for step in range(first):
                noise = None
                if args.eta > 0:
                    noise = torch.stack([torch.randn(shape, generator=g) for g in streams])
                parts = []
                for part in torch.arange(len(batch)).split(args.rollout_batch_size):
                    rows = part.to(device)
                    predict = self._guided(
                        self.sampling_policy.predict,
                        {name: value[rows] for name, value in batch.condition.items()},
                        None if empty is None else {n: value[rows] for n, value in empty.items()},
                    )
                    parts.append(
                        sampler_steps(
                            predict,
                            self.schedule,
                            sample[rows],
                            grid.times[step : step + 1],
                            grid.next_times[step : step + 1],
                            eta=args.eta,
                            noise=None if noise is None else noise[part][:, None].to(device),
                        )[0]
                    )
                sample = torch.cat(parts)
        extra = {**batch.extra, "start": sample}
        copies = args.lv_samples if args.mode == "draft_lv" else len(grid) - first
        if args.mode == "draft_lv" or (args.eta > 0 and args.mode != "refl"):
            draws = [torch.randn((copies, *shape), generator=g) for g in streams]
            extra["step_noise"] = torch.stack(draws).to(device)
        return replace(batch, extra=extra)

    def _unconditional(self, condition: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.backbone.guidance_rule.active(self.guidance_scale):
            return None
        return self.data_pipeline.builder.unconditional(condition)

    def _guided(
        self,
        predict: Any,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None,
    ) -> Call:
        """A network with guidance, as a function of latents and times."""

        def call(sample: Tensor, times: Tensor) -> Tensor:
            return guide(
                predict,
                self.schedule,
                sample,
                times,
                condition,
                unconditional,
                self.guidance_scale,
                self.backbone.guidance_rule,
            )

        return call

    def _images(self, batch: Batch) -> tuple[Tensor, list[LiveStep], int]:
        """Run the live steps.

        Returns:
            `tuple`: Clean latents with their graph, (n g, C, h, w), the live steps, and
            n, the number of latents per prompt.
        """
        args, schedule = self.args, self.schedule
        condition, copies = batch.condition, 1
        grid, first = self.make_grid(args.num_inference_steps, args.eta), self.first_live_step()
        sample = batch.extra["start"]
        if args.mode == "draft_lv":
            copies = args.lv_samples
            condition = {name: v.repeat_interleave(copies, 0) for name, v in condition.items()}
            time = grid.times[-1].expand(len(batch) * copies)
            noise = batch.extra["step_noise"].flatten(0, 1)
            sample = schedule.add_noise(sample.repeat_interleave(copies, 0), noise, time)
        predict = self._guided(self.policy.predict, condition, self._unconditional(condition))
        with self.accelerator.autocast():
            if args.mode in ("refl", "draft_lv"):
                step = first if args.mode == "refl" else len(grid) - 1
                time = grid.times[step].expand(len(sample))
                output = predict(sample, time)
                return (
                    schedule.to_x0(output, sample, time),
                    [LiveStep(sample, time, output)],
                    copies,
                )
            final, steps = sampler_steps(
                predict,
                schedule,
                sample,
                grid.times[first:],
                grid.next_times[first:],
                eta=args.eta,
                noise=batch.extra.get("step_noise"),
                stop_input_gradient=args.stop_input_gradient,
            )
        return final, steps, copies

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of reward back-propagation. See `Trainer.compute_loss`."""
        args, rows = self.args, len(batch)
        latents, steps, copies = self._images(batch)
        decode: Any = self.backbone.decode_pixels
        if args.gradient_checkpointing and torch.is_grad_enabled():
            pixels = checkpoint(decode, latents.float(), use_reentrant=False)
        else:
            pixels = decode(latents.float())
        prompts = [prompt for prompt in batch.prompts for _ in range(copies)]
        rewards = self.reward(pixels, prompts)

        def per_row(values: Tensor) -> Tensor:
            return values.reshape(rows, copies).mean(1)

        loss = args.reward_weight * per_row(shaped_loss(rewards, args.shape, args.target))
        clamped = ((pixels <= 0) | (pixels >= 1)).float().flatten(1).mean(1)
        metrics = {
            "reward": per_row(rewards.detach()),
            "pixels/clamped": per_row(clamped.detach()),
        }
        if args.kl_weight:
            distance = per_row(self._distance(batch, steps, copies))
            loss = loss + args.kl_weight * distance
            metrics["kl"] = distance.detach()
        if args.pretrain_weight:
            errors = self.policy.errors(batch)[:, 0]
            loss = loss + args.pretrain_weight * errors
            metrics["errors/data"] = errors.detach()
        if self.reward.watching and (self.state.global_step + 1) % args.logging_steps == 0:
            watched = self.reward.watch(pixels, prompts)
            metrics |= {f"watched/{name}": per_row(values) for name, values in watched.items()}
        return loss, metrics

    def _distance(self, batch: Batch, steps: list[LiveStep], copies: int) -> Tensor:
        """Mean squared difference to the reference at the live steps, per latent."""
        assert self.reference is not None
        condition = batch.condition
        if copies > 1:
            condition = {name: v.repeat_interleave(copies, 0) for name, v in condition.items()}
        predict = self._guided(self.reference.predict, condition, self._unconditional(condition))
        total = torch.zeros(len(steps[0].sample), device=batch.x0.device)
        for step in steps:
            with torch.no_grad(), self.accelerator.autocast():
                reference = predict(step.sample.detach(), step.times)
            total = total + (step.output.float() - reference).square().flatten(1).mean(1)
        return total / len(steps)

    def evaluation_metrics(self, data: DataPipeline) -> dict[str, float]:
        """Average the scores of images that the policy draws for evaluation prompts.

        Scorers of role `eval` are among them. The initial noise is the same in every
        evaluation.

        Args:
            data (`DataPipeline`): The evaluation prompts.

        Returns:
            `dict[str, float]`: The averages, named `eval/...`.
        """
        args = self.args
        config = SamplerConfig(
            args.num_inference_steps,
            self.guidance_scale,
            args.eta,
            args.rollout_batch_size,
            keep="final",
        )
        sampler = self.policy_sampler(config, "evaluation")
        function = self.reward.function

        def sample(batch: Batch) -> Any:
            drawn, late = sampler(batch, 1, function, "evaluation")
            return drawn, late.wait()

        return sample_scores(data, sample, function, self.accelerator)
