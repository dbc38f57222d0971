"""The loop and what surrounds it: order of the data, metrics, guards, precision,
buckets, validation, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiers import by_default
from tiny import (
    FAMILIES,
    all_tensors,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    picture,
    trained_tensors,
)

from diffalign import ValidationConfig
from diffalign.errors import ConfigError
from diffalign.runtime.seeds import row_seed
from diffalign.training.callbacks import TrainerCallback
from diffalign.training.diagnostics import (
    DivergenceGuard,
    NonFiniteLoss,
    beta_message,
    pair_metrics,
)
from diffalign.training.row_order import PositionSampler, RowOrder
from diffalign.training.tracking import MetricWindow


def test_row_order_is_one_permutation_per_epoch() -> None:
    order = RowOrder(7, seed=3)
    epochs = [[order[epoch * 7 + i] for i in range(7)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * 7
        assert sorted(index for _, index in epoch) == list(range(7))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3
    again = RowOrder(7, seed=3)
    assert [again[p] for p in (20, 3, 11)] == [order[p] for p in (20, 3, 11)]
    assert [RowOrder(7, seed=4)[p] for p in range(7)] != epochs[0]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_row_order_keeps_buckets_apart(chunk: int) -> None:
    buckets = [0, 0, 0, 0, 0, 1, 1, 2]
    order = RowOrder(8, 0, buckets, chunk)
    assert order.length % chunk == 0
    for epoch in range(2):
        positions = [order[epoch * order.length + i][1] for i in range(order.length)]
        assert set(positions) == set(range(8))
        for start in range(0, order.length, chunk):
            assert len({buckets[i] for i in positions[start : start + chunk]}) == 1


def test_positions_of_all_processes_are_those_of_one() -> None:
    order = RowOrder(5, seed=0)
    one = iter(PositionSampler(order, 4, 4, 0, 1))
    two = [iter(PositionSampler(order, 4, 2, rank, 2)) for rank in (0, 1)]
    single = iter(PositionSampler(order, 4, 1, 0, 1))
    for _ in range(4):
        whole = next(one)
        assert next(two[0]) + next(two[1]) == whole
        assert [row for _ in range(4) for row in next(single)] == whole
    assert next(iter(PositionSampler(order, 12, 4, 0, 1))) == [order[12 + i] for i in range(4)]


def test_seeds_of_rows_epochs_and_purposes_differ() -> None:
    seeds = {
        row_seed(s, r, e, p)
        for s in (0, 1)
        for r in range(5)
        for e in range(3)
        for p in ("noise", "order", "transform")
    }
    assert len(seeds) == 2 * 5 * 3 * 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, 1, 2, "noise") == row_seed(0, 1, 2, "noise")


def test_metric_window_averages_what_applies() -> None:
    window = MetricWindow()
    window.add(
        {
            "a": torch.tensor([1.0, math.nan, 3.0]),
            "b": torch.tensor([math.nan]),
            "c": torch.tensor(2.0),
        }
    )
    window.add({"a": torch.tensor([5.0]), "b": torch.tensor([math.nan])})
    result = window.reduce(Accelerator())
    assert result["a"] == 3.0 and result["c"] == 2.0 and math.isnan(result["b"])
    assert window.reduce(Accelerator()) == {}
    window.add({"a": torch.tensor([math.inf, 1.0])})
    assert math.isinf(window.reduce(Accelerator())["a"])


def test_metrics_that_do_not_apply_are_not_logged(tmp_path: Path) -> None:
    make_trainer(tmp_path, peft_config=lora_config(), max_steps=2).train()
    entries = [
        json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    ]
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values())
        thirds = [name for name in entry if name.startswith("change/chosen/")]
        assert len(thirds) == 1  # one pair, one timestep
        assert entry[thirds[0]] == entry["change/chosen"]
    assert entries[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entries[0]["train/grad_norm"] > 0 and entries[0]["train/lr"] == pytest.approx(1e-3)


def test_pair_metrics_by_third() -> None:
    errors, reference = torch.tensor([[0.1, 0.2]] * 3), torch.tensor([[0.2, 0.1]] * 3)
    metrics = pair_metrics(errors, reference, 10, torch.tensor([0.0, 0.5, 1.0]))
    for index, third in enumerate(("low_noise", "mid_noise", "high_noise")):
        values = metrics[f"change/chosen/{third}"]
        assert values.isnan().tolist() == [i != index for i in range(3)]
        assert float(values[index]) == pytest.approx(-0.1)
    assert metrics["saturated"].tolist() == [0.0] * 3
    assert pair_metrics(errors, reference, 5000, torch.zeros(3))["saturated"].tolist() == [1.0] * 3


def test_divergence_guard_speaks_once_per_episode() -> None:
    said: list[str] = []
    guard = DivergenceGuard(3, said.append)
    rises = [0.1, 0.1, -0.1, 0.1, 0.1, 0.1, 0.1, math.nan, -0.2, 0.1, 0.1, 0.1]
    diverged = [guard.update({"change/chosen": value}, step) for step, value in enumerate(rises)]
    assert diverged == [False] * 5 + [True, True] + [False] * 4 + [True]
    assert len(said) == 2 and "step 5" in said[0] and "lower the learning rate" in said[0]
    assert guard.update({}, 20) is False
    guard = DivergenceGuard(1, said.append)
    little = {"change/chosen": 0.019, "errors/ref_chosen": 0.2}
    assert [guard.update(little | {"change/chosen": c}, 0) for c in (0.019, 0.021)] == [False, True]


class Worsen(TrainerCallback):
    """Turns the policy away from the chosen images after the first step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in kwargs["trainer"].network.parameters():
                parameter.add_(0.3 * torch.ones_like(parameter))


