"""The network that trains when the towers of a scorer do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import ConfigError
from ..rewards.learned.heads import FactorHead
from ..rewards.learned.losses import anchor_loss
from ..rewards.learned.tower_weights import (
    TOWERS,
    add_lora,
    default_targets,
    put_state,
    tower_list,
    trained_state,
)
from ..rewards.model_scorer import ModelScorer
from ..runtime.files import read_tensors, save_tensors
from ..training.build import check_peft_config
from ..training.guardian import change_interval
from .pair_groups import PairBatch

_TRAINED = "_towers_are_trained"


def check_trainable(scorer: Any) -> None:
    """Check that the towers of a scorer can be trained.

    Raises:
        ConfigError: They have no gradient, or they have been trained already.
    """
    if getattr(scorer, _TRAINED, False):
        raise ConfigError("model", f"the towers of this {scorer.name} were trained; load it again")
    if (
        not isinstance(scorer, ModelScorer)
        or not scorer.differentiable
        or not len(tower_list(scorer))
    ):
        raise ConfigError(
            "model",
            f"{scorer.name} has no towers that can be trained; take clip-l14, clip-h14, pickscore, "
            "hpsv2.1, open_clip:NAME/TAG, imagereward or shapes-clip",
        )


class TowerNetwork(nn.Module):
    """A scorer's towers, and the factor of its scores.

    Args:
        scorer (`ModelScorer`): Its towers are trained in place.
        lora (`LoraConfig`, *optional*): The LoRA to train. None trains all weights.
    """

    def __init__(self, scorer: Any, lora: Any = None) -> None:
        super().__init__()
        setattr(scorer, _TRAINED, True)
        self.scorer = scorer
        self.towers = tower_list(scorer)
        self.head = FactorHead()
        self.lora: Any = None
        if lora is None:
            self.towers.requires_grad_(True)
        else:
            check_peft_config(lora)
            for name in ("lora_bias", "trainable_token_indices"):
                if getattr(lora, name, None):
                    raise ConfigError(f"peft_config.{name}", "is not saved; leave it out")
            self.lora = copy.deepcopy(lora)
            if self.lora.target_modules is None:
                self.lora.target_modules = default_targets(self.towers)
            add_lora(self.towers, self.lora)
        for name, parameter in self.towers.named_parameters():
            # The factor of the head is trained in its place.
            if name.endswith(("logit_scale", "logit_bias")):
                parameter.requires_grad_(False)

    def forward(
        self,
        pixels: Tensor,
        prompts: list[str],
        owner: Tensor,
        winners: Tensor | None = None,
        captioned: tuple[Tensor, list[str]] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Score images.

        Args:
            pixels (`Tensor`): (m, 3, size, size).
            prompts (`list[str]`): g prompts.
            owner (`Tensor`): Prompt of each image, (m,).
            winners (`Tensor`, *optional*): An image of each prompt, (g,), for the
                contrastive loss.
            captioned (`tuple[Tensor, list[str]]`, *optional*): Other images
                (c, 3, size, size) and their captions for it.

        Returns:
            `tuple[Tensor, Tensor | None]`: Scores (m,), float32, and the contrastive
            loss (g,) or (c,).
        """
        texts = self.scorer.text_features(prompts)
        images = self.scorer.image_features(pixels)
        rows = tuple(features[owner] for features in texts)
        scores = self.head(self.scorer.similarity(images, rows).float())
        if captioned is not None:
            other, captions = captioned
            shown = self.scorer.text_features(captions)[0], self.scorer.image_features(other)
            return scores, self._contrast(*shown, captions)
        if winners is not None:
            return scores, self._contrast(texts[0], images[winners], prompts)
        return scores, None

    def train(self, mode: bool = True) -> TowerNetwork:
        """Set training mode. Batch norms keep the statistics of their pre-training."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _contrast(self, texts: Tensor, images: Tensor, prompts: list[str]) -> Tensor:
        names = [prompts.index(prompt) for prompt in prompts]
        number = torch.tensor(names, device=images.device)
        same = number[:, None] == number[None]
        scale = self.scorer.clip.module.logit_scale.float().exp()
        with torch.autocast(images.device.type, enabled=False):  # the logits are large
            return anchor_loss(texts.float(), images.float(), scale, same)

    def freeze_unused(self, batch: PairBatch) -> None:
        """Freeze the parameters that no score depends on.

        Processes would wait for their gradients.

        Args:
            batch (`PairBatch`): Any groups.
        """
        scores, _ = self(batch.pixels, batch.prompts, batch.owner)
        scores.sum().backward()
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass.

        Raises:
            ConfigError: A tower cannot do that.
        """
        for tower in self.towers:
            module: Any = tower
            if getattr(module, "supports_gradient_checkpointing", False):
                options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
                module.gradient_checkpointing_enable(**options)
            elif hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(True)
            elif sum(p.numel() for p in module.parameters()) > 10**7:
                raise ConfigError(
                    "gradient_checkpointing", f"{type(module).__name__} has none; set it to false"
                )


