"""RankDPO: Karthik et al. 2024, arXiv 2410.18013, section 3.

    s_i      = m_i - r_i                                   error change of image i
    G_i      = 2^phi_i - 1                                 gain
    D_i      = log(1 + tau_i)                              discount at the rank tau_i
    Delta_ij = |G_i - G_j| |1/D_i - 1/D_j|
    loss     = sum over phi_i > phi_j of Delta_ij (-log sigmoid(-(beta/2) (s_i - s_j)))

phi_i in [0, 1] is the share of comparisons that image i wins, over the other images and
all scorers (`diffalign.rewards.win_rates`). tau_i is its rank in the order of phi. The
ranks are those of the data, not those of the current model.

All k images of a prompt share the timestep, and each has its own noise. They go through
the network in one batch. Lists may have different lengths. Ties have no gain difference
and drop out. Tied images share their average rank, so the order in the file does not
matter.

There is no official code. The 1/2 and the mean errors are Diffusion-DPO's convention,
so that at k = 2 the loss is its loss times Delta_12. The paper prints neither constant.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import Positive
from ..config.section import config_section
from ..likelihood import implicit_rewards
from ..rewards.ensemble import win_rates
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.diagnostics import pair_metrics
from ..training.loop import BatchSource
from ..training.trainer import Trainer

Gains = Literal["auto", "given", "win_rate", "calibrated", "minmax"]
LogBase = Literal["e", "2"]
Normalize = Literal["sum", "mean", "idcg"]
GAINS, LOG_BASES, NORMALIZE = get_args(Gains), get_args(LogBase), get_args(Normalize)


@config_section
class RankDPOConfig(TrainingConfig):
    """`train:` for `method: rankdpo`.

    Example:
        ```python
        from diffalign import RankDPOConfig

        args = RankDPOConfig(output_dir="runs/rankdpo", gains="win_rate")
        assert args.normalize == "sum"
        ```
    """

    shared_noise: bool = False
    """One noise per image, as in the paper; true shares one within a list. Source:
    paper: the images share the timestep alone."""
    beta: Positive[float] = 5000.0
    """Strength of the pull to the reference, in Diffusion-DPO's convention (1/2, mean
    errors); not stated in the paper. Source: not stated in the paper; Diffusion-DPO's
    for SDXL."""
    gains: Gains = "auto"
    """How scores become phi in [0, 1]: given (they are phi), win_rate (wins within the
    list), calibrated (expected wins, sigmoid of score differences, as in CaPO), minmax
    (per list), auto (given where all scores of the dataset lie in [0, 1],
    else win_rate, also for streams and images drawn online; one choice for all lists).
    Source: paper, section 3.1: win rates over all comparisons and reward models."""
    log_base: LogBase = "e"
    """Of the discount: e | 2. The paper's e; 2 only multiplies the loss by ln 2.
    Source: paper, eq. 9."""
    normalize: Normalize = "sum"
    """sum over pairs (paper) | mean over them | idcg: divided by the list's ideal
    discounted gain. Source: paper: the sum over pairs."""

    @property
    def error_beta(self) -> float | None:
        """`beta`. See `TrainingConfig.error_beta`."""
        return self.beta


def average_ranks(scores: Tensor) -> Tensor:
    """Compute the rank of each image. 1 is the best, and ties share their average rank.

    Args:
        scores (`Tensor`): (g, k), higher is better. NaN means no image.

    Returns:
        `Tensor`: (g, k), NaN where the score is NaN.
    """
    higher = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    ranks = higher + (equal + 1) / 2
    return torch.where(torch.isnan(scores), torch.full_like(scores, math.nan), ranks.to(scores))


def lambda_weights(scores: Tensor, log_base: str = "e") -> Tensor:
    """Compute the weights Delta_ij of the pairs (paper, section 3).

    Args:
        scores (`Tensor`): phi in [0, 1], (g, k). NaN means no image.
        log_base (`str`, *optional*, defaults to `"e"`): Base of the discount, `e` or
            `2`.

    Returns:
        `Tensor`: (g, k, k), without gradient. 0 where image i is not preferred to j.
    """
    present = ~torch.isnan(scores)
    phi = torch.where(present, scores, torch.zeros_like(scores))
    gain = torch.exp2(phi) - 1
    discount = torch.log1p(torch.where(present, average_ranks(scores), torch.ones_like(scores)))
    if log_base == "2":
        discount = discount / math.log(2)
    weights = (gain[:, :, None] - gain[:, None, :]).abs() * (
        1 / discount[:, :, None] - 1 / discount[:, None, :]
    ).abs()
    preferred = (phi[:, :, None] > phi[:, None, :]) & present[:, :, None] & present[:, None, :]
    return torch.where(preferred, weights, torch.zeros_like(weights)).detach()


def rankdpo_loss(
    policy_errors: Tensor,
    reference_errors: Tensor,
    scores: Tensor,
    *,
    beta: float,
    log_base: str = "e",
    normalize: str = "sum",
) -> Tensor:
    """Compute the RankDPO loss (paper, section 3).

    Args:
        policy_errors (`Tensor`): (g, k), from `denoising_errors`.
        reference_errors (`Tensor`): (g, k), at the same noisy samples.
        scores (`Tensor`): phi in [0, 1], (g, k), higher is better. NaN marks the
            padding of shorter lists, whose errors are not used.
        beta (`float`): Strength of the pull to the reference.
        log_base (`str`, *optional*, defaults to `"e"`): Base of the discount, `e` or
            `2`.
        normalize (`str`, *optional*, defaults to `"sum"`): `sum`, `mean` or `idcg`.

    Returns:
        `Tensor`: Loss per list, (g,).

    Raises:
        ValueError: Shapes differ, a score is outside [0, 1], or an option is unknown.
    """
    if policy_errors.shape != scores.shape or reference_errors.shape != scores.shape:
        raise ValueError(
            f"scores: expected one per image {tuple(policy_errors.shape)}, got "
            f"{tuple(scores.shape)}"
        )
    if log_base not in LOG_BASES or normalize not in NORMALIZE:
        raise ValueError(
            f"log_base, normalize: expected one of {LOG_BASES} and of {NORMALIZE}, got "
            f"{log_base!r} and {normalize!r}"
        )
    scores = scores.to(policy_errors)
    if ((scores < 0) | (scores > 1)).any():
        raise ValueError(
            "scores: expected phi in [0, 1]; turn raw scores into win rates or min-max values first"
        )
    present = ~torch.isnan(scores)
    zero = torch.zeros_like(policy_errors)
    rewards = implicit_rewards(
        torch.where(present, policy_errors, zero),
        torch.where(present, reference_errors, zero),
        beta,
    )
    weights = lambda_weights(scores, log_base)
    total = (weights * softplus(-(rewards[:, :, None] - rewards[:, None, :]))).sum((1, 2))
    if normalize == "mean":
        return total / (weights > 0).sum((1, 2)).clamp(min=1)
    if normalize == "idcg":
        gain = torch.where(present, torch.exp2(scores) - 1, zero)
        discount = torch.log1p(torch.where(present, average_ranks(scores), torch.ones_like(scores)))
        ideal = (gain / (discount / math.log(2) if log_base == "2" else discount)).sum(1)
        return total / ideal.clamp(min=1e-12)
    return total


def phi_from_scores(scores: Tensor, gains: str = "auto") -> Tensor:
    """Turn scores of any scale into phi in [0, 1].

    Args:
        scores (`Tensor`): (g, k), higher is better.
        gains (`str`, *optional*, defaults to `"auto"`): How.

            - `given`: The scores are phi.
            - `win_rate`: Share of the list's other images that an image beats. A tie
              counts one half.
            - `calibrated`: Mean sigmoid of the differences to the list's other images
              (CaPO, arXiv 2502.02588).
            - `minmax`: Scaled to [0, 1] within the list.
            - `auto`: `given` if all of these scores lie in [0, 1], else `win_rate`.

    Returns:
        `Tensor`: (g, k). NaN stays NaN.

    Raises:
        ValueError: Another value of `gains`.
    """
    if gains not in GAINS:
        raise ValueError(f"gains: expected one of {', '.join(GAINS)}, got {gains!r}")
    if gains == "given":
        return scores
    if gains == "calibrated":
        return win_rates(scores[:, :, None], calibrate="sigmoid")
    present = ~torch.isnan(scores)
    win_rate = win_rates(scores[:, :, None])
    if gains == "win_rate":
        return win_rate
    low = torch.where(present, scores, torch.full_like(scores, math.inf)).amin(1, keepdim=True)
    high = torch.where(present, scores, torch.full_like(scores, -math.inf)).amax(1, keepdim=True)
    if gains == "minmax":
        return (scores - low) / torch.where(high > low, high - low, torch.ones_like(low))
    is_phi = ((low >= 0) & (high <= 1)) | ~present.any(1, keepdim=True)
    return scores if is_phi.all() else win_rate


class RankDPOTrainer(Trainer):
    """Trains on ranked lists against a frozen reference.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import RankDPOConfig, RankDPOTrainer

        trainer = RankDPOTrainer(
            model="shapes",
            args=RankDPOConfig(output_dir="runs/rankdpo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "rankdpo"
    _name = "RankDPO"
    _tag_names = ("rankdpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Scalable Ranked Preference Optimization for Text-to-Image Generation",
        "id": "2410.18013",
        "citation": """@article{karthik2024scalable,
  title   = {Scalable Ranked Preference Optimization for Text-to-Image Generation},
  author  = {Karthik, Shyamgopal and Coskun, Huseyin and Akata, Zeynep and
             Tulyakov, Sergey and Ren, Jian and Kag, Anil},
  journal = {arXiv preprint arXiv:2410.18013},
  year    = {2024}
}""",
    }
    _not_public: ClassVar[str] = (
        "Code, learning rate, beta, and the two constants of the loss (1/2, mean or sum over "
        "elements)."
    )
    config_class = RankDPOConfig
    data_kind = "ranked"
    args: RankDPOConfig
    gains: str
    """How this run turns scores into gains."""

    def build_source(self) -> BatchSource:
        """Build the source of batches, and decide how scores become gains.

        It is decided here because a resumed run may keep the rule of an earlier
        version.
        """
        self.gains = self._chosen_gains()
        return super().build_source()

    def _chosen_gains(self) -> str:
        """Return the `gains` that all lists of the run use."""
        # Runs of earlier versions choose for each list.
        if self.args.gains != "auto" or self.sampler_rule == 1:
            return self.args.gains
        limits = None if self.data_config.online is not None else self.train_dataset.score_range()
        is_phi = limits is not None and limits[0] >= 0 and limits[1] <= 1
        reason = (
            "scores are not known beforehand"
            if limits is None
            else f"scores run from {limits[0]:g} to {limits[1]:g}"
        )
        self.notes.append(
            f"gains: {'the scores as they are' if is_phi else 'win rates within each list'} "
            f"({reason})"
        )
        return "given" if is_phi else "win_rate"

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the RankDPO loss. See `Trainer.compute_loss`.

        The metrics are those of the pair of best and worst image.
        """
        policy, reference = self.errors(batch)
        assert reference is not None and batch.scores is not None
        args = self.args
        if self.gains == "auto":
            phi = torch.cat([phi_from_scores(scores[None], self.gains) for scores in batch.scores])
        else:
            phi = phi_from_scores(batch.scores, self.gains)
        loss = rankdpo_loss(
            policy, reference, phi, beta=args.beta, log_base=args.log_base, normalize=args.normalize
        )
        filled = torch.where(torch.isnan(phi), torch.full_like(phi, -1.0), phi)
        lowest = torch.where(torch.isnan(phi), torch.full_like(phi, 2.0), phi)
        ends = torch.stack([filled.argmax(1), lowest.argmin(1)], dim=1)
        metrics = pair_metrics(
            policy.gather(1, ends),
            reference.gather(1, ends),
            args.beta,
            self.schedule.fraction(batch.times),
        )
        return loss, metrics