def test_divergence_stops_a_run_that_asks_for_it(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=9,
        divergence_patience=2,
        stop_on_divergence=True,
        options={"callbacks": [Worsen()]},
    )
    output = trainer.train()
    assert output.global_step < 9
    assert (tmp_path / f"checkpoint-{output.global_step}").is_dir()


def test_a_loss_that_is_not_finite_names_rows_and_timesteps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2)
    trainer.setup()
    builder, poisoned = trainer.data_pipeline.builder, {}

    def poison(examples: Any) -> Any:
        batch = builder(examples)
        batch.x0[1, 0, 0, 0, 0] = math.nan
        poisoned.update(row=batch.row_ids[1], time=float(batch.times[1]))
        return batch

    trainer.data_pipeline.builder = poison
    with pytest.raises(NonFiniteLoss) as error:
        trainer.train()
    assert (
        f"step 1: the loss is not finite for dataset rows [{poisoned['row']}] at timesteps "
        f"[{poisoned['time']}]" in str(error.value)
    )
    assert_same_tensors(all_tensors(trainer.network), all_tensors(build_pipeline("sd").unet))


@by_default()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_bf16_keeps_trainable_weights_and_errors_in_float32(
    tmp_path: Path, family: str, lora: bool
) -> None:
    trainer = make_trainer(
        tmp_path,
        family,
        peft_config=lora_config() if lora else None,
        mixed_precision="bf16",
        per_device_train_batch_size=2,
    )
    trainer.train()
    trainer.setup()  # takes the pipeline again
    assert {tensor.dtype for tensor in trained_tensors(trainer).values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in trained_tensors(trainer).values())
    base = {p.dtype for n, p in trainer.network.named_parameters() if not p.requires_grad}
    assert base == ({torch.bfloat16} if lora else set())
    policy, reference = trainer.errors(first_batch(trainer))
    assert policy.dtype == reference.dtype == torch.float32
    assert torch.isfinite(policy).all() and torch.isfinite(reference).all()
    assert all(math.isfinite(entry["train/loss"]) for entry in trainer.state.log_history)


def test_bf16_errors_are_near_float32(tmp_path: Path) -> None:
    found = {}
    for precision in ("no", "bf16"):
        trainer = make_trainer(
            tmp_path / precision, mixed_precision=precision, per_device_train_batch_size=4
        )
        found[precision] = trainer.errors(first_batch(trainer))[0].detach()
    torch.testing.assert_close(found["bf16"], found["no"], rtol=2e-2, atol=0)


