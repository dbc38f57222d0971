"""Perturbers change what a caption says, for DCPO (arXiv 2502.06023, section 3.2).

A perturber is any callable `(texts) -> texts`. An empty or unchanged text means that it
found nothing to change: the pair is then left out and counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ..errors import ConfigError, UserError
from ..runtime.hashing import place_hash, text_hash, value_hash
from ..runtime.protocols import DeviceLike, DtypeLike
from ..runtime.seeds import text_seed
from .captioners import _placement, load_callable, load_part

LEVELS = ("weak", "medium", "strong")
_COUNTS = {"weak": 1, "medium": 2, "strong": 4}
# DIPPER's lexical diversity as the paper sets it. Its control code is 100 minus this.
_DIVERSITY = {"weak": 40, "medium": 60, "strong": 80}
DIPPER = "lexical = {lexical}, order = 100 <sent> {text} </sent>"

CATEGORIES: dict[str, tuple[str, ...]] = {
    "colour": (
        "red",
        "green",
        "blue",
        "yellow",
        "orange",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
        "gray",
        "golden",
    ),
    "size": ("small", "large", "tiny", "huge", "big", "little"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "place": (
        "on the left",
        "on the right",
        "in the center",
        "in the foreground",
        "in the background",
    ),
    "relation": (
        "above",
        "below",
        "behind",
        "beside",
        "inside",
        "in front of",
        "on top of",
        "next to",
        "under",
    ),
    "shape": ("round", "square", "triangular", "rectangular", "oval", "star-shaped"),
    "material": (
        "wooden",
        "metal",
        "glass",
        "plastic",
        "stone",
        "paper",
        "leather",
        "ceramic",
        "marble",
    ),
    "time": ("at night", "at dawn", "at noon", "at sunset", "in the morning", "in the evening"),
    "weather": ("sunny", "rainy", "snowy", "foggy", "stormy", "cloudy"),
    "season": ("spring", "summer", "autumn", "winter"),
    "age": ("young", "old", "ancient", "modern"),
    "person": ("man", "woman", "boy", "girl"),
    "animal": (
        "dog",
        "cat",
        "horse",
        "bird",
        "cow",
        "sheep",
        "elephant",
        "bear",
        "rabbit",
        "fox",
        "lion",
    ),
    "medium": (
        "photo",
        "photograph",
        "painting",
        "drawing",
        "sketch",
        "watercolor",
        "illustration",
        "sculpture",
    ),
    "mood": ("happy", "sad", "angry", "calm", "dramatic", "serene"),
}
"""Words and phrases of one category replace each other. The longest match is taken."""
_STOP = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "and",
        "or",
        "to",
        "from",
        "is",
        "are",
        "as",
        "its",
        "it",
        "this",
        "that",
    ]
)


@runtime_checkable
class Perturber(Protocol):
    """The interface of a perturber. Plain functions have it too."""

    def __call__(self, texts: Sequence[str]) -> Sequence[str]: ...


class RulePerturber:
    """Replace attributes (colours, sizes, numbers, ...) by others of their category.

    A caption without a known attribute loses as many of its content words instead. The
    same text, level and seed give the same result, whatever texts are around it.

    Args:
        level (`str`, *optional*, defaults to `"medium"`): `weak` changes one attribute,
            `medium` two, `strong` four, or as many as there are.
        seed (`int`, *optional*, defaults to `0`): Seed of the choices.
        categories (`Mapping[str, Sequence[str]]`, *optional*): Words of each category.

    Raises:
        ConfigError: The level is unknown.

    Example:
        >>> from diffalign.annotation.perturbers import RulePerturber
        >>> RulePerturber("weak")(["a red car"])
        ['a brown car']
    """

    def __init__(
        self,
        level: str = "medium",
        seed: int = 0,
        categories: Mapping[str, Sequence[str]] = CATEGORIES,
    ) -> None:
        self.level, self.seed, self.name = check_level(level), seed, "rules"
        self.words = value_hash({name: list(words) for name, words in categories.items()})
        self.category = {word: words for words in categories.values() for word in words}
        phrases = sorted(self.category, key=len, reverse=True)
        self.pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)

    def fingerprint(self) -> str:
        """Return what decides the texts: level, seed and words."""
        return f"{self.level}|{self.seed}|{self.words}"

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return one perturbed text per text, empty where nothing can be changed.

        Args:
            texts (`Sequence[str]`): The texts.
        """
        return [self._perturb(text) for text in texts]

    def _perturb(self, text: str) -> str:
        draw = _drawn(self.seed, self.level, text)
        matches = list(self.pattern.finditer(text))
        chosen = draw.sample(matches, min(_COUNTS[self.level], len(matches)))
        if not chosen:
            return self._shortened(text, draw)
        for match in sorted(chosen, key=lambda m: -m.start()):
            old = match.group()
            new = draw.choice([word for word in self.category[old.lower()] if word != old.lower()])
            text = (
                text[: match.start()]
                + (new.capitalize() if old[0].isupper() else new)
                + text[match.end() :]
            )
        return text

    def _shortened(self, text: str, draw: random.Random) -> str:
        words = text.split()
        content = [i for i, word in enumerate(words) if word.lower().strip(".,;:!?") not in _STOP]
        if len(content) < 2:
            return ""
        dropped = set(draw.sample(content, min(_COUNTS[self.level], len(content) - 1)))
        return " ".join(word for i, word in enumerate(words) if i not in dropped)


