"""Every family's file does what the family's own pipeline does."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build_pipeline, lora_config, make_trainer
from tiny_families import TRANSFORMERS, size_of

from diffalign import FKSteering
from diffalign.backbones import load_backbone
from diffalign.backbones.conditions import joined, split_rows, stack_rows
from diffalign.backbones.packing import packed, unpacked
from diffalign.errors import ConfigError, UserError
from diffalign.generation.sampling import call_arguments
from diffalign.steering.decoding import LatentDecoder
from diffalign.training.online.rollout import Rollout, SamplerConfig, sampling_mode

PROMPTS = ["a small red circle on the left of a gray background", "a cat"]
every_family = pytest.mark.parametrize("family", ["sd3", *TRANSFORMERS])


def plain(
    pipe: Any,
    family: str,
    scale: float | None = None,
    prompts: Sequence[str] = PROMPTS,
    **options: Any,
) -> Any:
    """Arguments of the pipeline's call for a few steps at the family's tiny size."""
    settings: dict[str, Any] = {
        "prompt": list(prompts), "height": size_of(family), "width": size_of(family),
        "num_inference_steps": 3,
    }  # fmt: skip
    if scale is not None:
        settings["guidance_scale"] = scale
    settings = load_backbone(pipe).call_arguments(settings)
    return pipe(**settings, **options)


class Calls:
    """Records the arguments and outputs of a network, by the names of its forward."""

    def __init__(self, network: Any) -> None:
        self.arguments: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.signature = inspect.signature(network.forward)
        self.hook = network.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.arguments.append(dict(bound.arguments))
        self.outputs.append(output[0])


def equal(first: Any, second: Any) -> bool:
    """Whether two arguments are the same, tensors by their values."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape:
            return False
        return torch.allclose(first.double(), second.double(), rtol=1e-6, atol=1e-6)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


IGNORED = {"joint_attention_kwargs", "attention_kwargs", "kv_cache", "kv_cache_mode"}
"""Empty dictionaries, and a cache that does not change the output."""


@every_family
def test_the_network_gets_the_arguments_of_the_pipeline(family: str) -> None:
    """One step of the family's pipeline, repeated by `predict`."""
    pipe = build_pipeline(family)
    cached = {"use_kv_cache": False} if family == "qwen-image-21" else {}
    # Qwen-Image 2.1's pipeline pads prompts, which moves the image: one at a time here.
    prompts = PROMPTS[:1] if family == "qwen-image-21" else PROMPTS
    calls, stepped = Calls(pipe.transformer), []
    step = pipe.scheduler.step

    def recorded(output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        stepped.append((output.clone(), timestep, sample.clone()))
        return step(output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = recorded
    with torch.no_grad():
        plain(pipe, family, 0.0, prompts, output_type="latent", generator=_generator(), **cached)
    calls.hook.remove()
    theirs, (output, timestep, sample) = calls.arguments[1], stepped[1]

    backbone = load_backbone(build_pipeline(family))
    if backbone.guidance != 1.0:
        backbone.guidance = 0.0
    network = backbone.load_network(torch.float32)
    side = size_of(family)
    noisy = backbone.unpacked(pipe, sample, side, side).reshape(
        len(prompts), *backbone.latent_shape(side, side)
    )
    times = torch.as_tensor(timestep).expand(len(prompts))
    if backbone.schedule.prediction_type == "flow_matching":
        times = backbone.schedule.model_times(times.double() / 1000)
    ours = Calls(network)
    with torch.no_grad():
        prediction = backbone.predict(network, noisy, times, backbone.encode_prompts(prompts))
    for name, value in ours.arguments[0].items():
        if name not in IGNORED:
            assert equal(value, theirs[name]), name
    expected = backbone.unpacked(pipe, output, side, side).reshape(noisy.shape)
    torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)


def stepped_latents(pipe: Any) -> list[torch.Tensor]:
    """A list that receives the latents after every step of the pipeline's scheduler."""
    latents: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents.append(result[0])
        return result

    pipe.scheduler.step = recorded
    return latents


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@every_family
def test_decoding_is_the_pipelines(family: str) -> None:
    pipe = build_pipeline(family)
    backbone = load_backbone(build_pipeline(family))
    side = size_of(family)
    finals = stepped_latents(pipe)
    with torch.no_grad():
        images = plain(pipe, family, 0.0, output_type="pt", generator=_generator()).images
        latents = backbone.unpacked(pipe, finals[-1], side, side)
        latents = latents.reshape(-1, *backbone.latent_shape(side, side))
        pixels = backbone.pixels(backbone.component("vae"), latents)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), images[:, :3], rtol=1e-5, atol=1e-5)


