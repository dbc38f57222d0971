"""SPO: Liang et al. 2024, arXiv 2406.04314, D3PO on the candidates of single steps.

    x_{t-1}^1 ... x_{t-1}^n ~ p(. | x_t, c)       a random one of them is the next state
    s_i  = score of the clean estimate x0(x_{t-1}^i), or of the final image
    w, l = best and worst candidate
    train if softmax(s_w, s_l)_w - softmax(s_w, s_l)_l > threshold
    loss = -log sigmoid(beta (log rho_w - log rho_l)),  rho as in D3PO

The candidates of a step start from the same state, so a step is compared for its own
effect and not for that of its trajectory. A step whose candidates are too alike is a
tie with loss log 2 and no gradient. Early steps have poor estimates and are sampled
without candidates (`first_step`).

The official code scores clean estimates with a CLIP that was trained for it and knows
the timestep. Any scorer or function takes its place here. The scores of that model are
logits, so scores are multiplied by `score_scale` before the softmax. In the official
code the last two steps share one comparison, three with SDXL. Here every step has its
own.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..config.ranges import Decay, NotNegative, Positive, Range, count, positive
from ..config.section import config_section
from ..errors import ConfigError
from ..runtime.missing import NOT_FINITE, MaybeImage, Missing
from ..runtime.progress import Bar, progress_bar
from ..training.batch import Batch
from ..training.online.policy_sampler import RoundCheck
from ..training.online.reward_function import RewardFunction
from ..training.online.rollout import Grid, gaussian_log_prob, guide, sampling_mode, transition
from ..training.online.trajectory_trainer import TrajectoryConfig
from .d3po import D3POTrainer

_NO_CANDIDATES = "float > 0: candidates of a deterministic sampler are all the same"


@config_section
class SPOConfig(TrajectoryConfig):
    """`train:` for `method: spo`.

    Example:
        ```python
        from diffalign import SPOConfig

        args = SPOConfig(output_dir="runs/spo", images_per_prompt=2, threshold=0.4)
        assert args.first_step < args.num_inference_steps
        ```
    """

    images_per_prompt: Annotated[int, count(2, 65_536, "int >= 2: candidates are compared")] = 4
    """Candidates for every step, and images drawn for each prompt in an evaluation.
    Source: official code, 4 (2 for SDXL)."""
    eta: Annotated[float, dataclasses.replace(positive, words=_NO_CANDIDATES)] = 1.0
    beta: Positive[float] = 10.0
    """Strength of the pull to the reference, on log-probabilities. Source: official
    code, 10."""
    clip_range: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 0.1
    """eps: the ratio of a step is kept within [1 - eps, 1 + eps]; beyond, it gives no
    gradient. Source: official code, 0.1."""
    first_step: NotNegative[int] = 4
    """Steps that are sampled without candidates, counted from the noisiest. Source:
    official code, 4 of 20."""
    threshold: Decay = 0.3
    """How much better the best candidate must be than the worst, as a difference of
    softmax probabilities, in [0, 1). Source: official code, 0.3 (0.4 for SDXL)."""
    score_scale: Positive[float] = 1.0
    """Factor of the scores before the softmax, which turns them into logits. Source:
    ours; 1 for a model whose scores are logits, as the official one."""
    timestep_fraction: Annotated[float, Range(0.0, 1.0, above=True)] = 1.0
    """Share of the compared steps that is trained, drawn anew per row, those with a
    decided pair first. Source: official code, all steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_step >= self.num_inference_steps:
            raise ConfigError(
                "first_step", f"expected int in [0, num_inference_steps), got {self.first_step}"
            )


