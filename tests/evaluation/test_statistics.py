"""Win-rates: exact identities and the coverage of the clustered interval."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation import clustered_bootstrap, clustered_standard_error, comparison_grid, win_rate


def test_the_same_model_on_both_sides_is_exactly_one_half() -> None:
    scores = np.random.default_rng(0).random((20, 4))
    result = win_rate(scores, scores.copy())
    assert (result.rate, result.low, result.high, result.ties) == (0.5, 0.5, 0.5, 1.0)


def test_swapping_the_sides_mirrors_the_rate() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (30, 3)).astype(float), rng.integers(0, 4, (30, 3)).astype(float)
    forward, backward = win_rate(a, b), win_rate(b, a)
    assert forward.rate == pytest.approx(1 - backward.rate)
    assert (forward.wins, forward.losses) == (backward.losses, backward.wins)
    assert forward.low == pytest.approx(1 - backward.high, abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Images of a prompt share its difficulty: an interval that ignored the clusters would cover far too seldom.
    rng, hits, trials = np.random.default_rng(2), 0, 400
    for trial in range(trials):
        difficulty = rng.normal(0.3, 0.5, (60, 1))
        low, high = clustered_bootstrap(difficulty + rng.normal(0, 0.2, (60, 4)), samples=600, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / trials <= 0.98


def test_the_standard_error_counts_prompts_not_images() -> None:
    values = np.repeat(np.arange(10.0)[:, None], 8, axis=1)
    assert clustered_standard_error(values) == pytest.approx(np.arange(10.0).std(ddof=1) / np.sqrt(10))


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two equal"):
        win_rate(np.zeros((2, 3)), np.zeros((3, 2)))


def test_the_grid_holds_every_image_in_its_place() -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    grid = comparison_grid([("a prompt", [red, red], [blue, blue]), ("another", [blue, blue], [red, red])], cell=64, columns=2)
    pixels = np.asarray(grid).astype(int)
    assert (np.abs(pixels - [255, 0, 0]).sum(-1) == 0).sum() == (np.abs(pixels - [0, 0, 255]).sum(-1) == 0).sum() == 4 * 64 * 64