@every_family
def test_encoding_is_undone_by_decoding_up_to_the_autoencoder(family: str) -> None:
    """`pixels` of the encoded mean is the autoencoder's own reconstruction."""
    backbone = load_backbone(build_pipeline(family))
    vae, side = backbone.component("vae"), size_of(family)
    images = torch.rand(2, 3, side, side, generator=_generator()) * 2 - 1
    mean, std = backbone.encode_images(images)
    given = torch.cat([images, torch.ones(2, 1, side, side)], 1) if "21" in family else images
    if family.startswith("qwen"):
        given = given.unsqueeze(2)
    with torch.no_grad():
        encoded = vae.encode(given)
        has_posterior = hasattr(encoded, "latent_dist")
        raw = encoded.latent_dist.mean if has_posterior else encoded.latent
        expected = vae.decode(raw, return_dict=False)[0]
        if family.startswith("qwen"):
            expected = expected[:, :3, 0]
        torch.testing.assert_close(backbone.pixels(vae, mean), expected, rtol=1e-4, atol=1e-4)
    assert bool((std > 0).all()) == has_posterior
    backbone.images_at_once = lambda height, width: 1  # type: ignore[method-assign]
    alone = backbone.encode_images(images)
    torch.testing.assert_close(torch.stack(alone), torch.stack([mean, std]), rtol=1e-4, atol=1e-4)
    assert len(backbone.decode_latents(mean)) == 2


@every_family
def test_rows_of_a_batch_are_rows_alone(family: str) -> None:
    backbone = load_backbone(build_pipeline(family))
    network, side = backbone.load_network(torch.float32), size_of(family)
    flow = backbone.schedule.prediction_type == "flow_matching"
    times = torch.tensor([0.2, 0.8], dtype=torch.float64) if flow else torch.tensor([200, 800])
    times = backbone.schedule.model_times(times)
    noisy = torch.randn(2, *backbone.latent_shape(side, side), generator=_generator())
    condition = backbone.encode_prompts(PROMPTS)
    rows = split_rows(condition, backbone.ragged)
    with torch.no_grad():
        both = backbone.predict(network, noisy, times, condition)
        for i in range(2):
            alone = backbone.predict(
                network, noisy[i : i + 1], times[i : i + 1], stack_rows([rows[i]], backbone.ragged)
            )
            torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=2e-5)
            encoded = backbone.encode_prompts(PROMPTS[i : i + 1])
            for name, value in split_rows(encoded, backbone.ragged)[0].items():
                torch.testing.assert_close(value, rows[i][name], rtol=1e-4, atol=1e-5)


