"""MaPO: Hong, Paul et al. 2024, arXiv 2406.06424, eq. 9-11.

    u(l)  = l / (exp(l) - 1)                                          1 at 0, falling
    paper : loss = m_w - (1/beta) log sigmoid(phi(m_w) - phi(m_l))
            phi  = beta u (scale) or u^beta (power)
    code  : loss = m_w - beta log sigmoid(T [u(s m_w) - u(s m_l)])
            s    = 0.5, T = 1000, beta = 0.1

m are the policy's mean squared denoising errors of the chosen (w) and the rejected (l)
image, at the same timestep and noise. There is no reference model.

The paper does not say whether beta multiplies the link function or is its power. At
beta 1 both agree. The official code is the scale form with beta T at an inner scale s,
which weights the margin a hundred times more than the paper's 1/beta.

Differences from the official code: an error of 0 gives no NaN because a series is used
there, v-prediction and flow targets work, and ties never train.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config.ranges import Positive
from ..config.section import config_section
from ..errors import ConfigError
from ..training.batch import Batch
from ..training.config import TrainingConfig
from ..training.trainer import Trainer

LinkForm = Literal["scale", "power"]
LINK_FORMS = get_args(LinkForm)


@config_section
class MaPOConfig(TrainingConfig):
    """`train:` for `method: mapo`.

    Example:
        ```python
        from diffalign import MaPOConfig

        args = MaPOConfig(output_dir="runs/mapo", form="paper", beta=8, max_steps=2000)
        assert args.link_form == "scale"
        ```
    """

    form: Literal["code", "paper"] = "code"
    """code: the official implementation's loss; paper: equations 9 to 11. beta means
    different things in them. Source: official code; `paper` for eq. 9-11."""
    beta: Positive[float] = 0.1
    """code: weight of the margin (official 0.1). paper: 8 general, 32 culture, 64
    safety and style, 1024 personalization. Source: official code, 0.1; paper form:
    section 4, 8 to 1024 by task."""
    link_form: LinkForm = "scale"
    """Of the paper form, where the text is ambiguous: scale (beta u) | power (u^beta).
    Source: official code multiplies, which is the scale form."""
    inner_scale: Positive[float] = 0.5
    """s of the code form, its `snr_value`. Source: official code, `snr_value` 0.5."""
    margin_scale: Positive[float] = 1000.0
    """T of the code form, its number of training timesteps. Source: official code, the
    1000 training timesteps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction == "sum":
            raise ConfigError(
                "reduction",
                "the link of MaPO is 0 at errors that are summed over the elements; set mean",
            )


def mapo_link(errors: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the link function u(q) = q / (exp(q) - 1) of q = scale * errors.

    Below 1e-3 it is the series 1 - q/2 + q^2/12, because the expression is 0/0 at 0 and
    its gradient cancels near it.

    Args:
        errors (`Tensor`): Denoising errors, any shape.
        scale (`float`, *optional*, defaults to `1.0`): Factor of the errors.

    Returns:
        `Tensor`: Values in (0, 1], of the same shape.
    """
    q = scale * errors
    small = q.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(q), q)
    # exp(-q) / (1 - exp(-q)) is 1 / (exp(q) - 1), and has a finite gradient at large q.
    link = safe * torch.exp(-safe) / -torch.expm1(-safe)
    return torch.where(small, 1 - q / 2 + q.square() / 12, link)


def mapo_loss(policy_errors: Tensor, *, beta: float, link_form: str = "scale") -> Tensor:
    """Compute the loss of the paper (eq. 9-11).

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`): beta of the paper, > 0.
        link_form (`str`, *optional*, defaults to `"scale"`): `scale` or `power`.

    Returns:
        `Tensor`: Loss per pair, (g,).

    Raises:
        ValueError: Another link form.
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
    """Compute the loss of the official code.

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.
        beta (`float`, *optional*, defaults to `0.1`): Weight of the margin.
        inner_scale (`float`, *optional*, defaults to `0.5`): s.
        margin_scale (`float`, *optional*, defaults to `1000.0`): T.

    Returns:
        `Tensor`: Loss per pair, (g,).
    """
    u = mapo_link(policy_errors, inner_scale)
    return policy_errors[:, 0] + beta * softplus(-margin_scale * (u[:, 0] - u[:, 1]))


class MaPOTrainer(Trainer):
    """Trains on pairs without a reference.

    Example:
        ```python
        from peft import LoraConfig

        from diffalign import MaPOConfig, MaPOTrainer

        trainer = MaPOTrainer(
            model="shapes",
            args=MaPOConfig(output_dir="runs/mapo", max_steps=5),
            train_dataset="diffalign-quickstart/dataset",  # from `diffalign quickstart`
            peft_config=LoraConfig(r=16, lora_alpha=16),
        )
        trainer.train()
        ```
    """

    method = "mapo"
    _name = "MaPO"
    _tag_names = ("mapo",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Margin-aware Preference Optimization for Aligning Diffusion Models "
        "without Reference",
        "id": "2406.06424",
        "citation": """@article{hong2024marginaware,
  title   = {Margin-aware Preference Optimization for Aligning Diffusion Models without
             Reference},
  author  = {Hong, Jiwoo and Paul, Sayak and Lee, Noah and Rasul, Kashif and Thorne, James and
             Jeong, Jongheon},
  journal = {arXiv preprint arXiv:2406.06424},
  year    = {2024}
}""",
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
        """Compute the MaPO loss. See `Trainer.compute_loss`."""
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
    """Compute the metrics of pairs without a reference.

    Args:
        policy_errors (`Tensor`): (g, 2), chosen first.

    Returns:
        `dict[str, Tensor]`: Errors, their margin and the accuracy, each (g,), without
        gradient. Equal errors count one half in the accuracy.
    """
    policy = policy_errors.detach()
    margin = policy[:, 1] - policy[:, 0]
    return {
        "errors/chosen": policy[:, 0],
        "errors/rejected": policy[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin.sign() + 1) / 2,
    }
