"""Save the final weights of a run for inference, and upload them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.nn import Module

from ..errors import ConfigError, one_line
from .model_card import write_card
from .run_record import RunRecord
from .sections import HubConfig
from .trained_weights import TrainedWeights


def save_model(
    record: RunRecord,
    accelerator: Accelerator,
    trained: TrainedWeights,
    prepared: Module,
    metrics: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write weights, `config.yaml` and the model card into a folder.

    Each file appears whole or not at all. All processes must call this.

    Args:
        record (`RunRecord`): Facts of the run.
        accelerator (`Accelerator`): Processes of the run.
        trained (`TrainedWeights`): What trains, and how it is written.
        prepared: The same network as accelerate prepared it. It gathers sharded
            weights.
        metrics (`Mapping[str, Any]`): Metrics of the last log, for the card.
        folder (`Path`): Created if it does not exist.
    """
    # Gathered on all processes, written by the first one.
    state = trained.gather(accelerator, prepared)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".tmp-model"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            trained.write(temporary, state)
            for path in sorted(temporary.iterdir()):
                target = folder / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not record.lines:
            record.lines = record.facts()
        record.write_config(folder)
        write_card(record, metrics, folder)
    accelerator.wait_for_everyone()


def check_hub(config: HubConfig) -> None:
    """Refuse an upload that cannot work, before the training that it follows.

    Args:
        config (`HubConfig`): Name and visibility of the repository.

    Raises:
        ConfigError: There is no login, the Hub is switched off, or the name is none.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("hub.push_to_hub", "HF_HUB_OFFLINE is set; unset it, or set this false")
    if get_token() is None:
        raise ConfigError(
            "hub.push_to_hub", "there is no login; run `hf auth login`, or set HF_TOKEN"
        )
    if config.hub_model_id is not None:
        try:
            validate_repo_id(config.hub_model_id)
        except HFValidationError as error:
            raise ConfigError("hub.hub_model_id", one_line(error)) from None


def push_to_hub(folder: Path, config: HubConfig, commit_message: str | None = None) -> str:
    """Upload the final model to the Hub, without checkpoints, logs or caches.

    The token comes from the environment or the login.

    Args:
        folder (`Path`): What `save_model` wrote.
        config (`HubConfig`): Name and visibility of the repository.
        commit_message (`str`, *optional*): Of the upload.

    Returns:
        `str`: Address of the repository.

    Raises:
        ConfigError: The Hub refused the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(
            config.hub_model_id or folder.resolve().name,
            private=config.hub_private_repo,
            exist_ok=True,
        )
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=[
                "checkpoint-*",
                "abandoned-checkpoint-*",
                ".*",
                "logs/*",
                "reference_errors*",
                "rollout_server/*",
            ],
        )
    except Exception as error:  # every transport and permission error of the client
        reason = one_line(error)
        raise ConfigError(
            "hub.hub_model_id", f"the upload failed ({reason}); the model is in {str(folder)!r}"
        ) from error
    return str(repo)
