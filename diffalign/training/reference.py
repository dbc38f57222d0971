"""Reference models: the frozen or earlier weights that a policy is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from ..backbones import Backbone
from ..backbones.lora import unwrapped
from ..config.yaml_text import shown
from ..errors import ConfigError, UserError
from ..likelihood import VariancePreserving
from ..runtime.distributed import copy_whole, is_sharded, reshard, sharded_modules, whole
from ..runtime.offload import offload_layers


class Reference(Protocol):
    """A model that the policy is compared with.

    Attributes:
        description (`str`): What it is, for the run's messages.
    """

    description: str

    def start(self) -> None:
        """Run once the network is prepared, before the first prediction."""
        ...

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the model without gradient and without dropout.

        Args:
            backbone (`Backbone`): Calls networks of this family.
            noisy (`Tensor`): Noisy latents, (n, C, H, W).
            times (`Tensor`): Times as the network expects them, (n,).
            condition (`dict[str, Tensor]`): n rows each.

        Returns:
            `Tensor`: The output of the network, (n, C, H, W).
        """


def without_dropout(network: Module) -> Any:
    """Put a network into training mode, with its dropout off.

    `eval()` must not be called here. diffusers' residual blocks choose memory layouts
    by the mode, and other layouts round differently. Equal policy and reference would
    then predict differently.

    Args:
        network: Changed in place.

    Returns:
        The network.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    return network


class DropoutOff:
    """Context manager factory that turns a network's dropout off.

    Args:
        network: Its dropout layers are listed now. Later ones are not turned off.
    """

    def __init__(self, network: Module) -> None:
        self.layers = [
            module
            for module in network.modules()
            if isinstance(module, torch.nn.modules.dropout._DropoutNd)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Turn dropout off while the block runs."""
        active = [layer for layer in self.layers if layer.training]
        for layer in active:
            layer.eval()
        try:
            yield
        finally:
            for layer in active:
                layer.train()