@by_default(values=1)
@pytest.mark.parametrize(
    ("method", "family"), [("diffusion_dpo", "sd"), ("diffusion_dpo", "sdxl"), ("sft", "sd3")]
)
def test_mixed_sizes_train_in_buckets(tmp_path: Path, method: str, family: str) -> None:
    rows = pair_rows(4)
    for i, row in enumerate(pair_rows(3)):
        wide = {key: picture(100 + i, i).resize((48, 32)) for key in ("chosen", "rejected")}
        rows.append({"prompt": row["prompt"], **wide})
    rows.append(
        {"prompt": "a star", "chosen": picture(10, 1), "rejected": picture(10, 1).resize((64, 16))}
    )
    trainer = make_trainer(
        tmp_path,
        family,
        method,
        rows=rows,
        per_device_train_batch_size=2,
        max_steps=5,
        data={"resolution": None, "aspect_ratio_buckets": "32,32;32,48"},
    )
    shapes = []

    class Shapes(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            prepare = trainer.prepare

            def recording(batch: Any) -> Any:
                shapes.append(tuple(batch.x0.shape[-2:]))
                return prepare(batch)

            trainer.prepare = recording

    trainer.callbacks.append(Shapes())
    trainer.train()
    assert set(shapes) == {(16, 16), (16, 24)}
    assert all(math.isfinite(entry["train/loss"]) for entry in trainer.state.log_history)
    if method == "diffusion_dpo":
        assert trainer.data_pipeline.dropped_sizes == 1 and any(
            "1 groups dropped" in line for line in trainer.record.lines
        )


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_validation_grids_and_kept_base_images(tmp_path: Path, lora: bool) -> None:
    config = ValidationConfig(
        ["a red circle", "a blue star"],
        num_validation_images=2,
        validation_steps=2,
        num_inference_steps=2,
    )
    options: dict[str, Any] = {
        "peft_config": lora_config() if lora else None,
        "max_steps": 3,
        "save_steps": 2,
        "learning_rate": 2e-2,
    }
    make_trainer(tmp_path / "run", options={"validation": config}, **options).train()
    samples = tmp_path / "run" / "samples"
    assert sorted(p.name for p in samples.glob("*.png")) == ["step-2.png", "step-3.png"]
    base = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (samples / "base").glob("*.png")
    }
    assert sorted(base) == ["0000.png", "0001.png", "0002.png", "0003.png"]
    make_trainer(
        tmp_path / "run",
        options={"validation": config},
        resume_from_checkpoint="checkpoint-2",
        **{**options, "max_steps": 4},
    ).train()
    assert {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (samples / "base").glob("*.png")
    } == base
    assert (samples / "step-4.png").is_file()
    assert "samples/step-4.png" in (tmp_path / "run" / "README.md").read_text()


def test_validation_does_not_move_the_run(tmp_path: Path) -> None:
    config = ValidationConfig(
        ["a red circle"], num_validation_images=1, validation_steps=1, num_inference_steps=2
    )
    options: dict[str, Any] = {"peft_config": lora_config(dropout=0.2)}
    watched = make_trainer(tmp_path / "a", options={"validation": config}, **options)
    watched.train()
    plain = make_trainer(tmp_path / "b", **options)
    plain.train()
    assert_same_tensors(trained_tensors(watched), trained_tensors(plain))


def test_dry_run_writes_nothing_and_reports(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        peft_config=lora_config(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=None,
    )
    report = trainer.dry_run()
    assert not (tmp_path / "run").exists()
    assert report["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert report["effective_batch"] == 4 and report["steps_per_epoch"] == 2
    assert report["latent_shape"] == (4, 16, 16)
    assert report["trainable_parameters"] == sum(
        t.numel() for t in trained_tensors(trainer).values()
    )
    assert report["peak_memory_gib"] > 0
    assert any(line.startswith("beta 100") for line in report["lines"])
    assert all(p.grad is None or not p.grad.any() for p in trainer.network.parameters())


def test_beta_message_gives_the_common_unit() -> None:
    assert "N = 16384" in beta_message(5000, (4, 64, 64), "mean") and "0.1526" in beta_message(
        5000, (4, 64, 64), "mean"
    )


@pytest.mark.parametrize("backend", ["xformers", "nonsense"])
def test_unusable_attention_backends_are_refused(tmp_path: Path, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"train.attention.*'{backend}'.*native"):
        make_trainer(tmp_path, attention=backend).dry_run()


def test_native_sdpa_by_its_other_name(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, attention="_native_math", peft_config=lora_config()).dry_run()[
        "loss"
    ] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("targets", [["to_nothing"], "nothing.*"])
def test_lora_targets_that_match_nothing_are_refused(tmp_path: Path, targets: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"lora.target_modules.*matches no module of the unet.*to_k.*to_q"
    ):
        make_trainer(tmp_path, peft_config=lora_config(target_modules=targets)).dry_run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.mixed_precision.*fp16 needs a GPU"):
        make_trainer(tmp_path, mixed_precision="fp16").dry_run()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"data": {"resolution": 33}}, "data.resolution"),
        ({"method": "sft", "precompute_ref_errors": True}, "train.precompute_ref_errors"),
        ({"timestep_sampling": "turbo", "family": "sd3"}, "timestep_sampling"),
        ({"snr_gamma": 5.0, "family": "sd3"}, "snr_gamma"),
        ({"rows": [{"prompt": "a", "image": picture(3, 3)}]}, "pair"),
    ],
    ids=["size", "precompute", "turbo flow", "snr flow", "kind"],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        make_trainer(tmp_path, **options).dry_run()


