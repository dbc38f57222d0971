"""The trainer: checks a run, builds it and hands it to the loop.

A method is a subclass that states which data it needs and what its loss is. See
`diffalign.methods`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim.lr_scheduler import LambdaLR

from ..backbones import Backbone, load_backbone
from ..data import DataConfig, PreferenceDataset
from ..data.sources import NoSuchSplit
from ..errors import ConfigError, UserError
from ..likelihood import NoiseSchedule, RectifiedFlow, VariancePreserving
from ..runtime.distributed import process_rank, sharded_modules
from ..runtime.files import make_folder
from ..runtime.folder_lock import FolderLock
from ..runtime.hashing import scheduler_facts, value_hash
from ..runtime.seeds import undisturbed
from .arguments import check_optimizers, read_argument, read_callbacks
from .batch import Batch
from .borrowed import BorrowedPipeline
from .build import (
    DTYPES,
    build_accelerator,
    build_network,
    keep_buffers,
    keep_precision,
    planned_steps,
    trainable_parameters,
    training_schedule,
)
from .callbacks import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainOutput,
)
from .checkpoint import CheckpointManager, CheckpointPart
from .config import TrainingConfig
from .data_pipeline import (
    DataPipeline,
    ReferenceErrors,
    as_preferences,
    build_transform,
    check_data,
)
from .denoiser import Denoiser, Forward
from .diagnostics import LOG2_MESSAGE, DivergenceGuard, FiniteCheck
from .evaluate import evaluate, measure_rounding
from .export import check_hub, push_to_hub, save_model
from .loop import BatchSource, DatasetSource, Run, fit
from .memory import check_memory_options, compile_blocks, store_in_8_bits
from .online.online_data import OnlineData, online_reward_function, online_sampler
from .online.policy_sampler import PolicySampler
from .online.remote_sampler import RemoteSampler, connect_servers
from .online.reward_function import RewardFunction
from .online.rollout import SAMPLER_RULE, Grid, Rollout, SamplerConfig, grid_for_size
from .online.rollout_server import RolloutServer
from .online.source import RolloutSource
from .optimizer import averaged, build_ema, build_lr_scheduler, build_optimizer, update_ema
from .periodic import ActOnHacking, Rollback, StopOnDivergence, in_order
from .reference import (
    FrozenCopyReference,
    Reference,
    SnapshotReference,
    StartLoraReference,
    build_reference,
    check_reference,
)
from .resume import ScheduleState, group_settings, resume_settings
from .run_folder import begin, check_outside, check_savable, holds_model
from .run_record import BuiltFacts, RunRecord, dry_run_report, sampler_rule
from .sections import HubConfig, ValidationConfig
from .sharding import choose_units, is_fsdp, shard_frozen
from .signals import StopSignals
from .start_lora import StartLora, put_start_lora, read_start_lora
from .tracking import MetricLog, MetricWindow, check_tracker, finish_trackers, start_trackers
from .trained_weights import FullWeights, LoraWeights, TrainedWeights
from .validation import Validation
from .validation_checks import check_validation, scorers_that_train, unguarded

if TYPE_CHECKING:
    from peft import LoraConfig


def _load_reference(model: Any) -> Backbone:
    """Find the backbone of `ref_model`. Messages name that argument."""
    try:
        return load_backbone(model)
    except ConfigError as error:
        field = "ref_model" if error.field == "model" else error.field
        raise ConfigError(field, error.problem) from None


class Trainer:
    """Trains a diffusers model on preferences.

    This is the base class. Use the class of a method, such as `DiffusionDPOTrainer`.

    Args:
        model (`str | Path | DiffusionPipeline`): Hub id, local folder, `"shapes"` or a
            pipeline. The network of a pipeline is trained in place.
        ref_model (`str | Path | DiffusionPipeline`, *optional*): Model to stay close
            to. Defaults to a frozen copy of `model`.
        args (`TrainingConfig`, *optional*): Settings of the method. Defaults to
            `config_class()`.
        train_dataset (*optional*): Anything that `load_preferences` reads, or its
            result. Defaults to the dataset that `data` names.
        eval_dataset (*optional*): The same, for `evaluate`. Of a name, its split is
            `data.dataset_test_split`, else `test` where it has one, else `train`.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Called at fixed moments of
            the training. Classes are built without arguments.
        optimizers (`tuple`, *optional*): A function from parameters to an optimizer,
            and a function from the optimizer to a learning-rate schedule. None for
            either takes that of `args`. An optimizer itself cannot be passed, because
            the trainable parameters exist only later.
        peft_config (`LoraConfig`, *optional*): The LoRA to train. None trains all
            weights.
        data (`DataConfig` or `dict`, *optional*): Source, sizes and caches of the data.
        validation (`ValidationConfig` or `dict`, *optional*): Images to draw and score
            while training. None draws none.
        hub (`HubConfig` or `dict`, *optional*): Upload of the result. None uploads
            nothing.
        revision (`str`, *optional*): Revision of the model on the Hub.
        variant (`str`, *optional*): Variant of the weight files, such as `fp16`.
        vae (*optional*): Another autoencoder, as a name or an object.
        model_base (`str`, *optional*): Pipeline that a model in one file takes its
            configs and missing parts from.
        scorers (*optional*): Scorers for methods that sample while they learn. See
            `diffalign.training.online.reward_function.RewardFunction`.
        start_lora (`str` or `Path`, *optional*): A LoRA to go on from, in place of
            `peft_config`. The reference is the model with it.

    Raises:
        ConfigError, UserError: Model, data or settings are wrong. Raised before weights
            are loaded.
    """

    method: ClassVar[str]
    """Name of the method in a run file."""
    _name: ClassVar[str] = "Trainer"
    _tag_names: ClassVar[tuple[str, ...]] = ()
    _paper: ClassVar[dict[str, str]] = {}
    _not_public: ClassVar[str] = ""
    """What neither the paper nor its code says."""
    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig
    data_kind: ClassVar[str] = "pair"
    reference_free: ClassVar[bool] = False
    inverted: ClassVar[bool] = False
    """Whether the method prefers the rejected images."""
    start_message: ClassVar[str] = LOG2_MESSAGE
    """What a method with a reference says about its first losses."""
    takes_scorers: ClassVar[bool] = False
    """Whether the method uses scorers other than as a reward of drawn images."""
    can_be_online: ClassVar[bool] = True
    """Whether the method can train on images drawn online."""

    # Configuration
    args: TrainingConfig
    data_config: DataConfig
    validation_config: ValidationConfig | None
    hub_config: HubConfig | None
    peft_config: LoraConfig | None
    start_lora: StartLora | None
    scorers: Any
    output_dir: Path
    train_dataset: PreferenceDataset
    eval_dataset: PreferenceDataset | None

    # Swappable parts
    backbone: Backbone
    schedule: NoiseSchedule
    ref_backbone: Backbone | None
    optimizers: tuple[Any, Any]
    callbacks: list[TrainerCallback]
    source: BatchSource
    reference_model: Reference | None

    # Runtime, set by `setup`
    accelerator: Accelerator
    network: Module
    prepared: Module
    trained: TrainedWeights
    policy: Denoiser
    sampling_policy: Denoiser
    reference: Denoiser | None
    data_pipeline: DataPipeline
    optimizer: Any
    lr_scheduler: Any
    ema: Any
    checkpoints: CheckpointManager
    record: RunRecord

    # State
    state: TrainerState
    control: TrainerControl
    notes: list[str]
    training_names: set[str]
    """Names of the scorers that train the model."""
    window: MetricWindow
    sampler_rule: int
    is_dry: bool
    borrowed: BorrowedPipeline | None
    """The pipeline that the user passed as an object."""
    _ready: bool
    _depth: int

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] | None = None,
        peft_config: LoraConfig | None = None,
        *,
        data: DataConfig | dict[str, Any] | None = None,
        validation: ValidationConfig | dict[str, Any] | None = None,
        hub: HubConfig | dict[str, Any] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        vae: Any = None,
        model_base: str | None = None,
        scorers: Any = None,
        start_lora: str | Path | None = None,
    ) -> None:
        # A copy: a config that is changed for the next trainer changes no other run.
        self.args = copy.deepcopy(
            read_argument(args, self.config_class, "args") or self.config_class()
        )
        self.data_config = read_argument(data, DataConfig, "data") or DataConfig()
        validation = read_argument(validation, ValidationConfig, "validation")
        self.validation_config = validation
        self.hub_config = read_argument(hub, HubConfig, "hub")
        if self.hub_config is not None and self.hub_config.push_to_hub:
            check_hub(self.hub_config)
        self.peft_config, self.scorers = peft_config, scorers
        self.optimizers = check_optimizers(optimizers)
        self.callbacks = read_callbacks(callbacks)
        self.output_dir = Path(self.args.output_dir)
        named = scorers if scorers is not None else self._named_scorers()
        self.notes = [] if validation is None else check_validation(validation, named)
        self.training_names = scorers_that_train(validation.scorers if validation else [], named)
        self.sampler_rule, self.is_dry, self._ready = SAMPLER_RULE, False, False
        self.window = MetricWindow()
        self.state, self.control = TrainerState(), TrainerControl()
        self._check_settings()
        self.backbone = load_backbone(
            model, revision=revision, variant=variant, vae=vae, base=model_base
        )
        pipe = self.backbone.source.pipe
        self.borrowed = None if pipe is None else BorrowedPipeline(pipe)
        self._depth = 0
        self.ref_backbone = None if ref_model is None else _load_reference(ref_model)
        if self.ref_backbone is not None:
            check_reference(self.backbone, self.ref_backbone)
        self._fit_backbone()
        self.start_lora = self._read_start_lora(start_lora)
        check_memory_options(self.args, self.peft_config)
        self.schedule = self.backbone.schedule
        build_transform(self.data_config, self.backbone)  # refuses sizes that do not fit the model
        self._read_data(train_dataset, eval_dataset)
        check_data(self.train_dataset, self.data_config, self.args)
        names = {
            "revision": revision,
            "variant": variant,
            "vae": vae if isinstance(vae, str) else None,
            "model_base": model_base,
        }
        self.record = self._make_record(names, bool(self.callbacks))
        self.server = self._online_server()
        self.validate()
        self._check_evaluation()
        if self.training_reward() is not None:
            note = unguarded(validation, named)
            self.notes += [note] if note else []
        elif scorers is not None and not self.takes_scorers:
            raise ConfigError(
                "rewards",
                f"{self._name} scores no images here; leave the section out, or let a scorer judge "
                "images drawn while training (data.online)",
            )
        self._call("on_init_end")

    def _named_scorers(self) -> Any:
        """Names of the scorers that train, from the settings."""
        online = self.data_config.online
        return online.scorers if online is not None else getattr(self.args, "scorers", [])

    def _fit_backbone(self) -> None:
        """Check the settings against the model's family, and tell it the guidance."""
        args, backbone = self.args, self.backbone
        if self.peft_config is not None:
            backbone.check_lora()
        if backbone.few_steps and args.timestep_sampling != "grid":
            self.notes.append(
                f"WARNING: {backbone.source.name} draws in {backbone.few_steps} steps, and "
                "training at other times can spoil that; set train.timestep_sampling: grid"
            )
        guidance = args.embedded_guidance
        if guidance is None:
            sampling = self.data_config.online or args
            guidance = getattr(sampling, "guidance_scale", None)
        for model in (backbone, self.ref_backbone):
            if model is not None and guidance is not None:
                model.guidance = guidance

    def _read_start_lora(self, place: str | Path | None) -> StartLora | None:
        """Read the LoRA to go on from. Its layers and ranks become the run's."""
        if place is None:
            return None
        config = self.peft_config
        if config is not None and (config.target_modules or config.rank_pattern):
            raise ConfigError(
                "peft_config",
                "start_lora has layers and ranks of its own; leave peft_config out",
            )
        start = read_start_lora(place, self.backbone, config.lora_dropout if config else 0.0)
        self.peft_config = start.config
        return start

    def _check_settings(self) -> None:
        """Refuse settings that exclude each other, or need what is not installed."""
        check_tracker(self.args.report_to)
        if not self.args.precompute_ref_errors:
            return
        if self.reference_free:
            raise ConfigError(
                "train.precompute_ref_errors", f"{self._name} has no reference; set it to false"
            )
        if self.data_config.online is not None:
            raise ConfigError(
                "train.precompute_ref_errors",
                "the images of data.online do not exist beforehand; set it to false",
            )

    def _check_evaluation(self) -> None:
        """Refuse periodic evaluations without data, and note data never evaluated."""
        if self.args.eval_steps is not None and self.eval_dataset is None:
            raise ConfigError(
                "train.eval_steps",
                "there are no evaluation data; name their split (data.dataset_test_split), pass "
                "eval_dataset, or leave eval_steps out",
            )
        if self.args.eval_steps is None and self.data_config.dataset_test_split is not None:
            self.notes.append(
                "data.dataset_test_split is evaluated only when evaluate() is called; set "
                "train.eval_steps to evaluate while training"
            )

    def _read_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        config = self.data_config
        source = (
            train_dataset
            if train_dataset is not None
            else config.dataset_name or config.train_data_dir
        )
        if source is None:
            raise ConfigError(
                "data.dataset_name",
                "no training data: name a Hub dataset, a folder or a file (or pass train_dataset)",
            )
        check_outside(self.output_dir, source, "data.dataset_name")
        check_outside(self.output_dir, eval_dataset, "eval_dataset")
        self.train_dataset = self._read_training_data(source)
        if eval_dataset is None and config.dataset_test_split and train_dataset is None:
            eval_dataset = source
        # Read once, because evaluations are frequent.
        self.eval_dataset = None if eval_dataset is None else self._read_eval_data(eval_dataset)

    def _read_eval_data(self, source: Any) -> PreferenceDataset:
        """Read the evaluation split, or all of a source that has no such split."""
        split = self.data_config.dataset_test_split
        if not isinstance(source, (str, Path, Mapping)):  # rows without splits
            return self.read_dataset(source, "train")
        if split is not None:
            return self.read_dataset(source, split)
        splits: list[str] = []
        for name in ("test", "validation", "val", "dev"):
            try:
                return self.read_dataset(source, name)
            except NoSuchSplit as error:
                splits = error.splits
        if len(splits) != 1:
            raise ConfigError(
                "data.dataset_test_split",
                f"name the split to evaluate on; there are {', '.join(splits)}",
            )
        return self.read_dataset(source, splits[0])

    def _read_training_data(self, source: Any) -> PreferenceDataset:
        if self.data_config.online is None:
            return self.read_dataset(source, self.data_config.dataset_train_split)
        if not self.can_be_online:
            raise ConfigError(
                "data.online",
                f"{self._name} cannot train on pairs that the policy draws; leave the section out",
            )
        # Only prompts are read here. `OnlineData` inverts the preferences.
        config = dataclasses.replace(self.data_config, invert_preferences=False)
        return as_preferences(source, config, "prompt", self.data_config.dataset_train_split)

    def _make_record(self, model_options: dict[str, str | None], has_callbacks: bool) -> RunRecord:
        source, network = self.backbone.source, self.backbone.network_name
        other = self.ref_backbone
        passed = ["optimizers"] if any(part is not None for part in self.optimizers) else []
        return RunRecord(
            name=self._name,
            tags=self._tag_names,
            paper=self._paper,
            # A user's subclass of a method has no name in a run file.
            method=vars(type(self)).get("method", type(self).__name__),
            args=self.args,
            data_config=self.data_config,
            validation=self.validation_config,
            hub=self.hub_config,
            peft_config=self.peft_config,
            scorers=self.scorers,
            model_options=model_options,
            backbone=self.backbone,
            ref_backbone=other,
            dataset=self.train_dataset,
            # Taken now, because the network of a pipeline is trained in place.
            model_fingerprint=source.fingerprint(network),
            ref_fingerprint=None if other is None else other.source.fingerprint(other.network_name),
            vae_fingerprint=source.fingerprint("vae"),
            scheduler_hash=value_hash(
                [scheduler_facts(b.scheduler) for b in (self.backbone, other) if b is not None]
            )[:16],
            text_fingerprint=source.fingerprint(*self.backbone.encoders()),
            sampler_rule=self.sampler_rule,
            start_lora=self.start_lora,
            passed_in_python=[*passed, *(["callbacks"] if has_callbacks else [])],
        )

    # Hooks of a method ----------------------------------------------------------------

    def validate(self) -> None:
        """Refuse what can be refused without weights. The constructor ends with it.

        Raises:
            ConfigError, UserError: The method cannot use the settings, the model or the
                data.
        """

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """Read data as groups of the method's `data_kind`.

        A method that needs more of its data checks it here.

        Args:
            source: Anything that `load_preferences` reads, or its result.
            split (`str`): Split of the dataset.

        Returns:
            `PreferenceDataset`: The groups.

        Raises:
            UserError: The data lack what the method needs.
        """
        return as_preferences(source, self.data_config, self.data_kind, split, invert=self.inverted)

    def training_reward(self) -> RewardFunction | None:
        """Return what scores the images that the run trains on.

        Returns:
            `RewardFunction`, *optional*: None for a run without a reward.
        """
        return self.online_reward

    @cached_property
    def online_reward(self) -> RewardFunction | None:
        """The judge of `data.online`, None without that section."""
        config = self.data_config.online
        return None if config is None else online_reward_function(config, self.scorers)

    def _online_server(self) -> RolloutServer | None:
        """Reach the servers of `data.online`, None if there are none."""
        config = self.data_config.online
        if config is None or not config.rollout_server:
            return None
        return connect_servers(
            "data.online.rollout_server",
            config.rollout_server,
            self.backbone,
            self.data_config,
            self.peft_config is not None,
            config.num_inference_steps,
            self.backbone.guidance_rule.of_run(config.guidance_scale),
        )

    def build_network(self) -> Module:
        """Build the network, in training mode. What trains requires a gradient.

        Returns:
            The network of the model, as a whole or with the run's LoRA.
        """
        return build_network(self.backbone, self.args, self.peft_config)

    def build_trained_weights(self) -> TrainedWeights:
        """Build what saves and loads the trained weights of `network`."""
        kind = FullWeights if self.peft_config is None else LoraWeights
        return kind(self.backbone, self.network)

    def predictor(self, network: Module) -> Forward:
        """Return the function that runs a network on a batch.

        Args:
            network: `network` itself, or as accelerate prepared it.

        Returns:
            `Callable`: Of noisy latents, model times and condition, see
            `Backbone.predict`.
        """
        return functools.partial(self.backbone.predict, network)

    def build_reference(self) -> Reference | None:
        """Build the reference model.

        Returns:
            `Reference`, *optional*: None for a method without a reference.
        """
        return None if self.reference_free else self.fixed_reference()

    def fixed_reference(self) -> Reference:
        """Build the starting weights, or `ref_model`, as a fixed reference."""
        is_lora, device = self.peft_config is not None, self.accelerator.device
        return build_reference(
            self.backbone,
            self.network,
            self.ref_backbone,
            is_lora,
            device,
            self.args.offload_reference,
            self.start_lora is not None,
            self.args.offload == "group",
            functools.partial(shard_frozen, self.accelerator)
            if is_fsdp(self.accelerator)
            else None,
        )

    def build_source(self) -> BatchSource:
        """Build the source of batches, after everything else is built.

        Returns:
            `BatchSource`: The dataset, or rounds of images drawn online.
        """
        config = self.data_config.online
        if config is None or self.online_reward is None:
            return DatasetSource()
        sampler = self.remote_sampler or self.policy_sampler(
            online_sampler(config, self.backbone.guidance_rule, self.schedule),
            "sampling online data",
        )
        online = OnlineData(
            config,
            self.online_reward,
            sampler,
            self.data_kind,
            self.inverted != self.data_config.invert_preferences,
            self.args.shared_noise,
            self.args.noise_offset,
            lambda metrics: self.window.add(metrics),
        )
        return RolloutSource(online.round, config.every * self.args.gradient_accumulation_steps)

    def prepare(self, batch: Batch) -> Batch:
        """Change a batch before its micro-batches. The default returns it as it is.

        Args:
            batch (`Batch`): Groups of the source.

        Returns:
            `Batch`: For example with samples of the policy, or with targets.
        """
        return batch

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Split a batch into forward passes. The default yields the batch itself.

        Args:
            batch (`Batch`): What `prepare` returned.

        Returns:
            `Iterator[Batch]`: `passes_per_batch` micro-batches.
        """
        yield batch

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss and the metrics of a micro-batch.

        Args:
            batch (`Batch`): g groups.

        Returns:
            `tuple[Tensor, dict[str, Tensor]]`: Loss of each group, (g,), and metrics,
            each (g,). NaN where a metric does not apply.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss")

    def on_optimizer_step(self, step: int) -> None:
        """Run after every optimizer step. The default does nothing.

        Args:
            step (`int`): Optimizer steps done.
        """

    @property
    def passes_per_batch(self) -> int:
        """Number of micro-batches per batch."""
        return 1

    @property
    def passes_per_group(self) -> int:
        """How often a group of the data trains in an epoch."""
        return 1

    def evaluation_metrics(self, data: DataPipeline) -> dict[str, float]:
        """Measure the policy on evaluation data. The default averages the loss.

        Args:
            data (`DataPipeline`): The evaluation data.

        Returns:
            `dict[str, float]`: The averages, named `eval/...`.
        """
        return evaluate(self, data, self.network, self.accelerator)

    # The core, as methods call it -----------------------------------------------------

    def errors(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Measure the denoising errors of policy and reference at the same samples.

        Args:
            batch (`Batch`): g groups of k images.

        Returns:
            `tuple[Tensor, Tensor | None]`: Errors of the policy and of the reference,
            each (g, k). The second is None for a method without a reference.
        """
        reference = None if self.reference_free else self.reference_errors(batch)
        return self.policy.errors(batch), reference

    def reference_errors(self, batch: Batch) -> Tensor:
        """Measure the denoising errors of the reference, without gradient.

        Args:
            batch (`Batch`): g groups of k images. Errors that it brings are returned.

        Returns:
            `Tensor`: Errors, (g, k).
        """
        if batch.reference_errors is not None:
            return batch.reference_errors
        assert self.reference is not None
        with torch.no_grad():
            return self.reference.errors(batch)

    @cached_property
    def noising(self) -> NoiseSchedule:
        """Noise schedule of the training images, see `training_schedule`."""
        return training_schedule(self.schedule, self.args, self.sampler_rule)

    @property
    def guidance_scale(self) -> float:
        """Guidance of a method that samples, in the scale of the family's pipelines."""
        scale: float = vars(self.args)["guidance_scale"]
        return self.backbone.guidance_rule.of_run(scale)

    def make_grid(self, steps: int, eta: float) -> Grid:
        """Build the times of the run's sampler.

        Args:
            steps (`int`): Number of sampler steps.
            eta (`float`): Stochasticity of a step.

        Returns:
            `Grid`: Times from noisy to clean.
        """
        size = build_transform(self.data_config, self.backbone).sizes[0]
        return grid_for_size(self.backbone, size, steps, eta, self.sampler_rule)

    def policy_sampler(
        self,
        config: SamplerConfig,
        description: str = "sampling",
        policy: Denoiser | None = None,
    ) -> PolicySampler:
        """Build a sampler that draws with the policy. Call `setup` first.

        Args:
            config (`SamplerConfig`): Settings of the sampler.
            description (`str`, *optional*, defaults to `"sampling"`): Text of the
                progress bar.
            policy (`Denoiser`, *optional*): Other weights to draw with.
        """
        grid = self.make_grid(config.num_inference_steps, config.eta)
        fixed = is_fsdp(self.accelerator)
        rollout = Rollout(
            self.backbone, self.schedule, config, description, grid=grid, fixed_batch_size=fixed
        )
        builder, drawing = self.data_pipeline.builder, policy or self.sampling_policy
        return PolicySampler(rollout, drawing, self.network, builder, self.accelerator)

    @cached_property
    def remote_sampler(self) -> RemoteSampler | None:
        """Sampler that draws on a server, None without one."""
        if self.server is None:
            return None
        return RemoteSampler(
            self.server,
            self.backbone,
            self.accelerator,
            self.trained,
            self.prepared,
            self.output_dir / "rollout_server",
            self.drawing_weights,
        )

    def drawing_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the network has the weights that draw rounds."""
        return nullcontext()

    @property
    def process(self) -> NoiseSchedule:
        """Deprecated name of `schedule`. It goes in version 0.3."""
        warnings.warn(
            "process is now called schedule; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.schedule

    # Building -------------------------------------------------------------------------

    def setup(self) -> None:
        """Load the weights and build the reference, caches and optimizer.

        A second call does nothing.
        """
        if self._ready:
            keep_precision(self.accelerator, self.args.mixed_precision)
            if self.borrowed is not None and self.borrowed.is_back:
                self.borrowed.take(self.network)
            return
        args, data = self.args, self.data_config
        for name in ("cache_latents", "cache_text_embeddings"):
            place = getattr(data, name)
            if place and process_rank() == 0:
                make_folder(Path(place), f"data.{name}")
        passes = args.gradient_accumulation_steps * self.passes_per_batch
        self.accelerator = build_accelerator(args, self.output_dir, passes)
        self.backbone.place(
            self.accelerator.device,
            DTYPES[args.mixed_precision],
            offload=args.offload == "group",
            shard=is_fsdp(self.accelerator),
        )
        self.data_pipeline = DataPipeline(
            self.train_dataset, self.data_config, args, self.backbone, self.accelerator
        )
        # Before the network is there, so that the encoders have the memory.
        self.notes += self.data_pipeline.fill_caches()
        set_seed(args.seed)  # equal on every process, so that a LoRA starts equal
        self.network = self.build_network()
        self.trained = self.build_trained_weights()
        if self.start_lora is not None:
            put_start_lora(self.network, self.start_lora)
        if args.layerwise_casting:
            store_in_8_bits(self.network, DTYPES[args.mixed_precision])
        if args.compile:
            compile_blocks(self.network)
        self.sampling_policy = self._denoiser(self.predictor(self.network))
        self.reference_model = self.build_reference()
        self.reference = None
        if self.reference_model is not None:
            self.reference = self._denoiser(
                functools.partial(self.reference_model.predict, self.backbone)
            )
        self._build_optimizer()
        model = self.reference_model
        self.record.built = BuiltFacts.of(
            self.network,
            self.data_pipeline,
            self.state.max_steps,
            None if model is None or self.reference_free else model.description,
            self.trained.description,
        )
        self.checkpoints = CheckpointManager(
            self.accelerator,
            self.network,
            self.prepared,
            self.trained,
            self.output_dir,
            args.save_total_limit,
            self.record.identity(),
            self.ema,
        )
        self.source = self.build_source()
        if not isinstance(self.lr_scheduler, LambdaLR):
            self.checkpoints.parts.append(ScheduleState(self.lr_scheduler, self.accelerator.print))
        for part in (self.source, self.reference_model, self.data_pipeline):
            if isinstance(part, CheckpointPart):
                self.checkpoints.parts.append(part)
        # From here on, dropout alone uses the global generators.
        set_seed((args.seed + self.accelerator.process_index) % 2**32)
        self._ready = True

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Set up for a public verb. A pipeline of the user is given back after it."""
        self.setup()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self.borrowed is not None:
                self.borrowed.give_back(self.network)

    def _denoiser(self, forward: Any) -> Denoiser:
        args = self.args
        return Denoiser(
            forward,
            self.backbone.dtype,
            self.noising,
            self.accelerator.autocast,
            snr_gamma=args.snr_gamma,
            reduction=args.reduction,
        )

    def _build_optimizer(self) -> None:
        args, parameters = self.args, trainable_parameters(self.network)
        make_optimizer, make_schedule = self.optimizers
        optimizer = (
            make_optimizer(parameters) if make_optimizer else build_optimizer(parameters, args)
        )
        self.state.max_steps = planned_steps(args, self.data_pipeline, self.passes_per_group)
        if make_schedule:
            self.lr_scheduler = make_schedule(optimizer)
        else:
            self.lr_scheduler = build_lr_scheduler(optimizer, args, self.state.max_steps)
        self.record.optimizer = type(optimizer).__name__
        choose_units(self.accelerator, self.network)
        self.prepared, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        keep_buffers(self.prepared)
        if self.reference_model is not None:
            self.reference_model.start()
        self.policy = self._denoiser(self.predictor(self.prepared))
        # Runs of earlier versions keep diffusers' warm-up.
        averaging = dataclasses.replace(args, ema_warmup=True) if self.sampler_rule == 1 else args
        # Sharding replaces the parameters, so they are read anew.
        self.ema = build_ema(trainable_parameters(self.network), averaging, self.accelerator.device)

    # Public verbs ---------------------------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback to those of the constructor. Call this before `train`.

        Args:
            callback (`TrainerCallback`): The callback, or its class.

        Raises:
            ConfigError: It is no callback.
        """
        self.callbacks += read_callbacks(callback)
        if "callbacks" not in self.record.passed_in_python:
            self.record.passed_in_python.append("callbacks")

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train to the end, or until the first signal.

        Writes checkpoints, logs and the final model into `output_dir`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `latest` or a
                checkpoint folder. True is `latest`, and False starts anew. Defaults to
                the config's.

        Returns:
            `TrainOutput`: Steps done and the last metrics.

        Raises:
            UserError: `output_dir` holds another run, or the checkpoint belongs to
                another run.
            NonFiniteLoss, NonFiniteWeights: Loss, gradient or weights are not finite.
            CheckpointError: A checkpoint could not be written.
        """
        resume = self.args.resume_from_checkpoint
        if isinstance(resume_from_checkpoint, bool):
            resume = "latest" if resume_from_checkpoint else None
        elif resume_from_checkpoint is not None:
            resume = str(resume_from_checkpoint)
        with FolderLock(self.output_dir, "train.output_dir") as lock:
            if self.state.global_step and resume is None:
                raise UserError(
                    f"train: this trainer has taken {self.state.global_step} steps; build a new "
                    "one to train anew, or go on with resume_from_checkpoint=True"
                )
            checkpoint = begin(lock, resume, self.args.overwrite_output_dir)
            if checkpoint is not None:
                self._take_sampler_rule(sampler_rule(checkpoint))
            with self._working():
                return self._train(checkpoint)

    def _take_sampler_rule(self, rule: int) -> None:
        """Draw trajectories by the rule of the resumed checkpoint."""
        if rule != self.sampler_rule and self._ready:
            raise UserError(
                "train.resume_from_checkpoint: it is from an earlier version; call train before "
                "any other method of this trainer"
            )
        self.sampler_rule = self.record.sampler_rule = rule
        if isinstance(self.schedule, RectifiedFlow):
            self.schedule.legacy_first_step = rule == 1
        elif isinstance(self.schedule, VariancePreserving) and rule == 1:
            self.schedule.clip_range = None

    def _train(self, checkpoint: Path | None) -> TrainOutput:
        # An earlier, interrupted call may have set them.
        self.control.should_training_stop = self.control.should_save = False
        self._plan()
        self.checkpoints.clean()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:  # from here on the folder is known as this run's
            self._write_config()
        validation = self._build_validation()
        if validation is not None:
            validation.start(fresh=checkpoint is None)
        self.precompute_reference_errors()
        if checkpoint is None:
            self._measure_rounding()
        else:
            steps = self.state.max_steps
            settings = group_settings(self.optimizer)
            self.state = self.checkpoints.load(checkpoint, self.args.force_resume)
            self.state.max_steps = steps
            self.notes += resume_settings(
                self.optimizer, self.lr_scheduler, settings, self.state.global_step
            )
            if validation is not None:
                validation.restore(self.state.global_step)
        self._announce(checkpoint)
        with StopSignals() as signals:
            undone = self.checkpoints.take_over(checkpoint, self.state)
            run = self.make_run()
            progress = [ProgressCallback()] if self.accelerator.is_main_process else []
            callbacks = in_order(
                log=MetricLog(self.accelerator, self.output_dir),
                call=functools.partial(self._call, more=progress),
                signals=signals,
                checkpoints=self.checkpoints,
                evaluate=self.evaluate if self.eval_dataset is not None else None,
                divergence=self._divergence_stage(),
                validation=validation,
                hacking=self._hacking_stage(validation, checkpoint),
                undone=undone,
                resumed=checkpoint,
            )
            if checkpoint is None:  # whatever drew from the global generators before
                set_seed((self.args.seed + self.accelerator.process_index) % 2**32)
            fit(self, run, callbacks)
        if signals.received is None and run.paused_for is None:
            self.save_model(str(self.output_dir))
            if run.hacked_at is not None and validation is not None:
                validation.restore_best()
            if self.hub_config is not None and self.hub_config.push_to_hub:
                self.push_to_hub()
        finish_trackers(self.accelerator)
        return TrainOutput(
            self.state.global_step, run.metrics, signals.received, run.paused_for, run.hacked_at
        )

    def _plan(self) -> None:
        """Follow settings of the length that changed since the optimizer was built."""
        steps = planned_steps(self.args, self.data_pipeline, self.passes_per_group)
        if steps == self.state.max_steps:
            return
        self.state.max_steps = steps
        if self.optimizers[1] is None:
            optimizer = self.optimizer.optimizer
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            self.lr_scheduler = build_lr_scheduler(optimizer, self.args, steps)

    def _divergence_stage(self) -> StopOnDivergence:
        guard = DivergenceGuard(self.args.divergence_patience, self.accelerator.print)
        return StopOnDivergence(guard, self.args.stop_on_divergence)

    def _hacking_stage(
        self, validation: Validation | None, checkpoint: Path | None
    ) -> ActOnHacking | None:
        if validation is None:
            return None
        rollback = Rollback(self.go_back, self.slow_down)
        is_resumed = checkpoint is not None
        return ActOnHacking(
            validation, self.checkpoints, rollback, self.accelerator.print, is_resumed
        )

    def go_back(self, folder: Path, learning_rate_factor: float) -> None:
        """Load earlier weights, forget the optimizer's moments and slow down.

        Args:
            folder (`Path`): What `save_model` wrote.
            learning_rate_factor (`float`): Multiplies the run's learning rate.
        """
        self.trained.read_checkpoint(folder)
        if self.ema is not None:
            for average, parameter in zip(
                self.ema.shadow_params, trainable_parameters(self.network), strict=True
            ):
                average.copy_(parameter.detach())
        for part in self.checkpoints.parts:
            if isinstance(part, SnapshotReference) and not isinstance(part, StartLoraReference):
                part.take()  # averages and earlier policies follow the weights
            elif isinstance(part, RolloutSource):
                part.queue.clear()  # drawn by the weights that are left
        self.optimizer.optimizer.state.clear()
        self.slow_down(learning_rate_factor)

    def slow_down(self, factor: float) -> None:
        """Multiply the run's learning rate. It has no effect on a schedule of the user.

        Args:
            factor (`float`): Of the learning rate that the settings give.
        """
        schedule = self.lr_scheduler
        if not isinstance(schedule, LambdaLR):
            return
        groups = schedule.optimizer.param_groups
        schedule.base_lrs = [factor * group["initial_lr"] for group in groups]
        for group, base, rate in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * rate(schedule.last_epoch)

    def make_run(self) -> Run:
        """Build the state of the loop from the current position.

        Returns:
            `Run`: What `fit` works on.
        """
        data = self.data_pipeline
        self.window = MetricWindow()
        parameters = self._trained_parameters()
        return Run(
            args=self.args,
            accelerator=self.accelerator,
            network=self.prepared,
            parameters=parameters,
            optimizer=self.optimizer,
            learning_rate=self.lr_scheduler,
            batches=self.source.batches(data, self.state.samples_seen),
            state=self.state,
            control=self.control,
            samples_per_step=data.global_batch,
            rows=None if data.streaming else data.epoch_rows * self.passes_per_group,
            passes=self.args.gradient_accumulation_steps * self.passes_per_batch,
            after_update=functools.partial(self._update_average, parameters),
            window=self.window,
        )

    def _update_average(self, parameters: Callable[[], list[Parameter]]) -> None:
        if self.ema is not None:
            update_ema(self.ema, parameters(), self.accelerator.device, self.args.offload_ema)

    def _trained_parameters(self) -> Callable[[], list[Parameter]]:
        """Return what lists the trainable parameters in every step.

        They are listed once: walking through SDXL's modules takes 30 ms. What a sharded
        network shows changes with its state.
        """
        if sharded_modules(self.network):
            return functools.partial(trainable_parameters, self.network)
        parameters = trainable_parameters(self.network)
        return lambda: parameters

    def _build_validation(self) -> Validation | None:
        if self.validation_config is None:
            return None
        engine = self.accelerator.distributed_type
        if self.validation_config.on_hacking == "rollback" and engine == "DEEPSPEED":
            raise ConfigError(
                "validation.on_hacking",
                "rollback does not reach the weights that DeepSpeed keeps; give stop or warn",
            )
        return Validation(
            self.validation_config,
            self.output_dir,
            self.accelerator,
            self.backbone,
            self.network,
            averaged_weights=self.averaged_weights,
            save_model=self.save_model,
            side=self.data_config.resolution,
            reward=self.training_reward(),
            training_names=self.training_names,
            validations=math.ceil(self.state.max_steps / self.validation_config.validation_steps),
        )

    def precompute_reference_errors(self) -> None:
        """Compute the reference's errors of the whole dataset.

        Does nothing without `precompute_ref_errors`.
        """
        if not self.args.precompute_ref_errors:
            return
        key = self.record.reference_errors_key(self.data_pipeline.transform.fingerprint)
        precomputed = ReferenceErrors(self.data_pipeline, self.output_dir, key)
        computed = precomputed.fill(self.reference_errors, is_fsdp(self.accelerator))
        state = "computed" if computed else "read back"
        self.source = DatasetSource(precomputed)
        if isinstance(self.reference_model, FrozenCopyReference):
            self.reference_model.rest()
        self.notes.append(f"reference errors: {self.args.ref_error_draws} draws per row, {state}")

    def _measure_rounding(self) -> None:
        """Note how much half precision moves the margins of the run."""
        paired = self.data_kind in ("pair", "ranked") and not self.reference_free
        fixed = self.data_config.online is None and not self.data_pipeline.streaming
        alone = self.accelerator.is_main_process and not is_fsdp(self.accelerator)
        if not (paired and fixed and alone):
            return
        sentence = measure_rounding(
            self.sampling_policy, self.network, self.backbone, self.data_pipeline
        )
        if sentence is not None:
            self.notes.append(sentence)

    def _announce(self, checkpoint: Path | None) -> None:
        """Print the facts of the run, write its config and start the trackers."""
        if checkpoint is not None:
            self.record.trains = self.state.global_step < self.state.max_steps
        self._write_config()
        say, record = self.accelerator.print, self.record
        for line in [
            *record.lines,
            *self.notes,
            *([] if self.reference_free else [self.start_message]),
        ]:
            if line:
                say(line)
        if checkpoint is not None:
            say(
                f"resuming from {checkpoint} at step {self.state.global_step} of "
                f"{self.state.max_steps}"
            )
            if not record.trains:
                say("the checkpoint has all these steps, so none is taken; raise train.max_steps")
        start_trackers(self.accelerator, self.args)

    def _write_config(self) -> None:
        self.record.lines = self.record.facts()
        if self.accelerator.is_main_process:
            self.record.write_config(self.output_dir)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Average the loss and the metrics over the evaluation data.

        Each row has one fixed draw of noise and timestep.

        Args:
            eval_dataset (*optional*): Data to use instead of the trainer's.

        Returns:
            `dict[str, float]`: The averages, named `eval/...`.

        Raises:
            ConfigError: There are no evaluation data.
        """
        data = self.evaluation_data(eval_dataset)
        with self._working():
            metrics = self.evaluation_metrics(data)
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def evaluation_data(self, eval_dataset: Any = None) -> DataPipeline:
        """Prepare the evaluation data, without caches and without dropped prompts.

        Args:
            eval_dataset (*optional*): Data to use instead of the trainer's.

        Returns:
            `DataPipeline`: The data.

        Raises:
            ConfigError: There are no evaluation data.
        """
        source = eval_dataset if eval_dataset is not None else self.eval_dataset
        if source is None:
            raise ConfigError(
                "data.dataset_test_split", "no evaluation data: name a split, or pass eval_dataset"
            )
        self.setup()
        groups = source
        if eval_dataset is not None or not isinstance(source, PreferenceDataset):
            groups = self._read_eval_data(source)
        config = dataclasses.replace(
            self.data_config, cache_latents=None, cache_text_embeddings=None
        )
        args = dataclasses.replace(
            self.args, precompute_ref_errors=False, proportion_empty_prompts=0.0
        )
        return DataPipeline(groups, config, args, self.backbone, self.accelerator)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write weights for inference, `config.yaml` and the model card.

        `pipe.load_lora_weights(output_dir)` loads a LoRA. Full fine-tuning writes a
        whole pipeline. With `use_ema` the weights are the averaged ones. All processes
        must call this.

        Args:
            output_dir (`str`, *optional*): Created if it does not exist. Defaults to
                the folder of the run.

        Raises:
            UserError: The folder holds files that are not of a run.
        """
        folder = self.output_dir
        if output_dir is not None:
            folder = Path(output_dir).expanduser()
            check_savable(folder, self.output_dir)
        history = self.state.log_history
        with self._working(), self.averaged_weights():
            metrics = history[-1] if history else {}
            save_model(self.record, self.accelerator, self.trained, self.prepared, metrics, folder)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Put the averaged weights into the network while a block runs.

        Does nothing without `use_ema`.
        """
        return averaged(self.ema, self.network)

    def push_to_hub(self, commit_message: str | None = None) -> str | None:
        """Upload what `save_model` wrote, from the first process.

        Saves first if the folder of the run holds no weights yet. All processes must
        call this.

        Args:
            commit_message (`str`, *optional*): Of the upload.

        Returns:
            `str`, *optional*: Address on the Hub. None on the other processes.

        Raises:
            ConfigError: The Hub refused the upload.
        """
        if not holds_model(self.output_dir):
            self.save_model()
        if process_rank() > 0:
            return None
        return push_to_hub(self.output_dir, self.hub_config or HubConfig(), commit_message)

    def dry_run(self) -> dict[str, Any]:
        """Run one batch forward and backward without writing anything.

        Returns:
            `dict[str, Any]`: What was printed about the run: `lines` and the numbers in
            them.
        """
        started = time.perf_counter()
        with self._working():
            loss, shape = self._dry_pass()
        seconds = time.perf_counter() - started
        device, first = self.accelerator.device, float(loss.mean().detach())
        report = dry_run_report(self.record, self.notes, device, shape, first, seconds)
        for line in report["lines"]:
            self.accelerator.print(line)
        return report

    def _dry_pass(self) -> tuple[Tensor, tuple[int, ...]]:
        """Run one batch. Returns the last loss and the shape of a latent."""
        check = FiniteCheck(self.state.global_step + 1)
        self.is_dry = True
        # Rounds of drawn images are not used up.
        before = {name: copy.copy(value) for name, value in vars(self.source).items()}
        try:
            with undisturbed():
                batches = self.source.batches(self.data_pipeline, self.state.samples_seen)
                for batch in self.micro_batches(self.prepare(next(batches))):
                    loss, _ = self.compute_loss(batch)
                    check.add(loss, batch)
                    self.accelerator.backward(loss.mean())
        finally:
            self.is_dry = False
            vars(self.source).update(before)
        check.finish()
        self.optimizer.zero_grad()
        return loss, tuple(batch.x0.shape[2:])

    # Hooks of the user's callbacks ----------------------------------------------------

    def _call(self, hook: str, more: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        for callback in [*self.callbacks, *more]:
            getattr(callback, hook)(self.args, self.state, self.control, trainer=self, **kwargs)
