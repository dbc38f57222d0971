"""Draw trajectories with the policy and score them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import Module

from ...errors import UserError
from ...runtime.missing import MaybeImage, Missing, check_any, left_out
from ..batch import Batch
from ..batch_builder import BatchBuilder
from ..denoiser import Denoiser
from ..sharding import is_fsdp
from ..tracking import MetricWindow
from .reward_function import RewardFunction, ScoreAhead
from .rollout import Rollout, Trajectories, sampling_mode

if TYPE_CHECKING:
    from ..data_pipeline import DataPipeline


@dataclass(frozen=True)
class LateScores:
    """Scores of drawn images, which may not be computed yet.

    Attributes:
        ahead (`ScoreAhead`, *optional*): What scores them. None means people vote.
        shape (`tuple[int, int]`): Prompts g and images k of each.
    """

    ahead: ScoreAhead | None
    shape: tuple[int, int]

    def wait(self) -> Tensor:
        """Return the scores, (g, k, m). NaN, (g, k, 1), if people vote."""
        if self.ahead is None:
            return torch.full((*self.shape, 1), float("nan"), dtype=torch.float64)
        return self.ahead.result().unflatten(0, self.shape)


class PolicySampler:
    """Draws trajectories with the policy.

    Args:
        rollout (`Rollout`): How a trajectory is drawn.
        policy (`Denoiser`): The network outside of training, so that processes do not
            wait for each other.
        network: Its dropout is off while it draws.
        builder (`BatchBuilder`): Encodes the empty prompt for guidance.
        accelerator (`Accelerator`): Processes of the run.
    """

    def __init__(
        self,
        rollout: Rollout,
        policy: Denoiser,
        network: Module,
        builder: BatchBuilder,
        accelerator: Accelerator,
    ) -> None:
        self.rollout, self.policy, self.network = rollout, policy, network
        self.builder, self.accelerator = builder, accelerator

    @cached_property
    def pool(self) -> Executor | None:
        """The thread that scores. On a CPU it would save no time."""
        return ThreadPoolExecutor(1) if self.accelerator.device.type == "cuda" else None

    def __call__(
        self,
        batch: Batch,
        k: int,
        reward_function: RewardFunction | None,
        purpose: str,
        stochastic: Tensor | None = None,
    ) -> tuple[Trajectories, LateScores]:
        """Draw k trajectories for every prompt, and score them.

        Prompt dropout is for training. Images are drawn from the prompts by which they
        are scored.

        On a GPU the scores are computed while the next images are sampled, also those
        of the next batch.

        Args:
            batch (`Batch`): g prompts.
            k (`int`): Trajectories per prompt.
            reward_function (`RewardFunction`, *optional*): Scores the images.
            purpose (`str`): Name of the random streams.
            stochastic (`Tensor`, *optional*): Which steps are stochastic, (S,), bool.
                None means all.

        Returns:
            `tuple[Trajectories, LateScores]`: The trajectories, and what waits for
            their scores.
        """
        batch = self.builder.with_every_prompt(batch)
        prompts = [prompt for prompt in batch.prompts for _ in range(k)]
        ahead = None
        if reward_function is not None:
            ahead = ScoreAhead(reward_function, prompts, self.pool)
        with sampling_mode(self.network), self.accelerator.autocast():
            main = self.accelerator.is_main_process
            empty = self.builder.unconditional(batch.condition)
            trajectories = self.rollout(
                self.policy.predict,
                batch,
                k,
                empty,
                purpose=purpose,
                on_images=ahead,
                progress=main,
                stochastic=stochastic,
            )
        return trajectories, LateScores(ahead, (len(batch), k))


class RoundCheck:
    """Reports missing images and scores of a round, once for all batches and processes.

    Args:
        accelerator (`Accelerator`): Processes of the run.
        reward_function (`RewardFunction`, *optional*): Scores the images. None if
            people vote.
        needs_every_score (`bool`, *optional*, defaults to `False`): Whether an image
            without one of its scores cannot be compared.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reward_function: RewardFunction | None,
        needs_every_score: bool = False,
    ) -> None:
        self.accelerator, self.reward_function = accelerator, reward_function
        self.needs_every_score = needs_every_score
        self.pictures: list[Missing | None] = []
        self.prompts: list[str] = []
        self.silent: list[bool] = []

    def add(self, batch: Batch, pictures: Iterable[MaybeImage], scores: Tensor) -> None:
        """Add the images and scores of a batch.

        Args:
            batch (`Batch`): g prompts.
            pictures (`Iterable`): Its images. Only `Missing` ones are stored.
            scores (`Tensor`): Its scores, (g, k, m).
        """
        self.pictures += [image if isinstance(image, Missing) else None for image in pictures]
        if self.reward_function is not None:
            self.prompts += batch.prompts
            missing = torch.isnan(scores[..., : self.reward_function.deciding]).all(1)
            self.silent += (missing.any(1) if self.needs_every_score else missing.all(1)).tolist()

    def finish(self) -> None:
        """Report what is missing. All processes must call this.

        Raises:
            UserError: The whole round of all processes has no image, or no score of a
                deciding scorer.
        """
        pictures = gather_object(self.pictures)
        silent = gather_object(list(zip(self.prompts, self.silent, strict=True)))
        sentence = left_out(pictures, len(pictures), "this round")
        if sentence:
            self.accelerator.print(sentence)
        check_any(pictures, "of this run")
        prompts = [prompt for prompt, is_silent in silent if is_silent]
        if prompts and len(prompts) == len(silent):
            raise UserError(
                f"scorers: {'a scorer' if self.needs_every_score else 'they'} gave no score for "
                f"any image of {len(prompts)} prompts, e.g. {prompts[0][:60]!r}; check with "
                "diffalign score, or draw more prompts per round"
            )
        for prompt in prompts:
            self.accelerator.print(
                f"no score for any image of {prompt[:60]!r}: its images are taken as equal"
            )


def sample_scores(
    data: DataPipeline,
    sample: Callable[[Batch], tuple[Trajectories, Tensor]],
    reward_function: RewardFunction,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Average the scores of images that are drawn for evaluation prompts.

    All processes must call this.

    Args:
        data (`DataPipeline`): The prompts.
        sample (`Callable`): Draws k images for every prompt of a batch, and returns
            their scores (g, k, m) as well.
        reward_function (`RewardFunction`): Names the scores.
        accelerator (`Accelerator`): Averages over the processes.

    Returns:
        `dict[str, float]`: The averages, named `eval/...`.
    """
    window, check = MetricWindow(), RoundCheck(accelerator, reward_function)
    for examples, counts in data.passes(together=is_fsdp(accelerator)):
        batch = data.builder(examples)
        drawn, scores = sample(batch)
        if not counts:
            continue
        check.add(batch, chain.from_iterable(drawn.images), scores)
        names = reward_function.names(scores.shape[-1])
        columns = zip(names, scores.unbind(-1), strict=True)
        window.add({name: column.float().nanmean(1) for name, column in columns})
    check.finish()
    return {f"eval/{name}": value for name, value in window.reduce(accelerator).items()}
