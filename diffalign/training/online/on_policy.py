"""The base of methods that sample while they learn.

They draw rounds of images, which scorers or people judge.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from ...config.ranges import BatchSize, Count, NotNegative, Steps
from ...config.section import config_section
from ...errors import ConfigError, UserError
from ..batch import Batch
from ..config import TrainingConfig
from ..data_pipeline import DataPipeline
from ..reference import Reference, SnapshotReference
from ..trainer import Trainer
from . import feedback
from .policy_sampler import LateScores, PolicySampler, RoundCheck, sample_scores
from .reward_function import RewardFunction, preferences
from .rollout import Grid, Rollout, SamplerConfig, Trajectories
from .source import RolloutSource

DRAWN_PROMPTS_TRAIN = (
    "this method trains at the steps that drew its images, which had the prompts; set it to 0"
)
"""Why methods that train through their sampler have no prompt dropout."""


@config_section
class OnPolicyConfig(TrainingConfig):
    """Options of methods that sample while they learn."""

    images_per_prompt: BatchSize = 2
    """Images drawn for each prompt; all their pairs are compared. Source: official
    reward script, 2; its human-feedback script 7."""
    num_inference_steps: Steps = 20
    """Steps of the sampler, all kept. Source: official code, 20."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, in sampling and in training alike; 1 or below for none.
    Source: official code, 5.0."""
    eta: NotNegative[float] = 1.0
    """Stochasticity of the sampler's steps: DDIM's eta, or the noise level of the flow
    SDE (0.7 is usual there). Source: official code, 1.0."""
    shared_init: bool = True
    """One initial noise for all images of a prompt. Source: official code."""
    rollout_batch_size: BatchSize = 8
    """Images sampled at once. Halved where they do not fit into the GPU's memory, which
    changes no image. Source: ours."""
    steps_per_round: Count = 1
    """Optimizer steps whose samples are drawn at once, by the policy at the beginning
    of the round. Source: ours: 1 samples for every optimizer step."""
    num_inner_epochs: Count = 1
    """Passes over the samples of a round. Source: official code, 1."""
    scorers: list[str] = field(default_factory=list)
    """Names of the scorers that judge; a run file's `rewards:` section, or the
    trainer's `scorers`, says more. Source: ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute_ref_errors:
            raise ConfigError(
                "precompute_ref_errors",
                "there are no fixed images to compute them for; set it to false",
            )

    @property
    def feedback_of_people(self) -> bool:
        """Whether people judge, and not scorers."""
        return False

    @property
    def iterates_reference(self) -> bool:
        """Whether the reference is the policy at the beginning of each round."""
        return False

    @property
    def compared_by(self) -> str:
        """How the scores of two images are compared, see `COMPARE` of
        `reward_function.py`."""
        return "combined"

    @property
    def needs_every_score(self) -> bool:
        """Whether an image without one of its scores cannot be compared."""
        return self.compared_by != "combined"

    @property
    def reduction_of_log_probs(self) -> str:
        """`mean` or `sum` over the elements of a latent."""
        return "mean"


