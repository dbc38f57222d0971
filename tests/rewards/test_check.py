"""`check_scorer` on sound scorers, and on ones that are broken on purpose: each fault
must be found, and by the check meant for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from models import load_tiny
from PIL import Image

from diffalign import load_scorer
from diffalign.errors import UserError
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.images import Preprocess
from diffalign.rewards.model_scorer import ModelScorer
from diffalign.rewards.registry import register_scorer
from diffalign.rewards.scorers import mps
from diffalign.rewards.spec import ScorerSpec
from diffalign.rewards.testing.check import CheckReport, check_scorer


def states(report: CheckReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def failed(report: CheckReport) -> set[str]:
    return {check.name for check in report.checks if check.status == "failed"}


def mean(image: Image.Image) -> float:
    return float(np.asarray(image.convert("RGB")).mean())


class Linear(ModelScorer):
    """A sound neural scorer: linear in the pixels, plus the prompt's length."""

    spec = ScorerSpec(key="check-linear", summary="linear", differentiable=True)

    def __init__(self, **options):
        super().__init__(**options)
        self.preprocess = Preprocess(size=16)
        self.weight = torch.linspace(-1, 1, 3 * 256) / 256

    def text_features(self, prompts):
        return (torch.tensor([float(len(prompt)) for prompt in prompts]) / 100,)

    def image_features(self, pixels):
        return pixels.flatten(1) @ self.weight

    def similarity(self, image, text):
        return image + text[0]


class BatchMax(Linear):
    """Divides by the largest of the batch."""

    def similarity(self, image, text):
        scores = super().similarity(image, text)
        return scores / scores.abs().max()


class TextBatchMax(Linear):
    """Divides its text features by the largest of the batch, as MPS's published code
    divides its token selection."""

    def text_features(self, prompts):
        (lengths,) = super().text_features(prompts)
        return (lengths / lengths.max(),)


class Dead(Linear):
    """Declares a gradient and cuts it."""

    def image_features(self, pixels):
        return super().image_features(pixels.detach())


class Flat(Linear):
    """Its gradient is zero."""

    def image_features(self, pixels):
        return super().image_features(pixels).round() + 0 * pixels.flatten(1).sum(1)


class _Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Downhill(Linear):
    """Its gradient has the wrong sign."""

    def image_features(self, pixels):
        return super().image_features(_Flipped.apply(pixels))


class OtherTensor(Linear):
    """The differentiable mode is another model."""

    def score_tensor(self, pixels, prompts=None):
        return 3 * super().score_tensor(pixels, prompts) + 1


class Mixed(Linear):
    """The differentiable mode lets images look at each other."""

    def score_tensor(self, pixels, prompts=None):
        scores = super().score_tensor(pixels, prompts)
        return scores + 0.3 * (scores.mean() - scores)


def test_sound_scorers_pass_every_check():
    report = check_scorer(Linear())
    assert report.ok and set(states(report).values()) == {"passed"}
    report.raise_if_failed()
    assert str(report).startswith("check-linear\n") and "batch size" in str(report)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (BatchMax, {"batch size", "gradient"}),  # of which an image's neighbours also take part
        (TextBatchMax, {"batch size"}),
        (Dead, {"gradient"}),
        (Flat, {"gradient"}),
        (Downhill, {"gradient"}),
        (OtherTensor, {"modes"}),
        (Mixed, {"gradient"}),
    ],
)
def test_broken_neural_scorers_are_caught(broken, found):
    report = check_scorer(broken())
    assert not report.ok
    assert failed(report) == found, report
    with pytest.raises(
        UserError, match=f"check-linear fails {len(found)} of 10 checks; {sorted(found)[0]}: "
    ):
        report.raise_if_failed()


