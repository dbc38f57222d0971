import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.transforms import Geometry, GroupTransform, check_resolution
from diffalign.errors import ConfigError, UserError


def ramp(height, width):
    """Red grows to the right, green downwards, both from 0 to 255 whatever the size."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None, :]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_image_of_the_size_is_bit_exact():
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pixels, geometry = GroupTransform((16, 24))([Image.fromarray(array)])
    assert pixels.shape == (1, 3, 16, 24) and pixels.dtype == torch.float32
    assert torch.equal(
        ((pixels[0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(array).permute(2, 0, 1)
    )
    assert (pixels.min() >= -1, pixels.max() <= 1) == (True, True)
    assert geometry == Geometry((16, 24), (0, 0), (16, 24))


def test_a_flipped_image_of_the_size_is_its_mirror():
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    transform = GroupTransform((16, 24), random_flip=True)
    results = [transform([Image.fromarray(array)], generator(seed))[0] for seed in range(20)]
    plain = GroupTransform((16, 24))([Image.fromarray(array)])[0]
    kinds = {
        "plain"
        if torch.equal(r, plain)
        else "mirror"
        if torch.equal(r, plain.flip(-1))
        else "wrong"
        for r in results
    }
    assert kinds == {"plain", "mirror"}


def test_nothing_is_stretched():
    """A disc stays a disc in images wider, higher, larger, smaller than the target."""
    for height, width in ((40, 80), (80, 40), (128, 128), (20, 30)):
        y, x = np.mgrid[:height, :width] + 0.5
        disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(height, width) * 0.4) ** 2
        pixels, _ = GroupTransform((64, 64))(
            [Image.fromarray(np.repeat((disc * 255).astype(np.uint8)[..., None], 3, 2))]
        )
        seen = pixels[0, 0] > 0
        across, down = seen.any(0).sum().item(), seen.any(1).sum().item()
        assert abs(across - down) <= 2
        assert abs(across - 64 * 0.8) <= 3


@pytest.mark.parametrize("center_crop", [True, False])
def test_all_images_of_a_group_get_the_same_relative_crop_and_flip(center_crop):
    """Equal content at different sizes comes out equal: same place, same flip."""
    transform = GroupTransform((32, 32), center_crop=center_crop, random_flip=True)
    for seed in range(6):
        pixels, _ = transform([ramp(64, 128), ramp(128, 256), ramp(48, 96)], generator(seed))
        assert (pixels - pixels[:1]).abs().max() < 0.12


def test_crop_coordinates_point_at_the_crop():
    """The result is the resized (flipped) image, cropped where the geometry says."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 100, 3), dtype=np.uint8))
    transform = GroupTransform((32, 32), center_crop=False, random_flip=True)
    resized = image.resize((80, 32), Image.Resampling.LANCZOS)
    mirrored = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    lefts, flips = set(), set()
    for seed in range(12):
        pixels, geometry = transform([image], generator(seed))
        assert (geometry.original_size, geometry.target_size) == ((40, 100), (32, 32))
        top, left = geometry.crop_top_left
        got = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        matches = [
            np.array_equal(got, np.asarray(source.crop((left, top, left + 32, top + 32))))
            for source in (resized, mirrored)
        ]
        assert sum(matches) == 1
        lefts.add(left)
        flips.add(matches[1])
    assert len(lefts) > 6 and flips == {False, True}


def test_center_crop_is_central():
    _, geometry = GroupTransform((32, 32))([ramp(32, 80)])
    assert geometry.crop_top_left == (0, 24)
    _, geometry = GroupTransform((32, 32))([ramp(160, 64)])
    assert geometry.crop_top_left == (24, 0)


def test_randomness_comes_from_the_generator_alone():
    transform = GroupTransform((16, 16), center_crop=False, random_flip=True)
    image = ramp(16, 64)
    torch.manual_seed(0)
    first = transform([image], generator(3))
    torch.manual_seed(1)
    again = transform([image], generator(3))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert len({transform([image], generator(seed))[1].crop_top_left for seed in range(8)}) > 4
    with pytest.raises(ValueError, match="generator"):
        transform([image])


def test_deterministic_and_fingerprint():
    transforms = [
        GroupTransform((16, 16)),
        GroupTransform((16, 24)),
        GroupTransform([(16, 16)]),
        GroupTransform((16, 16), center_crop=False),
        GroupTransform((16, 16), random_flip=True),
        GroupTransform([(16, 16)], mismatch="letterbox"),
    ]
    assert len({transform.fingerprint for transform in transforms}) == 6
    assert GroupTransform((16, 16)).fingerprint == transforms[0].fingerprint
    assert [transform.deterministic for transform in transforms] == [
        True,
        True,
        True,
        False,
        False,
        True,
    ]


BUCKETS = [(64, 64), (48, 80), (80, 48)]


def test_buckets_are_chosen_by_aspect():
    transform = GroupTransform(BUCKETS)
    assert [transform.bucket_of([size, size]) for size in ((500, 500), (300, 500), (900, 540))] == [
        0,
        1,
        2,
    ]
    pixels, geometry = transform([ramp(300, 500), ramp(60, 100)])
    assert pixels.shape == (2, 3, 48, 80) and geometry.target_size == (48, 80)


def test_groups_of_unequal_aspect_are_dropped_or_letterboxed():
    images = [ramp(64, 64), Image.new("RGB", (96, 48), "white")]
    transform = GroupTransform(BUCKETS)
    assert transform.bucket_of([(64, 64), (48, 96)]) is None
    assert transform.bucket_of([(64, 64), (64, 66)]) == 0  # a few pixels are no mismatch
    with pytest.raises(UserError, match="no common bucket"):
        transform(images)
    boxed = GroupTransform(BUCKETS, mismatch="letterbox")
    assert boxed.bucket_of([(64, 64), (48, 96)]) == 0
    pixels, _ = boxed(images)
    white = pixels[1, 0] == 1
    assert (
        white.any(1).sum() == 32 and white.any(0).sum() == 64
    )  # 2:1 as before, black above and below
    assert white[16:48].all() and (pixels[1, 0, :16] == -1).all()


def test_a_fixed_size_takes_every_group():
    assert GroupTransform((64, 64)).bucket_of([(64, 64), (48, 96)]) == 0


def test_check_resolution():
    check_resolution(512, 8)
    check_resolution((512, 640), 64)
    with pytest.raises(
        ConfigError, match="data.resolution: 500 is not divisible by 8, .*; use 496 or 504"
    ):
        check_resolution(500, 8)
    with pytest.raises(ConfigError, match="data.x: 5 is not divisible by 8, .*; use 8$"):
        check_resolution((8, 5), 8, field="data.x")
    with pytest.raises(ConfigError, match="above 0, got -8"):
        check_resolution(-8, 8)


def test_extreme_shapes_keep_the_target():
    for height, width in ((1, 1), (3, 1000), (1000, 3)):
        pixels, _ = GroupTransform((24, 16))([Image.new("RGB", (width, height), "red")])
        assert pixels.shape == (1, 3, 24, 16)
        assert math.isclose(pixels[0, 0].mean(), 1.0, abs_tol=1e-6)
