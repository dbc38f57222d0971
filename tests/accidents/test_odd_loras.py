"""LoRA files of other kinds: applied exactly, or refused by name without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import by_default
from tiny import build_pipeline, lora_config, make_trainer

from diffalign import NegativeGuidance, cli
from diffalign.backbones.lora import active_adapters, adapter_state, load_lora
from diffalign.errors import ConfigError, UserError
from diffalign.generation.pipelines import with_lora
from diffalign.runtime.weight_files import classify

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline("sd").save_pretrained(folder)
    return folder


def load(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    return pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


def peft_file(model: Path, folder: Path, **options: Any) -> Path:
    """A LoRA as diffusers' own scripts save it."""
    torch.manual_seed(1)
    pipe = load(model)
    pipe.unet.add_adapter(
        LoraConfig(
            **{
                "r": 4,
                "lora_alpha": 8,
                "init_lora_weights": False,
                "target_modules": ["to_q", "to_k"],
                **options,
            }
        )
    )
    for name, parameter in pipe.unet.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.5 * torch.rand_like(parameter))
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, **_collate_lora_metadata({"unet": pipe.unet})
    )
    return folder / FILE


def kohya_file(
    model: Path, path: Path, text_encoder: bool = False, alphas: Any = (4.0,), denoiser: bool = True
) -> Path:
    """A LoRA with the names of kohya-ss/sd-scripts."""
    torch.manual_seed(2)
    pipe, state = load(model), {}
    parts = [("lora_unet_", pipe.unet, ("to_q", "to_k"))] if denoiser else []
    parts += (
        [("lora_te_", pipe.text_encoder, ("q_proj", "k_proj", "v_proj", "out_proj"))]
        if text_encoder
        else []
    )
    for prefix, network, targets in parts:
        for i, (name, module) in enumerate(network.named_modules()):
            if name.split(".")[-1] in targets:
                name = (
                    name
                    if prefix == "lora_unet_" or name.startswith("text_model")
                    else f"text_model.{name}"
                )
                key = prefix + name.replace(".", "_")
                state[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features) / 4
                state[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4) / 4
                state[f"{key}.alpha"] = torch.tensor(alphas[i % len(alphas)])
    save_file(state, path)
    return path


