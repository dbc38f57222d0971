"""The hash of a network names its weights, whatever their precision and place."""

from __future__ import annotations

import hashlib

import torch

from diffalign.runtime.hashing import module_hash


def network(large: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(2048 if large else 8, 1024)


def test_small_weights_count_as_a_whole() -> None:
    module = network(large=False)
    digest = hashlib.sha256(b"Linear")
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    assert module_hash(module) == digest.hexdigest()[:16]


def test_large_weights_are_sampled() -> None:
    """A step of training, a LoRA that was merged and another shape are noticed."""
    module = network(large=True)
    before = module_hash(module)
    assert module_hash(network(large=True)) == before
    with torch.no_grad():
        module.weight += 1e-3 * torch.randn(1024, 2) @ torch.randn(2, 2048)
    assert module_hash(module) != before
    other = torch.nn.Linear(1024, 2048)
    other.weight.data = network(large=True).weight.data.reshape(2048, 1024)
    other.bias.data = torch.zeros(1024)
    same = network(large=True)
    same.bias.data = torch.zeros(1024)
    assert module_hash(other) != module_hash(same)
    rounded = network(large=True).bfloat16()
    assert module_hash(rounded) == module_hash(network(large=True).bfloat16().float())
