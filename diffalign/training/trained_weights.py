"""What a run trains and saves: a LoRA, or all weights of the network.

A method that trains something else brings a class of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from ..backbones import Backbone
from ..backbones.lora import lora_state
from ..errors import UserError
from ..runtime.distributed import reshard, sharded_modules, whole
from .sharding import load_weights, plain_network

LORA_FILE = "pytorch_lora_weights.safetensors"
REWARD_FILE = "reward.json"
REWARD_RUN = ".reward-run"
"""Marks a folder where the towers of a reward are being trained."""
FINAL_FILES = (
    LORA_FILE,
    "model_index.json",
    "user_adapter.safetensors",
    "diffusion_pytorch_model.safetensors",
    REWARD_FILE,
)
"""Files by which a folder with finished weights is known."""
State = dict[str, Tensor]


class TrainedWeights(Protocol):
    """Saves and loads the trained weights of a run.

    Attributes:
        description (`str`): What trains, in words.
    """

    description: str

    def gather(self, accelerator: Accelerator, prepared: Module) -> State:
        """Read the weights, whole. All processes must call this.

        Args:
            accelerator (`Accelerator`): Gathers sharded weights.
            prepared: The network as accelerate prepared it.
        """
        ...

    def write(self, folder: Path, state: State) -> None:
        """Write the weights for inference. The first process calls this.

        Args:
            folder (`Path`): Created by this, or empty.
            state (`dict[str, Tensor]`): Of `gather`.
        """
        ...

    def write_checkpoint(self, folder: Path, state: State) -> None:
        """Write the weights into a checkpoint's folder. The first process calls this.

        Args:
            folder (`Path`): Folder of the checkpoint.
            state (`dict[str, Tensor]`): Of `gather`.
        """
        ...

    def read_checkpoint(self, folder: Path) -> None:
        """Load the weights of a checkpoint into the network, bit for bit.

        Args:
            folder (`Path`): Folder of the checkpoint.
        """
        ...


class LoraWeights:
    """The LoRA of a network, in one file that diffusers reads.

    Args:
        backbone (`Backbone`): Names the network in the file.
        network: The network with its adapter.
    """

    description = "LoRA"

    def __init__(self, backbone: Backbone, network: Any) -> None:
        self.backbone, self.network = backbone, network

    def gather(self, accelerator: Accelerator, prepared: Module) -> State:
        """See `TrainedWeights.gather`."""
        reshard(self.network)
        return lora_state(self.network)

    def write(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write`."""
        self.backbone.save_lora(str(folder), self.network, state)

    def write_checkpoint(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write_checkpoint`."""
        self.write(folder, state)

    def read_checkpoint(self, folder: Path) -> None:
        """See `TrainedWeights.read_checkpoint`.

        Raises:
            UserError: The weights do not fit the network.
        """
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft import set_peft_model_state_dict
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import load_file

        prefix = f"{self.backbone.network_name}."
        state = {
            n.removeprefix(prefix): t
            for n, t in load_file(folder / LORA_FILE).items()
            if n.startswith(prefix)
        }
        state = convert_unet_state_dict_to_peft(state)
        if sharded_modules(self.network):
            reshard(self.network)
            load_weights(self.network, get_peft_model_state_dict(self.network), state)
            return
        result = set_peft_model_state_dict(self.network, state, adapter_name="default")
        if result is not None and result.unexpected_keys:
            raise UserError(
                f"{folder}: the LoRA does not fit this network; unexpected keys "
                f"{result.unexpected_keys[:3]}"
            )


def gather_network(accelerator: Accelerator, prepared: Module, network: Any) -> State:
    """Gather all weights of a network, sharded or not. All processes must call this.

    Args:
        accelerator (`Accelerator`): Of the run.
        prepared: The network as the accelerator has prepared it.
        network: The network itself.

    Returns:
        `State`: On the CPU. Of a sharded network, only the main process gets it.
    """
    if not sharded_modules(network):
        return accelerator.get_state_dict(prepared)
    reshard(network)
    state: State = {}
    for name, tensor in network.state_dict().items():
        gathered = whole(tensor)  # one at a time, and only the first process keeps it
        if accelerator.is_main_process:
            state[name] = gathered.cpu()
    return state


def write_network(folder: Path, network: Any, state: State) -> None:
    """Write a network as diffusers does, sharded or not.

    Args:
        folder (`Path`): New folder.
        network: The network.
        state (`State`): Its whole weights.
    """
    if sharded_modules(network):
        plain_network(network, state).save_pretrained(folder)
    else:
        network.save_pretrained(folder, state_dict=state)


def read_network(folder: Path, network: Any) -> None:
    """Read the weights of `write_network` into a network, sharded or not.

    Args:
        folder (`Path`): What `write_network` wrote.
        network: Of the same class and configuration.
    """
    loaded = type(network).from_pretrained(folder, use_safetensors=True)
    if sharded_modules(network):
        reshard(network)
        load_weights(network, network.state_dict(), loaded.state_dict())
    else:
        network.load_state_dict(loaded.state_dict())


class FullWeights:
    """All weights of the network: a whole pipeline, or the network's folder.

    Args:
        backbone (`Backbone`): Knows the other parts of the pipeline.
        network: The network.
    """

    description = "full fine-tuning"

    def __init__(self, backbone: Backbone, network: Any) -> None:
        self.backbone, self.network = backbone, network

    def gather(self, accelerator: Accelerator, prepared: Module) -> State:
        """See `TrainedWeights.gather`."""
        return gather_network(accelerator, prepared, self.network)

    def write(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write`."""
        is_sharded = bool(sharded_modules(self.network))
        network = plain_network(self.network, state) if is_sharded else self.network
        pipeline = self.backbone.pipeline(network=network)
        pipeline.save_pretrained(folder, safe_serialization=True)
        if not is_sharded:
            self.write_checkpoint(folder, state)

    def write_checkpoint(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write_checkpoint`."""
        place = folder / self.backbone.network_name
        write_network(place, self.network, state)

    def read_checkpoint(self, folder: Path) -> None:
        """See `TrainedWeights.read_checkpoint`."""
        read_network(folder / self.backbone.network_name, self.network)
