"""OCR score: how much of the quoted text of a prompt is readable in the image.

    target = the quoted part of the prompt
    score  = 1 if the target is part of what is read,
             else 1 - min(edit distance, length of the target) / length of the target

Both are compared in lower case without spaces, as in Flow-GRPO's reward (Liu et al.
2025, arXiv 2505.05470). Its engine is PaddleOCR, which fetches its weights at run time.
The default here is RapidOCR, whose package holds them: pip install 'diffalign[ocr]'. So
numbers are near the published ones and not the same. Any other engine is a function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from PIL import Image

from ...errors import ConfigError, UserError
from ..base import Item, Scorer
from ..spec import ScorerSpec

Reader = Callable[[Image.Image], str]
"""Returns the text in an RGB image."""

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')


def target_text(prompt: str) -> str | None:
    """Return the first quoted part of a prompt, None without one.

    Straight quotes and the pairs of other scripts count.

    Args:
        prompt (`str`): The prompt.

    Example:
        >>> target_text('a shop window that says "OPEN", at night')
        'OPEN'
    """
    match = _QUOTED.search(prompt)
    if match is None:
        return None
    text = next(group for group in match.groups() if group is not None)
    return text if text.strip() else None


def text_score(recognised: str, target: str) -> float:
    """Compare what was read with what should stand there.

    Args:
        recognised (`str`): Text of the image.
        target (`str`): Text of the prompt, not empty.

    Returns:
        `float`: From 0 to 1, see the top of this file.

    Raises:
        ValueError: The target is empty.

    Example:
        >>> text_score("0PEN", "open")
        0.75
    """
    from rapidfuzz.distance import Levenshtein

    text, target = (each.replace(" ", "").lower() for each in (recognised, target))
    if not target:
        raise ValueError("target: expected a text, got only spaces")
    if target in text:
        return 1.0
    return 1.0 - min(Levenshtein.distance(text, target), len(target)) / len(target)


class _RapidOCR:
    """RapidOCR with the models inside its package. Nothing is downloaded."""

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ConfigError(
                "reader",
                f"the default needs RapidOCR: pip install 'diffalign[ocr]' ({error}); or name a "
                "function of yours",
            ) from None
        self.engine: Any = RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Global.log_level": "error",
                # More threads add up in another order.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, image: Image.Image) -> str:
        return "".join(self.engine(image).txts or ())


def _named(reader: str) -> Reader:
    """Import a function by the name ``package.module:function``."""
    module, _, name = reader.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "reader", f"{reader!r} cannot be imported ({error}); expected package.module:function"
        ) from None
    if not callable(function):
        raise ConfigError("reader", f"{reader!r} is no function")
    return function


class OCRScore(Scorer):
    """Share of the quoted text of a prompt that an OCR engine reads in the image.

    A prompt without quoted text has no score.

    Args:
        reader (`str` or `Callable`, defaults to "rapidocr"): "rapidocr", or a function
            from an RGB image to its text, or the name of one as
            ``package.module:function``.
        **options: Options of every `Scorer`.

    Raises:
        ConfigError: The engine is not installed, or there is no such function.
    """

    spec = ScorerSpec(
        key="ocr",
        summary="share of the quoted text of a prompt that an OCR engine reads in the image",
        licence="Apache-2.0 (RapidOCR and its models)",
        requires=("image", "prompt"),
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="rgb",
        text="quoted part",
        citation="Liu et al. 2025, arXiv 2505.05470 (Flow-GRPO)",
    )

    def __init__(self, *, reader: str | Reader = "rapidocr", **options: Any) -> None:
        super().__init__(**options)
        try:
            import rapidfuzz  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "ocr", f"needs rapidfuzz: pip install 'diffalign[ocr]' ({error})"
            ) from None
        self.read: Reader
        if callable(reader):
            self.read = reader
            self.reader = f"{reader.__module__}:{getattr(reader, '__qualname__', reader)}"
        else:
            self.read = _RapidOCR() if reader == "rapidocr" else _named(reader)
            self.reader = reader

    def identity(self) -> dict[str, Any]:
        version = ""
        if self.reader == "rapidocr":
            from importlib.metadata import version as version_of

            version = version_of("rapidocr")
        return {"reader": self.reader, "version": version}

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        scores: list[float] = []
        errors: dict[int, str] = {}
        for i, item in enumerate(items):
            target = target_text(item.prompt)
            if target is None:
                scores.append(math.nan)
                errors[i] = 'the prompt names no text; put it into quotes, as in "OPEN"'
                continue
            recognised = self.read(item.image.convert("RGB"))
            if not isinstance(recognised, str):
                raise UserError(
                    f"reader: {self.reader} returned {type(recognised).__name__}, not a text"
                )
            scores.append(text_score(recognised, target))
        return scores, errors
