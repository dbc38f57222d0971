"""MaPO: Hong, Paul et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference", arXiv 2406.06424, eq. 9-11.

    u(l)  = l / (exp(l) - 1)                                             1 at 0, falling
    paper : loss = m_w - (1/beta) log sigmoid(phi(m_w) - phi(m_l)),      phi = beta u (scale) or u^beta (power)
    code  : loss = m_w - beta log sigmoid(T [u(s m_w) - u(s m_l)]),      s = 0.5, T = 1000, beta = 0.1

m are the policy's mean squared denoising errors of the chosen (w) and rejected (l) image at the same timestep and noise; no reference model. The paper's text leaves open whether
beta multiplies the link or is its power; at beta 1 both agree. The official code is the scale form with beta T at an inner scale s, its margin weighted a hundred times more
than the paper's 1/beta. Unlike the official code: no NaN at an error of 0 (series), v-prediction and flow targets, ties never train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import ConfigError
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.trainer import Trainer

FORMS = ("code", "paper")
LINK_FORMS = ("scale", "power")


@dataclass
class MaPOConfig(TrainingConfig):
    """`train:` for `method: mapo`."""

    form: str = "code"
    """code: the official implementation's loss; paper: equations 9 to 11. beta means different things in them."""
    beta: float = 0.1
    """code: weight of the margin (official 0.1). paper: 8 general, 32 culture, 64 safety and style, 1024 personalization."""
    link_form: str = "scale"
    """Of the paper form, where the text is ambiguous: scale (beta u) | power (u^beta)."""
    inner_scale: float = 0.5
    """s of the code form, its `snr_value`."""
    margin_scale: float = 1000.0
    """T of the code form, its number of training timesteps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("form", FORMS), ("link_form", LINK_FORMS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    name, f"expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("beta", "inner_scale", "margin_scale"):
            self._check(name, lambda v: v > 0, "> 0")


def mapo_link(errors: Tensor, scale: float = 1.0) -> Tensor:
    """u(scale * errors) = q / (exp(q) - 1), in (0, 1], falling; any shape.

    Under 1e-3 the series 1 - q/2 + q^2/12 stands for it: the expression is 0/0 at 0, and its gradient cancels near it.
    """
    q = scale * errors
    small = q.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(q), q)
    return torch.where(small, 1 - q / 2 + q.square() / 12, safe / torch.expm1(safe))


def mapo_loss(policy_errors: Tensor, *, beta: float, link_form: str = "scale") -> Tensor:
    """The paper's loss per pair, (g,).

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`): > 0.
        link_form (`str`): ``scale`` or ``power``.

    Raises:
        ValueError: another link form.
    """
    u = mapo_link(policy_errors)
    if link_form == "scale":
        phi = beta * u
    elif link_form == "power":
        phi = u**beta
    else:
        raise ValueError(f"link_form: expected one of {', '.join(LINK_FORMS)}, got {link_form!r}")
    return policy_errors[:, 0] + softplus(-(phi[:, 0] - phi[:, 1])) / beta


def mapo_code_loss(
    policy_errors: Tensor,
    *,
    beta: float = 0.1,
    inner_scale: float = 0.5,
    margin_scale: float = 1000.0,
) -> Tensor:
    """The official implementation's loss per pair, (g,).

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`): weight of the margin.
        inner_scale, margin_scale (`float`): s and T.
    """
    u = mapo_link(policy_errors, inner_scale)
    return policy_errors[:, 0] + beta * softplus(-margin_scale * (u[:, 0] - u[:, 1]))


class MaPOTrainer(Trainer):
    """Trains on pairs without a reference."""

    method = "mapo"
    _name = "MaPO"
    _tag_names = ("mapo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        "id": "2406.06424",
        "citation": """@article{hong2024marginaware,
  title   = {Margin-aware Preference Optimization for Aligning Diffusion Models without Reference},
  author  = {Hong, Jiwoo and Paul, Sayak and Lee, Noah and Rasul, Kashif and Thorne, James and Jeong, Jongheon},
  journal = {arXiv preprint arXiv:2406.06424},
  year    = {2024}
}""",
    }
    _sources: ClassVar[dict[str, str]] = {
        "form": "official code; `paper` for eq. 9-11",
        "beta": "official code, 0.1; paper form: section 4, 8 to 1024 by task",
        "link_form": "official code multiplies, which is the scale form",
        "inner_scale": "official code, `snr_value` 0.5",
        "margin_scale": "official code, the 1000 training timesteps",
    }
    _not_public: ClassVar[str] = (
        "How beta enters the link function (the text allows a factor or a power), and why "
        "the code weighs the margin a hundred times more than "
        "the paper's 1/beta would."
    )
    config_class = MaPOConfig
    data_kind = "pair"
    reference_free = True
    args: MaPOConfig

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy, _ = self.errors(batch)
        args = self.args
        if args.form == "paper":
            loss = mapo_loss(policy, beta=args.beta, link_form=args.link_form)
        else:
            loss = mapo_code_loss(
                policy, beta=args.beta, inner_scale=args.inner_scale, margin_scale=args.margin_scale
            )
        return loss, margin_metrics(policy)


def margin_metrics(policy_errors: Tensor) -> dict[str, Tensor]:
    """Diagnostics of pairs without a reference, each (g,) and detached: errors, their margin and how often the chosen one is lower (a tie counts one half)."""
    policy = policy_errors.detach()
    margin = policy[:, 1] - policy[:, 0]
    return {
        "errors/chosen": policy[:, 0],
        "errors/rejected": policy[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin.sign() + 1) / 2,
    }
