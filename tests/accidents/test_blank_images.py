"""NaN, blocked and failed images are missing: counted, named, never the winner."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from tiny import brightness, build_pipeline, lora_config, make_trainer, next_batch

from diffalign import FKSteering, ValidationConfig, load_scorer
from diffalign.demo.engine import Engine
from diffalign.errors import UserError
from diffalign.evaluation import generate
from diffalign.evaluation.compare import compare
from diffalign.evaluation.models import parse_model
from diffalign.generation.grids import framed_grid, models_grid
from diffalign.generation.sampling import draw_files, drawn_file
from diffalign.methods.spo import nearest_usable
from diffalign.runtime import missing as drawn
from diffalign.runtime.distributed import DistributedContext
from diffalign.runtime.missing import ABSENT, BLOCKED, NOT_FINITE, Missing, NoImages
from diffalign.steering.particle_weights import ParticleWeights
from diffalign.training.online.reward_function import RewardFunction

SMALL: dict[str, Any] = {"num_inference_steps": 2}
ALONE = DistributedContext(0, 1, "cpu")


def poisoned(family: str = "sd", value: float = float("nan"), rows: tuple[int, ...] = (1,)) -> Any:
    """A pipeline whose autoencoder breaks at these rows of a batch."""
    pipe = build_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    decode = pipe.vae.decode

    def broken(latents: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = decode(latents, *args, **kwargs)[0].clone()
        for row in rows:
            if row < len(pixels):
                pixels[row, :, 3:, 3:] = value
        return (pixels,)

    pipe.vae.decode = broken
    return pipe


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_missing_and_the_others_untouched(family, value):
    prompts, seeds = ["a cat", "a dog", "a fox"], [0, 1, 2]
    plain = generate(poisoned(family, rows=()), prompts, seeds, progress=False, **SMALL)
    pipe = poisoned(family, value)
    images = generate(pipe, prompts, seeds, progress=False, **SMALL)
    assert images[1] == Missing(NOT_FINITE)
    assert all(np.array_equal(np.asarray(images[i]), np.asarray(plain[i])) for i in (0, 2))
    assert "postprocess" not in vars(pipe.image_processor)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_arrays_and_tensors_too(kind):
    images = generate(poisoned(), ["a"] * 3, [0, 1, 2], progress=False, output_type=kind, **SMALL)
    assert drawn.present(images) == [0, 2]


def checked(pipe: Any, flags: list[bool]) -> Any:
    """A pipeline whose safety checker paints these rows black."""

    def check(image: torch.Tensor, device: Any, dtype: Any) -> Any:
        image = image.clone()
        for i, flag in enumerate(flags):
            if flag:
                image[i] = 0
        return image, flags

    pipe.run_safety_checker = check
    return pipe


def test_blocked_images_are_missing():
    images = generate(
        checked(poisoned(rows=()), [False, True]), ["a", "b"], [0, 1], progress=False, **SMALL
    )
    assert images[1] == Missing(BLOCKED) and isinstance(images[0], Image.Image)


def test_one_prompt_that_fails_costs_one_image():
    pipe = poisoned(rows=())
    call = type(pipe).__call__

    class Picky(type(pipe)):
        def __call__(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            if "bad" in prompt:
                raise ValueError("unsafe prompt")
            return call(self, prompt, *args, **kwargs)

    pipe.__class__ = Picky
    images = generate(pipe, ["a", "bad", "c"], [0, 1, 2], progress=False, **SMALL)
    assert images[1].reason == "failed: unsafe prompt" and drawn.present(images) == [0, 2]
    with pytest.raises(ValueError, match="unsafe prompt"):
        generate(pipe, ["bad", "bad"], [0, 1], progress=False, **SMALL)


@pytest.mark.parametrize(
    "output", [None, SimpleNamespace(images=None), SimpleNamespace(images=[1])]
)
def test_pipelines_that_return_something_else_are_a_sentence(output):
    with pytest.raises(UserError, match="expected 2 images for 2 prompts"):
        drawn.read_output(output, 2, [])


def test_words():
    images = [
        Image.new("RGB", (4, 4)),
        Missing(NOT_FINITE),
        Missing(NOT_FINITE),
        Missing(BLOCKED),
        Missing("failed: x"),
        Missing("failed: y"),
    ]
    assert (
        drawn.left_out(images, 6, "m")
        == "5 of 6 images of m left out: not finite (2), failed (2), blocked by the safety "
        "checker (1)"
    )
    assert drawn.left_out(images[:1], 1) == ""
    with pytest.raises(
        NoImages,
        match="none of its 2 images can be used: not finite .2.; draw in another precision",
    ):
        drawn.check_any(images[1:3], "m")
    with pytest.raises(NoImages, match="without a safety checker"):
        drawn.check_any(images[3:4], "m")


def test_scorers_have_no_score_for_a_missing_image():
    scorer = load_scorer("jpeg_compressibility")
    result = scorer.score([Image.new("RGB", (8, 8)), Missing(BLOCKED)], on_error="nan")
    assert result.values.isnan().tolist() == [False, True] and BLOCKED in result.errors[1]
    with pytest.raises(UserError, match=BLOCKED):
        scorer([Missing(BLOCKED)])


def test_functions_that_judge_never_see_one():
    judge = RewardFunction([brightness])
    scores = judge([Image.new("RGB", (8, 8), "white"), Missing(NOT_FINITE)], ["a", "b"])
    assert scores.isnan().flatten().tolist() == [False, True]
    assert judge([Missing(NOT_FINITE)] * 2, ["a", "b"]).isnan().all()


def test_files_remember_what_is_missing_and_failures_are_tried_again(tmp_path):
    wanted = [("p", i, tmp_path / f"{i}.png") for i in range(3)]
    calls: list[int] = []

    def draw(prompts: Any, seeds: Any) -> list[Any]:
        calls.append(len(prompts))
        return [Image.new("RGB", (4, 4)), Missing(NOT_FINITE), Missing("failed: x")]

    draw_files(draw, wanted, 3, ALONE, "x")
    assert drawn_file(wanted[1][2]) == Missing(NOT_FINITE) and drawn_file(
        tmp_path / "no.png"
    ) == Missing(ABSENT)
    draw_files(draw, wanted, 3, ALONE, "x")
    draw_files(draw, wanted[:2], 2, ALONE, "x")
    assert calls == [3, 3]


def test_a_comparison_leaves_pairs_out_and_says_so(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    models = [
        parse_model(poisoned(rows=()), "base"),
        parse_model({"model": poisoned(), "name": "tuned"}, "tuned"),
    ]
    options = {
        "prompts": str(tmp_path / "p.txt"),
        "scorers": ["jpeg_compressibility"],
        "num_images": 2,
        "batch_size": 4,
    }
    options |= {"verbose": False, "diversity": "pixel", **SMALL}
    result = compare(
        models[0],
        [models[1]],
        output_dir=tmp_path / "c",
        **options,
    )
    values = result.scores["tuned"]["jpeg_compressibility"]
    assert np.isnan(values).sum() == 1 and result.facts["missing"] == {
        "tuned": "1 of 4 images of tuned left out: not finite (1)"
    }
    assert (
        "left out: not finite" in (tmp_path / "c/report.html").read_text()
        and (tmp_path / "c/grid.png").is_file()
    )
    assert json.loads((tmp_path / "c/results.json").read_text())
    with pytest.raises(NoImages, match="model blank: none of its 4 images"):
        compare(
            models[0],
            [parse_model({"model": poisoned(rows=tuple(range(4))), "name": "blank"}, "x")],
            output_dir=tmp_path / "d",
            **options,
        )


def test_grids_show_a_pale_tile():
    row = (
        "p",
        [[Image.new("RGB", (64, 64)), Missing(NOT_FINITE)], [Missing(BLOCKED), Missing(BLOCKED)]],
    )
    assert models_grid([row], ["a", "b"]).size[0] > 200
    assert framed_grid([("p", [Missing(NOT_FINITE), Image.new("RGB", (64, 64))], 1)]).size[0] > 100


def test_steering_gives_a_blank_particle_no_weight():
    scorer = load_scorer("jpeg_compressibility")  # which prefers black to everything
    for lmbda in (0.0, 5.0):
        steering = FKSteering(
            poisoned(rows=(0,)), scorer, num_particles=3, lmbda=lmbda, kernel="ddim", eta=1.0
        )
        result = steering("a cat", seed=0, num_inference_steps=3)
        assert isinstance(result.best[0], Image.Image) and float(result.weights[0, 0]) == 0.0
        assert isinstance(result.images[0][0], Missing)
        assert all(
            isinstance(image, Image.Image)
            for image in result.draw(torch.Generator().manual_seed(0))
        )


def test_a_prompt_without_an_image_spares_the_others():
    scorer = load_scorer("jpeg_compressibility")
    steering = FKSteering(
        poisoned(rows=(0, 1)),
        scorer,
        num_particles=2,
        lmbda=1.0,
        kernel="ddim",
        eta=1.0,
        prompts_per_call=2,
    )
    result = steering(["a cat", "a dog"], seed=0, num_inference_steps=3)
    assert isinstance(result.best[1], Image.Image) and bool(result.degenerate[0])
    with pytest.raises(NoImages):
        FKSteering(
            poisoned(rows=tuple(range(4))),
            scorer,
            num_particles=2,
            lmbda=1.0,
            kernel="ddim",
            eta=1.0,
        )("a cat", seed=0, num_inference_steps=3)


def test_a_scorer_that_is_silent_is_still_named():
    weights = ParticleWeights(1, 2, lmbda=1.0)
    with pytest.raises(UserError, match="NaN for every particle"):
        weights.update(torch.full((1, 2), float("nan")))


@pytest.mark.parametrize("method", ["diffusion_dpo", "rankdpo", "sft"])
def test_online_training_goes_on_without_a_broken_image(method, tmp_path, capsys):
    options = {"scorers": [brightness]}
    trainer = make_trainer(
        tmp_path,
        method=method,
        peft_config=lora_config(),
        max_steps=2,
        per_device_train_batch_size=2,
        data={"online": {"every": 2, "k": 3, "num_inference_steps": 2}},
        options=options,
    )
    decode = trainer.backbone.decode_latents

    def broken(latents: Any) -> list[Any]:
        images = decode(latents)
        return [Missing(NOT_FINITE) if i == 1 else image for i, image in enumerate(images)]

    trainer.backbone.decode_latents = broken
    trainer.train()
    assert "left out: not finite" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in trainer.network.parameters())


@pytest.mark.parametrize("method", ["awm", "d3po", "diffusion_nft", "grpo", "seppo"])
def test_a_trajectory_that_is_not_finite_teaches_nothing(method, tmp_path):
    trainer = make_trainer(
        tmp_path,
        method=method,
        peft_config=lora_config(),
        max_steps=2,
        per_device_train_batch_size=2,
        **({"ratio": "guard"} if method == "grpo" else {}),
    )
    trainer.setup()
    chunk = trainer.rollout._chunk

    def broken(*args: Any, **kwargs: Any) -> Any:
        states, log_probs, means = chunk(*args, **kwargs)
        states = states.clone()
        states[0] = float("nan")
        for part in means:
            part[0] = float("nan")
        return states, log_probs, means

    trainer.rollout._chunk = broken
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.network.parameters())


@pytest.mark.parametrize("call", [0, 4, 5, 9])
def test_a_candidate_that_is_not_finite_is_never_chosen(call, tmp_path, monkeypatch, capsys):
    """SPO: neither as the best or worst, nor as the state that the next candidates
    start from."""
    options = {
        "per_device_train_batch_size": 2,
        "num_inference_steps": 6,
        "images_per_prompt": 3,
        "max_steps": 1,
    }
    trainer = make_trainer(tmp_path, method="spo", peft_config=lora_config(), **options)
    trainer.setup()
    whole, calls = torch.randn, []

    def broken(shape: Any, **kwargs: Any) -> Any:
        noise = whole(shape, **kwargs)
        if (
            len(shape) == 4 and shape[0] == 3
        ):  # the candidates of one of two rows at one of five steps
            if len(calls) == call:
                noise[1 if call else slice(None)] = torch.nan
            calls.append(1)
        return noise

    monkeypatch.setattr(torch, "randn", broken)
    batch = next_batch(trainer)
    monkeypatch.undo()
    assert len(calls) == 10 and all(
        batch.extra[name].isfinite().all() for name in ("states", "pairs", "log_probs")
    )
    said = capsys.readouterr().out
    if call == 0:  # without any candidate the row is lost for the whole round
        assert "3 of 6 images of this round left out: not finite" in said
        assert batch.extra["decided"].any(1).tolist() == [False, True]
    else:
        assert ("left out" in said) == (call == 9)
    for micro in trainer.micro_batches(batch):
        loss, _ = trainer.compute_loss(micro)
        assert loss.isfinite().all()


@pytest.mark.parametrize("method", ["spo", "d3po"])
def test_one_lost_prompt_does_not_end_a_round(method, tmp_path, capsys):
    """A round of two batches, one prompt each: the first one's images are missing."""
    trainer = make_trainer(
        tmp_path,
        method=method,
        peft_config=lora_config(),
        max_steps=2,
        per_device_train_batch_size=1,
        steps_per_round=2,
    )
    trainer.setup()
    decode, calls = trainer.backbone.decode_latents, []

    def broken(latents: Any) -> list[Any]:
        images = decode(latents)
        calls.append(1)
        first_row = len(calls) == 1 if method == "d3po" else len(calls) <= 2
        return [Missing(NOT_FINITE)] * len(images) if first_row else images

    trainer.backbone.decode_latents = broken
    trainer.train()
    said = capsys.readouterr().out
    assert (
        "2 of 4 images of this round left out: not finite" in said
        and "no score for any image of" in said
    )


