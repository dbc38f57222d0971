"""What a step of a run takes: parameters, work and memory, without weights and data.

The network is built from its configuration alone. One step runs on tensors without
content, which count their bytes and the operations on them.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from ..backbones import Backbone
from ..errors import ConfigError, UserError
from ..runtime.distributed import is_sharded, sharded_modules
from .build import DTYPES, build_network, trainable_parameters
from .config import TrainingConfig
from .memory import cast_layers
from .reference import AdapterOffReference
from .sharding import block_names

if TYPE_CHECKING:
    from peft import LoraConfig

GIB = 2**30
GPUS = {
    "rtx2080ti": 11, "rtx3060": 12, "rtx3080": 10, "rtx3080ti": 12, "rtx3090": 24, "rtx3090ti": 24,
    "rtx4060": 8, "rtx4060ti": 16, "rtx4070": 12, "rtx4070super": 12, "rtx4070ti": 12,
    "rtx4070tisuper": 16, "rtx4080": 16, "rtx4080super": 16, "rtx4090": 24, "rtx5060ti": 16,
    "rtx5070": 12, "rtx5070ti": 16, "rtx5080": 16, "rtx5090": 32, "rtx6000ada": 48,
    "a4000": 16, "a5000": 24, "a6000": 48, "t4": 14.7, "v100": 16, "v100-32gb": 32, "l4": 22.2,
    "a10": 22.2, "a10g": 22.2, "l40s": 44.5, "a100-40gb": 40, "a100": 80, "a100-80gb": 80,
    "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip
"""Name of a GPU -> its memory in GiB."""
LARGEST = 300
"""GiB of a GPU that are believed: larger numbers are names of cards."""
CONTEXT = 0.8
"""GiB that CUDA, its libraries and fragments of memory take beside the tensors."""
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_fused": 8.0, "adamw_8bit": 2.0, "adafactor": 0.1}
_OPTIMIZER_BYTES["prodigy"] = 16.0
_QUANTISED_BYTES = {"nf4": 0.5625, "int8": 1.0, "fp8": 1.0}


_ACTIVATIONS = "activations and gradients"


@dataclass(frozen=True)
class Layout:
    """How the processes of a run hold the network.

    Attributes:
        processes (`int`, defaults to `1`): How many there are.
        shards (`int`, defaults to `1`): Over how many of them FSDP2 spreads a copy of
            the network. 1 is DDP.
    """

    processes: int = 1
    shards: int = 1

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 spreads the network."""
        return self.shards > 1


