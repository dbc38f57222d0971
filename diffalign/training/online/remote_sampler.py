"""Draw the images of a round on a server, and score them here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from ...backbones import Backbone
from ...backbones.lora_formats import fold_alpha, read_lora, write_lora
from ...data.config import DataConfig
from ...errors import ConfigError
from ...runtime.missing import MaybeImage, Missing
from ...runtime.weight_files import USUAL_LORA
from ..batch import Batch
from ..data_pipeline import build_transform
from ..trained_weights import TrainedWeights
from .policy_sampler import LateScores
from .reward_function import RewardFunction, ScoreAhead
from .rollout import Trajectories
from .rollout_server import RolloutServer


def connect_servers(
    field: str,
    addresses: Sequence[str],
    backbone: Backbone,
    data_config: DataConfig,
    has_lora: bool,
    num_inference_steps: int,
    guidance_scale: float,
) -> RolloutServer:
    """Reach the servers that draw the images of a run.

    Args:
        field (`str`): Name of the setting, for the message.
        addresses (`Sequence[str]`): Addresses of servers with the run's model.
        backbone (`Backbone`): The model.
        data_config (`DataConfig`): Gives the size of the images.
        has_lora (`bool`): Whether a LoRA trains.
        num_inference_steps (`int`): Steps of the sampler.
        guidance_scale (`float`): In the scale of the family's pipelines. A model with
            embedded guidance draws with that.

    Raises:
        ConfigError: All weights train, or an address is none.
        UserError: A server cannot be reached.
    """
    if not has_lora:
        raise ConfigError(
            field, "a server can only take a LoRA; give a lora section, or leave it out"
        )
    width, height = reversed(build_transform(data_config, backbone).sizes[0])
    embedded = backbone.guidance if backbone.embeds_guidance else None
    settings = {
        "size": f"{width}x{height}",
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale if embedded is None else embedded,
    }
    return RolloutServer(addresses, settings)


class RemoteSampler:
    """Draws final latents on a server, with the LoRA of the moment.

    Each image has a seed of its own, from its row and its epoch. The autoencoder
    encodes what comes back, at the mean of its posterior.

    Args:
        server (`RolloutServer`): Draws the images.
        backbone (`Backbone`): Encodes them.
        accelerator (`Accelerator`): Processes of the run. The first one pushes the
            weights.
        trained (`TrainedWeights`): Writes the LoRA.
        prepared: The network that trains, as accelerate prepared it.
        folder (`Path`): Folder for the pushed LoRAs.
        weights (`Callable`): Returns the context in which the network has the weights
            that draw.
    """

    def __init__(
        self,
        server: RolloutServer,
        backbone: Backbone,
        accelerator: Accelerator,
        trained: TrainedWeights,
        prepared: Module,
        folder: Path,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.server, self.backbone, self.accelerator = server, backbone, accelerator
        self.trained, self.prepared = trained, prepared
        self.folder, self.weights = folder, weights
        self.pushed = ""
        # Images come from elsewhere, so scoring overlaps drawing on a CPU as well.
        self.pool = ThreadPoolExecutor(1)

    def push(self, weights: AbstractContextManager[None] | None = None) -> None:
        """Give the server the weights that draw. All processes must call this.

        A LoRA that changes nothing yet is not pushed, and neither are weights that the
        server has.

        Args:
            weights: Context in which the network has other weights, for an evaluation.
                None takes those that draw.
        """
        with self.weights() if weights is None else weights:
            state = self.trained.gather(self.accelerator, self.prepared)
            name = f"weights-{_digest(state)}"
        if name == self.pushed:
            return
        active = any(
            bool(tensor.abs().max() > 0)
            for key, tensor in state.items()
            if "lora_B" in key or "lora.up" in key
        )
        if self.accelerator.is_main_process:
            if active:
                folder = self.folder / name
                folder.mkdir(parents=True, exist_ok=True)
                self.trained.write(folder, state)
                # vLLM-Omni and SGLang read no metadata, where diffusers keeps alpha.
                file = folder / USUAL_LORA
                write_lora(fold_alpha(read_lora(file, "rollout_server")), file, "diffusers")
                self.server.push(folder, name)
                for old in self.folder.glob("weights-*"):
                    if old.name != name:
                        shutil.rmtree(old, ignore_errors=True)
            else:
                self.server.clear()
        self.accelerator.wait_for_everyone()
        if active and not self.accelerator.is_main_process:
            path = str((self.folder / name).resolve())
            self.server.lora = {"name": name, "path": path, "scale": 1.0}
        self.pushed = name

    def __call__(
        self,
        batch: Batch,
        k: int,
        reward_function: RewardFunction | None,
        purpose: str,
    ) -> tuple[Trajectories, LateScores]:
        """Draw k images for every prompt, and score them. See `PolicySampler`."""
        prompts = [prompt for prompt in batch.prompts for _ in range(k)]
        seeds = [
            int(torch.randint(2**31 - 1, (), generator=generator))
            for generator in batch.generators(f"{purpose}-server")
            for _ in range(k)
        ]
        ahead = None
        if reward_function is not None:
            ahead = ScoreAhead(reward_function, prompts, self.pool)
        images = self.server.draw(prompts, seeds, ahead)
        shape = (len(batch), k)
        latents = self._encode(images, batch.x0.shape[2:]).unflatten(0, shape)[:, :, None]
        grouped: list[Any] = [images[i : i + k] for i in range(0, len(images), k)]
        return Trajectories(latents, torch.zeros(*shape, 0), grouped), LateScores(ahead, shape)

    def _encode(self, images: Sequence[MaybeImage], shape: torch.Size) -> Tensor:
        """Latents of images, (n, C, h, w) on the CPU. Zeros for missing ones."""
        parts = []
        for image in images:
            if isinstance(image, Missing):
                parts.append(torch.zeros(1, *shape))
                continue
            pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 127.5 - 1
            mean, _ = self.backbone.encode_images(pixels.permute(2, 0, 1)[None])
            parts.append(mean.float().cpu())
        return torch.cat(parts)


def _digest(state: dict[str, Tensor]) -> str:
    """A name for weights: servers keep what they have read by its name."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
