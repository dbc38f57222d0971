"""Runs on a stream: each process reads its share, and a resumed run goes on where the
last one stopped, without reading from the beginning."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import labelled_rows, lora_config, make_trainer, pair_rows, trained_tensors

from diffalign.data import load_preferences
from diffalign.data.streaming import StreamingPreferenceDataset
from diffalign.errors import ConfigError, UserError
from diffalign.training.group_reader import StreamPosition


def shards(folder: Path, rows: list[dict[str, Any]], count: int = 4) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    for number in range(count):
        part = data.shard(count, number, contiguous=True)
        part.to_parquet(folder / f"train-{number:05d}-of-{count:05d}.parquet")
    return str(folder)


def numbered(count: int) -> list[dict[str, Any]]:
    return [row | {"prompt": f"row {i}"} for i, row in enumerate(pair_rows(count))]


def stream(place: str) -> StreamingPreferenceDataset:
    data = load_preferences(place, streaming=True, verbose=False)
    assert isinstance(data, StreamingPreferenceDataset)
    return data


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_rows(tmp_path: Path, world: int) -> None:
    place = shards(tmp_path / "data", numbered(12))
    shares = [list(stream(place).share(rank, world)) for rank in range(world)]
    prompts = [group.prompts[0] for share in shares for group in share]
    assert sorted(prompts) == sorted(f"row {i}" for i in range(12))
    ids = [group.row_id for share in shares for group in share]
    assert len(set(ids)) == 12


@pytest.mark.parametrize("kind", ["pair", "labelled"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_position_is_where_the_next_group_begins(tmp_path: Path, kind: str, stop: int) -> None:
    place = shards(tmp_path / "data", numbered(6), 2)

    def groups(position: Any = None) -> Any:
        data = stream(place).as_kind(kind)
        data.load_state_dict(position)
        return data

    whole = [(g.row_id, g.place, g.prompts[0]) for g in groups()]
    data = groups()
    for number, _ in enumerate(data, 1):
        if number == stop:
            break
    rest = [(g.row_id, g.place, g.prompts[0]) for g in groups(data.state_dict())]
    assert rest == whole[stop:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("caches", [False, True])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, workers: int, caches: bool) -> None:
    place = shards(tmp_path / "data", numbered(10))
    data: dict[str, Any] = {"dataset_streaming": True, "num_workers": workers}
    if caches:
        data |= {
            "cache_latents": str(tmp_path / "cache"),
            "cache_text_embeddings": str(tmp_path / "cache"),
        }

    def trainer(folder: str, steps: int) -> Any:
        return make_trainer(
            tmp_path / folder,
            rows=place,
            peft_config=lora_config(),
            data=data,
            max_steps=steps,
            save_steps=3,
            save_total_limit=None,
            per_device_train_batch_size=2,
        )

    straight = trainer("straight", 7)
    straight.train()
    resumed = trainer("resumed", 7)
    read: list[str] = []
    original = resumed._train

    def counting(checkpoint: Any) -> Any:
        resumed.setup()
        reader = resumed.data_pipeline.reader
        streamed = reader.read_streamed
        reader.read_streamed = lambda group, epoch: (
            read.append(group.prompts[0]) or streamed(group, epoch)
        )
        return original(checkpoint)

    resumed._train = counting
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-6"))
    one, other = trained_tensors(straight), trained_tensors(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    if workers == 0:
        assert len(read) == 2  # nothing before the checkpoint's rows
    if caches:
        found = [len(straight.data_pipeline.latents), len(straight.data_pipeline.prompts)]
        assert found[0] == 10 and found[1] >= 10


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    place = shards(tmp_path / "data", numbered(8))

    def trainer(folder: str, workers: int) -> Any:
        return make_trainer(
            tmp_path / folder,
            rows=place,
            peft_config=lora_config(),
            data={"dataset_streaming": True, "num_workers": workers},
            max_steps=2,
            save_steps=1,
        )

    trainer("first", 0).train()
    with pytest.raises(UserError, match="read by 1 workers; resume it with as many"):
        trainer("second", 2).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


def test_a_checkpoint_without_a_position_reads_again(tmp_path: Path) -> None:
    """Of an earlier version: one process goes on at the same row."""
    place = shards(tmp_path / "data", numbered(10))
    trainer = make_trainer(
        tmp_path / "run",
        rows=place,
        peft_config=lora_config(),
        data={"dataset_streaming": True},
        per_device_train_batch_size=2,
    )
    trainer.setup()
    data = trainer.data_pipeline
    straight = data.batches(0)
    expected = [[e.prompts[0] for e in next(straight)] for _ in range(4)][3]
    data.streamed, data.positions = 0, [StreamPosition()]
    assert [e.prompts[0] for e in next(data.batches(6))] == expected


def test_likes_as_a_stream(tmp_path: Path) -> None:
    place = shards(tmp_path / "data", labelled_rows(8))
    run = make_trainer(
        tmp_path / "run",
        method="diffusion_kto",
        rows=place,
        peft_config=lora_config(),
        data={"dataset_streaming": True},
        max_steps=2,
    )
    assert run.train().global_step == 2


def test_an_image_that_cannot_be_decoded_is_passed_over(tmp_path: Path) -> None:
    rows = numbered(6)
    for row in rows:
        for side in ("chosen", "rejected"):
            file = io.BytesIO()
            row[side].save(file, "PNG")
            row[side] = {"bytes": file.getvalue(), "path": None}
    rows[1]["chosen"]["bytes"] = rows[1]["chosen"]["bytes"][:-40]  # its header is right
    run = make_trainer(
        tmp_path / "run",
        rows=shards(tmp_path / "data", rows, 1),
        peft_config=lora_config(),
        per_device_train_batch_size=1,
        data={"dataset_streaming": True, "max_broken_fraction": 0.3},
        max_steps=7,
    )
    with pytest.warns(UserWarning, match="the next row takes its place"):
        assert run.train().global_step == 7


@pytest.mark.nightly
def test_workers_that_are_spawned(tmp_path: Path) -> None:
    """As on Windows and macOS, where a worker inherits nothing."""
    import subprocess
    import sys

    shards(tmp_path / "data", numbered(8), 2)
    script = f"""
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from tiny import lora_config, make_trainer

    for streaming in (False, True):
        trainer = make_trainer(
            {str(tmp_path)!r} + f"/{{streaming}}",
            rows={str(tmp_path / "data")!r},
            peft_config=lora_config(),
            data={{"num_workers": 2, "dataset_streaming": streaming}},
            max_steps=2,
        )
        assert trainer.train().global_step == 2
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_streamed_evaluation_split_is_evaluated_like_a_loaded_one(tmp_path: Path) -> None:
    place = Path(shards(tmp_path / "data", numbered(8)))
    test = datasets.Dataset.from_list(numbered(5))
    test.to_parquet(place / "test-00000-of-00001.parquet")

    def trainer(streaming: bool) -> Any:
        return make_trainer(
            tmp_path / f"run-{streaming}",
            rows=str(place),
            peft_config=lora_config(),
            data={"dataset_streaming": streaming, "dataset_test_split": "test"},
            options={"eval_dataset": str(place)},
            per_device_train_batch_size=2,
            max_steps=2,
            eval_steps=1,
        )

    streamed, loaded = trainer(True), trainer(False)
    assert isinstance(streamed.eval_dataset, StreamingPreferenceDataset)
    first = [t.evaluate() for t in (streamed, loaded)]
    assert first[0] == pytest.approx(first[1], nan_ok=True)
    assert streamed.train().global_step == 2
    assert streamed.evaluate() == streamed.evaluate()
    assert len(list(streamed.evaluation_data().passes())) == 3


def test_a_stream_without_steps_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_steps: a streamed dataset has no length"):
        make_trainer(
            tmp_path,
            rows=shards(tmp_path / "data", numbered(8)),
            data={"dataset_streaming": True},
            max_steps=None,
        )
