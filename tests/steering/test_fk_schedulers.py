"""Families and schedulers under `FKSteering`: what is stochastic, what is refused,
histories, clean predictions, our kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    DETERMINISTIC,
    PROMPTS,
    STOCHASTIC,
    brightness,
    family,
    gen,
    stacked,
    steer,
    with_scheduler,
)
from tiers import by_default
from tiny import build_pipeline

from diffalign import FKSteering
from diffalign.errors import ConfigError, UserError
from diffalign.steering.kernels import ddim_transition, transition
from diffalign.steering.noise_levels import as_clipped, clean_prediction, read_coordinates

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts:UserWarning")


# Families


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("sd", "ddim"),
        ("sd_v", "ddim"),
        ("sdxl", "ancestral"),
        ("sd3", "ddim"),
        ("sd3", "euler_maruyama"),
        ("flux", "ddim"),
        ("flux", "euler_maruyama"),
    ],
)
def test_every_family_is_steered_by_our_kernels(name: str, kernel: str) -> None:
    pipe = family(name)
    result = steer(pipe, name=name, kernel=kernel)
    again = steer(pipe, name=name, kernel=kernel)
    assert np.array_equal(
        stacked(result), stacked(again)
    )  # these pipelines hand no generator to their scheduler
    assert result.steps[0].resampled.any()
    torch.testing.assert_close(result.applied, 4.0 * result.rewards, rtol=0, atol=1e-9)
    assert (
        len(result.images) == 2
        and len(result.images[0]) == 4
        and result.images[0][0].size == (32, 32)
    )
    assert len({image.tobytes() for row in result.images for image in row}) == 8  # copies separated
    assert result.counts["decodes"] == 16 and result.counts["scored_images"] == 24
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("scheduler", list(STOCHASTIC))
def test_stochastic_schedulers_are_steered(scheduler: str) -> None:
    cls, options, call = STOCHASTIC[scheduler]
    pipe = with_scheduler(family("sd"), cls, **options)
    result = steer(pipe, call=call)
    assert result.steps[0].resampled.any()
    again = steer(pipe, call=call)
    assert np.array_equal(stacked(result), stacked(again))
    plain = steer(pipe, call=call, resample_steps=())
    assert not np.array_equal(stacked(result), stacked(plain))
    assert [step.index for step in result.steps] == [1, 3]


@by_default(lambda scheduler: scheduler in ("ddim_eta_0", "pndm", "dpm", "euler", "heun"))
@pytest.mark.parametrize("scheduler", list(DETERMINISTIC))
def test_deterministic_samplers_are_refused_and_pruned(scheduler: str) -> None:
    cls, options = DETERMINISTIC[scheduler]
    pipe = with_scheduler(family("sd"), cls, **options)
    with pytest.raises(UserError, match=r"deterministic as it is called.*kernel='ddim'") as caught:
        steer(pipe)
    assert "\n" not in str(caught.value) and "step" not in vars(pipe.scheduler)
    result = steer(pipe, mode="prune")
    distinct = {image.tobytes() for image in result.images[0]}
    assert len(distinct) == int(result.num_roots[0]) < 4
    assert result.counts["model_rows"] < steer(pipe, resample_steps=()).counts["model_rows"]
    if scheduler != "heun":
        assert steer(pipe, kernel="ddim").steps[0].resampled.any()
    else:
        with pytest.raises(UserError, match="calls the model twice per step"):
            steer(pipe, kernel="ddim")


def test_pruning_computes_distinct_particles_and_nothing_changes() -> None:
    """Copied rows are computed once; images are those of their root in a plain run."""
    pipe = family("sd")
    result = steer(pipe, mode="prune")
    plain = steer(pipe, resample_steps=())
    for p in range(2):
        for k in range(4):
            own = np.asarray(result.images[p][k], dtype=int)
            root = np.asarray(plain.images[p][int(result.roots[p, k])], dtype=int)
            assert np.abs(own - root).max() <= 1


def test_prune_refuses_a_stochastic_sampler() -> None:
    with pytest.raises(UserError, match="prune is for deterministic samplers"):
        steer(family("sd"), mode="prune", call={"eta": 1.0})


def test_second_order_schedulers_are_scored_once_per_interval() -> None:
    pipe = with_scheduler(family("sd"), "KDPM2AncestralDiscreteScheduler")
    result = steer(pipe, steps=5, resample_steps=(0, 4))
    assert [step.index for step in result.steps] == [0, 4]
    with pytest.raises(ConfigError, match=r"resample_steps: 5 lies outside the run of 5 steps"):
        steer(pipe, steps=5, resample_steps=(5,))


# Scheduler state


def test_solver_history_follows_the_particles() -> None:
    """Order-2 sde-dpmsolver++ keeps the last model output: a run permuted by hand,
    history and all, gives the same latents."""
    pipe = with_scheduler(
        family("sd"),
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
    )
    wanted = {2: torch.tensor([[3, 3, 0, 1]]), 4: torch.tensor([[2, 0, 0, 2]])}
    seen = iter(wanted.values())

    def force(x0: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        # Weights in quarters make systematic resampling give exactly these counts.
        counts = torch.bincount(next(seen)[0], minlength=4).double()
        return torch.where(counts > 0, counts.clamp(min=1).log(), torch.tensor(-40.0).double())

    result = FKSteering(
        pipe,
        brightness,
        num_particles=4,
        lmbda=1.0,
        potential="rt",
        ess_threshold=None,
        resample_steps=(2, 4),
        intermediate_reward=force,
    )(PROMPTS[0], generator=gen(7), num_inference_steps=7, guidance_scale=1.0, height=32, width=32)
    assert [sorted(step.ancestors[0].tolist()) for step in result.steps] == [
        sorted(w[0].tolist()) for w in wanted.values()
    ]
    moved = {step.index: step.ancestors[0] for step in result.steps}

    def by_hand(history: bool) -> torch.Tensor:
        scheduler, generator = pipe.scheduler, gen(7)
        embeds = pipe.encode_prompt(PROMPTS[0], "cpu", 4, False)[0]
        scheduler.set_timesteps(7)
        latents = torch.randn(4, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                out = pipe.unet(
                    scheduler.scale_model_input(latents, t), t, encoder_hidden_states=embeds
                ).sample
                if i in moved:
                    latents, out = latents[moved[i]], out[moved[i]]
                    if history:
                        scheduler.model_outputs = [
                            None if x is None else x[moved[i]] for x in scheduler.model_outputs
                        ]
                latents = scheduler.step(out, t, latents, generator=generator).prev_sample
        return latents

    assert torch.equal(result.latents[0], by_hand(history=True))
    assert not torch.allclose(result.latents[0], by_hand(history=False), atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler_ancestral", "dpm_sde_1"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_prediction_is_the_schedulers_own(scheduler: str, prediction: str) -> None:
    cls, options, _ = STOCHASTIC[scheduler]
    made = with_scheduler(
        build_pipeline("sd"), cls, prediction_type=prediction, **options
    ).scheduler
    made.set_timesteps(10)
    for position in (0, 4, 8):
        fresh = type(made).from_config(made.config)
        fresh.set_timesteps(10)
        t = fresh.timesteps[position]
        sample, out = (
            torch.randn(3, 4, 8, 8, generator=gen(1)),
            torch.randn(3, 4, 8, 8, generator=gen(2)),
        )
        if hasattr(fresh, "is_scale_input_called"):
            fresh.scale_model_input(sample, t)
        now, _ = read_coordinates(fresh, t, position)
        found = clean_prediction(fresh, out, sample, now)
        if hasattr(fresh, "convert_model_output"):
            expected = fresh.convert_model_output(out, sample=sample)
        else:
            expected = fresh.step(out, t, sample, generator=gen()).pred_original_sample
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


CLIPPING = [
    ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.2}),
    ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 1.2}),
    ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 1.2}),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("EulerAncestralDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 1.2}),
]


@pytest.mark.parametrize(("name", "options"), CLIPPING)
def test_clean_prediction_is_clipped_where_the_scheduler_clips(name: str, options: dict) -> None:
    import diffusers

    base = {
        key: value
        for key, value in build_pipeline("sd").scheduler.config.items()
        if not key.startswith("_")
    }
    made = getattr(diffusers, name).from_config({**base, **options})
    made.set_timesteps(10)
    t = made.timesteps[1]
    sample, out = (
        3 * torch.randn(3, 4, 8, 8, generator=gen(1)),
        torch.randn(3, 4, 8, 8, generator=gen(2)),
    )
    if hasattr(made, "is_scale_input_called"):
        made.scale_model_input(sample, t)
    now, then = read_coordinates(made, t, 1)
    raw = clean_prediction(made, out, sample, now)
    found = as_clipped(made, raw)
    assert torch.equal(found, raw) == ("Euler" in name)
    if hasattr(made, "convert_model_output"):
        expected = made.convert_model_output(out, sample=sample)
    elif name == "LCMScheduler":
        expected = raw.clamp(-1.2, 1.2)  # what it denoises with, before its boundary condition
    else:
        expected = made.step(out, t, sample, generator=gen(3)).pred_original_sample
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    if name in (
        "DDIMScheduler",
        "DDPMScheduler",
    ):  # our kernel at eta 1 samples the scheduler's law
        step = transition(
            "ddim", 1.0, out, sample, found, now, then, raw if name == "DDIMScheduler" else None
        )
        noise = torch.randn(sample.shape, generator=gen(3))
        more = {"eta": 1.0} if name == "DDIMScheduler" else {}
        theirs = made.step(out, t, sample, generator=gen(3), **more).prev_sample
        torch.testing.assert_close(step[0] + step[1] * noise, theirs, rtol=1e-4, atol=1e-4)


def test_clean_prediction_of_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(8)
    x0, eps = torch.randn(2, 4, 8, 8, generator=gen(1)), torch.randn(2, 4, 8, 8, generator=gen(2))
    for position in (1, 5):
        made._step_index = None
        sigma = made.sigmas[position]
        now, then = read_coordinates(made, made.timesteps[position], position)
        assert then.sigma == float(made.sigmas[position + 1])
        torch.testing.assert_close(
            clean_prediction(made, eps - x0, (1 - sigma) * x0 + sigma * eps, now), x0
        )


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpm_sde_1"])
def test_our_ddim_kernel_is_theirs_at_eta_one(scheduler: str) -> None:
    """One formula: DDIM eta 1 in variance-preserving coordinates, Euler ancestral in
    exploding ones, order-1 sde-dpmsolver++."""
    cls, options, call = STOCHASTIC[scheduler]
    made = with_scheduler(build_pipeline("sd"), cls, **options).scheduler
    made.set_timesteps(10)
    sample, out = (
        torch.randn(3, 4, 8, 8, generator=gen(1)),
        torch.randn(3, 4, 8, 8, generator=gen(2)),
    )
    t = made.timesteps[4]
    if hasattr(made, "is_scale_input_called"):
        made.scale_model_input(sample, t)
    now, then = read_coordinates(made, t, 4)
    mean, std = ddim_transition(clean_prediction(made, out, sample, now), sample, now, then, 1.0)
    noise = torch.randn(sample.shape, generator=gen(3))
    theirs = made.step(out, t, sample, generator=gen(3), **call).prev_sample
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-4, atol=1e-4)
