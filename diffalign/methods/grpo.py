"""GRPO for images: Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, and its relatives.

    A_i   advantage of image i among the k images of its prompt
    rho   = exp(log p(x_prev | x_t, c) - log p_old(x_prev | x_t, c))  per image, step
    loss  = max(-A rho, -A clamp(rho, 1 - eps, 1 + eps)) + kl_weight KL

The policy draws k images of each prompt with stochastic steps, and scorers judge them.
p_old is the policy that drew them. One file holds the family:

- Flow-GRPO: the SDE of a flow, advantages over the round, KL to the base.
- DanceGRPO (Xue et al. 2025, arXiv 2505.07818): `dynamics: dance_sde`, `advantage:
  dance_grpo`, `shared_init: true`, no KL, `timestep_fraction: 0.6`.
- DDPO (Black et al. 2023, arXiv 2305.13301): DDIM with eta 1 on UNets, `advantage:
  ddpo`. DPOK (Fan et al. 2023, arXiv 2305.16381) adds `kl_weight` with `kl_type:
  exact`.
- Flow-GRPO-Fast and MixGRPO (Li et al. 2025, arXiv 2507.21802): only a window of steps
  is stochastic and trained, see `num_sde_steps` and `window`.
- GRPO-Guard (Wang et al. 2025, arXiv 2510.22319): `ratio: guard`.

The log-probability is the mean over the elements of a latent, as in all of these codes,
and `clip_range` belongs to that. A round of one optimizer step has rho = 1, so that
nothing is ever clipped: the gradient is that of REINFORCE with a baseline.

Differences from the official codes:

- The last step of a flow is deterministic and not trained. Flow-GRPO draws it with
  noise, and does not train it either.
- A window is the same for all images of a round, on all processes. Flow-GRPO-Fast draws
  one per sampling call. MixGRPO's window can be empty at the end of its way.
- Evaluations draw deterministically.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..config.ranges import Count, NotNegative, OneOf, Range, count
from ..config.section import config_section
from ..errors import ConfigError
from ..likelihood.schedules import VariancePreserving
from ..runtime.seeds import row_generator
from ..training.batch import Batch
from ..training.online.advantage_estimator import AdvantageConfig, AdvantageTrainer
from ..training.online.rollout import DYNAMICS, Grid, SamplerConfig, Trajectories, check_dynamics
from ..training.online.trajectory_trainer import (
    StepStatistics,
    TrajectoryConfig,
    TrajectoryTrainer,
)

WINDOWS = ("random", "consecutive", "progressive")


@config_section
class GRPOConfig(AdvantageConfig, TrajectoryConfig):
    """`train:` for `method: grpo`.

    Example:
        ```python
        from diffalign import GRPOConfig

        args = GRPOConfig(output_dir="runs/grpo", images_per_prompt=8, kl_weight=0.04)
        assert args.advantage == "flow_grpo"
        ```
    """

    num_inference_steps: Annotated[int, count(2, 1000)] = 10
    """Steps of the sampler. Source: Flow-GRPO, 10; DDPO 50, DanceGRPO 16."""
    guidance_scale: float = 4.5
    """Classifier-free guidance, in sampling and in training alike; 1 or below for none.
    Source: Flow-GRPO for SD3, 4.5; DDPO 5."""
    eta: NotNegative[float] = 0.7
    """Stochasticity of the steps: the noise level of a flow's SDE, or DDIM's eta.
    Source: Flow-GRPO, 0.7; DanceGRPO 0.3 with its own SDE, DDPO 1."""
    dynamics: Annotated[str, OneOf(DYNAMICS)] = "auto"
    """auto | ddim | flow_sde | dance_sde | cps: the stochastic step. auto is ddim for
    UNets and flow_sde for flows. Source: Flow-GRPO, DanceGRPO, CPS (arXiv
    2509.05952)."""
    clip_range: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 1e-4
    """eps: the ratio of a step is kept within [1 - eps, 1 + eps]. It belongs to the
    mean over the elements. Source: official codes, 1e-4."""
    ratio: Literal["plain", "guard"] = "plain"
    """plain | guard: GRPO-Guard's ratio, whose logarithm is 0 on average under the old
    policy and alike for all steps. Source: arXiv 2510.22319."""
    kl_weight: NotNegative[float] = 0.0
    """Pull to the starting weights. 0 runs no reference. Source: Flow-GRPO 0.01 to 0.04
    by reward, its fast variant and DanceGRPO 0."""
    kl_type: Literal["x", "exact", "v"] = "v"
    """exact: the KL divergence of the steps, per element | x: Flow-GRPO's, of flows,
    smaller by the length of the step | v: squared difference of the outputs. Source:
    Flow-GRPO x; Flow-Factory v."""
    uncond_gradient: bool = True
    """Whether the unconditional branch of guidance has a gradient. Source: DanceGRPO
    and DDPO yes, Flow-GRPO no."""
    sde_steps: list[int] = field(default_factory=list)
    """Steps that may be stochastic and trained, counted from the noisiest, from 0.
    Empty for all; of a flow, all but the last. Source: Flow-Factory."""
    num_sde_steps: Count | None = None
    """How many of them are stochastic and trained in a round. None for all. Source:
    Flow-GRPO-Fast 1 to 3, MixGRPO 4."""
    window: Annotated[str, OneOf(WINDOWS)] = "random"
    """random: any `num_sde_steps` of them, anew each round | consecutive: from a random
    one on (Flow-GRPO-Fast) | progressive: from the noisiest on, moving by one every
    `window_rounds` rounds (MixGRPO). Source: the papers of these names."""
    window_rounds: Count = 25
    """Rounds after which a progressive window moves. Source: MixGRPO, 25."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ConfigError(
                "eta",
                "with 0 the sampler is deterministic and its steps have no log-probability; set it "
                "above 0 (Flow-GRPO: 0.7)",
            )
        if self.dynamics == "cps" and self.ratio == "guard":
            raise ConfigError("ratio", "guard needs a variance, which cps leaves out; give plain")
        if self.reduce == "sum" and (self.ratio == "guard" or self.dynamics == "cps"):
            raise ConfigError(
                "reduce",
                "sum cannot be combined with ratio: guard or dynamics: cps, which average over a "
                "latent; set it to mean",
            )
        if self.dynamics == "cps" and self.eta > 1:
            raise ConfigError("eta", f"expected a number from 0 to 1 for cps, got {self.eta:g}")
        if self.window != "random" and self.num_sde_steps is None:
            raise ConfigError(
                "window", f"{self.window} needs num_sde_steps, the number of steps in the window"
            )
        wrong = [step for step in self.sde_steps if not 0 <= step < self.num_inference_steps]
        if wrong:
            raise ConfigError(
                "sde_steps",
                f"expected steps in [0, {self.num_inference_steps - 1}], got {wrong[0]}",
            )


