"""The demo's engine: paired noise, bounds, switching, stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny import build_pipeline

from diffalign.demo.engine import Engine, Limits, enlarged
from diffalign.demo.jobs import Cancelled, Job
from diffalign.errors import UserError
from diffalign.evaluation.compare import read_models
from diffalign.generation.pipelines import base_pipeline
from diffalign.generation.sampling import generate

PROMPT = "a small red circle on the left of a gray background"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    pipe = base_pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet)
    )
    return folder


@pytest.fixture(scope="module")
def engine(lora: Path) -> Engine:
    models = read_models("shapes", [f"one={lora}", f"two={lora}@0.3"])
    return Engine(models, ["shapes", "shapes-clip"], limits=Limits(steps=30, particles=4))


def request(engine: Engine, **changes: Any) -> Any:
    given = {"prompt": PROMPT, "seed": 3, "steps": 4, "guidance": 2.0, **changes}
    return engine.read(
        *(given[name] for name in ("prompt", "seed", "steps", "guidance")), given.get("side")
    )


def pixels(image: Any) -> Any:
    return np.asarray(image)


def test_a_lora_at_scale_0_is_the_base_bit_for_bit(engine: Engine) -> None:
    wanted = request(engine)
    base = engine.draw("base", wanted)
    assert np.array_equal(pixels(engine.draw("one", wanted, lora_scale=0.0)), pixels(base))
    assert not np.array_equal(pixels(engine.draw("one", wanted)), pixels(base))
    assert np.array_equal(
        pixels(engine.draw("base", wanted)), pixels(base)
    )  # and switching back leaves no trace
    [plain] = generate(
        base_pipeline(), [PROMPT], [3], num_inference_steps=4, guidance_scale=2.0, progress=False
    )
    assert np.array_equal(pixels(plain), pixels(base))


def test_every_lora_has_its_own_scale(engine: Engine) -> None:
    wanted = request(engine)
    two = engine.draw("two", wanted)
    assert np.array_equal(pixels(engine.draw("one", wanted, lora_scale=0.3)), pixels(two))


def test_scores_and_missing_ones(engine: Engine) -> None:
    wanted = request(engine)
    found = engine.score([engine.draw("base", wanted)] * 2, PROMPT)
    assert found["shapes"][0] == found["shapes"][1] and set(found) == {"shapes", "shapes-clip"}
    assert engine.score([engine.draw("base", wanted)], "a cat")["shapes"] == [None]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": " "}, "prompt: write what"),
        ({"prompt": None}, "prompt: write what"),
        ({"prompt": "x" * 401}, "prompt: 401 characters are too many; at most 400"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"steps": 31}, "steps: expected a whole number from 1 to 30, got 31"),
        ({"steps": 10**30}, "steps: expected"),
        ({"steps": True}, "steps: expected"),
        ({"guidance": float("nan")}, "guidance: expected a number from 0 to 20, got nan"),
        ({"guidance": "2"}, "guidance: expected a number"),
        ({"side": 10**6}, "size: expected"),
        ({"side": 100}, "size: expected a multiple of 64"),
    ],
)
def test_requests_out_of_bounds(engine: Engine, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        request(engine, **changes)


def test_models_and_scales_that_are_not_there(engine: Engine) -> None:
    with pytest.raises(UserError, match="there is no '../../etc/passwd'; there are base, one, two"):
        engine.draw("../../etc/passwd", request(engine))
    with pytest.raises(UserError, match="LoRA scale: expected a number from 0 to 2, got 3"):
        engine.draw("one", request(engine), lora_scale=3)


def test_steering_shows_its_steps(engine: Engine) -> None:
    wanted = request(engine, steps=8)
    job = Job(
        lambda job: engine.steer(
            "base", wanted, scorer="shapes-clip", num_particles=3, lmbda=5.0, job=job
        )
    )
    seen = list(job)
    kinds = [kind for kind, _ in seen]
    assert kinds.count("step") == 8 and kinds.count("scored") >= 3 and kinds[-1] == "result"
    result, plain = seen[-1][1]
    assert len(result.images[0]) == 3 and np.array_equal(
        pixels(plain), pixels(engine.draw("base", wanted))
    )
    with pytest.raises(UserError, match="particles: expected a whole number from 2 to 4, got 5"):
        list(
            Job(
                lambda job: engine.steer(
                    "base", wanted, scorer="shapes", num_particles=5, lmbda=1, job=job
                )
            )
        )
    with pytest.raises(UserError, match="prompt: shapes has no score for it"):
        list(
            Job(
                lambda job: engine.steer(
                    "base",
                    request(engine, prompt="a cat"),
                    scorer="shapes",
                    num_particles=2,
                    lmbda=1,
                    job=job,
                )
            )
        )


def test_a_stopped_job_stops_and_frees_the_engine(engine: Engine) -> None:
    class Held(Job):
        def report(self, kind: str, value: Any) -> None:
            if value[0] > 1:
                self._cancelled.wait(60)
            super().report(kind, value)

    wanted = request(engine, steps=30)
    job = Held(lambda job: engine.draw("one", wanted, job))
    seen = iter(job)
    assert next(seen) == ("step", (1, 30))
    job.cancel()
    with pytest.raises(Cancelled):
        list(seen)
    before = engine.draw("base", request(engine))
    assert np.array_equal(pixels(before), pixels(engine.draw("base", request(engine))))


def test_other_families_without_a_lora() -> None:
    models = read_models(
        build_pipeline("sd3"), [{"model": build_pipeline("sd3", seed=1), "name": "other"}]
    )
    engine = Engine(models)
    assert engine.defaults("base")["side"] == 32
    wanted = engine.read("a cat", 0, 2, 3.0)
    first, second = engine.draw("base", wanted), engine.draw("other", wanted)
    assert first.size == second.size and not np.array_equal(pixels(first), pixels(second))


def test_small_images_are_enlarged_by_whole_factors() -> None:
    from PIL import Image

    assert enlarged(Image.new("RGB", (64, 32))).size == (320, 160)
    assert enlarged(Image.new("RGB", (512, 512))).size == (512, 512)


def test_a_models_own_guidance_and_strength_are_drawn_with(lora: Path) -> None:
    models = read_models("shapes", ["{name: strong, model: shapes, guidance_scale: 7}"])
    engine = Engine(models)
    wanted = request(engine, steps=2)
    high = request(engine, steps=2, guidance=7.0)
    assert not np.array_equal(
        pixels(engine.draw("strong", wanted)), pixels(engine.draw("base", wanted))
    )
    assert np.array_equal(pixels(engine.draw("strong", wanted)), pixels(engine.draw("base", high)))
