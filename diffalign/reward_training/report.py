"""What a trained reward can and cannot do, measured on prompts of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.statistics import FEW_PROMPTS, rate_interval
from ..rewards.learned.calibration import (
    calibration_bins,
    expected_calibration_error,
    likelihood,
    prompt_mean,
)
from ..rewards.learned.losses import explained_share, nuisance_correlations
from ..runtime.files import save_image, write_atomically
from .features import NUISANCES
from .pair_tensors import Labels

REPORT = "report.json"
BINS = 10
LISTED = 20
"""People and categories in the card."""


def hits_of(margins: Tensor, labels: Tensor) -> Tensor:
    """1 where the reward agrees with a decided pair, (n,). Equal scores count 1/2."""
    right = (margins > 0) == (labels > 0.5)
    return torch.where(margins == 0, 0.5, right.double())


def accuracy(margins: Tensor, labels: Tensor, prompts: Tensor) -> dict[str, Any]:
    """Accuracy on decided pairs, with an interval clustered by prompt.

    Args:
        margins (`Tensor`): (n,).
        labels (`Tensor`): (n,).
        prompts (`Tensor`): Index of the prompt, (n,).

    Returns:
        `dict`: Mean over prompts, its 95 % interval, mean over pairs, and counts.
    """
    decided = labels != 0.5
    hits, prompts = hits_of(margins, labels)[decided], prompts[decided]
    by_prompt: dict[int, list[float]] = {}
    for hit, prompt in zip(hits.tolist(), prompts.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).append(hit)
    low, high = interval(by_prompt)
    return {
        "accuracy": prompt_mean(hits.tolist(), [str(p) for p in prompts.tolist()]),
        "low": low,
        "high": high,
        "by_pairs": float(hits.mean()),
        "pairs": len(hits),
        "prompts": len(by_prompt),
    }


def decided_accuracy(margins: Tensor, labels: Labels) -> float:
    """Share of decided pairs that are ordered right, every prompt counts the same.

    Args:
        margins (`Tensor`): (n,).
        labels (`Labels`): Of these pairs.
    """
    return float(accuracy(margins, labels.label, labels.prompt)["accuracy"])


def interval(by_prompt: dict[int, list[float]]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a share whose units are prompts, None with one."""
    if len(by_prompt) < 2:
        return None, None
    longest = max(map(len, by_prompt.values()))
    padded = [each + [math.nan] * (longest - len(each)) for each in by_prompt.values()]
    low, high = rate_interval(np.array(padded))
    return float(low), float(high)


def measure(
    margins: Tensor,
    base: Tensor,
    labels: Tensor,
    prompts: Tensor,
    users: Tensor,
    names: Sequence[str],
    nuisances: Tensor,
    categories: Sequence[str] = (),
    flip_rate: float = 0.0,
) -> dict[str, Any]:
    """Measure a reward on held-out pairs.

    Args:
        margins (`Tensor`): Of the reward, with its temperature, (n,).
        base (`Tensor`): Margins of its base, (n,).
        labels (`Tensor`): (n,).
        prompts (`Tensor`): (n,).
        users (`Tensor`): Index of the judge or -1, (n,).
        names (`Sequence[str]`): Names of the judges.
        nuisances (`Tensor`): Differences, (n, 6).
        categories (`Sequence[str]`, *optional*): Of each pair, see `pair_categories`.
        flip_rate (`float`, *optional*, defaults to `0.0`): Share of labels that are
            wrong, which the margins leave out of account. The calibration compares
            confidence in these labels.

    Returns:
        `dict`: Plain values, for `report.json`.
    """
    decided = labels != 0.5
    confidence = torch.sigmoid(margins.abs())[decided]
    confidence = (1 - flip_rate) * confidence + flip_rate * (1 - confidence)
    # Of judges who differ about a pair, a share agrees.
    agreed = torch.where(margins > 0, labels, 1 - labels)
    hits = torch.where(margins == 0, 0.5, agreed.double())[decided]
    found: dict[str, Any] = {
        "reward": accuracy(margins, labels, prompts),
        "base": accuracy(base, labels, prompts),
        "likelihood": likelihood(margins, labels),
        "expected_calibration_error": expected_calibration_error(confidence, hits, BINS),
        "calibration": calibration_bins(confidence, hits, BINS),
        "nuisances": {
            kind: dict(zip(NUISANCES, nuisance_correlations(each, nuisances).tolist(), strict=True))
            for kind, each in (("reward", margins), ("base", base))
        },
        "nuisances_explain": {
            kind: float(explained_share(each, nuisances))
            if len(each) > 3 * len(NUISANCES)
            else None
            for kind, each in (("reward", margins), ("base", base))
        },
        "users": {},
    }
    for number in users.unique().tolist():
        mine = (users == number) & decided
        if number < 0 or not bool(mine.any()):
            continue
        found["users"][names[number]] = accuracy(margins[mine], labels[mine], prompts[mine])
    found["categories"] = {}
    for name in sorted(set(categories) - {""}):
        mine = torch.tensor([category == name for category in categories])
        if bool((mine & decided).any()):
            row = accuracy(margins[mine], labels[mine], prompts[mine])
            row["base"] = accuracy(base[mine], labels[mine], prompts[mine])["accuracy"]
            found["categories"][name] = row
    found["blind_spots"] = [
        name
        for name, row in found["categories"].items()
        if row["prompts"] >= FEW_PROMPTS and row["high"] < found["reward"]["accuracy"]
    ]
    return found


