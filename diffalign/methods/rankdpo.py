"""RankDPO: Karthik et al. 2024, "Scalable Ranked Preference Optimization for Text-to-Image Generation", arXiv 2410.18013, section 3.

    s_i      = m_i - r_i                                         error change of image i
    G_i      = 2^phi_i - 1,  D(tau) = log(1 + tau)               gain, and discount at the rank tau in the order of phi
    Delta_ij = |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)|
    loss     = sum over phi_i > phi_j of Delta_ij (-log sigmoid(-(beta/2) (s_i - s_j)))

phi in [0, 1] are the shares of pairwise comparisons an image wins over the other images and all scorers (`diffalign.rewards.win_rates`). The ranks are those of the data, not of the
current model. All k images of a prompt share the timestep, each has its own noise; they go through the network in one batch. Ties have no gain difference and drop out; tied images
share their average rank, so the order in the file does not matter. There is no official code: the 1/2 and the mean errors are Diffusion-DPO's convention, so that at k = 2 the loss is
its loss times Delta_12; the paper prints neither constant. Lists may have different lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import ConfigError
from ..likelihood import implicit_rewards
from ..rewards.ensemble import win_rates
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.diagnostics import pair_metrics
from ..training.trainer import BatchSource, Trainer

GAINS = ("auto", "given", "win_rate", "minmax")
LOG_BASES = ("e", "2")
NORMALIZE = ("sum", "mean", "idcg")


@dataclass
class RankDPOConfig(TrainingConfig):
    """`train:` for `method: rankdpo`."""

    shared_noise: bool = False
    """One noise per image, as in the paper; true shares one within a list."""
    beta: float = 5000.0
    """Strength of the pull to the reference, in Diffusion-DPO's convention (1/2, mean errors); not stated in the paper."""
    gains: str = "auto"
    """How scores become phi in [0, 1]: given (they are phi), win_rate (wins within the list), minmax (per list), auto (given where
    all scores of the dataset lie in [0, 1], else win_rate, also for streams and images drawn online; one choice for all lists)."""
    log_base: str = "e"
    """Of the discount: e | 2. The paper's e; 2 only multiplies the loss by ln 2."""
    normalize: str = "sum"
    """sum over pairs (paper) | mean over them | idcg: divided by the list's ideal discounted gain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("gains", GAINS), ("log_base", LOG_BASES), ("normalize", NORMALIZE)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    name, f"expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        self._check("beta", lambda v: v > 0, "> 0")


def average_ranks(scores: Tensor) -> Tensor:
    """Ranks (g, k) from 1 = best, ties sharing their average; NaN scores get NaN."""
    higher = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    ranks = higher + (equal + 1) / 2
    return torch.where(torch.isnan(scores), torch.full_like(scores, math.nan), ranks.to(scores))


def lambda_weights(scores: Tensor, log_base: str = "e") -> Tensor:
    """Delta_ij where image i is preferred to j, else 0; (g, k) -> (g, k, k), data without gradient.

    Args:
        scores (`Tensor`): phi in [0, 1], NaN = no such image.
        log_base (`str`): of the discount, ``e`` or ``2``.
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
    """Loss per list, (g,).

    Args:
        policy_errors, reference_errors (`Tensor`): (g, k), from `denoising_errors` at identical noisy samples.
        scores (`Tensor`): (g, k), phi in [0, 1], higher is better; NaN marks the padding of shorter lists, whose errors are not read.
        beta (`float`): see `RankDPOConfig`.
        log_base (`str`): ``e`` or ``2``.
        normalize (`str`): ``sum``, ``mean`` or ``idcg``.

    Raises:
        ValueError: shapes that differ, a score outside [0, 1], an unknown option.
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
    """Scores of any scale as phi in [0, 1], (g, k); NaN stays.

    Args:
        scores (`Tensor`): (g, k), higher is better.
        gains (`str`): ``given``, ``win_rate`` (share of the other images of the list that it beats, a tie counts one half), ``minmax``,
            or ``auto``: ``given`` where all of these scores lie in [0, 1], else ``win_rate``.

    Raises:
        ValueError: an unknown name.
    """
    if gains not in GAINS:
        raise ValueError(f"gains: expected one of {', '.join(GAINS)}, got {gains!r}")
    if gains == "given":
        return scores
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
    """Trains on ranked lists against a frozen reference."""

    method = "rankdpo"
    _name = "RankDPO"
    _tag_names = ("rankdpo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Scalable Ranked Preference Optimization for Text-to-Image Generation",
        "id": "2410.18013",
        "citation": """@article{karthik2024scalable,
  title   = {Scalable Ranked Preference Optimization for Text-to-Image Generation},
  author  = {Karthik, Shyamgopal and Coskun, Huseyin and Akata, Zeynep and Tulyakov, Sergey and Ren, Jian and Kag, Anil},
  journal = {arXiv preprint arXiv:2410.18013},
  year    = {2024}
}""",
    }
    _sources: ClassVar[dict[str, str]] = {
        "beta": "not stated in the paper; Diffusion-DPO's for SDXL",
        "gains": "paper, section 3.1: win rates over all comparisons and reward models",
        "log_base": "paper, eq. 9",
        "normalize": "paper: the sum over pairs",
        "shared_noise": "paper: the images share the timestep alone",
    }
    _not_public: ClassVar[str] = (
        "Code, learning rate, beta, and the two constants of the loss (1/2, mean or sum over "
        "elements)."
    )
    config_class = RankDPOConfig
    data_kind = "ranked"
    args: RankDPOConfig
    gains: str
    """How scores become gains in this run."""

    def build_source(self) -> BatchSource:
        """As usual; the gains are chosen now, since a resumed run may keep an older rule."""
        self.gains = self._chosen_gains()
        return super().build_source()

    def _chosen_gains(self) -> str:
        """`gains` of the run: one choice for all of its lists."""
        if (
            self.args.gains != "auto" or self.sampler_rule == 1
        ):  # runs of earlier versions choose per list
            return self.args.gains
        limits = None if self.data_config.online is not None else self.train_dataset.score_range()
        is_phi = limits is not None and limits[0] >= 0 and limits[1] <= 1
        seen = (
            "scores are not known beforehand"
            if limits is None
            else f"scores run from {limits[0]:g} to {limits[1]:g}"
        )
        self.notes.append(
            f"gains: {'the scores as they are' if is_phi else 'win rates within each list'} "
            f"({seen})"
        )
        return "given" if is_phi else "win_rate"

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
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
            self.process.fraction(batch.times),
        )
        return loss, metrics
