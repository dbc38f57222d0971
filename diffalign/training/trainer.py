"""The one training loop. A method is a subclass that says which data it needs and what its loss is; see `diffalign.methods`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import set_seed
from torch import Tensor

from ..backbones import load_backbone
from ..config import HubConfig, ValidationConfig
from ..data import DataConfig, PreferenceDataset
from ..exceptions import ConfigError, UserError
from ..folder_lock import FolderLock
from ..likelihood import VariancePreserving, denoising_errors, min_snr_weight, with_zero_terminal_snr
from ..processes import process_rank
from . import hub, verbs
from .batch import Batch
from .build import (
    DTYPES,
    averaged,
    build_accelerator,
    build_ema,
    build_network,
    build_optimizer,
    build_schedule,
    trainable_parameters,
    update_ema,
)
from .callbacks import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainOutput
from .checkpoint import CheckpointManager
from .config import TrainingConfig
from .diagnostics import DivergenceGuard, check_finite, check_gradient
from .due_work import do_work, due_work, start_log, undone_work
from .feedback import VotesNeeded
from .online import Online
from .prepare import DataPipeline, ReferenceErrors, as_preferences, build_transform
from .reference import Reference, build_reference, check_reference
from .rollout import SAMPLER_RULE, Grid, make_grid
from .signals import StopSignals
from .tracking import MetricLog, MetricWindow
from .validation import Validation, check_validation

if TYPE_CHECKING:
    from peft import LoraConfig


class Trainer:
    """Trains a diffusers model. Use a method's subclass, e.g. `DiffusionDPOTrainer`.

    Args:
        model: Hub id, local folder, ``"shapes"`` or a `DiffusionPipeline`. Given a pipeline, its network is trained in place.
        ref_model (*optional*): same kinds: the reference model. None means the starting weights.
        args (`TrainingConfig`, *optional*): the method's config.
        train_dataset: anything `load_preferences` reads, or its result.
        eval_dataset (*optional*): the same, for `evaluate`.
        callbacks (`Sequence[TrainerCallback]`, *optional*): hooks.
        optimizers (*optional*): (optimizer class taking parameters, schedule function taking the optimizer); None for the config's.
        peft_config (`peft.LoraConfig`, *optional*): None means full fine-tuning.
        data (`DataConfig`, *optional*): geometry and caches.
        validation (`ValidationConfig`, *optional*): None means none.
        hub (`HubConfig`, *optional*): uploading.
        revision, variant, vae (*optional*): of the model.
        scorers (*optional*): who judges, for methods that sample while they learn: see `diffalign.training.judge.Judge`.

    Raises:
        ConfigError, UserError: on anything wrong with model, data or settings, before weights are loaded.
    """

    _name: ClassVar[str] = "Trainer"
    _tag_names: ClassVar[tuple[str, ...]] = ()
    _paper: ClassVar[dict[str, str]] = {}
    _sources: ClassVar[dict[str, str]] = {}
    """Where the default of each of the method's own fields comes from."""
    _not_public: ClassVar[str] = ""
    """What paper and code leave unsaid."""
    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig
    data_kind: ClassVar[str] = "pair"
    reference_free: ClassVar[bool] = False
    inverted: ClassVar[bool] = False
    """Whether the method prefers what people rejected."""
    can_be_online: ClassVar[bool] = True
    """Whether `data.online` can make its groups."""
    error_beta: ClassVar[bool] = True
    """Whether `beta` multiplies denoising errors, so that it can be told per latent size."""
    passes_per_batch: int = 1
    """How many micro-batches `micro_batches` yields for one batch."""

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: LoraConfig | None = None,
        *,
        data: DataConfig | None = None,
        validation: ValidationConfig | None = None,
        hub: HubConfig | None = None,
        revision: str | None = None,
        variant: str | None = None,
        vae: Any = None,
        scorers: Any = None,
    ) -> None:
        self.args = args if args is not None else self.config_class()
        if not isinstance(self.args, self.config_class):
            raise ConfigError("args", f"expected {self.config_class.__name__}, got {type(self.args).__name__}")
        self.data_config, self.validation, self.hub = data or DataConfig(), validation, hub
        self.notes: list[str] = [] if validation is None else check_validation(validation, scorers)
        self.scorers = scorers
        self.output_dir, self.peft_config, self.optimizers = Path(self.args.output_dir), peft_config, optimizers
        if self.reference_free and self.args.precompute_ref_errors:
            raise ConfigError("train.precompute_ref_errors", f"{self._name} has no reference; set it to false")
        if self.data_config.online is not None and self.args.precompute_ref_errors:
            raise ConfigError("train.precompute_ref_errors", "the images of data.online do not exist beforehand; set it to false")
        self.backbone = load_backbone(model, revision=revision, variant=variant, vae=vae)
        self.ref_backbone = None if ref_model is None else load_backbone(ref_model)
        self.ref_fingerprint: str | None = None
        if self.ref_backbone is not None:
            check_reference(self.backbone, self.ref_backbone)
            self.ref_fingerprint = self.ref_backbone.source.fingerprint(self.ref_backbone.network_name)
        self.process: Any = self.backbone.process
        self.sampler_rule = SAMPLER_RULE
        # Of the starting weights: taken before anything trains, since a given pipeline is trained in place.
        self.model_fingerprint = self.backbone.source.fingerprint(self.backbone.network_name)
        self.vae_fingerprint = self.backbone.source.fingerprint("vae")
        self.model_options = {"revision": revision, "variant": variant, "vae": vae if isinstance(vae, str) else None}
        build_transform(self.data_config, self.backbone)  # sizes are checked now, not after an hour of encoding
        source = train_dataset if train_dataset is not None else self.data_config.dataset_name or self.data_config.train_data_dir
        if source is None:
            raise ConfigError(
                "data.dataset_name", "no training data: name a Hub dataset, a folder or a file (or pass train_dataset)"
            )
        self.train_dataset = self._read_training_data(source)
        if eval_dataset is None and self.data_config.dataset_test_split and train_dataset is None:
            eval_dataset = source
        # Read once: an evaluation every few steps must not scan the data again.
        test_split = self.data_config.dataset_test_split or "test"
        self.eval_dataset = None if eval_dataset is None else self.read_dataset(eval_dataset, test_split)
        self.state, self.control = TrainerState(), TrainerControl()
        self.callbacks: list[TrainerCallback] = list(callbacks)
        self.precomputed: ReferenceErrors | None = None
        self.online: Online | None = None
        self.waiting_for: Path | None = None
        self.is_dry = False
        self._ready = False
        self._call("on_init_end")

    def _read_training_data(self, source: Any) -> PreferenceDataset:
        if self.data_config.online is None:
            return self.read_dataset(source, self.data_config.dataset_train_split)
        if not self.can_be_online:
            raise ConfigError("data.online", f"{self._name} cannot train on pairs that the policy draws; leave the section out")
        # Only the prompts are read, so there is no preference to invert: that happens to the policy's own images.
        config = dataclasses.replace(self.data_config, invert_preferences=False)
        return as_preferences(source, config, "prompt", self.data_config.dataset_train_split)

    # Hooks of a method ------------------------------------------------------------------------------------------------------

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """The data as groups of `data_kind`; a method that needs more of them checks it here.

        Raises:
            UserError: they do not hold what the method needs.
        """
        return as_preferences(source, self.data_config, self.data_kind, split, invert=self.inverted)

    def prepare(self, batch: Batch) -> Batch:
        """Before the micro-batches: self-samples, trajectories, targets. Default: the batch as it is."""
        return batch

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """The forward passes of one batch, `passes_per_batch` many. Default: one."""
        yield batch

    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per group (g,) and metrics per group, each (g,) with NaN for "does not apply"."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss")

    def on_optimizer_step(self, step: int) -> None:
        """After optimizer step number `step`."""

    # The core, as methods call it -------------------------------------------------------------------------------------------

    def errors(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Denoising errors (g, k) of policy and reference at the identical noisy samples; None without a reference."""
        reference = batch.reference_errors
        if reference is None and not self.reference_free:
            reference = self.reference_errors(batch)
        return self._errors(batch, self._predict_policy), reference

    def reference_errors(self, batch: Batch) -> Tensor:
        """(g, k), without gradient."""
        with torch.no_grad():
            return self._errors(batch, self._predict_reference)

    @cached_property
    def noising(self) -> Any:
        """The process that noises training images: the model's, rescaled for SDXL-Turbo's timesteps as in the official code."""
        rescaled = (
            self.args.timestep_sampling == "turbo" and isinstance(self.process, VariancePreserving) and self.sampler_rule > 1
        )
        return with_zero_terminal_snr(self.process) if rescaled else self.process

    def _errors(self, batch: Batch, predict: Any) -> Tensor:
        g, k = len(batch), batch.k
        x0, noise = batch.x0.flatten(0, 1), batch.noise.flatten(0, 1)
        times = batch.times.repeat_interleave(k)
        process = self.noising
        noisy = process.add_noise(x0, noise, times)
        with self.accelerator.autocast():
            prediction = predict(noisy, process.model_times(times).to(noisy.device), batch.condition)
        weight = None
        if self.args.snr_gamma is not None:
            weight = min_snr_weight(process.snr(times), self.args.snr_gamma, process.prediction_type)
            weight = weight.to(noisy.device)
        target = process.target(x0, noise, times)
        return denoising_errors(prediction, target, weight, self.args.reduction).unflatten(0, (g, k))

    def _predict_policy(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.backbone.predict(self.prepared, *self._cast(noisy, times, condition))

    def _predict_unprepared(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The policy outside training: nothing to synchronise."""
        return self.backbone.predict(self.network, *self._cast(noisy, times, condition))

    def _predict_reference(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert self.reference is not None
        return self.reference.predict(self.backbone, *self._cast(noisy, times, condition))

    def _cast(self, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        dtype = self.backbone.dtype
        return noisy.to(dtype), times, {name: value.to(dtype) for name, value in condition.items()}

    # Building ---------------------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        """Everything heavy: processes, weights, reference, caches, optimizer."""
        if self._ready:
            return
        args = self.args
        self.accelerator = build_accelerator(args, self.output_dir, args.gradient_accumulation_steps * self.passes_per_batch)
        set_seed(args.seed)  # the same on every process: LoRA must start equal
        self.backbone.place(self.accelerator.device, DTYPES[args.mixed_precision])
        self.network = build_network(self.backbone, args, self.peft_config)
        self.reference = self._make_reference()
        self.data = DataPipeline(self.train_dataset, self.data_config, args, self.backbone, self.accelerator)
        self.notes += self.data.fill_caches()
        self.lines: list[str] = []
        parameters = trainable_parameters(self.network)
        make_optimizer, make_schedule = self.optimizers
        optimizer = make_optimizer(parameters) if make_optimizer else build_optimizer(parameters, args)
        self.state.max_steps = self._max_steps()
        self.schedule = make_schedule(optimizer) if make_schedule else build_schedule(optimizer, args, self.state.max_steps)
        self.prepared, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        # Runs of earlier versions go on with diffusers' warm-up.
        averaging = dataclasses.replace(args, ema_warmup=True) if self.sampler_rule == 1 else args
        self.ema = build_ema(parameters, averaging, self.accelerator.device)
        self.checkpoints = CheckpointManager(
            self.accelerator,
            self.backbone,
            self.network,
            self.peft_config is not None,
            self.output_dir,
            args.save_total_limit,
            self.identity(),
            self.ema,
        )
        if self.data_config.online is not None:
            self.online = Online(self, self.data_config.online)
            self.checkpoints.parts.append(self.online.rounds)
        set_seed(
            (args.seed + self.accelerator.process_index) % 2**32
        )  # from here on only dropout draws from the global generators
        self._ready = True

    def make_grid(self, steps: int, eta: float) -> Grid:
        """The times of this run's sampler."""
        height, width = self.data.transform.sizes[0] if self._ready else build_transform(self.data_config, self.backbone).sizes[0]
        factor = self.backbone.size_factor
        patches = (height // factor) * (width // factor)
        offset = int(self.backbone.given_scheduler.get("steps_offset", 0)) if self.sampler_rule == 1 else None
        return make_grid(
            self.process, self.backbone.scheduler, steps, eta, patches=patches, rule=self.sampler_rule, offset=offset
        )

    def _make_reference(self) -> Reference | None:
        return None if self.reference_free else self._build_reference()

    def _build_reference(self) -> Reference:
        place = (self.accelerator.device, self.args.offload_reference)
        return build_reference(self.backbone, self.network, self.ref_backbone, self.peft_config is not None, *place)

    def _max_steps(self) -> int:
        args = self.args
        if args.max_steps is not None:
            return args.max_steps
        if self.data.streaming:
            raise ConfigError("train.max_steps", "a streamed dataset has no length; set max_steps")
        return math.ceil(len(self.data.dataset) * (args.num_train_epochs or 1) / self.data.global_batch)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to be resumed by it."""
        return hub.run_identity(self)

    # Public verbs -----------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Runs to the end (or to the first signal), writing checkpoints, logs and the final model.

        Args:
            resume_from_checkpoint (`str`, *optional*): ``latest`` or a checkpoint folder; None takes the config's.

        Raises:
            UserError: when `output_dir` holds another run, or a checkpoint does not belong to this one.
            NonFiniteLoss, CheckpointError: when training or saving fails.
        """
        resume = resume_from_checkpoint or self.args.resume_from_checkpoint
        with FolderLock(self.output_dir, "train.output_dir") as lock:
            checkpoint = hub.begin(lock, resume, self.args.overwrite_output_dir)
            if checkpoint is not None:
                self._take_sampler_rule(hub.sampler_rule(checkpoint))
            return self._train(checkpoint)

    def _take_sampler_rule(self, rule: int) -> None:
        """Goes on sampling as the checkpoint's run did."""
        if rule != self.sampler_rule and self._ready:
            raise UserError("train.resume_from_checkpoint: it is of an earlier version; resume it before anything else is called")
        self.sampler_rule = rule
        if hasattr(self.process, "legacy_first_step"):
            self.process.legacy_first_step = rule == 1
        elif rule == 1:
            self.process.clip_range = None

    def _train(self, checkpoint: Path | None) -> TrainOutput:
        self._setup()
        self.control.should_training_stop = self.control.should_save = False  # of an earlier, interrupted call
        self.checkpoints.clean()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        watch = None if self.validation is None else Validation(self)
        if watch is not None:
            watch.start(fresh=checkpoint is None)
        verbs.precompute(self)
        if checkpoint is None:
            verbs.measure_rounding(self)
        if checkpoint is not None:
            steps = self.state.max_steps
            self.state = self.checkpoints.load(checkpoint, self.args.force_resume)
            self.state.max_steps = steps
            self.schedule.last_epoch = self.state.global_step
        hub.announce(self, checkpoint)
        with StopSignals() as signals:
            metrics = self._loop(watch, signals, checkpoint)
        if signals.received is None and self.waiting_for is None:
            self.save_model(str(self.output_dir))
            if self.hub is not None and self.hub.push_to_hub:
                self.push_to_hub()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        return TrainOutput(self.state.global_step, metrics, signals.received, self.waiting_for)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Mean loss and metrics on the evaluation data, one fixed draw of noise and timestep per row."""
        return verbs.evaluate(self, eval_dataset)

    def save_model(self, output_dir: str) -> None:
        """Writes inference-ready weights, ``config.yaml`` and the model card: ``pipe.load_lora_weights(output_dir)`` for LoRA, a
        whole pipeline for full fine-tuning. With `use_ema` these are the averaged weights. All processes must call this."""
        self._setup()
        with self.averaged_weights():
            hub.save_model(self, Path(output_dir))

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The averaged weights in the network while the block runs, under `use_ema`."""
        return averaged(self.ema, self.network)

    def push_to_hub(self) -> str | None:
        """Uploads what `save_model` wrote, from the first process; returns the address there, None on the others."""
        if process_rank() > 0:
            return None
        return hub.push_to_hub(self.output_dir, self.hub or HubConfig())

    def dry_run(self) -> dict[str, Any]:
        """One batch forward and backward; nothing is written. Returns and prints what the run would be."""
        return verbs.dry_run(self)

    # The loop ---------------------------------------------------------------------------------------------------------------

    def _loop(self, watch: Validation | None, signals: StopSignals, checkpoint: Path | None) -> dict[str, float]:
        args, state, control = self.args, self.state, self.control
        log = MetricLog(self.accelerator, self.output_dir)
        undone = undone_work(self, checkpoint)
        state.log_history = start_log(log, state.global_step, undone)
        self.window, metrics = MetricWindow(), {}
        self.window.restore(state.window, self.accelerator)
        guard = DivergenceGuard(args.divergence_patience, self.accelerator.print)
        guard.replay(state.log_history)
        progress = [ProgressCallback()] if self.accelerator.is_main_process else []
        self._call("on_train_begin", progress)
        do_work(self, undone, checkpoint, log, watch, progress, signals)
        batches = self._batches()
        while state.global_step < state.max_steps and not control.should_training_stop:
            try:
                self._optimizer_step(batches)
            except VotesNeeded as asked:
                self.waiting_for = asked.folder
                state.due = []
                if not (self.output_dir / f"checkpoint-{state.global_step}").is_dir():
                    self.checkpoints.save(state)
                break
            self.on_optimizer_step(state.global_step)
            last = state.global_step == state.max_steps
            if state.global_step % args.logging_steps == 0 or last:
                metrics = self._log(log, progress)
                if guard.update(metrics, state.global_step) and args.stop_on_divergence:
                    control.should_training_stop = control.should_save = True
            self._call("on_step_end", progress)
            if self._interrupted(signals):
                control.should_training_stop = control.should_save = True
            state.due = due_work(self, watch, last)
            path = None
            if control.should_save or last or (args.save_steps and state.global_step % args.save_steps == 0):
                control.should_save = False
                state.window = self.window.dump(self.accelerator)
                state.due = ["on_save", *state.due]
                path = self.checkpoints.save(state)
            do_work(self, state.due, path, log, watch, progress, signals)
        self._call("on_train_end", progress)
        return metrics

    def _batches(self) -> Iterator[Any]:
        """This process's micro-batches from the position of the run."""
        return self.data.batches(self.state.samples_seen) if self.online is None else self.online.rounds.batches(self)

    def _next_batch(self, batches: Iterator[Any]) -> Batch:
        if self.online is not None:
            return self.prepare(self.online.rounds.next(batches))
        examples = next(batches)
        whole = self.data.builder(examples)
        if self.precomputed is not None:
            self.precomputed.attach(whole, examples)
        return self.prepare(whole)

    def _interrupted(self, signals: StopSignals) -> bool:
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if signals.received is not None:
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return False
        signals.received = signals.received or 15  # another process was told to stop: so are we all
        return True

    def _optimizer_step(self, batches: Iterator[Any]) -> None:
        args, state = self.args, self.state
        for _ in range(args.gradient_accumulation_steps):
            for batch in self.micro_batches(self._next_batch(batches)):
                with self.accelerator.accumulate(self.prepared):
                    loss, metrics = self.compute_loss(batch)
                    check_finite(loss, batch, self.state.global_step + 1)
                    self.accelerator.backward((batch.weights * loss).mean())
                    self.window.add({"train/loss": loss, **metrics})
                    if self.accelerator.sync_gradients and args.max_grad_norm is not None:
                        # A list: a generator would be exhausted after one use, and clipping would silently do nothing.
                        norm = self.accelerator.clip_grad_norm_(trainable_parameters(self.network), args.max_grad_norm)
                        self.window.add({"train/grad_norm": torch.as_tensor(norm)})
                        # Under fp16 the scaler leaves such a step out and scales less.
                        if self.accelerator.scaler is None:
                            check_gradient(torch.as_tensor(norm), batch, state.global_step + 1)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        self.schedule.step()
        state.global_step += 1
        state.samples_seen += self.data.global_batch
        if not self.data.streaming:
            state.epoch = state.samples_seen / len(self.data.dataset)
        if self.ema is not None:
            update_ema(self.ema, trainable_parameters(self.network), self.accelerator.device, self.args.offload_ema)

    def _log(self, log: MetricLog, progress: list[ProgressCallback]) -> dict[str, float]:
        metrics = self.window.reduce(self.accelerator)
        metrics |= {"train/lr": self.optimizer.param_groups[0]["lr"], "epoch": self.state.epoch}
        log.write(metrics, self.state.global_step)
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self._call("on_log", progress, logs=metrics)
        return metrics

    def _call(self, hook: str, more: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        for callback in [*self.callbacks, *more]:
            getattr(callback, hook)(self.args, self.state, self.control, trainer=self, **kwargs)
