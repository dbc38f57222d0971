"""Combination of scorers against closed forms and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import UserError
from diffalign.rewards import ensemble

NAN = float("nan")


def random_scores(
    seed: int = 0, shape=(5, 4, 3), missing: float = 0.0, ties: bool = False
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    if ties:
        scores = (scores * 1.5).round()
    gone = torch.rand(shape, generator=generator) < missing
    return scores.masked_fill(gone, NAN)


def loop_win_rate(group, weights):
    """The definition, one image and one scorer at a time."""
    k, n = len(group), len(group[0])
    found = []
    for i in range(k):
        total, weight = 0.0, 0.0
        for r in range(n):
            if math.isnan(group[i][r]):
                continue
            others = [group[j][r] for j in range(k) if j != i and not math.isnan(group[j][r])]
            wins = sum(
                1.0 if group[i][r] > other else 0.5 if group[i][r] == other else 0.0
                for other in others
            )
            total += weights[r] * (wins / len(others) if others else 0.5)
            weight += weights[r]
        found.append(total / weight if weight else NAN)
    return found


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_win_rates_follow_their_definition(missing, ties):
    scores, weights = random_scores(1, missing=missing, ties=ties), [1.0, 0.5, 2.0]
    expected = torch.tensor(
        [loop_win_rate(group.tolist(), weights) for group in scores], dtype=torch.float64
    )
    torch.testing.assert_close(ensemble.win_rates(scores, weights), expected, equal_nan=True)


def test_win_rates_are_mean_ranks():
    scores = random_scores(2, (6, 5, 3))
    ranks = scores.argsort(1).argsort(1).double() + 1
    torch.testing.assert_close(ensemble.win_rates(scores), (ranks.mean(-1) - 1) / 4)
    torch.testing.assert_close(
        ensemble.win_rates(scores).sum(1), torch.full((6,), 2.5, dtype=torch.float64)
    )


def test_win_rates_do_not_depend_on_scales_and_follow_permutations():
    scores = random_scores(3)
    stretched = torch.stack(
        [scores[..., 0] * 100 + 3, scores[..., 1].exp(), scores[..., 2] ** 3], -1
    )
    torch.testing.assert_close(ensemble.win_rates(stretched), ensemble.win_rates(scores))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        ensemble.win_rates(scores[:, order]), ensemble.win_rates(scores)[:, order]
    )
    turned = scores[..., [2, 0, 1]]
    torch.testing.assert_close(
        ensemble.win_rates(turned, [3, 1, 2]), ensemble.win_rates(scores, [1, 2, 3])
    )
    torch.testing.assert_close(
        ensemble.win_rates(scores, [2, 4, 6]), ensemble.win_rates(scores, [1, 2, 3])
    )


def test_constant_groups_and_padding():
    flat = torch.ones(1, 3, 2)
    assert ensemble.win_rates(flat).tolist() == [[0.5, 0.5, 0.5]]
    assert ensemble.zscore(flat).tolist() == [[0.0, 0.0, 0.0]]
    assert ensemble.minmax(flat).tolist() == [[0.5, 0.5, 0.5]]
    ragged = torch.tensor([[[1.0], [2.0], [NAN]]])
    for method in ("winrate", "zscore", "minmax", "majority"):
        found = ensemble.combine(ragged, method)
        assert found[0, 2].isnan() and found[0, 1] > found[0, 0]
    # exactly, for any weights and for values whose mean is rounded
    uneven = torch.full((1, 7, 3), 0.1, dtype=torch.float64)
    assert bool((ensemble.win_rates(uneven, [0.1, 0.7, 0.3]) == 0.5).all())
    assert bool((ensemble.zscore(uneven, [0.1, 0.7, 0.3]) == 0).all())
    lone = torch.tensor([[[1.0], [NAN]]])
    assert ensemble.win_rates(lone)[0, 0] == 0.5 and ensemble.majority_score(lone)[0, 0] == 0.5


@pytest.mark.parametrize("ddof", [0, 1])
def test_zscores_have_mean_zero_and_unit_spread(ddof):
    scores = random_scores(4, (3, 6, 1))
    found = ensemble.zscore(scores, ddof=ddof)
    torch.testing.assert_close(
        found.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        found.std(1, correction=ddof), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )
    two = torch.cat([scores, scores * 1000 + 5], -1)
    torch.testing.assert_close(ensemble.zscore(two, [1, 3], ddof=ddof), found, atol=1e-6, rtol=0)


def test_weighted_sums_ask_for_declared_scales():
    scores = torch.tensor([[[20.0, 0.25], [22.0, 0.20]]], dtype=torch.float64)
    with pytest.raises(UserError, match=r"hps declares none; give each a normalize"):
        ensemble.weighted_sum(scores, affine=[(18, 8), None], names=["pick", "hps"])
    found = ensemble.weighted_sum(scores, [0.7, 0.3], affine=[(18, 8), (0.2, 0.05)])
    torch.testing.assert_close(
        found, torch.tensor([[0.7 * 0.25 + 0.3, 0.7 * 0.5]], dtype=torch.float64)
    )
    torch.testing.assert_close(ensemble.weighted_sum(scores, affine="none"), scores.sum(-1))


def test_missing_scores_leave_the_other_weights():
    scores = torch.tensor([[[1.0, NAN], [3.0, 5.0], [NAN, NAN]]], dtype=torch.float64)
    found = ensemble.weighted_sum(scores, [1.0, 3.0], affine="none")
    assert found[0, 0] == 4.0 and found[0, 1] == 18.0 and found[0, 2].isnan()
    dropped = ensemble.apply_missing(scores, "drop")
    assert dropped[0, 0].isnan().all() and dropped[0, 1].tolist() == [3, 5]
    with pytest.raises(UserError, match=r"scores are missing \(1 of hps\)"):
        ensemble.apply_missing(scores, "fail", ["pick", "hps"])
    with pytest.raises(UserError, match="did you mean 'drop'"):
        ensemble.apply_missing(scores, "dropp")


def test_majorities_may_be_cyclic():
    # Condorcet: a > b > c, b > c > a, c > a > b
    scores = torch.tensor([[[3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [1.0, 2.0, 3.0]]])
    wins = ensemble.majority(scores)[0]
    assert wins[0, 1] == wins[1, 2] == wins[2, 0] == 1
    torch.testing.assert_close(wins, -wins.T)
    assert ensemble.majority_score(scores).tolist() == [[0.5, 0.5, 0.5]]
    clear = torch.tensor([[[1.0, 1.0, 9.0], [2.0, 2.0, 1.0]]])
    assert ensemble.majority(clear)[0, 1, 0] == 1
    assert ensemble.majority(clear, [1, 1, 5])[0, 1, 0] == -1
    assert ensemble.majority_score(clear).tolist() == [[0.0, 1.0]]
    # 0.1 + 0.2 is not 0.3 in binary, and still no majority
    split = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert not ensemble.majority(split, [0.1, 0.2, 0.3]).any()


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_majorities_follow_their_definition(missing):
    scores, weights = random_scores(9, (20, 4, 3), missing=missing, ties=True), [1.0, 0.5, 2.0]
    found = ensemble.majority(scores, weights)
    copeland = ensemble.majority_score(scores, weights)
    for group, matrix, values in zip(
        scores.tolist(), found.tolist(), copeland.tolist(), strict=True
    ):
        present = [i for i in range(4) if not all(map(math.isnan, group[i]))]
        for i in range(4):
            for j in range(4):
                pairs = [
                    (w, a, b)
                    for w, a, b in zip(weights, group[i], group[j], strict=True)
                    if not math.isnan(a + b)
                ]
                votes = sum(w * ((a > b) - (a < b)) for w, a, b in pairs)
                assert matrix[i][j] == (votes > 0) - (votes < 0) == -matrix[j][i]
            if i in present and len(present) > 1:
                assert values[i] == pytest.approx(
                    sum((matrix[i][j] + 1) / 2 for j in present if j != i) / (len(present) - 1)
                )


def test_unanimous_pairs_need_margins_and_enough_scorers():
    scores = torch.tensor([[[2.0, 0.30, 5.0], [1.0, 0.29, 6.0]]])
    assert not ensemble.unanimous(scores).any()
    kept = ensemble.unanimous(scores, min_agree=2)
    assert kept[0].tolist() == [[False, True], [False, False]]
    assert not ensemble.unanimous(scores, [0.0, 0.02, 0.0], min_agree=2).any()
    assert not ensemble.unanimous(torch.ones(1, 2, 3)).any()
    assert not ensemble.unanimous(
        scores.masked_fill(torch.tensor([True, False, False]), NAN), min_agree=2
    ).any()
    with pytest.raises(UserError, match="more than half of the 3 scorers"):
        ensemble.unanimous(scores, min_agree=1)
    for margins in ([1.0], [0.0, -1.0, 0.0], [0.0, NAN, 0.0]):
        with pytest.raises(UserError, match="expected 3 numbers of at least 0"):
            ensemble.unanimous(scores, margins)
    many = random_scores(10, (30, 5, 3), missing=0.2, ties=True)
    for needed in (2, 3):
        kept = ensemble.unanimous(many, [0.0, 1.0, 0.5], needed)
        assert kept.any() and not (kept & kept.transpose(1, 2)).any()


def test_conservative_ensembles():
    scores = torch.tensor([[1.0, 2.0, 6.0], [NAN, 4.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    assert ensemble.conservative(scores, "mean")[:2].tolist() == [3.0, 4.0]
    assert ensemble.conservative(scores, "min")[:2].tolist() == [1.0, 4.0]
    std = math.sqrt((4 + 1 + 9) / 3)
    found = ensemble.conservative(scores, "mean_minus_std", k=2.0)
    torch.testing.assert_close(found[:2], torch.tensor([3 - 2 * std, 4.0], dtype=torch.float64))
    sample = ensemble.conservative(scores[:1], "mean_minus_std", ddof=1)
    torch.testing.assert_close(sample, torch.tensor([3 - math.sqrt(7.0)], dtype=torch.float64))
    for kind in ensemble.KINDS:
        assert ensemble.conservative(scores, kind)[2].isnan()
    for kind, expected in (
        ("mean", 4.0),
        ("min", 2.0),
        ("mean_minus_std", 2.0),
    ):  # a member of weight 0 is none
        assert ensemble.conservative(scores[:1], kind, weights=[0, 1, 1]).tolist() == [expected]
    assert ensemble.conservative(torch.ones(2, 3, 4, 5), "min").shape == (2, 3, 4)
    with pytest.raises(UserError, match="expected mean, min, mean_minus_std, got 'max'"):
        ensemble.conservative(scores, "max")


def test_one_exploited_member_does_not_carry_a_conservative_ensemble():
    honest, hacked = torch.tensor([[[0.6, 0.6, 0.6], [0.4, 0.4, 3.0]]], dtype=torch.float64).unbind(
        1
    )
    for kind, fooled in (("mean", True), ("min", False), ("mean_minus_std", False)):
        assert (
            bool((ensemble.conservative(hacked, kind) > ensemble.conservative(honest, kind)).all())
            is fooled
        )


def test_levels_of_scorers_do_not_count_where_they_are_aligned():
    scores = random_scores(6)
    aligned = ensemble.align_levels(scores)
    torch.testing.assert_close(aligned.mean(-1), scores.mean(-1))
    levels = aligned.mean(1)
    torch.testing.assert_close(levels, levels.mean(-1, keepdim=True).expand_as(levels))
    shifts = random_scores(7, (5, 1, 3))
    scale = [(0.0, 1.0)] * scores.shape[-1]
    for method in ensemble.CENTERED:
        first, second = (
            ensemble.combine(values, method, affine=scale, center=True)
            for values in (scores, scores + shifts)
        )
        moved = second - first  # one number per group: the mean of its shifts
        torch.testing.assert_close(moved, shifts.mean(-1).expand_as(moved))
    # By hand: levels (2, 6, 1), their mean 3.
    group = torch.tensor([[[1.0, 8.0, 1.0], [3.0, 4.0, 1.0]]], dtype=torch.float64)
    assert ensemble.align_levels(group).tolist() == [[[2, 5, 3], [4, 1, 3]]]
    assert ensemble.combine(group, "min", affine="none", center=True).tolist() == [[2, 1]]
    assert ensemble.combine(group, "min", affine="none").tolist() == [[1, 1]]


def test_levels_are_those_of_images_that_all_scorers_have():
    group = torch.tensor(
        [[[1.0, 8.0, NAN], [3.0, 4.0, NAN], [50.0, NAN, NAN], [NAN, NAN, NAN]]],
        dtype=torch.float64,
    )  # levels 2 and 6: the third scorer saw nothing, the third image has one score
    aligned = ensemble.align_levels(group)[0]
    assert aligned[:2, :2].tolist() == [[3, 6], [5, 2]] and aligned[2, 0] == 52
    assert aligned.isnan().equal(group[0].isnan())
    heavy = ensemble.align_levels(group, [3.0, 1.0, 1.0])[0]  # mean level (3 * 2 + 6) / 4
    assert heavy[:2, :2].tolist() == [[2, 5], [4, 1]]
    without = ensemble.align_levels(group, [1.0, 0.0, 1.0])[0]  # no other level to move to
    torch.testing.assert_close(without, group[0], equal_nan=True)
    for alone in (group[:, :1], group[:, 1:3]):  # one image that both have
        torch.testing.assert_close(ensemble.align_levels(alone), alone, equal_nan=True)
    for method in ("winrate", "mean"):
        with pytest.raises(UserError, match=f"combine.center: .* alone, got {method}"):
            ensemble.combine(group, method, affine="none", center=True)


def test_kendalls_w():
    same = torch.stack([torch.arange(5.0)] * 3, -1)[None]
    opposed = torch.stack([torch.arange(4.0), -torch.arange(4.0)], -1)[None]
    assert ensemble.kendalls_w(same).tolist() == [1.0]
    assert ensemble.kendalls_w(opposed).tolist() == [0.0]
    # three judges rank four: 1234, 2143, 1243
    # -> S = sum (R - 7.5)^2 with R = 4, 5, 10, 11 = 37; W = 12 * 37 / (9 * 60)
    ranks = torch.tensor([[[1.0, 2.0, 1.0], [2.0, 1.0, 2.0], [3.0, 4.0, 4.0], [4.0, 3.0, 3.0]]])
    torch.testing.assert_close(
        ensemble.kendalls_w(ranks), torch.tensor([12 * 37 / 540], dtype=torch.float64)
    )
    # with ties, ranks 1, 2.5, 2.5, 4 twice: still perfect agreement
    tied = torch.stack([torch.tensor([1.0, 2.0, 2.0, 3.0])] * 2, -1)[None]
    torch.testing.assert_close(ensemble.kendalls_w(tied), torch.tensor([1.0], dtype=torch.float64))
    # one judge ties two: ranks 1.5, 1.5, 3 and 1, 2, 3
    # -> R = 2.5, 3.5, 6, S = 6.5; W = 12 * 6.5 / (4 * 24 - 2 * 6)
    half = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [2.0, 3.0]]])
    torch.testing.assert_close(
        ensemble.kendalls_w(half), torch.tensor([78 / 84], dtype=torch.float64)
    )
    # images that not all scored are left out, in each group on its own
    ragged = torch.cat([ranks, torch.full((1, 1, 3), NAN)], 1)
    partly = torch.cat([torch.tensor([[[9.0, NAN, 0.0]]]), ranks], 1)
    torch.testing.assert_close(
        ensemble.kendalls_w(torch.cat([ragged, partly])), torch.tensor([12 * 37 / 540] * 2).double()
    )
    assert ensemble.kendalls_w(torch.ones(1, 3, 2)).isnan().all()
    assert ensemble.kendalls_w(torch.ones(1, 3, 1)).isnan().all()
    assert ensemble.kendalls_w(torch.tensor([[[1.0, 2.0], [NAN, 1.0]]])).isnan().all()


def test_pairwise_agreement():
    scores = torch.tensor([[[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 2.0, 1.0]]])
    found = ensemble.pairwise_agreement(scores)
    assert found[0, 2] == 0 and found[0, 0] == 1
    assert found[0, 1] == 1  # of the two pairs that scorer 1 tells apart
    torch.testing.assert_close(found, found.T)
    assert ensemble.pairwise_agreement(torch.tensor([[[1.0, NAN], [2.0, 1.0]]]))[0, 1].isnan()
    two = torch.tensor(
        [
            [[1.0, 1.0], [2.0, 2.0], [NAN, 3.0]],
            [[1.0, 3.0], [2.0, 2.0], [3.0, NAN]],
            [[1.0, 0.0], [2.0, 5.0], [2.0, 5.0]],
        ]
    )
    # over all groups, pairs that both tell apart:
    # (1, 2) alike; (1, 2) not; (1, 2) and (1, 3) alike
    assert ensemble.pairwise_agreement(two)[0, 1] == 3 / 4


def test_pairs_never_hold_a_missing_score():
    combined = torch.tensor([[0.2, NAN, 0.9, 0.1], [NAN, 0.5, NAN, NAN], [0.5, 0.5, NAN, 0.5]])
    indices, margins = ensemble.best_worst_pairs(combined)
    assert indices.tolist() == [[2, 3], [-1, -1], [0, 3]]
    assert margins[0] == pytest.approx(0.8) and margins[1].isnan() and margins[2] == 0
    infinite = torch.tensor([[NAN, -math.inf, -math.inf, NAN], [NAN, math.inf, 1.0, NAN]])
    assert ensemble.best_worst_pairs(infinite)[0].tolist() == [[1, 2], [1, 2]]
    assert ensemble.best_worst_pairs(torch.tensor([[3.0, 1.0, 3.0, 2.0]]))[0].tolist() == [[0, 1]]
    scores = random_scores(6, (200, 3), missing=0.4, ties=True)
    for group, (best, worst) in zip(
        scores.tolist(), ensemble.best_worst_pairs(scores)[0].tolist(), strict=True
    ):
        present = [value for value in group if not math.isnan(value)]
        if len(present) < 2:
            assert (best, worst) == (-1, -1)
        else:
            assert best != worst and (group[best], group[worst]) == (max(present), min(present))
            assert best == group.index(max(present))


def test_the_dispatcher_names_methods_and_refuses_undeclared_scales():
    scores = random_scores(5)
    torch.testing.assert_close(ensemble.combine(scores), ensemble.win_rates(scores))
    for method in ensemble.METHODS:
        found = ensemble.combine(scores, method, affine=[(0, 1)] * 3)
        assert found.shape == (5, 4) and found.isfinite().all()
    for method in ("weighted_sum", "mean", "min", "mean_minus_std"):
        with pytest.raises(UserError, match="declares none"):
            ensemble.combine(scores, method, affine=[(0, 1), None, (0, 1)])
    torch.testing.assert_close(
        ensemble.combine(scores, "min", affine=[(0, 1)] * 3), scores.amin(-1)
    )
    with pytest.raises(
        UserError,
        match=r"combine.method: unknown method 'win_rate' \(did you mean 'winrate'\?\); there are",
    ):
        ensemble.combine(scores, "win_rate")
    for weights in ([1.0, -1.0, 1.0], [1.0, NAN, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0]):
        with pytest.raises(UserError, match="weights: expected 3 numbers"):
            ensemble.combine(scores, weights=weights)
    with pytest.raises(UserError, match=r"scorer 1, scorer 2 declares none"):
        ensemble.combine(scores, "mean", affine=[(0, 1), None, None])
    with pytest.raises(UserError, match=r"pick, hps, clip declares none"):
        ensemble.combine(scores, "min", names=["pick", "hps", "clip"])
    with pytest.raises(UserError, match="for each of 3 scorers, got 1"):
        ensemble.combine(scores, "weighted_sum", affine=[(0, 1)])
    with pytest.raises(UserError, match="a number above 0 for scorer 2, got 0"):
        ensemble.combine(scores, "weighted_sum", affine=[(0, 1), (0, 1), (0, 0)])
    with pytest.raises(UserError, match="got 'declared'"):
        ensemble.combine(scores, "weighted_sum", affine="declared")
    with pytest.raises(
        UserError, match=r"expected \(groups, images of a group, scorers\), got shape \(5, 4\)"
    ):
        ensemble.win_rates(scores[..., 0])


@pytest.mark.parametrize("method", ensemble.METHODS)
def test_every_method_follows_permutations_and_leaves_out_what_is_missing(method):
    def combine(scores, weights=(1.0, 0.5, 2.0), affine=((0, 1), (1, 2), (-1, 0.5))):
        return ensemble.combine(scores, method, weights=list(weights), affine=list(affine))

    scores = random_scores(7, (40, 5, 3), missing=0.3, ties=True)
    found = combine(scores)
    assert bool((found.isnan() == scores.isnan().all(-1)).all())
    images = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(combine(scores[:, images]), found[:, images], equal_nan=True)
    turned = combine(scores[..., [2, 0, 1]], (2.0, 1.0, 0.5), ((-1, 0.5), (0, 1), (1, 2)))
    torch.testing.assert_close(turned, found, equal_nan=True)
    if method != "weighted_sum":  # which is not divided by the weights
        torch.testing.assert_close(combine(scores, (0.2, 0.1, 0.4)), found, equal_nan=True)
    # a scorer of weight 0 and a padded image change nothing
    longer = torch.cat([scores, random_scores(8, (40, 5, 1))], -1)
    torch.testing.assert_close(
        combine(longer, (1.0, 0.5, 2.0, 0.0), ((0, 1), (1, 2), (-1, 0.5), (0, 1))).nan_to_num(9),
        found.nan_to_num(9),
    )
    padded = torch.cat([scores, torch.full((40, 2, 3), NAN)], 1)
    torch.testing.assert_close(combine(padded)[:, :5], found, equal_nan=True)
    assert combine(padded)[:, 5:].isnan().all()
    # dropped images are out, and out of the others' comparisons
    dropped = ensemble.combine(scores, method, missing="drop", affine=[(0, 1)] * 3)
    assert bool((dropped.isnan() == scores.isnan().any(-1)).all())


def test_results_are_floats_of_at_least_single_precision():
    whole = torch.tensor([[[1], [2], [3]]])
    assert ensemble.win_rates(whole).tolist() == [[0.0, 0.5, 1.0]]
    for given, expected in (
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        for method in ensemble.METHODS:
            assert ensemble.combine(whole.to(given), method, affine="none").dtype == expected
