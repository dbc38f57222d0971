"""Check that a scorer fulfils the contract of `Scorer`.

The checks are for authors of plug-ins and for the tests of this package. They call the
model directly, without anything that could hide a bug: equal items are not merged, no
score comes from a cache, and all prompts of a batch are encoded together. This reveals
scores that depend on the rest of the batch, as those of the published MPS code do.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ..base import Item, Scorer
from ..images import Images, quantise, read_images
from ..model_scorer import ModelScorer
from ..scoring import checked_scores, make_items

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

PROMPTS = (
    "a photo of a red cat on a wooden chair",
    "an oil painting of two dogs in the snow",
    "a blue bicycle leaning against a brick wall, morning light, highly detailed",
    "portrait of an old woman, studio photograph",
    "a castle on a hill at sunset",
    "bowl of soup",
    "three green apples and one yellow banana on a white table",
)
"""The default prompts.

They differ in length and content, so that padding and batch statistics would show.
"""
_SIZES = (
    (96, 72),
    (64, 64),
    (80, 120),
    (224, 224),
    (130, 50),
    (64, 64),
    (57, 83),
)
"""Width and height of the default images."""


@dataclass
class Check:
    """One check: its name, `passed`, `failed` or `skipped`, and a sentence."""

    name: str
    status: str
    sentence: str


@dataclass
class CheckReport:
    """What `check_scorer` found."""

    scorer: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.status != "failed" for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise `UserError` with the sentences of the failed checks."""
        failed = [
            f"{check.name}: {check.sentence}" for check in self.checks if check.status == "failed"
        ]
        if failed:
            raise UserError(
                f"{self.scorer} fails {len(failed)} of {len(self.checks)} checks; "
                f"{'; '.join(failed)}"
            )

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        return "\n".join(
            [self.scorer, *(f"  {c.name:{width}}  {c.status:7}  {c.sentence}" for c in self.checks)]
        )


class _Skip(Exception):
    """This check does not apply. The message says why."""


class _Fail(Exception):
    """This check failed. The message says how."""


def check_scorer(
    scorer: Scorer,
    images: Images | None = None,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    tolerance: float = 1e-4,
) -> CheckReport:
    """Check a scorer on a handful of images.

    The checks, by name:

    - `length`: one number per image.
    - `finite`: no missing and no infinite one.
    - `repeatable`: twice the same call gives the same.
    - `duplicates`: an image given twice in a batch gets one score.
    - `permutation`: the order of a batch does not matter.
    - `batch size`: batches of 1, 3 and all give the same.
    - `public call`: `score` returns what the model says.
    - `input form`: PIL image, uint8 array and PNG bytes give the same.
    - `gradient`, where declared: finite, not zero, none from other images, and uphill
      raises the score.
    - `modes`: the differentiable score is near the exact one.

    Args:
        scorer (`Scorer`): to be checked. It is left as it is.
        images (*optional*): at least four different ones, in any form of `read_images`.
            By default smooth random images of several sizes, and pictures of the shapes
            world for its scorers.
        prompts (list of `str`, *optional*): one per image, different from each other.
            By default sentences of different lengths.
        metadata (list of mappings, *optional*): one per image, for scorers that require
            it.
        tolerance (`float`, *optional*, defaults to 1e-4): largest difference, relative
            to the largest score, that counts as rounding. Half-precision towers need
            about 2e-2.

    Returns:
        `CheckReport`: the outcome of each check.

    Raises:
        UserError: fewer than four images, a scorer that requires metadata without any
            given, or input that no scorer would take.

    Example:
        ```python
        report = check_scorer(load_scorer("jpeg_compressibility"))
        assert report.ok, report
        ```
    """
    if images is None:
        if "metadata" in scorer.spec.requires and metadata is None:
            raise UserError(
                f"metadata: {scorer.name} needs metadata that fit the images; "
                "give images, prompts and metadata"
            )
        images, drawn = _default_images(scorer)
        prompts = drawn if prompts is None else prompts
    pictures = [item.image for item in read_images(images)]
    if len(pictures) < 4:
        raise UserError(
            f"images: expected at least 4, got {len(pictures)}; "
            "fewer do not show what depends on the batch"
        )
    prompts = list((PROMPTS * len(pictures))[: len(pictures)] if prompts is None else prompts)
    bench = _Bench(scorer, pictures, prompts, metadata, tolerance)
    report = CheckReport(scorer.name)
    with _without_cache(scorer):
        bench.items()  # bad input is the caller's mistake, not the scorer's
        for name, function in (
            ("length", bench.length),
            ("finite", bench.finite),
            ("repeatable", bench.repeatable),
            ("duplicates", bench.duplicates),
            ("permutation", bench.permutation),
            ("batch size", bench.batch_size),
            ("public call", bench.public_call),
            ("input form", bench.input_form),
            ("gradient", bench.gradient),
            ("modes", bench.modes),
        ):
            report.checks.append(_outcome(name, function))
    return report


