"""The lineage picture: who survives, what is framed, what is dimmed."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from diffalign.steering.lineage import _BEST, _PALE, _STRONG, lineage_picture, surviving
from diffalign.steering.result import SteeringResult
from diffalign.steering.step_trace import StepTrace


def tree(k: int = 3, steps: int = 2, thumbnails: bool = True) -> SteeringResult:
    """Slots of step j go on from slot 0 in the last step and from themselves before."""
    traces = []
    for j in range(steps):
        ancestors = (
            torch.zeros(1, k, dtype=torch.int64) if j == steps - 1 else torch.arange(k)[None]
        )
        pictures = (
            [[Image.new("RGB", (20, 20), (200, 10 * slot, 0)) for slot in range(k)]]
            if thumbnails
            else None
        )
        traces.append(
            StepTrace(
                index=3 * j, timestep=900.0 - j, rewards=torch.arange(k)[None].double(),
                log_potentials=torch.zeros(1, k).double(),
                log_weights=torch.full((1, k), -math.log(k)).double(),
                ess=torch.tensor([1.5]).double(), ancestors=ancestors,
                resampled=torch.tensor([j == steps - 1]), thumbnails=pictures,
            )
        )  # fmt: skip
    return SteeringResult(
        prompts=[
            (
                "a large yellow star on the right of a black background, and a long tail of words "
                "to wrap"
            )
        ],
        images=[[Image.new("RGB", (20, 20), (0, 0, 40 * slot % 256)) for slot in range(k)]],
        rewards=torch.arange(k)[None].double(),
        log_weights=torch.full((1, k), -math.log(k)).double(),
        log_z=torch.zeros(1).double(),
        lmbda=torch.ones(1).double(),
        roots=torch.zeros(1, k, dtype=torch.int64),
        applied=torch.zeros(1, k).double(),
        degenerate=torch.zeros(1, dtype=torch.bool),
        steps=traces,
        final_ess=torch.tensor([float(k)]).double(),
        latents=torch.zeros(1, k, 2),
        counts={},
        seconds={},
    )


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in picture.getcolors(10**6)}


def test_surviving_lineages() -> None:
    assert surviving([[0, 0, 1, 3], [2, 2, 3, 3]], 4) == [{1, 3}, {2, 3}]
    assert surviving([], 2) == []


def test_survivors_are_strong_and_the_dead_are_pale() -> None:
    picture = lineage_picture(tree())
    found = colours(picture)
    assert {_STRONG, _PALE, _BEST} <= found
    assert (200, 0, 0) in found  # slot 0 lives
    assert (200, 10, 0) not in found and (200, 20, 0) not in found  # the others were dimmed
    everyone = tree()
    for step in everyone.steps:
        step.ancestors = torch.arange(3)[None]
    assert _PALE not in colours(lineage_picture(everyone)) and (200, 20, 0) in colours(
        lineage_picture(everyone)
    )


def test_the_best_returned_image_is_framed() -> None:
    result = tree()
    picture = lineage_picture(result, cell=60)
    framed = [
        y for y in range(picture.height) if picture.getpixel((14 + 2 * (60 + 40) + 30, y)) == _BEST
    ]
    top = 14 + 3 * 14 + 2 * (60 + 14 + 8)  # the third slot has the highest reward
    assert framed[0] in range(top - 4, top) and framed[-1] in range(top + 60, top + 64)


@pytest.mark.parametrize(
    ("k", "steps", "thumbnails"), [(1, 0, True), (16, 8, True), (4, 1, False), (9, 3, True)]
)
def test_any_size(k: int, steps: int, thumbnails: bool) -> None:
    result = tree(k, steps, thumbnails)
    picture = lineage_picture(result)
    side = 96 if k <= 8 else 64
    assert picture.width > (steps + 1) * side and picture.height > k * side
    if not thumbnails:
        assert (235, 235, 235) in colours(picture)


def test_plot_writes_a_file(tmp_path) -> None:
    picture = tree().plot(0, tmp_path / "tree.png")
    assert Image.open(tmp_path / "tree.png").size == picture.size
    with pytest.raises(IndexError, match="prompt: expected an index below 1, got 1"):
        tree().plot(1)