class TowerWeights:
    """Saves and loads the trainable weights of a network. See `TrainedWeights`."""

    def __init__(self, network: TowerNetwork) -> None:
        self.network = network
        self.description = "full towers" if network.lora is None else "LoRA of the towers"

    def gather(self, accelerator: Accelerator, prepared: nn.Module) -> dict[str, Tensor]:
        """See `TrainedWeights.gather`."""
        return trained_state(self.network)

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        """See `TrainedWeights.write`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(state, folder / TOWERS)

    def write_checkpoint(self, folder: Path, state: dict[str, Tensor]) -> None:
        """See `TrainedWeights.write_checkpoint`."""
        self.write(folder, state)

    def read_checkpoint(self, folder: Path) -> None:
        """See `TrainedWeights.read_checkpoint`."""
        put_state(self.network, read_tensors(folder / TOWERS)[0])


class BestStep:
    """Keeps the weights with the lowest validation loss. See `CheckpointPart`.

    The base is kept, too. It replaces the best trained weights if it is better than
    they are beyond chance. A few prompts, some with wrong labels, cannot tell.

    Args:
        network (`TowerNetwork`): Its weights are kept. They are the base's.

    Attributes:
        loss (`float`): The lowest validation loss.
        step (`int`): Where it was, 0 for the base.
        state (`dict[str, Tensor]`): The weights there.
        losses (`list[float]`): Loss of each validation prompt there.
    """

    FILE = "best.safetensors"

    def __init__(self, network: TowerNetwork) -> None:
        self.network = network
        self.loss, self.step = float("inf"), 0
        self.state: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.base = trained_state(network)

    def offer(self, loss: float, step: int, losses: list[float]) -> None:
        """Keep the weights as they are if this is the lowest loss.

        Args:
            loss (`float`): On all validation pairs.
            step (`int`): Optimizer steps done.
            losses (`list[float]`): Of each validation prompt, at the factor of the
                margins that fits best.
        """
        if loss < self.loss:
            self.loss, self.step, self.state = loss, step, trained_state(self.network)
            self.losses = losses

    def put_back(self, base_loss: float, base_losses: list[float]) -> None:
        """Load the kept weights into the network, or the base's if these are better.

        Args:
            base_loss (`float`): Validation loss of the base.
            base_losses (`list[float]`): Of each prompt.
        """
        trained, base = np.array(self.losses)[:, None], np.array(base_losses)[:, None]
        is_worse = not self.state  # no loss was finite
        if len(trained) == len(base):
            is_worse |= change_interval(trained, base, level=0.95)[2] < 0
        if is_worse:
            self.loss, self.step, self.state = base_loss, 0, self.base
        put_state(self.network, self.state)

    def save(self, folder: Path, rank: int) -> None:
        """See `CheckpointPart.save`."""
        if rank == 0 and self.state:
            facts = {"loss": repr(self.loss), "step": str(self.step)}
            facts["losses"] = json.dumps(self.losses)
            save_tensors(self.state, folder / self.FILE, metadata=facts)

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """See `CheckpointPart.load`."""
        if (folder / self.FILE).is_file():
            self.state, facts = read_tensors(folder / self.FILE)
            self.loss, self.step = float(facts["loss"]), int(facts["step"])
            self.losses = json.loads(facts.get("losses", "[]"))