class AdapterOffReference:
    """The network with its LoRA turned off, which needs no second model in memory.

    Args:
        network: The network with its adapter.
    """

    description = "adapter-off (the base weights under the LoRA)"

    def __init__(self, network: Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network, self.dropout_off = network, DropoutOff(network)
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Turn the adapters off while the block runs."""
        # Not by `enable_adapters`, which also goes through all parameters and freezes
        # them: 20 ms per pass on SDXL, and another version of every compiled block.
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    def start(self) -> None:
        """Do nothing, because the network itself is the reference."""

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the network without its LoRA. See `Reference.predict`."""
        with torch.no_grad(), self.adapters_off(), self.dropout_off():
            return backbone.predict(self.network, noisy, times, condition)


def _put(parameter: torch.nn.Parameter, weights: Tensor) -> Tensor:
    """Give a parameter other weights, and return its own."""
    if is_sharded(parameter):
        before = parameter.detach().clone()
        if is_sharded(weights):
            parameter.data.copy_(weights)
        else:  # from a file
            copy_whole(parameter.data, weights)
        return before
    before = parameter.data
    parameter.data = weights
    return before


class SnapshotReference:
    """The policy as it was at some moment.

    The trainable weights are copied, and put into the network for a prediction. Under
    LoRA this costs the memory of the adapter, under full fine-tuning that of a second
    model.

    Args:
        network: Its current weights are the first snapshot.
    """

    description = "the policy at the beginning of the round (iterated)"
    field: ClassVar[str] = "train.reference"
    """Setting that asks for this reference, for messages."""
    file: ClassVar[str] = "reference.safetensors"
    """Name of its weights in a checkpoint."""

    def __init__(self, network: Module) -> None:
        self.network, self.dropout_off = network, DropoutOff(network)
        self.weights: dict[str, Tensor] = {}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.shards: list[Any] = []

    def start(self) -> None:
        """Take the first snapshot.

        The trainable parameters are listed now, because sharding replaces the objects.
        """
        network = self.network
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shards = sharded_modules(network)
        self.take()

    def take(self) -> None:
        """Copy the current weights of the network."""
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def in_place(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with other weights in the network.

        Plain weights are exchanged without a copy. Weights of a sharded network are
        copied, because it reads the storage that it was sharded with.

        Args:
            weights (`dict[str, Tensor]`): One tensor per trainable parameter.
        """
        if self.shards:
            reshard(self.network)
        current = {name: _put(p, weights[name]) for name, p in self.parameters.items()}
        try:
            yield
        finally:
            if self.shards:
                reshard(self.network)
            for name, p in self.parameters.items():
                _put(p, current[name])

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the network with the copied weights. See `Reference.predict`."""
        with torch.no_grad(), self.in_place(self.weights), self.dropout_off():
            return backbone.predict(self.network, noisy, times, condition)

    def save(self, folder: Path, rank: int) -> None:
        """Write the weights into a checkpoint. All processes hold the same.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process. The first one writes.
        """
        from safetensors.torch import save_file

        # Gathered on all processes, written by the first one.
        tensors = {name: whole(w).cpu().contiguous() for name, w in self.weights.items()}
        if rank == 0:
            save_file(tensors, folder / self.file)

    def load(self, folder: Path, rank: int, device: torch.device) -> None:
        """Read the weights from a checkpoint.

        Args:
            folder (`Path`): Folder of the checkpoint.
            rank (`int`): Number of this process.
            device (`torch.device`): Device of the weights.

        Raises:
            UserError: The checkpoint holds no reference.
        """
        from ..runtime.files import read_tensors

        if not (folder / self.file).is_file():
            raise UserError(
                f"{self.field}: {folder} holds no reference; it was saved by a run with "
                "another setting"
            )
        saved = read_tensors(folder / self.file)[0]
        if self.shards:
            for name, weights in self.weights.items():
                copy_whole(weights, saved[name])
        else:
            self.weights = {name: w.to(device) for name, w in saved.items()}


class BlendedReference(SnapshotReference):
    """A slow average of the policy, from its starting weights on.

    Args:
        network: The network that trains.
        decay (`float`): Share of the average that stays at each `blend`, in [0, 1].
    """

    field = "train.reference_decay"

    def __init__(self, network: Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay
        self.description = f"an average of the policy (decay {decay:g})"

    @torch.no_grad()
    def blend(self) -> None:
        """Move the average towards the current weights."""
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter.detach(), 1 - self.decay)


class StartLoraReference(SnapshotReference):
    """The network with the LoRA that the run started from."""

    description = "the starting LoRA"


class FrozenCopyReference:
    """A second network with frozen weights.

    Args:
        network: Copied now, or used as it is.
        device (`torch.device`): Where it runs.
        offload (`bool`, *optional*, defaults to `False`): Keep it on the CPU between
            calls.
        copy_weights (`bool`, *optional*, defaults to `True`): Copy the network.
        by_layers (`bool`, *optional*, defaults to `False`): Keep it on the CPU and run
            it layer by layer.
        shard (`Callable`, *optional*): Spreads a network over the processes.

    Raises:
        ConfigError: It is to be sharded and offloaded.
    """

    def __init__(
        self,
        network: Module,
        device: torch.device,
        offload: bool = False,
        copy_weights: bool = True,
        by_layers: bool = False,
        shard: Callable[[Module], Module] | None = None,
    ) -> None:
        self.network = without_dropout(
            (copy.deepcopy(network) if copy_weights else network).requires_grad_(False)
        )
        self.device, self.offload = device, offload and device.type != "cpu"
        self.is_movable = shard is None and not by_layers
        if shard is not None:
            if offload or by_layers:
                raise ConfigError(
                    "train.offload_reference",
                    "a reference that is spread over the processes stays on them; set "
                    "offload_reference to false and offload to none",
                )
            self.network = shard(self.network)
        elif by_layers:
            self.offload = False
            offload_layers(self.network.to("cpu"), device)
        else:
            self.network.to("cpu" if self.offload else device)
        self.description = (
            "frozen copy of the starting weights" if copy_weights else "frozen network"
        ) + (" (offloaded)" if self.offload or by_layers else "")

    def start(self) -> None:
        """Do nothing, because the copy was made before the network was prepared."""

    def rest(self) -> None:
        """Wait on the CPU between calls from now on, unless the network is spread."""
        if self.is_movable and self.device.type != "cpu":
            self.offload = True
            self.network.to("cpu")

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the frozen network. See `Reference.predict`."""
        if self.offload:
            self.network.to(self.device)
        with torch.no_grad():
            prediction = backbone.predict(self.network, noisy, times, condition)
        if self.offload:
            self.network.to("cpu")
        return prediction


def check_reference(backbone: Backbone, ref_backbone: Backbone) -> None:
    """Check that the outputs of policy and reference mean the same.

    Args:
        backbone (`Backbone`): The policy's model.
        ref_backbone (`Backbone`): The reference's model.

    Raises:
        ConfigError: The reference is the policy's own pipeline, or its family,
            prediction type, noise schedule or inputs differ.
    """
    mine, theirs = backbone.source, ref_backbone.source
    name, network = shown(ref_backbone.source.name), backbone.network_name
    if mine.pipe is not None and theirs.pipe is not None:
        parts = (getattr(mine.pipe, network), getattr(theirs.pipe, ref_backbone.network_name, None))
        if unwrapped(parts[0]) is unwrapped(parts[1]):
            raise ConfigError(
                "ref_model",
                "is the policy's own pipeline, which trains; leave it out, or load the "
                "pipeline a second time",
            )
    if type(ref_backbone) is not type(backbone):
        raise ConfigError(
            "ref_model",
            f"{name} is of another model family than the policy "
            f"({theirs.pipeline_class_name}, {mine.pipeline_class_name})",
        )
    kinds = ref_backbone.schedule.prediction_type, backbone.schedule.prediction_type
    if kinds[0] != kinds[1]:
        raise ConfigError(
            "ref_model",
            f"{name} predicts {kinds[0]}, the policy {kinds[1]}; their errors cannot be compared",
        )
    theirs_schedule, my_schedule = ref_backbone.schedule, backbone.schedule
    same = theirs_schedule.num_timesteps == my_schedule.num_timesteps
    if isinstance(theirs_schedule, VariancePreserving) and isinstance(
        my_schedule, VariancePreserving
    ):
        alphas = theirs_schedule.alphas_cumprod, my_schedule.alphas_cumprod
        same = same and torch.allclose(*alphas, rtol=1e-4, atol=1e-7)
    if not same:
        raise ConfigError(
            "ref_model",
            f"{name} has another noise schedule than the policy; give both the same scheduler",
        )
    configs = [part.source.component_config(part.network_name) for part in (ref_backbone, backbone)]
    for field in (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    ):
        values = [config.get(field) for config in configs]
        if values[0] != values[1]:
            raise ConfigError(
                "ref_model",
                f"{name} has {field} {values[0]}, the policy {values[1]}; it must read the "
                "same inputs",
            )


def build_reference(
    backbone: Backbone,
    network: Module,
    ref_backbone: Backbone | None,
    is_lora: bool,
    device: torch.device,
    offload: bool,
    has_start_lora: bool = False,
    by_layers: bool = False,
    shard: Callable[[Module], Module] | None = None,
) -> Reference:
    """Build the fixed reference of a run.

    It is another model, the starting LoRA, the network without its adapter, or a frozen
    copy.

    Args:
        backbone (`Backbone`): The policy's model.
        network: The policy.
        ref_backbone (`Backbone`, *optional*): Another model as the reference.
        is_lora (`bool`): Whether the policy has an adapter.
        device (`torch.device`): Where the reference runs.
        offload (`bool`): Keep a second network on the CPU between calls.
        has_start_lora (`bool`, *optional*, defaults to `False`): Whether the adapter
            has the weights of an earlier LoRA.
        by_layers (`bool`, *optional*, defaults to `False`): Keep a second network on
            the CPU and run it layer by layer.
        shard (`Callable`, *optional*): Spreads a second network over the processes, as
            the policy will be.
    """
    if ref_backbone is not None:
        ref_backbone.place(device, backbone.dtype)
        return FrozenCopyReference(
            ref_backbone.load_network(backbone.dtype),
            device,
            offload,
            copy_weights=False,
            by_layers=by_layers,
            shard=shard,
        )
    if has_start_lora:
        return StartLoraReference(network)
    if is_lora:
        return AdapterOffReference(network)
    if shard is not None and backbone.source.pipe is None:
        # Read once more: no process ever holds two whole networks on its device.
        starting = backbone.source.load(backbone.network_name, torch.float32)
        return FrozenCopyReference(starting, device, offload, False, by_layers, shard)
    return FrozenCopyReference(network, device, offload, by_layers=by_layers, shard=shard)
