"""A vision-language model as a judge, behind a server with OpenAI's chat completions.

The temperature is 0, the seed fixed and the image lossless. The same server and model
give the same number as far as that server is deterministic, which is never to the bit.
A reply that cannot be read is a missing score, never a 0.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...config.ranges import not_a_choice
from ...errors import ConfigError
from ...runtime.hashing import text_hash
from ..base import Item, Scorer
from ..serving.client import ServerFailure, check_calls, png_base64
from ..serving.pool import ServerPool, check_urls
from ..spec import ScorerSpec

UNIFIED_REWARD = (
    "You are given a caption and an image that was generated from it. Judge the image by two "
    "criteria: how well it follows the caption (objects, attributes, counts, relations), and its "
    "overall quality (clarity, aesthetics, absence of artifacts).\n"
    "Say in a few sentences what speaks for and against it, then give one score from 1 (worst) to "
    "5 (best) on a line of its own after 'Final Score:'.\n\nCaption: {prompt}"
)
UNIFIED_REWARD_1 = (
    "You are given a text caption and a generated image based on that caption. "
    "Your task is to evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the "
    "provided caption. Consider the accuracy of depicted objects, their "
    "relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including "
    "clarity, detail preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
UNIFIED_REWARD_2 = (
    "You are presented with a generated image and its associated text caption. "
    "Your task is to analyze the image across multiple dimensions in relation to "
    "the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each "
    "rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of "
    "content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual "
    "glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of "
    "caption accuracy.\n"
    "\n"
    "Output your evaluation using the format below:\n"
    "\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
"""The questions that UnifiedReward's two generations were trained with, word for word
(Wang et al. 2025, arXiv 2503.05236, code under MIT). Other words would be another
number."""
YES_NO = "Does this image show '{prompt}', without visible faults? Answer with one word, yes or no."
_KINDS: dict[str, tuple[str, tuple[float, float]]] = {
    "unifiedreward": (UNIFIED_REWARD, (1.0, 5.0)),
    "unifiedreward-1": (UNIFIED_REWARD_1, (1.0, 5.0)),
    "unifiedreward-2": (UNIFIED_REWARD_2, (1.0, 5.0)),
    "yes_no": (YES_NO, (0.0, 1.0)),
}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?![\d.]*\d)"
# What may follow: the end of the scale, or what makes it no plain number (4 %, 4-5).
_TAIL = (
    r"(?:[\s*_`]*(?:/|out\s+of)[\s*_`]*(\d+(?:\.\d+)?)|([ \t]*%|,\d|[ \t]*(?:[-–]|to\b)[ \t]*\d))?"
)
_AFTER_LABEL = re.compile(
    # A bracket that is more than the number, as in "Score (1-5): 4", names the scale.
    rf"score\b(?:[ \t*_`]*\((?!{_NUMBER}\s*\))[^()\n]*\))?"
    rf"[\s*_`:=\[\]()\"'-]*?(?:is\s+[\s*_`\[(\"']*)?({_NUMBER}){_TAIL}",
    re.IGNORECASE,
)
AXES = ("alignment", "coherence", "style")
_OF_AXIS = re.compile(
    rf"(alignment|coherence|style)[\s*_`]*score\b(?:[ \t*_`]*\([^()\n]*\))?"
    rf"[\s*_`:=\[\]()\"'-]*?({_NUMBER}){_TAIL}",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[\s*_`\[(\"']*({_NUMBER}){_TAIL}[\s*_`\])\"'.]*", re.IGNORECASE)


def parse_score(text: str, low: float = 1.0, high: float = 5.0) -> float:
    """Read the last score in a reply.

    A number after the word "score" counts, in any case and through Markdown, such as
    `**Final Score:** 4`, `Score: [4]`, `Final Score: 4/5` and `Score (1-5): 4`. A reply
    that is nothing but a number counts too.

    Args:
        text (`str`): The reply.
        low (`float`, defaults to 1): The lowest score.
        high (`float`, defaults to 5): The highest score.

    Returns:
        `float`: The score. NaN when there is none, or the last one is outside [low,
        high] ("Final Score: 10" is no 1), on another scale (4/10) or no plain number
        (4-5, "4,5").

    Example:
        >>> parse_score("It follows the caption. **Final Score:** 4/5")
        4.0
    """
    scores = [match.groups() for match in _AFTER_LABEL.finditer(text)]
    if not scores:
        alone = _ALONE.fullmatch(text)
        scores = [alone.groups()] if alone else []
    if not scores:
        return math.nan
    number, scale, unclear = scores[-1]
    value = float(number)
    good = low <= value <= high and not unclear and (scale is None or float(scale) == high)
    return value if good else math.nan


def parse_axes(text: str, low: float = 1.0, high: float = 5.0) -> dict[str, float]:
    """Read the last score of each axis in a reply of UnifiedReward 2.0.

    Args:
        text (`str`): The reply.
        low (`float`, defaults to 1): The lowest score.
        high (`float`, defaults to 5): The highest score.

    Returns:
        `dict[str, float]`: Scores of the `AXES` that can be read, by the rules of
        `parse_score`.

    Example:
        >>> parse_axes("Alignment Score (1-5): 3.25\\n**Style Score (1-5):** 4")
        {'alignment': 3.25, 'style': 4.0}
    """
    scores: dict[str, float] = {}
    for axis, number, scale, unclear in _OF_AXIS.findall(text):
        value = float(number)
        good = low <= value <= high and not unclear and (not scale or float(scale) == high)
        scores[axis.lower()] = value if good else math.nan
    return {axis: scores[axis] for axis in AXES if not math.isnan(scores.get(axis, math.nan))}


def yes_no_probability(top_logprobs: Sequence[Mapping[str, Any]]) -> float:
    """Compute P(yes) / (P(yes) + P(no)) from the alternatives of the first token.

    Args:
        top_logprobs (list of `dict`): `[{"token", "logprob"}, ...]`. Tokens count in
            any case, with or without spaces.

    Returns:
        `float`: The probability, NaN when neither word is there.

    Example:
        >>> yes_no_probability([{"token": "Yes", "logprob": 0.0}])
        1.0
    """
    mass = {"yes": 0.0, "no": 0.0}
    for entry in top_logprobs:
        word = str(entry.get("token", "")).strip().strip("▁Ġ\"'.").lower()
        if word in mass and isinstance(entry.get("logprob"), (int, float)):
            mass[word] += math.exp(entry["logprob"])
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 else math.nan


class VLMJudge(Scorer):
    """Ask a vision-language model for a score in [0, 1].

    Args:
        url (`str` or list of `str`, defaults to "http://127.0.0.1:8000"): The server,
            or several with the same model, which share the requests.
            `/v1/chat/completions` is added unless the address ends in it.
        judge_model (`str`): Name of the model that the server knows.
        kind (`str`, defaults to "unifiedreward"): "unifiedreward" is a written
            judgement with a score from 1 to 5, divided by 5, for any model.
            "unifiedreward-1" is the question of UnifiedReward 1.5, and asks at 512 x
            512 pixels as Flow-GRPO does. "unifiedreward-2" is that of UnifiedReward
            2.0, with scores for alignment, coherence and style. "yes_no" is P(yes) /
            (P(yes) + P(no)) of the first word.
        axes (`dict[str, float]`, *optional*): Weights of alignment, coherence and
            style in the mean under "unifiedreward-2". Defaults to 1 each. A reply
            without one of them has no score.
        template (`str`, *optional*): Another question for an answer of that kind, so on
            the same scale. `{prompt}` stands for the prompt.
        image_size (`int`, *optional*): The image is resized to this square first
            (UnifiedReward is asked at 512). None sends it as it is.
        api_key_env (`str`, *optional*): Environment variable that holds the key, if the
            server wants one.
        max_tokens (`int`, defaults to 512): Of the reply.
        seed (`int`, defaults to 0): Of the server's sampling.
        timeout (`float`, defaults to 120): Seconds for one request.
        retries (`int`, defaults to 3): Further tries, as for `RemoteScorer`.
        backoff (`float`, defaults to 0.5): The longest first pause, in seconds.
        concurrency (`int`, defaults to 8): Requests at once, for each server.
        on_error (`str`, defaults to "nan"): "nan" makes scores missing when the server
            fails, "raise" raises.
        **options: Options of every `Scorer`.

    Raises:
        ConfigError: An option makes no sense, or the environment variable is not set.
        ServerFailure: When it scores, under `on_error="raise"`.
    """

    spec = ScorerSpec(
        key="vlm_judge",
        summary="what a vision-language model behind an OpenAI-compatible server says, in [0, 1]",
        licence="of the model behind the server",
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="png",
        text="template",
        citation="Wang et al. 2025, arXiv 2503.05236 (UnifiedReward)",
    )

    def __init__(
        self,
        *,
        url: str | Sequence[str] = "http://127.0.0.1:8000",
        judge_model: str = "",
        kind: str = "unifiedreward",
        axes: Mapping[str, float] | None = None,
        template: str | None = None,
        image_size: int | None = None,
        api_key_env: str | None = None,
        max_tokens: int = 512,
        seed: int = 0,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 8,
        on_error: str = "nan",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_calls(timeout, retries, concurrency, on_error)
        if not judge_model:
            raise ConfigError(
                "judge_model", "expected the name under which the server knows its model"
            )
        if kind not in _KINDS:
            raise ConfigError("kind", not_a_choice(kind, list(_KINDS)))
        self.template, (self.low, self.high) = template or _KINDS[kind][0], _KINDS[kind][1]
        if "{prompt}" not in self.template:
            raise ConfigError(
                "template",
                "expected a text with {prompt} in it, or every prompt would get the same question",
            )
        if image_size is not None and (
            isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1
        ):
            raise ConfigError("image_size", f"expected int >= 1, got {image_size!r}")
        urls = [
            address
            if address.endswith("/chat/completions")
            else f"{address.removesuffix('/v1')}/v1/chat/completions"
            for address in check_urls(url)
        ]
        if kind == "unifiedreward-1" and image_size is None:
            image_size = 512
        self.axes = self._weights(kind, axes)
        self.judge_model, self.kind, self.image_size = judge_model, kind, image_size
        self.max_tokens, self.seed = max_tokens, seed
        self.concurrency, self.on_error = concurrency * len(urls), on_error
        headers: dict[str, str] = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "").strip()
            if not key:
                raise ConfigError(
                    "api_key_env", f"the environment variable {api_key_env} is not set"
                )
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    "api_key_env",
                    f"{api_key_env} holds characters that no key has, such as a line break; set "
                    "it again",
                )
            headers["Authorization"] = f"Bearer {key}"
        self.pool = ServerPool(
            urls, timeout=timeout, retries=retries, backoff=backoff, headers=headers
        )

    @staticmethod
    def _weights(kind: str, axes: Mapping[str, float] | None) -> dict[str, float]:
        """Weights of the axes.

        Raises:
            ConfigError: They are for another kind, or unknown, or add up to nothing.
        """
        if axes is not None and kind != "unifiedreward-2":
            raise ConfigError("axes", f"are for kind: unifiedreward-2, not {kind}")
        weights = dict(axes) if axes is not None else dict.fromkeys(AXES, 1.0)
        good = all(
            name in AXES and type(value) in (int, float) and 0 <= value < math.inf
            for name, value in weights.items()
        )
        if not good or not sum(weights.values()) > 0:
            raise ConfigError(
                "axes", f"expected weights of {', '.join(AXES)}, at least one above 0, got {axes!r}"
            )
        return {name: float(value) for name, value in weights.items() if value > 0}

    def identity(self) -> dict[str, Any]:
        question = text_hash(self.template)
        return {
            "model": self.judge_model,
            "kind": self.kind,
            "question": question,
            "size": self.image_size,
            "seed": self.seed,
            **({"axes": self.axes} if self.kind == "unifiedreward-2" else {}),
        }

    def score_batch(self, items: list[Item]) -> tuple[list[float], dict[int, str]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            rows = list(pool.map(self._judge, items))
        errors = {i: error for i, (_, error) in enumerate(rows) if error}
        return [score for score, _ in rows], errors

    def _judge(self, item: Item) -> tuple[float, str]:
        """A score, and why it is missing or an empty text."""
        try:
            place, reply = self.pool.request("", self._question(item))
        except ServerFailure as error:
            if self.on_error == "raise":
                raise
            return math.nan, str(error)
        return self._read(place, reply)

    def _question(self, item: Item) -> dict[str, Any]:
        from PIL import Image

        image = item.image
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        picture = {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{png_base64(image)}"},
        }
        # Not str.format: a prompt may hold braces.
        text = {"type": "text", "text": self.template.replace("{prompt}", item.prompt)}
        question: dict[str, Any] = {
            "model": self.judge_model,
            "messages": [{"role": "user", "content": [picture, text]}],
            "temperature": 0,
            "seed": self.seed,
            "max_tokens": 1 if self.kind == "yes_no" else self.max_tokens,
        }
        return (
            {**question, "logprobs": True, "top_logprobs": 20}
            if self.kind == "yes_no"
            else question
        )

    def _read(self, place: str, reply: Mapping[str, Any]) -> tuple[float, str]:
        """A score, and why it is missing or an empty text."""
        try:
            choice = reply["choices"][0]
            if self.kind == "yes_no":
                value = yes_no_probability(choice["logprobs"]["content"][0]["top_logprobs"])
                text = str(choice.get("message", {}).get("content", ""))
            else:
                text = str(choice["message"]["content"])
                value = self._value(text) / self.high
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
            what = "log-probabilities" if self.kind == "yes_no" else "a message"
            return math.nan, f"{place} answered without {what}"
        if math.isfinite(value):
            return value, ""
        end = " ".join(text.split())[-120:]
        return value, (f"the reply holds no score from {self.low:g} to {self.high:g}: ...{end!r}")

    def _value(self, text: str) -> float:
        """The score in a written judgement, NaN without one."""
        if self.kind != "unifiedreward-2":
            return parse_score(text, self.low, self.high)
        scores = parse_axes(text, self.low, self.high)
        if not set(self.axes) <= set(scores):
            return math.nan
        total = sum(self.axes.values())
        return sum(weight * scores[name] for name, weight in self.axes.items()) / total