class OnPolicyTrainer(Trainer):
    """Base class of methods that draw trajectories, judge them and train on them."""

    data_kind = "prompt"
    can_be_online = False  # it samples by itself
    args: OnPolicyConfig
    reward_function: RewardFunction | None
    """Scores the images. None if people vote."""

    # Building -------------------------------------------------------------------------

    def sampler_config(self) -> SamplerConfig:
        """Return the settings of the run's sampler."""
        args = self.args
        return SamplerConfig(
            args.num_inference_steps,
            self.guidance_scale,
            args.eta,
            args.rollout_batch_size,
            args.shared_init,
            args.reduction_of_log_probs,
        )

    def sampling_grid(self) -> Grid:
        """Return the times of the sampler. Works before anything is loaded."""
        return self.make_grid(self.args.num_inference_steps, self.args.eta)

    def validate(self) -> None:
        """Build the reward function, so that a run without a usable scorer ends early.

        Raises:
            ConfigError: There is no scorer, or one cannot be used.
        """
        self.reward_function = None
        if self.args.feedback_of_people:
            return
        scorers = self.scorers if self.scorers is not None else self.args.scorers
        if not scorers:
            raise ConfigError(
                "train.scorers",
                f"{self._name} needs a judge: name scorers, give a rewards section, or set "
                "train.feedback: people",
            )
        self.reward_function = RewardFunction(scorers)

    def training_reward(self) -> RewardFunction | None:
        """Return the judge, None if people vote."""
        return self.reward_function

    @cached_property
    def sampler(self) -> PolicySampler:
        """Sampler that draws with the policy."""
        return self.policy_sampler(self.sampler_config())

    @property
    def rollout(self) -> Rollout:
        """How the sampler draws a trajectory."""
        return self.sampler.rollout

    def build_source(self) -> RolloutSource:
        """Build a source that draws whole optimizer steps per round."""
        batches = self.args.steps_per_round * self.args.gradient_accumulation_steps
        return RolloutSource(self._round, batches)

    def build_reference(self) -> Reference | None:
        """Build the reference: the starting weights, or those of each round's start."""
        if self.args.iterates_reference:
            return SnapshotReference(self.network)
        return super().build_reference()

    @property
    def passes_per_group(self) -> int:
        """Every round of prompts trains `num_inner_epochs` times."""
        return self.args.num_inner_epochs

    # Rounds ---------------------------------------------------------------------------

    def _round(self, number: int, batches: list[Batch]) -> list[Batch]:
        """Draw and judge one round.

        With `reference: iterated` the current policy becomes the reference.
        """
        if self.args.iterates_reference:
            assert isinstance(self.reference_model, SnapshotReference)
            self.reference_model.take()
        self.begin_round(number)
        judged = (
            self._asked(number, batches)
            if self.reward_function is None
            else self.score_round(self.reward_function, batches)
        )
        return [
            self.repeated(batch, number) if number else batch
            for number in range(self.args.num_inner_epochs)
            for batch in judged
        ]

    def repeated(self, batch: Batch, number: int) -> Batch:
        """Return a batch of the round for another pass. The default changes nothing.

        Args:
            batch (`Batch`): A batch of the round.
            number (`int`): Number of the pass, from 1.
        """
        return batch

    def begin_round(self, number: int) -> None:
        """Run before a round is drawn. The default does nothing.

        Args:
            number (`int`): Number of the round, from 0.
        """

    def score_round(self, reward_function: RewardFunction, batches: list[Batch]) -> list[Batch]:
        """Draw a round of images and score them.

        Args:
            reward_function (`RewardFunction`): Scores the images.
            batches (`list[Batch]`): Batches of prompts.

        Returns:
            `list[Batch]`: Batches to train on.
        """
        needs_every_score = self.args.needs_every_score
        check, drawn = RoundCheck(self.accelerator, reward_function, needs_every_score), []
        # Everything is drawn before the first scores are waited for.
        for batch, (trajectories, late) in [(batch, self.draw(batch)) for batch in batches]:
            scores = late.wait()
            check.add(batch, chain.from_iterable(trajectories.images), scores)
            drawn.append((batch, dataclasses.replace(trajectories, images=[]), scores))
        check.finish()
        return self.finish_round(reward_function, drawn)

    def finish_round(
        self, reward_function: RewardFunction, drawn: list[tuple[Batch, Trajectories, Tensor]]
    ) -> list[Batch]:
        """Build the batches of a round. The default compares the images of each prompt.

        Args:
            reward_function (`RewardFunction`): Combines the scores.
            drawn (`list`): Prompts, trajectories and scores (g, k, m) of each batch.

        Returns:
            `list[Batch]`: Batches to train on.
        """
        return [
            self.finish(
                batch,
                trajectories,
                preferences(reward_function, scores, self.args.compared_by),
                scores,
            )
            for batch, trajectories, scores in drawn
        ]

    def _asked(self, number: int, batches: list[Batch]) -> list[Batch]:
        """Draw a round of images and read people's votes on them.

        Raises:
            VotesNeeded: There are no votes yet.
            UserError: The votes do not fit the round.
        """
        folder, k = feedback.round_folder(self.output_dir, number), self.args.images_per_prompt
        if self.is_dry:  # writes nothing, so every vote is a tie
            drawn_dry = [self.sample(batch) for batch in batches]
            return [
                self.finish(b, t, torch.zeros(len(b), k, k), s)
                for b, (t, s) in zip(batches, drawn_dry, strict=True)
            ]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if not (folder / feedback.MANIFEST).is_file():
            drawn, check = [], RoundCheck(self.accelerator, None)
            for batch in batches:
                trajectories, scores = self.sample(batch)
                check.add(batch, chain.from_iterable(trajectories.images), scores)
                drawn.append(trajectories)
            check.finish()
            feedback.write_round(
                folder, batches, drawn, rank, world, self.accelerator.wait_for_everyone
            )
        votes = feedback.shared_votes(folder, self.accelerator.is_main_process)
        if votes is None:
            raise feedback.VotesNeeded(folder)
        self.accelerator.print(f"round {number}: {votes.summary()}")
        done = []
        for index, batch in enumerate(feedback.read_round(folder, rank, self.accelerator.device)):
            trajectories = Trajectories(batch.extra["states"], batch.extra["log_probs"], [])
            preference = feedback.preference_matrix(votes, batch, index, rank, k)
            nobody = torch.full((len(batch), k, 1), float("nan"))
            done.append(self.finish(batch, trajectories, preference, nobody))
        return done

    def finish(
        self, batch: Batch, trajectories: Trajectories, preference: Tensor, scores: Tensor
    ) -> Batch:
        """Build the batch that is trained on.

        Args:
            batch (`Batch`): g prompts, with one condition each.
            trajectories (`Trajectories`): k trajectories per prompt.
            preference (`Tensor`): Preferences in [-1, 1], (g, k, k).
            scores (`Tensor`): Scores, (g, k, m). NaN if people voted.

        Returns:
            `Batch`: The batch with everything that `micro_batches` needs.
        """
        raise NotImplementedError

    def draw(self, batch: Batch, purpose: str = "rollout") -> tuple[Trajectories, LateScores]:
        """Draw trajectories with the policy, and begin to score them.

        Args:
            batch (`Batch`): g prompts.
            purpose (`str`, *optional*, defaults to `"rollout"`): Name of the random
                streams.

        Returns:
            `tuple[Trajectories, LateScores]`: k trajectories per prompt, and what waits
            for their scores.
        """
        k, steps = self.args.images_per_prompt, self.stochastic_steps(purpose)
        return self.sampler(batch, k, self.reward_function, purpose, steps)

    def sample(self, batch: Batch, purpose: str = "rollout") -> tuple[Trajectories, Tensor]:
        """Draw trajectories with the policy and score them. Arguments as `draw`.

        Returns:
            `tuple[Trajectories, Tensor]`: k trajectories per prompt, and their scores
            (g, k, m).
        """
        trajectories, late = self.draw(batch, purpose)
        return trajectories, late.wait()

    def stochastic_steps(self, purpose: str) -> Tensor | None:
        """Return which steps of the sampler are stochastic, (S,), bool.

        Args:
            purpose (`str`): Name of the random streams.

        Returns:
            `Tensor`, *optional*: None means all. That is the default.
        """
        return None

    def judged(self, batch: Batch) -> list[tuple[str, Tensor]]:
        """Return the name and the scores (g, k) of each scorer. Empty if people vote.

        Args:
            batch (`Batch`): A micro-batch.
        """
        columns = batch.extra["scores"].unbind(-1)
        return (
            []
            if self.reward_function is None
            else list(zip(self.reward_function.names(len(columns)), columns, strict=True))
        )

    # Evaluation -----------------------------------------------------------------------

    def evaluation_metrics(self, data: DataPipeline) -> dict[str, float]:
        """Average the scores of images that the policy draws for evaluation prompts.

        The initial noise is the same in every evaluation.

        Args:
            data (`DataPipeline`): The evaluation prompts.

        Returns:
            `dict[str, float]`: The averages, named `eval/...`.

        Raises:
            UserError: People vote in this run, so there is no scorer.
        """
        if self.reward_function is None:
            raise UserError(
                "train.feedback: people cannot judge an evaluation; draw images with "
                "diffalign sample"
            )

        def sample(batch: Batch) -> tuple[Trajectories, Tensor]:
            return self.sample(batch, purpose="evaluation")

        return sample_scores(data, sample, self.reward_function, self.accelerator)
