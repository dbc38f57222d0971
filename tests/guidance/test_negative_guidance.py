"""Guidance with a negative model: the formula, the branches, rows, LoRAs and full
weights, and that the pipeline is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tiers import by_default
from tiny import all_tensors, build_pipeline, lora_config, make_trainer, pair_rows

from diffalign import FKSteering, NegativeGuidance, cli
from diffalign.backbones.lora import load_lora
from diffalign.errors import ConfigError, UserError
from diffalign.generation.guidance import guided, load_network, negative_weights

PROMPT = "a small red circle on the left of a gray background"
FAMILIES = ("sd", "sd_v", "sdxl", "sd3")


def draw(pipe: Any, scale: float = 3.0, steps: int = 3) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "height": 32,
        "width": 32,
        "output_type": "np",
    }
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images


def name_of(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def shaken(pipe: Any, seed: int, amount: float = 0.05) -> Any:
    """A copy of the pipeline's network with other weights."""
    network = copy.deepcopy(getattr(pipe, name_of(pipe)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two trained LoRAs of the tiny SD pipeline with different ranks and alphas."""
    folder = tmp_path_factory.mktemp("loras")
    for name, rank, alpha, method in (
        ("pos", 4, 8, "diffusion_dpo"),
        ("npo", 2, 6, "diffusion_npo"),
    ):
        make_trainer(
            folder / name,
            method=method,
            peft_config=lora_config(r=rank, alpha=alpha),
            max_steps=3,
            learning_rate=5e-2,
        ).train()
    return {name: folder / name for name in ("pos", "npo")}


def test_golden_values() -> None:
    base, pos, npo = (
        torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2.0], [1.5, 1.0], [0.5, 2.5])
    )
    expected = {
        (0, 1): [0.5, 2.5],
        (1, 1): [1.0, 1.5],
        (0.6, 1): [0.8, 1.9],
        (0.5, 0.5): [1.0, 1.75],
    }
    for (alpha, beta), value in expected.items():
        assert negative_weights(base, pos, npo, alpha, beta).tolist() == pytest.approx(value)
    assert guided(
        torch.tensor([0.4, -0.2]), torch.tensor([0.1, 0.1]), 7.5
    ).tolist() == pytest.approx([2.35, -2.15])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_branches_run_under_their_own_weights(family: str) -> None:
    """By hand: each half of every batch through the network it belongs to; the rows are
    those of ordinary guidance."""
    pipe = build_pipeline(family)
    name = name_of(pipe)
    positive, npo = shaken(pipe, 1), shaken(pipe, 2)
    base = getattr(pipe, name)
    negative = copy.deepcopy(base)
    negative.load_state_dict(
        {
            n: w + 0.5 * (positive.state_dict()[n] - w) + 0.8 * (npo.state_dict()[n] - w)
            for n, w in base.state_dict().items()
        }
    )
    rows: list[int] = []
    for network in (positive, negative):
        network.register_forward_pre_hook(
            lambda m, a, k: rows.append((a[0] if a else k["hidden_states"]).shape[0]),
            with_kwargs=True,
        )

    class Both(torch.nn.Module):
        def __getattr__(self, item: str) -> Any:
            return getattr(base, item)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            def half(x: Any, part: slice) -> Any:
                return x[part] if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 2 else x

            def pick(value: Any, part: slice) -> Any:
                if isinstance(value, dict):
                    return {k: pick(v, part) for k, v in value.items()}
                return half(value, part)

            outs = [
                net(*[half(a, part) for a in args], **pick(kwargs, part))[0]
                for net, part in ((negative, slice(0, 1)), (positive, slice(1, 2)))
            ]
            return (torch.cat(outs),)

    by_hand = copy.copy(pipe)
    by_hand_network = Both()
    original = base.forward
    base.forward = by_hand_network.forward
    expected = draw(by_hand)
    base.forward = original
    counted = len(rows)
    guidance = NegativeGuidance(pipe, positive=positive, negative=npo, alpha=0.5, beta=0.8)
    found = guidance and draw_with(guidance)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert counted == 6 and np.abs(expected - draw(pipe)).max() > 1e-3


def draw_with(guidance: NegativeGuidance, scale: float = 3.0) -> np.ndarray:
    with guidance:
        return draw(guidance.pipe, scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_model_equal_to_the_base_is_ordinary_guidance(family: str) -> None:
    pipe = build_pipeline(family)
    plain = draw(pipe)
    same = copy.deepcopy(getattr(pipe, name_of(pipe)))
    np.testing.assert_allclose(
        draw_with(NegativeGuidance(pipe, negative=same)), plain, rtol=0, atol=1e-5
    )
    assert "forward" not in vars(getattr(pipe, name_of(pipe)))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_without_guidance_only_the_positive_network_runs(scale: float) -> None:
    pipe = build_pipeline("sd")
    found = draw_with(NegativeGuidance(pipe, negative=shaken(pipe, 3)), scale)
    np.testing.assert_array_equal(found, draw(pipe, scale))


def test_loras_share_one_network_and_equal_merged_weights(loras: dict[str, Path]) -> None:
    """One base under two adapters against two networks with those weights fused in."""

    def fused(*parts: tuple[str, float]) -> Any:
        other = build_pipeline("sd")
        for name, _ in parts:
            other.load_lora_weights(str(loras[name]), adapter_name=name)
        other.set_adapters([name for name, _ in parts], [weight for _, weight in parts])
        other.fuse_lora()
        other.unload_lora_weights()
        return other.unet

    pipe = build_pipeline("sd")
    before = all_tensors(pipe.unet)
    found = draw_with(
        NegativeGuidance(pipe, positive=loras["pos"], negative=loras["npo"], alpha=0.6, beta=0.9)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), all_tensors(pipe.unet).values(), strict=True)
    )
    reference = build_pipeline("sd")
    positive, npo = fused(("pos", 1.0)), fused(("npo", 1.0))
    expected = draw_with(
        NegativeGuidance(reference, positive=positive, negative=npo, alpha=0.6, beta=0.9)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert np.abs(found - draw(pipe)).max() > 1e-3


def test_a_lora_that_is_already_active_is_the_positive_branch(loras: dict[str, Path]) -> None:
    pipe = build_pipeline("sd")
    pipe.load_lora_weights(str(loras["pos"]), adapter_name="mine")
    pipe.set_adapters(["mine"], [0.7])
    plain = draw(pipe)
    guidance = NegativeGuidance(pipe, negative=loras["npo"])
    found = draw_with(guidance)
    assert pipe.get_active_adapters() == ["mine"] and list(pipe.unet.peft_config) == ["mine"]
    np.testing.assert_array_equal(draw(pipe), plain)
    assert np.abs(found - plain).max() > 1e-4
    # beta 0 and alpha 1: both branches are the positive model
    np.testing.assert_allclose(
        draw_with(NegativeGuidance(pipe, negative=loras["npo"], beta=0.0)), plain, rtol=0, atol=1e-5
    )


def test_everything_is_put_back_after_an_error(loras: dict[str, Path]) -> None:
    pipe = build_pipeline("sd")
    plain = draw(pipe)
    with pytest.raises(RuntimeError, match="stop"), NegativeGuidance(pipe, negative=loras["npo"]):
        raise RuntimeError("stop")
    np.testing.assert_array_equal(draw(pipe), plain)
    with (
        pytest.raises(UserError, match="negative: there is no file or folder"),
        NegativeGuidance(pipe, negative=loras["npo"].parent / "none"),
    ):
        pass
    assert "forward" not in vars(pipe.unet)
    guidance = NegativeGuidance(pipe, negative=loras["npo"])
    with guidance, pytest.raises(UserError, match="on already"), guidance:
        pass


def test_mistakes(loras: dict[str, Path], tmp_path: Path) -> None:
    pipe = build_pipeline("sd")
    with pytest.raises(ConfigError, match="negative: name a negative LoRA"):
        NegativeGuidance(pipe)
    with pytest.raises(ConfigError, match="alpha: expected a number"):
        NegativeGuidance(pipe, negative=loras["npo"], alpha=float("nan"))
    with pytest.warns(UserWarning, match=r"beta: 1.5 lies outside \[0, 1\]"):
        NegativeGuidance(pipe, negative=loras["npo"], beta=1.5)
    with pytest.raises(UserError, match="negative: a SD3Transformer2DModel cannot be combined"):
        NegativeGuidance(pipe, negative=build_pipeline("sd3").transformer)
    with pytest.raises(UserError, match="negative: "):
        NegativeGuidance(pipe, negative=build_pipeline("sdxl").unet)
    with pytest.raises(UserError, match="one is a LoRA and the other a network"):
        NegativeGuidance(pipe, positive=loras["pos"], negative=shaken(pipe, 1))
    with pytest.raises(UserError, match="has no classifier-free guidance"):
        NegativeGuidance(object(), negative=loras["npo"])
    v_model = build_pipeline("sd_v")
    v_model.save_pretrained(tmp_path / "v")
    with pytest.raises(UserError, match="it predicts v_prediction, the pipeline's model epsilon"):
        load_network(pipe, tmp_path / "v")
    pipe.save_pretrained(tmp_path / "same")
    assert (
        np.abs(
            draw_with(NegativeGuidance(pipe, negative=load_network(pipe, tmp_path / "same")))
            - draw(pipe)
        ).max()
        < 1e-5
    )


def test_loras_with_other_targets_keep_every_layer(loras: dict[str, Path], tmp_path: Path) -> None:
    """Attention and convolution in one file beside attention only in the other: equal
    to weights fused one at a time."""
    other = lora_config(r=2, alpha=6, target_modules=["to_q", "to_k", "conv_in"])
    make_trainer(tmp_path / "other", peft_config=other, max_steps=3, learning_rate=5e-2).train()

    def fused(path: Path) -> Any:
        pipe = build_pipeline("sd")
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe.unet

    pipe = build_pipeline("sd")
    with NegativeGuidance(pipe, positive=tmp_path / "other", negative=loras["npo"]):
        held = [
            n
            for n, m in pipe.unet.named_modules()
            if "guidance_positive" in getattr(m, "lora_A", {})
        ]
        assert "conv_in" in held and any("to_q" in name for name in held)
        found = draw(pipe)
    expected = draw_with(
        NegativeGuidance(
            build_pipeline("sd"), positive=fused(tmp_path / "other"), negative=fused(loras["npo"])
        )
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_the_sample_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_trainer(
        tmp_path / "npo",
        model="shapes",
        method="diffusion_npo",
        rows=pair_rows(4, 64),
        peft_config=lora_config(),
        max_steps=1,
        data={"resolution": 64},
    ).train()
    arguments = [
        "sample",
        "--prompt",
        PROMPT,
        "--num_images",
        "1",
        "--num_inference_steps",
        "2",
        "--negative_lora",
        str(tmp_path / "npo"),
    ]
    assert cli.run([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").is_file() and len(
        list((tmp_path / "out").glob("*-tuned.png"))
    ) == 1
    assert (
        cli.run(
            [
                *arguments[:-1],
                str(tmp_path / "missing"),
                "--output_dir",
                str(tmp_path / "out-missing"),
            ]
        )
        == 2
    )
    assert "there is no file or folder" in capsys.readouterr().err
    build_pipeline("sd").save_pretrained(tmp_path / "other")
    assert (
        cli.run(
            [*arguments[:-1], str(tmp_path / "other"), "--output_dir", str(tmp_path / "out-other")]
        )
        == 2
    )
    assert "negative: " in capsys.readouterr().err
    from diffalign.generation.pipelines import base_pipeline

    base_pipeline().save_pretrained(tmp_path / "same")
    assert (
        cli.run([*arguments[:-1], str(tmp_path / "same"), "--output_dir", str(tmp_path / "full")])
        == 0
    )
    base, tuned = (
        Image.open(next((tmp_path / "full").glob(f"*-{side}.png"))) for side in ("base", "tuned")
    )
    assert (
        np.abs(np.asarray(base, float) - np.asarray(tuned, float)).max() <= 1
    )  # the base against itself: ordinary guidance


def shake_adapters(network: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapters_of(pipe: Any) -> dict[str, Any]:
    """Names of weights, adapters, scales, what is active and what trains."""
    network, facts = getattr(pipe, name_of(pipe)), {}
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            facts[name] = (
                layer.active_adapters,
                layer.disable_adapters,
                dict(layer.scaling),
                sorted(layer.lora_A),
            )
    trains = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    return {
        "names": list(network.state_dict()),
        "layers": facts,
        "trains": trains,
        "attributes": sorted(vars(network)),
    }


@by_default()
@pytest.mark.parametrize("carried", ["nothing", "active", "two", "disabled", "pattern"])
@pytest.mark.parametrize("ends", ["well", "inside", "before"])
def test_adapters_names_and_scales_are_as_before(
    carried: str, ends: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    pipe = build_pipeline("sd")
    if carried == "pattern":
        config = lora_config(
            r=4, alpha=6, alpha_pattern={"to_q": 11}, target_modules=["to_q", "to_v"]
        )
        pipe.unet.add_adapter(config, "mine")
        shake_adapters(pipe.unet)
    elif carried != "nothing":
        pipe.load_lora_weights(str(loras["pos"]), adapter_name="mine")
        pipe.set_adapters(["mine"], [0.3])
    if carried == "two":
        pipe.load_lora_weights(str(loras["npo"]), adapter_name="other")
        pipe.set_adapters(["mine", "other"], [0.1, 0.7])
    if carried == "disabled":
        pipe.disable_lora()
    before, plain = adapters_of(pipe), draw(pipe)
    guidance = NegativeGuidance(
        pipe, negative=loras["npo"] if ends != "before" else tmp_path / "none"
    )
    if ends == "well":
        assert np.abs(draw_with(guidance) - plain).max() > 1e-5
    elif ends == "inside":
        with pytest.raises(ValueError), guidance:
            pipe(PROMPT, num_inference_steps=2, callback_on_step_end=lambda *_: int("no number"))
    else:
        with pytest.raises(UserError), guidance:
            pass
    assert adapters_of(pipe) == before
    np.testing.assert_array_equal(draw(pipe), plain)
    if carried in ("nothing", "disabled"):  # full weights afterwards, on the same pipeline
        draw_with(NegativeGuidance(pipe, negative=shaken(build_pipeline("sd"), 3)))


def test_a_disabled_lora_has_no_part(loras: dict[str, Path]) -> None:
    pipe = build_pipeline("sd")
    expected = draw_with(NegativeGuidance(pipe, negative=loras["npo"]))
    pipe.load_lora_weights(str(loras["pos"]), adapter_name="mine")
    pipe.disable_lora()
    np.testing.assert_allclose(
        draw_with(NegativeGuidance(pipe, negative=loras["npo"])), expected, rtol=0, atol=1e-6
    )


def test_fused_adapters_that_are_still_loaded_are_refused(loras: dict[str, Path]) -> None:
    """peft would ignore the negative LoRA in silence."""
    pipe = build_pipeline("sd")
    pipe.load_lora_weights(str(loras["pos"]), adapter_name="mine")
    pipe.fuse_lora()
    guidance = NegativeGuidance(pipe, negative=loras["npo"])
    with (
        pytest.raises(
            UserError, match="'mine' is fused into the pipeline's weights.*unload_lora_weights"
        ),
        guidance,
    ):
        pass
    with pytest.raises(UserError, match="'mine' is fused"):
        load_lora(pipe, loras["npo"], "more", "--lora")
    pipe.unload_lora_weights()
    assert np.abs(draw_with(guidance) - draw(pipe)).max() > 1e-5


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_other_kinds_of_adapters_are_refused(kind: str, loras: dict[str, Path]) -> None:
    pipe = build_pipeline("sd")
    config = {"LoHa": LoHaConfig, "LoKr": LoKrConfig}[kind](
        r=2, target_modules=["to_q"], init_weights=False
    )
    pipe.unet.add_adapter(config, "mine")
    with (
        pytest.raises(UserError, match=f"'mine' on the pipeline is a {kind}.*fuse it first"),
        NegativeGuidance(pipe, negative=loras["npo"]),
    ):
        pass
    with pytest.raises(UserError, match="cannot be combined with LoRAs that are active"):
        NegativeGuidance(pipe, negative=shaken(build_pipeline("sd"), 1))


@pytest.mark.parametrize("size", [None, 2])
def test_perturbed_attention_runs_under_the_positive_weights(size: int | None) -> None:
    """Three branches in one batch, whose attention layers divide it: against one pass
    per branch by hand."""
    parts = build_pipeline("sd")
    pipe = StableDiffusionPAGPipeline(**parts.components, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    npo = shaken(pipe, 2)
    call = {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "pag_scale": 3.0,
        "height": 32,
        "width": 32,
    }
    if size is not None:
        steering = FKSteering(
            pipe,
            lambda images, prompts: [0.0] * len(images),
            num_particles=2,
            resample_steps=(),
            lmbda=1.0,
            model_batch_size=size,
        )
        with pytest.raises(
            ConfigError, match="model_batch_size: perturbed-attention guidance needs all 6 rows"
        ):
            steering(PROMPT, seed=0, **call)
        return
    negative, base = copy.deepcopy(npo), pipe.unet
    expected = []
    for seed in (0, 1):
        pipe.scheduler.set_timesteps(2)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        pos, neg = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        plain = base.attn_processors
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                text, empty = base(latents, t, pos)[0], negative(latents, t, neg)[0]
                pipe._set_pag_attn_processor(
                    pag_applied_layers=["mid"], do_classifier_free_guidance=False
                )
                perturbed = base(torch.cat([latents] * 2), t, torch.cat([pos] * 2))[0][1:]
                base.set_attn_processor(dict(plain))
                output = empty + 5.0 * (text - empty) + 3.0 * (text - perturbed)
                latents = pipe.scheduler.step(output, t, latents)[0]
        expected.append(latents)
    with NegativeGuidance(pipe, negative=npo):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        found = pipe([PROMPT] * 2, generator=generators, output_type="latent", **call).images
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_calls_its_network_once_per_branch_is_refused() -> None:
    class Separate(StableDiffusionPipeline):
        def __call__(self, prompt: str) -> Any:  # as Chroma, Z-Image and Wan do
            self._guidance_scale = 5.0
            positive, negative = self.encode_prompt([prompt] * 2, "cpu", 1, True)
            return [
                self.unet(torch.randn(2, 4, 16, 16), 5, part)[0] for part in (negative, positive)
            ]

    parts = build_pipeline("sd")
    pipe = Separate(**parts.components, requires_safety_checker=False)
    with pytest.raises(
        UserError,
        match="expected the 2 guidance branches of 2 images in one batch, got 2 rows; Separate "
        "cannot",
    ):
        NegativeGuidance(pipe, negative=shaken(pipe, 1))(PROMPT)
