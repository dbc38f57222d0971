"""Panels: the forms of `rewards:`, mistakes, where scorers live, what is combined."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, UserError
from diffalign.rewards.agreement import group_members, stacks
from diffalign.rewards.base import Item, Scorer
from diffalign.rewards.panel import CombineConfig, Panel, RewardEntry, parse_rewards
from diffalign.rewards.registry import register_scorer
from diffalign.rewards.spec import ScorerSpec

events: list[str] = []


def picture(seed: int, level: int | None = None) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = (
        rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        if level is None
        else np.full((6, 7, 3), level, np.uint8)
    )
    return Image.fromarray(pixels)


def mean(image: Image.Image) -> float:
    return float(np.asarray(image.convert("RGB")).mean())


class _Logged(Scorer):
    """Writes down when it is made, moved, asked and closed."""

    def __init__(self, *, offset: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.offset = offset
        events.append(f"load {self.name}")

    def identity(self):
        return {"offset": self.offset}

    def score_batch(self, items: list[Item]):
        events.append(f"score {self.name} {len(items)}")
        return [mean(item.image) + self.offset for item in items]

    def to(self, device=None, dtype=None):
        events.append(f"move {self.name} {device}")
        self.device = torch.device(device)
        return self

    def close(self) -> None:
        events.append(f"close {self.name}")


@register_scorer("panel-a")
class PanelA(_Logged):
    spec = ScorerSpec(
        key="panel-a",
        summary="mean",
        requires=("image",),
        affine=(100.0, 20.0),
        backbone="shared-net",
    )


@register_scorer("panel-b")
class PanelB(_Logged):
    spec = ScorerSpec(key="panel-b", summary="mean", requires=("image",), backbone="shared-net")


@register_scorer("panel-low", requires=("image",), higher_is_better=False, affine=(100.0, 20.0))
def panel_low(images):
    """Darkness preferred."""
    return [mean(image) for image in images]


@register_scorer("panel-gap", requires=("image",))
def panel_gap(images):
    """Cannot score dark images."""
    return [mean(image) if mean(image) > 50 else None for image in images]


@pytest.fixture(autouse=True)
def _fresh():
    events.clear()


def test_all_forms_of_rewards_are_entries():
    assert [e.name for e in parse_rewards("panel-a, panel-b")] == ["panel-a", "panel-b"]
    assert parse_rewards(["panel-a"]) == [RewardEntry("panel-a")]
    weighted = parse_rewards({"panel-a": 0.7, "panel_b": 3})
    assert [(e.name, e.scorer, e.weight) for e in weighted] == [
        ("panel-a", "panel-a", 0.7),
        ("panel_b", "panel_b", 3.0),
    ]
    affine = {"kind": "affine", "mean": "18", "std": 8}
    full = parse_rewards(
        [
            {"name": "pick", "scorer": "pickscore", "weight": "1e-1", "normalize": affine},
            {"scorer": "hpsv2.1", "args": None},
        ]
    )
    assert (full[0].name, full[0].weight, full[1].name, full[1].args) == (
        "pick",
        0.1,
        "hpsv2.1",
        {},
    )
    assert full[0].affine(PanelB.spec) == (18.0, 8.0)
    assert parse_rewards(full) == full
    assert parse_rewards([{"scorer": "remote", "args": {"scorer": "pickscore"}}])[0].args == {
        "scorer": "pickscore"
    }


@pytest.mark.parametrize(
    ("value", "place", "part"),
    [
        (
            [{"scorer": "panel-a"}, {"scorer": "panel-b", "weigth": 2}],
            "rewards[1].weigth",
            "did you mean 'weight'",
        ),
        ("panel-a,panel-aa", "rewards[1].scorer", "did you mean panel-a"),
        (["panel-a", "panel-a"], "rewards[1].name", "two entries"),
        ({"panel-a": -1}, "rewards.panel-a.weight", "at least 0"),
        ({"panel-a": float("inf")}, "rewards.panel-a.weight", "finite"),
        ({"panel-a": "much"}, "rewards.panel-a.weight", "expected float"),
        ({"panel-a": {"weight": 1}}, "rewards.panel-a", "list of entries"),
        ({"panel-a": 0}, "rewards", "weights"),
        ([{"scorer": "panel-a", "role": "evl"}], "rewards[0].role", "did you mean 'eval'"),
        ([{"scorer": "panel-a", "on_error": "skip"}], "rewards[0].on_error", "raise or nan"),
        ([{"scorer": "panel-a", "normalize": "z"}], "rewards[0].normalize", "declared"),
        (
            [{"scorer": "panel-a", "normalize": {"kind": "affine", "mean": 1, "sd": 1}}],
            "rewards[0].normalize.sd",
            "did you mean",
        ),
        (
            [{"scorer": "panel-a", "normalize": {"kind": "affine", "mean": 1, "std": 0}}],
            "rewards[0].normalize.std",
            "above 0",
        ),
        (
            [{"scorer": "panel-a", "normalize": {"kind": "affine", "mean": 1}}],
            "rewards[0].normalize.std",
            "expected float",
        ),
        (
            [{"scorer": "panel-a", "args": {"batch_size": 2}}],
            "rewards[0].args.batch_size",
            "beside args",
        ),
        ([{"scorer": "panel-a", "batch_size": 0}], "rewards[0].batch_size", ">= 1"),
        ([{"weight": 1}], "rewards[0].scorer", "expected a name"),
        ([], "rewards", "names no scorer"),
        (3, "rewards", "expected names"),
        ({"scorer": "panel-a", "weight": 1}, "rewards", "list"),
        ("hpsv2", "rewards[0].scorer", "name one of"),
    ],
)
def test_mistakes_in_rewards_name_their_place(value, place, part):
    with pytest.raises(ConfigError, match=".") as error:
        parse_rewards(value)
    assert error.value.field == place
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"rewards": "panel-a", "combin": {}}, "did you mean 'combine'"),
        ({"combine": {"method": "winrate"}}, "rewards: names no scorer"),
        (
            {"rewards": "panel-a", "combine": {"method": "winrat"}},
            "combine.method: .*did you mean 'winrate'",
        ),
        ({"rewards": "panel-a", "combine": {"missing": "zero"}}, "combine.missing"),
        ({"rewards": "panel-a", "combine": {"ddof": 2}}, "combine.ddof"),
        ({"rewards": "panel-a", "combine": {"margins": {"panel-c": 1}}}, "combine.margins.panel-c"),
        ({"rewards": "panel-a", "combine": {"min_agree": 2}}, "combine.min_agree"),
        (
            {"rewards": "panel-a,panel-b", "combine": {"center": True}},
            "combine.center: has an effect with min and mean_minus_std alone, got winrate",
        ),
        ({"rewards": "panel-a", "placement": "exclusiv"}, "did you mean 'exclusive'"),
        ({"rewards": "panel-a,panel-b", "combine": "weighted_sum"}, "panel-b declares none"),
        ({"rewards": [{"scorer": "panel-b", "normalize": "declared"}]}, r"rewards\[0\].normalize"),
        (
            {"rewards": [{"scorer": "panel-a", "args": {"ofset": 1}}]},
            r"rewards\[0\].args.ofset.*did you mean 'offset'",
        ),
        ({"rewards": [{"scorer": "panel-a", "device": "abacus"}]}, r"rewards\[0\].device"),
        ({"rewards": [{"scorer": "panel-a", "dtype": "int8"}]}, r"rewards\[0\].dtype"),
        (
            {"rewards": [{"scorer": "panel-a", "model": "x"}]},
            r"rewards\[0\].model: panel-a has no option",
        ),
    ],
)
def test_mistakes_in_a_panel_are_found_before_scoring(config, part):
    with pytest.raises(UserError, match=part):
        Panel.from_config(config)
    assert not [event for event in events if event.startswith("score")]


def test_a_panel_keeps_every_column_and_takes_a_bare_value():
    images = [picture(i) for i in range(3)]
    panel = Panel.from_config("panel-a,panel-low")
    result = panel.score(images)
    expected = torch.tensor([mean(image) for image in images])
    assert list(result.columns) == panel.names == ["panel-a", "panel-low"]
    for column in result.columns.values():
        assert column.dtype == torch.float32
        torch.testing.assert_close(column, expected)
    combined = panel.combine(result.columns, ["p", "p", "p"])
    assert combined.values.tolist() == [
        0.5,
        0.5,
        0.5,
    ]  # one prefers bright images, the other dark ones
    assert combined.agreement["pairwise"] == [[1.0, 0.0], [0.0, 1.0]]
    assert combined.agreement["kendalls_w"] == pytest.approx(0.0)


def test_entries_with_the_same_scorer_and_options_share_it():
    entries = [
        {"scorer": "panel-a"},
        {"name": "again", "scorer": "PANEL_A", "role": "eval"},
        {"name": "shifted", "scorer": "panel-a", "args": {"offset": 1.0}},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        panel = Panel(entries)
    result = panel.score([picture(0), picture(1)])
    assert events == ["load panel-a", "load panel-a", "score panel-a 2", "score panel-a 2"]
    torch.testing.assert_close(result.columns["panel-a"], result.columns["again"])
    torch.testing.assert_close(result.columns["shifted"], result.columns["panel-a"] + 1)


def test_exclusive_holds_one_scorer_at_a_time_and_loads_each_once_per_call():
    panel = Panel("panel-a,panel-b", placement="exclusive")
    assert events == []
    panel.score([picture(i) for i in range(40)])
    a = ["load panel-a", *["score panel-a 8"] * 5, "close panel-a"]
    assert events == [*a, *(event.replace("panel-a", "panel-b") for event in a)]
    events.clear()
    with panel.using("panel-b") as scorer:
        scorer([picture(0)])
        scorer([picture(1)])
    assert events == ["load panel-b", "score panel-b 1", "score panel-b 1", "close panel-b"]


def test_offload_keeps_scorers_on_the_cpu_between_calls():
    panel = Panel("panel-a", placement="offload")
    panel._slots[0].device = torch.device("cpu:0")  # not equal to "cpu": stands for a GPU
    panel.score([picture(0)])
    panel.score([picture(1)])
    once = ["move panel-a cpu:0", "score panel-a 1", "move panel-a cpu"]
    assert events == ["load panel-a", *once, *once]


def test_a_loaded_scorer_is_taken_as_it_is_and_not_closed():
    scorer = PanelA(offset=2.0)
    panel = Panel([scorer, RewardEntry("other", scorer=PanelB())], placement="exclusive")
    result = panel.score([picture(0)])
    assert result.columns["panel-a"].tolist() == pytest.approx([mean(picture(0)) + 2])
    panel.close()
    assert not [event for event in events if event.startswith("close")]
    with pytest.raises(ConfigError, match="is loaded"):
        RewardEntry("x", scorer=scorer, device="cpu")


def test_a_shared_cache_answers_the_second_panel(tmp_path):
    images = [picture(i) for i in range(3)]
    for expected in (0, 3):
        result = Panel.from_config(
            {"rewards": "panel-a", "cache": tmp_path / "scores.sqlite"}
        ).score(images)
        assert result.cached == {"panel-a": expected}


def test_shared_backbones_of_train_and_eval_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"panel-b \(eval\) and panel-a \(train\) both start from shared-net"
    ):
        Panel([{"scorer": "panel-a"}, {"scorer": "panel-b", "role": "eval"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Panel("panel-a,panel-b")
        Panel([{"scorer": "panel-a"}, {"scorer": "panel-low", "role": "eval"}])


def test_eval_scorers_are_reported_but_never_combined():
    panel = Panel([{"scorer": "panel-a"}, {"scorer": "panel-low", "role": "eval", "weight": 100}])
    columns = {"panel-a": [1.0, 2.0, 3.0], "panel-low": [1.0, 2.0, 3.0]}
    combined = panel.combine(columns, [0, 0, 0])
    assert combined.values.tolist() == [0.0, 0.5, 1.0]
    assert combined.agreement["names"] == ["panel-a", "panel-low"]
    assert combined.agreement["pairwise"][0][1] == 0.0
    assert panel.combine({"panel-a": columns["panel-a"]}, [0, 0, 0]).agreement["names"] == [
        "panel-a"
    ]
    with pytest.raises(UserError, match="nothing can be combined"):
        Panel([{"scorer": "panel-a", "role": "eval"}]).combine(columns, [0, 0, 0])


def test_weighted_sum_uses_declared_and_given_scales_and_mirrors_low_scorers():
    affine = {"kind": "affine", "mean": 10.0, "std": 2.0}
    panel = Panel(
        [
            {"scorer": "panel-a", "weight": 3},
            {"scorer": "panel-low"},
            {"scorer": "panel-b", "normalize": affine},
        ],
        "weighted_sum",
    )
    columns = {"panel-a": [120.0, 80.0], "panel-low": [120.0, 80.0], "panel-b": [12.0, 10.0]}
    # 3 (120 - 100) / 20 - (120 - 100) / 20 + (12 - 10) / 2
    assert panel.combine(columns, ["x", "y"]).values.tolist() == pytest.approx([3.0, -2.0])
    raw = Panel([{"scorer": "panel-b", "normalize": "none"}], "weighted_sum")
    assert raw.combine({"panel-b": [12.0, 10.0]}, [0, 1]).values.tolist() == [12.0, 10.0]


def test_ragged_groups_are_combined_each_for_itself_in_any_order():
    panel = Panel("panel-a,panel-b")
    groups = ["x", "y", "x", "z", "y", "y"]
    columns = {"panel-a": [1.0, 5.0, 2.0, 9.0, 7.0, 6.0], "panel-b": [2.0, 1.0, 1.0, 9.0, 3.0, 2.0]}
    combined = panel.combine(columns, groups)
    assert combined.values.tolist() == [0.5, 0.0, 0.5, 0.5, 1.0, 0.5]
    assert combined.agreement["kendalls_w_per_group"] == [
        pytest.approx(0.0),
        pytest.approx(1.0),
        None,
    ]
    assert combined.agreement["kendalls_w"] == pytest.approx(0.5)
    # of the pairs (x: 1, y: 3) the two scorers order three alike
    assert combined.agreement["pairwise"][0][1] == pytest.approx(3 / 4)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        alone = panel.combine(
            {name: [column[i] for i in members] for name, column in columns.items()},
            [group] * len(members),
        )
        assert alone.values.tolist() == [combined.values.tolist()[i] for i in members]


def test_centred_scorers_are_compared_within_each_prompt():
    entries = [{"name": n, "scorer": "panel-a", "normalize": "none"} for n in ("a", "b")]
    columns = {
        "a": torch.tensor([1.0, 0.0, 3.0, 5.0]),  # of the prompts p, q, p and q
        "b": torch.tensor([12.0, -5.0, 10.0, 1.0]),
    }
    groups = ["p", "q", "p", "q"]
    raw = Panel(entries, "min").combine(columns, groups)
    assert raw.values.tolist() == [1, -5, 3, 1]
    centred = Panel(entries, {"method": "min", "center": True}).combine(columns, groups)
    # Levels 2 and 11 in p, 2.5 and -2 in q.
    assert centred.values.tolist() == [5.5, -2.75, 5.5, 2.75]
    alone = Panel(entries, {"method": "min", "center": True}).combine(columns, [0, 1, 2, 3])
    assert alone.values.tolist() == raw.values.tolist()


def test_groups_are_stacked_by_size_within_bounds(monkeypatch):
    members = group_members([i % 5 for i in range(22)])
    assert [len(m) for m in members] == [5, 5, 4, 4, 4]
    monkeypatch.setattr("diffalign.rewards.agreement._CELLS", 50)
    found = [(numbers.tolist(), index.shape) for numbers, index in stacks(members, 1)]
    assert found == [([0, 1], (2, 5)), ([2, 3, 4], (3, 4))]


@pytest.mark.parametrize(
    ("policy", "expected"), [("renormalise", [0.0, 0.75]), ("drop", [None, 0.5])]
)
def test_missing_scores_follow_the_policy(policy, expected):
    panel = Panel("panel-a,panel-gap", {"missing": policy})
    result = panel.score([picture(0, level=20), picture(0, level=200)], on_error="nan")
    assert torch.isnan(result.columns["panel-gap"]).tolist() == [True, False]
    values = panel.combine(result.columns, [0, 0]).values.tolist()
    # the one image that both scored wins for panel-a and, alone, is one half for
    # panel-gap; under drop it is alone for both
    assert [None if v != v else v for v in values] == expected


def test_missing_scores_can_be_refused():
    panel = Panel("panel-a,panel-gap", {"missing": "fail"})
    with pytest.raises(UserError, match="1 of panel-gap"):
        panel.combine({"panel-a": [1.0, 2.0], "panel-gap": [float("nan"), 1.0]}, [0, 0])


def test_agreed_pairs_ask_for_margins():
    columns = {"panel-a": [1.0, 2.0, 9.0, 4.0], "panel-low": [5.0, 4.0, 1.0, 1.0]}
    groups = [0, 0, 1, 1]
    assert Panel("panel-a,panel-low").agreed_pairs(columns, groups) == [(1, 0)]
    assert (
        Panel("panel-a,panel-low", {"margins": {"panel-a": 1.5}}).agreed_pairs(columns, groups)
        == []
    )
    three = Panel("panel-a,panel-low,panel-b", {"min_agree": 2})
    assert three.agreed_pairs({**columns, "panel-b": [3.0, 3.0, 2.0, 1.0]}, groups) == [
        (1, 0),
        (2, 3),
    ]


def test_too_large_groups_are_refused_for_winrate_and_left_out_of_agreement(monkeypatch):
    for module in ("panel", "agreement"):
        monkeypatch.setattr(f"diffalign.rewards.{module}.LARGEST_COMPARED", 3)
    columns = {"panel-a": [1.0, 2.0, 3.0, 4.0]}
    with pytest.raises(UserError, match="has 4, more than 3; use zscore"):
        Panel("panel-a").combine(columns, [0] * 4)
    found = Panel("panel-a", "zscore").combine(columns, [0] * 4)
    assert found.agreement["left_out"] == 1 and found.values[3] > found.values[0]


def test_columns_that_do_not_fit_are_refused():
    panel = Panel("panel-a,panel-b")
    with pytest.raises(UserError, match="panel-b is missing"):
        panel.combine({"panel-a": [1.0]}, [0])
    with pytest.raises(UserError, match="panel-a has shape"):
        panel.combine({"panel-a": [1.0], "panel-b": [1.0, 2.0]}, [0, 0])
    with pytest.raises(UserError, match="groups: is empty"):
        panel.combine({"panel-a": [], "panel-b": []}, [])
    with pytest.raises(UserError, match="no such scorer"), panel.using("panel-x"):
        pass
    with pytest.raises(UserError, match="expected a list"):
        panel.score(picture(0))


def test_combine_config_reads_margins_by_name_and_in_order():
    assert CombineConfig(margins={"b": 2}).margins_of(["a", "b"]) == [0.0, 2.0]
    assert CombineConfig(margins=[1, "2.5"]).margins_of(["a", "b"]) == [1.0, 2.5]
    for wrong in ([1.0], [-1.0, 0.0], {"a": "x"}):
        with pytest.raises(ConfigError, match=r"combine\.margins"):
            CombineConfig(margins=wrong).margins_of(["a", "b"])


def test_the_gradient_of_one_scorer_needs_no_rule():
    import torch

    from diffalign.rewards.registry import load_scorer

    pixels, prompts = torch.rand(2, 3, 64, 64, requires_grad=True), ["a red circle", "a star"]
    expected = load_scorer("shapes-clip").score_tensor(pixels, prompts)
    panel = Panel.from_config({"rewards": ["shapes-clip"], "cache": None})
    assert torch.equal(panel.score_tensor(pixels, prompts), expected)
    both = Panel.from_config({"rewards": ["shapes-clip", "jpeg_compressibility"], "cache": None})
    with pytest.raises(ConfigError, match=r"jpeg_compressibility.* gives no gradient"):
        both.check_differentiable()