def test_the_next_state_is_a_finite_candidate():
    usable = torch.tensor(
        [[True, True, True], [False, True, False], [True, False, False], [False, False, False]]
    )
    assert nearest_usable(torch.tensor([2, 2, 1, 1]), usable).tolist() == [2, 1, 0, 1]


def test_validation_counts_and_never_keeps_weights_that_draw_less(tmp_path, capsys):
    validation = ValidationConfig(
        validation_prompts=["a", "b"],
        validation_steps=1,
        num_inference_steps=2,
        num_validation_images=1,
        scorers=["jpeg_compressibility"],
        keep_best="jpeg_compressibility",
    )
    trainer = make_trainer(
        tmp_path, peft_config=lora_config(), max_steps=1, options={"validation": validation}
    )
    pipeline, calls = trainer.backbone.pipeline, []

    def second_is_broken(**kwargs: Any) -> Any:
        pipe = pipeline(**kwargs)
        calls.append(1)
        return poisoned_copy(pipe) if len(calls) > 1 else pipe

    trainer.backbone.pipeline = second_is_broken
    trainer.train()
    assert (
        "1 of 2 images of step 1 left out" in capsys.readouterr().out
        and not (tmp_path / "best").exists()
    )


def poisoned_copy(pipe: Any) -> Any:
    decode = pipe.vae.decode

    def broken(latents: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = decode(latents, *args, **kwargs)[0].clone()
        pixels[-1] = float("nan")
        return (pixels,)

    pipe.vae.decode = broken
    return pipe


def test_the_demo_says_that_there_is_no_image():
    engine = Engine([parse_model({"model": poisoned(rows=(0,)), "name": "m"}, "m")])
    request = engine.read("a cat", 3, 2, 2.0)
    with pytest.raises(UserError, match="model m: no image for seed 3: not finite"):
        engine.draw("m", request)


@pytest.mark.nightly
def test_the_sample_command_stops_when_nothing_can_be_used(tmp_path):
    pipe = build_pipeline("sd")
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    pipe.save_pretrained(tmp_path / "m")
    done = run(
        "diffalign",
        "sample",
        "--model",
        tmp_path / "m",
        "--prompt",
        "a",
        "--num_images",
        2,
        "--num_inference_steps",
        2,
        "--output_dir",
        tmp_path / "o",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 2 and "none of its 2 images can be used: not finite (2)" in done.stderr
    )
