"""The cache of tensors: one entry per key, whoever stores it and how often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.data.cache import TensorCache


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
