"""Combination of scorers against closed forms and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign import UserError
from diffalign.rewards import ensemble

NAN = float("nan")


def random_scores(seed: int = 0, shape=(5, 4, 3), missing: float = 0.0, ties: bool = False) -> torch.Tensor:
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
            wins = sum(1.0 if group[i][r] > other else 0.5 if group[i][r] == other else 0.0 for other in others)
            total += weights[r] * (wins / len(others) if others else 0.5)
            weight += weights[r]
        found.append(total / weight if weight else NAN)
    return found


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_win_rates_follow_their_definition(missing, ties):
    scores, weights = random_scores(1, missing=missing, ties=ties), [1.0, 0.5, 2.0]
    expected = torch.tensor([loop_win_rate(group.tolist(), weights) for group in scores], dtype=torch.float64)
    torch.testing.assert_close(ensemble.win_rates(scores, weights), expected, equal_nan=True)


def test_win_rates_are_mean_ranks():
    scores = random_scores(2, (6, 5, 3))
    ranks = scores.argsort(1).argsort(1).double() + 1
    torch.testing.assert_close(ensemble.win_rates(scores), (ranks.mean(-1) - 1) / 4)
    torch.testing.assert_close(ensemble.win_rates(scores).sum(1), torch.full((6,), 2.5, dtype=torch.float64))


def test_win_rates_do_not_depend_on_scales_and_follow_permutations():
    scores = random_scores(3)
    stretched = torch.stack([scores[..., 0] * 100 + 3, scores[..., 1].exp(), scores[..., 2] ** 3], -1)
    torch.testing.assert_close(ensemble.win_rates(stretched), ensemble.win_rates(scores))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(ensemble.win_rates(scores[:, order]), ensemble.win_rates(scores)[:, order])
    turned = scores[..., [2, 0, 1]]
    torch.testing.assert_close(ensemble.win_rates(turned, [3, 1, 2]), ensemble.win_rates(scores, [1, 2, 3]))
    torch.testing.assert_close(ensemble.win_rates(scores, [2, 4, 6]), ensemble.win_rates(scores, [1, 2, 3]))


def test_constant_groups_and_padding():
    flat = torch.ones(1, 3, 2)
    assert ensemble.win_rates(flat).tolist() == [[0.5, 0.5, 0.5]]
    assert ensemble.zscore(flat).tolist() == [[0.0, 0.0, 0.0]]
    assert ensemble.minmax(flat).tolist() == [[0.5, 0.5, 0.5]]
    ragged = torch.tensor([[[1.0], [2.0], [NAN]]])
    for method in ("winrate", "zscore", "minmax", "majority"):
        found = ensemble.combine(ragged, method)
        assert found[0, 2].isnan() and found[0, 1] > found[0, 0]
    lone = torch.tensor([[[1.0], [NAN]]])
    assert ensemble.win_rates(lone)[0, 0] == 0.5 and ensemble.majority_score(lone)[0, 0] == 0.5


@pytest.mark.parametrize("ddof", [0, 1])
def test_zscores_have_mean_zero_and_unit_spread(ddof):
    scores = random_scores(4, (3, 6, 1))
    found = ensemble.zscore(scores, ddof=ddof)
    torch.testing.assert_close(found.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.std(1, correction=ddof), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    two = torch.cat([scores, scores * 1000 + 5], -1)
    torch.testing.assert_close(ensemble.zscore(two, [1, 3], ddof=ddof), found, atol=1e-6, rtol=0)


def test_weighted_sums_ask_for_declared_scales():
    scores = torch.tensor([[[20.0, 0.25], [22.0, 0.20]]], dtype=torch.float64)
    with pytest.raises(UserError, match=r"hps declares none; give each a normalize"):
        ensemble.weighted_sum(scores, affine=[(18, 8), None], names=["pick", "hps"])
    found = ensemble.weighted_sum(scores, [0.7, 0.3], affine=[(18, 8), (0.2, 0.05)])
    torch.testing.assert_close(found, torch.tensor([[0.7 * 0.25 + 0.3, 0.7 * 0.5]], dtype=torch.float64))
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


def test_unanimous_pairs_need_margins_and_enough_scorers():
    scores = torch.tensor([[[2.0, 0.30, 5.0], [1.0, 0.29, 6.0]]])
    assert not ensemble.unanimous(scores).any()
    kept = ensemble.unanimous(scores, min_agree=2)
    assert kept[0].tolist() == [[False, True], [False, False]]
    assert not ensemble.unanimous(scores, [0.0, 0.02, 0.0], min_agree=2).any()
    assert not ensemble.unanimous(torch.ones(1, 2, 3)).any()
    assert not ensemble.unanimous(scores.masked_fill(torch.tensor([True, False, False]), NAN), min_agree=2).any()
    with pytest.raises(UserError, match="more than half of the 3 scorers"):
        ensemble.unanimous(scores, min_agree=1)
    with pytest.raises(UserError, match="expected 3 numbers of at least 0"):
        ensemble.unanimous(scores, [1.0])


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
    weighted = ensemble.conservative(scores[:1], "mean", weights=[1, 1, 0])
    assert weighted.tolist() == [1.5]
    with pytest.raises(UserError, match="expected mean, min, mean_minus_std, got 'max'"):
        ensemble.conservative(scores, "max")


def test_one_exploited_member_does_not_carry_a_conservative_ensemble():
    honest, hacked = torch.tensor([[[0.6, 0.6, 0.6], [0.4, 0.4, 3.0]]], dtype=torch.float64).unbind(1)
    for kind, fooled in (("mean", True), ("min", False), ("mean_minus_std", False)):
        assert bool((ensemble.conservative(hacked, kind) > ensemble.conservative(honest, kind)).all()) is fooled


def test_kendalls_w():
    same = torch.stack([torch.arange(5.0)] * 3, -1)[None]
    opposed = torch.stack([torch.arange(4.0), -torch.arange(4.0)], -1)[None]
    assert ensemble.kendalls_w(same).tolist() == [1.0]
    assert ensemble.kendalls_w(opposed).tolist() == [0.0]
    # three judges rank four: 1234, 2143, 1243 -> S = sum (R - 7.5)^2 with R = 4, 5, 10, 11 = 37; W = 12 * 37 / (9 * 60)
    ranks = torch.tensor([[[1.0, 2.0, 1.0], [2.0, 1.0, 2.0], [3.0, 4.0, 4.0], [4.0, 3.0, 3.0]]])
    torch.testing.assert_close(ensemble.kendalls_w(ranks), torch.tensor([12 * 37 / 540], dtype=torch.float64))
    # with ties, ranks 1, 2.5, 2.5, 4 twice: still perfect agreement
    tied = torch.stack([torch.tensor([1.0, 2.0, 2.0, 3.0])] * 2, -1)[None]
    torch.testing.assert_close(ensemble.kendalls_w(tied), torch.tensor([1.0], dtype=torch.float64))
    assert ensemble.kendalls_w(torch.ones(1, 3, 2)).isnan().all()
    assert ensemble.kendalls_w(torch.ones(1, 3, 1)).isnan().all()
    assert ensemble.kendalls_w(torch.tensor([[[1.0, 2.0], [NAN, 1.0]]])).isnan().all()


def test_pairwise_agreement():
    scores = torch.tensor([[[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 2.0, 1.0]]])
    found = ensemble.pairwise_agreement(scores)
    assert found[0, 2] == 0 and found[0, 0] == 1
    assert found[0, 1] == 1  # of the two pairs that scorer 1 tells apart
    torch.testing.assert_close(found, found.T)


def test_pairs_never_hold_a_missing_score():
    combined = torch.tensor([[0.2, NAN, 0.9, 0.1], [NAN, 0.5, NAN, NAN], [0.5, 0.5, NAN, 0.5]])
    indices, margins = ensemble.best_worst_pairs(combined)
    assert indices.tolist() == [[2, 3], [-1, -1], [0, 0]]
    assert margins[0] == pytest.approx(0.8) and margins[1].isnan() and margins[2] == 0


def test_the_dispatcher_names_methods_and_refuses_undeclared_scales():
    scores = random_scores(5)
    torch.testing.assert_close(ensemble.combine(scores), ensemble.win_rates(scores))
    for method in ensemble.METHODS:
        found = ensemble.combine(scores, method, affine=[(0, 1)] * 3)
        assert found.shape == (5, 4) and found.isfinite().all()
    for method in ("weighted_sum", "mean", "min", "mean_minus_std"):
        with pytest.raises(UserError, match="declares none"):
            ensemble.combine(scores, method, affine=[(0, 1), None, (0, 1)])
    torch.testing.assert_close(ensemble.combine(scores, "min", affine=[(0, 1)] * 3), scores.amin(-1))
    with pytest.raises(UserError, match="unknown method 'win_rate'; did you mean|unknown method 'win_rate'"):
        ensemble.combine(scores, "win_rate")
    with pytest.raises(UserError, match="weights: expected 3 numbers"):
        ensemble.combine(scores, weights=[1.0, -1.0, 1.0])
