"""Advantages: the published rules' golden values, missing scores, past rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.errors import UserError
from diffalign.training.online.advantages import (
    RULES,
    PromptHistory,
    equal_groups,
    group_advantages,
)

R = torch.tensor([[1, 2, 3, 6], [0.2, 0.2, 0.2, 0.2], [0, 1, 0, 0]], dtype=torch.float64)
R2 = torch.tensor([[10, 30, 20, 20], [5, 5, 6, 8], [1, 0, 0, 0]], dtype=torch.float64)
ZERO = [0.0] * 4
GOLDEN = {
    "group": [
        [-1.068987827850, -0.534493913923, 0, 1.603481741770],
        ZERO,
        [-0.577216966641, 1.731650899920, -0.577216966641, -0.577216966641],
    ],
    "dance_grpo": [
        [-0.925820095487, -0.462910047743, 0, 1.388730143230],
        ZERO,
        [-0.499999990, 1.499999970, -0.499999990, -0.499999990],
    ],
    "flow_grpo": [
        [-1.166190408730, -0.583095204363, 0, 1.749285613090],
        ZERO,
        [-0.145773801091, 0.437321403272, -0.145773801091, -0.145773801091],
    ],
}
GDPO = [
    [-1.905823803290, 0.185184211991, 0, 1.720639591300],
    [-0.438053398381, -0.438053398381, 0, 0.876106796761],
    [0.309750528517, 1.548752642580, -0.929251585550, -0.929251585550],
]


def close(values: torch.Tensor, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol
    )


@pytest.mark.parametrize("rule", list(GOLDEN))
def test_h5a_one_score(rule: str) -> None:
    close(group_advantages(R, rule=rule), GOLDEN[rule], atol=1e-8)


def test_h5a_gdpo() -> None:
    both = torch.stack([R, R2], dim=-1)
    close(group_advantages(both, rule="gdpo", weights=(1.0, 0.5)), GDPO, atol=1e-8)


def test_mix_grpo_adds_normalised_scores() -> None:
    both = torch.stack([R, R2], dim=-1)
    expected = group_advantages(R, rule="dance_grpo") + 0.5 * group_advantages(
        R2, rule="dance_grpo"
    )
    torch.testing.assert_close(
        group_advantages(both, rule="mix_grpo", weights=(1.0, 0.5)), expected
    )


@pytest.mark.parametrize("rule", list(RULES))
def test_a_shift_of_a_group_changes_nothing(rule: str) -> None:
    shifted = R + torch.tensor([[3.0], [0.0], [-2.0]])
    if RULES[rule].scope == "group":
        torch.testing.assert_close(
            group_advantages(shifted, rule=rule), group_advantages(R, rule=rule)
        )
        torch.testing.assert_close(
            group_advantages(R[:1] * 7, rule=rule), group_advantages(R[:1], rule=rule),
            rtol=0, atol=2e-4,
        )  # fmt: skip
    sums = group_advantages(shifted, rule=rule).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-6)


def test_two_images_of_a_group_are_one_apart() -> None:
    scores = torch.tensor([[0.3, 0.9], [5.0, 2.0]], dtype=torch.float64)
    close(group_advantages(scores, rule="group"), [[-1, 1], [1, -1]], atol=1e-3)


@pytest.mark.parametrize("rule", list(RULES))
def test_an_image_without_a_score_is_left_out(rule: str) -> None:
    holed = torch.cat([R, torch.full((3, 1), torch.nan, dtype=torch.float64)], dim=1)
    advantages = group_advantages(holed, rule=rule)
    assert advantages[:, 4].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(advantages[:, :4], group_advantages(R, rule=rule))
    empty = torch.full((1, 3), torch.nan)
    assert group_advantages(empty, rule=rule).tolist() == [[0.0, 0.0, 0.0]]


def test_an_image_that_lacks_one_of_two_scores_counts_in_none() -> None:
    both = torch.stack([R, R2], dim=-1)
    both[0, 1, 1] = torch.nan
    without = both[:1, [0, 2, 3]]
    advantages = group_advantages(both[:1], rule="mix_grpo")
    assert advantages[0, 1] == 0
    torch.testing.assert_close(advantages[:, [0, 2, 3]], group_advantages(without, rule="mix_grpo"))


def test_equal_groups() -> None:
    assert equal_groups(R).tolist() == [False, True, False]
    holed = torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan], [0.1, 0.2]])
    assert equal_groups(holed).tolist() == [True, True, False]
    # Two scores of a group: one that differs is enough.
    assert equal_groups(torch.stack([R, R2], -1)).tolist() == [False, False, False]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rule: expected one of flow_grpo, .* got 'best'"):
        group_advantages(R, rule="best")
    with pytest.raises(ValueError, match="takes one combined score, got 2"):
        group_advantages(torch.stack([R, R2], -1), rule="group")
    with pytest.raises(ValueError, match="weights: expected 1, one per score, got 2"):
        group_advantages(R, rule="mix_grpo", weights=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"scores: expected \(g, k\)"):
        group_advantages(R[0])


def test_past_rewards_of_a_prompt_judge_its_images(tmp_path: Path) -> None:
    history = PromptHistory(size=6, least=4)
    scores = torch.tensor([[1.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
    # Too few so far: against the whole round, biased, with 1e-6 added.
    std = scores.std(correction=0) + 1e-6
    torch.testing.assert_close(history(["a", "b"], scores), (scores - scores.mean()) / std)
    second = history(["a", "b"], scores + 1)
    past = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        second[0], (scores[0] + 1 - past.mean()) / (past.std(correction=0) + 1e-6)
    )
    history(["a"], torch.tensor([[9.0, torch.nan, 8.0]]))
    assert history.rewards["a"] == [1.0, 3.0, 2.0, 4.0, 9.0, 8.0]
    history(["a"], torch.tensor([[7.0]]))
    assert history.rewards["a"] == [3.0, 2.0, 4.0, 9.0, 8.0, 7.0]
    history.save(tmp_path, 0)
    other = PromptHistory(size=6, least=4)
    other.load(tmp_path, 0, torch.device("cpu"))
    assert other.rewards == history.rewards
    with pytest.raises(UserError, match="train.advantage: .* holds no past rewards"):
        other.load(tmp_path / "nowhere", 0, torch.device("cpu"))