def test_remembered_prompts_and_merged_items_do_not_hide_a_fault():
    """What the caller sees may look sound, since every unique prompt is encoded once:
    the model is asked directly."""
    scorer = TextBatchMax()
    images = [Image.new("RGB", (20, 20), (i * 30, 10, 200 - i * 20)) for i in range(5)]
    prompts = ["a", "bb", "cccc", "dd", "eeeee"]
    together = scorer(images, prompts)
    alone = torch.cat(
        [scorer([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    )
    torch.testing.assert_close(together, alone)
    assert "batch size" in failed(check_scorer(scorer, images, prompts))


@pytest.mark.nightly
def test_mps_as_published_is_caught_and_mps_as_written_here_is_not(tmp_path, monkeypatch):
    scorer = load_tiny("mps", tmp_path)
    check_scorer(scorer).raise_if_failed()

    def over_the_batch(tokens, condition, threshold):
        similarity = (tokens @ condition.T).amax(-1)
        return similarity / similarity.max() > threshold

    monkeypatch.setattr(mps, "select_tokens", over_the_batch)
    assert "batch size" in failed(check_scorer(scorer))


def test_broken_functions_are_caught():
    made = itertools.count()

    @register_scorer("check-normalised", requires=("image",))
    def normalised(images):
        scores = [mean(image) for image in images]
        return [score / max(scores) for score in scores]

    @register_scorer("check-short", requires=("image",))
    def short(images):
        return [mean(image) for image in images][:-1]

    @register_scorer("check-nan", requires=("image",))
    def not_a_number(images):
        return [float("nan") if image.width > 100 else mean(image) for image in images]

    @register_scorer("check-ordered", requires=("image",))
    def ordered(images):
        return [mean(image) + 10 * i for i, image in enumerate(images)]

    @register_scorer("check-restless", requires=("image",))
    def restless(images):
        return [mean(image) + next(made) for image in images]

    @register_scorer("check-raises", requires=("image",))
    def raises(images):
        raise RuntimeError("no such luck")

    expected = {
        "check-normalised": {"batch size"},
        "check-short": {"length"},
        "check-nan": {"finite"},
        "check-ordered": {"permutation", "duplicates", "batch size"},
        "check-restless": {"repeatable"},
        "check-raises": {"length"},
    }
    for name, checks in expected.items():
        report = check_scorer(load_scorer(name))
        assert checks <= failed(report), (name, report)
        assert not report.ok
    assert "6 scores for 7 images" in str(check_scorer(load_scorer("check-short")))
    raised = check_scorer(load_scorer("check-raises"))
    assert "RuntimeError: no such luck" in str(raised)
    assert states(raised)["batch size"] == "skipped"


def test_a_scorer_that_reads_the_encoded_file_is_caught():
    class FromFile(Scorer):
        """Scores encoded images by their size on disk."""

        spec = ScorerSpec(key="check-file", summary="bytes", requires=("image",))

        def score_batch(self, items: list[Item]):
            return [
                float(len(i.input.source)) if isinstance(i.input.source, bytes) else mean(i.image)
                for i in items
            ]

    assert failed(check_scorer(FromFile())) == {"input form"}


def test_declared_randomness_skips_what_cannot_hold():
    class Judge(Scorer):
        """A judge with a mood."""

        spec = ScorerSpec(key="check-judge", summary="random", requires=("image",))
        deterministic = False

        def score_batch(self, items: list[Item]):
            return torch.rand(len(items))

    report = check_scorer(Judge())
    assert report.ok
    assert states(report)["batch size"] == states(report)["repeatable"] == "skipped"
    assert states(report)["length"] == states(report)["finite"] == "passed"


def test_the_cache_neither_hides_faults_nor_is_written(tmp_path):
    scorer = BatchMax(cache=tmp_path / "scores.sqlite")
    cache = scorer.cache
    assert "batch size" in failed(check_scorer(scorer))
    assert scorer.cache is cache and len(cache) == 0


def test_shapes_scorers_get_prompts_that_they_understand():
    for name in ("shapes", "shapes-clip"):
        report = check_scorer(load_scorer(name))
        report.raise_if_failed()
        (range_,) = [check.sentence for check in report.checks if check.name == "finite"]
        low, high = (float(word) for word in range_.split() if word[-1].isdigit())
        assert high - low > 0.3, range_  # images of right and of wrong prompts


def test_callers_mistakes_are_theirs():
    class Needy(Linear):
        """Needs metadata."""

        spec = ScorerSpec(key="check-needy", summary="needs", requires=("image", "metadata"))

    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    with pytest.raises(UserError, match="check-needy needs metadata"):
        check_scorer(Needy())
    with pytest.raises(UserError, match="at least 4, got 3"):
        check_scorer(Linear(), images[:3], ["a", "b", "c"])
    with pytest.raises(UserError, match="2 prompts for 4 images"):
        check_scorer(Linear(), images, ["a", "b"])
    with pytest.raises(UserError, match="got 1 for 4 images"):
        check_scorer(Needy(), images, metadata=[{}])
