"""Every way of drawing x every kind of weights x every kind of guidance x micro-batches
equals one loop by hand, or is refused.

The loop by hand runs separate networks whose weights are fused, one image at a time,
and combines their outputs as the papers and the pipelines say. The combinations are
generated; the default tests run a sample of them, the nightly ones all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiers import by_default
from tiny import build_pipeline, make_trainer

from diffalign import FKSteering, NegativeGuidance
from diffalign.backbones.lora import load_lora, strip_adapters
from diffalign.demo.engine import Engine
from diffalign.errors import UserError
from diffalign.evaluation.models import ModelSpec, opened
from diffalign.generation.merge import merge_loras
from diffalign.generation.sampling import generate
from diffalign.training.build import trainable_parameters
from diffalign.training.online.rollout import Rollout, SamplerConfig, sampling_mode

FAMILIES = ("sd", "sd_v", "sdxl", "sd3")
WAYS = ("plain", "steering", "rollout", "validation", "compare", "demo")
WEIGHTS = ("base", "lora", "two", "dora", "merged", "full")
GUIDANCE = (
    "none",
    "plain",
    "negative",
    "half negative",
    "rescale",
    "negative rescale",
    "skip",
    "negative skip",
)
SIZES = (None, 1, 2, 3, 4)
PROMPTS = ("a small red circle", "a large blue star on the left", "three squares")
SEEDS = (3, 11, 5)
STEPS = 3


@dataclass(frozen=True)
class Case:
    family: str
    way: str
    weights: str
    guidance: str
    size: int | None

    def __str__(self) -> str:
        return "-".join(
            str(part).replace(" ", "_")
            for part in (self.family, self.way, self.weights, self.guidance, self.size)
        )


def offered(case: Case) -> bool:
    """Whether the package and the pipeline have this combination at all."""
    if "skip" in case.guidance and case.family != "sd3":
        return False  # an argument of SD3's pipeline
    if "rescale" in case.guidance and (case.family == "sd3" or case.way == "demo"):
        return False  # not of SD3's; a visitor of the demo cannot ask for it
    if "skip" in case.guidance and case.way == "demo":
        return False
    if case.way in ("validation", "rollout") and (
        "negative" in case.guidance or case.weights in ("two", "merged")
    ):
        return False  # a run draws with its own weights
    if case.way == "rollout" and case.guidance not in ("none", "plain"):
        return False
    return case.way != "demo" or case.size is None


CASES = [
    case
    for case in itertools.starmap(Case, itertools.product(FAMILIES, WAYS, WEIGHTS, GUIDANCE, SIZES))
    if offered(case)
]
SAMPLE = random.Random(0).sample(CASES, 48)


def news() -> list[Case]:
    """The cases of the sample that hold a value which none before them has."""
    seen: set[tuple[str, Any]] = set()
    found = []
    for case in SAMPLE:
        values = set(vars(case).items())
        if not values <= seen:
            found.append(case)
        seen |= values
    return found


NEWS = news()


# Weights ------------------------------------------------------------------------------


def network_name(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def network_of(pipe: Any) -> Any:
    return getattr(pipe, network_name(pipe))


def shaken(network: Any, seed: int) -> Any:
    """Other weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def write_lora(family: str, folder: Path, seed: int, **options: Any) -> Path:
    pipe = build_pipeline(family)
    network = network_of(pipe)
    torch.manual_seed(seed)
    config = {
        "r": 4,
        "lora_alpha": 6,
        "init_lora_weights": False,
        "target_modules": ["to_q", "to_v"],
        **options,
    }
    network.add_adapter(LoraConfig(**config))
    for name, parameter in network.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    layers = get_peft_model_state_dict(network)
    name = network_name(pipe)
    type(pipe).save_lora_weights(
        folder, **{f"{name}_lora_layers": layers}, **_collate_lora_metadata({name: network})
    )
    return folder


class Files:
    """LoRAs of a family, written once."""

    def __init__(self, root: Path) -> None:
        self.root, self.known = root, {}

    def __call__(self, family: str, kind: str) -> Path:
        folder = self.root / family / kind
        if (family, kind) not in self.known:
            if kind == "merged":
                base = self.root / family / "base"
                build_pipeline(family).save_pretrained(base)
                merge_loras(
                    str(base),
                    [str(self(family, "one")), str(self(family, "other"))],
                    [0.7, 0.4],
                    folder,
                )
            else:
                options = {
                    "one": {},
                    "other": {
                        "r": 2,
                        "lora_alpha": 8,
                        "use_rslora": True,
                        "target_modules": ["to_k", "to_q"],
                    },
                    "dora": {"use_dora": True},
                    "negative": {"r": 3, "alpha_pattern": {"to_q": 9}},
                }[kind]
                write_lora(family, folder, len(kind), **options)
            self.known[family, kind] = folder
        return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("loras"))


