"""The weights a run reaches depend on the data and the settings, not on how the work is
cut, cached or repeated."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import torchrun
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import (
    assert_close_tensors,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    picture,
    trained_tensors,
)

from diffalign.backbones.base import ATTENTION_TARGETS
from diffalign.training.callbacks import TrainerCallback
from diffalign.training.reference import FrozenCopyReference

SCRIPT = Path(__file__).with_name("script.py")
# Adam divides by the gradient's size; a large epsilon keeps it from magnifying the
# rounding of gradients near zero.
STEADY: dict[str, Any] = {"adam_epsilon": 1e-3}


def train(folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def weights(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return trained_tensors(train(folder, **options))


class Batches(TrainerCallback):
    """Records (row, time, noise) of everything that is trained on."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = kwargs["trainer"]
        prepare = trainer.prepare

        def recording(batch: Any) -> Any:
            self.draws += zip(batch.row_ids, batch.times.tolist(), batch.noise, strict=True)
            return prepare(batch)

        trainer.prepare = recording


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_accumulated_passes_are_one_batch(tmp_path: Path, lora: bool) -> None:
    peft_config = lora_config() if lora else None
    whole = weights(
        tmp_path / "a", peft_config=peft_config, per_device_train_batch_size=4, **STEADY
    )
    parts = weights(
        tmp_path / "b",
        peft_config=peft_config,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **STEADY,
    )
    assert_close_tensors(parts, whole, rtol=1e-4, atol=1e-6)
    start = dict(build_pipeline("sd").unet.named_parameters())
    assert lora or max(float((whole[n] - start[n].detach()).abs().max()) for n in whole) > 1e-4


def test_draws_of_a_row_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    seen = {}
    for size in (1, 4):
        recorder = Batches()
        make_trainer(
            tmp_path / str(size), per_device_train_batch_size=size, max_steps=8 // size,
            proportion_empty_prompts=0.5, options={"callbacks": [recorder]}
        ).train()  # fmt: skip
        seen[size] = recorder.draws
    assert sorted(row for row, _, _ in seen[1]) == list(range(8))
    for (row, time, noise), (other_row, other_time, other_noise) in zip(
        seen[1], seen[4], strict=True
    ):
        assert (row, time) == (other_row, other_time)
        assert torch.equal(noise, other_noise)