def test_a_pipeline_with_adapters_is_refused(tmp_path: Path) -> None:
    pipe = build_pipeline("sd")
    pipe.unet.add_adapter(lora_config(target_modules=["to_q"]))
    with pytest.raises(ConfigError, match="model.*already carries adapters"):
        make_trainer(tmp_path, model=pipe, peft_config=lora_config()).dry_run()


def test_evaluate_is_finite_and_reproducible(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "a", peft_config=lora_config(dropout=0.3), per_device_train_batch_size=3
    )
    trainer.train()
    first, second = trainer.evaluate(pair_rows(5)), trainer.evaluate(pair_rows(5))
    assert first == second
    assert {"eval/loss", "eval/rewards/accuracies", "eval/errors/chosen"} <= first.keys()
    assert all(
        math.isfinite(first[name])
        for name in ("eval/loss", "eval/rewards/accuracies", "eval/change/chosen")
    )
    trainer.setup()
    assert trainer.network.training
    trainer.args.per_device_train_batch_size = 1
    one_by_one = trainer.evaluate(pair_rows(5))
    assert one_by_one["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-5)


def test_evaluating_does_not_move_the_run(tmp_path: Path) -> None:
    class Evaluate(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            kwargs["trainer"].evaluate(pair_rows(2))

    options: dict[str, Any] = {"peft_config": lora_config(dropout=0.2)}
    watched = make_trainer(tmp_path / "a", options={"callbacks": [Evaluate()]}, **options)
    watched.train()
    plain = make_trainer(tmp_path / "b", **options)
    plain.train()
    assert_same_tensors(trained_tensors(watched), trained_tensors(plain))


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, lr_scheduler="linear", warmup_steps=2, max_steps=6, gradient_accumulation_steps=2
    )
    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.callbacks.append(Rates())
    trainer.train()
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0.0])


def test_epochs_become_steps(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=None,
        num_train_epochs=1.5,
        per_device_train_batch_size=3,
        peft_config=lora_config(),
    )
    assert trainer.train().global_step == 4  # 8 rows x 1.5 / 3
    assert trainer.state.epoch == pytest.approx(12 / 8)


def test_saved_average_is_not_the_last_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = make_trainer(tmp_path, use_ema=True, ema_decay=0.5, max_steps=3, learning_rate=1e-2)
    trainer.train()
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    last = trained_tensors(trainer)
    average = dict(zip(last, trainer.ema.shadow_params, strict=True))
    for name in last:
        assert torch.equal(saved[name], average[name])
    assert any(not torch.equal(saved[name], last[name]) for name in last)
    resumable = load_file(
        tmp_path / "checkpoint-3" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert_same_tensors(resumable, last)


def test_the_card_says_how_and_with_what(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", peft_config=lora_config(), max_steps=1)
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    for part in (
        "load_lora_weights",
        "diffusion-dpo",
        "2311.12908",
        trainer.train_dataset.fingerprint,
        "train/loss",
        "torch 2",
    ):
        assert part in card


@pytest.mark.parametrize("name", ["shapes", "shapes-flow"])
def test_the_card_of_an_embedded_model_loads_it(tmp_path: Path, name: str) -> None:
    from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer

    config = DiffusionDPOConfig(output_dir=str(tmp_path / "run"), max_steps=1)
    rows = pair_rows(2, 64)
    trainer = DiffusionDPOTrainer(name, args=config, train_dataset=rows, peft_config=lora_config())
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model" not in card
    assert f'from_pretrained(weights_dir("{name}"))' in card
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0]
    exec(code.replace("path/to/this/folder", str(tmp_path / "run")), {})


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    plain = make_trainer(
        tmp_path / "a", peft_config=lora_config(), data={"random_flip": True, "center_crop": False}
    )
    plain.train()
    workers = make_trainer(
        tmp_path / "b",
        peft_config=lora_config(),
        data={"random_flip": True, "center_crop": False, "num_workers": 1},
    )
    workers.train()
    assert_same_tensors(trained_tensors(workers), trained_tensors(plain))


def test_a_window_is_logged_alike_when_resumed_in_its_middle(tmp_path: Path) -> None:
    import shutil

    options = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "logging_steps": 2}
    make_trainer(tmp_path / "straight", **options).train()
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    make_trainer(tmp_path / "resumed", **options).train(str(tmp_path / "resumed" / "checkpoint-3"))
    logs = [
        [json.loads(x) for x in (tmp_path / n / "logs" / "metrics.jsonl").read_text().splitlines()]
        for n in ("straight", "resumed")
    ]
    assert [entry["step"] for entry in logs[0]] == [2, 4, 6]
    assert logs[0] == logs[1]


