"""Rollouts use the pipeline's own grid; runs of earlier versions go on with theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiers import by_default
from tiny import build_pipeline, lora_config, make_trainer

from diffalign.likelihood.schedules import RectifiedFlow, clip_range, schedule_from_scheduler
from diffalign.training.online.rollout import Rollout, SamplerConfig, make_grid, sampling_mode

PROMPTS = ("a small red circle", "a large blue star")
ZERO_SNR = {"rescale_betas_zero_snr": True}
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("sd", {"timestep_spacing": "leading"}),
    ("sd", {"timestep_spacing": "leading", "steps_offset": 0}),
    ("sd", {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}),
    ("sd", {"timestep_spacing": "trailing"}),
    ("sd", {"timestep_spacing": "linspace"}),
    ("sd_v", {"timestep_spacing": "trailing", **ZERO_SNR}),
    ("sd_v", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    ("sdxl", {"timestep_spacing": "trailing"}),
    ("sd", {"clip_sample": True, "clip_sample_range": 1.5}),  # which its pipeline sets to false
    ("sdxl", {"clip_sample": True, "clip_sample_range": 1.5}),
    ("sdxl", {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}),
    ("sd3", {"shift": 1.0}),
    ("sd3", {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
]


def rollout_of(
    folder: Path, family: str, changes: dict[str, Any], steps: int
) -> tuple[Any, Any, Any]:
    """(pipeline, batch, trajectories) of a deterministic run with guidance."""
    pipe = build_pipeline(family)
    cls = FlowMatchEulerDiscreteScheduler if family == "sd3" else DDIMScheduler
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
    trainer = make_trainer(
        folder, family, "d3po", model=pipe, num_inference_steps=steps,
        rows=[{"prompt": p} for p in PROMPTS], eta=0.5,
        per_device_train_batch_size=2, peft_config=lora_config(),
    )  # fmt: skip
    trainer.setup()
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    rollout = Rollout(
        trainer.backbone,
        trainer.schedule,
        SamplerConfig(steps, 3.0, 0.0, 8, shared_init=False),
        grid=trainer.make_grid(steps, 0.0),
    )
    with sampling_mode(trainer.network):
        empty = trainer.data_pipeline.builder.unconditional(batch.condition)
        found = rollout(
            trainer.sampling_policy.predict, batch, 1, empty, decode=False, progress=False
        )
    return trainer.backbone.pipeline(network=trainer.network), batch, found


@by_default()
@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize(
    ("family", "changes"), GRIDS, ids=lambda value: str(value).replace(" ", "")
)
def test_a_rollout_is_what_the_pipeline_draws(
    family: str, changes: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    pipe, batch, found = rollout_of(tmp_path, family, changes, steps)
    with torch.no_grad():
        drawn = pipe(
            list(batch.prompts), latents=found.states[:, 0, 0], num_inference_steps=steps,
            guidance_scale=3.0, height=32, width=32,
            output_type="latent",
        ).images  # fmt: skip
    torch.testing.assert_close(
        found.final[:, 0], drawn, rtol=1e-4, atol=1e-5 * float(drawn.abs().max())
    )


def test_grids_by_numbers() -> None:
    """20 trailing steps begin at 999, where leading ones begin at 951."""
    base = build_pipeline("sd").scheduler.config
    for spacing, first, second in (
        ("leading", 951, 901),
        ("trailing", 999, 949),
        ("linspace", 999, 949),
    ):
        scheduler = DDIMScheduler.from_config(base, timestep_spacing=spacing)
        grid = make_grid(schedule_from_scheduler(scheduler), scheduler, 20, 1.0)
        assert grid.times[0] == first and grid.next_times[0] == second
    for cls in (
        PNDMScheduler,
        EulerDiscreteScheduler,
    ):  # what a pipeline of diffusers has by default
        scheduler = cls.from_config(base)
        grid = make_grid(schedule_from_scheduler(scheduler), scheduler, 20, 1.0)
        assert grid.times[0] == 951
    ends = make_grid(
        schedule_from_scheduler(scheduler),
        DDIMScheduler.from_config(base, steps_offset=0, set_alpha_to_one=True),
        4,
        1.0,
    )
    assert ends.times.tolist() == [750, 500, 250, 0] and ends.next_times.tolist() == [
        500,
        250,
        0,
        -1,
    ]
    assert ends.trainable.tolist() == [True, True, True, False]


def test_flow_solvers_name_their_shift_otherwise() -> None:
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    schedule = schedule_from_scheduler(unipc)
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == 3.0
    euler = schedule_from_scheduler(FlowMatchEulerDiscreteScheduler(shift=2.5))
    assert isinstance(euler, RectifiedFlow) and euler.shift == 2.5


def test_only_schedulers_that_clip_are_followed() -> None:
    assert clip_range(DDIMScheduler(clip_sample=True, clip_sample_range=2.0)) == 2.0
    assert clip_range(DDIMScheduler(clip_sample=False)) is None
    euler = EulerDiscreteScheduler.from_config({"clip_sample": True, "clip_sample_range": 2.0})
    assert clip_range(euler) is None


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_checkpoint_of_an_earlier_version_samples_as_before(family: str, tmp_path: Path) -> None:
    pipe = build_pipeline(family)
    if family == "sd":
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    pipe.save_pretrained(tmp_path / "model")

    def run(folder: str, **options: Any) -> Any:
        return make_trainer(
            tmp_path / folder,
            family,
            "d3po",
            model=str(tmp_path / "model"),
            peft_config=lora_config(),
            max_steps=2,
            **options,
        )

    def first_time(trainer: Any) -> float:
        return float(trainer.rollout.grid.times[0])

    old = run("old", save_steps=1)
    old._take_sampler_rule(1)  # as the version wrote it
    old.train()
    file = tmp_path / "old" / "checkpoint-1" / "trainer_state.json"
    record = json.loads(file.read_text())
    assert record["identity"].pop("sampler_rule") == 1
    file.write_text(json.dumps(record))
    again = run("old", overwrite_output_dir=False)
    again.train(str(tmp_path / "old" / "checkpoint-1"))
    assert again.sampler_rule == 1 and first_time(again) == first_time(old)
    new = run("new")
    new.train()
    assert new.sampler_rule == 2
    if family == "sd":
        assert first_time(new) != first_time(old)
    else:
        assert (
            old.schedule.legacy_first_step
            and again.schedule.legacy_first_step
            and not new.schedule.legacy_first_step
        )
