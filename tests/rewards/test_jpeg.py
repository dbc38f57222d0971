"""The JPEG scorers: the published numbers, and what they depend on."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, features

from diffalign import load_scorer
from diffalign.errors import ConfigError
from diffalign.rewards.registry import get_spec
from diffalign.rewards.scorers import jpeg


def noise(seed: int = 0, size: tuple[int, int] = (40, 56)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, **options) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95, **options)
    return len(buffer.getvalue())


def test_kilobytes_with_either_sign_and_in_the_units_of_the_papers():
    images = [noise(), Image.new("RGB", (40, 56), (9, 200, 30))]
    kilobytes = [encoded(image) / 1000 for image in images]
    assert load_scorer("jpeg_incompressibility")(images).tolist() == pytest.approx(kilobytes)
    assert load_scorer("jpeg_compressibility")(images).tolist() == pytest.approx(
        [-value for value in kilobytes]
    )
    flow = load_scorer("jpeg_compressibility", scale=500 * 1000)(images)
    assert flow.tolist() == pytest.approx([-value / 500 for value in kilobytes])
    assert kilobytes[0] > 4 * kilobytes[1]


def test_chroma_is_subsampled_as_pillow_does_by_default():
    assert (
        encoded(noise())
        == encoded(noise(), subsampling="4:2:0")
        < encoded(noise(), subsampling="4:4:4")
    )
    assert jpeg.jpeg_bytes(noise()) == encoded(noise())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_other_modes_are_converted_to_rgb(mode):
    image = noise().convert(mode)
    assert float(load_scorer("jpeg_incompressibility")([image])[0]) == pytest.approx(
        encoded(image) / 1000
    )


def test_the_card_and_the_build_of_libjpeg():
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        spec = get_spec(name)
        assert (
            spec.requires == ("image",)
            and spec.range is None
            and spec.higher_is_better
            and not spec.differentiable
        )
        assert "smoke tests" in spec.summary
    scorer = load_scorer("jpeg_compressibility")
    assert scorer.identity()["libjpeg"] == features.version_codec("jpg")
    assert {
        scorer.fingerprint(),
        load_scorer("jpeg_compressibility", scale=500_000).fingerprint(),
    } != {scorer.fingerprint()}
    assert scorer.fingerprint() != load_scorer("jpeg_incompressibility").fingerprint()


def test_another_build_of_libjpeg_is_another_fingerprint(monkeypatch):
    here = load_scorer("jpeg_compressibility").fingerprint()
    monkeypatch.setattr(features, "version_codec", lambda codec: "6b")
    assert load_scorer("jpeg_compressibility").fingerprint() != here


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan"), "1000", True])
def test_a_scale_that_is_no_scale(scale):
    with pytest.raises(ConfigError, match="scale: expected a number above 0"):
        load_scorer("jpeg_compressibility", scale=scale)
