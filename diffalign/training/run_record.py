"""The facts that a run says about itself, collected once: printed, saved in config.yaml and compared on resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backbones import Backbone
from ..config.yaml_text import dump_yaml
from ..data import DataConfig, PreferenceDataset
from ..runtime.files import write_atomically
from ..runtime.versions import versions
from .checkpoint import STATE_FILE
from .config import TrainingConfig
from .diagnostics import beta_message
from .online.rollout import SAMPLER_RULE
from .sections import HubConfig, ValidationConfig

if TYPE_CHECKING:
    from peft import LoraConfig

_DRAW_FIELDS = (
    "seed",
    "ref_error_draws",
    "proportion_empty_prompts",
    "shared_noise",
    "noise_offset",
    "timestep_sampling",
    "logit_mean",
    "logit_std",
    "snr_gamma",
    "reduction",
    "mixed_precision",
)
_LORA_FORM = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
"""What else of a `LoraConfig` decides what its weights mean."""


def sampler_rule(checkpoint: Path) -> int:
    """The rule by which a checkpoint's run samples; a damaged file is reported later.

    See `diffalign.training.online.rollout.SAMPLER_RULE`.
    """
    try:
        record = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
        return int(record["identity"].get("sampler_rule", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SAMPLER_RULE


def _plain(value: Any) -> Any:
    """A value of a `LoraConfig` as JSON gives it back; None for what is empty or off."""
    if isinstance(value, (set, tuple, list)):
        value = sorted(map(str, value))
    return json.loads(json.dumps(value, default=str)) or None


def digest(values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class BuiltFacts:
    """What is known once the weights and the data are there.

    Attributes:
        trainable, total: numbers of parameters.
        size: (height, width) of the images.
        num_processes, global_batch, max_steps: of the training.
        rows: groups of the dataset; None where it is streamed.
        dropped_sizes: groups left out because their images differ in aspect.
        reference: description of the reference model; None without one.
    """

    trainable: int
    total: int
    size: tuple[int, int]
    num_processes: int
    global_batch: int
    max_steps: int
    rows: int | None
    dropped_sizes: int
    reference: str | None

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps until every row was seen once."""
        return None if self.rows is None else -(-self.rows // self.global_batch)


@dataclass
class RunRecord:
    """What a run is: its method, model, data and settings.

    Attributes:
        name, tags, paper: of the method.
        method: its name in a run file, or the name of a class that is none.
        error_beta: whether `beta` multiplies denoising errors.
        args, data_config, validation, hub, peft_config, scorers: as the run was given them.
        model_options: revision, variant and vae of the model, where they are names.
        backbone, ref_backbone: the model families of policy and reference model.
        dataset: the training data.
        model_fingerprint, ref_fingerprint, vae_fingerprint: of the weights before training.
        sampler_rule: by which the run draws trajectories.
        passed_in_python: further arguments that a run file cannot hold, in words.
        built: set when weights and data are there.
        lines: what was printed at the start.
    """

    name: str
    tags: tuple[str, ...]
    paper: dict[str, str]
    method: str
    error_beta: bool
    args: TrainingConfig
    data_config: DataConfig
    validation: ValidationConfig | None
    hub: HubConfig | None
    peft_config: LoraConfig | None
    scorers: Any
    model_options: dict[str, str | None]
    backbone: Backbone
    ref_backbone: Backbone | None
    dataset: PreferenceDataset
    model_fingerprint: str
    ref_fingerprint: str | None
    vae_fingerprint: str
    sampler_rule: int
    passed_in_python: list[str]
    built: BuiltFacts | None = None
    lines: list[str] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to be resumed by it."""
        lora, form, config = None, None, self.peft_config
        if config is not None:
            targets = str(sorted(config.target_modules or self.backbone.lora_targets))
            lora = {"r": config.r, "alpha": config.lora_alpha, "targets": targets}
            form = {name: _plain(getattr(config, name, None)) for name in _LORA_FORM}
        # With buckets the order of the data depends on the batch.
        bucketed = self.data_config.aspect_ratio_buckets
        return {
            "method": self.name,
            "model": self.model_fingerprint,
            "dataset": self.dataset.fingerprint,
            "lora": lora,
            "lora_form": form,
            "reference": self.ref_fingerprint,
            "autoencoder": self.vae_fingerprint,
            "precision": self.args.mixed_precision,
            "sampler_rule": self.sampler_rule,
            "seed": self.args.seed,
            "bucketed_batch": self.args.per_device_train_batch_size if bucketed else None,
        }

    def reference_errors_key(self, transform: str) -> str:
        """Identity of precomputed reference errors: everything that they depend on.

        Args:
            transform (`str`): fingerprint of the image transform.
        """
        draws = {name: getattr(self.args, name) for name in _DRAW_FIELDS}
        own = {"lora": None, "lora_form": None, "args": draws, "transform": transform}
        return digest({**self.identity(), **own})

    def facts(self) -> list[str]:
        """Lines that say what changes the meaning of the run and would otherwise be silent."""
        assert self.built is not None
        args, built = self.args, self.built
        height, width = built.size
        kind = "LoRA" if self.peft_config is not None else "full fine-tuning"
        prediction = self.backbone.process.prediction_type
        epoch = "" if built.rows is None else f", {built.steps_per_epoch} per epoch"
        lines = [
            f"{self.name} on {self.backbone.source.name} ({prediction}), {kind}: "
            f"{built.trainable:,} of "
            f"{built.total:,} parameters train",
            f"data: {self.dataset.report.summary()}",
            f"batch: {args.per_device_train_batch_size} groups x "
            f"{args.gradient_accumulation_steps} passes x "
            f"{built.num_processes} processes = {built.global_batch} per optimizer step; "
            f"{built.max_steps} steps{epoch}",
            f"learning rate {args.learning_rate:g} as it is (never scaled), "
            f"{args.lr_scheduler}, warm-up "
            f"{args.warmup_steps} steps; precision {args.mixed_precision}; images {height}x{width}",
        ]
        if built.dropped_sizes:
            lines.append(
                f"data: {built.dropped_sizes} groups dropped because their images differ in aspect"
            )
        if built.reference is not None:
            other = (
                f" from {self.ref_backbone.source.name}" if self.ref_backbone is not None else ""
            )
            lines.append(f"reference: {built.reference}{other}")
        beta = vars(args).get("beta")  # of methods that have one
        if beta is not None and self.error_beta:
            lines.append(
                beta_message(beta, self.backbone.latent_shape(height, width), args.reduction)
            )
        return lines

    def values(self) -> dict[str, Any]:
        """The run as a run file's values: `diffalign train --config config.yaml` repeats it."""
        values: dict[str, Any] = {"method": self.method, "model": self.backbone.source.name}
        values |= {name: value for name, value in self.model_options.items() if value is not None}
        if self.ref_backbone is not None and self.ref_backbone.source.pipe is None:
            values["ref_model"] = self.ref_backbone.source.name
        if self.peft_config is not None:
            config = self.peft_config
            targets = config.target_modules or self.backbone.lora_targets
            values["lora"] = {  # the fields of `LoraSection`
                "r": config.r,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
                "target_modules": targets if isinstance(targets, str) else sorted(targets),
                "init": "gaussian" if config.init_lora_weights == "gaussian" else "default",
                "use_dora": config.use_dora,
                "use_rslora": config.use_rslora,
                "rank_pattern": dict(config.rank_pattern),
                "alpha_pattern": dict(config.alpha_pattern),
            }
        values["data"] = dataclasses.asdict(self.data_config)
        # How this call went on is no part of the run.
        started_by = {
            "resume_from_checkpoint": None,
            "overwrite_output_dir": False,
            "force_resume": False,
        }
        values["train"] = dataclasses.asdict(self.args) | started_by
        if isinstance(self.scorers, dict):
            values["rewards"] = self.scorers
        for name, section in (("validation", self.validation), ("hub", self.hub)):
            if section is not None:
                values[name] = dataclasses.asdict(section)
        return values

    def not_repeated(self) -> list[str]:
        """What the run was given in Python that `values` cannot hold, in words."""
        names = []
        if self.backbone.source.pipe is not None:
            names.append("the model, a pipeline object")
        if self.ref_backbone is not None and self.ref_backbone.source.pipe is not None:
            names.append("ref_model, a pipeline object")
        if self.backbone.source.vae is not None and self.model_options["vae"] is None:
            names.append("vae, an object")
        if not (self.data_config.dataset_name or self.data_config.train_data_dir):
            names.append("the data, passed as train_dataset")
        names += self.passed_in_python
        if self.scorers is not None and not isinstance(self.scorers, dict):
            names.append("scorers")
        config = self.peft_config
        if config is not None:
            names += [
                f"peft_config.{name}"
                for name in (
                    "exclude_modules",
                    "layers_to_transform",
                    "layers_pattern",
                    "lora_bias",
                    "use_qalora",
                )
                if getattr(config, name, None)
            ]
            if config.init_lora_weights not in (True, "gaussian"):
                names.append(f"peft_config.init_lora_weights {config.init_lora_weights!r}")
        return names

    def write_config(self, folder: Path) -> None:
        """Write ``config.yaml``: runnable values, with the run's facts as comments on top."""
        missing = self.not_repeated()
        notes = (
            [
                f"This file alone does not repeat the run: it was given {', '.join(missing)} "
                "in Python."
            ]
            if missing
            else []
        )
        notes += [
            *self.lines,
            f"dataset fingerprint {self.dataset.fingerprint}",
            json.dumps(versions()),
        ]
        comments = "".join(f"# {line}\n" for note in notes for line in note.splitlines())
        write_atomically(folder / "config.yaml", (comments + dump_yaml(self.values())).encode())


def peak_memory(device: torch.device) -> tuple[float, str]:
    """(GiB, what it is): the device's peak allocation, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "peak device memory"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "peak memory, which this system does not tell"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss * scale / 2**30, "peak resident memory of the process"


def dry_run_report(
    record: RunRecord,
    notes: list[str],
    device: torch.device,
    latent_shape: tuple[int, ...],
    loss: float,
    seconds: float,
) -> dict[str, Any]:
    """What `Trainer.dry_run` prints and returns."""
    assert record.built is not None
    memory, kind = peak_memory(device)
    lines = [*record.facts(), *notes]
    lines += [
        f"{kind}: {memory:.2f} GiB; loss of the first batch {loss:.4f}; {seconds:.1f} s with "
        "loading",
        "dry run: no step was taken and nothing was written, caches apart",
    ]
    return {
        "lines": lines,
        "trainable_parameters": record.built.trainable,
        "peak_memory_gib": memory,
        "effective_batch": record.built.global_batch,
        "steps_per_epoch": record.built.steps_per_epoch,
        "loss": loss,
        "latent_shape": latent_shape,
    }
