"""What a trainer does besides training: evaluating, and trying a run out."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import ConfigError
from ..likelihood import implicit_rewards
from ..weight_files import explained
from . import hub
from .diagnostics import check_finite
from .prepare import DataPipeline, ReferenceErrors
from .reference import without_dropout
from .rollout import sampling_mode
from .tracking import MetricWindow

if TYPE_CHECKING:
    from .trainer import Trainer


def evaluation_data(trainer: Trainer, eval_dataset: Any, **options: Any) -> DataPipeline:
    """The evaluation data of a trainer, uncached; `options` replace arguments of the run.

    Raises:
        ConfigError: there are none.
    """
    data = eval_dataset if eval_dataset is not None else trainer.eval_dataset
    if data is None:
        raise ConfigError("data.dataset_test_split", "no evaluation data: name a split, or pass eval_dataset")
    trainer._setup()
    groups = trainer.read_dataset(data, trainer.data_config.dataset_test_split or "test")
    config = dataclasses.replace(trainer.data_config, cache_latents=None, cache_text_embeddings=None)
    args = dataclasses.replace(trainer.args, **options)
    return DataPipeline(groups, config, args, trainer.backbone, trainer.accelerator)


def precompute(trainer: Trainer) -> None:
    """The reference's errors of the whole dataset, under `precompute_ref_errors`."""
    if not trainer.args.precompute_ref_errors:
        return
    draws = hub.draw_settings(trainer.args)
    identity = {
        **trainer.identity(),
        "lora": None,
        "lora_form": None,
        "args": draws,
        "transform": trainer.data.transform.fingerprint,
    }
    trainer.precomputed = ReferenceErrors(trainer.data, trainer.output_dir, hub.digest(identity))
    fresh = trainer.precomputed.fill(trainer.reference_errors)
    state = "computed" if fresh else "read back"
    trainer.notes.append(f"reference errors: {trainer.args.ref_error_draws} draws per row, {state}")


def measure_rounding(trainer: Trainer) -> None:
    """Notes what rounding alone does to the logits of a run in half precision: the same weights on one batch, there and in float32.

    One forward pass each. Under LoRA it takes a copy of the network in float32 for that moment.
    """
    args, data = trainer.args, trainer.data
    paired = trainer.data_kind in ("pair", "ranked") and not (trainer.reference_free or trainer.online or data.streaming)
    if args.mixed_precision == "no" or not paired or not hasattr(args, "beta") or not trainer.error_beta:
        return
    if not trainer.accelerator.is_main_process:
        return
    device = trainer.accelerator.device
    try:
        spread, pairs = _rounding(trainer)
    except Exception as error:  # no memory, an attention backend without float32, quantised weights: the run does without it
        trainer.notes.append(f"rounding: not measured ({type(error).__name__}: {explained(error)[:100]})")
    else:
        trainer.notes.append(
            f"rounding: {args.mixed_precision} alone moves the logit of the same weights by {spread:.2g} (root mean square of {pairs} "
            "pairs against float32); until rewards/margins grow beyond it, margins and accuracies are mostly rounding, and the gradient "
            "is not"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _rounding(trainer: Trainer) -> tuple[float, int]:
    """(root mean square of the logit that rounding makes, number of pairs)."""
    network, data, device = trainer.network, trainer.data, trainer.accelerator.device
    batch = data.builder([data.reader[key] for key in data.chunks([(0, row) for row in range(len(data.dataset))])[0]])
    needed = 4 * sum(parameter.numel() for parameter in network.parameters())
    if trainer.peft_config is not None and device.type == "cuda" and needed > 0.5 * torch.cuda.mem_get_info(device)[0]:
        raise MemoryError(f"a copy of the network in float32 needs {needed / 2**30:.1f} GiB")
    with sampling_mode(network):
        rounded = trainer._errors(batch, trainer._predict_unprepared)
        copied = copy.deepcopy(network).float() if trainer.peft_config is not None else copy.copy(network)
        vars(copied).pop("forward", None)  # accelerate's, which casts again (and belongs to the original)

        def predict(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                exact = {name: value.float() for name, value in condition.items()}
                return trainer.backbone.predict(copied, noisy.float(), times, exact)

        rewards = implicit_rewards(rounded, trainer._errors(batch, predict), trainer.args.beta)  # type: ignore[attr-defined]
    return float((rewards[:, 0] - rewards[:, 1]).square().mean().sqrt()), len(batch)


def evaluate(trainer: Trainer, eval_dataset: Any) -> dict[str, float]:
    """See `Trainer.evaluate`; called without gradients."""
    pipeline = evaluation_data(trainer, eval_dataset, precompute_ref_errors=False, proportion_empty_prompts=0.0)
    window = MetricWindow()
    without_dropout(trainer.network)
    for examples in pipeline.passes():
        loss, metrics = trainer.compute_loss(trainer.prepare(pipeline.builder(examples)))
        window.add({"loss": loss, **metrics})
    trainer.network.train()
    result = {f"eval/{name}": value for name, value in window.reduce(trainer.accelerator).items()}
    trainer._call("on_evaluate", metrics=result)
    return result


def dry_run(trainer: Trainer) -> dict[str, Any]:
    """See `Trainer.dry_run`."""
    started = time.perf_counter()
    trainer.is_dry = True
    trainer._setup()
    for batch in trainer.micro_batches(trainer._next_batch(trainer._batches())):
        loss, _ = trainer.compute_loss(batch)
        check_finite(loss, batch, trainer.state.global_step + 1)
        trainer.accelerator.backward(loss.mean())
    trainer.optimizer.zero_grad()
    report = hub.dry_run_report(trainer, batch, float(loss.mean().detach()), time.perf_counter() - started)
    for line in report["lines"]:
        trainer.accelerator.print(line)
    return report
