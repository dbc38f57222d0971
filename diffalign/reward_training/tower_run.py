"""Train the towers of a scorer on judgements, by the loop of the diffusion trainers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from ..errors import ConfigError
from ..rewards.scorers.trained import FILE
from ..runtime.files import write_atomically
from ..runtime.folder_lock import FolderLock
from ..runtime.seeds import undisturbed
from ..training.build import (
    build_accelerator,
    keep_buffers,
    steps_of_epochs,
    trainable_parameters,
)
from ..training.callbacks import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainOutput,
)
from ..training.checkpoint import CheckpointManager
from ..training.loop import Run, fit
from ..training.optimizer import build_lr_scheduler, build_optimizer
from ..training.periodic import StopOnSignal, in_order
from ..training.resume import group_settings, resume_settings
from ..training.run_folder import begin
from ..training.signals import StopSignals
from ..training.tracking import MetricLog, MetricWindow, finish_trackers, start_trackers
from ..training.trained_weights import REWARD_RUN
from .captions import CaptionData
from .config import RewardConfig
from .judgements import Judgements
from .pair_groups import PairBatch, PairData
from .pair_loss import fit_scale, fit_temperature, label_loss, margins_of_scores, part_loss
from .pair_tensors import make_labels
from .report import decided_accuracy, hits_of
from .tower_network import BestStep, TowerNetwork, TowerWeights

if TYPE_CHECKING:
    from peft import LoraConfig

_LOOKS = 10


class TowerRun:
    """One training of towers: the task of the loop, and what surrounds it.

    Args:
        scorer (`ModelScorer`): The base. Its towers are trained in place.
        args (`RewardConfig`): The settings, with `towers` other than frozen.
        train (`Judgements`): Pairs to train on.
        val (`Judgements`): Pairs that choose the step.
        test (`Judgements`): Pairs that the report is about.
        lora (`LoraConfig`, *optional*): The LoRA to train. None trains all weights.
        identity (`dict[str, Any]`): Base and data. Only a run with the same values
            resumes a checkpoint.
        callbacks (`Sequence[TrainerCallback]`, *optional*, defaults to `()`): The
            user's.
        captions (`CaptionData`, *optional*): Captioned images for the anchor.

    Attributes:
        accelerator (`Accelerator`): Processes and precision.
        base_scores (`dict[str, Tensor]`): Scores of the base on `val` and `test`.
        best (`BestStep`): The step with the lowest validation loss.
    """

    def __init__(
        self,
        scorer: Any,
        args: RewardConfig,
        train: Judgements,
        val: Judgements,
        test: Judgements,
        lora: LoraConfig | None,
        identity: dict[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
        captions: CaptionData | None = None,
    ) -> None:
        self.captions = captions
        self.scorer, self.args, self.lora, self.identity = scorer, args, lora, identity
        self.callbacks = list(callbacks)
        self.output_dir = Path(args.output_dir)
        self.state, self.control = TrainerState(), TrainerControl()
        parts = {"train": train, "val": val, "test": test}
        self.data = {
            name: PairData(part, make_labels(part, args.prompt_weights), scorer)
            for name, part in parts.items()
        }
        self.accelerator: Accelerator = build_accelerator(
            args, self.output_dir, args.gradient_accumulation_steps
        )
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise ConfigError(
                "--accelerate_config",
                "towers of a reward are trained by DDP, they are small; take ddp",
            )
        self.base_scores: dict[str, Tensor] = {}

    # Building -------------------------------------------------------------------------

    def setup(self) -> None:
        """Build network, optimizer and checkpoints, and measure the base."""
        args, accelerator = self.args, self.accelerator
        self.scorer.to(accelerator.device)
        set_seed(args.seed)  # equal on every process, so that a LoRA starts equal
        self.network = TowerNetwork(self.scorer, self.lora).to(accelerator.device)
        self.network.freeze_unused(self._first_batch())
        for name in ("val", "test"):
            self.base_scores[name] = self.scores(name)
        self._fit_factor()
        if args.gradient_checkpointing:
            self.network.checkpoint_activations()
        self.state.max_steps = self._planned_steps()
        if args.eval_steps is None:
            every = max(1, self.state.max_steps // _LOOKS)
            self.args = args = dataclasses.replace(args, eval_steps=every)
        optimizer = build_optimizer(trainable_parameters(self.network), args)
        self.schedule = build_lr_scheduler(optimizer, args, self.state.max_steps)
        self.prepared, self.optimizer = accelerator.prepare(self.network, optimizer)
        keep_buffers(self.prepared)
        self.network.train()
        self.checkpoints = CheckpointManager(
            accelerator,
            self.network,
            self.prepared,
            TowerWeights(self.network),
            self.output_dir,
            args.save_total_limit,
            self.identity | {"optimizer": type(optimizer).__name__},
        )
        self.best = BestStep(self.network)
        self.checkpoints.parts.append(self.best)
        # From here on, dropout alone uses the global generators.
        set_seed((args.seed + accelerator.process_index) % 2**32)

    def _first_batch(self) -> PairBatch:
        data = self.data["train"]
        return data.placed(data.collate([data[0, 0]]), self.accelerator.device)

    def _fit_factor(self) -> None:
        """Start at the confidence that fits the labels best."""
        val, head = self.data["val"], self.network.head
        factor = fit_scale(margins_of_scores(self.base_scores["val"]), val.labels, self.args)
        with torch.no_grad():
            head.log_factor.fill_(torch.tensor(factor).log())

    def _planned_steps(self) -> int:
        if self.args.max_steps is not None:
            return self.args.max_steps
        return steps_of_epochs(self.args, len(self.data["train"]), self._groups_per_step)

    @property
    def _groups_per_step(self) -> int:
        args = self.args
        groups = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return groups * self.accelerator.num_processes

    # The task of the loop -------------------------------------------------------------

    def prepare(self, batch: PairBatch) -> PairBatch:
        """See `Task`."""
        return batch

    def micro_batches(self, batch: PairBatch) -> Iterator[PairBatch]:
        """See `Task`."""
        yield batch

    def compute_loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of each group, its pairs' weighted mean.

        Args:
            batch (`PairBatch`): g groups.

        Returns:
            `tuple[Tensor, dict[str, Tensor]]`: Loss (g,), and metrics of the pairs.
        """
        winners = batch.winners if self.args.anchor else None
        shown = batch.pixels, batch.prompts, batch.owner
        scores, contrast = self.prepared(*shown, winners, batch.captioned)
        margins = scores[batch.first] - scores[batch.second]
        rows = batch.shares * label_loss(margins, batch.labels, self.args)
        loss = torch.zeros_like(batch.weights).index_add(0, batch.group, rows)
        metrics = {}
        if contrast is not None:
            # The weights of groups are for preferences alone.
            loss = loss + self.args.anchor * contrast.mean() / batch.weights.mean()
            metrics["train/anchor"] = contrast.detach()
        decided = batch.labels != 0.5
        hits = hits_of(margins.detach(), batch.labels)[decided]
        sign = torch.where(batch.labels > 0.5, 1.0, -1.0)[decided]
        return loss, metrics | {
            "rewards/accuracies": hits,
            "rewards/margins": sign * margins.detach()[decided],
        }

    def on_optimizer_step(self, step: int) -> None:
        """See `Task`."""

    # Measuring ------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, name: str) -> Tensor:
        """Score both images of all pairs of a part. All processes must call this.

        Args:
            name (`str`): `val` or `test`.

        Returns:
            `Tensor`: (n, 2), float64, on the CPU.
        """
        data, rows, values = self.data[name], [], []
        was_training = self.network.training
        self.network.eval()
        for batch in data.share(self.args.per_device_train_batch_size, self.accelerator):
            with self.accelerator.autocast():
                scores, _ = self.network(batch.pixels, batch.prompts, batch.owner)
            values.append(torch.stack([scores[batch.first], scores[batch.second]], 1))
            rows += [row for i in batch.row_ids for _, _, row in data.groups[i].pairs]
        self.network.train(was_training)
        mine = list(zip(rows, torch.cat(values).tolist() if values else [], strict=True))
        result = torch.zeros(len(data.labels), 2, dtype=torch.float64)
        for row, both in gather_object(mine):
            result[row] = torch.tensor(both, dtype=torch.float64)
        return result

    def evaluate(self) -> dict[str, float]:
        """Measure loss and accuracy on the validation pairs, and keep the best weights.

        Returns:
            `dict[str, float]`: `eval/loss` and `eval/accuracy`.
        """
        metrics = self._look()
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def _look(self) -> dict[str, float]:
        labels, margins = self.data["val"].labels, margins_of_scores(self.scores("val"))
        loss = float(part_loss(margins, labels, self.args))
        self.best.offer(loss, self.state.global_step, self._losses(margins)[1])
        return {"eval/loss": loss, "eval/accuracy": decided_accuracy(margins, labels)}

    def _losses(self, margins: Tensor) -> tuple[float, list[float]]:
        """Loss of all validation pairs and of each prompt, at the best factor."""
        part, labels = self.data["val"].part, self.data["val"].labels
        margins = fit_temperature(margins, labels, self.args) * margins
        losses = labels.weight * label_loss(margins, labels.label, self.args, labels.margin)
        _, prompts = torch.as_tensor(part.prompt).unique(return_inverse=True)
        totals = torch.bincount(prompts, losses)
        weights = torch.bincount(prompts, labels.weight)
        counted = weights > 0
        by_prompt = (totals[counted] / weights[counted]).tolist()
        return float(part_loss(margins, labels, self.args)), by_prompt

    # Running --------------------------------------------------------------------------

    def train(self, finish: Callable[[], None]) -> TrainOutput:
        """Train to the end, or until the first signal.

        Args:
            finish (`Callable`): Called at the end, when the network has the best
                weights and the folder is still locked. All processes call it.

        Returns:
            `TrainOutput`: Steps done and the last metrics.

        Raises:
            UserError: The folder holds another run, or the checkpoint is of another.
            NonFiniteLoss, NonFiniteWeights: Loss, gradient or weights are not finite.
            CheckpointError: A checkpoint could not be written.
        """
        with FolderLock(self.output_dir, "train.output_dir") as lock:
            resume = self.args.resume_from_checkpoint
            checkpoint = begin(lock, resume, self.args.overwrite_output_dir)
            self.setup()
            self.checkpoints.clean()
            mark = self.output_dir / REWARD_RUN
            if self.accelerator.is_main_process:
                write_atomically(mark, b"")  # a killed run is known before its first checkpoint
                # What is trained now makes another reward of the folder, at the end.
                (self.output_dir / FILE).unlink(missing_ok=True)
            output = self._train(checkpoint)
            if output.interrupted_by is None:
                finish()
                if self.accelerator.is_main_process:
                    mark.unlink(missing_ok=True)
            return output

    def _train(self, checkpoint: Path | None) -> TrainOutput:
        accelerator = self.accelerator
        if checkpoint is not None:
            steps = self.state.max_steps
            settings = group_settings(self.optimizer)
            self.state = self.checkpoints.load(checkpoint, self.args.force_resume)
            self.state.max_steps = steps
            for line in resume_settings(
                self.optimizer, self.schedule, settings, self.state.global_step
            ):
                accelerator.print(line)
            accelerator.print(f"resuming from {checkpoint} at step {self.state.global_step}")
            if self.state.global_step % (self.args.eval_steps or 1) == 0:
                with undisturbed():
                    self._look()  # the checkpoint was written before its evaluation
        start_trackers(accelerator, self.args)
        with StopSignals() as signals:
            undone = self.checkpoints.take_over(checkpoint, self.state)
            run = self._make_run()
            progress = [ProgressCallback()] if accelerator.is_main_process else []
            callbacks = in_order(
                log=MetricLog(accelerator, self.output_dir),
                call=functools.partial(self._call, more=progress),
                signals=signals,
                checkpoints=self.checkpoints,
                evaluate=self.evaluate,
                undone=undone,
                resumed=checkpoint,
            )
            fit(self, run, callbacks)
            # All processes agree, also if a signal came after the last step.
            interrupted = StopOnSignal(signals).interrupted(run)
        finish_trackers(accelerator)
        if not interrupted:
            if self.state.global_step % (self.args.eval_steps or 1):
                self.evaluate()  # the last step may be the best one
            self.best.put_back(*self._losses(margins_of_scores(self.base_scores["val"])))
        return TrainOutput(
            self.state.global_step, run.metrics, signals.received if interrupted else None
        )

    def _make_run(self) -> Run:
        args, data = self.args, self.data["train"]
        return Run(
            args=args,
            accelerator=self.accelerator,
            network=self.prepared,
            parameters=functools.partial(trainable_parameters, self.network),
            optimizer=self.optimizer,
            learning_rate=self.schedule,
            batches=self._batches(),
            state=self.state,
            control=self.control,
            samples_per_step=self._groups_per_step,
            rows=len(data),
            passes=args.gradient_accumulation_steps,
            after_update=lambda: None,
            window=MetricWindow(),
        )

    def _batches(self) -> Iterator[PairBatch]:
        args, accelerator, seen = self.args, self.accelerator, self.state.samples_seen
        batches = self.data["train"].batches(args, accelerator, seen)
        if self.captions is None:
            yield from batches
            return
        passes = seen // (args.per_device_train_batch_size * accelerator.num_processes)
        captioned = self.captions.batches(accelerator, passes)
        for batch in batches:
            batch.captioned = next(captioned)
            yield batch

    def _call(self, hook: str, more: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        for callback in [*self.callbacks, *more]:
            getattr(callback, hook)(self.args, self.state, self.control, trainer=self, **kwargs)
