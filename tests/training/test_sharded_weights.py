"""Snapshots, averages and saved weights of sharded parameters (FSDP2, one process)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import lora_config

from diffalign.runtime.distributed import is_sharded, whole
from diffalign.training.reference import SnapshotReference


class Plain:
    """Calls the network alone."""

    def predict(self, network: Any, noisy: Any, times: Any, condition: Any) -> Any:
        return network(noisy)


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    if dist.is_initialized():
        pytest.skip("a process group is there already")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo over a file")
def test_a_snapshot_of_sharded_weights_is_what_the_network_was(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6))
    x = torch.randn(3, 6)
    before = network(x).detach()
    fully_shard(network[0])
    fully_shard(network)
    reference = SnapshotReference(network)
    reference.start()
    assert all(is_sharded(p) for p in reference.parameters.values())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5)
    moved = network(x).detach()
    torch.testing.assert_close(reference.predict(Plain(), x, None, {}), before)
    torch.testing.assert_close(network(x).detach(), moved)
    assert float((moved - before).abs().max()) > 0.1
    assert {type(whole(p.detach())) for p in network.parameters()} == {torch.Tensor}


def test_plain_weights_are_exchanged_without_a_copy() -> None:
    network = torch.nn.Linear(4, 4)
    reference = SnapshotReference(network)
    reference.start()
    storage = {name: w.data_ptr() for name, w in reference.weights.items()}
    with reference.in_place(reference.weights):
        assert {n: p.data_ptr() for n, p in network.named_parameters()} == storage


def test_the_average_is_of_the_prepared_parameters(tmp_path: Any) -> None:
    """Not of a list taken before `prepare`, which sharding makes stale."""
    from tiny import make_trainer

    trainer = make_trainer(tmp_path, peft_config=lora_config(), use_ema=True)
    trainer.setup()
    parameters = [p for p in trainer.network.parameters() if p.requires_grad]
    assert len(trainer.ema.shadow_params) == len(parameters)
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.ema.shadow_params, parameters, strict=True)
    )