@dataclass(frozen=True)
class Estimate:
    """What a step of a run takes on one device.

    Attributes:
        parameters (`int`): of the network, with its adapter.
        trainable (`int`): of these.
        rows (`int`): images that go through the network in one micro-batch.
        flops (`float`): of one micro-batch: policy, reference and backward pass.
        bytes (`dict[str, float]`): part -> bytes at the peak.
    """

    parameters: int
    trainable: int
    rows: int
    flops: float
    bytes: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes of all parts together."""
        return sum(self.bytes.values())


def gpu_memory(name: str) -> float:
    """Read a GPU's memory in GiB from its name or from a size such as ``24GB``.

    Raises:
        ConfigError: The name is not known. The message lists those that are.
    """
    text = name.lower().replace(" ", "").replace("geforce", "").replace("nvidia", "")
    known = {gpu.replace("-", ""): float(size) for gpu, size in GPUS.items()}
    for card in (text.replace("-", ""), f"rtx{text}"):  # 4090 alone is a card
        if card in known:
            return known[card]
    number, unit = re.fullmatch(r"([\d.]*)(.*)", text).groups()  # type: ignore[union-attr]
    units = {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0, "mb": 1 / 1024, "mib": 1 / 1024}
    try:
        size = float(number) * units.get(unit, 0.0)
    except ValueError:
        size = 0.0
    if not 0 < size <= LARGEST:
        raise ConfigError(
            "--gpu",
            f"{name!r} is neither a size such as 24GB (up to {LARGEST}) nor one of "
            f"{', '.join(sorted(GPUS))}",
        )
    return size


def estimate(
    backbone: Backbone,
    args: TrainingConfig,
    peft_config: LoraConfig | None,
    *,
    images_per_group: int,
    has_reference: bool,
    size: tuple[int, int],
    caches_latents: bool,
    caches_prompts: bool,
    other_reference: bool = False,
    layout: Layout | None = None,
) -> Estimate:
    """Run one micro-batch on tensors without content.

    Args:
        backbone (`Backbone`): The model, of which configs alone are read.
        args (`TrainingConfig`): Settings of the run.
        peft_config (`LoraConfig`, *optional*): The LoRA. None trains all weights.
        images_per_group (`int`): Images of one row of the data, 2 for pairs.
        has_reference (`bool`): Whether the method has a reference.
        size: Height and width of the images.
        caches_latents (`bool`): Whether latents come from a cache.
        caches_prompts (`bool`): Whether encoded prompts come from a cache.
        other_reference (`bool`, *optional*, defaults to `False`): Whether the reference
            is another model.
        layout (`Layout`, *optional*): Processes of the run. None is one process.

    Returns:
        `Estimate`: Parameters, work and bytes of one process.

    Raises:
        ConfigError: The family's inputs are not known here.
    """
    dtype = DTYPES[args.mixed_precision]
    plain = _without_options(args)
    empty = backbone.source.empty(
        backbone.network_name, dtype if peft_config is not None else torch.float32
    )
    backbone.use_network(empty)
    network = build_network(backbone, plain, peft_config)
    trained = trainable_parameters(network)
    rows = args.per_device_train_batch_size * images_per_group
    runs_reference = has_reference and not args.precompute_ref_errors
    layout = layout or Layout()
    small = _kept_copies(network, args)
    total = sum(p.numel() for p in network.parameters())
    parts = {"weights": _weight_bytes(network, args) / layout.shards}
    if small:
        parts["copies of 8-bit weights kept for the backward pass"] = small / layout.shards
    if has_reference and (peft_config is None or other_reference):
        waits = args.precompute_ref_errors or args.offload_reference or args.offload == "group"
        copy = total * dtype.itemsize if other_reference else _bytes(network)
        parts["reference"] = 0.0 if waits else copy / layout.shards
    trainable = sum(p.numel() for p in trained)
    count = trainable / layout.shards
    parts["optimizer"] = _OPTIMIZER_BYTES[args.optim] * count
    if args.use_ema and not args.offload_ema:
        parts["average"] = 4.0 * count
    parts |= _frozen_parts(backbone, dtype, args, caches_latents, caches_prompts)
    live, flops = _step(
        backbone, network, args, rows, size, runs_reference, peft_config is not None, layout
    )
    if args.gradient_accumulation_steps > 1:
        parts["gradients"] = 4.0 * count
    if layout.processes > 1 and not layout.is_sharded:
        parts["gradients that DDP sends"] = 4.0 * count
    name = "activations, gradients, gathered blocks" if layout.is_sharded else _ACTIVATIONS
    parts[name] = live
    return Estimate(total, trainable, rows, flops, parts)


def _without_options(args: TrainingConfig) -> TrainingConfig:
    """Turn off what a network without content cannot have."""
    return replace(
        args, quantization=None, layerwise_casting=False, compile=False, attention="native"
    )


def _bytes(module: Module) -> float:
    return float(sum(p.numel() * p.element_size() for p in module.parameters()))


def _weight_bytes(network: Module, args: TrainingConfig) -> float:
    """Bytes of the network's weights, the frozen linear ones as they are stored."""
    total = _bytes(network)
    stored = 1.0 if args.layerwise_casting else _QUANTISED_BYTES.get(args.quantization or "", 0.0)
    for module in _small_layers(network, args):
        total -= module.weight.numel() * (module.weight.element_size() - stored)
    return total