def renamed(file: Path, target: Path, change: Any) -> Path:
    """The file with its names and tensors changed, its metadata kept."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        dict(change(name, value) for name, value in load_file(file).items()),
        target,
        metadata=metadata,
    )
    return target


ADDED = {
    "LoHa": "unet.mid.hada_w1_a",
    "LoKr": "lora_unet_mid.lokr_w1",
    "DoRA": "unet.down_blocks.0.attentions.0.to_q.lora_magnitude_vector",
    "kohya's DoRA scales": "lora_unet_mid.dora_scale",
    "LoCon's middle layers": "lora_unet_mid.lora_mid.weight",
    "full weight differences": "lora_unet_mid.diff_b",
    "weights of the base model": "unet.to_q.base_layer.bias",
    "LoRA biases": "unet.to_q.lora_B.bias",
}


@pytest.mark.parametrize("kind", ADDED)
def test_kinds_are_known_by_their_names(kind):
    assert classify(["unet.a.lora_A.weight", "unet.a.lora_B.weight", ADDED[kind]]).kinds == (kind,)


def test_plain_files_of_three_layouts():
    for down, up in (
        ("unet.a.lora_A.weight", "unet.a.lora_B.weight"),
        ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"),
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight"),
    ):
        content = classify([down, up])
        assert (content.layers, content.text_encoders, content.kinds, content.unpaired) == (
            1,
            0,
            (),
            None,
        )
    assert (
        classify(
            [
                "lora_te1_a.lora_down.weight",
                "lora_te1_a.lora_up.weight",
                "text_encoder_2.b.lora_A.weight",
                "text_encoder_2.b.lora_B.weight",
            ]
        ).text_encoders
        == 2
    )
    assert classify(["unet.a.lora_A.weight"]).unpaired == "unet.a"


@by_default()
@pytest.mark.parametrize("kind", [kind for kind in ADDED if kind not in ("DoRA", "LoRA biases")])
@pytest.mark.parametrize("command", ["sample", "merge", "negative"])
def test_kinds_that_diffusers_drops_are_refused_by_name(kind, command, model, tmp_path, capsys):
    file = peft_file(model, tmp_path / "plain")
    odd = tmp_path / "odd.safetensors"
    save_file({**load_file(file), ADDED[kind]: torch.ones(2)}, odd)
    drawing = [
        "sample",
        "--model",
        model,
        "--num_inference_steps",
        2,
        "--num_images",
        1,
        "--prompt",
        "x",
    ]
    arguments = {
        "sample": [*drawing, "--lora", odd, "--output_dir", tmp_path / "o"],
        "merge": ["merge", "--model", model, "--inputs", odd, "--output_dir", tmp_path / "m"],
        "negative": [*drawing, "--negative_lora", odd, "--output_dir", tmp_path / "n"],
    }[command]
    assert cli.run([str(a) for a in arguments]) == 2
    assert kind in capsys.readouterr().err and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["to_q", "conv_in"]},
        {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 6}},
    ],
)
def test_plain_loras_are_applied_and_merged_exactly(options, model, tmp_path):
    file = peft_file(model, tmp_path / "lora", **options)
    direct = load(model)
    direct.load_lora_weights(str(file.parent))
    mine = load(model)
    load_lora(mine, file, "mine", "--lora")
    assert distance(draw(mine), draw(direct)) == 0
    assert (
        cli.run(
            [
                "merge",
                "--model",
                str(model),
                "--inputs",
                str(file),
                "--weights",
                "1",
                "--output_dir",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    merged = load(model)
    merged.load_lora_weights(str(tmp_path / "merged"))
    assert distance(draw(merged), draw(direct)) < 1e-4


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_cannot_be_summed_is_not_merged(options, model, tmp_path, capsys):
    file = peft_file(model, tmp_path / "lora", **options)
    assert (
        cli.run(
            [
                "merge",
                "--model",
                str(model),
                "--inputs",
                str(file),
                "--output_dir",
                str(tmp_path / "m"),
            ]
        )
        == 2
    )
    assert "fuse it into the model first" in capsys.readouterr().err


def test_dora_is_drawn_and_refused_where_it_is_switched(model, tmp_path):
    file = peft_file(model, tmp_path / "lora", use_dora=True)
    direct, mine = load(model), load(model)
    direct.load_lora_weights(str(file.parent))
    with with_lora(mine, file, 1.0, "tuned"):
        assert distance(draw(mine), draw(direct)) == 0
    with pytest.raises(UserError, match="DoRA"), NegativeGuidance(mine, negative=str(file)):
        pass
    assert adapter_state(mine) == {} and distance(draw(mine), draw(load(model))) < 1e-6


def test_a_text_encoder_part_is_used_for_drawing_and_left_out_of_guidance(model, tmp_path, capsys):
    file = kohya_file(model, tmp_path / "te.safetensors", text_encoder=True)
    direct, mine, base = load(model), load(model), draw(load(model))
    direct.load_lora_weights(str(tmp_path), weight_name=file.name)
    with with_lora(mine, file, 1.0, "tuned"):
        assert distance(draw(mine), draw(direct)) == 0
    assert distance(draw(mine), base) == 0
    with pytest.warns(UserWarning, match="part for text encoders, which is left out"):
        guided = NegativeGuidance(mine, negative=str(file), alpha=1.0, beta=0.0).__enter__()
    assert distance(draw(mine), base) < 1e-5
    guided.__exit__(None, None, None)
    assert distance(draw(mine), base) < 1e-6
    assert (
        cli.run(
            [
                "merge",
                "--model",
                str(model),
                "--inputs",
                str(file),
                "--output_dir",
                str(tmp_path / "m"),
            ]
        )
        == 2
    )
    assert "text encoders" in capsys.readouterr().err


def test_a_refused_lora_leaves_nothing_behind(model, tmp_path):
    file = kohya_file(model, tmp_path / "te.safetensors", text_encoder=True, denoiser=False)
    pipe, base = load(model), draw(load(model))
    with pytest.raises(UserError, match="no LoRA for the denoiser"):
        load_lora(pipe, file, "x", "--lora")
    assert distance(draw(pipe), base) == 0 and adapter_state(pipe) == {}


@pytest.mark.parametrize("alphas", [(4.0, 2.0), (1.0, 2.0, 4.0)])
def test_alphas_that_diffusers_would_mix_up_are_each_layers_own(alphas, model, tmp_path):
    file = kohya_file(model, tmp_path / "a.safetensors", alphas=alphas)
    pipe, tensors = load(model), load_file(file)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    load_lora(pipe, file, "x", "--lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after, changed = pipe.unet.state_dict(), 0
    for name, value in before.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in tensors:
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            change = float(tensors[f"{key}.alpha"]) / 4 * up @ down
            torch.testing.assert_close(after[name], value + change, rtol=1e-5, atol=1e-5)
            changed += 1
    assert changed == len([name for name in tensors if name.endswith(".alpha")]) > 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, model, tmp_path):
    file = peft_file(model, tmp_path / "lora")
    bad = renamed(file, tmp_path / "bad.safetensors", lambda name, tensor: (name, tensor * value))
    with pytest.raises(UserError, match="not finite"):
        load_lora(load(model), bad, "x", "--lora")


def test_half_a_pair_and_layers_of_another_model_are_refused(model, tmp_path):
    file = peft_file(model, tmp_path / "lora")
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file(
        {name: value for name, value in tensors.items() if name != first},
        tmp_path / "half.safetensors",
    )
    with pytest.raises(UserError, match="only one of the two matrices"):
        load_lora(load(model), tmp_path / "half.safetensors", "x", "--lora")
    extra = {f"unet.foreign.{i}.lora_{k}.weight": torch.ones(4, 4) for i in range(2) for k in "AB"}
    save_file({**tensors, **extra}, tmp_path / "more.safetensors")
    pipe = load(model)
    with pytest.raises(UserError, match="belongs to another model|holds no LoRA"):
        load_lora(pipe, tmp_path / "more.safetensors", "x", "--lora")
    assert adapter_state(pipe) == {}


def test_names_of_a_compiled_network_are_understood(model, tmp_path):
    file = peft_file(model, tmp_path / "lora")
    compiled = renamed(
        file,
        tmp_path / "c.safetensors",
        lambda name, tensor: (name.replace("unet.", "unet._orig_mod.", 1), tensor),
    )
    one, two = load(model), load(model)
    load_lora(one, file, "x", "--lora")
    load_lora(two, compiled, "x", "--lora")
    assert distance(draw(one), draw(two)) == 0


def test_several_files_in_a_folder_are_named(model, tmp_path):
    file = peft_file(model, tmp_path / "lora")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="holds several files .a.safetensors, b.safetensors"):
        load_lora(load(model), tmp_path, "x", "--lora")


def test_weights_of_adapters_are_those_of_their_own_alpha(model, tmp_path):
    file = peft_file(model, tmp_path / "lora", rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    other = kohya_file(model, tmp_path / "k.safetensors", text_encoder=True)
    pipe = load(model)
    pipe.load_lora_weights(str(file.parent), adapter_name="a")
    pipe.load_lora_weights(str(tmp_path), weight_name=other.name, adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    assert active_adapters(pipe.unet) == {"a": 0.5, "b": 0.25}
    assert adapter_state(pipe)["b"] == {"unet": 0.25, "text_encoder": 0.25}
    before = draw(pipe)
    with with_lora(pipe, file, 0.7, "tuned"):
        pass
    assert distance(draw(pipe), before) < 1e-4
    pipe.disable_lora()
    assert active_adapters(pipe.unet) == {}


class TestTraining:
    @pytest.mark.parametrize(
        "config", [LoHaConfig(target_modules=["to_q"]), LoKrConfig(target_modules=["to_q"])]
    )
    def test_other_adapters_are_refused(self, config, tmp_path):
        with pytest.raises(ConfigError, match="expected a LoraConfig"):
            make_trainer(tmp_path, peft_config=config).train()

    @pytest.mark.parametrize(
        "options",
        [
            {"bias": "all"},
            {"bias": "lora_only"},
            {"modules_to_save": ["conv_out"]},
            {"init_lora_weights": "pissa"},
        ],
    )
    def test_what_a_lora_file_cannot_hold_is_refused(self, options, tmp_path):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_trainer(
                tmp_path, peft_config=LoraConfig(target_modules=["to_q"], **options)
            ).train()

    @pytest.mark.parametrize("peft_config", [None, lora_config()])
    def test_a_pipeline_that_carries_adapters_is_refused(self, peft_config, model, tmp_path):
        pipe = load(model)
        load_lora(pipe, peft_file(model, tmp_path / "lora"), "x", "--lora")
        with pytest.raises(ConfigError, match="already carries adapters"):
            make_trainer(tmp_path / "run", model=pipe, peft_config=peft_config).train()

    @pytest.mark.parametrize("targets", ["(", "*", ["nothing"], ".*"])
    def test_targets_that_cannot_have_a_lora(self, targets, tmp_path):
        with pytest.raises(ConfigError, match="target_modules"):
            make_trainer(tmp_path, peft_config=LoraConfig(target_modules=targets)).train()

    def test_a_compiled_network_trains_saves_and_resumes(self, tmp_path):
        pipe = build_pipeline("sd")
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        make_trainer(tmp_path, model=pipe, max_steps=2).train()
        again = build_pipeline("sd")
        again.unet = torch.compile(again.unet, backend="eager")
        make_trainer(tmp_path, model=again, max_steps=3, resume_from_checkpoint="latest").train()
        assert StableDiffusionPipeline.from_pretrained(tmp_path).unet is not None


HUB = {
    "ann/usual": [FILE, "other.safetensors"],
    "ann/one": ["style.safetensors", "README.md"],
    "ann/two": ["a.safetensors", "b.safetensors"],
    "ann/none": ["README.md"],
}


@contextmanager
def hub(files: dict[str, list[str]], content: bytes) -> Iterator[str]:
    """The answers of a Hub that huggingface_hub asks for, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                names = files.get("/".join(parts[2:4]))
                listing = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name in names or []
                ]
                return self.answer(
                    200 if names else 404, json.dumps(listing).encode(), "RepoNotFound"
                )
            there = files.get("/".join(parts[:2]))
            if there is None or parts[-1] not in there:
                return self.answer(404, b"", "RepoNotFound" if there is None else "EntryNotFound")
            return self.answer(200, content)

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, error: str = "") -> None:
            self.send_response(status)
            headers = {
                "Content-Length": str(len(body)),
                "ETag": f'"{"1" * 40}"',
                "X-Repo-Commit": "2" * 40,
            }
            for name, value in {
                **headers,
                **({"X-Error-Code": error} if status == 404 else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def sample(model: Path, lora: str, folder: Path, **environment: str) -> tuple[int, str]:
    few = [
        "--prompt",
        "a cat",
        "--num_images",
        "1",
        "--num_inference_steps",
        "2",
        "--output_dir",
        str(folder),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "sample", "--model", str(model), "--lora", lora, *few],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.nightly
def test_a_lora_of_the_hub_is_looked_at_like_a_file(model, tmp_path):
    """Through the command, from a Hub on this machine, then from the cache alone."""
    home = {"HF_HOME": str(tmp_path / "home")}
    plain = peft_file(model, tmp_path / "plain").read_bytes()
    with hub(HUB, plain) as address:
        online = {**home, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        for number, name in enumerate(("ann/usual", "ann/one")):
            code, said = sample(model, name, tmp_path / f"out{number}", **online)
            assert code == 0, said
        code, said = sample(model, "ann/two", tmp_path / "two", **online)
        assert (
            code == 2
            and "holds several safetensors files (a.safetensors, b.safetensors)" in said
            and "Traceback" not in said
        )
        code, said = sample(model, "ann/none", tmp_path / "none", **online)
        assert code == 2 and "holds no safetensors file" in said
        code, said = sample(model, "ann/nobody", tmp_path / "nobody", **online)
        assert (
            code == 2 and "nor a LoRA on the Hub: 'ann/nobody'" in said and "Traceback" not in said
        )
    for name in ("ann/usual", "ann/one"):
        code, said = sample(
            model, name, tmp_path / f"cached-{name[-3:]}", **home, HF_HUB_OFFLINE="1"
        )
        assert code == 0, said
    code, said = sample(model, "ann/two", tmp_path / "away", **home, HF_HUB_OFFLINE="1")
    assert code == 2 and "nor a LoRA on the Hub" in said and "Traceback" not in said


@pytest.mark.nightly
def test_a_lora_of_the_hub_that_cannot_be_used_is_refused_by_name(model, tmp_path):
    loha = renamed(
        peft_file(model, tmp_path / "plain"),
        tmp_path / "loha.safetensors",
        lambda name, value: (name.replace("lora_A.weight", "hada_w1_a"), value),
    )
    with hub(HUB, loha.read_bytes()) as address:
        code, said = sample(
            model,
            "ann/usual",
            tmp_path / "out",
            HF_HOME=str(tmp_path / "home"),
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE="0",
        )
    assert code == 2 and "LoHa" in said and "Traceback" not in said
