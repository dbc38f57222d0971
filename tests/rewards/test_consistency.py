"""Consistency rewards: golden values of Ctrl-U, the palette, models, scorers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SoftBrightness
from torch import Tensor

from diffalign.errors import ConfigError, UserError
from diffalign.rewards.consistency import (
    PaletteSegmentation,
    ScorerConsistency,
    TransformersConsistency,
    consistency_loss,
    uncertainty_reward_loss,
)


def maps() -> tuple[Tensor, Tensor, Tensor]:
    label = [[[0.2, 0.4], [0.6, 0.8]], [[0, 0.5], [0.5, 1]]]
    first = [[[0.3, 0.4], [0.5, 0.9]], [[0.1, 0.5], [0.2, 0.6]]]
    second = [[[0.3, 0.3], [0.7, 0.9]], [[0.4, 0.5], [0.2, 0.1]]]
    y, p, q = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (label, first, second))
    return p, q, y


def test_h3_map_form() -> None:
    first, second, label = maps()
    options: dict[str, Any] = {"kind": "map"}
    reward, uncertainty = uncertainty_reward_loss(first, second, label, **options)
    assert uncertainty.tolist() == pytest.approx([0.075, 0.2], abs=1e-9)
    plain = consistency_loss(first, label, "map")[0].mean(1)
    assert plain.tolist() == pytest.approx([0.0075, 0.065], abs=1e-9)
    assert reward.tolist() == pytest.approx([0.007046826882, 0.048613271940], abs=1e-9)
    both, _ = uncertainty_reward_loss(first, second, label, branches="both", **options)
    assert both.tolist() == pytest.approx([0.008177873655, 0.111784229680], abs=1e-9)
    mse = torch.tensor([0.30, 0.50], dtype=torch.float64)
    active = torch.tensor([1.0, 0.0], dtype=torch.float64)
    term = 0.5 * reward + 0.1 * uncertainty
    window = mse.mean() + (active * term).sum() / active.sum()
    assert float(window) == pytest.approx(0.411023413440, abs=1e-9)
    assert float((mse + term).mean()) == pytest.approx(0.427665024706, abs=1e-9)


@pytest.mark.parametrize(
    ("detach", "slopes"),
    [
        (True, [0.2, 0.1, -0.263746150616, 0.2, 0.048163644136, 0, -0.6, -0.385224527770]),
        (False, [0.2, 0.1, -0.255558843085, 0.2, 0.055571826343, 0, -0.6, -0.482269433324]),
    ],
)
def test_h3_gradients(detach: bool, slopes: list[float]) -> None:
    first, second, label = maps()
    first.requires_grad_()
    reward, uncertainty = uncertainty_reward_loss(
        first, second, label, kind="map", detach_weight=detach
    )
    (4 * (reward.sum() + 0.1 * uncertainty.sum())).backward()
    assert first.grad is not None
    assert first.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-9)


def test_h3b_classes() -> None:
    first = torch.tensor([[2, 0, -1], [0, 1, 0]], dtype=torch.float64).T[None, :, None]
    second = torch.tensor([[1, 0.5, -1], [0, -1, 1]], dtype=torch.float64).T[None, :, None]
    label = torch.tensor([[[0, 1]]])
    loss, valid = consistency_loss(first, label, "classes")
    assert valid.all() and loss[0].tolist() == pytest.approx(
        [0.169846019556, 0.551444713932], abs=1e-9
    )
    for scale, reward, uncertainty in (
        (1.0, 0.215492722176, 0.421957189905), (0.1, 0.342030636065, 0.42195718991),
    ):  # fmt: skip
        values = uncertainty_reward_loss(first, second, label, kind="classes", weight_scale=scale)
        assert float(values[0]) == pytest.approx(reward, abs=1e-9)
        assert float(values[1]) == pytest.approx(uncertainty, abs=1e-9)
    ignored, _ = uncertainty_reward_loss(first, first, torch.tensor([[[0, 255]]]), kind="classes")
    assert float(ignored) == pytest.approx(0.169846019556, abs=1e-9)
    nothing, _ = uncertainty_reward_loss(first, first, torch.tensor([[[255, 255]]]), kind="classes")
    assert float(nothing) == 0.0


def test_h3c_scalar() -> None:
    first, second = torch.tensor([0.8, 0.3]).double(), torch.tensor([0.7, 0.6]).double()
    reward, uncertainty = uncertainty_reward_loss(
        first, second, torch.ones(2).double(), kind="scalar"
    )
    assert uncertainty.tolist() == pytest.approx([0.1, 0.3], abs=1e-7)
    assert reward.tolist() == pytest.approx([0.180967483607, 0.518572754477], abs=1e-7)


def test_h3d_palette() -> None:
    predictor = PaletteSegmentation(torch.tensor([[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]]))
    pixels = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.5, 0.6]]).T[None, :, None]
    logits = predictor.predict(pixels)
    assert logits[0, :, 0, 0].tolist() == pytest.approx([-0.6, -14.6, -4.1], abs=1e-5)
    assert logits[0, :, 0, 1].tolist() == pytest.approx([-8.6, -6.6, -0.1], abs=1e-5)
    loss = consistency_loss(logits, torch.tensor([[[0, 2]]]), "classes")[0][0]
    assert loss.tolist() == pytest.approx([0.029751225427, 0.001705452451], abs=1e-6)
    assert predictor.label(pixels).tolist() == [[[0, 2]]]
    with pytest.raises(ConfigError, match=r"palette: expected \(K, 3\)"):
        PaletteSegmentation(torch.zeros(1, 3))


def test_equal_predictions_are_certain() -> None:
    first, _, label = maps()
    reward, uncertainty = uncertainty_reward_loss(first, first, label, kind="map")
    torch.testing.assert_close(reward, consistency_loss(first, label, "map")[0].mean(1))
    assert not uncertainty.any()
    with pytest.raises(ValueError, match="kind"):
        consistency_loss(first, label, "edges")
    with pytest.raises(ValueError, match="branches"):
        uncertainty_reward_loss(first, first, label, kind="map", branches="two")


def test_a_scorer_is_a_consistency() -> None:
    consistency = ScorerConsistency(SoftBrightness(), target=1.0)
    pixels = torch.rand(2, 3, 16, 16, requires_grad=True)
    prediction = consistency.predict(pixels, ["a", "b"])
    loss, _ = consistency_loss(prediction, consistency.label(pixels), "scalar")
    loss.sum().backward()
    assert pixels.grad is not None and (pixels.grad < 0).all()
    with pytest.raises(ConfigError, match="gives no gradient"):
        ScorerConsistency(object(), 1.0)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_models_of_transformers(task: str, tmp_path: Any) -> None:
    import transformers

    if task == "segmentation":
        config = transformers.SegformerConfig(
            num_labels=4, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4,
            num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
        )  # fmt: skip
        model: Any = transformers.SegformerForSemanticSegmentation(config)
        processor: Any = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    else:
        config = transformers.DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
            image_size=32, patch_size=8, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
        )  # fmt: skip
        model = transformers.DPTForDepthEstimation(config)
        processor = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    palette = torch.eye(4)[:, :3] if task == "segmentation" else None
    consistency = TransformersConsistency(tmp_path, task, palette)
    pixels = torch.rand(2, 3, 48, 48, requires_grad=True)
    prediction = consistency.predict(pixels, ["a", "b"])
    label = consistency.label(torch.rand(2, 3, 48, 48))
    reward, _ = uncertainty_reward_loss(prediction, prediction, label, kind=consistency.kind)
    assert reward.shape == (2,) and reward.isfinite().all()
    reward.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersConsistency(tmp_path / "nothing", task, palette)
    with pytest.raises(ConfigError, match="segmentation needs the palette"):
        TransformersConsistency(tmp_path, "segmentation")


def test_ignored_pixels_have_no_gradient() -> None:
    first = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    label = torch.tensor([[[0, 255], [1, 2]]])
    for branches in ("one", "both"):
        reward, uncertainty = uncertainty_reward_loss(
            first, second, label, kind="classes", detach_weight=False, branches=branches
        )
        (slope,) = torch.autograd.grad((reward + uncertainty).sum(), first)
        assert slope.isfinite().all()