def loras(case: Case, files: Files) -> list[tuple[Path, float]]:
    """The LoRAs of a case's weights, and their scales."""
    kinds = {
        "lora": [("one", 0.8)],
        "two": [("one", 0.7), ("other", 0.4)],
        "dora": [("dora", 1.0)],
        "merged": [("merged", 1.0)],
    }
    return [(files(case.family, kind), scale) for kind, scale in kinds.get(case.weights, [])]


def fused(family: str, parts: list[tuple[Path, float]]) -> Any:
    """A network of its own with the LoRAs in its weights."""
    pipe = build_pipeline(family)
    for number, (folder, _) in enumerate(parts):
        pipe.load_lora_weights(str(folder), adapter_name=f"a{number}")
    if parts:
        pipe.set_adapters(
            [f"a{number}" for number in range(len(parts))], [scale for _, scale in parts]
        )
        pipe.fuse_lora()
    return strip_adapters(network_of(pipe)).eval()


def networks(case: Case, files: Files) -> tuple[Any, Any]:
    """(positive, negative) networks for the loop by hand."""
    if case.weights == "full":
        positive = shaken(network_of(build_pipeline(case.family)), 1)
    else:
        positive = fused(case.family, loras(case, files))
    if "negative" not in case.guidance:
        return positive, positive
    base = network_of(build_pipeline(case.family))
    npo = (
        shaken(network_of(build_pipeline(case.family)), 2)
        if case.weights == "full"
        else fused(case.family, [(files(case.family, "negative"), 1.0)])
    )
    alpha, beta = shares(case)
    negative = network_of(build_pipeline(case.family))
    states = [network.state_dict() for network in (base, positive, npo)]
    negative.load_state_dict(
        {
            n: w + alpha * (states[1][n] - w) + beta * (states[2][n] - w)
            for n, w in states[0].items()
        }
    )
    return positive, negative.eval()


def shares(case: Case) -> tuple[float, float]:
    return (0.5, 0.8) if "half" in case.guidance else (1.0, 1.0)


# The loop by hand ---------------------------------------------------------------------


def settings(case: Case) -> dict[str, Any]:
    """Of the pipeline's call."""
    values: dict[str, Any] = {
        "guidance_scale": 1.0 if case.guidance == "none" else 5.0,
        "num_inference_steps": STEPS,
    }
    values |= {"height": 32, "width": 32}
    if "rescale" in case.guidance:
        values["guidance_rescale"] = 0.7
    if "skip" in case.guidance:
        values |= {
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 1.0,
        }
    return values


