"""What pipelines in the wild have: precisions, adapters, hooks, grids, other tasks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from families import PROMPTS, brightness, call_options, family, quiet, steer, with_scheduler
from PIL import Image
from tiny import build_pipeline

from diffalign import FKSteering

pytestmark = pytest.mark.filterwarnings("ignore")
DDIM = {"call": {"eta": 1.0}}


def check(result: Any) -> Any:
    """Steered for real: resampled, the product closed, the images there."""
    assert any(step.resampled.any() for step in result.steps)
    torch.testing.assert_close(result.applied, 4.0 * result.rewards, rtol=0, atol=1e-6)
    assert all(isinstance(image, Image.Image) for row in result.images for image in row)
    return result


@pytest.mark.parametrize(
    ("name", "kernel"), [("sd", None), ("sd3", "ddim"), ("flux", "euler_maruyama")]
)
def test_bfloat16(name: str, kernel: str | None) -> None:
    pipe = quiet(family(name).to(torch.bfloat16))
    call = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in call_options(name).items()
    }
    check(steer(pipe, name=name, kernel=kernel, call=call | ({} if kernel else {"eta": 1.0})))


def test_a_half_precision_autoencoder_that_must_be_upcast() -> None:
    pipe = family("sdxl")
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    check(steer(pipe, name="sdxl", kernel="ddim"))
    assert pipe.vae.dtype == torch.float16


def test_lora_chunks_and_offloading_hooks() -> None:
    from accelerate import cpu_offload
    from peft import LoraConfig

    pipe = family("sd")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    check(steer(pipe, model_batch_size=3, **DDIM))
    pipe = family("sd")
    cpu_offload(pipe.unet)
    cpu_offload(pipe.vae)
    hook = vars(pipe.unet)["forward"]
    check(steer(pipe, **DDIM))
    assert vars(pipe.unet)["forward"] is hook


@pytest.mark.nightly
def test_compiled_and_sliced() -> None:
    pipe = family("sd")
    pipe.vae.enable_slicing()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    check(steer(pipe, model_batch_size=5, **DDIM))


@pytest.mark.parametrize(
    "options",
    [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
     {"final_sigmas_type": "sigma_min"}, {"euler_at_final": True}, {"solver_order": 3}],
)  # fmt: skip
def test_solver_grids(options: dict[str, Any]) -> None:
    check(
        steer(
            with_scheduler(
                family("sd"),
                "DPMSolverMultistepScheduler",
                algorithm_type="sde-dpmsolver++",
                **options,
            )
        )
    )


def test_zero_terminal_snr() -> None:
    pipe = with_scheduler(
        family("sd_v"), "DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    result = check(steer(pipe, kernel="ddim", resample_steps=(0, 1, 3)))
    assert result.latents.isfinite().all()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_matching_through_a_stochastic_solver(name: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe = family(name)
    shift = (
        {"use_dynamic_shifting": True, "time_shift_type": "exponential"} if name == "flux" else {}
    )
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        **shift,
    )
    first, again = check(steer(pipe, name=name)), steer(pipe, name=name)
    assert torch.equal(
        first.latents, again.latents
    )  # the pipeline passes no generator, steering does
    check(steer(pipe, name=name, kernel="ddim"))


@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"])
def test_stochastic_flow_schedulers(name: str) -> None:
    import diffusers

    pipe = family("sd3")
    pipe.scheduler = getattr(diffusers, name)()
    check(steer(pipe, name="sd3"))


def test_second_order_flow_matching_is_pruned() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = family("sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    result = check(steer(pipe, name="sd3", mode="prune"))
    assert [step.index for step in result.steps] == [1, 3]


def test_time_grids_of_the_caller() -> None:
    pipe = with_scheduler(
        family("sd"), "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"
    )
    options: dict[str, Any] = {"num_particles": 4, "lmbda": 4.0, "ess_threshold": 1.0}
    found = FKSteering(pipe, brightness, **options)(
        PROMPTS, seed=0, timesteps=[900, 700, 400, 200, 50], height=32, width=32
    )
    assert [step.index for step in check(found).steps] == [1, 2, 3, 4]
    found = FKSteering(family("sd3"), brightness, kernel="ddim", **options)(
        PROMPTS, seed=0, sigmas=[1.0, 0.8, 0.5, 0.2], height=32, width=32
    )
    assert [step.index for step in check(found).steps] == [0, 1, 2, 3]
    pndm = with_scheduler(family("sd"), "PNDMScheduler", skip_prk_steps=True)
    check(steer(pndm, kernel="ddim"))


def test_fractions_are_of_the_steps_that_are_run() -> None:
    result = steer(
        family("sdxl"),
        name="sdxl",
        steps=8,
        kernel="ddim",
        call={"denoising_end": 0.5},
        resample_steps=(0.2, 0.5, 0.8),
    )
    assert [step.index for step in result.steps] == [0, 2, 3]


def test_arguments_per_prompt_are_split_with_the_prompts() -> None:
    pipe = family("sd")
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for call in (
        {"negative_prompt": ["dark", "noisy"]},
        {"latents": latents},
        {"guidance_rescale": 0.5},
    ):
        whole, split = (
            check(steer(pipe, call=call | {"eta": 1.0}, prompts_per_call=size))
            for size in (None, 1)
        )
        assert torch.equal(whole.ancestors, split.ancestors)
        torch.testing.assert_close(whole.latents, split.latents, rtol=1e-3, atol=1e-3)
    two = steer(pipe, call={"timesteps": None, "eta": 1.0}, lmbda=[0.0, 4.0], prompts_per_call=1)
    assert two.lmbda.tolist() == [0.0, 4.0]


def test_prompt_embeddings_are_given_to_every_particle() -> None:
    pipe = family("sd")
    embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    given = check(
        steer(pipe, call={"prompt_embeds": embeds, "negative_prompt_embeds": negative, "eta": 1.0})
    )
    torch.testing.assert_close(given.latents, steer(pipe, **DDIM).latents, rtol=1e-3, atol=1e-3)


def test_callbacks_may_replace_latents() -> None:
    def callback(pipe, i, t, kwargs):
        kwargs["latents"] = kwargs["latents"] * 1.0
        return kwargs

    found = check(steer(family("sd"), call={"eta": 1.0, "callback_on_step_end": callback}))
    assert torch.equal(found.latents, steer(family("sd"), **DDIM).latents)


def test_inpainting() -> None:
    from diffusers import StableDiffusionInpaintPipeline

    pipe = quiet(
        StableDiffusionInpaintPipeline(
            **build_pipeline("sd").components, requires_safety_checker=False
        )
    )
    found = FKSteering(pipe, brightness, num_particles=4, lmbda=4.0, ess_threshold=1.0)(
        PROMPTS[0], seed=0, image=Image.new("RGB", (32, 32), "gray"),
        mask_image=Image.new("L", (32, 32), 255), height=32, width=32,
        num_inference_steps=5, eta=1.0, strength=1.0,
    )  # fmt: skip
    check(found)


def test_two_threads_do_not_mix() -> None:
    pipe = family("sd")
    alone = steer(pipe, **DDIM)
    inside, release = threading.Event(), threading.Event()
    outcomes: list[Any] = []

    def waiting(images, prompts):
        inside.set()
        release.wait(30)
        return brightness(images, prompts)

    thread = threading.Thread(target=lambda: outcomes.append(steer(pipe, scorer=waiting, **DDIM)))
    thread.start()
    assert inside.wait(30)
    with pytest.raises(Exception, match="already wrapped"):
        steer(pipe, **DDIM)
    release.set()
    thread.join()
    assert torch.equal(outcomes[0].latents, alone.latents)


def test_nothing_is_kept_after_a_call() -> None:
    """The same object may be called repeatedly, and holds no particles in between."""
    import gc
    import weakref

    steering = FKSteering(family("sd"), brightness, num_particles=4, lmbda=4.0)
    result = steering(PROMPTS, seed=0, num_inference_steps=4, eta=1.0, height=32, width=32)
    kept = weakref.ref(result.latents)
    first = result.latents.clone()
    del result
    gc.collect()
    assert kept() is None
    assert torch.equal(
        steering(PROMPTS, seed=0, num_inference_steps=4, eta=1.0, height=32, width=32).latents,
        first,
    )
