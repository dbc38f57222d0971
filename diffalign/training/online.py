"""Online data for offline methods: pairs or ranked lists drawn by the policy itself, judged, and made anew every so many steps.

Online Diffusion-DPO, RankDPO, MaPO, ...: the dataset gives the prompts; a round of rollouts gives the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.config import OnlineConfig
from ..drawn import Missing, check_any, left_out
from ..exceptions import ConfigError, UserError
from .batch import Batch
from .judge import Judge, ScoreAhead
from .rollout import Rollout, SamplerConfig, Trajectories, sampling_mode
from .rounds import Rounds

if TYPE_CHECKING:
    from .trainer import Trainer


def sample_and_score(
    trainer: Trainer, rollout: Rollout, judge: Judge | None, batch: Batch, k: int, purpose: str
) -> tuple[Trajectories, Tensor]:
    """Trajectories of the policy and their scores (g, k, m), scored while the next are sampled where there is a GPU."""
    prompts = [prompt for prompt in batch.prompts for _ in range(k)]
    ahead = None if judge is None else ScoreAhead(judge, prompts, trainer.accelerator.device.type == "cuda")

    with sampling_mode(trainer.network), trainer.accelerator.autocast():
        main = trainer.accelerator.is_main_process
        empty = trainer.data.builder.unconditional(batch.condition)
        trajectories = rollout(trainer._predict_unprepared, batch, k, empty, purpose=purpose, on_images=ahead, progress=main)
    if ahead is None:
        return trajectories, torch.full((len(batch), k, 1), float("nan"), dtype=torch.float64)
    assert judge is not None
    return trajectories, ahead.result().unflatten(0, (len(batch), k))


class RoundCheck:
    """What a round of own samples lacks: said once for all of its batches, and an error where nothing is left.

    Args:
        trainer: whose round.
        judge: of its images; None where people judge.
    """

    def __init__(self, trainer: Trainer, judge: Judge | None) -> None:
        self.trainer, self.judge = trainer, judge
        self.pictures: list[Any] = []
        self.prompts: list[str] = []
        self.silent: list[bool] = []

    def add(self, batch: Batch, pictures: Iterable[Any], scores: Tensor) -> None:
        """A batch's images (of which only the missing ones are kept) and scores (g, k, m)."""
        self.pictures += [image if isinstance(image, Missing) else None for image in pictures]
        if self.judge is not None:
            self.prompts += batch.prompts
            self.silent += torch.isnan(scores[..., : self.judge.deciding]).all(1).any(1).tolist()

    def finish(self) -> None:
        """Says what is missing.

        Raises:
            UserError: there is no image, or no score of a deciding scorer, in the whole round.
        """
        say = self.trainer.accelerator.print
        sentence = left_out(self.pictures, len(self.pictures), "this round")
        if sentence:
            say(sentence)
        check_any(self.pictures, "of this run")
        if self.silent and all(self.silent):
            raise UserError(
                f"scorers: a scorer gave no score for any image of {len(self.prompts)} prompts, e.g. {self.prompts[0][:60]!r}; check it "
                "with diffalign score"
            )
        for prompt, silent in zip(self.prompts, self.silent, strict=True):
            if silent:
                say(f"no score for any image of {prompt[:60]!r}: its images are taken as equal")


class Online:
    """The rounds of a run with `data.online`.

    Args:
        trainer: set up, its data pipeline reading prompts.
        config: of the section.

    Raises:
        ConfigError: no scorer.
    """

    def __init__(self, trainer: Trainer, config: OnlineConfig) -> None:
        self.trainer, self.config = trainer, config
        scorers = trainer.scorers if trainer.scorers is not None else config.scorers
        if not scorers:
            raise ConfigError("data.online.scorers", "name at least one scorer, or give a rewards section")
        self.judge = Judge(scorers)
        sampler = SamplerConfig(
            config.num_inference_steps, config.guidance_scale, config.eta, config.rollout_batch_size, shared_init=False
        )
        grid = trainer.make_grid(sampler.num_inference_steps, sampler.eta)
        self.rollout = Rollout(trainer.backbone, trainer.process, sampler, "sampling online data", grid=grid)
        self.rounds = Rounds(self._round, config.every * trainer.args.gradient_accumulation_steps)

    def _round(self, number: int, batches: list[Batch]) -> list[Batch]:
        trainer = self.trainer
        check, done = RoundCheck(trainer, self.judge), []
        for batch in batches:
            found, scores = sample_and_score(trainer, self.rollout, self.judge, batch, self.config.k, "online")
            check.add(batch, chain.from_iterable(found.images), scores)
            done.append(self._judged(batch, found.final, scores))
        check.finish()
        return done

    def _judged(self, batch: Batch, latents: Tensor, scores: Tensor) -> Batch:
        """The groups that the method trains on: pairs, lists, or the best image."""
        combined = self.judge.combined(scores)
        if self.trainer.inverted:
            combined = -combined
        low = torch.where(torch.isnan(combined), torch.full_like(combined, math.inf), combined)
        high = torch.where(torch.isnan(combined), torch.full_like(combined, -math.inf), combined)
        best, worst = high.argmax(1), low.argmin(1)
        kind = self.trainer.data_kind
        if kind == "ranked":
            chosen = torch.arange(latents.shape[1]).expand(len(batch), -1)
        else:
            chosen = torch.stack([best, worst], 1)[:, : 2 if kind == "pair" else 1]
        rows = torch.arange(len(batch))[:, None]
        decided = (high.amax(1) > low.amin(1)).float()
        scored = torch.isfinite(combined).any(1).float()
        k = chosen.shape[1]
        device = batch.x0.device
        if hasattr(self.trainer, "window"):
            seen = {
                f"online/{n}": c.float().nanmean(1)
                for n, c in zip(self.judge.names(scores.shape[-1]), scores.unbind(-1), strict=True)
            }
            self.trainer.window.add({**seen, "online/ties": 1 - decided})
        return dataclasses.replace(
            batch,
            x0=latents[rows, chosen].to(device),
            noise=self._noise(batch, k),
            condition={name: value.repeat_interleave(k, 0) for name, value in batch.condition.items()},
            scores=combined.float().to(device) if kind == "ranked" else None,
            # One image has nothing to be equal to.
            weights=batch.weights * (scored if kind == "single" else decided).to(device),
        )

    def _noise(self, batch: Batch, k: int) -> Tensor:
        if self.trainer.args.shared_noise:
            return batch.noise.expand(-1, k, *batch.noise.shape[2:])
        draws = [torch.randn((k, *batch.noise.shape[2:]), generator=g) for g in batch.generators("online-noise")]
        return torch.stack(draws).to(batch.noise.device)
