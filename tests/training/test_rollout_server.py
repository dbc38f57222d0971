"""Images drawn by a server: `diffalign serve-model` over real HTTP, both ways of
loading a LoRA, pushes that are checked, training."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny import RESOLUTION, brightness, build_pipeline, lora_config, make_trainer

from diffalign.data.config import OnlineConfig
from diffalign.errors import ConfigError, UserError
from diffalign.generation.sampling import generate
from diffalign.generation.serving import ModelService, create_model_app, make_model_server
from diffalign.rewards.serving.server import ScorerServer
from diffalign.runtime.missing import Missing
from diffalign.training.online.rollout_server import RolloutServer

SETTINGS = {"size": f"{RESOLUTION}x{RESOLUTION}", "num_inference_steps": 2, "guidance_scale": 2.0}


@contextlib.contextmanager
def serving(family: str = "sd", with_state: bool = True) -> Iterator[tuple[str, ModelService]]:
    """A server of ours; without its state it is like vLLM-Omni's."""
    service = ModelService(build_pipeline(family), "tiny")
    if with_state:
        server = make_model_server(service)
    else:
        app = create_model_app(service)
        kept = ("/health", "/v1/models", "/v1/images/generations")
        app.router.routes[:] = [r for r in app.router.routes if r.path in kept]
        server = ScorerServer(app)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def post(url: str, path: str, body: object) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST" if body is not None else "GET", path, None if body is None else data)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def picture(reply: dict[str, Any], number: int = 0) -> np.ndarray:
    data = base64.b64decode(reply["data"][number]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def trained_lora(folder: Path, family: str = "sd", seed: int = 0) -> Path:
    """A LoRA that changes images."""
    trainer = make_trainer(
        folder, family, peft_config=lora_config(), max_steps=2, learning_rate=5e-2, seed=seed
    )
    trainer.train()
    return folder


def test_a_served_model_draws_as_its_pipeline(tmp_path: Path) -> None:
    lora = trained_lora(tmp_path / "lora")
    draw = {"height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": 2,
            "guidance_scale": 2.0}  # fmt: skip
    pipe = build_pipeline("sd")
    plain = [np.asarray(i) for i in generate(pipe, ["a cat"] * 2, [5, 6], progress=False, **draw)]
    pipe.load_lora_weights(lora)
    changed = np.asarray(generate(pipe, ["a cat"], [5], progress=False, **draw)[0])
    assert not np.array_equal(changed, plain[0])
    request = {"prompt": "a cat", "n": 2, "seed": 5, **SETTINGS}
    with serving() as (url, _):
        status, reply = post(url, "/v1/images/generations", request)
        assert status == 200 and [picture(reply, i).tolist() for i in range(2)] == [
            image.tolist() for image in plain
        ]
        negative = {**request, "negative_prompt": "blurry"}
        assert post(url, "/v1/images/generations", negative)[0] == 200
        # As a field of the request, which leaves the server as it was.
        own = {**request, "n": 1, "lora": {"name": "x", "path": str(lora), "scale": 1.0}}
        assert np.array_equal(picture(post(url, "/v1/images/generations", own)[1]), changed)
        again = post(url, "/v1/images/generations", {**request, "n": 1})[1]
        assert np.array_equal(picture(again), plain[0])
        # As a state of the server.
        body = {"lora_nickname": "mine", "lora_path": str(lora), "strength": 1.0}
        assert post(url, "/v1/set_lora", body)[0] == 200
        listed = post(url, "/v1/list_loras", None)[1]
        assert listed["active"]["transformer"][0]["nickname"] == "mine"
        with_state = post(url, "/v1/images/generations", {**request, "n": 1})[1]
        assert np.array_equal(picture(with_state), changed)
        status, reply = post(url, "/v1/images/generations", own)
        assert status == 400 and "unmerge it first" in reply["error"]["message"]
        assert post(url, "/v1/unmerge_lora_weights", {})[0] == 200
        after = post(url, "/v1/images/generations", {**request, "n": 1})[1]
        assert np.array_equal(picture(after), plain[0])
        assert post(url, "/v1/models", None)[1]["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: expected a text"),
        ({"prompt": "a", "n": 0}, "n: expected a whole number from 1 to 64"),
        ({"prompt": "a", "seed": -1}, "seed: expected a whole number"),
        ({"prompt": "a", "size": "big"}, 'size: expected a text such as "512x512"'),
        ({"prompt": "a", "size": "99999x99999"}, "size: expected"),
        ({"prompt": "a", "size": "33x33"}, "divisible by 8"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps: expected"),
        ({"prompt": "a", "guidance_scale": "x"}, "guidance_scale: expected a number"),
        ({"prompt": "a", "response_format": "url"}, "response_format: this server gives b64_json"),
        ({"prompt": "a", "lora": {"name": "x"}}, "lora: expected"),
        ({"prompt": "a", "lora": {"path": "x", "scale": "y"}}, "lora.scale: expected a number"),
        ({"prompt": "a", "lora": {"path": "/no/such/folder"}}, "no/such/folder"),
        (b"[1]", "expected a JSON object"),
        (b"{", "expected a JSON object"),
    ],
)
def test_requests_that_make_no_sense_are_a_sentence(body: Any, message: str) -> None:
    with serving() as (url, _):
        status, reply = post(url, "/v1/images/generations", body)
        assert status == 400 and message in reply["error"]["message"]
        assert post(url, "/health", None) == (200, {"status": "ok"})


