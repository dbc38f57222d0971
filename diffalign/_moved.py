"""Keep old module paths working until version 0.3, with a deprecation warning.

There is one table of moved modules, and one of names that moved out of modules which
still exist. A finder on `sys.meta_path` looks them up when they are asked for, so that
nothing is imported beforehand.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

MODULES = {
    "adapters": "backbones.lora",
    "batching": "generation.micro_batches",
    "data.build": "annotation.build",
    "data.build_output": "annotation.build_output",
    "data.captioners": "annotation.captioners",
    "data.perturbers": "annotation.perturbers",
    "data.recaption": "annotation.recaption",
    "decoding": "runtime.decoding",
    "demo.demo_command": "cli.demo",
    "drawn": "runtime.missing",
    "evaluation.compare_command": "cli.compare",
    "evaluation.grids": "generation.grids",
    "evaluation.prompt_sets": "data.prompt_sets",
    "evaluation.sample_command": "cli.sample",
    "evaluation.sampling": "generation.sampling",
    "exceptions": "errors",
    "folder_lock": "runtime.folder_lock",
    "folders": "runtime.files",
    "guidance": "generation.guidance",
    "likelihood.processes": "likelihood.schedules",
    "merge": "generation.merge",
    "processes": "runtime.distributed",
    "ranges": "config.ranges",
    "replies": "runtime.replies",
    "rewards.aesthetic": "rewards.scorers.aesthetic",
    "rewards.cards": "cli.scorers",
    "rewards.check": "rewards.testing.check",
    "rewards.clip_score": "rewards.scorers.clip",
    "rewards.devices": "runtime.devices",
    "rewards.doctor": "rewards.testing.doctor",
    "rewards.geneval": "rewards.scorers.geneval",
    "rewards.hps": "rewards.scorers.clip",
    "rewards.http_client": "rewards.serving.client",
    "rewards.imagereward": "rewards.scorers.imagereward",
    "rewards.jpeg": "rewards.scorers.jpeg",
    "rewards.mps": "rewards.scorers.mps",
    "rewards.pickscore": "rewards.scorers.clip",
    "rewards.reference": "rewards.testing.reference",
    "rewards.reference_models": "rewards.testing.reference_models",
    "rewards.remote": "rewards.scorers.remote",
    "rewards.score_command": "cli.score",
    "rewards.score_parts": "annotation.score_parts",
    "rewards.score_report": "annotation.score_report",
    "rewards.score_source": "annotation.score_source",
    "rewards.scorers.clip_score": "rewards.scorers.clip",
    "rewards.scorers.hps": "rewards.scorers.clip",
    "rewards.scorers.pickscore": "rewards.scorers.clip",
    "rewards.server": "rewards.serving.server",
    "rewards.shapes_world": "rewards.scorers.shapes",
    "rewards.vlm_judge": "rewards.scorers.vlm_judge",
    "shapes.pretrain": "shapes.sampling_defaults",
    "shapes.pretrain_text": "shapes.text_denoiser",
    "shapes.quickstart": "cli.quickstart_stages",
    "shapes.quickstart_config": "cli.quickstart_config",
    "steering.compare": "evaluation.best_of_n",
    "steering.coordinates": "steering.noise_levels",
    "steering.rewarding": "steering.reward_fn",
    "steering.sampler": "steering.fk_steering",
    "steering.steer_command": "cli.steer",
    "steering.tap": "steering.scheduler_hook",
    "steering.weights": "steering.particle_weights",
    "text_files": "runtime.text_files",
    "training.feedback": "training.online.feedback",
    "training.feedback_command": "cli.feedback",
    "training.hub": "training.export",
    "training.judge": "training.online.reward_function",
    "training.loader": "training.batch_builder",
    "training.on_policy": "training.online.on_policy",
    "training.online.judge": "training.online.reward_function",
    "training.pool": "training.online.checkpoint_pool",
    "training.prepare": "training.data_pipeline",
    "training.rng": "runtime.seeds",
    "training.rollout": "training.online.rollout",
    "training.rounds": "training.online.source",
    "training.run": "cli.train",
    "training.verbs": "training.evaluate",
    "weight_files": "runtime.weight_files",
    "yaml_text": "config.yaml_text",
}
"""Old path -> new path, both under `diffalign`."""

NAMES = {
    "backbones.loading": {
        "module_hash": "runtime.hashing",
    },
    "cli": {
        "Parser": "cli.entry",
        "build_parser": "cli.entry",
    },
    "config": {
        "HubConfig": "training.sections",
        "LoraSection": "training.sections",
        "RunConfig": "recipe",
        "ValidationConfig": "training.sections",
        "apply_overrides": "recipe",
        "build_section": "config.section",
        "coerce": "config.section",
        "dump_yaml": "config.yaml_text",
        "field_docs": "config.section",
        "load_run": "recipe",
        "panel_section": "recipe",
        "read_yaml": "recipe",
        "run_from_dict": "recipe",
        "run_to_dict": "recipe",
        "section_help": "config.section",
        "suggestion": "config.section",
    },
    "data.build": {
        "Drawn": "annotation.drawn",
        "FORMATS": "annotation.drawn",
        "Generator": "annotation.drawn",
        "SELECTIONS": "annotation.drawn",
        "read_prompts": "data.prompt_sets",
    },
    "data.judgements": {
        "judge": "data.judgements:classify_row",
    },
    "evaluation.best_of_n": {
        "judge": "evaluation.best_of_n:score_arms",
    },
    "evaluation.compare": {
        "Array": "evaluation.comparison",
        "Comparison": "evaluation.comparison",
        "image_name": "evaluation.comparison",
        "save_results": "evaluation.comparison",
    },
    "evaluation.models": {
        "default_settings": "generation.pipelines",
        "load_for_scoring": "generation.pipelines",
        "load_pipeline": "generation.pipelines",
        "with_lora": "generation.pipelines",
    },
    "evaluation.report": {
        "SOME_PROMPTS": "evaluation.formatting",
        "few_prompts": "evaluation.formatting",
        "number": "evaluation.formatting",
        "percent": "evaluation.formatting",
    },
    "evaluation.sample_command": {
        "sample": "cli.sample:run",
    },
    "evaluation.sampling": {
        "image_seed": "runtime.seeds",
    },
    "likelihood": {
        "NoisingProcess": "likelihood.schedules:NoiseSchedule",
        "process_from_scheduler": "likelihood.schedules:schedule_from_scheduler",
    },
    "likelihood.processes": {
        "NoisingProcess": "likelihood.schedules:NoiseSchedule",
        "process_from_scheduler": "likelihood.schedules:schedule_from_scheduler",
    },
    "likelihood.schedules": {
        "NoisingProcess": "likelihood.schedules:NoiseSchedule",
        "process_from_scheduler": "likelihood.schedules:schedule_from_scheduler",
    },
    "processes": {
        "Processes": "runtime.distributed:DistributedContext",
    },
    "rewards.cache": {
        "content_key": "rewards.content_key",
        "file_digest": "rewards.content_key",
        "pixel_digest": "rewards.content_key",
        "stamp_digest": "rewards.content_key",
    },
    "rewards.checkpoints": {
        "content_hash": "runtime.hashing",
    },
    "rewards.score_command": {
        "panel_config": "rewards.panel_file",
    },
    "rewards.server": {
        "TOKEN": "rewards.serving.service",
    },
    "runtime.distributed": {
        "Processes": "runtime.distributed:DistributedContext",
    },
    "shapes.quickstart": {
        "base_pipeline": "generation.pipelines",
    },
    "steering.smc": {
        "DEFAULT_FRACTIONS": "steering.schedule",
        "check_schedule": "steering.schedule",
        "check_temperatures": "steering.schedule",
        "resampling_stream": "steering.streams",
        "schedule": "steering.schedule",
    },
    "steering.steered_run": {
        "Streams": "steering.streams",
    },
    "training.build": {
        "averaged": "training.optimizer",
        "build_ema": "training.optimizer",
        "build_optimizer": "training.optimizer",
        "build_schedule": "training.optimizer:build_lr_scheduler",
        "update_ema": "training.optimizer",
    },
    "training.checkpoint": {
        "lora_state": "backbones.lora",
    },
    "training.hub": {
        "begin": "training.run_folder",
        "digest": "training.run_record",
        "dry_run_report": "training.run_record",
        "peak_memory": "training.run_record",
        "sampler_rule": "training.run_record",
        "tracker_config": "training.tracking",
        "tracker_options": "training.tracking",
        "versions": "runtime.versions",
        "write_card": "training.model_card",
    },
    "training.judge": {
        "Judge": "training.online.reward_function:RewardFunction",
    },
    "training.loader": {
        "Example": "training.group_reader",
        "GroupReader": "training.group_reader",
        "PositionSampler": "training.row_order",
        "RowOrder": "training.row_order",
        "StreamReader": "training.group_reader",
        "fill_latent_cache": "training.fill_caches",
        "fill_prompt_cache": "training.fill_caches",
        "group_key": "training.group_reader",
        "prompt_key": "training.group_reader",
    },
    "training.online": {
        "RoundCheck": "training.online.policy_sampler",
    },
    "training.online.judge": {
        "Judge": "training.online.reward_function:RewardFunction",
    },
    "training.optimizer": {
        "build_schedule": "training.optimizer:build_lr_scheduler",
    },
    "training.rounds": {
        "Rounds": "training.online.source:RolloutSource",
    },
    "training.run": {
        "build_trainer": "recipe",
    },
    "training.trainer": {
        "BatchSource": "training.loop",
        "DatasetSource": "training.loop",
    },
}
"""Module as it was called -> name -> the module that holds it now.

