"""Win-rates: exact identities and the coverage of the clustered interval."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation import (
    clustered_bootstrap,
    clustered_standard_error,
    comparison_grid,
    models_grid,
    sign_test,
    win_rate,
)
from diffalign.evaluation.statistics import (
    expanded_level,
    rate_interval,
    rate_of,
    student_quantile,
)


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


@pytest.mark.parametrize("prompts", [20, 60])
def test_the_interval_covers_the_truth_as_often_as_it_says(prompts: int) -> None:
    # Images of a prompt share its difficulty. An interval that ignored the clusters
    # would cover far too seldom.
    rng, hits, trials = np.random.default_rng(2), 0, 2000
    for trial in range(trials):
        difficulty = rng.normal(0.3, 0.5, (prompts, 1))
        low, high = clustered_bootstrap(
            difficulty + rng.normal(0, 0.2, (prompts, 4)), samples=400, seed=trial
        )
        hits += low <= 0.3 <= high
    assert 0.93 <= hits / trials <= 0.97


def test_the_win_rates_interval_covers_the_true_rate() -> None:
    # Every prompt has a win probability of its own, 0.6 on average, and four images.
    # They are compared with a base that scores 0.
    rng, hits, trials = np.random.default_rng(3), 0, 1500
    for _ in range(trials):
        share = rng.beta(3.0, 2.0, (30, 1))
        tuned = np.where(rng.random((30, 4)) < share, 1.0, -1.0)
        result = win_rate(np.zeros((30, 4)), tuned)
        hits += result.low <= 0.6 <= result.high
    assert 0.93 <= hits / trials <= 0.97


def test_unanimous_prompts_have_an_interval() -> None:
    """8 of 8 prompts won: from 67.6 % by Wilson (63.1 % exactly), not from 100 %."""
    result = win_rate(np.zeros((8, 1)), np.ones((8, 1)))
    assert result.rate == 1 and result.low == pytest.approx(0.67559, abs=1e-5) and result.high == 1
    lost = win_rate(np.ones((8, 4)), np.zeros((8, 4)))
    assert lost.rate == 0 and lost.high == pytest.approx(1 - 0.67559, abs=1e-5)
    split = np.tile([1.0, -1.0], (8, 1))
    assert win_rate(np.zeros((8, 2)), split).low < 0.3


@pytest.mark.parametrize("images", [3, 5, 6, 7])
def test_prompts_that_agree_count_once_whatever_the_rounding(images: int) -> None:
    """With two wins on every prompt there are as many trials as prompts.

    This holds although rounding makes the variance 1e-33 and not 0.
    """
    points = np.tile([1.0, 1.0, *[0.0] * (images - 2)], (20, 1))
    p, z, n = 2 / images, 1.959964, 20
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    low, high = rate_interval(points)
    assert high - low == pytest.approx(2 * half, abs=1e-6)


def test_one_image_per_prompt_is_wilsons_interval_of_one_trial_less() -> None:
    points = np.array([[1.0]] * 13 + [[0.0]] * 7)
    low, high = rate_interval(points)
    z, n, p = 1.959964, 19, 0.65  # the variance is estimated, with n - 1
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-6
    )


def test_the_rate_lies_in_its_interval_when_scores_are_missing() -> None:
    """A prompt with four images counts as much as one with a single image."""
    base = np.zeros((4, 4))
    tuned = np.array(
        [[-1.0] * 4, [1, np.nan, np.nan, np.nan], [-1.0] * 4, [1, np.nan, np.nan, np.nan]]
    )
    result = win_rate(base, tuned)
    assert (
        result.rate == 0.5
        and result.low < 0.5 < result.high
        and result.wins == result.losses == 0.5
    )
    rng = np.random.default_rng(5)
    for _ in range(200):
        points = np.where(rng.random((9, 4)) < 0.4, np.nan, rng.integers(0, 3, (9, 4)) / 2)
        result = rate_of(points)
        assert result.low <= result.rate <= result.high
        assert result.rate == pytest.approx(result.wins + result.ties / 2)


@pytest.mark.nightly
@pytest.mark.parametrize("prompts", [8, 12, 20, 50])
@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("clustering", [0.0, 0.3, 0.7])
def test_coverage_from_eight_prompts_on(prompts: int, images: int, clustering: float) -> None:
    """Coverage is 93 to 97 % on average over rates from 5 to 95 %.

    Images of one prompt are alike to a degree. Coverage at single rates swings more,
    because a count of few prompts takes few values. The next test shows that no
    interval can avoid it.
    """
    rng, trials, covered = np.random.default_rng(7), 2000, []
    rates = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
    for rate in rates:
        hits = 0
        for _ in range(trials):
            share: Any = rate
            if clustering:
                spread = (1 - clustering) / clustering
                share = rng.beta(rate * spread, (1 - rate) * spread, (prompts, 1))
            low, high = rate_interval((rng.random((prompts, images)) < share).astype(float))
            hits += low <= rate <= high
        covered.append(hits / trials)
    assert 0.93 <= np.mean(covered) <= 0.97, covered
    assert min(covered) >= 0.90 and max(covered) <= 0.99, covered


def test_no_interval_of_eight_answers_covers_every_rate_with_93_to_97_percent() -> None:
    """At a rate of 25 % no run of counts holds the truth in 93 to 97 % of cases."""
    chances = [math.comb(8, x) * 0.25**x * 0.75 ** (8 - x) for x in range(9)]
    runs = [sum(chances[a:b]) for a in range(9) for b in range(a + 1, 10)]
    assert not [run for run in runs if 0.93 <= run <= 0.97]


def test_the_expanded_level_is_students() -> None:
    # The 95 % quantiles of the t distribution are 2.2281 for 11 prompts and 2.0003 for
    # 61. Times sqrt(n / (n - 1)) they are the normal quantiles.
    for prompts, quantile in ((11, 2.2281), (61, 2.0003)):
        expected = 2 * NormalDist().cdf(quantile * (prompts / (prompts - 1)) ** 0.5) - 1
        assert expanded_level(0.95, prompts) == pytest.approx(expected, abs=2e-5)


def test_missing_scores_leave_their_pairs_out() -> None:
    base = np.array([[0.0, 0.0], [0.0, np.nan], [np.nan, np.nan]])
    tuned = np.array([[1.0, -1.0], [1.0, 5.0], [5.0, 5.0]])
    result = win_rate(base, tuned)
    assert (result.rate, result.wins, result.losses) == (
        3 / 4,
        3 / 4,
        1 / 4,
    )  # two prompts, one half won and one whole
    assert np.isnan(win_rate(np.full((2, 2), np.nan), tuned[:2]).rate)


def test_the_sign_test_counts_prompts() -> None:
    base = np.zeros((8, 4))
    tuned = np.ones((8, 4))
    assert sign_test(base, tuned) == pytest.approx(2 / 2**8)  # not 2 / 2**32
    tuned[0], tuned[1, :2] = 0, -1  # a prompt of ties, and one that is even
    assert sign_test(base, tuned) == pytest.approx(2 / 2**6)
    assert sign_test(base, base) == 1.0 and sign_test(base, tuned) == sign_test(tuned, base)


def test_one_prompt_has_no_interval() -> None:
    result = win_rate(np.zeros((1, 4)), np.ones((1, 4)))
    assert result.rate == 1.0 and np.isnan(result.low)


def test_the_standard_error_counts_prompts_not_images() -> None:
    values = np.repeat(np.arange(10.0)[:, None], 8, axis=1)
    assert clustered_standard_error(values) == pytest.approx(
        np.arange(10.0).std(ddof=1) / np.sqrt(10)
    )


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two equal"):
        win_rate(np.zeros((2, 3)), np.zeros((3, 2)))


def test_the_grid_holds_every_image_in_its_place() -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    grid = comparison_grid(
        [("a prompt", [red, red], [blue, blue]), ("another", [blue, blue], [red, red])],
        cell=64,
        columns=2,
    )
    pixels = np.asarray(grid).astype(int)
    assert (
        (np.abs(pixels - [255, 0, 0]).sum(-1) == 0).sum()
        == (np.abs(pixels - [0, 0, 255]).sum(-1) == 0).sum()
        == 4 * 64 * 64
    )


def test_a_grid_of_three_models_has_three_columns() -> None:
    sides = [[Image.new("RGB", (96, 96), colour)] for colour in ("red", "lime", "blue")]
    pixels = np.asarray(
        models_grid([("a prompt", sides)], ["base", "a model with a long name", "c"])
    )
    places = [
        np.argwhere((pixels == colour).all(-1))
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    assert [len(place) for place in places] == [96 * 96] * 3
    lefts = [place[:, 1].min() for place in places]
    assert lefts == sorted(lefts) and len({place[:, 0].min() for place in places}) == 1


@pytest.mark.parametrize("p", [0.3, 0.9, 0.975, 1 - 0.05 / 210])
def test_student_quantiles_are_exact(p: float) -> None:
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    second = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    assert student_quantile(p, 2) == pytest.approx(second, rel=1e-9)
    assert student_quantile(p, 10**6) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5)


@pytest.mark.parametrize(
    ("degrees", "value"), [(3, 3.182446305284), (4, 2.776445105198), (29, 2.045229642133)]
)
def test_student_quantiles_of_tables(degrees: int, value: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(value, rel=1e-9)