def test_evaluation_during_training_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "out",
        max_steps=4,
        eval_steps=2,
        logging_steps=4,
        options={"eval_dataset": pair_rows(4)},
    )
    trainer.train()
    entries = [
        json.loads(x)
        for x in (tmp_path / "out" / "logs" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [e["step"] for e in entries if "eval/loss" in e] == [2, 4]


def test_another_model_can_be_the_reference(tmp_path: Path) -> None:
    from tiny import build_pipeline

    trainer = make_trainer(
        tmp_path / "out", max_steps=1, options={"ref_model": build_pipeline("sd", seed=5)}
    )
    output = trainer.train()
    assert output.metrics["errors/chosen"] != output.metrics["errors/ref_chosen"]
    assert abs(output.metrics["train/loss"] - 0.6931) > 1e-3


def truncated_rows(broken: int) -> list[dict[str, Any]]:
    """Pairs, some with an image whose header is right and whose pixels are missing."""
    import io

    rows = pair_rows(8, 64)
    for row in rows[:broken]:
        buffer = io.BytesIO()
        row["chosen"].save(buffer, "png")
        row["chosen"] = {"bytes": buffer.getvalue()[: len(buffer.getvalue()) // 2], "path": None}
    for row in rows:
        if not isinstance(row["chosen"], dict):
            buffer = io.BytesIO()
            row["chosen"].save(buffer, "png")
            row["chosen"] = {"bytes": buffer.getvalue(), "path": None}
    return rows


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_that_breaks_while_decoding_is_skipped_and_counted(
    tmp_path: Path, cached: bool
) -> None:
    data: dict[str, Any] = {"max_broken_fraction": 0.3}
    if cached:
        data |= {"cache_latents": str(tmp_path / "cache")}
    trainer = make_trainer(
        tmp_path / "out",
        rows=truncated_rows(1),
        data=data,
        max_steps=8,
        per_device_train_batch_size=2,
    )
    with pytest.warns(UserWarning, match="dataset row 0"):
        trainer.train()
    assert list(trainer.data_pipeline.reader.broken) == [0]


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    from diffalign.errors import UserError

    trainer = make_trainer(
        tmp_path / "out", rows=truncated_rows(4), data={"max_broken_fraction": 0.3}, max_steps=8
    )
    with (
        pytest.warns(UserWarning, match="next row"),
        pytest.raises(UserError, match="more than data.max_broken_fraction"),
    ):
        trainer.train()


@by_default(lambda family, lora: (family, lora) in (("sd", True), ("sd3", False)))
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("lora", [False, True])
def test_validation_draws_under_mixed_precision(tmp_path: Path, family: str, lora: bool) -> None:
    validation = ValidationConfig(
        validation_prompts=["a red circle"], validation_steps=1, num_inference_steps=2
    )
    options = {"validation": validation}
    peft = lora_config() if lora else None
    trainer = make_trainer(
        tmp_path / "out",
        family,
        peft_config=peft,
        max_steps=1,
        mixed_precision="bf16",
        options=options,
    )
    trainer.train()
    assert (tmp_path / "out" / "samples" / "step-1.png").is_file()