def encoded(family: str, pipe: Any, prompt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(positive, negative) arguments of the network."""
    if family in ("sd", "sd_v"):
        positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
        return {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}
    if family == "sdxl":
        positive, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=True
        )
        ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, pooled.shape[-1])
        both = ((positive, pooled), (negative, negative_pooled))
        return tuple(
            {"encoder_hidden_states": e, "added_cond_kwargs": {"text_embeds": p, "time_ids": ids}}
            for e, p in both
        )  # type: ignore[return-value]
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt, prompt, prompt, device="cpu"
    )
    return (
        {"encoder_hidden_states": positive, "pooled_projections": pooled},
        {"encoder_hidden_states": negative, "pooled_projections": negative_pooled},
    )


def start(seed: int) -> torch.Tensor:
    """The initial noise (1, C, h, w) of an image."""
    return torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(
    case: Case, positive: Any, negative: Any, prompt: str, latents: torch.Tensor
) -> torch.Tensor:
    """The latents (1, C, h, w) of one image from its initial noise."""
    pipe, values = build_pipeline(case.family), settings(case)
    cond, uncond = encoded(case.family, pipe, prompt)
    pipe.scheduler.set_timesteps(STEPS)

    def run(
        network: Any, t: torch.Tensor, condition: Mapping[str, Any], **more: Any
    ) -> torch.Tensor:
        if case.family == "sd3":
            return network(
                hidden_states=latents, timestep=t.expand(1), return_dict=False, **condition, **more
            )[0]
        return network(
            pipe.scheduler.scale_model_input(latents, t), t, return_dict=False, **condition
        )[0]

    scale = values["guidance_scale"]
    for number, t in enumerate(pipe.scheduler.timesteps):
        text = run(positive, t, cond)
        output = text
        if scale > 1:
            empty = run(negative, t, uncond)
            output = empty + scale * (text - empty)
            if "skip" in case.guidance and 0 < number < STEPS:
                output = output + (text - run(positive, t, cond, skip_layers=[1])) * 2.8
            if "rescale" in case.guidance:
                axes = tuple(range(1, text.ndim))
                matched = output * (text.std(axes, keepdim=True) / output.std(axes, keepdim=True))
                output = 0.7 * matched + 0.3 * output
        latents = pipe.scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def decoded(family: str, latents: torch.Tensor) -> list[Any]:
    pipe = build_pipeline(family)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        pixels = pipe.vae.decode(
            latents / pipe.vae.config.scaling_factor + shift, return_dict=False
        )[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


# The package --------------------------------------------------------------------------


def guided_pipe(case: Case, files: Files) -> tuple[Any, NegativeGuidance | None]:
    """The pipeline with the case's weights on it, and its guidance."""
    pipe = build_pipeline(case.family)
    pipe.set_progress_bar_config(disable=True)
    if case.weights == "full":
        shaken(network_of(pipe), 1)
    for number, (folder, _) in enumerate(loras(case, files)):
        load_lora(pipe, folder, f"own{number}", "test")
    if loras(case, files):
        pipe.set_adapters(
            [f"own{n}" for n in range(len(loras(case, files)))],
            [scale for _, scale in loras(case, files)],
        )
    if "negative" not in case.guidance:
        return pipe, None
    alpha, beta = shares(case)
    if case.weights == "full":
        base = network_of(build_pipeline(case.family))
        # theta + alpha (theta_pos - theta) + beta (theta_npo - theta): the base is the
        # pipeline's, the positive one is given.
        pipe = build_pipeline(case.family)
        pipe.set_progress_bar_config(disable=True)
        positive, npo = shaken(network_of(build_pipeline(case.family)), 1), shaken(base, 2)
        return pipe, NegativeGuidance(pipe, positive=positive, negative=npo, alpha=alpha, beta=beta)
    return pipe, NegativeGuidance(
        pipe, negative=files(case.family, "negative"), alpha=alpha, beta=beta
    )


def through_the_package(case: Case, files: Files) -> Any:
    """Latents (3, C, h, w) where the way gives them, else PIL images."""
    if case.way == "plain":
        pipe, guidance = guided_pipe(case, files)
        size = case.size or len(SEEDS)
        parts = []
        for start in range(0, len(SEEDS), size):
            generators = [
                torch.Generator().manual_seed(seed) for seed in SEEDS[start : start + size]
            ]
            call = guidance or pipe
            parts.append(
                call(
                    list(PROMPTS[start : start + size]),
                    generator=generators,
                    output_type="latent",
                    **settings(case),
                ).images
            )
        return torch.cat(parts)
    if case.way == "steering":
        pipe, guidance = guided_pipe(case, files)
        steering = FKSteering(
            pipe,
            brightness,
            num_particles=3,
            resample_steps=(),
            lmbda=1.0,
            model_batch_size=case.size,
            kernel=None,
        )
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        if guidance is None:
            return steering(PROMPTS[0], generator=generators, **settings(case)).latents.flatten(
                0, 1
            )
        with guidance:
            return steering(PROMPTS[0], generator=generators, **settings(case)).latents.flatten(
                0, 1
            )
    spec = model_spec(case, files)
    if case.way == "compare":
        with opened(spec) as draw:
            size = case.size or len(SEEDS)
            images = []
            for start in range(0, len(SEEDS), size):
                images += draw(
                    PROMPTS[start : start + size], SEEDS[start : start + size], **settings(case)
                )
            return images
    engine = Engine([spec])
    values = settings(case)
    images = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        request = engine.read(prompt, seed, values["num_inference_steps"], values["guidance_scale"])
        request.settings.update(height=32, width=32)
        images.append(engine.draw(spec.name, request))
    return images


def brightness(images: Any, prompts: Any) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def model_spec(case: Case, files: Files) -> ModelSpec:
    """The model as compare and the demo take it."""
    pipe = build_pipeline(case.family)
    pipe.set_progress_bar_config(disable=True)
    alpha, beta = shares(case)
    given: dict[str, Any] = {"name": "m", "model": pipe}
    parts = loras(case, files)
    for number, (folder, _) in enumerate(
        parts[:-1]
    ):  # a pipeline that carries LoRAs already, and one more
        load_lora(pipe, folder, f"own{number}", "test")
        pipe.set_adapters([f"own{number}"], [parts[number][1]])
    if parts:
        given |= {"lora": str(parts[-1][0]), "lora_scale": parts[-1][1]}
    if "negative" in case.guidance:
        given |= {"negative": str(files(case.family, "negative")), "alpha": alpha, "beta": beta}
    if case.weights == "full":
        shaken(network_of(pipe), 1)
        if "negative" in case.guidance:
            # Compare's negative pipeline meets the pipeline's own weights: the base is
            # the positive model itself.
            folder = files.root / case.family / "npo"
            other = build_pipeline(case.family)
            shaken(network_of(other), 2)
            other.save_pretrained(folder)
            given["negative"] = str(folder)
    return ModelSpec(**given)


def trained(case: Case, folder: Path) -> tuple[Any, Any]:
    """A run whose weights have moved, and its network with the adapter in its weights,
    read back from the saved run."""
    options = {"lora": {}, "dora": {"use_dora": True}}.get(case.weights)
    config = (
        None
        if options is None
        else LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], **options)
    )
    trainer = make_trainer(
        folder,
        case.family,
        "d3po",
        peft_config=config,
        num_inference_steps=STEPS,
        rows=[{"prompt": prompt} for prompt in PROMPTS],
        per_device_train_batch_size=len(PROMPTS),
    )
    trainer.setup()
    if case.weights != "base":
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in trainable_parameters(trainer.network):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    saved = folder / "saved"
    trainer.save_model(str(saved))
    if config is not None:
        return trainer, fused(case.family, [(saved, 1.0)])
    network = network_of(build_pipeline(case.family))
    network.load_state_dict(trainer.network.state_dict())
    return trainer, network.eval()