def best_and_worst(scores: Tensor, threshold: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Find the best and the worst candidate of every group.

    Args:
        scores (`Tensor`): (g, n), higher is better. NaN is missing and never chosen.
        threshold (`float`): Least value of softmax(best, worst)[0] - softmax(best,
            worst)[1], which is tanh(scale (best - worst) / 2).
        scale (`float`, *optional*, defaults to `1.0`): Factor of the scores.

    Returns:
        `tuple[Tensor, Tensor]`: Indices of best and worst, (g, 2), and whether they
        differ enough, (g,).
    """
    known = ~torch.isnan(scores)
    best = torch.where(known, scores, torch.full_like(scores, -torch.inf)).argmax(1)
    worst = torch.where(known, scores, torch.full_like(scores, torch.inf)).argmin(1)
    pair = torch.stack([best, worst], 1)
    gap = scores.gather(1, pair)
    # A missing score makes the gap NaN, which exceeds no threshold.
    return pair, torch.tanh(scale * (gap[:, 0] - gap[:, 1]) / 2) > threshold


def nearest_usable(drawn: Tensor, usable: Tensor) -> Tensor:
    """Replace a drawn candidate that cannot be used by the next one that can.

    Args:
        drawn (`Tensor`): Index of the drawn candidate, (g,).
        usable (`Tensor`): Which candidates can be used, (g, n), bool.

    Returns:
        `Tensor`: Indices, (g,). The drawn one if no candidate can be used.
    """
    n = usable.shape[1]
    after = (drawn[:, None] + torch.arange(n, device=drawn.device)) % n
    return after.gather(1, usable.gather(1, after).int().argmax(1, keepdim=True))[:, 0]


class SPOTrainer(D3POTrainer):
    """Trains every sampler step on its best candidate against its worst.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import SPOConfig, SPOTrainer

        args = SPOConfig(
            output_dir="runs/spo", max_steps=2, num_inference_steps=5, first_step=1
        )
        trainer = SPOTrainer(
            model="shapes",
            args=args,
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers=["shapes"],
        )
        trainer.train()
        ```
    """

    method = "spo"
    _name = "SPO"
    _tag_names = ("spo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Step-aware Preference Optimization: Aligning Preference with Denoising "
        "Performance at Each Step",
        "id": "2406.04314",
        "citation": """@article{liang2024spo,
  title   = {Step-aware Preference Optimization: Aligning Preference with Denoising
             Performance at Each Step},
  author  = {Liang, Zhanhao and Yuan, Yuhui and Gu, Shuyang and Chen, Bohan and
             Hang, Tiankai and Li, Ji and Zheng, Liang},
  journal = {arXiv preprint arXiv:2406.04314},
  year    = {2024}
}""",
    }
    _not_public: ClassVar[str] = ""
    config_class = SPOConfig  # type: ignore[assignment]
    args: SPOConfig  # type: ignore[assignment]

    def usable_steps(self, grid: Grid) -> Tensor:
        """Return the indices of the steps that have candidates, (u,).

        Args:
            grid (`Grid`): Times of the sampler.
        """
        steps = super().usable_steps(grid)
        return steps[steps >= self.args.first_step]

    def score_round(self, reward_function: RewardFunction, batches: list[Batch]) -> list[Batch]:
        """Sample a round step by step, and score the candidates of each step.

        Args:
            reward_function (`RewardFunction`): Scores images.
            batches (`list[Batch]`): Batches of prompts.

        Returns:
            `list[Batch]`: Batches to train on.
        """
        size = max(1, self.args.rollout_batch_size // self.args.images_per_prompt)
        total = sum(map(len, batches)) * len(self.rollout.grid)
        done, check = [], RoundCheck(self.accelerator, reward_function)
        main = self.accelerator.is_main_process
        with progress_bar(
            total=total, desc="sampling", unit="step", disable=not main, leave=False
        ) as bar:
            for batch in batches:
                rows = [
                    range(first, min(first + size, len(batch)))
                    for first in range(0, len(batch), size)
                ]
                pictures: list[MaybeImage] = []
                with torch.no_grad(), sampling_mode(self.network), self.accelerator.autocast():
                    parts = [
                        self._branch(reward_function, batch, part, bar, pictures) for part in rows
                    ]
                extra = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                check.add(batch, pictures, extra["scores"].double())
                done.append(
                    dataclasses.replace(
                        batch, extra={**extra, "order": self._order(batch, extra["decided"])}
                    )
                )
        check.finish()
        return done

    def _order(self, batch: Batch, decided: Tensor) -> Tensor:
        """Return each group's steps to train, at random but decided pairs first.

        The numbers, (g, trained steps), count the usable steps.
        """
        orders = []
        for is_decided, generator in zip(decided, batch.generators("step-order"), strict=True):
            order = torch.randperm(len(is_decided), generator=generator)
            orders.append(
                order[torch.argsort(is_decided[order].int(), descending=True, stable=True)]
            )
        return torch.stack(orders)[:, : self.trained_steps]

    def _branch(
        self,
        reward_function: RewardFunction,
        batch: Batch,
        rows: range,
        bar: Bar,
        pictures: list[MaybeImage],
    ) -> dict[str, Tensor]:
        """Sample some rows of a batch, with candidates from `first_step` on.

        A candidate that is not finite has no score and is not the next state. It is
        stored as zeros, in undecided pairs.

        Args:
            reward_function (`RewardFunction`): Scores images.
            batch (`Batch`): Prompts.
            rows (`range`): Rows of the batch.
            bar: Progress bar.
            pictures (`list`): Receives the images of the last candidates, some
                `Missing`.

        Returns:
            `dict[str, Tensor]`: On the CPU, for g rows, u usable steps and n
            candidates:

            - `states`: (g, u, C, h, w).
            - `pairs`: Best and worst candidate, (g, u, 2, C, h, w).
            - `log_probs`: Of best and worst, (g, u, 2).
            - `decided`: Whether the pair is trained, (g, u).
            - `scores`: Of the last candidates, (g, n, m).
        """
        args, grid, schedule, device = self.args, self.rollout.grid, self.schedule, batch.x0.device
        n, g, shape = args.images_per_prompt, len(rows), batch.x0.shape[2:]
        index = torch.tensor(list(rows), device=device)
        condition_of_rows = {name: value[index] for name, value in batch.condition.items()}
        empty = self.data_pipeline.builder.unconditional(condition_of_rows)
        prompts = [batch.prompts[row] for row in rows for _ in range(n)]
        starts, draws = (
            batch.generators(purpose)[rows.start : rows.stop] for purpose in ("spo-start", "spo")
        )
        usable = set(self.usable_steps(grid).tolist())
        state = torch.stack([torch.randn(shape, generator=generator) for generator in starts]).to(
            device
        )
        # Candidates of the last step, (g, n, ...), and whether they are finite. Without
        # candidates it is whether the state is.
        candidates: Tensor | None = None
        finite = torch.ones(g, 1, dtype=torch.bool, device=device)
        # (state, mean, std) of the last step, if its candidates are compared.
        origin: tuple[Tensor, Tensor, Tensor] | None = None
        records: dict[str, list[Tensor]] = {
            "states": [],
            "pairs": [],
            "log_probs": [],
            "decided": [],
        }

        def compare(images: list[MaybeImage]) -> Tensor:
            assert origin is not None and candidates is not None
            scores = reward_function(images, prompts).unflatten(0, (g, n))
            pair, decided = best_and_worst(
                reward_function.combined(scores), args.threshold, args.score_scale
            )
            places = torch.arange(g)[:, None]
            both, known = candidates[places, pair], finite[places, pair]
            before, mean, std = origin
            log_probs = torch.stack(
                [gaussian_log_prob(both[:, i], mean, std, args.reduce) for i in range(2)], 1
            ).float()
            log_probs = torch.where(known, log_probs, torch.zeros_like(log_probs))
            for name, value in zip(
                records, (before, both, log_probs, decided & known.all(1).cpu()), strict=True
            ):
                records[name].append(value.cpu())
            return scores

        def draw(latents: Tensor) -> list[MaybeImage]:
            images = self.backbone.decode_latents(latents)
            return [
                image if good else Missing(NOT_FINITE)
                for image, good in zip(images, finite.flatten().tolist(), strict=True)
            ]

        for step, (t, after) in enumerate(zip(grid.times, grid.next_times, strict=True)):
            flat = state if candidates is None else candidates.flatten(0, 1)
            k = len(flat) // g
            times = t.expand(len(flat))
            condition, nothing = (
                {name: v.repeat_interleave(k, 0) for name, v in c.items()}
                for c in (condition_of_rows, empty)
            )
            output = guide(
                self.sampling_policy.predict,
                schedule,
                flat,
                times,
                condition,
                nothing,
                self.guidance_scale,
                self.backbone.guidance_rule,
            )
            if candidates is not None:
                if origin is not None:
                    clean = schedule.to_x0(output, flat, times)
                    compare(draw(clean.float()))
                chosen = torch.stack(
                    [torch.randint(n, (), generator=generator) for generator in draws]
                ).to(device)
                chosen, places = nearest_usable(chosen, finite), torch.arange(g, device=device)
                state, output = (
                    candidates[places, chosen],
                    output.unflatten(0, (g, n))[places, chosen],
                )
                finite = finite[places, chosen][:, None]
            mean, std = transition(schedule, output, state, times[:g], after.expand(g), args.eta)
            many = n if step >= args.first_step else 1
            noise = torch.stack(
                [torch.randn((many, *shape), generator=generator) for generator in draws]
            ).to(mean)
            following = (mean[:, None] + std.reshape(-1, *[1] * noise[0].ndim) * noise).float()
            finite = finite & torch.isfinite(following).flatten(2).all(2)
            following = torch.where(
                finite.reshape(g, many, *[1] * len(shape)), following, torch.zeros_like(following)
            )
            origin = (state, mean, std) if step in usable else None
            candidates, state = (following, state) if many > 1 else (None, following[:, 0])
            bar.update(g)
        assert candidates is not None
        images = draw(candidates.flatten(0, 1))
        pictures += images
        scores = (
            compare(images)
            if origin is not None
            else reward_function(images, prompts).unflatten(0, (g, n))
        )
        return {
            **{name: torch.stack(values, 1) for name, values in records.items()},
            "scores": scores.float(),
        }

    def micro_batches(self, batch: Batch) -> Any:
        """Yield one step of every row at a time, with best and worst candidate.

        Args:
            batch (`Batch`): What `score_round` returned.
        """
        grid, device, rows = self.rollout.grid, batch.x0.device, torch.arange(len(batch))
        usable = self.usable_steps(grid)
        for number in range(self.trained_steps):
            place = batch.extra["order"][:, number]
            step = usable[place]
            decided = batch.extra["decided"][rows, place].float()
            preference = torch.zeros(len(batch), 2, 2)
            preference[:, 0, 1], preference[:, 1, 0] = decided, -decided
            yield dataclasses.replace(
                batch,
                times=grid.times[step],
                noisy=batch.extra["states"][rows, place][:, None].to(device),
                x0=batch.extra["pairs"][rows, place].to(device),
                extra={
                    "next_times": grid.next_times[step],
                    "recorded": batch.extra["log_probs"][rows, place],
                    "preference": preference,
                    "scores": batch.extra["scores"],
                },
            )
