"""D3PO: Yang et al. 2023, arXiv 2311.13231, eq. 14.

    r_i   = log p(x_prev | x_t, c) - log p_ref(x_prev | x_t, c)      per step and image
    rho_i = clamp(exp(r_i), 1 - eps, 1 + eps)
    loss  = -log sigmoid(beta h (log rho_0 - log rho_1))             h = +1, -1 or 0

The policy samples trajectories with stochastic steps: DDIM with eta, or the flow SDE
for flow models, which is our extension. All images of a prompt start from one noise.
Scorers or people compare the final images, and every step of a trajectory gets that
preference.

The log-probabilities are means over the elements of a latent, as in the official code.
The clamp is that of the code. The paper's equation has none. With the mean, beta 0.1
and eps 0.1, the loss lies in [0.6832, 0.7032], so a curve that looks flat at 0.693 is
normal. Guidance is part of sampling and of the training forward.

Differences from the official code:

- Every trained step runs through the prepared module, so its gradients are
  synchronised.
- The step at t = 0 is left out. In the official code it gives NaN.
- A checkpoint stores what the reference is.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import OneOf, Positive, Range, count
from ..config.section import config_section
from ..errors import ConfigError
from ..training.batch import Batch
from ..training.online.reward_function import COMPARE
from ..training.online.trajectory_trainer import TrajectoryConfig, TrajectoryTrainer


@config_section
class D3POConfig(TrajectoryConfig):
    """`train:` for `method: d3po`.

    Example:
        ```python
        from diffalign import D3POConfig

        args = D3POConfig(output_dir="runs/d3po", images_per_prompt=4, max_steps=2000)
        assert args.compare == "pareto"
        ```
    """

    images_per_prompt: Annotated[int, count(2, 65_536)] = 2  # one image cannot be compared
    beta: Positive[float] = 0.1
    """Strength of the pull to the reference, on log-probabilities. Source: official
    code, 0.1."""
    clip_range: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 0.1
    """eps: the ratio of a step is kept within [1 - eps, 1 + eps]; beyond, it gives no
    gradient. Source: official code, 0.1 (0.2 in its first version); the paper's eq. 14
    has none."""
    compare: Annotated[str, OneOf(COMPARE)] = "pareto"
    """pareto: better in every score | majority: better in most scores | combined: by
    the panel's combined score. Source: official reward script; majority as in
    BalancedDPO, arXiv 2503.12575."""
    reference: Literal["fixed", "iterated"] = "fixed"
    """fixed: the starting weights | iterated: the policy at the beginning of each
    round, as in the paper's human-feedback runs. Source: official reward script; the
    human-feedback script iterates."""
    feedback: Literal["scorers", "people"] = "scorers"
    """scorers | people: images are written out and the run waits for votes. Source:
    ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0:
            raise ConfigError(
                "eta",
                "with 0 the sampler is deterministic and its steps have no log-probability; set it "
                "above 0 (official code: 1)",
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


def d3po_loss(
    log_ratios: Tensor, preference: Tensor, *, beta: float = 0.1, clip_range: float = 0.1
) -> Tensor:
    """Compute the D3PO loss of pairs at one step (paper, eq. 14).

    Args:
        log_ratios (`Tensor`): log p - log p_ref of the stored next state, per image,
            (g, 2).
        preference (`Tensor`): In [-1, 1], (g,). +1 prefers image 0, -1 image 1, and 0
            is a tie with loss log 2 and no gradient. Averages of several votes lie
            between.
        beta (`float`, *optional*, defaults to `0.1`): Strength of the pull to the
            reference.
        clip_range (`float`, *optional*, defaults to `0.1`): eps, the largest change of
            a ratio.

    Returns:
        `Tensor`: Loss per pair, (g,).
    """
    # A log-ratio summed over a latent is large, and exp would overflow.
    ratio = torch.exp(log_ratios.clamp(-20, 20)).clamp(1 - clip_range, 1 + clip_range)
    margin = ratio[:, 0].log() - ratio[:, 1].log()
    return softplus(-beta * preference.to(margin) * margin)


class D3POTrainer(TrajectoryTrainer):
    """Trains on the steps of sampled trajectories, by preferences between their images.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import D3POConfig, D3POTrainer

        trainer = D3POTrainer(
            model="shapes",
            args=D3POConfig(output_dir="runs/d3po", max_steps=2, num_inference_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
            scorers=["shapes"],
        )
        trainer.train()
        ```
    """

    method = "d3po"
    _name = "D3PO"
    _tag_names = ("d3po",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "id": "2311.13231",
        "citation": """@inproceedings{yang2024d3po,
  title     = {Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model},
  author    = {Yang, Kai and Tao, Jian and Lyu, Jiafei and Ge, Chunjiang and
               Chen, Jiaxin and Li, Qimai and Shen, Weihan and Zhu, Xiaolong and Li, Xiu},
  booktitle = {CVPR},
  year      = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "How many annotators judged each pair, and the images of the paper's human studies."
    )
    config_class = D3POConfig
    args: D3POConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the D3PO loss of all pairs of a group. See `Trainer.compute_loss`."""
        assert self.reference is not None
        # First, while no activations of the policy are kept.
        with torch.no_grad():
            reference = self.step_log_probs(batch, self.reference)
        policy = self.step_log_probs(batch, self.policy)
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