`module:name` where the name has changed, too.
"""


def _getter(old: str) -> Callable[[str], Any]:
    """A module's `__getattr__` for the names that moved out of it."""

    def get(name: str) -> Any:
        new = NAMES.get(old, {}).get(name, None if name.startswith("__") else MODULES.get(old))
        if new is None:
            raise AttributeError(f"module 'diffalign.{old}' has no attribute {name!r}")
        module, _, other = new.partition(":")
        value = getattr(importlib.import_module(f"diffalign.{module}"), other or name)
        _warn(f"diffalign.{old}.{name}", f"diffalign.{module}.{other or name}")
        return value

    return get


def _warn(old: str, new: str) -> None:
    text = f"{old} has moved to {new}; the old name goes in version 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=4)


class _MovedModule(importlib.abc.Loader):
    """Loads an old path as a module that hands on every name."""

    def __init__(self, old: str) -> None:
        self.old = old

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name, f"Moved to diffalign.{MODULES[self.old]}.")

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = _getter(self.old)  # type: ignore[method-assign]


class _WithMovedNames(importlib.abc.Loader):
    """Loads a module that is still there, and adds the names that moved out of it."""

    def __init__(self, loader: Any, old: str) -> None:
        self.loader, self.old = loader, old

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.loader.exec_module(module)
        own, moved = module.__dict__.get("__getattr__"), _getter(self.old)

        def get(name: str) -> Any:
            if own is not None and name not in NAMES[self.old]:
                return own(name)
            return moved(name)

        module.__getattr__ = get  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the tables name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "diffalign":
            return None
        if old in MODULES:
            return importlib.machinery.ModuleSpec(fullname, _MovedModule(old))
        if old in NAMES:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _WithMovedNames(spec.loader, old)
            return spec
        return None


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