def grpo_loss(
    log_ratios: Tensor, advantages: Tensor, *, clip_range: float = 1e-4, adv_clip: float = 5.0
) -> Tensor:
    """Compute the clipped loss of steps (Flow-GRPO, eq. 5; PPO, arXiv 1707.06347, eq.
    7).

    Args:
        log_ratios (`Tensor`): log p - log p_old of the stored next state, (n,).
        advantages (`Tensor`): (n,).
        clip_range (`float`, *optional*, defaults to `1e-4`): eps, the largest change of
            a ratio that gives a gradient.
        adv_clip (`float`, *optional*, defaults to `5.0`): Largest size of an advantage.

    Returns:
        `Tensor`: (n,).

    Example:
        ```python
        import torch

        loss = grpo_loss(torch.zeros(2), torch.tensor([1.0, -2.0]))
        assert loss.tolist() == [-1.0, 2.0]
        ```
    """
    # A log-ratio summed over a latent is large, and exp would overflow.
    ratios = log_ratios.clamp(-20, 20).exp()
    bounded = ratios.clamp(1 - clip_range, 1 + clip_range)
    sizes = advantages.to(ratios).clamp(-adv_clip, adv_clip)
    return torch.maximum(-sizes * ratios, -sizes * bounded)


def guard_log_ratios(
    log_probs: Tensor, recorded: Tensor, means: Tensor, recorded_means: Tensor, std: Tensor
) -> Tensor:
    """Compute GRPO-Guard's log-ratios.

    The plain one is negative on average, by the squared distance of the means, and its
    size depends on the step. Here it is 0 on average under the old policy.

    Args:
        log_probs, recorded (`Tensor`): Log-probabilities of policy and old policy,
            means over the elements, (n,).
        means, recorded_means (`Tensor`): Means of their steps, (n, ...).
        std (`Tensor`): Deviation of the steps, broadcastable to the means.

    Returns:
        `Tensor`: (n,).
    """
    deviation = std.expand_as(means).flatten(1)[:, 0]
    distance = (means - recorded_means).square().flatten(1).mean(1)
    return (log_probs - recorded) * deviation + distance / (2 * deviation)


