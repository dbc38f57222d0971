"""`FKSteering` on unmodified pipelines: bit-equality with the plain pipeline, streams,
chunks, scheduler state, families."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from families import (
    PROMPTS,
    STOCHASTIC,
    brightness,
    call_options,
    family,
    gen,
    quiet,
    stacked,
    steer,
    with_scheduler,
    zeros,
)
from PIL import Image
from tiers import by_default
from tiny import build_pipeline

from diffalign import FKSteering
from diffalign.errors import ConfigError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts:UserWarning")
# Equal to the plain pipeline


@by_default()
@pytest.mark.parametrize("scheduler", [name for name in STOCHASTIC])
@pytest.mark.parametrize("listed", [False, True])
def test_lambda_zero_is_the_plain_pipeline_bit_by_bit(scheduler: str, listed: bool) -> None:
    cls, options, call = STOCHASTIC[scheduler]
    pipe = with_scheduler(family("sd"), cls, **options)
    generator = (lambda: [gen(j) for j in range(8)]) if listed else gen
    call = call | {"num_inference_steps": 6, "output_type": "np"} | call_options("sd")
    plain = pipe(PROMPTS, num_images_per_prompt=4, generator=generator(), **call).images
    result = FKSteering(pipe, brightness, num_particles=4, lmbda=0.0, ess_threshold=None)(
        PROMPTS, generator=generator(), **call
    )
    assert np.array_equal(stacked(result), plain)
    assert torch.equal(result.log_z, torch.zeros(2).double())
    torch.testing.assert_close(
        result.weights, torch.full((2, 4), 0.25).double(), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("potential", ["diff", "max", "sum"])
def test_one_particle_is_the_plain_pipeline_bit_by_bit(potential: str) -> None:
    pipe = family("sd")
    call = {"num_inference_steps": 5, "output_type": "np", "eta": 1.0} | call_options("sd")
    plain = pipe(PROMPTS[0], generator=gen(3), **call).images
    result = FKSteering(pipe, brightness, num_particles=1, lmbda=3.0, potential=potential)(
        PROMPTS[0], generator=gen(3), **call
    )
    assert np.array_equal(stacked(result), plain)
    torch.testing.assert_close(result.log_z, 3.0 * result.rewards[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_other_families_lambda_zero_with_the_pipelines_own_sampler(name: str) -> None:
    """Nothing is resampled, so even a deterministic sampler is left as it is."""
    pipe = family(name)
    call = {"num_inference_steps": 3, "output_type": "np"} | call_options(name)
    if name == "flux":  # its embeddings are not multiplied by num_images_per_prompt
        rows = {
            key: value.repeat_interleave(2, 0)
            for key, value in call.items()
            if key.endswith("_embeds")
        }
        plain = pipe(generator=gen(1), **call | rows).images
    else:
        plain = pipe(prompt=PROMPTS, num_images_per_prompt=2, generator=gen(1), **call).images
    result = FKSteering(pipe, brightness, num_particles=2, lmbda=2.0, resample_steps=())(
        PROMPTS, generator=gen(1), **call
    )
    assert np.array_equal(stacked(result), plain)


# Streams


def test_a_prompt_does_not_depend_on_the_others_of_the_call() -> None:
    pipe = family("sd")
    together = steer(pipe, call={"seed": [11, 12], "eta": 1.0})
    turned = steer(pipe, PROMPTS[::-1], call={"seed": [12, 11], "eta": 1.0})
    split = steer(pipe, call={"seed": [11, 12], "eta": 1.0}, prompts_per_call=1)
    for other, order in ((turned, [1, 0]), (split, [0, 1])):
        assert torch.equal(together.ancestors, other.ancestors[:, order])
        torch.testing.assert_close(together.latents, other.latents[order], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.log_z, other.log_z[order], rtol=1e-3, atol=1e-2)
    assert split.prompts == PROMPTS and split.counts["model_rows"] == together.counts["model_rows"]


def test_the_resampling_stream_leaves_the_noise_alone() -> None:
    pipe = family("sd")
    draws = [
        steer(
            pipe,
            scheme="multinomial",
            call={"eta": 1.0, "seed": 3, "resample_generator": [gen(a), gen(a + 1)]},
        )
        for a in (0, 0, 50)
    ]
    assert torch.equal(draws[0].latents, draws[1].latents)
    assert not torch.equal(draws[0].ancestors, draws[2].ancestors)
    assert torch.equal(
        draws[0].steps[0].rewards, draws[2].steps[0].rewards
    )  # up to the first resampling nothing differs


def test_without_generator_and_seed_the_global_one_decides() -> None:
    pipe = family("sd")
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(steer(pipe, call={"seed": None, "eta": 1.0}))
    assert torch.equal(results[0].latents, results[1].latents)
    assert results[0].seed == results[1].seed


def test_a_users_generator_is_read_as_the_pipeline_reads_it() -> None:
    """Resampling draws from its own stream, so the generator ends in the state a plain
    call leaves."""
    pipe = family("sd")
    call = {"num_inference_steps": 5, "eta": 1.0} | call_options("sd")
    plain, ours = gen(9), gen(9)
    pipe(PROMPTS, num_images_per_prompt=4, generator=plain, **call)
    FKSteering(pipe, brightness, num_particles=4, lmbda=1.0, ess_threshold=1.0)(
        PROMPTS, generator=ours, **call
    )
    assert torch.equal(plain.get_state(), ours.get_state())


def test_chunk_sizes_change_nothing() -> None:
    pipe = family("sd")
    whole = steer(pipe, call={"eta": 1.0})
    parts = steer(
        pipe, call={"eta": 1.0}, model_batch_size=3, decode_batch_size=1, reward_batch_size=3
    )
    assert torch.equal(whole.ancestors, parts.ancestors)
    torch.testing.assert_close(whole.latents, parts.latents, rtol=1e-3, atol=1e-4)
    assert whole.counts["model_rows"] == parts.counts["model_rows"] == 2 * 8 * 6
    assert parts.counts["model_calls"] == 6 * 6 and parts.counts["reward_calls"] == 3 * 3
    assert "forward" not in vars(pipe.unet) and "decode" not in vars(pipe.vae)


def test_chunks_on_families_with_more_conditioning() -> None:
    for name in ("sdxl", "sd3", "flux"):
        pipe = family(name)
        whole, parts = (
            steer(pipe, name=name, kernel="ddim"),
            steer(pipe, name=name, kernel="ddim", model_batch_size=3),
        )
        torch.testing.assert_close(whole.latents, parts.latents, rtol=1e-3, atol=1e-3)
        assert torch.equal(whole.ancestors, parts.ancestors)


# Decoding and rewards


def test_a_tiny_decoder_inside_and_the_real_one_at_the_end() -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    pipe = family("sd")
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    plain, with_tiny = (
        steer(pipe, resample_steps=(), call={"eta": 1.0}),
        steer(pipe, resample_steps=(), decoder=tiny, call={"eta": 1.0}),
    )
    assert np.array_equal(stacked(plain), stacked(with_tiny))
    result = steer(pipe, decoder=tiny, call={"eta": 1.0})
    assert result.counts["decodes"] == 16
    assert not torch.equal(result.steps[0].rewards, steer(pipe, call={"eta": 1.0}).steps[0].rewards)
    torch.testing.assert_close(
        result.rewards.flatten(), brightness([i for row in result.images for i in row], None)
    )


def test_intermediate_images_are_those_of_the_vae() -> None:
    """At the last step of a run without fresh noise x0hat is the returned sample, and
    so is its image."""
    pipe = family("sd")
    seen: list[Image.Image] = []

    def watch(images, prompts):
        seen.extend(images)
        return torch.zeros(len(images))

    steer(pipe, PROMPTS[:1], scorer=watch, mode="prune", resample_steps=(5,), num_particles=2)
    first, last = seen[:2], seen[2:]
    for a, b in zip(first, last, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean() < 3


def test_intermediate_reward_and_custom_prediction() -> None:
    pipe = family("sd")
    shapes = []

    def value(x0, prompts):
        shapes.append((tuple(x0.shape), prompts))
        return x0.flatten(1).mean(1)

    result = steer(
        pipe,
        intermediate_reward=value,
        call={"eta": 1.0},
        predict_x0=lambda s, out, t, y: torch.zeros_like(y),
    )
    assert shapes[0] == ((8, 4, 16, 16), [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4)
    assert result.counts["decodes"] == 0 and result.steps[0].thumbnails is None
    assert result.steps[0].rewards.abs().max() == 0


def test_scorers_of_the_registry_and_metadata() -> None:
    from diffalign import load_scorer

    pipe = family("sd")
    by_name = steer(pipe, scorer="shapes", lmbda=1.0, call={"eta": 1.0})
    given = steer(pipe, scorer=load_scorer("shapes"), lmbda=1.0, call={"eta": 1.0})
    assert torch.equal(by_name.rewards, given.rewards)
    rows = []

    def scorer(images, prompts, metadata):
        rows.append(list(metadata))
        return torch.zeros(len(images))

    steer(pipe, scorer=scorer, call={"eta": 1.0, "metadata": [{"tag": 1}, {"tag": 2}]})
    assert rows[0] == [{"tag": 1}] * 4 + [{"tag": 2}] * 4


def test_output_types_are_scored_as_images() -> None:
    pipe = family("sd")
    results = [steer(pipe, call={"eta": 1.0, "output_type": kind}) for kind in ("pil", "np", "pt")]
    assert torch.equal(results[0].rewards, results[1].rewards) and torch.equal(
        results[0].rewards, results[2].rewards
    )
    assert isinstance(results[1].images[0][0], np.ndarray) and isinstance(
        results[2].images[0][0], torch.Tensor
    )


def test_other_tasks_with_one_step_per_iteration_are_steered() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = quiet(
        StableDiffusionImg2ImgPipeline(
            **build_pipeline("sd").components, requires_safety_checker=False
        )
    )
    result = FKSteering(
        pipe, brightness, num_particles=4, lmbda=0.5, resample_steps=(0, 2), ess_threshold=1.0
    )(
        PROMPTS[0],
        image=Image.new("RGB", (32, 32), "gray"),
        strength=0.5,
        num_inference_steps=6,
        eta=1.0,
        seed=0,
    )
    assert [step.index for step in result.steps] == [0, 2]
    with pytest.raises(ConfigError, match="3 lies outside the run of 3 steps"):
        FKSteering(pipe, brightness, lmbda=0.5, resample_steps=(3,))(
            PROMPTS[0],
            image=Image.new("RGB", (32, 32)),
            strength=0.5,
            num_inference_steps=6,
            eta=1.0,
        )


def test_a_pipeline_of_its_own_without_num_images_per_prompt() -> None:
    class Plain:
        def __init__(self) -> None:
            self.inner = family("sd")
            self.scheduler, self.vae, self.image_processor = (
                self.inner.scheduler,
                self.inner.vae,
                self.inner.image_processor,
            )

        def __call__(self, prompt, negative_prompt=None, **options):
            self.seen = (list(prompt), negative_prompt)
            return self.inner(prompt, negative_prompt=negative_prompt, **options)

    pipe = Plain()
    result = FKSteering(pipe, brightness, num_particles=2, lmbda=1.0, resample_steps=(1,))(
        PROMPTS, negative_prompt=["x", "y"], num_inference_steps=3, eta=1.0, height=32, width=32
    )
    assert pipe.seen == ([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, ["x", "x", "y", "y"])
    assert len(result.images) == 2


# The result


def test_result_selection_and_trace() -> None:
    pipe = family("sd")
    result = steer(pipe, call={"eta": 1.0})
    assert [np.asarray(image).mean() for image in result.best] == pytest.approx(
        result.rewards.max(1).values.tolist()
    )
    assert result.ess.shape == (3, 2) and result.ancestors.shape == (2, 2, 4)
    generator, names = gen(1), [image.tobytes() for image in result.images[0]]
    picks = [result.draw(generator)[0].tobytes() for _ in range(1500)]
    for name, weight in zip(names, result.weights[0].tolist(), strict=True):
        assert (
            abs(picks.count(name) / 1500 - weight)
            < 4 * (weight * (1 - weight) / 1500) ** 0.5 + 1e-12
        )
    again = result.resample(gen(1))
    assert len(again[0]) == 4 and {i.tobytes() for i in again[0]} <= set(names)
    assert result.draw([gen(1), gen(2)])[0].size == (32, 32)
    assert set(result.counts) == {
        "model_rows",
        "model_calls",
        "decodes",
        "reward_calls",
        "scored_images",
    }
    assert 0 <= result.seconds["decode"] + result.seconds["reward"] <= result.seconds["total"]
    assert len(result.steps[0].thumbnails[1]) == 4


@pytest.mark.filterwarnings("default")
def test_collapse_is_said() -> None:
    with pytest.warns(
        UserWarning, match="2 of 2 prompts: all particles descend from one initial noise"
    ):
        result = steer(family("sd"), lmbda=500.0, call={"eta": 1.0})
    assert any(
        "effective sample size fell under 1.5 of 4" in sentence for sentence in result.warnings
    )
    assert result.num_roots.tolist() == [1, 1]


def test_the_signature_of_step_is_kept_during_the_call() -> None:
    pipe = family("sd")
    plain = inspect.signature(pipe.scheduler.step)
    seen = []

    def look(images, prompts):
        seen.append(inspect.signature(pipe.scheduler.step))
        return torch.zeros(len(images))

    steer(pipe, scorer=look, call={"eta": 1.0})
    assert set(map(str, seen)) == {str(plain)}


def test_arguments_as_numpy_and_diffusers_write_them() -> None:
    """A negative prompt as one text, seeds as a range, steps as an array."""
    pipe = family("sd")
    texts = ["a cat", "a dog"]
    steering = FKSteering(
        pipe, zeros, num_particles=2, lmbda=1.0, kernel="ddim",
        resample_steps=np.linspace(0.2, 0.8, 3),
    )  # fmt: skip
    result = steering(texts, seed=range(2), negative_prompt="blurry", num_inference_steps=4)
    again = steering(texts, seed=[0, 1], negative_prompt=["blurry"] * 2, num_inference_steps=4)
    assert torch.equal(result.latents, again.latents)


def test_an_eta_that_nothing_reads_is_refused() -> None:
    pipe = with_scheduler(family("sd"), "EulerAncestralDiscreteScheduler")
    steering = FKSteering(pipe, zeros, num_particles=2, lmbda=1.0, kernel="auto", eta=0.5)
    with pytest.raises(ConfigError, match="eta: EulerAncestralDiscreteScheduler adds its own"):
        steering(["a cat"], seed=0, num_inference_steps=4)


@pytest.mark.parametrize("steps", [8, 20])
def test_noise_in_a_part_of_the_grid_is_noticed(steps: int) -> None:
    """SA-Solver adds noise between timesteps 200 and 800."""
    pipe = with_scheduler(family("sd"), "SASolverScheduler")
    auto = FKSteering(pipe, zeros, num_particles=2, lmbda=1.0, kernel="auto")
    assert auto(["a cat"], seed=0, num_inference_steps=steps).kernel is None
    prune = FKSteering(pipe, zeros, num_particles=2, lmbda=1.0, mode="prune")
    with pytest.raises(UserError, match="SASolverScheduler adds noise"):
        prune(["a cat"], seed=0, num_inference_steps=steps)