def _outcome(name: str, function: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", function())
    except _Skip as reason:
        return Check(name, "skipped", str(reason))
    except _Fail as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # a scorer under test may raise anything
        return Check(name, "failed", f"raised {type(error).__name__}: {error}")


@contextmanager
def _without_cache(scorer: Scorer) -> Iterator[None]:
    cache, scorer.cache = scorer.cache, None
    try:
        yield
    finally:
        scorer.cache = cache


class _Bench:
    """The checks.

    Each is a method that returns a sentence, or raises `_Fail` or `_Skip` with one.
    """

    def __init__(
        self,
        scorer: Scorer,
        pictures: list[Image.Image],
        prompts: list[str],
        metadata: Sequence[Mapping[str, Any]] | None,
        tolerance: float,
    ) -> None:
        self.scorer, self.pictures, self.prompts, self.metadata = (
            scorer,
            pictures,
            prompts,
            metadata,
        )
        self.tolerance = tolerance
        self._values: Tensor | None = None

    # The model, directly

    def items(self, order: Sequence[int] | None = None) -> list[Item]:
        order = range(len(self.pictures)) if order is None else order
        return make_items(
            self.scorer,
            read_images([self.pictures[i] for i in order]),
            self._picked(self.prompts, order),
            self._picked(self.metadata, order),
        )

    def _picked(self, values: Sequence[T] | None, order: Sequence[int]) -> Sequence[T] | None:
        """Pick values in an order, where there is one per image.

        A list of another length goes on as it is, for the scorer to refuse.
        """
        return (
            values
            if values is None or len(values) != len(self.pictures)
            else [values[i] for i in order]
        )

    def raw(self, order: Sequence[int] | None = None) -> Tensor:
        """Score one batch in one forward pass, nothing remembered and nothing merged.

        Returns:
            `Tensor`: (n,) float64.
        """
        items = self.items(order)
        scorer = self.scorer
        with torch.no_grad(), torch.autocast(scorer.device.type, enabled=False):
            if not isinstance(scorer, ModelScorer):
                return torch.tensor(checked_scores(scorer, items)[0], dtype=torch.float64)
            pixels = torch.stack([scorer.preprocess.exact(item.image) for item in items]).to(
                scorer.device
            )
            text = scorer.text_features([item.prompt for item in items])
            scores = scorer.similarity(
                scorer.image_features(scorer.preprocess.normalise(pixels).to(scorer.dtype)), text
            )
        if scores.shape != (len(items),):
            raise UserError(
                f"{scorer.name}: returned scores of shape {tuple(scores.shape)} for "
                f"{len(items)} images"
            )
        return scores.double().cpu()

    @property
    def values(self) -> Tensor:
        if self._values is None:
            raise _Skip("there are no scores to compare")
        return self._values

    def compare(self, scores: Tensor, expected: Tensor, what: str) -> float:
        """Return the largest difference, where NaN equals NaN, or fail."""
        scale = float(expected.nan_to_num(0.0).abs().max()) or 1.0
        difference = (scores.double() - expected.double()).abs()
        difference = torch.where(
            scores.isnan() & expected.isnan(), torch.zeros_like(difference), difference
        )
        worst = float(difference.nan_to_num(float("inf")).max())
        if not worst <= self.tolerance * scale:
            i = int(difference.nan_to_num(float("inf")).argmax())
            raise _Fail(
                f"{what}: image {i} scores {float(scores[i]):.6g} instead of "
                f"{float(expected[i]):.6g}"
            )
        return worst

    # The checks

    def length(self) -> str:
        self._values = self.raw()
        return f"{len(self._values)} scores for {len(self.pictures)} images"

    def finite(self) -> str:
        bad = (~self.values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise _Fail(
                f"images {', '.join(map(str, bad))} of {len(self.values)} have no finite score"
            )
        return f"from {float(self.values.min()):.4g} to {float(self.values.max()):.4g}"

    def repeatable(self) -> str:
        self._needs_determinism()
        worst = self.compare(self.raw(), self.values, "called again")
        return f"the same call twice differs by at most {worst:.2g}"

    def duplicates(self) -> str:
        self._needs_determinism()
        order = [*range(len(self.values)), 0, 1, 0]
        scores = self.raw(order)
        worst = self.compare(scores, self.values[order], "with images given twice in a batch")
        return f"images given twice differ by at most {worst:.2g}"

    def permutation(self) -> str:
        self._needs_determinism()
        worst = 0.0
        for order in (
            list(range(len(self.values)))[::-1],
            torch.randperm(len(self.values), generator=_generator()).tolist(),
        ):
            scores = torch.empty_like(self.values)
            scores[order] = self.raw(order)
            worst = max(worst, self.compare(scores, self.values, "in another order"))
        return f"other orders of the batch differ by at most {worst:.2g}"

    def batch_size(self) -> str:
        self._needs_determinism()
        worst, count = 0.0, len(self.values)
        for size in (1, 3):
            scores = torch.cat(
                [self.raw(range(count)[start : start + size]) for start in range(0, count, size)]
            )
            worst = max(
                worst, self.compare(scores, self.values, f"in batches of {size} instead of {count}")
            )
        return f"batches of 1, 3 and {count} differ by at most {worst:.2g}"

    def public_call(self) -> str:
        self._needs_determinism()
        worst = self.compare(self._score(self.pictures), self.values, "through score()")
        return f"score() differs from the model by at most {worst:.2g}"

    def input_form(self) -> str:
        self._needs_determinism()
        expected = self._score(self.pictures)
        rgb = [picture.convert("RGB") for picture in self.pictures]
        same_mode = [picture.mode == "RGB" for picture in self.pictures]
        unchanged = [i for i, same in enumerate(same_mode) if same]
        if not unchanged:
            raise _Skip("no image is RGB, and arrays hold nothing else")
        worst = 0.0
        for name, form in (
            ("uint8 arrays", [np.asarray(image) for image in rgb]),
            ("PNG bytes", [_png(image) for image in rgb]),
        ):
            worst = max(
                worst,
                self.compare(
                    self._score(form)[unchanged],
                    expected[unchanged],
                    f"as {name} instead of PIL images",
                ),
            )
        return f"PIL images, uint8 arrays and PNG bytes differ by at most {worst:.2g}"

    def gradient(self) -> str:
        pixels, prompts = self._tensor_input()
        pixels.requires_grad_()
        scores = self.scorer.score_tensor(pixels, prompts)
        if scores.shape != (len(pixels),):
            raise _Fail(
                f"score_tensor returned shape {tuple(scores.shape)} for {len(pixels)} images"
            )
        if not scores.requires_grad:
            raise _Fail("score_tensor returns scores without a gradient")
        (first,) = torch.autograd.grad(scores[0], pixels, retain_graph=True)
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
        if not bool(gradient.isfinite().all()):
            raise _Fail("the gradient is not finite")
        norms = gradient.double().flatten(1).norm(dim=1)
        if not bool((norms > 0).all()):
            raise _Fail("the gradient of some image is zero everywhere")
        if float(first[1:].abs().max()) > self.tolerance * float(first[:1].abs().max()):
            raise _Fail("the score of one image has a gradient with respect to another")
        self._check_uphill(pixels.detach(), prompts, gradient)
        return (
            f"finite, norms from {float(norms.min()):.2g} to {float(norms.max()):.2g}, "
            "uphill raises the score"
        )

    def _check_uphill(self, pixels: Tensor, prompts: list[str], gradient: Tensor) -> None:
        """Check that a step along the gradient raises each score.

        It tries several lengths: short steps drown in rounding, long ones leave the
            slope.
        """
        direction = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        risen = torch.zeros(len(pixels), dtype=torch.bool)
        with torch.no_grad():
            for step in (2e-2, 5e-3, 1e-3):
                up, down = (
                    self.scorer.score_tensor(pixels + sign * step * direction, prompts)
                    for sign in (1, -1)
                )
                risen |= (up > down).cpu()
        if not bool(risen.all()):
            raise _Fail(
                "a step along the gradient does not raise the score of image "
                f"{int((~risen).nonzero()[0])}"
            )

    def modes(self) -> str:
        """Compare the two modes, which resize differently, by up to 2/255.

        Near means a tenth of what tells the images apart.
        """
        pixels, prompts = self._tensor_input()
        eight_bit = quantise(pixels)
        with torch.no_grad():
            soft = self.scorer.score_tensor(eight_bit.float() / 255, prompts).double().cpu()
        exact = self.scorer.score(eight_bit, prompts).values.double()
        spread = float(self.values.max() - self.values.min())
        allowed = 0.1 * spread + 10 * self.tolerance * float(exact.abs().max())
        worst = float((soft - exact).abs().max())
        if not worst <= allowed:
            raise _Fail(f"score_tensor differs from score by {worst:.3g}, more than {allowed:.3g}")
        return f"score_tensor differs from score by at most {worst:.2g}"

    # Their tools

    def _needs_determinism(self) -> None:
        if not self.scorer.deterministic:
            raise _Skip("the scorer declares that it is not deterministic")
        _ = self.values

    def _score(self, images: Images) -> Tensor:
        return self.scorer.score(
            images, self.prompts, self.metadata, on_error="nan"
        ).values.double()

    def _tensor_input(self) -> tuple[Tensor, list[str]]:
        """Return three images as floats of one size.

        They stay away from 0 and 1, so that a step stays inside.
        """
        if not self.scorer.differentiable:
            raise _Skip("the scorer declares no gradient")
        _ = self.values
        arrays = [
            np.asarray(picture.convert("RGB").resize((96, 80))) for picture in self.pictures[:3]
        ]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        return (pixels * 0.9 + 0.05).to(self.scorer.device), list(self.prompts[:3])


def _default_images(scorer: Scorer) -> tuple[list[Image.Image], list[str]]:
    from PIL import Image

    if scorer.spec.key.startswith("shapes"):
        from ...shapes import render, split_scenes

        scenes = split_scenes()[0][: len(PROMPTS)]
        shown = [
            scenes[i - i % 2] for i in range(len(scenes))
        ]  # every other image belongs to another prompt
        return [render(scene) for scene in shown], [scene.prompt for scene in scenes]
    rng = np.random.default_rng(0)
    images = []
    for number, (width, height) in enumerate(_SIZES):
        coarse = rng.integers(0, 256, (3 + number % 3, 3 + number % 2, 3), dtype=np.uint8)
        images.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return images, list(PROMPTS)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