def check_run(case: Case, folder: Path) -> None:
    """What a training run draws: rollouts, and the images of its validation."""
    trainer, network = trained(case, folder)
    size, values = case.size or 8, settings(case)
    if case.way == "validation":
        pipe = trainer.backbone.pipeline(network=trainer.network)
        with sampling_mode(trainer.network):
            images = generate(pipe, PROMPTS, SEEDS, batch_size=size, progress=False, **values)
        expected = [
            by_hand(case, network, network, p, start(s))
            for p, s in zip(PROMPTS, SEEDS, strict=True)
        ]
        check_images(images, decoded(case.family, torch.cat(expected)))
        return
    batch = next(trainer.source.unsampled(trainer.data_pipeline))
    sampler = SamplerConfig(STEPS, values["guidance_scale"], 0.0, size, shared_init=False)
    with sampling_mode(trainer.network):
        empty = trainer.data_pipeline.builder.unconditional(batch.condition)
        rollout = Rollout(trainer.backbone, trainer.schedule, sampler)
        found = rollout(
            trainer.sampling_policy.predict, batch, 1, empty, decode=False, progress=False
        )
    expected = [
        by_hand(case, network, network, prompt, noise)
        for prompt, noise in zip(batch.prompts, found.states[:, :, 0], strict=True)
    ]
    check_latents(found.final[:, 0], torch.cat(expected))


def check_latents(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        found.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def check_images(images: list[Any], expected: list[Any]) -> None:
    for image, wanted in zip(images, expected, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(wanted, int)).max() <= 1


def is_refused(case: Case) -> bool:
    """What cannot be right: half of a DoRA."""
    return case.weights == "dora" and "half" in case.guidance


def check(case: Case, files: Files, folder: Path) -> None:
    if case.way in ("rollout", "validation"):
        return check_run(case, folder)
    if is_refused(case):
        with pytest.raises(UserError, match="DoRA.*fuse it first"):
            through_the_package(case, files)
        return
    positive, negative = networks(case, files)
    if case.weights == "full" and "negative" in case.guidance and case.way in ("compare", "demo"):
        # There the base is the pipeline's own network, which is the positive one.
        npo = shaken(network_of(build_pipeline(case.family)), 2).state_dict()
        beta = shares(case)[1]
        own = positive.state_dict()
        negative.load_state_dict({n: w + beta * (npo[n] - w) for n, w in own.items()})
    prompts = PROMPTS[:1] * 3 if case.way == "steering" else PROMPTS
    expected = torch.cat(
        [
            by_hand(case, positive, negative, p, start(s))
            for p, s in zip(prompts, SEEDS, strict=True)
        ]
    )
    with torch.inference_mode():
        found = through_the_package(case, files)
    if isinstance(found, torch.Tensor):
        return check_latents(found, expected)
    return check_images(found, decoded(case.family, expected))


@by_default(lambda case: case in NEWS)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_sample_of_all_combinations(case: Case, files: Files, tmp_path: Path) -> None:
    check(case, files, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_all_combinations(family: str, way: str, files: Files, tmp_path: Path) -> None:
    failed = []
    for number, case in enumerate(CASES):
        if (case.family, case.way) == (family, way):
            try:
                check(case, files, tmp_path / str(number))
            except AssertionError as error:
                failed.append(f"{case}: {str(error).strip().splitlines()[-1]}")
    assert not failed, f"{len(failed)} combinations, e.g.\n" + "\n".join(failed[:12])
