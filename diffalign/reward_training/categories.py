"""Kinds of pairs, by which the report of a reward is broken down."""

from __future__ import annotations

from ..shapes.prompts import ATTRIBUTES, parse_prompt
from ..shapes.verifier import attribute_table
from .judgements import Judgements

SEVERAL = "several"
"""The category of pairs of the embedded world that differ in more than one thing."""


def pair_categories(part: Judgements) -> list[str]:
    """Name the category of each pair.

    It is the `category` of the prompt, if the data have one. A pair of the embedded
    world has the one attribute that only one of its images has right, or `style` if
    only one image has the preferred style.

    Args:
        part (`Judgements`): n pairs.

    Returns:
        `list[str]`: n names. Empty where nothing is known.
    """
    if part.categories:
        return [part.categories.get(int(number), "") for number in part.prompt]
    try:
        for number in set(part.prompt.tolist()):
            parse_prompt(part.prompts[number])
    except ValueError:
        return [""] * len(part)
    names = [*ATTRIBUTES, "style"]
    tables: dict[tuple[int, int], dict[str, bool]] = {}

    def table(image: int, prompt: int) -> dict[str, bool]:
        if (image, prompt) not in tables:
            (row,) = attribute_table([part.open(image)], [part.prompts[prompt]])
            tables[image, prompt] = row
        return tables[image, prompt]

    categories = []
    for a, b, prompt in zip(
        part.first.tolist(), part.second.tolist(), part.prompt.tolist(), strict=True
    ):
        first, second = table(a, prompt), table(b, prompt)
        differing = [name for name in names if first[name] != second[name]]
        categories.append(differing[0] if len(differing) == 1 else SEVERAL if differing else "")
    return categories
