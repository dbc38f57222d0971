"""The cache of tensors: one entry per key, whoever stores it and how often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.data.cache import TensorCache
from diffalign.errors import UserError


@pytest.mark.parametrize("flushed", [True, False])
def test_a_key_is_stored_once(flushed: bool, tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    first, second = torch.zeros(2), torch.ones(2)
    cache.add("a", {"x": first})
    if flushed:
        cache.flush()
    cache.add("a", {"x": second})
    assert len(cache) == 1 and torch.equal(cache["a"]["x"], first)
    cache.flush()
    for reader in (cache, TensorCache(tmp_path)):
        assert len(reader) == 1 and torch.equal(reader["a"]["x"], first)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 1


def test_two_processes_may_store_one_key(tmp_path: Path) -> None:
    caches = TensorCache(tmp_path), TensorCache(tmp_path)
    for number, cache in enumerate(caches):
        cache.add("a", {"x": torch.full((2,), 5.0), "y": torch.zeros(1)})
        cache.add(str(number), {"x": torch.zeros(1)})
        cache.flush()
    reader = TensorCache(tmp_path)
    assert len(reader) == 3 and sorted(reader["a"]) == ["x", "y"]
    assert len(reader._index["a"][1]) == 2, "each field is read once"
    assert torch.equal(reader["a"]["x"], torch.full((2,), 5.0))


def test_missing_keys_are_distinct_and_in_order(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.add("b", {"x": torch.zeros(1)})
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]


def fill(folder: Path, numbers: range) -> None:
    cache = TensorCache(folder, shard_entries=2)
    for number in numbers:
        cache.add(f"key {number}", {"x": torch.full((2,), float(number))})
    cache.flush()


def check(folder: Path, numbers: range) -> TensorCache:
    cache = TensorCache(folder)
    assert len(cache) == len(numbers) and "key -1" not in cache
    assert all(torch.equal(cache[f"key {n}"]["x"], torch.full((2,), float(n))) for n in numbers)
    return cache


def test_an_index_replaces_the_headers_of_many_shards(tmp_path: Path) -> None:
    fill(tmp_path, range(40))
    assert not (tmp_path / "index.safetensors").exists()
    check(tmp_path, range(40))  # 20 shards: the index is written
    assert (tmp_path / "index.safetensors").exists()
    cache = check(tmp_path, range(40))
    assert not cache._index, "nothing was read from the shards"
    fill(tmp_path, range(60))  # what is there already is not stored again
    assert len(list(tmp_path.glob("shard-*"))) == 30
    assert len(check(tmp_path, range(60))._index) == 20  # in ten shards beside the index
    fill(tmp_path, range(100))
    check(tmp_path, range(100))
    assert not check(tmp_path, range(100))._index


@pytest.mark.parametrize("damage", ["removed shard", "changed shard", "damaged index"])
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, range(40))
    check(tmp_path, range(40))
    shard = sorted(tmp_path.glob("shard-*"))[3]
    if damage == "removed shard":
        shard.unlink()
        cache = TensorCache(tmp_path)
        assert len(cache) == 38
        assert sum(f"key {n}" in cache for n in range(40)) == 38
        return
    if damage == "changed shard":
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(UserError, match="is damaged"):
            TensorCache(tmp_path)
        return
    index = tmp_path / "index.safetensors"
    index.write_bytes(index.read_bytes()[:50])
    check(tmp_path, range(40))