def step_kl(
    kind: str,
    *,
    policy: Tensor,
    reference: Tensor,
    std: Tensor | None = None,
    dt: Tensor | None = None,
) -> Tensor:
    """Compute how far the steps of a policy are from those of its reference.

    Args:
        kind (`str`): ``exact`` is the KL divergence of the Gaussians per element, from
            the means of the steps. ``x`` is Flow-GRPO's, which divides by the diffusion
            without the length of the step: `exact` times -dt. ``v`` is the squared
            difference of the outputs.
        policy, reference (`Tensor`): Means of the steps, or outputs for ``v``,
            (n, ...).
        std (`Tensor`, *optional*): Deviation of the steps, broadcastable to the means.
        dt (`Tensor`, *optional*): Change of sigma in the step, negative, (n,), for
            ``x``.

    Returns:
        `Tensor`: (n,).

    Raises:
        ValueError: Another kind, or something that it needs is missing.
    """
    if kind not in ("x", "exact", "v"):
        raise ValueError(f"kind: expected x, exact or v, got {kind!r}")
    squares = (policy - reference).square()
    if kind == "v":
        return squares.flatten(1).mean(1)
    if std is None or (kind == "x" and dt is None):
        raise ValueError(f"{kind}: needs std" + (" and dt" if kind == "x" else ""))
    divergence = (squares / (2 * std.square())).flatten(1).mean(1)
    return divergence if dt is None or kind == "exact" else divergence * -dt.to(divergence)


def window_steps(
    candidates: Tensor, count: int | None, kind: str, number: int, *, seed: int, rounds: int = 25
) -> Tensor:
    """Choose the steps that are stochastic and trained in a round.

    Args:
        candidates (`Tensor`): Indices of steps to choose from, in order, (u,).
        count (`int`, *optional*): How many. None for all.
        kind (`str`): `random`, `consecutive` or `progressive`.
        number (`int`): Number of the round, from 0.
        seed (`int`): Seed of the run. Equal on all processes.
        rounds (`int`, *optional*, defaults to `25`): Rounds after which a progressive
            window moves by one. After its last place it begins anew.

    Returns:
        `Tensor`: Indices in order, (count,).
    """
    if count is None or count >= len(candidates):
        return candidates
    places = len(candidates) - count + 1
    if kind == "progressive":
        start = number // rounds % places
        return candidates[start : start + count]
    generator = row_generator(seed, number, 0, "sde-window")
    if kind == "consecutive":
        start = int(torch.randint(places, (), generator=generator))
        return candidates[start : start + count]
    return candidates[torch.randperm(len(candidates), generator=generator)[:count].sort().values]


