"""`data.online`: offline methods on images that the policy draws and scorers judge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    assert_same_tensors,
    brightness,
    lora_config,
    make_trainer,
    next_batch,
    pair_rows,
    trained_tensors,
)

from diffalign import DataConfig
from diffalign.data.config import OnlineConfig
from diffalign.errors import ConfigError
from diffalign.recipe import load_run

PROMPTS = [{"prompt": row["prompt"]} for row in pair_rows()]
ONLINE = {
    "every": 2,
    "k": 3,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "rollout_batch_size": 4,
}


def online(
    folder: Path,
    family: str = "sd",
    method: str = "diffusion_dpo",
    section: Any = None,
    inverted: bool = False,
    **options: Any,
) -> Any:
    options.setdefault("peft_config", lora_config())
    options.setdefault("per_device_train_batch_size", 2)
    options.setdefault("options", {"scorers": brightness})
    data = {"online": {**ONLINE, **(section or {})}, "invert_preferences": inverted}
    return make_trainer(folder, family, method, rows=PROMPTS, data=data, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_the_best_and_the_worst_image(tmp_path: Path, family: str) -> None:
    trainer = online(tmp_path, family)
    batch = next_batch(trainer)
    scores = [brightness(trainer.backbone.decode_latents(group), None) for group in batch.x0]
    assert batch.x0.shape[1] == 2 and all(best > worst for best, worst in scores)
    assert torch.equal(batch.noise[:, 0], batch.noise[:, 1]) and batch.weights.tolist() == [1, 1]
    loss, _ = trainer.compute_loss(batch)
    assert loss.shape == (2,)
    inverted = online(tmp_path / "n", family, "diffusion_npo")
    turned = next_batch(inverted)
    torch.testing.assert_close(turned.x0.flip(1), batch.x0)
    turned = next_batch(online(tmp_path / "i", family, inverted=True))
    torch.testing.assert_close(turned.x0.flip(1), batch.x0)
    twice = next_batch(online(tmp_path / "t", family, "diffusion_npo", inverted=True))
    torch.testing.assert_close(twice.x0, batch.x0)


@pytest.mark.parametrize("method", ["rankdpo", "mapo", "sft", "diffusion_orpo", "diffusion_npo"])
def test_every_offline_method_trains_online(tmp_path: Path, method: str) -> None:
    trainer = online(tmp_path, method=method, max_steps=3)
    trainer.train()
    assert trainer.source.number == 2 and "online/score_0" in trainer.state.log_history[0]
    batch = next_batch(trainer)
    assert batch.x0.shape[1] == {"rankdpo": 3, "sft": 1}.get(method, 2)
    if method == "rankdpo":
        assert batch.scores.shape == (2, 3) and batch.noise[0, 0].ne(batch.noise[0, 1]).any()


def test_a_round_lasts_and_is_resumed_in_its_middle(tmp_path: Path) -> None:
    options = {"max_steps": 5, "save_steps": 1, "save_total_limit": None, "learning_rate": 1e-2}
    whole = online(tmp_path / "a", **options)
    whole.train()
    assert whole.source.number == 3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resumed = online(
        tmp_path / "b", resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"), **options
    )
    resumed.train()
    assert_same_tensors(trained_tensors(resumed), trained_tensors(whole))


def test_ties_and_offline_evaluation(tmp_path: Path) -> None:
    def equal(images: Any, prompts: Any) -> torch.Tensor:
        return torch.ones(len(images))

    trainer = online(tmp_path, options={"scorers": equal})
    assert next_batch(trainer).weights.tolist() == [0, 0]
    before = trained_tensors(trainer)
    found = trainer.evaluate(pair_rows(4))  # pairs of people, not of the policy
    assert found["eval/rewards/accuracies"] == 0.5
    assert_same_tensors(before, trained_tensors(trainer))


def test_the_section_of_a_run_file(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "configs" / "diffusion_dpo" / "shapes.yaml"
    run = load_run(path, ["--data.online.every", "5", "--data.online.scorers", "[shapes]"])
    assert run.data.online == OnlineConfig(every=5, scorers=["shapes"])
    with pytest.raises(ConfigError, match=r"data.online.kk: unknown key"):
        load_run(path, ["--data.online.kk", "5"])
    with pytest.raises(ConfigError, match=r"online.k: expected int >= 2, got 1"):
        DataConfig(online={"k": 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.online.scorers: name at least one scorer"):
        online(tmp_path, options={"scorers": None}).train()
    for method in ("dcpo", "d3po", "seppo", "self_npo", "spo"):
        with pytest.raises(
            ConfigError, match=r"data.online: .* cannot train on pairs that the policy draws"
        ):
            online(tmp_path, method=method)
    with pytest.raises(ConfigError, match="precompute_ref_errors: the images of data.online"):
        online(tmp_path, precompute_ref_errors=True)


@pytest.mark.parametrize("shared", [False, True])
def test_noise_offsets_reach_the_drawn_images(tmp_path: Path, shared: bool) -> None:
    trainer = online(tmp_path, method="rankdpo", shared_noise=shared, noise_offset=5.0)
    means = next_batch(trainer).noise.mean((-2, -1))
    assert float(means.std()) > 1  # without an offset 1 / 8
