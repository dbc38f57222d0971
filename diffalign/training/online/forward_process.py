"""The base of online methods that train on the forward process of their own samples.

They draw images with any sampler, keep the final latents alone, and train at noised
copies of them, as pre-training does. No log-probabilities are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import field
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from ...config.ranges import NotNegative, OneOf, count
from ...config.section import config_section
from ...errors import ConfigError
from ..batch import Batch
from ..data_pipeline import DataPipeline
from ..denoiser import Denoiser
from .advantage_estimator import AdvantageConfig, AdvantageTrainer
from .policy_sampler import LateScores, PolicySampler
from .remote_sampler import connect_servers
from .rollout import SamplerConfig, Trajectories
from .solvers import SOLVERS
from .source import RolloutSource


@config_section
class ForwardProcessConfig(AdvantageConfig):
    """Options of methods that train at noised copies of their own samples."""

    num_inference_steps: Annotated[int, count(2, 1000)] = 10
    """Steps of the sampler. Source: DiffusionNFT, 10; AWM 14."""
    guidance_scale: float = 1.0
    """Classifier-free guidance while sampling; 1 or below for none, in every family.
    Training runs without. Models with embedded guidance read `embedded_guidance`.
    Source: DiffusionNFT and AWM, none."""
    eta: NotNegative[float] = 0.0
    """Stochasticity of the sampler's steps with `solver: default`. Source: DiffusionNFT
    and AWM, 0."""
    solver: Annotated[str, OneOf(SOLVERS)] = "default"
    """default: DDIM, or Euler for flows | DPMSolverMultistepScheduler |
    UniPCMultistepScheduler: of diffusers, of second order. Source: DiffusionNFT,
    DPM-Solver++ of order 2."""
    rollout_server: list[str] = field(default_factory=list)
    """Addresses of servers that draw the images: vLLM-Omni, SGLang-diffusion or
    `diffalign serve-model`, with the same model and a disk that both sides see. Empty
    draws here. With a LoRA only. Source: ours."""
    kl_weight: NotNegative[float] = 1e-4
    """Pull to the starting weights, on the squared difference of the outputs. 0 runs no
    reference. Source: DiffusionNFT 1e-4; AWM 1e-4 to 3e-3 by reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and self.solver != "default":
            raise ConfigError(
                "eta", f"{self.solver} is deterministic; set it to 0, or solver: default"
            )
        if self.shared_init and not self.eta and self.images_per_prompt > 1:
            raise ConfigError(
                "shared_init",
                "with eta 0 all images of a prompt would be the same; leave it out, or set eta "
                "above 0",
            )


