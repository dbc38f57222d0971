"""One decode: every valid picture is read, as the same pixels, by training, labelling,
scoring and showing."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny import picture

from diffalign import cli, load_preferences, load_scorer
from diffalign.data.transforms import GroupTransform
from diffalign.errors import UserError
from diffalign.rewards.images import Preprocess, read_images
from diffalign.runtime import decoding

FORMATS = ["PNG", "JPEG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Four colours, so that every turn shows."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    image.paste((30, 200, 30), (width // 2, 0, width, height // 2))
    image.paste((30, 30, 200), (0, height // 2, width // 2, height))
    return image


def seen(source: Any) -> list[np.ndarray]:
    """The pixels that training, scoring and the scorer server's client see."""
    trained = load_preferences([{"prompt": "p", "image": source}], verbose=False)[0].open_images()[
        0
    ]
    scored = read_images([source])[0].image
    return [np.asarray(trained), np.asarray(scored), np.asarray(decoding.to_rgb(scored))]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_by_everyone(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quadrants(), kind, exif=exif)
    (height, width), name = decoding.header(data)
    assert name == kind
    first, *others = seen(data)
    assert first.shape == (height, width, 3) and (height > width) == (orientation > 4)
    assert all(np.array_equal(first, other) for other in others)
    turns = {
        1: (0, 0),
        2: (0, -1),
        3: (-1, -1),
        4: (-1, 0),
        5: (0, 0),
        6: (0, -1),
        7: (-1, -1),
        8: (-1, 0),
    }
    row, column = turns[orientation]
    assert first[row, column, 0] > 150  # the red corner, which was stored at the top left


def test_decoding_twice_changes_nothing():
    image = decoding.decode(encoded(quadrants(), "JPEG", exif=_exif(6)))
    assert np.array_equal(np.asarray(decoding.decode(image)), np.asarray(image))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "I",
        "I;16",
        "F",
    ],
)
def test_every_mode_becomes_8_bit_rgb_without_a_warning(mode, recwarn):
    image = decoding.decode(Image.new(mode, (5, 4)))
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert not recwarn.list


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 3 + [10, 20, 30])
    keyed = Image.new("RGB", (4, 4), (10, 20, 30))
    for data in (
        encoded(clear),
        encoded(palette, transparency=3),
        encoded(keyed, transparency=(10, 20, 30)),
        encoded(clear, "WEBP", lossless=True),
    ):
        assert all((pixels == 255).all() for pixels in seen(data))
    assert all((pixels == 127).all() for pixels in seen(encoded(half)))


def test_deep_grey_keeps_its_contrast():
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    for source in (
        encoded(Image.fromarray(ramp)),
        encoded(Image.fromarray(ramp), "TIFF"),
        Image.fromarray(ramp),
    ):
        assert all(np.array_equal(pixels[..., 0], ramp >> 8) for pixels in seen(source))
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert all(
        np.array_equal(pixels[..., 1], np.round(unit * 255))
        for pixels in seen(encoded(Image.fromarray(unit), "TIFF"))
    )
    assert all(
        np.array_equal(pixels[..., 2], np.floor(unit * 200))
        for pixels in seen(Image.fromarray(unit * 200))
    )


@pytest.mark.parametrize(
    "values",
    [
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), -3.0, np.float32),
        np.full((4, 4), 1e6, np.float32),
        np.full((4, 4), 1 << 20, np.int32),
    ],
)
def test_values_without_an_8_bit_form_are_refused(values):
    with pytest.raises(decoding.UnreadableImage, match="values"):
        decoding.decode(Image.fromarray(values))
    result = load_scorer("jpeg_compressibility").score([Image.fromarray(values)], on_error="nan")
    assert result.values.isnan().all() and "values" in result.errors[0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert all(pixels[4, 4, 0] > 200 and pixels[4, 4, 2] < 60 for pixels in seen(data))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_that_is_cut_off_is_never_half_a_picture(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(decoding.UnreadableImage):
        decoding.decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"GIF89a", "opened|decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image format"),
    ],
)
def test_what_is_no_picture_says_what_it_is(content, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, memoryview(content), tmp_path / "a.png"):
        with pytest.raises(decoding.UnreadableImage, match=reason):
            decoding.decode(source)


def test_embedded_pictures_read_alike_before_and_after_other_plugins_are_loaded():
    Image.init()
    for kind in FORMATS:
        data = encoded(quadrants(), kind)
        assert decoding.header(memoryview(data)) == decoding.header(data)
        assert np.array_equal(
            np.asarray(decoding.decode(memoryview(data))), np.asarray(decoding.decode(data))
        )


def test_huge_pictures_are_refused_before_they_are_decoded():
    header = encoded(Image.new("1", (13_000, 13_000)))
    with pytest.raises(decoding.UnreadableImage, match="13000x13000 pixels, more than 100 million"):
        decoding.header(header)