@pytest.mark.parametrize("with_state", [True, False])
def test_a_push_is_checked(with_state: bool, tmp_path: Path) -> None:
    lora = trained_lora(tmp_path / "lora")
    with serving(with_state=with_state) as (url, service):
        server = RolloutServer(url, SETTINGS)
        assert server.keeps_lora is with_state
        plain = np.asarray(server.draw(["a cat"], [3])[0])
        server.push(lora, "first")
        changed = np.asarray(server.draw(["a cat"], [3])[0])
        assert not np.array_equal(plain, changed)
        assert (service.active is not None) is with_state
        if with_state:  # SGLang keeps a LoRA per name for good
            assert service.active["nickname"] == "diffalign"
        server.clear()
        assert np.array_equal(np.asarray(server.draw(["a cat"], [3])[0]), plain)
        # A LoRA that does nothing is as bad as one that the server does not use.
        trainer = make_trainer(tmp_path / "zero", "sd", peft_config=lora_config())
        trainer.save_model(str(tmp_path / "zero"))
        with pytest.raises(UserError, match="draws the same image with and without the LoRA"):
            server.push(tmp_path / "zero", "second")
        with pytest.raises(UserError, match="rollout_server: .*nowhere"):
            server.push(tmp_path / "nowhere", "third")


def test_servers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rollout_server: http://127.0.0.1:9/v1/list_loras cannot"):
        RolloutServer("http://127.0.0.1:9", SETTINGS)
    with serving() as (one, _), serving(with_state=False) as (two, _):
        with pytest.raises(UserError, match="the servers load LoRAs in different ways"):
            RolloutServer([one, two], SETTINGS)

        def refused(message: str, **options: Any) -> None:
            options = {"peft_config": lora_config(), "rollout_server": [one], **options}
            with pytest.raises(ConfigError, match=message):
                make_trainer(tmp_path, "sd", "diffusion_nft", **options)

        refused("train.rollout_server: a server can only take a LoRA", peft_config=None)
        refused("leave out solver, eta and shared_init", solver="UniPCMultistepScheduler")
        refused("leave out solver, eta and shared_init", eta=0.5)
    with pytest.raises(ConfigError, match="url: expected an address such as"):
        make_trainer(tmp_path, "sd", "awm", peft_config=lora_config(), rollout_server=["localhost"])


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("method", ["diffusion_nft", "awm"])
def test_a_run_draws_with_the_weights_of_the_moment(
    method: str, with_state: bool, tmp_path: Path
) -> None:
    drawn: list[tuple[list[str], list[int], list[np.ndarray]]] = []
    options = {"max_decay": 0.5, "decay_rate": 0.25} if method == "diffusion_nft" else {}
    with serving(with_state=with_state) as (url, _):
        trainer = make_trainer(
            tmp_path / "run", "sd", method, peft_config=lora_config(), max_steps=3,
            learning_rate=5e-2, images_per_prompt=2, per_device_train_batch_size=2,
            num_inference_steps=4, rollout_server=[url], guidance_scale=1.0, **options,
        )  # fmt: skip
        trainer.setup()
        draw = trainer.server.draw

        def recording(prompts: list[str], seeds: list[int], ahead: Any) -> list[Image.Image]:
            images = draw(prompts, seeds, ahead)
            drawn.append((prompts, seeds, [np.asarray(image) for image in images]))
            return images

        trainer.server.draw = recording
        weights: list[dict[str, torch.Tensor]] = []
        push = trainer.remote_sampler.push

        def pushing() -> None:
            push()
            weights.append(trainer.remote_sampler.pushed)

        trainer.remote_sampler.push = pushing
        trainer.train()
    assert len(drawn) == len(weights) == 3
    assert len(list((tmp_path / "run" / "rollout_server").iterdir())) == 1
    # The images of the last round are those of the pushed weights in plain diffusers.
    pipe = build_pipeline("sd")
    (pushed,) = (tmp_path / "run" / "rollout_server").iterdir()
    pipe.load_lora_weights(pushed)
    prompts, seeds, images = drawn[-1]
    again = generate(
        pipe, prompts, seeds, batch_size=1, progress=False, height=RESOLUTION, width=RESOLUTION,
        num_inference_steps=4, guidance_scale=1.0,
    )  # fmt: skip
    for image, expected in zip(again, images, strict=True):
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    base = generate(
        build_pipeline("sd"), prompts, seeds, batch_size=1, progress=False, height=RESOLUTION,
        width=RESOLUTION, num_inference_steps=4, guidance_scale=1.0,
    )  # fmt: skip
    assert any(not np.array_equal(np.asarray(i), e) for i, e in zip(base, images, strict=True))