class ForwardProcessTrainer(AdvantageTrainer):
    """Base class of methods that train at noised copies of their own samples."""

    args: ForwardProcessConfig

    def sampler_config(self) -> SamplerConfig:
        """Return the settings of the sampler, see `OnPolicyTrainer.sampler_config`."""
        return dataclasses.replace(
            super().sampler_config(),
            keep="final",
            solver=self.args.solver,
        )

    def validate(self) -> None:
        """Check the scorers, and that a server can take the weights.

        Raises:
            ConfigError: There is no scorer, or all weights train and a server draws.
            UserError: A server cannot be reached.
        """
        super().validate()
        args = self.args
        if not args.rollout_server:
            return
        if args.solver != "default" or args.eta or args.shared_init:
            raise ConfigError(
                "train.rollout_server",
                "the server draws by its own rules; leave out solver, eta and shared_init",
            )
        self.server = connect_servers(
            "train.rollout_server",
            args.rollout_server,
            self.backbone,
            self.data_config,
            self.peft_config is not None,
            args.num_inference_steps,
            self.guidance_scale,
        )

    def begin_round(self, number: int) -> None:
        """Give a server the weights that draw. See `OnPolicyTrainer.begin_round`."""
        if self.remote_sampler is not None:
            self.remote_sampler.push()

    def draw(self, batch: Batch, purpose: str = "rollout") -> tuple[Trajectories, LateScores]:
        """Draw images here or on a server. See `OnPolicyTrainer.draw`."""
        k = self.args.images_per_prompt
        if self.remote_sampler is not None:
            return self.remote_sampler(batch, k, self.reward_function, purpose)
        if purpose == "evaluation":
            return self.evaluation_sampler(batch, k, self.reward_function, purpose)
        return super().draw(batch, purpose)

    @cached_property
    def evaluation_sampler(self) -> PolicySampler:
        """Sampler that draws with the policy, whatever draws the rounds."""
        return self.policy_sampler(self.sampler_config())

    def evaluation_metrics(self, data: DataPipeline) -> dict[str, float]:
        """Average the scores of drawn images. See `Trainer.evaluation_metrics`."""
        if self.remote_sampler is not None:
            self.remote_sampler.push(nullcontext())
        return super().evaluation_metrics(data)

    # Times ----------------------------------------------------------------------------

    def trained_steps(self, steps: int) -> int:
        """Return at how many times an image is trained.

        Args:
            steps (`int`): Steps of the sampler.
        """
        raise NotImplementedError

    def step_order(self, batch: Batch, steps: int, stream: str = "") -> Tensor:
        """Draw the steps of the sampler whose times each group trains at.

        Args:
            batch (`Batch`): g groups.
            steps (`int`): Steps of the sampler.
            stream (`str`, *optional*): End of the name of the random stream.

        Returns:
            `Tensor`: Indices, (g, `trained_steps`).
        """
        raise NotImplementedError

    @property
    def passes_per_batch(self) -> int:
        """One forward pass per trained time."""
        return self.trained_steps(self.args.num_inference_steps)

    @property
    def steps_in_round(self) -> int:
        """Number of optimizer steps on the images of a round."""
        return self.args.steps_per_round * self.args.num_inner_epochs

    @property
    def round_is_over(self) -> bool:
        """Whether the next optimizer step draws a new round.

        After a rollback that is earlier than `steps_in_round` says.
        """
        assert isinstance(self.source, RolloutSource)
        return not self.source.queue

    # Rounds ---------------------------------------------------------------------------

    def repeated(self, batch: Batch, number: int) -> Batch:
        """Train at other noise and other times. See `OnPolicyTrainer.repeated`."""
        order = self.step_order(batch, len(self.rollout.grid), f"-pass-{number}")
        passes = torch.full((len(batch),), number)
        return dataclasses.replace(batch, extra={**batch.extra, "order": order, "pass": passes})

    def kept(self, batch: Batch, trajectories: Trajectories) -> dict[str, Tensor]:
        """Keep the samples and the times that train. See `AdvantageTrainer.kept`."""
        return {
            "samples": trajectories.final,
            "order": self.step_order(batch, len(self.rollout.grid)),
        }

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield the drawn images, noised to one time after the other.

        Each image and time has its own noise, and the images of a group share the time.

        Args:
            batch (`Batch`): What `finish_round` returned.
        """
        grid, device, k = self.rollout.grid, batch.x0.device, batch.extra["samples"].shape[1]
        samples = batch.extra["samples"].to(device)
        condition = {n: value.repeat_interleave(k, 0) for n, value in batch.condition.items()}
        others = {n: v for n, v in batch.extra.items() if n not in ("samples", "order", "pass")}
        repeat = int(batch.extra["pass"][0]) if "pass" in batch.extra else 0
        stream = f"-pass-{repeat}" if repeat else ""
        for number in range(batch.extra["order"].shape[1]):
            draws = [
                torch.randn(samples.shape[1:], generator=generator)
                for generator in batch.generators(f"forward-noise-{number}{stream}")
            ]
            yield dataclasses.replace(
                batch,
                x0=samples,
                noise=torch.stack(draws).to(device),
                times=grid.times[batch.extra["order"][:, number]],
                condition=condition,
                extra=others,
            )

    # Losses ---------------------------------------------------------------------------

    def output_at(self, batch: Batch, denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
        """Run a network on noised images without guidance.

        Args:
            batch (`Batch`): A micro-batch of g groups of k images.
            denoiser (`Denoiser`): The network.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: Its outputs, the noisy latents and their
            times, g k rows each.
        """
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(batch.k)
        noisy = self.schedule.add_noise(x0, noise, times)
        with self.accelerator.autocast():
            output = denoiser.predict(
                noisy, self.schedule.model_times(times).to(noisy.device), batch.condition
            )
        return output.float(), noisy, times

    @torch.no_grad()
    def fixed_output(self, batch: Batch, denoiser: Denoiser) -> Tensor:
        """Run a network that the loss compares the policy with.

        It should run before the policy, while no activations are kept for gradients.

        Args:
            batch (`Batch`): A micro-batch of g groups of k images.
            denoiser (`Denoiser`): The network.

        Returns:
            `Tensor`: Its outputs, (g k, C, h, w).
        """
        return self.output_at(batch, denoiser)[0]


def output_distance(output: Tensor, other: Tensor) -> Tensor:
    """Measure how far two outputs are apart.

    Args:
        output (`Tensor`): Outputs of the policy, (n, C, h, w).
        other (`Tensor`): Those of another network.

    Returns:
        `Tensor`: Mean squared difference, (n,).
    """
    return (output - other).square().flatten(1).mean(1)