def test_two_processes_are_one_process(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.yaml").write_text("# dataset fingerprint 0\n# moved aside once\n")
    done = torchrun(SCRIPT, "plain", tmp_path / "two", 2, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 groups x 1 passes x 2 processes = 4 per optimizer step" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two", "two.old-1"]
    one = train(
        tmp_path / "one", per_device_train_batch_size=4, use_ema=True, ema_decay=0.5, **STEADY
    )
    found = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = load_file(tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_close_tensors(found, expected, rtol=1e-4, atol=1e-6)
    lines = [
        json.loads(line)
        for line in (tmp_path / "two" / "logs" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == len(one.state.log_history) == 3
    for there, here in zip(lines, one.state.log_history, strict=True):
        for name, value in there.items():
            assert value == pytest.approx(here[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_caches_change_nothing_and_spare_the_encoders(tmp_path: Path, family: str) -> None:
    build_pipeline(family).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {
        "peft_config": lora_config(target_modules=ATTENTION_TARGETS),
        "per_device_train_batch_size": 2,
        "proportion_empty_prompts": 0.4,
        **STEADY,
    }
    caches = {
        "cache_latents": str(tmp_path / "latents"),
        "cache_text_embeddings": str(tmp_path / "prompts"),
    }
    plain = weights(tmp_path / "off", family=family, model=str(tmp_path / "model"), **options)
    filling = train(
        tmp_path / "fill", family=family, model=str(tmp_path / "model"), data=caches, **options
    )
    assert_close_tensors(trained_tensors(filling), plain, rtol=1e-5, atol=1e-6)
    full = train(
        tmp_path / "full", family=family, model=str(tmp_path / "model"), data=caches, **options
    )
    assert_same_tensors(trained_tensors(full), trained_tensors(filling))
    assert not any(
        full.backbone.is_loaded(name) for name in ("vae", *full.backbone.text_encoder_names)
    )
    assert all("0 encoded now" in note for note in full.notes)


def test_caches_ask_for_repeatable_pixels(tmp_path: Path) -> None:
    from diffalign.errors import ConfigError

    with pytest.raises(ConfigError, match="data.cache_latents"):
        make_trainer(
            tmp_path / "run", data={"cache_latents": str(tmp_path / "cache"), "random_flip": True}
        )


def test_adapters_off_are_the_frozen_copy(tmp_path: Path) -> None:
    trainer = train(
        tmp_path / "run",
        peft_config=lora_config(),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
    )
    copy = FrozenCopyReference(build_pipeline("sd").unet, trainer.accelerator.device)
    batch = first_batch(trainer)
    adapters_off = trainer.reference_errors(batch)
    policy, _ = trainer.errors(batch)
    trainer.reference.forward = functools.partial(copy.predict, trainer.backbone)
    torch.testing.assert_close(trainer.reference_errors(batch), adapters_off, rtol=1e-6, atol=1e-7)
    assert float((policy.detach() - adapters_off).abs().max()) > 1e-5
    layers = [layer for layer in trainer.network.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)


def test_another_reference_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, peft_config=lora_config(), options={"ref_model": build_pipeline("sd", seed=1)}
    )
    batch = first_batch(trainer)
    policy, reference = trainer.errors(batch)
    assert not torch.equal(policy, reference)
    other = build_pipeline("sd")
    other.unet = build_pipeline("sd", seed=1).unet
    own = make_trainer(tmp_path / "other", model=other, peft_config=lora_config())
    torch.testing.assert_close(own.errors(first_batch(own))[0], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_precomputed_reference_errors_change_nothing_and_are_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "peft_config": lora_config(),
        "use_ema": False,
    }
    plain = weights(tmp_path / "a", **options)
    ahead = train(tmp_path / "b", precompute_ref_errors=True, ref_error_draws=2, **options)
    assert_close_tensors(trained_tensors(ahead), plain, rtol=1e-3, atol=1e-5)
    assert "reference errors: 2 draws per row, computed" in ahead.notes
    again = make_trainer(
        tmp_path / "b", precompute_ref_errors=True, ref_error_draws=2, save_steps=4, **options
    )
    again.setup()
    again.precompute_reference_errors()
    assert "reference errors: 2 draws per row, read back" in again.notes
    changed = make_trainer(
        tmp_path / "b", precompute_ref_errors=True, ref_error_draws=2, noise_offset=0.1, **options
    )
    changed.setup()
    changed.precompute_reference_errors()
    assert "reference errors: 2 draws per row, computed" in changed.notes


def test_few_precomputed_draws_come_round(tmp_path: Path) -> None:
    recorder = Batches()
    train(
        tmp_path,
        rows=pair_rows(2),
        max_steps=6,
        precompute_ref_errors=True,
        ref_error_draws=2,
        options={"callbacks": [recorder]},
    )
    times = {row: [time for other, time, _ in recorder.draws if other == row] for row in (0, 1)}
    for draws in times.values():
        assert draws[2] == draws[0] != draws[1]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradient_checkpointing_gives_equal_weights(tmp_path: Path, lora: bool) -> None:
    peft_config = lora_config() if lora else None
    plain = weights(tmp_path / "a", peft_config=peft_config, **STEADY)
    saving = weights(tmp_path / "b", peft_config=peft_config, gradient_checkpointing=True, **STEADY)
    assert_close_tensors(saving, plain, rtol=1e-4, atol=1e-6)


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "peft_config": lora_config(dropout=0.2),
        "per_device_train_batch_size": 2,
    }
    first, second = weights(tmp_path / "a", **options), weights(tmp_path / "b", **options)
    assert_same_tensors(first, second)
    other = weights(tmp_path / "c", seed=1, **options)
    assert any(not torch.equal(other[name], first[name]) for name in first)


def test_a_dry_run_does_not_move_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"peft_config": lora_config(), "per_device_train_batch_size": 2}
    plain = weights(tmp_path / "a", **options)
    trainer = make_trainer(tmp_path / "b", **options)
    trainer.dry_run()
    trainer.train()
    assert_same_tensors(trained_tensors(trainer), plain)


def test_kept_ties_do_not_train(tmp_path: Path) -> None:
    rows = [
        {
            "jpg_0": picture(40, i),
            "jpg_1": picture(200, i),
            "label_0": 0.5,
            "label_1": 0.5,
            "caption": "a star",
        }
        for i in range(2)
    ]
    rows += [
        {
            "jpg_0": picture(40, i),
            "jpg_1": picture(200, i),
            "label_0": 0.0,
            "label_1": 1.0,
            "caption": "a star",
        }
        for i in range(2)
    ]
    recorder = Batches()
    trainer = train(
        tmp_path / "a",
        rows=rows[:3],
        data={"ties": "keep"},
        max_steps=1,
        per_device_train_batch_size=3,
        max_grad_norm=None,
        options={"callbacks": [recorder]},
    )
    batch = first_batch(
        make_trainer(
            tmp_path / "b", rows=rows[:3], data={"ties": "keep"}, per_device_train_batch_size=3
        )
    )
    assert sorted(zip(batch.row_ids, batch.weights.tolist(), strict=True)) == [
        (0, 0.0),
        (1, 0.0),
        (2, 1.0),
    ]
    assert trainer.state.global_step == 1
    alone = make_trainer(
        tmp_path / "c",
        rows=rows[:2] + rows[3:],
        data={"ties": "keep"},
        max_steps=1,
        per_device_train_batch_size=3,
    )
    whole = first_batch(alone)
    loss, _ = alone.compute_loss(whole)
    (loss * whole.weights).mean().backward()
    keep = whole.weights.bool()
    with_ties = {n: p.grad.clone() for n, p in alone.network.named_parameters()}
    alone.network.zero_grad()
    loss, _ = alone.compute_loss(whole)
    (loss[keep].sum() / len(loss)).backward()
    for name, parameter in alone.network.named_parameters():
        torch.testing.assert_close(parameter.grad, with_ties[name])


def test_turbo_trains_on_a_schedule_that_ends_in_noise(tmp_path: Path) -> None:
    """Batches at 249, 499, 749 and 999 are noised with the rescaled schedule; the
    sampler's own stays as it is."""
    trainer = make_trainer(
        tmp_path,
        "sdxl",
        peft_config=lora_config(),
        timestep_sampling="turbo",
        per_device_train_batch_size=8,
        snr_gamma=5.0,
    )
    batch = first_batch(trainer)
    assert set(batch.times.tolist()) <= {249, 499, 749, 999}
    assert (
        float(trainer.noising.alphas_cumprod[-1]) == 0
        and float(trainer.schedule.alphas_cumprod[-1]) > 0
    )
    seen: list[torch.Tensor] = []
    predict = trainer.backbone.predict

    def watched(network: Any, noisy: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(noisy)
        return predict(network, noisy, *args)

    trainer.backbone.predict = watched
    loss, _ = trainer.compute_loss(batch)
    assert loss.isfinite().all()
    alpha, sigma = (
        c.repeat_interleave(2)[:, None, None, None]
        for c in trainer.noising.alpha_sigma(batch.times)
    )
    expected = alpha * batch.x0.flatten(0, 1) + sigma * batch.noise.flatten(0, 1)
    torch.testing.assert_close(seen[0].double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["default", "DPMSolverMultistepScheduler"])
def test_a_rollout_that_does_not_fit_is_halved_and_stays_the_same(
    tmp_path: Path, solver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network without memory for more than three rows."""
    images = {}
    for most in (100, 3, 1):
        trainer = make_trainer(
            tmp_path / str(most), "sd", "diffusion_nft", peft_config=lora_config(), solver=solver,
            images_per_prompt=4, per_device_train_batch_size=2, rollout_batch_size=8,
            eta=1.0 if solver == "default" else 0.0,
        )  # fmt: skip
        trainer.setup()
        predict = trainer.old_policy.predict

        def small(
            noisy: Any, times: Any, condition: Any, most: int = most, run: Any = predict
        ) -> Any:
            if len(noisy) > most:
                raise torch.OutOfMemoryError("no memory")
            return run(noisy, times, condition)

        trainer.old_policy.predict = small
        batch = next(trainer.source.unsampled(trainer.data_pipeline))
        scored: list[int] = []
        drawn = trainer.rollout(
            trainer.old_policy.predict, batch, 4, None,
            on_images=lambda first, pictures, scored=scored: scored.append(len(pictures)),
        )  # fmt: skip
        images[most] = drawn.final
        assert sum(scored) == 8 and max(scored) == trainer.rollout.batch_size
    assert "8 images at once do not fit" in capsys.readouterr().err
    torch.testing.assert_close(images[3], images[100], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images[1], images[100], rtol=1e-4, atol=1e-5)

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        trainer.rollout(never, batch, 4, None)