def test_an_offline_method_draws_on_a_server(tmp_path: Path) -> None:
    """`data.online.rollout_server`: the pairs of a round are the best and the worst of
    what the server drew with the weights of that moment."""
    online = {"every": 1, "k": 4, "num_inference_steps": 4, "guidance_scale": 1.0}
    drawn: list[list[Image.Image]] = []
    with serving() as (url, service):
        online["rollout_server"] = [url]
        trainer = make_trainer(
            tmp_path / "run", "sd", "diffusion_dpo", peft_config=lora_config(), max_steps=2,
            learning_rate=5e-2, per_device_train_batch_size=1, data={"online": online},
            options={"scorers": [brightness]},
        )  # fmt: skip
        trainer.setup()
        draw = trainer.server.draw

        def recording(prompts: list[str], seeds: list[int], ahead: Any) -> list[Image.Image]:
            drawn.append(draw(prompts, seeds, ahead))
            return drawn[-1]

        trainer.server.draw = recording
        batches: list[Any] = []
        make = trainer.source.make
        trainer.source.make = lambda *round_: batches.extend(make(*round_)) or batches[-1:]
        trainer.train()
        assert service.active is not None
    assert len(drawn) == 2
    for images, batch in zip(drawn, batches, strict=True):
        assert len(images) == 4
        scores = brightness(images, [""] * 4)
        pair = [images[int(i)] for i in (scores.argmax(), scores.argmin())]
        pixels = torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1) for i in pair])
        latents, _ = trainer.backbone.encode_images(pixels.float() / 127.5 - 1)
        torch.testing.assert_close(batch.x0[0].cpu(), latents.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="data.online.rollout_server: a server can only take a"):
        make_trainer(tmp_path / "full", "sd", "diffusion_dpo", data={"online": online})
    with pytest.raises(ConfigError, match="eta: the server draws by its own rules; leave it out"):
        OnlineConfig(rollout_server=[url], eta=0.5)


def test_a_pushed_lora_needs_no_metadata(tmp_path: Path) -> None:
    """vLLM-Omni and SGLang read the tensors alone, with an alpha of the rank."""
    with serving() as (url, _):
        trainer = make_trainer(
            tmp_path / "run", "sd", "diffusion_nft", peft_config=lora_config(4, 12),
            max_steps=1, learning_rate=5e-2, images_per_prompt=2, num_inference_steps=4,
            rollout_server=[url], guidance_scale=1.0,
        )  # fmt: skip
        trainer.train()
        trainer.remote_sampler.push(contextlib.nullcontext())
    (pushed,) = (tmp_path / "run" / "rollout_server").iterdir()
    (file,) = pushed.iterdir()
    tensors = load_file(file)
    state = get_peft_model_state_dict(trainer.network, adapter_name="default")
    down = {name: value for name, value in state.items() if "lora_A" in name}
    assert down and any(tensor.abs().max() > 0 for tensor in tensors.values())
    for name, value in down.items():
        up = state[name.replace("lora_A", "lora_B")]
        other = name.replace("lora_A", "lora_B")
        found = tensors[f"unet.{other}"] @ tensors[f"unet.{name}"]
        torch.testing.assert_close(found, 3.0 * up @ value)


def test_an_image_that_cannot_be_drawn_is_missing(tmp_path: Path) -> None:
    with serving() as (url, service):
        whole = service.draw

        def draw(request: dict[str, Any]) -> list[Any]:
            return [Missing("not finite")] if request["seed"] % 2 else whole(request)

        service.draw = draw  # type: ignore[method-assign]
        server = RolloutServer(url, SETTINGS)
        images = server.draw(["a", "a"], [2, 3])
        assert isinstance(images[0], Image.Image) and isinstance(images[1], Missing)
        make_trainer(
            tmp_path, "sd", "diffusion_nft", peft_config=lora_config(), max_steps=2,
            rollout_server=[url], images_per_prompt=4, per_device_train_batch_size=2,
        ).train()  # fmt: skip


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with serving() as (url, service):
        file = io.BytesIO()
        Image.new("RGB", (16, 24)).save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        service.draw = lambda request: [text]  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"drew an image of 16x24 pixels where 32x32 were"):
            RolloutServer(url, SETTINGS).draw(["a"], [0])


def test_two_servers_share_a_run(tmp_path: Path) -> None:
    with serving() as (one, first), serving() as (two, second):
        make_trainer(
            tmp_path, "sd", "diffusion_nft", peft_config=lora_config(), max_steps=2,
            learning_rate=5e-2, rollout_server=[one, two], images_per_prompt=4,
            options={"scorers": [brightness]},
        ).train()  # fmt: skip
        assert first.active == second.active and first.active is not None


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-m", "diffalign", "serve-model", "shapes", "--port", "0",
               "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"shapes at (http://127\.0\.0\.1:\d+)\n", line)
        assert match is not None, line
        request = {"prompt": "a small red circle on the left of a gray background",
                   "num_inference_steps": 2}  # fmt: skip
        status, reply = post(match[1], "/v1/images/generations", request)
        assert status == 200 and picture(reply).shape == (64, 64, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
