"""Mistakes are one clear sentence, and nothing is left behind: scheduler, model and
autoencoder are as they were."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import call_options, family, with_scheduler, zeros

from diffalign import FKSteering
from diffalign.errors import ConfigError, UserError

PROMPT = "a small red circle on the left of a gray background"
CALL = {"num_inference_steps": 4, "eta": 1.0, "seed": 0} | call_options("sd")


@pytest.fixture
def pipe() -> Any:
    return family("sd")


def untouched(pipe: Any) -> bool:
    return (
        "step" not in vars(pipe.scheduler)
        and "forward" not in vars(pipe.unet)
        and "decode" not in vars(pipe.vae)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_particles": 1, "resample_steps": (1,)},
            "num_particles: 1 particle cannot be resampled; give at least 2",
        ),
        ({"num_particles": 0}, "num_particles: expected int >= 1, got 0"),
        ({"lmbda": -1.0}, "lmbda: expected a finite number >= 0"),
        ({"lmbda": math.nan}, "lmbda: expected a finite number >= 0"),
        ({"lmbda": math.inf}, "lmbda: expected a finite number >= 0"),
        ({"ess_target": 0.5}, "give lmbda or ess_target, not both"),
        ({"lmbda": None}, "give lmbda or ess_target, not neither"),
        ({"lmbda": None, "ess_target": 1.5}, "ess_target: expected a share"),
        ({"resample_steps": (1.5,)}, "a fraction of the run lies in"),
        ({"resample_steps": (-1,)}, "an index is >= 0"),
        ({"potential": "best"}, "potential: expected one of diff"),
        ({"scheme": "best"}, "scheme: expected one of systematic"),
        ({"kernel": "ode"}, "kernel: expected one of ddim"),
        ({"eta": 0.5}, "eta: it belongs to kernel="),
        ({"kernel": "ddim", "eta": 0.0}, r"eta: expected a number in \(0, 1\]"),
        ({"kernel": "ancestral", "eta": 0.5}, "eta: expected a number of 1"),
        ({"mode": "cut"}, "mode: expected one of resample, prune"),
        ({"mode": "prune", "kernel": "ddim"}, "prune is for deterministic samplers"),
        ({"model_batch_size": 0}, "model_batch_size: expected int >= 1"),
        ({"prompts_per_call": 2.5}, "prompts_per_call: expected int >= 1"),
        ({"scorer": 3}, "scorer: expected a scorer, its name or a function"),
        ({"scorer": "no-such-scorer"}, "no-such-scorer"),
        ({"intermediate_reward": 3}, "intermediate_reward: expected a function"),
    ],
)
def test_options_before_any_work(pipe: Any, options: dict[str, Any], words: str) -> None:
    options = {"scorer": zeros, "lmbda": 1.0} | options
    with pytest.raises(UserError, match=words) as caught:
        FKSteering(pipe, options.pop("scorer"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"num_images_per_prompt": 2},
            "num_images_per_prompt: steering draws num_particles=4 images per prompt; leave it out",
        ),
        ({"output_type": "latent"}, "output_type: 'latent' gives no image to score"),
        ({"return_dict": False}, "return_dict: leave it out"),
        ({"generator": torch.Generator()}, "seed: give generator or seed, not both"),
        (
            {"generator": [torch.Generator()] * 3, "seed": None},
            r"generator: expected one, or one per particle \(1 x 4\), got 3",
        ),
        ({"seed": [1, 2]}, r"seed: expected one, or one per prompt \(1\), got 2"),
        ({"metadata": [{}, {}]}, r"metadata: expected one per prompt \(1\), got 2"),
        (
            {"num_inference_steps": 2},
            r"resample_steps: 2 lies outside the run of 2 steps \(0 to 1\)",
        ),
        ({"prompt": "x"}, "prompt: steering sets it itself"),
    ],
)
def test_calls_before_any_work(pipe: Any, call: dict[str, Any], words: str) -> None:
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *a: calls.append(1))
    with pytest.raises(UserError, match=words) as caught:
        FKSteering(pipe, zeros, lmbda=1.0, resample_steps=(1, 2))(PROMPT, **CALL | call)
    assert "\n" not in str(caught.value) and untouched(pipe) and not calls


@pytest.mark.parametrize("prompts", [[], [3], ""])
def test_prompts(pipe: Any, prompts: Any) -> None:
    steering = FKSteering(pipe, zeros, lmbda=1.0)
    if prompts == "":
        assert len(steering(prompts, **CALL).images) == 1  # an empty prompt is a prompt
    else:
        with pytest.raises(ConfigError, match="prompts: expected at least one text"):
            steering(prompts, **CALL)


def test_lambda_per_prompt_of_the_wrong_length(pipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"lmbda: expected one, or one per prompt \(1\), got 2"):
        FKSteering(pipe, zeros, lmbda=[1.0, 2.0])(PROMPT, **CALL)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (
            lambda images, prompts: torch.zeros(3),
            "scorer: expected 4 numbers for 4 images, got shape",
        ),
        (lambda images, prompts: torch.zeros(4, 2), "scorer: expected 4 numbers"),
        (lambda images, prompts: "good", "scorer: expected 4 numbers, got str"),
        (lambda images, prompts: [math.inf, 0.0, 0.0, 0.0], r"reward: the scorer returned \+inf"),
        (
            lambda images, prompts: [math.nan] * 4,
            "reward: the scorer returned NaN for every particle of 'a small red",
        ),
    ],
)
def test_rewards_that_do_not_fit(pipe: Any, scorer: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FKSteering(pipe, scorer, lmbda=1.0)(PROMPT, **CALL)
    assert untouched(pipe)
    assert len(FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **CALL).images[0]) == 4


def test_nan_counts_as_impossible(pipe: Any) -> None:
    result = FKSteering(pipe, lambda images, prompts: [math.nan, 0.0, 0.0, 0.0], lmbda=1.0)(
        PROMPT, **CALL
    )
    assert result.nan_count == 5 and result.weights[0, 0] == 0
    assert result.best_index[0] != 0


@pytest.mark.filterwarnings("ignore:.*prompts:UserWarning")
def test_minus_infinity_everywhere_is_degenerate(pipe: Any) -> None:
    result = FKSteering(pipe, lambda images, prompts: [-math.inf] * len(images), lmbda=1.0)(
        PROMPT, **CALL
    )
    assert result.degenerate.tolist() == [True] and result.log_z[0] == -math.inf
    assert torch.allclose(result.weights, torch.full((1, 4), 0.25).double())


def test_an_exception_in_the_scorer_restores_everything(pipe: Any) -> None:
    def broken(images, prompts):
        raise RuntimeError("the judge is asleep")

    with pytest.raises(RuntimeError, match="asleep"):
        FKSteering(pipe, broken, lmbda=1.0, model_batch_size=2)(PROMPT, **CALL)
    assert untouched(pipe)


def test_an_exception_in_the_pipeline_restores_everything(pipe: Any) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **CALL | {"height": 33})
    assert untouched(pipe)

    def stop(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **CALL, callback_on_step_end=stop)
    assert untouched(pipe)


def test_a_wrapped_scheduler_is_refused(pipe: Any) -> None:
    outer = FKSteering(pipe, zeros, lmbda=1.0)

    def nested(images, prompts):
        outer(PROMPT, **CALL)
        return torch.zeros(len(images))

    with pytest.raises(UserError, match="scheduler: its step is already wrapped"):
        FKSteering(pipe, nested, lmbda=1.0)(PROMPT, **CALL)
    assert untouched(pipe)
    pipe.scheduler.step = pipe.scheduler.step
    with pytest.raises(UserError, match="already wrapped"):
        outer(PROMPT, **CALL)
    assert "step" in vars(pipe.scheduler)  # another tool's own


def test_a_copied_scheduler_is_refused(pipe: Any) -> None:
    def copying(images, prompts):
        clone = copy.deepcopy(pipe.scheduler)
        clone.step(torch.zeros(4, 4, 16, 16), clone.timesteps[0], torch.zeros(4, 4, 16, 16))
        return torch.zeros(len(images))

    with pytest.raises(UserError, match="steps through a copy of its scheduler"):
        FKSteering(pipe, copying, lmbda=1.0)(PROMPT, **CALL)
    assert untouched(pipe)


def test_replaced_noise_is_refused() -> None:
    pipe = family("sd3")
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, stochastic_sampling=True
    )
    call = {"num_inference_steps": 3, "seed": 0} | call_options("sd3")
    with pytest.raises(
        UserError, match=r"stochastic_sampling=True replaces all noise .* use kernel='ddim'"
    ):
        FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **call)
    assert len(FKSteering(pipe, zeros, lmbda=1.0, kernel="ddim")(PROMPT, **call).images[0]) == 4


def test_state_that_cannot_be_reached_is_refused(pipe: Any) -> None:
    with_scheduler(pipe, "CogVideoXDPMScheduler")
    with pytest.raises(UserError, match="CogVideoXDPMScheduler cannot be steered"):
        FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **CALL)
    with_scheduler(pipe, "CogVideoXDDIMScheduler")
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler is deterministic"):
        FKSteering(pipe, zeros, lmbda=1.0)(PROMPT, **CALL)


def test_model_caches_are_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = family("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UserError, match=r"transformer: its feature cache .*disable_cache\(\)"):
        FKSteering(pipe, zeros, lmbda=1.0, kernel="ddim")(
            PROMPT, num_inference_steps=3, **call_options("flux", 1)
        )


def test_euler_maruyama_needs_flow_matching(pipe: Any) -> None:
    with pytest.raises(UserError, match="euler_maruyama is for flow-matching models"):
        FKSteering(pipe, zeros, lmbda=1.0, kernel="euler_maruyama")(PROMPT, **CALL)


def test_pipelines_that_are_none() -> None:
    with pytest.raises(UserError, match="has no scheduler with a step"):
        FKSteering(object(), zeros, lmbda=1.0)


def test_a_pipeline_that_never_steps(pipe: Any) -> None:
    class Lazy:
        scheduler = pipe.scheduler

        def __call__(self, prompt):
            return None

    with pytest.raises(UserError, match=r"never called the step of pipe\.scheduler"):
        FKSteering(Lazy(), zeros, lmbda=1.0)(PROMPT)


def test_a_pipeline_that_stops_early(pipe: Any) -> None:
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i >= 1
        return kwargs

    with pytest.raises(
        UserError, match="resample_steps: 3 was never reached, the pipeline stopped after 2 steps"
    ):
        FKSteering(pipe, zeros, lmbda=1.0, resample_steps=(1, 3))(
            PROMPT, **CALL, callback_on_step_end=stop
        )


def test_decoders_that_do_not_fit(pipe: Any) -> None:
    with pytest.raises(
        UserError, match="decoder: expected an autoencoder, a function of latents or None"
    ):
        FKSteering(pipe, zeros, lmbda=1.0, decoder=3)(PROMPT, **CALL)
    with pytest.raises(UserError, match="decoder: expected a function that returns pixels"):
        FKSteering(pipe, zeros, lmbda=1.0, decoder=lambda x0: x0.flatten(1))(PROMPT, **CALL)
    assert untouched(pipe)
