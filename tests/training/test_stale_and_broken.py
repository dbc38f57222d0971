"""What was computed from other settings is not read back, and broken rows cost a run
nothing but themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import build_pipeline, lora_config, make_trainer, pair_rows, picture

from diffalign import load_preferences
from diffalign.data.cache import TensorCache
from diffalign.errors import ConfigError, UserError

BUCKETS = "32,32;32,64"


def rows_of_two_sizes(folder: Path, count: int, broken: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        size, row = (32, 32) if i % 2 else (64, 32), {"prompt": f"row {i}"}
        for side in ("chosen", "rejected"):
            path = folder / f"{i}-{side}.jpg"
            picture(20 * i, i, 64).resize(size).save(path, quality=95)
            if i == broken:  # the header is whole
                path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
            row[side] = str(path)
        rows.append(row)
    return rows


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_image_is_replaced_within_its_bucket(tmp_path: Path, cached: bool) -> None:
    data: dict[str, Any] = {"resolution": None, "aspect_ratio_buckets": BUCKETS}
    data |= {"max_broken_fraction": 0.5, "verify_images": "none"}
    if cached:
        data["cache_latents"] = str(tmp_path / "cache")
    trainer = make_trainer(
        tmp_path / "out", rows=rows_of_two_sizes(tmp_path, 8, broken=3), data=data, max_steps=6,
        per_device_train_batch_size=2, peft_config=lora_config(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="row 3"):
        trainer.train()
    with pytest.warns(UserWarning, match="row 3"):
        trainer.evaluate(rows_of_two_sizes(tmp_path, 8, broken=3))


def test_a_missing_file_costs_a_row(tmp_path: Path) -> None:
    buckets = {"resolution": None, "aspect_ratio_buckets": BUCKETS}
    for number, data in enumerate((buckets, {"cache_latents": str(tmp_path / "c")})):
        rows = rows_of_two_sizes(tmp_path, 8)
        trainer = make_trainer(
            tmp_path / str(number), rows=rows, max_steps=2, peft_config=lora_config(),
            data={"max_broken_fraction": 0.5} | data,
        )  # fmt: skip
        trainer.train_dataset.fingerprint  # noqa: B018 - computed while the file is there
        Path(rows[5]["chosen"]).unlink()
        with pytest.warns(UserWarning, match="row 5"):
            trainer.train()


def test_many_broken_rows_in_a_row_are_no_recursion(tmp_path: Path) -> None:
    from diffalign.data.transforms import GroupTransform
    from diffalign.training.group_reader import GroupReader

    rows = rows_of_two_sizes(tmp_path, 2)
    table = Dataset.from_list(rows[:1] + [{**rows[0], "chosen": "nowhere.png"}] * 1200)
    dataset = load_preferences(table, verify_images="none")
    reader = GroupReader(dataset, GroupTransform((32, 32)), 0, max_broken_fraction=1.0)
    with pytest.warns(UserWarning, match="nowhere.png"):
        assert reader[(0, 5)].row_id == 0
    assert len(reader.broken) == 1196


def test_an_epoch_of_buckets_has_its_filled_up_batches(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "out", rows=rows_of_two_sizes(tmp_path, 10), max_steps=None,
        num_train_epochs=1, per_device_train_batch_size=4, peft_config=lora_config(),
        data={"resolution": None, "aspect_ratio_buckets": BUCKETS},
    )  # fmt: skip
    assert trainer.train().global_step == 4  # five rows of each size: two batches each
    assert trainer.state.epoch == 1.0


def test_streams_have_no_buckets(tmp_path: Path) -> None:
    stream = Dataset.from_list(rows_of_two_sizes(tmp_path, 4)).to_iterable_dataset()
    with pytest.raises(ConfigError, match="aspect_ratio_buckets: a stream cannot be sorted"):
        make_trainer(
            tmp_path / "out", rows=stream, per_device_train_batch_size=2,
            data={"resolution": None, "aspect_ratio_buckets": BUCKETS},
        )  # fmt: skip


def test_a_shuffled_stream_is_shuffled_anew(tmp_path: Path) -> None:
    table = Dataset.from_list(rows_of_two_sizes(tmp_path, 8))
    stream = table.to_iterable_dataset(2).shuffle(seed=1, buffer_size=4)
    trainer = make_trainer(
        tmp_path / "out", rows=stream, max_steps=16, per_device_train_batch_size=1
    )
    trainer.setup()
    batches = trainer.source.batches(trainer.data_pipeline, 0)
    prompts = [next(batches).prompts[0] for _ in range(16)]
    assert sorted(prompts[:8]) == sorted(prompts[8:]) and prompts[:8] != prompts[8:]


def test_a_cache_is_written_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.data import cache

    monkeypatch.setattr(cache, "_SHARD_BYTES", 1000)
    store = TensorCache(tmp_path)
    for number in range(4):
        store.add(str(number), {"x": torch.full((100,), float(number)), "y": torch.zeros(50)[:5]})
    assert len(list(tmp_path.glob("shard-*"))) == 1 and len(store) == 4
    store.flush()
    again = TensorCache(tmp_path)
    assert [float(again[str(n)]["x"][0]) for n in range(4)] == [0, 1, 2, 3]


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_schedule_or_text_encoder_is_another_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_pipeline("sd").save_pretrained(model)
    options: dict[str, Any] = {"model": str(model), "save_steps": 1, "rows": pair_rows(4)}
    options |= {"peft_config": lora_config(), "max_steps": 2, "precompute_ref_errors": True}
    first = make_trainer(tmp_path / "out", **options)
    first.train()
    key = first.record.reference_errors_key("t")
    changed(model, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    other = make_trainer(tmp_path / "out", **options)
    assert other.record.reference_errors_key("t") != key
    with pytest.raises(UserError, match="belongs to another run .*scheduler is"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_prompts_are_encoded_again_by_another_rule(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_pipeline("sdxl").save_pretrained(model)

    def cache() -> Path:
        trainer = make_trainer(
            tmp_path / "out", "sdxl", model=str(model), rows=pair_rows(2),
            data={"cache_text_embeddings": str(tmp_path / "cache")}, peft_config=lora_config(),
        )  # fmt: skip
        trainer.setup()
        return trainer.data_pipeline.prompts.folder

    places = [cache()]
    changed(model, "model_index.json", force_zeros_for_empty_prompt=False)
    places.append(cache())
    for tokenizer in ("tokenizer", "tokenizer_2"):
        changed(model, f"{tokenizer}/tokenizer_config.json", model_max_length=8)
    places.append(cache())
    assert len(set(places)) == 3


def test_latents_of_a_pipeline_belong_to_its_autoencoders_settings(tmp_path: Path) -> None:
    pipe, places = build_pipeline("sd"), []
    for scaling in (0.18, 0.13):
        pipe.vae.register_to_config(scaling_factor=scaling)
        trainer = make_trainer(
            tmp_path / str(scaling), model=pipe, data={"cache_latents": str(tmp_path / "cache")},
            rows=pair_rows(2),
        )  # fmt: skip
        places.append(trainer.backbone.source.fingerprint("vae"))
    assert places[0] != places[1]


@pytest.mark.parametrize("family", ["sana", "qwen-image"])
def test_a_familys_own_autoencoder_may_be_named(family: str, tmp_path: Path) -> None:
    pipe = build_pipeline(family)
    pipe.save_pretrained(tmp_path / "model")
    pipe.vae.save_pretrained(tmp_path / "vae")
    trainer = make_trainer(
        tmp_path / "out", family, model=str(tmp_path / "model"), rows=pair_rows(2),
        options={"vae": str(tmp_path / "vae")}, peft_config=lora_config(),
        data={"resolution": 64},
    )  # fmt: skip
    assert type(trainer.backbone.component("vae")) is type(pipe.vae)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import lora_config, make_trainer, pair_rows
trainer = make_trainer(
    Path(sys.argv[2]), "shapes-flow", rows=pair_rows(4, 64), peft_config=lora_config(),
    ddp_timeout=60, data={"resolution": 64},
)
print("evaluated", len(trainer.evaluate(pair_rows(1, 64))))
"""


def test_one_row_is_evaluated_by_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "29712", str(script), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("evaluated") == 2, done.stderr[-2000:]
