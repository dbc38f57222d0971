"""RankDPO: golden values, weights, ties, ragged lists, where scores come from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import first_batch, make_trainer, ranked_rows

from diffalign import RankDPOConfig, load_preferences
from diffalign.errors import ConfigError, UserError
from diffalign.methods.diffusion_dpo import diffusion_dpo_loss
from diffalign.methods.rankdpo import average_ranks, lambda_weights, phi_from_scores, rankdpo_loss
from diffalign.rewards import win_rates

REWARDS = torch.tensor(
    [[0.28, 0.60, 21.5, 0.80, 0.9], [0.27, 0.70, 22.0, 0.75, 1.1], [0.25, 0.50, 21.0, 0.85, 0.2],
     [0.26, 0.40, 20.5, 0.60, 0.2]],
    dtype=torch.float64,
)  # fmt: skip
PHI = torch.tensor([[11, 12, 5, 1]], dtype=torch.float64) / 15
CHANGE = torch.tensor([[-0.0004, 0.0002, 0.0003, -0.0001]], dtype=torch.float64)
REFERENCE = torch.full((1, 4), 0.1, dtype=torch.float64)
NAN = math.nan


def loss(policy=None, scores=PHI, **options) -> torch.Tensor:
    return rankdpo_loss(
        REFERENCE + CHANGE if policy is None else policy,
        REFERENCE,
        scores,
        **{"beta": 4000.0} | options,
    )


def test_golden_value() -> None:
    """beta 2000 without the 1/2 is 4000 here."""
    assert float(loss()) == pytest.approx(0.979519325581, abs=1e-9)
    weights = lambda_weights(PHI)[0]
    expected = {
        (0, 2): 0.0760392521,
        (0, 3): 0.1777286247,
        (1, 0): 0.0418645164,
        (1, 2): 0.3470980552,
        (1, 3): 0.5698653944,
        (2, 3): 0.0212653688,
    }
    for (i, j), value in expected.items():
        assert float(weights[i, j]) == pytest.approx(value, abs=1e-9)
    assert int((weights > 0).sum()) == 6
    # Its scorers' votes: two images tie on one scorer, which win_rates counts one half
    # instead of nothing.
    assert win_rates(REWARDS[None])[0].tolist() == pytest.approx(
        [11 / 15, 12 / 15, 5.5 / 15, 1.5 / 15]
    )


def test_two_images_are_a_weighted_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        torch.rand(50, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    scores = torch.tensor([[1.0, 0.0]]).double().expand(50, 2)
    pair = diffusion_dpo_loss(policy, reference, beta=7.0)
    found = rankdpo_loss(policy, reference, scores, beta=7.0)
    torch.testing.assert_close(found, 0.532455814262 * pair, rtol=1e-9, atol=1e-12)
    assert float(
        lambda_weights(torch.tensor([[0.8, 0.2]], dtype=torch.float64))[0, 0, 1]
    ) == pytest.approx(0.315428300121, abs=1e-9)
    one = rankdpo_loss(
        torch.tensor([[0.1, 0.1005]], dtype=torch.float64),
        torch.full((1, 2), 0.1, dtype=torch.float64),
        scores[:1],
        beta=2000.0,
    )
    assert float(one) == pytest.approx(0.252425046635, abs=1e-9)


def test_policy_equal_to_the_reference_gives_log_two_per_weight() -> None:
    assert float(loss(REFERENCE)) == pytest.approx(math.log(2) * float(lambda_weights(PHI).sum()))


def test_options() -> None:
    assert float(loss(log_base="2")) == pytest.approx(math.log(2) * float(loss()))
    assert float(loss(normalize="mean")) == pytest.approx(float(loss()) / 6)
    gains, discounts = torch.exp2(PHI[0]) - 1, torch.log1p(torch.tensor([2.0, 1, 3, 4]).double())
    assert float(loss(normalize="idcg")) == pytest.approx(
        float(loss()) / float((gains / discounts).sum())
    )


def test_order_and_padding_do_not_matter() -> None:
    order = [2, 0, 3, 1]
    turned = rankdpo_loss((REFERENCE + CHANGE)[:, order], REFERENCE, PHI[:, order], beta=4000.0)
    torch.testing.assert_close(turned, loss())
    wide = torch.cat([REFERENCE + CHANGE, torch.full((1, 2), NAN).double()], 1).requires_grad_()
    scores = torch.cat([PHI, torch.full((1, 2), NAN).double()], 1)
    found = rankdpo_loss(
        wide, torch.cat([REFERENCE, torch.full((1, 2), 9.0).double()], 1), scores, beta=4000.0
    )
    torch.testing.assert_close(found, loss())
    found.sum().backward()
    assert wide.grad[:, :4].isfinite().all() and (wide.grad[:, 4:] == 0).all()


def test_ties_drop_out_and_share_their_rank() -> None:
    scores = torch.tensor([[0.5, 1.0, 0.5, 0.0]]).double()
    assert average_ranks(scores).tolist() == [[2.5, 1.0, 2.5, 4.0]]
    weights = lambda_weights(scores)
    assert weights[0, 0, 2] == weights[0, 2, 0] == 0
    torch.testing.assert_close(weights[0, 0], weights[0, 2])
    assert (
        float(rankdpo_loss(REFERENCE, REFERENCE, torch.full((1, 4), 0.3).double(), beta=1.0)) == 0.0
    )


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    policy = (
        REFERENCE + 1e-3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ).requires_grad_()
    scores = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: rankdpo_loss(p, REFERENCE.expand(3, 4), scores, beta=500.0), policy
    )
    rankdpo_loss(policy, REFERENCE.expand(3, 4), scores, beta=500.0).sum().backward()
    best, worst = scores.argmax(1), scores.argmin(1)
    assert (policy.grad.gather(1, best[:, None]) > 0).all() and (
        policy.grad.gather(1, worst[:, None]) < 0
    ).all()


def test_phi_from_scores() -> None:
    raw = torch.tensor([[21.0, 20.0, 22.0, NAN], [0.2, 0.9, 0.4, 0.4]]).double()
    rates = phi_from_scores(raw, "win_rate")
    assert rates[0, :3].tolist() == [0.5, 0.0, 1.0] and rates[0, 3].isnan()
    assert rates[1].tolist() == pytest.approx([0.0, 1.0, 0.5, 0.5])
    assert phi_from_scores(raw, "minmax")[0, :3].tolist() == [0.5, 0.0, 1.0]
    auto = phi_from_scores(raw)
    assert (
        auto[0, :3].tolist() == [0.5, 0.0, 1.0] and auto[1].tolist() != raw[1].tolist()
    )  # one choice for all lists
    assert phi_from_scores(raw[1:]).tolist() == raw[1:].tolist()
    assert phi_from_scores(torch.full((1, 3), 7.0), "minmax").tolist() == [[0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="gains"):
        phi_from_scores(raw, "rank")


def test_lists_of_different_lengths_train_and_draw_what_their_row_draws(tmp_path: Path) -> None:
    rows = ranked_rows(6, lengths=(3, 2, 4))
    trainer = make_trainer(
        tmp_path / "a", method="rankdpo", rows=rows, per_device_train_batch_size=6, max_steps=2
    )
    batch = first_batch(trainer)
    assert batch.x0.shape[:2] == (6, 4) and batch.scores.isnan().sum(1).sort().values.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert trainer.train().global_step == 2
    alone = make_trainer(
        tmp_path / "b", method="rankdpo", rows=rows, per_device_train_batch_size=1, max_steps=1
    )
    single = first_batch(alone)
    place = batch.row_ids.index(single.row_ids[0])
    k = single.k
    # The autoencoder encodes other numbers of images at once, whose last bits may
    # differ; the noise is drawn per row.
    torch.testing.assert_close(batch.x0[place, :k], single.x0[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.noise[place, :k], single.noise[0])
    assert batch.times[place] == single.times[0]
    both, one = trainer.compute_loss(batch)[0], alone.compute_loss(single)[0]
    assert both.isfinite().all() and one.isfinite().all()


def test_ragged_lists_with_precomputed_reference_errors(tmp_path: Path) -> None:
    rows = ranked_rows(4, lengths=(3, 2))
    options = {
        "rows": rows,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    live = make_trainer(tmp_path / "a", method="rankdpo", **options)
    stored = make_trainer(
        tmp_path / "b", method="rankdpo", precompute_ref_errors=True, ref_error_draws=2, **options
    )
    live.train()
    stored.train()
    a, b = (
        json.loads((tmp_path / n / "logs/metrics.jsonl").read_text().splitlines()[0])["train/loss"]
        for n in "ab"
    )
    assert a == pytest.approx(b, rel=1e-5)


def test_win_rates_over_columns_of_scorers() -> None:
    rows = ranked_rows(2)
    for row in rows:
        row |= {"scores_a": [0.1, 0.3, 0.2], "scores_b": [5.0, 9.0, None]}
    data = load_preferences(rows, score_columns=["scores_a", "scores_b"], verbose=False)
    assert data.kind == "ranked" and data[0].scores == pytest.approx((0.0, 1.0, 0.5))
    with pytest.raises(
        ConfigError, match=r"data.score_columns: the dataset has no column 'scores_c'"
    ):
        load_preferences(rows, score_columns=["scores_c"], verbose=False)
    rows[1]["scores_a"] = [0.1, 0.3]
    with pytest.raises(ConfigError, match="row 1 has 2, 3 scores"):
        load_preferences(rows, score_columns=["scores_a", "scores_b"], verbose=False)


def test_rows_that_hold_no_ranking() -> None:
    rows = ranked_rows(4)
    rows[1] = {**rows[1], "scores": [0.5, 0.5, 0.5]}
    data = load_preferences(rows, verbose=False)
    assert len(data) == 3 and data.report.ties == 1
    single = [
        {**row, "images": row["images"][:1], "scores": row["scores"][:1]} for row in ranked_rows(2)
    ]
    with pytest.raises(UserError, match="has 1 scores, expected at least 2"):
        load_preferences(single, verbose=False)
    broken = [{**row, "scores": [1.0, NAN, 0.0]} for row in ranked_rows(2)]
    with pytest.raises(UserError, match="not a finite number"):
        load_preferences(broken, verbose=False)
    short = [{**row, "scores": [1.0, 0.0]} for row in ranked_rows(2)]
    with pytest.raises(UserError, match="has 3 images and 2 scores"):
        load_preferences(short, verbose=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RankDPOConfig(gains="raw"), "gains: expected one of"),
        (lambda: RankDPOConfig(log_base="10"), "log_base: expected one of e, 2"),
        (lambda: RankDPOConfig(normalize="max"), "normalize: expected one of"),
        (lambda: RankDPOConfig(beta=-1.0), "beta"),
    ],
)
def test_mistakes(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
    with pytest.raises(ValueError, match=r"scores: expected one per image \(1, 4\), got \(1, 3\)"):
        loss(scores=PHI[:, :3])
    with pytest.raises(ValueError, match=r"expected phi in \[0, 1\]"):
        loss(scores=PHI * 20)


def test_gains_are_chosen_once_for_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HPS-like scores that lie in [0, 1] in one list weigh as the other lists' do."""
    low, high = {"scores": [0.28, 0.27, 0.25]}, {"scores": [1.4, -0.2, 0.3]}
    rows = [{**row, **(low if i % 2 else high)} for i, row in enumerate(ranked_rows(4))]
    trainer = make_trainer(tmp_path / "a", method="rankdpo", rows=rows, max_steps=1)
    trainer.train()
    assert (
        trainer.gains == "win_rate"
        and "gains: win rates within each list (scores run from -0.2 to 1.4)"
        in capsys.readouterr().out
    )
    same = make_trainer(
        tmp_path / "b", method="rankdpo", rows=[{**row, **low} for row in rows], max_steps=1
    )
    same.train()
    assert (
        same.gains == "given"
        and "gains: the scores as they are (scores run from 0.25 to 0.28)"
        in capsys.readouterr().out
    )
    inverted = load_preferences(rows, verbose=False).with_inverted_preferences()
    assert inverted.score_range() == pytest.approx((-1.4, 0.75))
    assert load_preferences(rows, verbose=False).select([1, 3]).score_range() == (0.25, 0.28)