def _small_layers(network: Module, args: TrainingConfig) -> list[torch.nn.Linear]:
    """List the frozen layers that are stored in fewer bits."""
    if args.layerwise_casting:
        layers = list(cast_layers(network))
    elif args.quantization:
        layers = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    else:
        layers = []
    return [layer for layer in layers if not layer.weight.requires_grad]


def _kept_copies(network: Module, args: TrainingConfig) -> float:
    """Bytes of weights in the run's precision that autograd keeps of layers in 8 bits.

    With `gradient_checkpointing` those of one block at a time, which are not counted.
    """
    if args.gradient_checkpointing or args.quantization == "nf4":
        return 0.0
    layers = _small_layers(network, args)
    return float(sum(each.weight.numel() * each.weight.element_size() for each in layers))


def _frozen_parts(
    backbone: Backbone,
    dtype: torch.dtype,
    args: TrainingConfig,
    caches_latents: bool,
    caches_prompts: bool,
) -> dict[str, float]:
    """Bytes of the encoders and the autoencoder that stay on the device."""
    if args.offload == "group":
        return {}
    parts: dict[str, float] = {}
    source = backbone.source
    names = [name for name in source.component_names() if name.startswith("text_encoder")]
    if not caches_prompts:
        size = sum(_bytes(source.empty(name, dtype)) for name in names)
        parts["text encoders"] = float(size)
    if not caches_latents:
        parts["autoencoder"] = _bytes(source.empty("vae", backbone.component_dtype("vae")))
    return parts


# The step -----------------------------------------------------------------------------


_GATHERED = 2**14
"""Bytes below which it does not matter whether FSDP2 has freed a tensor."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live.

    Views of weights are no new bytes.

    Args:
        network: Its weights and buffers are there already.
    """

    def __init__(self, network: Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self._changing: dict[int, weakref.ref[Any]] = {}
        # Held, since a storage's identity lasts as long as a reference to it.
        self._there = [
            getattr(tensor, "_local_tensor", tensor).untyped_storage()
            for tensor in (*network.parameters(), *network.buffers())
        ]
        self._weights = {id(storage) for storage in self._there}
        self._is_sharded = bool(sharded_modules(network))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and not is_sharded(value):
                self._add(value)
        if self._is_sharded:
            self._look_again()
        return result

    def _look_again(self) -> None:
        """Notice storages that FSDP2 has emptied or filled without an operation."""
        for key, reference in list(self._changing.items()):  # the collector may remove some
            storage = reference()
            if storage is not None and storage.nbytes() != self._sizes[key]:
                self.live += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._weights:
            return

        def gone(_: Any) -> None:
            self.live -= self._sizes.pop(key)
            self._known.pop(key, None)
            self._changing.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._sizes[key] = size
        if self._is_sharded and size >= _GATHERED:
            self._changing[key] = self._known[key]
        self.live += size
        self.peak = max(self.peak, self.live)


def _flop_formulas() -> dict[Any, Any]:
    """The work of attention on CPUs, which torch's counter does not know."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@contextmanager
def _without_content(network: Module) -> Iterator[Any]:
    """Give a network on the meta device tensors that pretend to lie on the CPU.

    Attention then takes the kernel that does not keep its weights, as on a GPU.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    place = torch.device("cpu")
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    FakeTensor(mode, parameter.data, place), parameter.requires_grad
                )
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = FakeTensor(mode, buffer, place)
    with mode:
        yield mode


