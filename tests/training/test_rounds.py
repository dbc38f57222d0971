"""Rounds of drawn images: prompts, repeated passes, resuming, and settings that cannot
work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import brightness, lora_config, make_trainer, next_batch, pair_rows

from diffalign.data.config import OnlineConfig
from diffalign.errors import ConfigError, UserError
from diffalign.likelihood import RectifiedFlow
from diffalign.training.online.online_data import online_sampler

PROMPTS = [{"prompt": row["prompt"]} for row in pair_rows()]
ONLINE = {"every": 1, "k": 2, "num_inference_steps": 2, "rollout_batch_size": 4}


def trainer_of(folder: Path, method: str, **options: Any) -> Any:
    return make_trainer(
        folder, "sd", method, rows=PROMPTS, **{"peft_config": lora_config(), **options}
    )


def test_images_are_drawn_from_the_prompts_that_score_them(tmp_path: Path) -> None:
    """Dropped prompts train, and draw nothing."""
    offline = {"data": {"online": ONLINE}, "options": {"scorers": brightness}, "beta": 100.0}
    for method, options in (("diffusion_dpo", offline), ("diffusion_nft", {})):
        plain, dropped = (
            trainer_of(
                tmp_path / f"{method}-{share}",
                method,
                proportion_empty_prompts=share,
                per_device_train_batch_size=2,
                **options,
            )
            for share in (0.0, 1.0)
        )
        with_prompts, without = next_batch(plain), next_batch(dropped)
        for name in ("x0", "samples"):
            if name in with_prompts.extra or name == "x0":
                first = with_prompts.extra.get(name, with_prompts.x0)
                torch.testing.assert_close(without.extra.get(name, without.x0), first)
        name = next(iter(with_prompts.condition))
        assert not torch.equal(with_prompts.condition[name], without.condition[name])


def test_an_evaluation_drops_no_prompts(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "diffusion_nft", proportion_empty_prompts=1.0)
    trainer.setup()
    data = trainer.evaluation_data(pair_rows())
    empty, full = (
        pipeline.builder([pipeline.reader[(0, 0)]]).condition
        for pipeline in (trainer.data_pipeline, data)
    )
    assert empty.keys() == full.keys()
    assert not any(torch.equal(empty[name], full[name]) for name in full)


@pytest.mark.parametrize("method", ["grpo", "d3po", "spo", "reward_backprop"])
def test_methods_that_train_through_their_sampler_drop_no_prompts(
    method: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"proportion_empty_prompts: .* set it to 0"):
        trainer_of(tmp_path, method, proportion_empty_prompts=0.1)


def test_the_default_eta_leaves_no_noise_in_images_of_flows(tmp_path: Path) -> None:
    backbone = trainer_of(tmp_path, "diffusion_nft").backbone
    rule, schedule = backbone.guidance_rule, backbone.schedule
    assert online_sampler(OnlineConfig(), rule, schedule).eta == 1.0
    assert online_sampler(OnlineConfig(), rule, RectifiedFlow()).eta == 0.0
    assert online_sampler(OnlineConfig(eta=0.5), rule, RectifiedFlow()).eta == 0.5


@pytest.mark.parametrize("method", ["diffusion_nft", "awm"])
def test_a_second_pass_has_noise_of_its_own(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, method, num_inner_epochs=2)
    trainer.setup()
    batches = trainer.source.batches(trainer.data_pipeline, 0)
    first, second = next(batches), next(batches)
    assert torch.equal(first.extra["samples"], second.extra["samples"])
    noises = [next(trainer.micro_batches(batch)).noise for batch in (first, second)]
    assert not torch.equal(*noises)
    assert "pass" not in next(trainer.micro_batches(second)).extra


def test_an_epoch_has_every_pass_over_its_rounds(tmp_path: Path) -> None:
    options = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    once = trainer_of(tmp_path / "once", "grpo", **options)
    twice = trainer_of(tmp_path / "twice", "grpo", num_inner_epochs=2, **options)
    once.setup()
    twice.train()
    assert twice.state.max_steps == twice.state.global_step == 2 * once.state.max_steps
    assert twice.state.epoch == 1.0


def test_a_round_goes_on_with_batches_of_another_size(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": None, "learning_rate": 1e-2}
    whole = trainer_of(tmp_path / "a", "diffusion_nft", per_device_train_batch_size=2, **options)
    seen: dict[str, list[str]] = {"whole": [], "resumed": []}

    def watch(trainer: Any, name: str) -> None:
        make = trainer.source.make

        def made(number: int, batches: Any) -> Any:
            seen[name] += [prompt for batch in batches for prompt in batch.prompts]
            return make(number, batches)

        trainer.source.make = made

    whole.setup()
    watch(whole, "whole")
    whole.train()
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = trainer_of(
        tmp_path / "b", "diffusion_nft", resume_from_checkpoint=checkpoint, **sizes, **options
    )
    resumed.setup()
    watch(resumed, "resumed")
    resumed.train()
    assert seen["resumed"] == seen["whole"][4:]


def test_the_middle_of_a_round_needs_batches_of_its_size(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": None, "steps_per_round": 2}
    trainer_of(tmp_path / "a", "diffusion_nft", per_device_train_batch_size=2, **options).train()
    resumed = trainer_of(
        tmp_path / "b",
        "diffusion_nft",
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        **options,
    )
    with pytest.raises(UserError, match=r"per_device_train_batch_size 2 and 1 processes, here"):
        resumed.train()


def test_settings_that_would_train_nothing(tmp_path: Path) -> None:
    for method in ("diffusion_nft", "awm"):
        with pytest.raises(ConfigError, match=r"shared_init: with eta 0 all images"):
            trainer_of(tmp_path, method, shared_init=True)
    two = {"scorers": [brightness, lambda images, prompts: -brightness(images, prompts)]}
    with pytest.raises(ConfigError, match=r"images_per_prompt: ddpo compares one image"):
        trainer_of(tmp_path, "grpo", advantage="ddpo", images_per_prompt=1, options=two)
    with pytest.raises(ConfigError, match=r"train.eta: at 1e-05 a step has a standard deviation"):
        trainer_of(tmp_path, "grpo", eta=1e-5)


def test_a_dry_run_remembers_no_rewards(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "grpo", advantage="ddpo", images_per_prompt=2)
    trainer.dry_run()
    assert not trainer.estimator.history.rewards


def test_a_paused_run_keeps_its_metrics(tmp_path: Path) -> None:
    from diffalign.training.loop import Run
    from diffalign.training.periodic import SaveCheckpoint

    trainer = trainer_of(tmp_path, "d3po", max_steps=2, logging_steps=4)
    windows: list[Any] = []

    class Checkpoints:
        output_dir = tmp_path

        def save(self, state: Any) -> None:
            windows.append(state.window)

    trainer.setup()
    run = Run.__new__(Run)
    run.state, run.accelerator = trainer.state, trainer.accelerator
    from diffalign.training.tracking import MetricWindow

    run.window = MetricWindow()
    run.window.add({"loss": torch.tensor([1.0, 3.0])})
    SaveCheckpoint(Checkpoints(), []).on_pause(run)  # type: ignore[arg-type]
    assert windows and windows[0] == run.window.dump(trainer.accelerator)