class GRPOTrainer(AdvantageTrainer, TrajectoryTrainer):
    """Trains on the steps of sampled trajectories, by advantages of their images.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import GRPOConfig, GRPOTrainer

        trainer = GRPOTrainer(
            model="shapes",
            args=GRPOConfig(
                output_dir="runs/grpo",
                max_steps=2,
                images_per_prompt=4,
                num_inference_steps=5,
            ),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers=["shapes"],
        )
        trainer.train()
        ```
    """

    method = "grpo"
    _name = "GRPO"
    _tag_names = ("grpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        "citation": """@article{liu2025flowgrpo,
  title   = {Flow-GRPO: Training Flow Matching Models via Online RL},
  author  = {Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and
             Wang, Xintao and Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
  journal = {arXiv preprint arXiv:2505.05470},
  year    = {2025}
}""",
    }
    _not_public: ClassVar[str] = "Seeds."
    config_class = GRPOConfig
    args: GRPOConfig
    round_number: int = 0
    """Number of the round that was drawn last, which chooses its window."""

    def validate(self) -> None:
        """Check scorers, dynamics and window.

        Raises:
            ConfigError: There is no scorer, or a setting does not fit the model.
        """
        check_dynamics(self.schedule, self.args.dynamics, "train.dynamics")
        if self.peft_config is not None and self.peft_config.lora_dropout:
            raise ConfigError(
                "lora.dropout",
                "GRPO clips the ratio of the policy to itself when it drew the images, and "
                "dropout moves that ratio; set it to 0",
            )
        grid, args = self.sampling_grid(), self.args
        allowed = self._candidates(grid).tolist()
        wrong = [step for step in args.sde_steps if step not in allowed]
        if wrong:
            raise ConfigError(
                "train.sde_steps",
                f"step {wrong[0]} of {len(grid)} is deterministic and cannot be trained; give "
                f"steps from {allowed[0]} to {allowed[-1]}",
            )
        chosen = len(args.sde_steps or allowed)
        if args.num_sde_steps is not None and args.num_sde_steps > chosen:
            raise ConfigError(
                "train.num_sde_steps", f"expected at most {chosen} steps, got {args.num_sde_steps}"
            )
        if args.kl_weight and args.kl_type == "x" and isinstance(self.schedule, VariancePreserving):
            raise ConfigError(
                "train.kl_type", "x is for flows; give exact or v for a model that predicts noise"
            )
        super().validate()
        if args.steps_per_round * args.num_inner_epochs == 1:
            self.notes.append(
                "a round is one optimizer step, so the ratio is 1 and nothing is clipped; "
                "train.steps_per_round: 2 takes two steps per round"
            )

    def _candidates(self, grid: Grid) -> Tensor:
        """Steps with a density. The last step of a flow is left out, as in
        Flow-GRPO."""
        steps = grid.trainable.nonzero()[:, 0]
        if isinstance(self.schedule, VariancePreserving):
            return steps
        return steps[steps < len(grid) - 1]

    def usable_steps(self, grid: Grid) -> Tensor:
        """Return the steps that are stochastic and trained in the current round, (u,).

        Args:
            grid (`Grid`): Times of the sampler.
        """
        args = self.args
        candidates = torch.tensor(sorted(set(args.sde_steps))) if args.sde_steps else None
        return window_steps(
            self._candidates(grid) if candidates is None else candidates,
            args.num_sde_steps,
            args.window,
            self.round_number,
            seed=args.seed,
            rounds=args.window_rounds,
        )

    def sampler_config(self) -> SamplerConfig:
        """Return the settings of the sampler, see `OnPolicyTrainer.sampler_config`."""
        return dataclasses.replace(
            super().sampler_config(),
            dynamics=self.args.dynamics,
            keep="means" if self.args.ratio == "guard" else "states",
        )

    def begin_round(self, number: int) -> None:
        """Choose the window of a round. See `OnPolicyTrainer.begin_round`."""
        self.round_number = number

    def stochastic_steps(self, purpose: str) -> Tensor:
        """Return the steps of the current window, and none in an evaluation.

        See `OnPolicyTrainer.stochastic_steps`.
        """
        stochastic = torch.zeros(len(self.rollout.grid), dtype=torch.bool)
        if purpose != "evaluation":
            stochastic[self.usable_steps(self.rollout.grid)] = True
        return stochastic

    def kept(self, batch: Batch, trajectories: Trajectories) -> dict[str, Tensor]:
        """Keep the states of the steps that train, and log-probabilities. See
        `AdvantageTrainer.kept`."""
        optional = {"means": trajectories.means}
        for name in ("state_numbers", "mean_numbers"):
            numbers = getattr(trajectories, name)
            optional[name] = None if numbers is None else numbers.expand(len(batch), -1)
        return {
            "states": trajectories.states,
            "log_probs": trajectories.log_probs,
            "order": self.step_order(batch, self.usable_steps(self.rollout.grid)),
            **{name: value for name, value in optional.items() if value is not None},
        }

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one step of every trajectory. See
        `Trainer.compute_loss`."""
        args, (g, k) = self.args, batch.x0.shape[:2]
        reference = None
        if self.reference is not None:  # first, while no activations are kept
            with torch.no_grad():
                reference = self.step_statistics(batch, self.reference)
        policy = self.step_statistics(batch, self.policy, args.uncond_gradient)
        recorded = batch.extra["recorded"].to(policy.log_probs)
        advantages = batch.extra["advantages"].to(policy.log_probs)
        log_ratios = policy.log_probs - recorded
        if args.ratio == "guard":
            old = batch.extra["recorded_means"].flatten(0, 1).to(policy.means)
            log_ratios = guard_log_ratios(
                policy.log_probs.flatten(), recorded.flatten(), policy.means, old, policy.std
            ).unflatten(0, (g, k))
        loss = grpo_loss(
            log_ratios.flatten(),
            advantages.flatten(),
            clip_range=args.clip_range,
            adv_clip=args.adv_clip,
        ).unflatten(0, (g, k))
        with torch.no_grad():
            clipped = (log_ratios.exp() - 1).abs() > args.clip_range
            metrics = {
                "policy/clipped": clipped.to(loss).mean(1),
                "policy/log_ratio": log_ratios.abs().mean(1),
                "policy/since_sampling": (policy.log_probs - recorded).abs().mean(1),
                **self.round_metrics(batch),
            }
        if reference is not None:
            divergence = self._divergence(batch, policy, reference)
            loss = loss + args.kl_weight * divergence
            metrics["policy/kl"] = divergence.detach().mean(1)
        return loss.mean(1), metrics

    def _divergence(
        self, batch: Batch, policy: StepStatistics, reference: StepStatistics
    ) -> Tensor:
        """Distance of the policy's steps to the reference's, (g, k)."""
        kind, k = self.args.kl_type, batch.x0.shape[1]
        dt = None
        if kind == "x":
            dt = (batch.extra["next_times"] - batch.times).repeat_interleave(k)
        of_outputs = kind == "v"
        return step_kl(
            kind,
            policy=policy.outputs if of_outputs else policy.means,
            reference=reference.outputs if of_outputs else reference.means,
            std=policy.std,
            dt=dt,
        ).unflatten(0, (len(batch), k))