class ShapesPerturber:
    """Change attributes in sentences of the shapes world, within its grammar.

    Args:
        level (`str`, *optional*, defaults to `"medium"`): `weak`, `medium` and `strong`
            change 1, 2 and 4 of the five attributes.
        seed (`int`, *optional*, defaults to `0`): Seed of the choices.

    Raises:
        ConfigError: The level is unknown.
    """

    name = "shapes"

    def __init__(self, level: str = "medium", seed: int = 0) -> None:
        self.level, self.seed = check_level(level), seed

    def fingerprint(self) -> str:
        """Return what decides the texts: level and seed."""
        return f"{self.level}|{self.seed}"

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return one sentence of the grammar per sentence.

        Args:
            texts (`Sequence[str]`): The sentences.

        Raises:
            UserError: A text is not of the grammar.
        """
        import dataclasses

        from ..shapes.prompts import ATTRIBUTES, parse_prompt

        changed = []
        for text in texts:
            try:
                scene = parse_prompt(text)
            except ValueError as error:
                raise UserError(
                    f"--perturber: shapes changes sentences of the shapes world only; {error}"
                ) from error
            draw = _drawn(self.seed, self.level, text)
            names = draw.sample(list(ATTRIBUTES), _COUNTS[self.level])
            values = {}
            for name in names:
                others = [value for value in ATTRIBUTES[name] if value != getattr(scene, name)]
                values[name] = draw.choice(others)
            changed.append(dataclasses.replace(scene, **values).prompt)
        return changed


class TransformersPerturber:
    """Sample paraphrases from a model of transformers.

    It is a text-to-text model, or a language model that gets the template as a request.

    Args:
        model (`str`): Hub id or folder. The paper's model is DIPPER (T5-XXL), whose
            control codes are used where the name contains "dipper".
        level (`str`, *optional*, defaults to `"medium"`): `weak`, `medium` and `strong`
            are lexical diversity 40, 60 and 80.
        seed (`int`, *optional*, defaults to `0`): A text's sample depends on seed,
            level and its batch.
        template (`str`, *optional*): What the model reads. `{text}` and `{lexical}` are
            filled in.
        max_length (`int`, *optional*, defaults to `256`): Longest paraphrase, in
            tokens.
        device (`str` or `torch.device`, *optional*): Where the model runs. None takes a
            GPU if there is one.
        dtype (`str` or `torch.dtype`, *optional*): Precision of the model. None is
            bfloat16 on a GPU, else float32.

    Raises:
        ConfigError: The level is unknown, the template has no `{text}`, or the model
            cannot be read.
    """

    def __init__(
        self,
        model: str,
        level: str = "medium",
        seed: int = 0,
        *,
        template: str | None = None,
        max_length: int = 256,
        device: DeviceLike = None,
        dtype: DtypeLike = None,
    ) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        self.name, self.level, self.seed, self.max_length = (
            model,
            check_level(level),
            seed,
            max_length,
        )
        self.template = template or (DIPPER if "dipper" in model.lower() else "paraphrase: {text}")
        if "{text}" not in self.template:
            raise ConfigError("--perturber_template", "expected a text with {text} in it")
        config = load_part(AutoConfig, model, "--perturber")
        self.seq2seq = bool(config.is_encoder_decoder)
        self.tokenizer = load_part(
            AutoTokenizer, model, "--perturber", padding_side="right" if self.seq2seq else "left"
        )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device, dtype = _placement(device, dtype)
        cls = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        self.model = load_part(cls, model, "--perturber", dtype=dtype).to(device).eval()

    def fingerprint(self) -> str:
        """Return what decides the texts: level, seed, template and model."""
        return f"{self.level}|{self.seed}|{self.template}|{self.max_length}|{place_hash(self.name)}"

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return one paraphrase per text, sampled with top_p 0.75 as in the paper.

        Args:
            texts (`Sequence[str]`): The texts, one batch.
        """
        import torch

        lexical = str(100 - _DIVERSITY[self.level])
        requests = [
            self.template.replace("{lexical}", lexical).replace("{text}", text) for text in texts
        ]
        inputs = self.tokenizer(requests, padding=True, return_tensors="pt").to(self.model.device)
        seed = text_seed(repr((self.seed, self.level, list(texts))))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            tokens = self.model.generate(
                **inputs, do_sample=True, top_p=0.75, max_new_tokens=self.max_length
            )
        if not self.seq2seq:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]


def check_level(level: str) -> str:
    """Return `level` if it is known.

    Args:
        level (`str`): One of `LEVELS`.

    Raises:
        ConfigError: It is unknown.
    """
    if level not in LEVELS:
        raise ConfigError("--level", f"expected one of {', '.join(LEVELS)}, got {level!r}")
    return level


def make_perturber(
    name: str,
    level: str = "medium",
    seed: int = 0,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> Callable[[Sequence[str]], Sequence[str]]:
    """Make the perturber that a name stands for.

    Args:
        name (`str`): `rules`, `shapes`, a callable as `package.module:object` or
            `./file.py:object`, or a paraphrase model of transformers.
        level (`str`, *optional*, defaults to `"medium"`): `weak`, `medium` or `strong`.
        seed (`int`, *optional*, defaults to `0`): Seed of the choices.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Allow
            `./file.py:object`, which runs that file.
        **options: Options of `TransformersPerturber`.

    Returns:
        `Perturber`.

    Raises:
        UserError: There is no such thing, or it is not allowed.
    """
    if name == "rules":
        return RulePerturber(level, seed)
    if name == "shapes":
        return ShapesPerturber(level, seed)
    if ":" in name:
        return load_callable(name, "--perturber", trust_remote_code)
    return TransformersPerturber(name, level, seed, **options)


def _drawn(seed: int, level: str, text: str) -> random.Random:
    return random.Random(bytes.fromhex(text_hash(f"{seed}:{level}:{text}")))
