"""What a run says about itself: facts on the screen, config.yaml, model card, final weights, upload."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import HubConfig, dump_yaml
from ..exceptions import ConfigError, UserError
from ..folder_lock import FolderLock
from ..folders import move_aside, write_atomically
from ..processes import process_rank
from .build import trainable_parameters
from .checkpoint import LORA_FILE, STATE_FILE, find_checkpoint, list_checkpoints, lora_state
from .config import TrainingConfig
from .diagnostics import LOG2_MESSAGE, beta_message
from .rollout import SAMPLER_RULE

if TYPE_CHECKING:
    from .trainer import Trainer

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
    """The rule by which a checkpoint's run samples, see `diffalign.training.rollout.SAMPLER_RULE`; a damaged file is found later."""
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
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def draw_settings(args: TrainingConfig) -> dict[str, Any]:
    """The settings that precomputed reference errors depend on."""
    return {name: getattr(args, name) for name in _DRAW_FIELDS}


def run_identity(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint must share with a run to be resumed by it."""
    lora, form, config = None, None, trainer.peft_config
    if config is not None:
        targets = str(sorted(config.target_modules or trainer.backbone.lora_targets))
        lora = {"r": config.r, "alpha": config.lora_alpha, "targets": targets}
        form = {name: _plain(getattr(config, name, None)) for name in _LORA_FORM}
    return {
        "method": trainer._name,
        "model": trainer.model_fingerprint,
        "dataset": trainer.train_dataset.fingerprint,
        "lora": lora,
        "lora_form": form,
        "reference": trainer.ref_fingerprint,
        "autoencoder": trainer.vae_fingerprint,
        "precision": trainer.args.mixed_precision,
        "sampler_rule": trainer.sampler_rule,
        "seed": trainer.args.seed,
        # With buckets the order of the data depends on it.
        "bucketed_batch": trainer.args.per_device_train_batch_size if trainer.data_config.aspect_ratio_buckets else None,
    }


def _is_finished(folder: Path) -> bool:
    """Whether final weights are there."""
    return (folder / LORA_FILE).is_file() or (folder / "model_index.json").is_file()


def begin(lock: FolderLock, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint from which a run in a folder goes on; None for a new run, for which the folder is then free.

    Raises:
        UserError: it holds another run.
    """
    folder = lock.folder
    if resume and (resume != "latest" or list_checkpoints(folder)):
        found = find_checkpoint(folder, resume)
        if found.resolve().parent == folder.resolve():
            return found
        _claim(lock, overwrite)
        return found
    _claim(lock, overwrite)
    if resume and process_rank() == 0:
        print(f"{folder} holds no checkpoint yet: the run starts from the beginning")
    return None


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed run wrote, and nothing else that may lie in its folder."""
    (folder / "logs" / "metrics.jsonl").unlink(missing_ok=True)
    for pattern in ("samples/step-*.png", "samples/base/*.png", "samples/base/*.missing", "pool/*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for path in [folder / ".best.new", folder / ".best.old", *folder.glob("feedback/round-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _claim(lock: FolderLock, overwrite: bool) -> None:
    folder = lock.folder
    found = list_checkpoints(folder) if folder.is_dir() else []
    has_votes = any(folder.glob("feedback/round-*/votes*"))
    is_run = (folder / "config.yaml").is_file()
    has_best = is_run and (folder / "best" / "validation.json").is_file()
    if not (found or _is_finished(folder) or has_votes or has_best or (overwrite and is_run)):
        # An empty folder, or a run that was killed before its first checkpoint: nothing is lost by starting anew.
        if is_run and process_rank() == 0:
            _remove_leftovers(folder)
        return
    if not overwrite:
        state = f"its last checkpoint is {found[-1].name}" if found else "it is finished"
        raise UserError(
            f"train.output_dir: {str(folder)!r} holds another run ({state}); continue it with --train.resume_from_checkpoint latest, "
            "choose another folder, or move it aside with --train.overwrite_output_dir true"
        )
    if process_rank() > 0:
        return  # one process of several moves it
    lock.release()
    move_aside(folder, "train.output_dir")
    lock.take()


def run_facts(trainer: Trainer) -> list[str]:
    """What changes the meaning of the run and would otherwise be silent."""
    args, data = trainer.args, trainer.data
    accelerator = trainer.accelerator
    trainable = sum(p.numel() for p in trainable_parameters(trainer.network))
    total = sum(p.numel() for p in trainer.network.parameters())
    height, width = data.transform.sizes[0]
    shape = trainer.backbone.latent_shape(height, width)
    lines = [
        f"{trainer._name} on {trainer.backbone.source.name} ({trainer.process.prediction_type}), "
        f"{'LoRA' if trainer.peft_config is not None else 'full fine-tuning'}: {trainable:,} of {total:,} parameters train",
        f"data: {trainer.train_dataset.report.summary()}",
        f"batch: {args.per_device_train_batch_size} groups x {args.gradient_accumulation_steps} passes x "
        f"{accelerator.num_processes} processes = {data.global_batch} per optimizer step; {trainer.state.max_steps} steps"
        + ("" if data.streaming else f", {steps_per_epoch(len(data.dataset), data.global_batch)} per epoch"),
        f"learning rate {args.learning_rate:g} as it is (never scaled), {args.lr_scheduler}, warm-up {args.warmup_steps} steps; "
        f"precision {args.mixed_precision}; images {height}x{width}",
    ]
    if data.dropped_sizes:
        lines.append(f"data: {data.dropped_sizes} groups dropped because their images differ in aspect")
    if not trainer.reference_free:
        assert trainer.reference is not None
        other = f" from {trainer.ref_backbone.source.name}" if trainer.ref_backbone is not None else ""
        lines.append(f"reference: {trainer.reference.description}{other}")
    beta = getattr(args, "beta", None)
    if beta is not None and trainer.error_beta:
        lines.append(beta_message(beta, shape, args.reduction))
    return lines


def announce(trainer: Trainer, checkpoint: Path | None) -> None:
    """Prints what the run is, writes its config, and starts the trackers."""
    trainer.lines = run_facts(trainer)
    for line in [*trainer.lines, *trainer.notes, *([] if trainer.reference_free else [LOG2_MESSAGE])]:
        trainer.accelerator.print(line)
    if checkpoint is not None:
        trainer.accelerator.print(f"resuming from {checkpoint} at step {trainer.state.global_step} of {trainer.state.max_steps}")
    if trainer.accelerator.is_main_process:
        write_config(trainer, trainer.output_dir)
    if trainer.args.report_to != "none":
        options = tracker_options(trainer.args)
        trainer.accelerator.init_trackers(trainer.args.project, config=tracker_config(trainer.args), init_kwargs=options)


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimizer steps until every row was seen once."""
    return -(-rows // batch)


def run_values(trainer: Trainer) -> dict[str, Any]:
    """The run as a run file's values: `diffalign train --config config.yaml` repeats it."""
    from ..methods import METHODS, trainer_class

    method = next((name for name in METHODS if trainer_class(name) is type(trainer)), type(trainer).__name__)
    values: dict[str, Any] = {"method": method, "model": trainer.backbone.source.name}
    values |= {name: value for name, value in trainer.model_options.items() if value is not None}
    if trainer.ref_backbone is not None and trainer.ref_backbone.source.pipe is None:
        values["ref_model"] = trainer.ref_backbone.source.name
    if trainer.peft_config is not None:
        config = trainer.peft_config
        targets = config.target_modules or trainer.backbone.lora_targets
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
    values["data"] = dataclasses.asdict(trainer.data_config)
    # How this call went on is no part of the run.
    started_by = {"resume_from_checkpoint": None, "overwrite_output_dir": False, "force_resume": False}
    values["train"] = dataclasses.asdict(trainer.args) | started_by
    if isinstance(trainer.scorers, dict):
        values["rewards"] = trainer.scorers
    for name in ("validation", "hub"):
        section = getattr(trainer, name)
        if section is not None:
            values[name] = dataclasses.asdict(section)
    return values


def not_repeated(trainer: Trainer) -> list[str]:
    """What a run was given in Python that `run_values` cannot hold, in words."""
    given = []
    if trainer.backbone.source.pipe is not None:
        given.append("the model, a pipeline object")
    if trainer.ref_backbone is not None and trainer.ref_backbone.source.pipe is not None:
        given.append("ref_model, a pipeline object")
    if trainer.backbone.source.vae is not None and trainer.model_options["vae"] is None:
        given.append("vae, an object")
    if not (trainer.data_config.dataset_name or trainer.data_config.train_data_dir):
        given.append("the data, passed as train_dataset")
    if any(part is not None for part in trainer.optimizers):
        given.append("optimizers")
    if trainer.callbacks:
        given.append("callbacks")
    if trainer.scorers is not None and not isinstance(trainer.scorers, dict):
        given.append("scorers")
    config = trainer.peft_config
    if config is not None:
        given += [
            f"peft_config.{name}"
            for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "use_qalora")
            if getattr(config, name, None)
        ]
        if config.init_lora_weights not in (True, "gaussian"):
            given.append(f"peft_config.init_lora_weights {config.init_lora_weights!r}")
    return given


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_config(trainer: Trainer, folder: Path) -> None:
    """``config.yaml``: runnable values, with the run's facts as comments on top."""
    missing = not_repeated(trainer)
    warning = [f"This file alone does not repeat the run: it was given {', '.join(missing)} in Python."] if missing else []
    notes = [*warning, *trainer.lines, f"dataset fingerprint {trainer.train_dataset.fingerprint}", json.dumps(versions())]
    text = "".join(f"# {line}\n" for note in notes for line in note.splitlines()) + dump_yaml(run_values(trainer))
    write_atomically(folder / "config.yaml", text.encode())


def tracker_config(args: TrainingConfig) -> dict[str, Any]:
    """Plain values: tensorboard takes nothing else."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(args).items()}


def tracker_options(args: TrainingConfig) -> dict[str, Any]:
    return {args.report_to: {"name": args.run_name}} if args.run_name and args.report_to in ("wandb", "trackio") else {}


def save_model(trainer: Trainer, folder: Path) -> None:
    """Weights, config and card into `folder`, each file whole or absent. All processes must call this."""
    accelerator, backbone = trainer.accelerator, trainer.backbone
    state = None if trainer.peft_config is not None else accelerator.get_state_dict(trainer.prepared)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".tmp-model"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if trainer.peft_config is not None:
                backbone.save_lora(str(temporary), trainer.network, lora_state(trainer.network))
            else:
                backbone.pipeline(network=trainer.network).save_pretrained(temporary, safe_serialization=True)
                trainer.network.save_pretrained(temporary / backbone.network_name, state_dict=state)
            for path in sorted(temporary.iterdir()):
                target = folder / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not hasattr(trainer, "lines"):
            trainer.lines = run_facts(trainer)
        write_config(trainer, folder)
        write_card(trainer, folder)
    accelerator.wait_for_everyone()


_CARD = """
# {title}

{how}

## Use

```python
{use}
```

## How it was trained

{facts}

| metric | last value |
|---|---|
{metrics}

Versions: {versions}. Dataset fingerprint `{dataset}`. The run file is `config.yaml`; with the same data
`diffalign train --config config.yaml` repeats it.
{citation}"""


def _parameters(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


def write_card(trainer: Trainer, folder: Path) -> None:
    """A model card with provenance."""
    # diffusers' `load_or_create_model_card` asks the Hub for an existing card first, which stalls a machine without network.
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    is_lora, source = trainer.peft_config is not None, trainer.backbone.source
    cls_object = source.pipeline_class()
    cls = cls_object.__name__
    use = f"from diffusers import {cls}\n\n"
    if is_lora:
        use += f'pipe = {cls}.from_pretrained("{source.name}")\npipe.load_lora_weights("path/to/this/folder")'
    else:
        # diffusers wants to be told of components that the pipeline never had, e.g. SD3 without its third encoder.
        absent = "".join(
            f", {n}=None" for n in ("text_encoder_3", "tokenizer_3") if n in _parameters(cls_object) and not source.has(n)
        )
        use += f'pipe = {cls}.from_pretrained("path/to/this/folder"{absent})'
    paper = trainer._paper
    link = f" ([{paper['title']}](https://huggingface.co/papers/{paper['id']}))" if paper else ""
    history = trainer.state.log_history[-1] if trainer.state.log_history else {}
    body = _CARD.format(
        title=folder.resolve().name,
        how=f"{'LoRA weights' if is_lora else 'A pipeline'} fine-tuned from `{source.name}` with {trainer._name}{link} by diffalign.",
        use=use,
        facts="\n".join(f"- {line}" for line in trainer.lines),
        metrics="\n".join(
            f"| {k} | {v:.5g} |" for k, v in sorted(history.items()) if isinstance(v, (int, float)) and not math.isnan(v)
        ),
        versions=", ".join(f"{k} {v}" for k, v in versions().items()),
        dataset=trainer.train_dataset.fingerprint,
        citation=f"\n## Citation\n\n```bibtex\n{paper['citation']}\n```\n" if paper else "",
    )
    if (folder / "samples").is_dir():
        pictures = sorted((folder / "samples").glob("step-*.png"), key=lambda p: int(p.stem.split("-")[1]))
        if pictures:
            body += f"\n![base and tuned, same seeds](samples/{pictures[-1].name})\n"
    prompts = trainer.validation.validation_prompts if trainer.validation is not None else []
    data = ModelCardData(
        base_model=source.name,
        license="other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        widget=[{"text": prompt} for prompt in prompts] or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    tags = ["text-to-image", "diffusers", "diffusers-training", "diffalign", *(["lora"] if is_lora else []), *trainer._tag_names]
    write_atomically(folder / "README.md", str(populate_model_card(card, tags=tags)).encode())


def peak_memory(device: torch.device) -> tuple[float, str]:
    """(GiB, what it is): the device's peak allocation, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "peak device memory"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "peak memory, which this system does not tell"
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30, "peak resident memory of the process"


def dry_run_report(trainer: Trainer, batch: Any, loss: float, seconds: float) -> dict[str, Any]:
    """What `dry_run` prints and returns."""
    memory, kind = peak_memory(trainer.accelerator.device)
    trainable = sum(p.numel() for p in trainable_parameters(trainer.network))
    lines = [*run_facts(trainer), *trainer.notes]
    lines += [
        f"{kind}: {memory:.2f} GiB; loss of the first batch {loss:.4f}; {seconds:.1f} s with loading",
        "dry run: no step was taken and nothing was written, caches apart",
    ]
    return {
        "lines": lines,
        "trainable_parameters": trainable,
        "peak_memory_gib": memory,
        "effective_batch": trainer.data.global_batch,
        "steps_per_epoch": None
        if trainer.data.streaming
        else steps_per_epoch(len(trainer.data.dataset), trainer.data.global_batch),
        "loss": loss,
        "latent_shape": tuple(batch.x0.shape[2:]),
    }


def push_to_hub(folder: Path, config: HubConfig) -> str:
    """Uploads the final model: not checkpoints, logs or caches. The token comes from the environment or the login, never the config.

    Raises:
        ConfigError: when the Hub refuses, with its reason.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(config.hub_model_id or folder.resolve().name, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            ignore_patterns=["checkpoint-*", "abandoned-checkpoint-*", ".*", "logs/*", "reference_errors*"],
        )
    except Exception as error:  # every transport and permission error of the client
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("hub.hub_model_id", f"the upload failed ({reason}); the model is in {str(folder)!r}") from error
    return str(repo)