@pytest.mark.parametrize("size", [(1, 400_000), (400_000, 1), (3, 90_000)])
def test_thin_pictures_take_bounded_memory(size):
    image = Image.new("RGB", size, (9, 200, 3))
    pixels, geometry = GroupTransform((64, 64))([image])
    assert pixels.shape == (1, 3, 64, 64) and geometry.target_size == (64, 64)
    assert torch.allclose(
        pixels[0, :, 0, 0], torch.tensor([9.0, 200.0, 3.0]) / 127.5 - 1, atol=0.02
    )
    for preprocess in (Preprocess(), Preprocess(mode="letterbox"), Preprocess(mode="squash")):
        assert preprocess.exact(image).shape == (3, 224, 224)


def test_the_cut_of_a_thin_picture_is_where_the_whole_one_would_be_cropped():
    stripes = Image.fromarray(
        (np.arange(6400) // 100 * 4 % 256).astype(np.uint8)[None].repeat(50, 0)
    ).convert("RGB")
    pixels, geometry = GroupTransform((64, 64), center_crop=False)(
        [stripes], torch.Generator().manual_seed(3)
    )
    whole = stripes.resize((8192, 64), Image.Resampling.LANCZOS).crop(
        (geometry.crop_top_left[1], 0, geometry.crop_top_left[1] + 64, 64)
    )
    assert (
        np.abs(
            np.asarray(whole, dtype=float)[32, 4:60, 0]
            - (pixels[0, 0, 32, 4:60].numpy() + 1) * 127.5
        ).max()
        < 12
    )


ARRAYS = {
    "uint8": lambda a: a,
    "channels first": lambda a: a.transpose(2, 0, 1).copy(),
    "float": lambda a: a.astype(np.float32) / 255,
    "tensor": lambda a: torch.from_numpy(a.copy()),
    "float tensor, channels first": lambda a: torch.from_numpy(a.copy()).permute(2, 0, 1) / 255,
    "bfloat16-safe half": lambda a: (torch.from_numpy(a.copy()).permute(2, 0, 1) / 255).double(),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_and_tensors_are_pictures(form):
    array = np.asarray(quadrants())
    assert all(np.array_equal(pixels, array) for pixels in seen(ARRAYS[form](array)))
    rows = [{"prompt": "p", "images": [ARRAYS[form](array)] * 2, "scores": [1.0, 0.0]}]
    assert len(load_preferences(rows, verbose=False)[0].open_images()) == 2


@pytest.mark.parametrize(
    "cell",
    [
        [picture(1, 1)],
        3,
        2.5,
        {"a": 1},
        np.zeros((5, 5, 7)),
        np.full((4, 4, 3), 900.0),
        "no/such/file.png",
    ],
)
def test_cells_that_are_no_picture_are_described(cell):
    with pytest.raises(UserError) as caught:
        load_preferences([{"prompt": "p", "image": cell}], verbose=False)
    assert "indices must be" not in str(caught.value) and "object has no attribute" not in str(
        caught.value
    )


def test_inspect_decodes_and_convert_leaves_broken_pictures_behind(tmp_path, monkeypatch, capsys):
    def printed(*arguments):
        assert cli.run(["data", *arguments]) == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    for side in ("chosen", "rejected"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(30):
            picture(100 + i, i).save(tmp_path / "pairs" / side / f"{i:02}.jpg")
            (tmp_path / "pairs/chosen" / f"{i:02}.txt").write_text("p")
    file = tmp_path / "pairs/rejected/07.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        file
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    whole = printed("inspect", "pairs")
    assert "1 (rows 7)" in whole and "row 7: image cannot be" in whole
    assert "headers only" in printed("inspect", "pairs", "--verify_images", "header")
    converted = printed("convert", "pairs", "--output_dir", "out")
    assert "1 broken rows skipped (row 7" in converted
    assert len(load_preferences(tmp_path / "out", verbose=False)) == 29


@pytest.mark.nightly
def test_mutated_pictures_decode_or_say_why():
    """600 mutated files per format: an image of its header's size, or one sentence."""
    generator = random.Random(0)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    reasons: list[str] = []
    kinds = [*FORMATS, "GIF", "BMP", "PPM", "ICO", "TGA", "JPEG2000"]
    for number in range(600):
        data = bytearray(encoded(noise, kinds[number % len(kinds)]))
        for _ in range(generator.randint(1, 8)):
            place = generator.randrange(len(data))
            if generator.random() < 0.2:
                del data[place:]
                data = data or bytearray(b"x")
            else:
                data[place] = generator.randrange(256)
        try:
            image = decoding.decode(bytes(data))
        except decoding.UnreadableImage as error:
            reasons.append(str(error))
        else:
            assert image.mode == "RGB" and min(image.size) > 0
    assert len(reasons) > 50 and all(reason and "\n" not in reason for reason in reasons)
