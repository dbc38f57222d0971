"""Processes of one run that have seen different things, or come late, do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import torchrun
from tiny import lora_config, make_trainer, pair_rows

from diffalign.data.cache import TensorCache
from diffalign.training.fill_caches import fill_latent_cache, fill_prompt_cache
from diffalign.training.group_reader import group_key, prompt_key

SCRIPT = Path(__file__).with_name("agreeing_script.py")


@pytest.mark.nightly
def test_two_processes_agree(tmp_path: Path) -> None:
    done = torchrun(SCRIPT, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "process 0 agrees" in done.stdout and "process 1 agrees" in done.stdout


def test_a_process_that_looks_late_encodes_its_own_share(tmp_path: Path) -> None:
    """It sees what the first one has written; together they must still encode
    everything, and nothing twice."""
    trainer = make_trainer(tmp_path / "run", peft_config=lora_config(), rows=pair_rows(8))
    trainer.setup()
    reader, backbone = trainer.data_pipeline.reader, trainer.backbone
    prompts = [f"prompt {i}" for i in range(9)]
    for rank in (0, 1):
        latents, texts = TensorCache(tmp_path / "latents"), TensorCache(tmp_path / "texts")
        fill_latent_cache(latents, reader, backbone, rank, 2)
        fill_prompt_cache(texts, prompts, backbone, rank, 2)
    latents.reload()
    texts.reload()
    keys = [group_key(reader.dataset[i].image_hashes()) for i in range(8)]
    assert not latents.missing(keys) and not texts.missing([prompt_key(p) for p in prompts])
    assert torch.isfinite(texts[prompt_key("prompt 8")]["prompt_embeds"]).all()
