"""What every scorer does around its model: bad input, duplicates, batches, memory,
missing values, the two modes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import UserError, load_scorer
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.images import Preprocess, read_images
from diffalign.rewards.model_scorer import ModelScorer
from diffalign.rewards.spec import ScorerSpec


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


class Brightness(Scorer):
    """Mean of the pixels; counts what it is asked to score."""

    spec = ScorerSpec(key="test-brightness", summary="mean", requires=("image",))

    def __init__(self, **options):
        super().__init__(**options)
        self.batches: list[int] = []

    def score_batch(self, items: list[Item]):
        self.batches.append(len(items))
        return [float(np.asarray(item.image.convert("RGB")).mean()) for item in items]


class Fussy(Brightness):
    """Holds at most `room` images at once."""

    spec = ScorerSpec(key="test-fussy", summary="mean")
    room = 3

    def score_batch(self, items: list[Item]):
        if len(items) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super().score_batch(items)


class Toy(ModelScorer):
    """A linear model of pixels and prompt length."""

    spec = ScorerSpec(key="test-toy", summary="linear", differentiable=True)

    def __init__(self, **options):
        super().__init__(**options)
        self.preprocess = Preprocess(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
        self.weight = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32)
        self.encoded: list[str] = []
        self.seen: list[int] = []

    def text_features(self, prompts):
        self.encoded += prompts
        return (torch.tensor([float(len(prompt)) for prompt in prompts]),)

    def image_features(self, pixels):
        self.seen.append(len(pixels))
        return pixels.flatten(1) @ self.weight.to(pixels.dtype)

    def similarity(self, image, text):
        return image + text[0]


def test_values_are_float32_on_the_cpu_in_order():
    images = [picture(i) for i in range(5)]
    found = Brightness()(images)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    torch.testing.assert_close(
        found, torch.tensor([np.asarray(image).mean() for image in images], dtype=torch.float32)
    )


def test_every_accepted_form_gives_the_same_number(tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    floats = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    scorer = Brightness()
    expected = float(array.mean())
    forms = [
        [image],
        [str(tmp_path / "a.png")],
        [tmp_path / "a.png"],
        [png(image)],
        [{"bytes": png(image), "path": None}],
        [array],
    ]
    forms += [floats, (floats * 255).to(torch.uint8), array[None], [floats[0]]]
    for form in forms:
        assert float(scorer(form)[0]) == pytest.approx(expected, abs=1e-4)


def test_float_tensors_are_rounded_like_a_saved_image():
    floats = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    (read,) = read_images(floats)
    expected = (floats[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(read.image), expected)


def test_equal_images_with_equal_prompts_are_scored_once():
    scorer = Fussy()
    image = picture(0)
    found = scorer([image, picture(1), image, image], ["a", "a", "a", "b"])
    assert sum(scorer.batches) == 3
    assert found[0] == found[2] == found[3]


def test_out_of_memory_halves_the_batch_and_remembers():
    scorer = Fussy(batch_size=8)
    images = [picture(i) for i in range(8)]
    found = scorer(images, [""] * 8)
    assert scorer.batches == [2, 2, 2, 2]
    torch.testing.assert_close(found, Brightness()(images))
    scorer.batches.clear()
    scorer([picture(i) for i in range(20, 24)], [""] * 4)
    assert scorer.batches == [2, 2]
    scorer.room = 0
    with pytest.raises(UserError, match="one image does not fit into the memory"):
        scorer([picture(99)], [""])


def test_out_of_memory_in_a_tower_halves_too():
    scorer = Toy(batch_size=8)
    inner = scorer.image_features

    def fussy(pixels):
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return inner(pixels)

    images, prompts = [picture(i) for i in range(7)], ["word"] * 7
    expected = scorer(images, prompts)
    scorer.image_features = fussy
    scorer.seen.clear()
    torch.testing.assert_close(scorer(images, prompts), expected)
    assert max(scorer.seen) <= 2


def test_unique_prompts_are_encoded_once_over_calls():
    scorer = Toy(batch_size=2)
    scorer([picture(i) for i in range(6)], ["a", "bb", "a", "bb", "a", "ccc"])
    assert sorted(scorer.encoded) == ["a", "bb", "ccc"]
    scorer([picture(7)], ["bb"])
    assert sorted(scorer.encoded) == ["a", "bb", "ccc"]


def test_batch_size_and_order_change_nothing():
    images, prompts = (
        [picture(i, (30 + i, 50 - i)) for i in range(9)],
        ["x" * (i % 4) for i in range(9)],
    )
    whole = Toy()(images, prompts)
    for size in (1, 2, 5):
        torch.testing.assert_close(
            Toy(batch_size=size)(images, prompts), whole, atol=1e-5, rtol=1e-6
        )
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    shuffled = Toy()([images[i] for i in order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=1e-6)


def test_the_tensor_mode_has_the_gradient_of_its_formula():
    scorer = Toy()
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    scores = scorer.score_tensor(pixels, ["a", "bb"])
    scores.sum().backward()
    torch.testing.assert_close(pixels.grad[0].flatten(), scorer.weight)
    exact = scorer(pixels.detach(), ["a", "bb"])
    torch.testing.assert_close(scores.detach(), exact, atol=0.5, rtol=0)


def test_scorers_without_gradient_refuse_tensors():
    with pytest.raises(UserError, match="has no gradient"):
        Brightness().score_tensor(torch.rand(1, 3, 4, 4))


def test_missing_and_infinite_scores_are_nan_with_a_reason():
    class Partly(Brightness):
        spec = ScorerSpec(key="test-partly", summary="partly", requires=("image",))

        def score_batch(self, items):
            return [1.0, None, 1e300, float("nan")], {1: "no detector"}

    result = Partly().score([picture(i) for i in range(4)])
    assert result.values[0] == 1 and result.values[1:].isnan().all()
    assert result.errors == {1: "no detector", 2: "the score is infinite"}


def test_a_scorer_that_returns_the_wrong_number_is_named():
    class Short(Brightness):
        spec = ScorerSpec(key="test-short", summary="short", requires=("image",))

        def score_batch(self, items):
            return [1.0]

    with pytest.raises(UserError, match=r"test-short: returned 1 scores for 2 images"):
        Short()([picture(0), picture(1)])


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([], [], "images: the list is empty"),
        ([picture(0)], ["a", "b"], "prompts: expected one per image, got 2 prompts for 1 images"),
        ([picture(0), picture(1)], "a", r"write \[prompt\] \* 2"),
        ([picture(0)], None, "give one prompt per image"),
        ([picture(0)], [None], r"prompts\[0\]: expected text, got None"),
        (picture(0), ["a"], "expected a list, got one Image"),
        ([3], ["a"], r"images\[0\]: expected a PIL image"),
        (["missing.png"], ["a"], r"images\[0\]: there is no image file 'missing.png'"),
        ([b"no image"], ["a"], r"images\[0\]: the image cannot be used: image cannot be opened"),
        (
            [png(picture(0))[:60]],
            ["a"],
            r"images\[0\]: the image cannot be used: image cannot be decoded",
        ),
        (
            [Image.new("RGB", (0, 5))],
            ["a"],
            r"images\[0\]: the image cannot be used: the image is empty, 0x5",
        ),
        (
            [np.full((4, 4, 3), 7.0)],
            ["a"],
            r"images\[0\]: an array of float64 with shape \(4, 4, 3\) runs from 7 to 7, "
            r"expected \[0, 1\]",
        ),
        ([np.zeros((4, 4, 3), np.int64)], ["a"], r"images\[0\]: an array of int64 .* is no image"),
        (torch.full((1, 3, 4, 4), float("nan")), ["a"], "some values are not finite"),
        (torch.full((1, 3, 4, 4), -1.0), ["a"], r"expected \[0, 1\]; images in \[-1, 1\]"),
        (torch.full((1, 3, 4, 4), 200.0), ["a"], r"images in \[0, 255\] go in as uint8"),
        (torch.rand(1, 4, 4, 4), ["a"], r"expected shape \(N, 3, H, W\)"),
        (torch.rand(0, 3, 4, 4), [], "is empty"),
    ],
)
def test_bad_input_is_one_clear_sentence(images, prompts, message):
    with pytest.raises(UserError, match=message) as caught:
        Fussy()(images, prompts)
    assert "\n" not in str(caught.value)


def test_unreadable_images_can_be_missing_scores():
    for scorer in (Fussy(), Toy()):
        result = scorer.score(
            [picture(0), b"broken", "nowhere.png", picture(1)], ["a"] * 4, on_error="nan"
        )
        assert result.values[[0, 3]].isfinite().all() and result.values[[1, 2]].isnan().all()
        assert set(result.errors) == {1, 2} and "nowhere.png" in result.errors[2]


def test_the_cache_answers_known_images_without_the_model(tmp_path):
    image = picture(0)
    (tmp_path / "a.png").write_bytes(png(image))
    first = Toy(cache=tmp_path / "scores.sqlite")
    expected = first([image, picture(1)], ["a", "b"])
    second = Toy(cache=tmp_path / "scores.sqlite")
    result = second.score([tmp_path / "a.png", picture(1)], ["a", "b"])
    assert second.seen == [] and result.cached == 2
    assert torch.equal(result.values, expected)
    third = Toy(cache=tmp_path / "scores.sqlite", dtype="bfloat16")
    assert third.fingerprint() != first.fingerprint()
    result = second.score([tmp_path / "a.png"], ["other"])
    assert result.cached == 0 and second.seen == [1]


def test_missing_scores_are_not_cached(tmp_path):
    class Flaky(Brightness):
        spec = ScorerSpec(key="test-flaky", summary="flaky", requires=("image",))
        down = True

        def score_batch(self, items):
            return [float("nan")] * len(items) if self.down else super().score_batch(items)

    scorer = Flaky(cache=tmp_path / "scores.sqlite")
    assert scorer([picture(0)]).isnan().all()
    scorer.down = False
    assert scorer([picture(0)]).isfinite().all()


def test_options_are_checked():
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected int >= 1"),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
    ):
        with pytest.raises(UserError, match=message):
            Brightness(**options)
    with pytest.raises(UserError, match="on_error: expected raise or nan"):
        Brightness().score([picture(0)], on_error="ignore")


def test_a_changed_file_is_never_answered_from_the_cache(tmp_path):
    """Neither right after writing nor when the file is old and its size is the same."""
    import os

    path = tmp_path / "a.bmp"  # every picture of one size has the same number of bytes
    scorer = Brightness(cache=tmp_path / "scores.sqlite")
    old = 1_600_000_000
    for seed in range(4):
        picture(seed).save(path)
        os.utime(path, (old, old))
        for _ in range(2):
            assert float(scorer([path])[0]) == pytest.approx(
                float(np.asarray(picture(seed)).mean()), abs=1e-4
            )
    assert sum(scorer.batches) == 4


def test_an_untouched_file_is_known_without_being_read(tmp_path, monkeypatch):
    from diffalign.rewards import content_key

    monkeypatch.setattr(content_key, "_SETTLED", 0.0)
    picture(0).save(tmp_path / "a.png")
    scorer = Brightness(cache=tmp_path / "scores.sqlite")
    expected = scorer([tmp_path / "a.png"])
    monkeypatch.setattr(
        type(read_images([tmp_path / "a.png"])[0]),
        "encoded",
        lambda self: pytest.fail("the file was read"),
    )
    result = scorer.score([tmp_path / "a.png"])
    assert result.cached == 1 and torch.equal(result.values, expected)


def test_16_bit_images_are_scored_by_their_high_byte():
    values = np.arange(0, 40 * 30 * 16, 16, dtype=np.uint16).reshape(30, 40)
    found = Brightness()([Image.fromarray(values)])
    assert float(found[0]) == pytest.approx(float((values >> 8).mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "carries no gradient"),
        (torch.full((1, 3, 4, 4), float("inf")), "not finite"),
        (torch.full((1, 3, 4, 4), 2.0), r"expected \[0, 1\]"),
        (torch.rand(3, 4, 4), r"expected shape \(N, 3, H, W\)"),
        ([[0.5]], "expected a float tensor"),
    ],
)
def test_bad_pixels_of_the_differentiable_mode(pixels, message):
    with pytest.raises(UserError, match=message):
        Toy().score_tensor(pixels, ["a"])


def test_prompts_of_the_differentiable_mode_are_checked_too():
    with pytest.raises(UserError, match="got 1 prompts for 2 images"):
        Toy().score_tensor(torch.rand(2, 3, 8, 8), ["a"])


def test_more_prompts_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run asks again for prompts that stand at the edge of being forgotten."""
    from diffalign.rewards import model_scorer
    from diffalign.rewards.testing.reference import SCENES, drawn_images

    monkeypatch.setattr(model_scorer, "_TEXTS_KEPT", 3)
    scorer, images = load_scorer("shapes-clip"), drawn_images(SCENES)
    expected = scorer(images, SCENES)
    for order in ([0, 1, 2], [3, 0], [1, 2, 0], [3, 1, 2]):
        found = scorer([images[i] for i in order], [SCENES[i] for i in order])
        assert torch.allclose(found, expected[order], atol=1e-5)
        pixels = torch.rand(len(order), 3, 64, 64)
        assert scorer.score_tensor(pixels, [SCENES[i] for i in order]).shape == (len(order),)
