"""The user adapter: golden values, every family, checkpoints of activations, LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import by_default
from tiny import FAMILIES, build_pipeline, lora_config
from tiny_families import TRANSFORMERS, size_of
from torch import Tensor

from diffalign.backbones import load_backbone
from diffalign.backbones.user_adapter import (
    CONFIG,
    UserAdapter,
    attention_layers,
    load_user_adapter,
    user_attention,
)
from diffalign.data.transforms import Geometry
from diffalign.errors import UserError
from diffalign.likelihood import sample_times


def test_h2_decoupled_attention() -> None:
    def four(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[None, None]

    query, key, value = four([[1, 0], [0, 2]]), four([[1, 0], [0, 1]]), four([[1, 2], [3, 4]])
    user_key, user_value = four([[1, 1], [2, 0]]), four([[0.5, 0], [0, 0.5]])
    plain = user_attention(query, key, value, 1.0)  # the same formula without users
    golden = {
        0.0: [1.660476901347, 2.660476901347, 2.608859365013, 3.608859365013],
        1.0: [1.825596126683, 2.995357676010, 3.011074206268, 3.706644523759],
        0.5: [1.743036514015, 2.827917288678, 2.809966785640, 3.657751944386],
    }
    for scale, expected in golden.items():
        both = plain + user_attention(query, user_key, user_value, scale)
        assert both.flatten().tolist() == pytest.approx(expected, abs=1e-9)
    single = user_attention(query, user_key[:, :, :1], user_value[:, :, :1], 1.0)
    assert single[0, 0].tolist() == [[0.5, 0.0]] * 2


EVERY = (*FAMILIES, *TRANSFORMERS)


def network_and_call(family: str) -> tuple[Any, Any]:
    """The network of a tiny pipeline, and a function that runs it on two rows."""
    backbone = load_backbone(build_pipeline(family))
    backbone.place(torch.device("cpu"), torch.float32)
    network = backbone.load_network(torch.float32, None).eval()
    # Qwen-Image 2.1 runs prompts of unequal length one by one.
    second = "a dog" if family == "qwen-image-21" else "a dog and a cat"
    condition = backbone.encode_prompts(["a cat", second])
    side = size_of(family)
    shape = backbone.latent_shape(side, side)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    condition |= backbone.geometry_condition([Geometry((side, side), (0, 0), (side, side))] * 2)
    uniforms = torch.tensor([0.5, 0.5], dtype=torch.float64)
    times = backbone.schedule.model_times(sample_times(backbone.schedule, uniforms, "uniform"))
    return network, lambda: backbone.predict(network, noisy, times, dict(condition))


@by_default(lambda family: family in ("sd", "sd3", "flux", "z-image", "sana"))
@pytest.mark.parametrize("family", EVERY)
def test_every_family_sees_its_users(family: str) -> None:
    network, call = network_and_call(family)
    with torch.no_grad():
        before = call()
        adapter = UserAdapter(network, dim=6, tokens=3)
        adapter.attach(network)
        users = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
        with adapter.users(users):
            assert torch.equal(call(), before)  # the values are zero at first
        for layer in adapter.layers:
            torch.nn.init.normal_(layer.to_v.weight, generator=torch.Generator().manual_seed(2))
        assert torch.equal(call(), before)  # no users are set
        with adapter.users(users):
            seen = call()
            assert (seen - before).flatten(1).norm(dim=1).min() > 1e-4
            adapter.scale = 0.0
            assert torch.equal(call(), before)
            adapter.scale = 1.0
        with adapter.users(users, mask=torch.tensor([1.0, 0.0])):
            masked = call()
        torch.testing.assert_close(masked[0], seen[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(masked[1], before[1], rtol=1e-4, atol=1e-5)
        with adapter.users(users[:1]):  # one user for all rows
            same = call()
        torch.testing.assert_close(same[0], seen[0], rtol=1e-4, atol=1e-5)
        adapter.detach()
        adapter.set_users(users)
        assert torch.equal(call(), before)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_only_the_adapter_has_a_gradient_and_checkpointing_keeps_it(family: str) -> None:
    network, call = network_and_call(family)
    adapter = UserAdapter(network, dim=4, tokens=2)
    adapter.attach(network)
    for layer in adapter.layers:
        torch.nn.init.normal_(layer.to_v.weight, std=0.5)
    users = torch.randn(2, 2, 4)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
            network.train()
        adapter.zero_grad()
        adapter.set_users(users)
        loss = call().square().mean()
        with adapter.users(None):  # as the reference, before the backward pass
            call()
        loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    assert all(p.grad is None for p in network.parameters())
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved, rtol=1e-4, atol=1e-7)
        assert plain.abs().sum() > 0


def test_a_lora_on_the_same_layers(tmp_path: Path) -> None:
    network, call = network_and_call("sd")
    network.add_adapter(lora_config(target_modules=["to_q", "to_out.0"]))
    adapter = UserAdapter(network, dim=4, tokens=2)
    adapter.attach(network)
    torch.nn.init.normal_(adapter.layers[0].to_v.weight)
    with torch.no_grad():
        before = call()
        with adapter.users(torch.randn(2, 2, 4)):
            assert not torch.equal(call(), before)


def test_saved_and_loaded(tmp_path: Path) -> None:
    network, call = network_and_call("sd")
    adapter = UserAdapter(network, dim=4, tokens=2, user_names=["ann", "bob"])
    adapter.attach(network)
    for layer in adapter.layers:
        torch.nn.init.normal_(layer.to_v.weight)
    users = torch.stack([adapter.embedding("ann"), adapter.embedding({"ann": 0.25, "bob": 2})])
    with torch.no_grad(), adapter.users(users):
        expected = call()
    adapter.save(tmp_path, {"method": "ppd"})
    again, call_again = network_and_call("sd")
    loaded, facts = load_user_adapter(again, tmp_path)
    with torch.no_grad(), loaded.users(users):
        assert torch.equal(call_again(), expected)
    assert facts["method"] == "ppd" and loaded.user_names == ["ann", "bob"]
    assert torch.equal(loaded.table, adapter.table)
    other, _ = network_and_call("sd3")
    with pytest.raises(UserError, match="made for another network than a SD3Transf"):
        load_user_adapter(other, tmp_path)
    with pytest.raises(UserError, match="holds no user_adapter.json"):
        load_user_adapter(again, tmp_path / "nowhere")
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_user_adapter(again, tmp_path)


def test_mixtures_and_unknown_users() -> None:
    network, _ = network_and_call("sd")
    adapter = UserAdapter(network, dim=3, tokens=1, user_names=["ann", "bob"])
    with torch.no_grad():
        adapter.table.copy_(torch.tensor([[[1.0, 0, 2]], [[0, 1, -1]]]))
    mixture = adapter.embedding({"ann": 0.25, "bob": 0.75})
    assert mixture.tolist() == [[0.25, 0.75, -0.25]]
    for users, words in (
        ("anna", r"'anna' is unknown \(did you mean 'ann'\?\); there are ann, bob"),
        ({}, "name one of ann, bob"),
        ({"ann": float("nan")}, "weight of 'ann' is nan"),
    ):
        with pytest.raises(UserError, match=words):
            adapter.embedding(users)


def test_networks_without_attention_and_rows_without_users() -> None:
    with pytest.raises(UserError, match="a Linear has no attention layers"):
        attention_layers(torch.nn.Linear(2, 2))
    network, call = network_and_call("sd")
    adapter = UserAdapter(network, dim=4, tokens=1)
    adapter.attach(network)
    with (
        pytest.raises(UserError, match="a pass of 2 rows for 3 users"),
        adapter.users(torch.randn(3, 1, 4)),
    ):
        call()
