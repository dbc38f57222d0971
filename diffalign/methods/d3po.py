"""D3PO: Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", arXiv 2311.13231, eq. 14.

    rho_i = clamp(exp(log p(x_prev | x_t, c) - log p_ref(x_prev | x_t, c)), 1 - eps, 1 + eps)     per step and image
    loss  = -log sigmoid(beta h (log rho_0 - log rho_1)),   h = +1, -1 or 0: which image is preferred

Trajectories are sampled by the policy with stochastic steps (DDIM with eta; the flow SDE for flow models, our extension), all
images of a prompt from one initial noise. The preference of the final images, from scorers or from people, goes to every step. The
log-probabilities are means over the elements of a latent, as in the official code; the paper's equation has no clamp. Under mean,
beta 0.1 and eps 0.1 the loss lies in [0.6832, 0.7032]: a curve that looks flat at 0.693 is normal. Guidance is inside sampling and
inside the training forward. Unlike the official code: every trained step runs through the prepared module (its gradients are
synchronised), the step at t = 0 is left out instead of being NaN, and what the reference is, is stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import ConfigError, UserError
from ..training.batch import Batch
from ..training.denoiser import Denoiser
from ..training.online.judge import COMPARE
from ..training.online.on_policy import OnPolicyConfig, OnPolicyTrainer
from ..training.online.rollout import Grid, Trajectories, guide, step_log_prob

REFERENCES = ("fixed", "iterated")
FEEDBACK = ("scorers", "people")


@dataclass
class D3POConfig(OnPolicyConfig):
    """`train:` for `method: d3po`."""

    beta: float = 0.1
    """Strength of the pull to the reference, on log-probabilities."""
    clip_range: float = 0.1
    """eps: the ratio of a step is kept within [1 - eps, 1 + eps]; beyond, it gives no gradient."""
    reduce: str = "mean"
    """mean (official code) | sum over the elements of a latent; sum wants a beta smaller by their number."""
    timestep_fraction: float = 1.0
    """Share of a trajectory's steps that is trained, drawn anew per row."""
    compare: str = "pareto"
    """pareto: better in every score | combined: by the panel's combined score."""
    reference: str = "fixed"
    """fixed: the starting weights | iterated: the policy at the beginning of each round, as in the paper's human-feedback runs."""
    feedback: str = "scorers"
    """scorers | people: images are written out and the run waits for votes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("reduce", ("mean", "sum")),
            ("compare", COMPARE),
            ("reference", REFERENCES),
            ("feedback", FEEDBACK),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    name, f"expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        self._check("beta", lambda v: v > 0, "> 0")
        self._check("clip_range", lambda v: 0 < v < 1, "in (0, 1)")
        self._check("timestep_fraction", lambda v: 0 < v <= 1, "in (0, 1]")
        if self.eta == 0:
            raise ConfigError(
                "eta",
                "0 makes the sampler deterministic, whose steps have no probability; give eta > 0 (official 1)",
            )
        if self.images_per_prompt < 2:
            raise ConfigError(
                "images_per_prompt",
                f"expected int >= 2, got {self.images_per_prompt}: one image has no rival",
            )

    @property
    def feedback_of_people(self) -> bool:
        return self.feedback == "people"

    @property
    def iterates_reference(self) -> bool:
        return self.reference == "iterated"

    @property
    def compared_by(self) -> str:
        return self.compare

    @property
    def reduction_of_log_probs(self) -> str:
        return self.reduce


def d3po_loss(
    log_ratios: Tensor, preference: Tensor, *, beta: float = 0.1, clip_range: float = 0.1
) -> Tensor:
    """Loss per pair and step, (g,).

    Args:
        log_ratios (`Tensor`): (g, 2), log p - log p_ref of the stored next state, per image.
        preference (`Tensor`): (g,) in [-1, 1]: +1 if image 0 is preferred, -1 if image 1, 0 for a tie (loss log 2, no gradient);
            averages of several people lie between.
        beta, clip_range (`float`): see `D3POConfig`.
    """
    # exp of an unbounded sum over a latent would overflow before the clamp.
    ratio = torch.exp(log_ratios.clamp(-20, 20)).clamp(1 - clip_range, 1 + clip_range)
    margin = ratio[:, 0].log() - ratio[:, 1].log()
    return softplus(-beta * preference.to(margin) * margin)


class D3POTrainer(OnPolicyTrainer):
    """Samples, has the images judged, and trains on the steps that led to them."""

    method = "d3po"
    _name = "D3PO"
    _tag_names = ("d3po",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "id": "2311.13231",
        "citation": """@inproceedings{yang2024d3po,
  title     = {Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model},
  author    = {Yang, Kai and Tao, Jian and Lyu, Jiafei and Ge, Chunjiang and Chen, Jiaxin and Li, Qimai and Shen, Weihan and Zhu, Xiaolong and Li, Xiu},
  booktitle = {CVPR},
  year      = {2024}
}""",
    }
    _sources: ClassVar[dict[str, str]] = {
        **OnPolicyTrainer._sources,
        "beta": "official code, 0.1",
        "clip_range": "official code, 0.1 (0.2 in its first version); the paper's eq. 14 has none",
        "reduce": "official code",
        "timestep_fraction": "official code, all steps",
        "compare": "official reward script",
        "reference": "official reward script; the human-feedback script iterates",
        "feedback": "ours",
    }
    _not_public: ClassVar[str] = (
        "How many annotators judged each pair, and the images of the paper's human studies."
    )
    config_class = D3POConfig
    args: D3POConfig

    def validate(self) -> None:
        """Refuse a sampler without a stochastic step."""
        super().validate()
        if not len(self.usable_steps(self.sampling_grid())):
            raise UserError("train.eta: no step of this sampler is stochastic; give eta > 0")

    @cached_property
    def trained_steps(self) -> int:
        """How many steps of a trajectory are trained."""
        usable = len(self.usable_steps(self.sampling_grid()))
        return max(1, math.ceil(self.args.timestep_fraction * usable))

    @property
    def passes_per_batch(self) -> int:
        """One pass per trained step."""
        return self.trained_steps

    def usable_steps(self, grid: Grid) -> Tensor:
        """Which steps of the sampler, (u,), can be trained on: those with a density."""
        return grid.trainable.nonzero()[:, 0]

    def finish(
        self, batch: Batch, trajectories: Trajectories, preference: Tensor, scores: Tensor
    ) -> Batch:
        """Keeps what the steps are trained on: states, recorded log-probabilities, preferences, the order of the steps."""
        usable = self.usable_steps(self.rollout.grid)
        orders = [
            usable[torch.randperm(len(usable), generator=g)] for g in batch.generators("step-order")
        ]
        extra = {
            "states": trajectories.states,
            "log_probs": trajectories.log_probs,
            "preference": preference.float(),
            "order": torch.stack(orders)[:, : self.trained_steps],
            "scores": scores.float(),
        }
        return dataclasses.replace(batch, extra=extra)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """One step of every trajectory at a time; a row's own order, the same for its images."""
        grid = self.rollout.grid
        device, rows = batch.x0.device, torch.arange(len(batch))
        for number in range(self.trained_steps):
            step = batch.extra["order"][:, number]
            yield dataclasses.replace(
                batch,
                times=grid.times[step],
                noisy=batch.extra["states"][rows, :, step].to(device),
                x0=batch.extra["states"][rows, :, step + 1].to(device),
                extra={
                    "next_times": grid.next_times[step],
                    "recorded": batch.extra["log_probs"][rows, :, step],
                    "preference": batch.extra["preference"],
                    "scores": batch.extra["scores"],
                },
            )

    def step_log_probs(self, batch: Batch, denoiser: Denoiser) -> Tensor:
        """(g, k) log-probabilities of the stored next states; one state may have several of them."""
        assert batch.noisy is not None
        (g, k), states = batch.x0.shape[:2], batch.noisy.shape[1]

        def rows(value: Tensor, count: int) -> Tensor:
            return value.repeat_interleave(count, 0)

        condition = {name: rows(value, states) for name, value in batch.condition.items()}
        empty = {
            name: rows(value, states)
            for name, value in self.data_pipeline.builder.unconditional(batch.condition).items()
        }
        sample, times = batch.noisy.flatten(0, 1), batch.times
        with self.accelerator.autocast():
            output = guide(
                denoiser.predict,
                self.process,
                sample,
                rows(times, states),
                condition,
                empty,
                self.args.guidance_scale,
            )
        output, sample = rows(output, k // states), rows(sample, k // states)
        found = step_log_prob(
            self.process,
            output,
            sample,
            batch.x0.flatten(0, 1),
            rows(times, k),
            rows(batch.extra["next_times"], k),
            self.args.eta,
            self.args.reduce,
        )
        return found.unflatten(0, (g, k))

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = self.step_log_probs(batch, self.policy)
        assert self.reference is not None
        with torch.no_grad():
            reference = self.step_log_probs(batch, self.reference)
        log_ratios = policy - reference
        first, second = torch.triu_indices(log_ratios.shape[1], log_ratios.shape[1], 1)
        pairs = torch.stack([log_ratios[:, first], log_ratios[:, second]], dim=-1)  # (g, pairs, 2)
        preference = batch.extra["preference"].to(pairs.device)[:, first, second]
        args = self.args
        loss = d3po_loss(
            pairs.flatten(0, 1), preference.flatten(), beta=args.beta, clip_range=args.clip_range
        )
        return loss.unflatten(0, pairs.shape[:2]).mean(1), self._metrics(
            batch, policy, pairs, preference
        )

    def judged(self, batch: Batch) -> list[tuple[str, Tensor]]:
        """(scorer, its scores (g, k)) of the batch's images; none under people's votes."""
        columns = batch.extra["scores"].unbind(-1)
        return (
            []
            if self.judge is None
            else list(zip(self.judge.names(len(columns)), columns, strict=True))
        )

    @torch.no_grad()
    def _metrics(
        self, batch: Batch, policy: Tensor, pairs: Tensor, preference: Tensor
    ) -> dict[str, Tensor]:
        margin = preference * (pairs[..., 0] - pairs[..., 1])
        decided = preference != 0
        missing = torch.full_like(margin[:, 0], math.nan)

        def over_decided(value: Tensor) -> Tensor:
            count = decided.sum(1)
            return torch.where(count > 0, (value * decided).sum(1) / count.clamp(min=1), missing)

        right = (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
        clipped = (pairs.abs() > math.log1p(self.args.clip_range)).any(-1).to(margin)
        recorded = batch.extra["recorded"].to(policy)
        return {
            "rewards/accuracies": over_decided(right),
            "rewards/margins": over_decided(self.args.beta * margin),
            "policy/clipped": over_decided(clipped),
            "policy/log_ratio": pairs.abs().mean((1, 2)),
            "policy/since_sampling": (policy - recorded).abs().mean(1),
            "judge/ties": 1 - decided.float().mean(1),
            **{f"judge/{name}": column.nanmean(1) for name, column in self.judged(batch)},
        }