def _step(
    backbone: Backbone,
    network: Module,
    args: TrainingConfig,
    rows: int,
    size: tuple[int, int],
    runs_reference: bool,
    is_lora: bool,
    layout: Layout,
) -> tuple[float, float]:
    """Bytes at the peak of forward and backward passes, and their FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    dtype = DTYPES[args.mixed_precision]
    counter = FlopCounterMode(display=False, custom_mapping=_flop_formulas())
    with _without_content(network):
        noisy = torch.randn(rows, *backbone.latent_shape(*size)).to(dtype)
        condition = example_condition(backbone, rows, dtype)
        times = torch.full((rows,), 300.0)
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

        def step() -> None:
            # As in training: the reference runs before anything is kept for gradients.
            if runs_reference and is_lora:
                reference = AdapterOffReference(network)
                with torch.no_grad(), reference.adapters_off():
                    _errors(backbone, network, noisy, times, condition)
            elif runs_reference:
                with torch.no_grad():
                    _errors(backbone, network, noisy, times, condition)
            errors = _errors(backbone, network, noisy, times, condition)
            torch.nn.functional.softplus(-errors).sum().backward()

        with counter, autocast:  # apart, since the counter keeps tensors alive
            step()
        network.zero_grad(set_to_none=True)
        with _spread(network, layout, dtype), _LiveBytes(network) as live, autocast:
            step()
    return float(live.peak), float(counter.get_total_flops())


@contextmanager
def _spread(network: Module, layout: Layout, dtype: torch.dtype) -> Iterator[None]:
    """Shard a network over processes that torch only pretends to have."""
    if not layout.is_sharded:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("an estimate of a sharded run cannot be made within a run")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.processes)
    try:
        copies = layout.processes // layout.shards
        shape = (copies, layout.shards) if copies > 1 else (layout.shards,)
        names = ("copies", "shards") if copies > 1 else ("shards",)
        half = dtype if dtype != torch.float32 else None
        with _disable_current_modes():  # the numbers of the processes have content
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half),
        }
        blocks = set(block_names(network))
        for module in reversed(list(network.modules())[1:]):
            if type(module).__name__ in blocks:
                fully_shard(module, **options)
        fully_shard(network, **options)
        yield
    except RuntimeError as error:  # NotImplementedError is one, too
        if "c10d" not in str(error):
            raise
        raise UserError(
            f"--accelerate_config: torch {torch.__version__} cannot simulate sharding; update torch"
        ) from error
    finally:
        dist.destroy_process_group()


def _errors(
    backbone: Backbone,
    network: Module,
    noisy: Tensor,
    times: Tensor,
    condition: dict[str, Tensor],
) -> Tensor:
    prediction = backbone.predict(network, noisy, times, condition)
    return (prediction.float() - noisy.float()).square().flatten(1).mean(1)


def example_condition(backbone: Backbone, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make inputs of the family's shapes.

    Args:
        backbone (`Backbone`): The model.
        rows (`int`): Number of rows.
        dtype (`torch.dtype`): Of embeddings. Masks are full.

    Returns:
        `dict[str, Tensor]`: As `encode_prompts` and `geometry_condition` give.

    Raises:
        ConfigError: The family does not say which shapes it has.
    """
    shapes = backbone.condition_shapes()
    if not shapes:
        raise ConfigError(
            "model",
            f"a {backbone.source.pipeline_class_name} has no estimate yet: its backbone has no "
            "condition_shapes",
        )
    condition = {}
    for name, shape in shapes.items():
        if name.endswith("mask"):
            with _disable_current_modes():  # masks have content, which decides on lengths
                condition[name] = torch.ones(rows, *shape, dtype=torch.bool)
        else:
            condition[name] = torch.randn(rows, *shape).to(dtype)
    return condition


# What to change -----------------------------------------------------------------------


def advice(changes: Sequence[tuple[str, Estimate]], base: Estimate) -> list[str]:
    """Order changes of a run by what they save.

    Args:
        changes: Change in words, and the estimate with it.
        base (`Estimate`): Without a change.

    Returns:
        `list[str]`: A line for each that saves something, the largest first.
    """
    saved = sorted(
        ((base.peak - changed.peak, words, changed) for words, changed in changes),
        key=lambda entry: entry[0],
        reverse=True,
    )
    return [
        f"{words}: saves {gain / GIB:.1f} GiB, {changed.peak / GIB:.1f} GiB then"
        for gain, words, changed in saved
        if gain > 0.02 * base.peak
    ]
