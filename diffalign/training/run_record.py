"""The facts of a run, collected once.

They are printed, saved in `config.yaml`, put on the model card, and compared when a run
resumes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from ..backbones import Backbone
from ..config.yaml_text import dump_yaml
from ..data import DataConfig, PreferenceDataset
from ..runtime.files import write_atomically
from ..runtime.hashing import text_hash
from ..runtime.versions import versions
from .build import trainable_parameters
from .checkpoint import STATE_FILE
from .config import TrainingConfig
from .data_pipeline import DataPipeline
from .diagnostics import beta_message
from .online.rollout import SAMPLER_RULE
from .sections import HubConfig, ValidationConfig
from .start_lora import StartLora

if TYPE_CHECKING:
    from peft import LoraConfig

_FINGERPRINT = "dataset fingerprint"
"""Begins a line of every `config.yaml`, by which the folder of a run is known."""
_DRAW_FIELDS = (
    "seed",
    "ref_error_draws",
    "proportion_empty_prompts",
    "shared_noise",
    "noise_offset",
    "timestep_sampling",
    "min_timestep",
    "max_timestep",
    "timestep_shift",
    "grid_steps",
    "embedded_guidance",
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
"""Fields of a `LoraConfig` that change what its weights mean."""


def sampler_rule(checkpoint: Path) -> int:
    """Read the rule by which a checkpoint's run draws trajectories.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.

    Returns:
        `int`: See `diffalign.training.online.rollout.SAMPLER_RULE`. A damaged file
        gives the current rule and is reported later.
    """
    try:
        record = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
        return int(record["identity"].get("sampler_rule", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SAMPLER_RULE


def _plain(value: Any) -> Any:
    """Return a `LoraConfig` value as JSON reads it back, None if it is empty or off."""
    if isinstance(value, (set, tuple, list)):
        value = sorted(map(str, value))
    return json.loads(json.dumps(value, default=str)) or None


def digest(values: Any) -> str:
    """Return a short hash of plain values."""
    return text_hash(json.dumps(values, sort_keys=True, default=str))[:16]


@dataclass
class BuiltFacts:
    """Facts that are known once weights and data are loaded.

    Attributes:
        trainable (`int`): Number of trained parameters.
        total (`int`): Number of all parameters.
        size (`tuple[int, int]`): Height and width of the images.
        num_processes (`int`): Number of processes.
        global_batch (`int`): Groups per optimizer step over all processes.
        max_steps (`int`): Optimizer steps of the run.
        rows (`int`, *optional*): Groups of the dataset. None if it is streamed.
        dropped_sizes (`int`): Groups left out because their images differ in aspect.
        reference (`str`, *optional*): Description of the reference model.
        trained (`str`): What trains, in words.
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
    trained: str

    @classmethod
    def of(
        cls,
        network: Module,
        data: DataPipeline,
        max_steps: int,
        reference: str | None,
        trained: str,
    ) -> BuiltFacts:
        """Collect the facts.

        Args:
            network: The network that trains.
            data (`DataPipeline`): The training data.
            max_steps (`int`): Optimizer steps of the run.
            reference (`str`, *optional*): Description of the reference model.
            trained (`str`): What trains, in words.
        """
        return cls(
            trainable=sum(p.numel() for p in trainable_parameters(network)),
            total=sum(p.numel() for p in network.parameters()),
            size=data.transform.sizes[0],
            num_processes=data.accelerator.num_processes,
            global_batch=data.global_batch,
            max_steps=max_steps,
            rows=None if data.streaming else len(data.dataset),
            dropped_sizes=data.dropped_sizes,
            reference=reference,
            trained=trained,
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per pass over the data. None if it is streamed."""
        return None if self.rows is None else -(-self.rows // self.global_batch)


@dataclass
class RunRecord:
    """Everything a run knows about itself.

    Attributes:
        name (`str`): Name of the method.
        tags (`tuple[str, ...]`): Tags of the model card.
        paper (`dict[str, str]`): Title, arXiv id and BibTeX of the method's paper.
        method (`str`): Name in a run file. For another trainer class, the name of the
            class.
        args (`TrainingConfig`): Settings of the training.
        data_config (`DataConfig`): Settings of the data.
        validation (`ValidationConfig`, *optional*): Settings of the validation.
        hub (`HubConfig`, *optional*): Settings of the upload.
        peft_config (`LoraConfig`, *optional*): The LoRA.
        scorers: Scorers of a method that samples.
        model_options (`dict[str, str | None]`): revision, variant and vae of the model,
            where they are names.
        backbone (`Backbone`): The policy's model.
        ref_backbone (`Backbone`, *optional*): The reference's model.
        dataset (`PreferenceDataset`): The training data.
        model_fingerprint (`str`): Hash of the starting weights.
        ref_fingerprint (`str`, *optional*): Hash of the reference's weights.
        vae_fingerprint (`str`): Hash of the autoencoder's weights.
        scheduler_hash (`str`): Hash of the schedulers of model and reference.
        text_fingerprint (`str`): Hash of text encoders and tokenizers.
        sampler_rule (`int`): Rule by which the run draws trajectories.
        passed_in_python (`list[str]`): Further arguments that a run file cannot hold,
            in words.
        start_lora (`StartLora`, *optional*): The LoRA that the run starts from.
        built (`BuiltFacts`, *optional*): Set when weights and data are loaded.
        lines (`list[str]`): Sentences printed at the start.
        optimizer (`str`, *optional*): Class of the optimizer, when it is built.
        trains (`bool`, defaults to `True`): Whether the run takes a step.
    """

    name: str
    tags: tuple[str, ...]
    paper: dict[str, str]
    method: str
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
    scheduler_hash: str
    text_fingerprint: str
    sampler_rule: int
    passed_in_python: list[str]
    start_lora: StartLora | None = None
    built: BuiltFacts | None = None
    lines: list[str] = field(default_factory=list)
    optimizer: str | None = None
    trains: bool = True

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with a run to be resumed by it."""
        lora, form, config = None, None, self.peft_config
        if config is not None:
            modules = config.target_modules or self.backbone.lora_targets
            targets = modules if isinstance(modules, str) else str(sorted(modules))
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
            "start_lora": None if self.start_lora is None else self.start_lora.fingerprint,
            "reference": self.ref_fingerprint,
            "autoencoder": self.vae_fingerprint,
            "scheduler": self.scheduler_hash,
            "text_encoders": self.text_fingerprint,
            "precision": ", ".join(
                [
                    self.args.mixed_precision,
                    *filter(None, [self.args.quantization]),
                    *(["layerwise casting"] if self.args.layerwise_casting else []),
                ]
            ),
            "sampler_rule": self.sampler_rule,
            "seed": self.args.seed,
            "data_seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "optimizer": self.optimizer,
            "bucketed_batch": self.args.per_device_train_batch_size if bucketed else None,
        }

    def reference_errors_key(self, transform: str) -> str:
        """Return the identity of precomputed reference errors.

        Args:
            transform (`str`): Fingerprint of the image transform.
        """
        draws = {name: getattr(self.args, name) for name in _DRAW_FIELDS}
        changes = {"lora": None, "lora_form": None, "args": draws, "transform": transform}
        facts = {**self.identity(), **changes}
        for name in ("data_seed", "optimizer"):  # they change no error of the reference
            del facts[name]
        if self.start_lora is None:  # as in the keys of earlier versions
            del facts["start_lora"]
        return digest(facts)

    def facts(self) -> list[str]:
        """Return sentences about settings that change the meaning of the run."""
        assert self.built is not None
        args, built = self.args, self.built
        height, width = built.size
        prediction = self.backbone.schedule.prediction_type
        epoch = "" if built.rows is None else f", {built.steps_per_epoch} per epoch"
        lines = [
            f"{self.name} on {self.backbone.source.name} ({prediction}), {built.trained}: "
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
        if 0 < built.max_steps <= 2 * args.warmup_steps:
            lines.append(
                f"warm-up takes {args.warmup_steps} of {built.max_steps} steps, so the learning "
                "rate is small for most of the run; lower train.warmup_steps"
            )
        if self.backbone.embeds_guidance:
            lines.append(
                f"guidance {self.backbone.guidance:g}, which the network takes as an input"
            )
        if built.dropped_sizes:
            lines.append(
                f"data: {built.dropped_sizes} groups dropped because their images differ in aspect"
            )
        if built.reference is not None:
            other = (
                f" from {self.ref_backbone.source.name}" if self.ref_backbone is not None else ""
            )
            lines.append(f"reference: {built.reference}{other}")
        if args.error_beta is not None:
            shape = self.backbone.latent_shape(height, width)
            lines.append(beta_message(args.error_beta, shape, args.reduction))
        return lines

    def values(self) -> dict[str, Any]:
        """Return the values of a run file that repeats the run."""
        values: dict[str, Any] = {"method": self.method, "model": self.backbone.source.name}
        values |= {name: value for name, value in self.model_options.items() if value is not None}
        if self.ref_backbone is not None and self.ref_backbone.source.pipe is None:
            values["ref_model"] = self.ref_backbone.source.name
        if self.start_lora is not None:
            dropout = self.start_lora.config.lora_dropout
            values["lora"] = {"start_from": self.start_lora.place, "dropout": dropout}
        elif self.peft_config is not None:
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
                "rank_pattern": dict(config.rank_pattern or {}),
                "alpha_pattern": dict(config.alpha_pattern or {}),
            }
        values["data"] = dataclasses.asdict(self.data_config)
        # How a call resumed or overwrote does not belong to the run.
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
        """Return, in words, the arguments that `values` cannot hold."""
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
        """Write `config.yaml`: a run file with the facts of the run as comments.

        A resumed run that has no step left to take keeps the file of the run that took
        them.

        Args:
            folder (`Path`): Folder of the run.
        """
        if not self.trains and is_run_record(folder / "config.yaml"):
            return
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
            f"{_FINGERPRINT} {self.dataset.fingerprint}",
            json.dumps(versions()),
        ]
        comments = "".join(f"# {line}\n" for note in notes for line in note.splitlines())
        write_atomically(folder / "config.yaml", (comments + dump_yaml(self.values())).encode())


def is_run_record(file: Path) -> bool:
    """Return whether `RunRecord.write_config` wrote a file.

    Args:
        file (`Path`): `config.yaml` of a folder. It need not exist.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.startswith(f"# {_FINGERPRINT} ") for line in lines)


def peak_memory(device: torch.device) -> tuple[float, str]:
    """Return the peak memory in GiB, and which memory it is.

    Args:
        device (`torch.device`): A GPU, or the CPU for the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "peak device memory"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "peak memory (not available on this system)"
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
    """Build what `Trainer.dry_run` prints and returns.

    Args:
        record (`RunRecord`): Facts of the run.
        notes (`list[str]`): Further sentences.
        device (`torch.device`): Device of the run.
        latent_shape (`tuple[int, ...]`): Shape of a latent.
        loss (`float`): Loss of the first batch.
        seconds (`float`): Time of the dry run.

    Returns:
        `dict[str, Any]`: `lines` and the numbers in them.
    """
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