@every_family
def test_a_lora_loads_into_the_plain_pipeline(family: str, tmp_path: Path) -> None:
    """Trained, written, loaded by diffusers: the same predictions as while training."""

    def trainer_of(folder: Path) -> Any:
        return make_trainer(
            folder, family, peft_config=lora_config(), max_steps=2, learning_rate=1e-2,
            data={"resolution": size_of(family)},
        )  # fmt: skip

    if family == "pixart":
        with pytest.raises(UserError, match="lora: diffusers cannot load a LoRA into a PixArt"):
            trainer_of(tmp_path)
        return
    trainer = trainer_of(tmp_path)
    trainer.train()
    pipe = build_pipeline(family)
    calls = Calls(pipe.transformer)
    with torch.no_grad():
        before = plain(pipe, family, 0.0, output_type="latent", generator=_generator()).images
        calls.hook.remove()
        pipe.load_lora_weights(str(tmp_path))
        calls = Calls(pipe.transformer)
        after = plain(pipe, family, 0.0, output_type="latent", generator=_generator()).images
        calls.hook.remove()
        arguments = calls.arguments[0]
        arguments = {k: v for k, v in arguments.items() if not k.startswith("kv_cache")}
        trainer.network.eval()
        trained = trainer.network(**arguments)[0]
    assert not torch.allclose(before, after, atol=1e-4)
    for found, expected in zip(trained, calls.outputs[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_default_lora_targets_are_these_modules(family: str) -> None:
    """A frozen list: a diffusers that renames a layer must fail here."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    backbone = load_backbone(build_pipeline(family))
    if not backbone.supports_lora:
        pytest.skip("the family has no LoRA")
    network = backbone.load_network(torch.float32)
    inject_adapter_in_model(lora_config(target_modules=backbone.lora_targets), network)
    names = [name for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    file = Path(__file__).with_name("lora_targets.json")
    assert names == json.loads(file.read_text())[family]


@every_family
def test_a_rollout_is_what_the_pipeline_draws(family: str, tmp_path: Path) -> None:
    """With the family's guidance, on the family's own grid."""
    scale = 2.5
    trainer = make_trainer(
        tmp_path, family, "d3po", num_inference_steps=3, rows=[{"prompt": p} for p in PROMPTS],
        eta=0.5, guidance_scale=scale, per_device_train_batch_size=2,
        data={"resolution": size_of(family)},
    )  # fmt: skip
    trainer.setup()
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    rollout = Rollout(
        trainer.backbone, trainer.schedule, SamplerConfig(3, scale, 0.0, 8, shared_init=False),
        grid=trainer.make_grid(3, 0.0),
    )  # fmt: skip
    with sampling_mode(trainer.network):
        drawn = rollout(
            trainer.sampling_policy.predict, batch, 1,
            trainer.data_pipeline.builder.unconditional(batch.condition),
            decode=False, progress=False,
        )  # fmt: skip
    pipe, side = build_pipeline(family), size_of(family)
    start = drawn.states[:, 0, 0]
    if family.startswith(("flux-", "chroma", "qwen-image")) or family == "flux":
        start = packed(start, 1 if family == "qwen-image-21" else 2)
    finals = stepped_latents(pipe)
    for i, prompt in enumerate(batch.prompts):
        with torch.no_grad():
            plain(pipe, family, scale, [prompt], output_type="latent", latents=start[i : i + 1])
        expected = trainer.backbone.unpacked(pipe, finals[-1], side, side)
        found = drawn.final[i]
        torch.testing.assert_close(
            found, expected.reshape(found.shape), rtol=1e-3, atol=1e-4 * float(found.abs().max())
        )


def brightness(images: Any, prompts: Any) -> list[float]:
    """The mean of an image's pixels."""
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


def steering_settings(pipe: Any, family: str) -> dict[str, Any]:
    settings = {"height": size_of(family), "width": size_of(family), "num_inference_steps": 3}
    return {"guidance_scale": 2.0, **settings}


@every_family
def test_one_steered_particle_is_the_pipelines_image(family: str) -> None:
    pipe = build_pipeline(family)
    settings = steering_settings(pipe, family)
    call = call_arguments(pipe, PROMPTS[:1], settings)
    drawn = pipe(generator=_generator(), output_type="np", **call).images
    steering = FKSteering(pipe, brightness, lmbda=1.0, num_particles=1, kernel=None)
    result = steering(PROMPTS[0], generator=_generator(), output_type="np", **settings)
    assert np.array_equal(np.asarray(result.images[0][0]), drawn[0])


@every_family
def test_particles_are_scored_and_resampled(family: str) -> None:
    """The images of the steps are decoded as the family's pipeline decodes."""
    pipe = build_pipeline(family)
    steering = FKSteering(
        pipe, brightness, lmbda=5.0, num_particles=3, kernel="ddim", resample_steps=[0, 1],
        model_batch_size=2,
    )  # fmt: skip
    settings = steering_settings(pipe, family)
    if family == "qwen-image-21":
        with pytest.raises(UserError, match="model_batch_size: .* pass use_kv_cache=False"):
            steering(PROMPTS[0], seed=7, **settings)
        settings["use_kv_cache"] = False
    result = steering(PROMPTS[0], seed=7, **settings)
    assert len(result.images[0]) == 3 and len(result.steps) == 2
    side = size_of(family)
    for image in result.images[0]:
        assert image.size == (side, side)


def test_flux2_dev_gets_its_guidance_as_an_input() -> None:
    """Its text encoder needs files of the checkpoint, so encoded prompts are given."""
    import diffusers

    klein = build_pipeline("flux2-klein")
    config = {**klein.transformer.config, "guidance_embeds": True}
    transformer = diffusers.Flux2Transformer2DModel.from_config(config)
    pipe = diffusers.Flux2Pipeline(klein.scheduler, klein.vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 512, 24, generator=_generator())
    calls = Calls(transformer)
    with torch.no_grad():
        pipe(
            prompt_embeds=embeds, height=32, width=32, num_inference_steps=2, guidance_scale=2.5,
            output_type="latent", generator=_generator(),
        )  # fmt: skip
    calls.hook.remove()
    backbone = load_backbone(pipe)
    assert backbone.guidance == 4.0 and backbone.few_steps is None
    backbone.guidance = 2.5
    theirs = calls.arguments[0]
    noisy = theirs["hidden_states"].transpose(1, 2).unflatten(2, (8, 8))
    ours = Calls(transformer)
    with torch.no_grad():
        backbone.predict(transformer, noisy, theirs["timestep"] * 1000, {"prompt_embeds": embeds})
    for name, value in ours.arguments[0].items():
        if name not in IGNORED:
            assert equal(value, theirs[name]), name
    assert ours.arguments[0]["guidance"].tolist() == [2.5, 2.5]


def test_packing_is_that_of_flux() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8, generator=_generator())
    assert torch.equal(packed(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpacked(packed(latents), 6, 8), latents)


def test_rows_are_taken_apart_and_put_together() -> None:
    rows = [
        {"a": torch.ones(3, 2), "b": torch.ones(1)},
        {"a": 2 * torch.ones(1, 2), "b": torch.zeros(1)},
    ]
    both = stack_rows(rows, ("a",))
    assert both["prompt_mask"].tolist() == [[True] * 3, [True, False, False]]
    again = split_rows(both, ("a",))
    assert all(torch.equal(again[i][n], rows[i][n]) for i in range(2) for n in "ab")
    short = stack_rows(rows[1:], ("a",))
    long = joined(short, both)
    assert long["a"].shape == (3, 3, 2) and long["prompt_mask"][0].tolist() == [True, False, False]


def test_files_of_a_model_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step asks for configs, and must not reach the disk or the Hub."""
    build_pipeline("qwen-image").save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    sizes = backbone.vae_scale, backbone.embeds_guidance, backbone.lora_targets

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read again")

    for name in ("AutoencoderKLQwenImage", "QwenImageTransformer2DModel"):
        monkeypatch.setattr(f"diffusers.{name}.load_config", refused)
    assert (backbone.vae_scale, backbone.embeds_guidance, backbone.lora_targets) == sizes


@pytest.mark.parametrize("family", ["qwen-image-21", "z-image"])
def test_steering_knows_the_size_that_a_pipeline_does_not_name(family: str) -> None:
    decoder = LatentDecoder(build_pipeline(family), None, 1)
    assert decoder._size() == (1024, 1024)


def test_a_unet_that_takes_guidance_as_an_input_is_refused() -> None:
    pipe = build_pipeline("sd")
    config = {name: v for name, v in pipe.unet.config.items() if not name.startswith("_")}
    pipe.register_modules(unet=type(pipe.unet).from_config(config | {"time_cond_proj_dim": 8}))
    with pytest.raises(ConfigError, match="model: .* is distilled with guidance as an input"):
        load_backbone(pipe)
