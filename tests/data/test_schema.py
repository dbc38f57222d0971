import math

import pytest

from diffalign.data.judgements import classify_row
from diffalign.data.schema import LAYOUTS, recognise
from diffalign.errors import ConfigError, UserError

PICKAPIC = [
    "caption",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "has_label",
    "are_different",
    "best_image_uid",
    "model_0",
]


@pytest.mark.parametrize(
    ("columns", "name", "kind"),
    [
        (PICKAPIC, "pickapic", "pair"),
        (["caption", "jpg_0", "jpg_1", "label_0"], "pickapic", "pair"),
        (["id", "prompt", "chosen", "rejected"], "trl", "pair"),
        (
            ["prompt", "chosen", "rejected", "chosen_prompt", "rejected_prompt", "weight"],
            "canonical_two_prompts",
            "pair",
        ),
        (["prompt", "image_path", "human_preference"], "hpdv2", "ranked"),
        (["prompt", "file_path", "rank"], "hpdv2", "ranked"),
        (["caption_0", "caption_1", "jpg_0", "jpg_1", "label_0"], "dcpo", "pair"),
        (["prompt", "images", "scores"], "ranked", "ranked"),
        (["image", "text"], "single", "single"),
        (["prompt", "seed"], "prompt", "prompt"),
        # several fit: the more specific one is taken
        (["caption", "caption_0", "caption_1", "jpg_0", "jpg_1", "label_0"], "dcpo", "pair"),
        (["prompt", "chosen", "rejected", "images", "scores", "image"], "trl", "pair"),
    ],
)
def test_layouts(columns, name, kind):
    layout = recognise(columns, {})
    assert (layout.name, layout.kind) == (name, kind)
    assert set(layout.mapping.values()) <= set(columns)
    assert name in LAYOUTS


def test_mapping_renames_and_wins_over_names():
    layout = recognise(
        ["prompt", "text", "good", "bad"], {"prompt": "text", "chosen": "good", "rejected": "bad"}
    )
    assert layout.mapping == {"prompt": "text", "chosen": "good", "rejected": "bad"}
    layout = recognise(
        ["t", "a", "b", "l"], {"caption": "t", "jpg_0": "a", "jpg_1": "b", "label_0": "l"}
    )
    assert layout.name == "pickapic"
    ranked = recognise(["t", "files", "place"], {"prompt": "t", "images": "files", "rank": "place"})
    assert classify_row(ranked, {"prompt": "p", "rank": [1, 2]}).scores == (-1, -2)


def test_unknown_columns_show_the_mapping_to_write():
    with pytest.raises(UserError) as error:
        recognise(["q", "good", "bad"], {})
    assert "the columns q, good, bad" in str(error.value)
    assert "data.columns: {prompt: ..., chosen: ..., rejected: ...}" in str(error.value)


def test_images_beside_a_prompt_are_not_thrown_away_silently():
    with pytest.raises(UserError, match="fit no known layout"):
        recognise(["prompt", "completion", "label"], {})
    with pytest.raises(UserError, match="fit no known layout"):
        recognise(["prompt", "image_a", "image_b"], {})
    assert recognise(["prompt", "image_a"], {"prompt": "prompt"}).kind == "prompt"


def test_a_wrong_mapping_is_named():
    with pytest.raises(
        ConfigError, match="'chosn' is not a canonical column, did you mean 'chosen'"
    ):
        recognise(["a"], {"chosn": "a"})
    with pytest.raises(ConfigError, match="has no column 'z'; it has a, b"):
        recognise(["a", "b"], {"prompt": "z"})


def _label(**cells):
    layout = recognise(["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"], {})
    return classify_row(
        layout, {"prompt": "p", "label_0": None, "label_1": None, "has_label": None} | cells
    )


def test_labels_decide_the_order():
    assert _label(label_0=1, label_1=0).image_roles == ("jpg_0", "jpg_1")
    swapped = _label(label_0=0.0, label_1=1.0)
    assert (swapped.image_roles, swapped.second_wins) == (("jpg_1", "jpg_0"), True)
    assert _label(label_0=0).image_roles == ("jpg_1", "jpg_0")


@pytest.mark.parametrize(
    "cells", [{"label_0": 0.5}, {"label_0": 0.5, "label_1": 0.5}, {"label_0": 1, "label_1": 1}]
)
def test_a_tie_is_never_a_loser(cells):
    verdict = _label(**cells)
    assert (verdict.status, verdict.weight, verdict.image_roles) == ("tie", 0.0, ("jpg_0", "jpg_1"))


def test_unlabelled_and_broken_rows():
    assert _label(label_0=1, has_label=False).status == "unlabelled"
    assert _label().status == "unlabelled"
    assert "label_0 is 2" in _label(label_0=2).reason
    assert _label(label_0=math.nan).status == "unlabelled"  # how tables write that nobody judged
    assert _label(label_0=1, prompt=None).reason == "prompt is None, expected text"
    assert _label(label_0=1, prompt=7).status == "broken"


def test_two_captions_swap_with_their_images():
    layout = recognise(["caption_0", "caption_1", "jpg_0", "jpg_1", "label_0"], {})
    verdict = classify_row(layout, {"caption_0": "zero", "caption_1": "one", "label_0": 0})
    assert (verdict.prompts, verdict.image_roles) == (("one", "zero"), ("jpg_1", "jpg_0"))


def test_scores_and_ranks():
    layout = recognise(["prompt", "file_path", "rank"], {})
    verdict = classify_row(layout, {"prompt": "p", "rank": [3, 1, 2]})
    assert verdict.scores == (-3, -1, -2)  # the best rank has the highest score
    layout = recognise(["prompt", "image_path", "human_preference"], {})
    assert classify_row(layout, {"prompt": "p", "human_preference": [0, 1]}).scores == (0, 1)
    layout = recognise(["prompt", "images", "scores"], {})
    assert classify_row(layout, {"prompt": "p", "scores": [2.0, 2.0]}).status == "tie"
    assert (
        classify_row(layout, {"prompt": "p", "scores": [2.0]}).reason
        == "has 1 scores, expected at least 2"
    )
    assert (
        "not a finite number"
        in classify_row(layout, {"prompt": "p", "scores": [1.0, math.nan]}).reason
    )
    assert classify_row(layout, {"prompt": "p", "scores": None}).status == "unlabelled"


def test_weights():
    layout = recognise(["prompt", "chosen", "rejected", "weight"], {})
    assert classify_row(layout, {"prompt": "p", "weight": 0.25}).weight == 0.25
    assert classify_row(layout, {"prompt": "p", "weight": None}).weight == 1.0
    assert "weight is -1" in classify_row(layout, {"prompt": "p", "weight": -1}).reason