def in_words(row: dict[str, Any]) -> str:
    """Return the interval of a row of the report in words."""
    if row["low"] is None:
        return "too few prompts"
    return f"{row['low']:.1%} to {row['high']:.1%}"


def draw_calibration(report: dict[str, Any], path: Path) -> None:
    """Draw confidence against the share of right answers."""
    from PIL import Image, ImageDraw, ImageFont

    size, margin = 400, 50
    picture = Image.new("RGB", (size, size), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)

    def place(confidence: float, share: float) -> tuple[float, float]:
        width = size - 2 * margin
        return margin + 2 * (confidence - 0.5) * width, size - margin - share * width

    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        x, bottom = place(tick, 0.0)
        draw.line([(x, bottom), (x, margin)], fill="#eeeeee")
        draw.text((x, bottom + 6), f"{tick:g}", fill="black", font=font, anchor="ma")
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        left, y = place(0.5, tick)
        draw.line([(left, y), (size - margin, y)], fill="#eeeeee")
        draw.text((left - 6, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    draw.line([place(0.5, 0.5), place(1.0, 1.0)], fill="gray")
    points = [place(row[0], row[1]) for row in report["calibration"]]
    draw.line(points, fill="#1f6feb", width=2)
    for x, y in points:
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#1f6feb")
    draw.text((size / 2, size - 8), "confidence", fill="black", font=font, anchor="ms")
    draw.text((margin - 40, 24), "share of right answers", fill="black", font=font, anchor="lm")
    save_image(picture, path)


NO_GAIN = (
    "**It is not better than its base on these prompts.** More judgements are needed, or others: "
    "see docs/guides/votes-to-model.md."
)


MEAN_USER = (
    "**The mean user is not better than the base**: tastes differ too much. Name a user, or a "
    "mixture of users."
)


def gains(report: dict[str, Any]) -> bool:
    """Return whether a reward is right more often than its base.

    Args:
        report (`dict[str, Any]`): From `measure`.
    """
    reward, base = report["reward"]["accuracy"], report["base"]["accuracy"]
    return bool(reward is None or base is None or reward > base)


def card(facts: dict[str, Any], report: dict[str, Any]) -> str:
    """Write the model card of a reward."""
    reward, base, data = report["reward"], report["base"], facts["data"]
    own = report.get("mean_user")  # of a reward with users
    wrong = facts["settings"].get("flip_rate", 0.0)
    labels = f", by labels of which {wrong:.0%} are taken to be wrong" if wrong else ""
    lines = [
        f"# {facts['name']}",
        "",
        f"A reward trained by diffalign on {facts['base']['scorer']}. "
        '`load_scorer("FOLDER")` reads this folder.',
        "",
        "## Data",
        "",
        f"{data['pairs']:,} pairs of {data['prompts']:,} prompts and {data['images']:,} images, "
        f"judged by {data['users'] or 'unnamed'} people; {data['ties']:,} ties; fingerprint "
        f"{data['fingerprint'][:16]}. Prompts are split into {data['split']}.",
        "",
        *(line for note in data["notes"] for line in (f"- {note}", "")),
        "## On prompts that it was not trained on",
        "",
        "| | accuracy | 95 % interval |",
        "|---|---|---|",
        f"| {'each person’s own taste' if own else 'this reward'} | {reward['accuracy']:.1%} | "
        f"{in_words(reward)} |",
        *([f"| the mean user | {own['accuracy']:.1%} | {in_words(own)} |"] if own else []),
        f"| its base | {base['accuracy']:.1%} | {in_words(base)} |",
        "",
        f"{reward['pairs']:,} decided pairs of {reward['prompts']:,} prompts, every prompt counts "
        f"the same. Expected calibration error {report['expected_calibration_error']:.3f}{labels} "
        "(![confidence against right answers](calibration.png)).",
        "",
        *(
            [
                '`load_scorer("FOLDER")` is the mean user, `load_scorer("FOLDER", user=NAME)` one '
                "person.",
                "",
            ]
            if own
            else []
        ),
        *([NO_GAIN, ""] if not gains(report) else []),
        *([MEAN_USER, ""] if own and own["accuracy"] <= base["accuracy"] else []),
        "## What it leans on",
        "",
        "Correlation of its differences within pairs with differences that should not decide:",
        "",
        "| | this reward | its base |",
        "|---|---|---|",
    ]
    for name in NUISANCES:
        values = [report["nuisances"][kind][name] for kind in ("reward", "base")]
        lines.append(f"| {name} | {values[0]:+.2f} | {values[1]:+.2f} |")
    shares = report["nuisances_explain"]
    if shares["reward"] is not None:
        lines.append(f"| all together, R^2 | {shares['reward']:.2f} | {shares['base']:.2f} |")
    if report["users"]:
        lines += [
            "",
            "## People",
            "",
            "| | accuracy | 95 % interval | pairs |",
            "|---|---|---|---|",
        ]
        for name, row in list(report["users"].items())[:LISTED]:
            lines.append(f"| {name} | {row['accuracy']:.0%} | {in_words(row)} | {row['pairs']} |")
        more = len(report["users"]) - LISTED
        lines += ["", f"and {more} more in `report.json`"] if more > 0 else []
    if report.get("categories"):
        lines += _of_categories(report)
    if "average" in facts:
        lines += _of_average(facts["average"])
    backbone = facts["base"].get("backbone")
    if backbone:
        lines += [
            "",
            f"It shares the backbone {backbone} with other scorers, and with it their blind spots.",
        ]
    return "\n".join(lines) + "\n"


def _of_categories(report: dict[str, Any]) -> list[str]:
    """Break the accuracy down by category, and name the blind spots."""
    lines = [
        "",
        "## Categories",
        "",
        "| | accuracy | 95 % interval | its base | pairs |",
        "|---|---|---|---|---|",
    ]
    by_size = sorted(report["categories"].items(), key=lambda item: -item[1]["pairs"])
    for name, row in by_size[:LISTED]:
        lines.append(
            f"| {name} | {row['accuracy']:.1%} | {in_words(row)} | {row['base']:.1%} | "
            f"{row['pairs']} |"
        )
    more = len(by_size) - LISTED
    lines += ["", f"and {more} more in `report.json`"] if more > 0 else []
    spots = report["blind_spots"]
    if spots:
        text = f"Blind spots, whose interval lies below the accuracy above: {', '.join(spots)}."
    else:
        text = "No category of enough prompts has an interval below the accuracy above."
    return [*lines, "", text]


def _of_average(facts: dict[str, Any]) -> list[str]:
    """Say what was averaged, and whether the members are linearly connected."""
    own = ", ".join(f"{value:.1%}" for value in facts["validation_accuracies"])
    worst = max(facts["barriers"].values())
    lines = [
        "",
        "## Average of weights (WARM, arXiv 2401.12187)",
        "",
        f"Of {', '.join(facts['members'])}, which are right in {own} of the validation pairs. "
        f"The average is right in {facts['validation_accuracy']:.1%}. Along the line between two "
        f"members the loss rises by at most {worst:.3f} above its ends.",
    ]
    return [*lines, "", f"WARNING: {facts['warning']}"] if facts["warning"] else lines


def write_report(folder: Path, report: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write `report.json`, the picture of the calibration and the card.

    Args:
        folder (`Path`): Of the reward.
        report (`dict[str, Any]`): Of `measure`.
        facts (`dict[str, Any]`): What `reward.json` holds.
    """
    write_atomically(folder / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    draw_calibration(report, folder / "calibration.png")
    write_atomically(folder / "README.md", card(facts, report).encode())
