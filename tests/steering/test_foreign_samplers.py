"""Our kernels, densities and decodings against diffusers' own. Nightly."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from families import PROMPTS, call_options, family, steer, with_scheduler
from tiny import make_trainer

from diffalign.steering.kernels import draw, transition
from diffalign.steering.noise_levels import Coordinates

pytestmark = pytest.mark.nightly

DPM = ("DPMSolverMultistepScheduler", {"solver_order": 1})
GRIDS: list[tuple[str, str, dict[str, Any]]] = [
    ("sd", DPM[0], {**DPM[1], "timestep_spacing": "leading"}),
    ("sd", DPM[0], {**DPM[1], "timestep_spacing": "linspace"}),
    ("sd", DPM[0], {**DPM[1], "timestep_spacing": "trailing"}),
    ("sd_v", DPM[0], {**DPM[1], "use_karras_sigmas": True}),
    ("sd_v", DPM[0], {**DPM[1], "use_exponential_sigmas": True}),
    ("sd", DPM[0], {**DPM[1], "use_lu_lambdas": True}),
    ("sd", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("sd_v", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
]


@pytest.mark.parametrize(("name", "scheduler", "options"), GRIDS, ids=str)
def test_a_kernel_without_noise_is_the_deterministic_sampler(
    name: str, scheduler: str, options: dict[str, Any]
) -> None:
    """At eta near 0 a step is first-order DPM-Solver, Euler or the flow's Euler on the
    same grid."""
    pipe = with_scheduler(family(name), scheduler, **options)
    call: dict[str, Any] = {"num_inference_steps": 8, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    shape = (64, 16) if name == "flux" else (4, 16, 16)
    latents = torch.randn(4, *shape, generator=generator)
    mine = steer(
        pipe,
        name=name,
        kernel="ddim",
        eta=1e-7,
        num_particles=2,
        resample_steps=(),
        scorer=lambda images, prompts: torch.zeros(len(images)),
        call={**call, "output_type": "pil", "latents": latents.clone()},
    )
    options_of_call = call_options(name, 2)
    embeds = {k: v.repeat_interleave(2, 0) for k, v in options_of_call.items() if "embeds" in k}
    prompts = {} if embeds else {"prompt": [p for p in PROMPTS for _ in range(2)]}
    with torch.no_grad():
        plain = pipe(
            **{**options_of_call, **embeds, **prompts, **call}, latents=latents.clone()
        ).images
    size = float(plain.abs().max())
    torch.testing.assert_close(mine.latents.flatten(0, 1), plain, rtol=1e-4, atol=3e-6 * size)


@pytest.mark.parametrize(
    ("kernel", "eta"), [("ddim", 1.0), ("ancestral", 1.0), ("euler_maruyama", 0.7)]
)
def test_flow_kernels_keep_a_gaussian(kernel: str, eta: float) -> None:
    """Data N(0.5, 0.64), exact velocity, 400 steps: the samples have these moments."""
    mean, variance = 0.5, 0.64
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    sigmas = torch.linspace(1, 0, 401, dtype=torch.float64).tolist()
    for now, then in itertools.pairwise(sigmas):
        alpha = 1 - now
        gain = alpha * variance / (alpha**2 * variance + now**2)
        clean = mean + gain * (y - alpha * mean)
        velocity = (y - clean) / now
        ends = [Coordinates(1 - s, s, "flow", "flow") for s in (now, then)]
        middle, std = transition(kernel, eta, velocity, y, clean, *ends)
        y = draw(middle, std, generator, torch.float64)
    assert abs(float(y.mean()) - mean) < 0.006
    assert abs(float(y.var()) - variance) < 0.02


@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", "sd3", "flux"])
def test_intermediate_images_are_the_pipelines_decoding(name: str) -> None:
    """The picture of a latent by steering's decoder and by the pipeline, to the last
    grey level."""
    pipe = family(name)
    call = {"num_inference_steps": 3, "output_type": "latent", **call_options(name, 2)}
    prompts = {} if name == "flux" else {"prompt": PROMPTS}
    with torch.no_grad():
        drawn = pipe(**call, **prompts, generator=torch.Generator().manual_seed(0)).images
        call["output_type"] = "pil"
        pictures = pipe(**call, **prompts, generator=torch.Generator().manual_seed(0)).images
    seen: list[Any] = []

    def watch(images: Any, texts: Any) -> torch.Tensor:
        seen.append([np.asarray(image) for image in images])
        return torch.zeros(len(images))

    steer(
        pipe,
        name=name,
        scorer=watch,
        kernel="ddim",
        num_particles=2,
        steps=3,
        resample_steps=(1,),
        predict_x0=lambda scheduler, output, timestep, y: drawn.repeat_interleave(2, 0),
    )
    for image, picture in zip(seen[0][::2], pictures, strict=True):
        assert np.array_equal(image, np.asarray(picture))


def test_noise_of_rows_epochs_and_seeds_is_independent(tmp_path: Any) -> None:
    """No two noise streams correlate beyond what chance gives the largest of many."""
    rows = [{"prompt": PROMPTS[i % 2]} for i in range(300)]
    draws = []
    for seed in (0, 1):
        trainer = make_trainer(
            tmp_path / str(seed),
            "sd",
            "self_npo",
            rows=rows,
            seed=seed,
            per_device_train_batch_size=300,
        )
        trainer.setup()
        batches = trainer.data_pipeline.batches(0)
        draws += [trainer.data_pipeline.builder(next(batches)).noise.flatten(1) for _ in range(2)]
    noise = torch.cat(draws)  # 1200 streams of 1024 numbers
    correlations = torch.corrcoef(noise).fill_diagonal_(0).abs()
    assert (
        float(correlations.max()) < 0.19
    )  # 5.9 standard deviations; expected maximum 5.1 of 720,000 pairs
    assert abs(float(noise.mean())) < 0.004 and abs(float(noise.std()) - 1) < 0.004
