"""What the report of a trained reward says is true of the scorer that the folder is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import config, report_of, rows
from tiny import picture

from diffalign import load_scorer
from diffalign.errors import ConfigError, UserError
from diffalign.reward_training import RewardConfig, RewardTrainer, add_user
from diffalign.reward_training.categories import pair_categories
from diffalign.reward_training.features import Features, embed
from diffalign.reward_training.judgements import read_judgements, split
from diffalign.reward_training.opinions import Opinions
from diffalign.reward_training.pair_loss import fit_temperature
from diffalign.reward_training.pair_tensors import Labels, make_items
from diffalign.reward_training.report import card, measure
from diffalign.rewards.learned.calibration import expected_calibration_error
from diffalign.rewards.users import ExamplePair, embed_users, load_user_embedder
from diffalign.shapes import render
from diffalign.shapes.prompts import Scene


def labels_of(values: torch.Tensor) -> Labels:
    count = len(values)
    return Labels(
        values.double(),
        torch.ones(count).double(),
        torch.full((count,), -1),
        torch.arange(count),
        torch.zeros(count).double(),
    )


@pytest.mark.parametrize("settings", [{}, {"margin": 3.0}, {"smoothing": 0.3}])
def test_the_temperature_is_that_of_the_labels(settings: dict[str, float]) -> None:
    """Whatever the reward was trained with, and however many ties there are."""
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(4000, generator=generator, dtype=torch.float64)
    won = torch.rand(4000, generator=generator, dtype=torch.float64) < margins.sigmoid()
    ties = torch.arange(4000) % 3 == 0
    values = torch.where(ties, 0.5, won.double())
    factor = fit_temperature(margins / 4, labels_of(values), RewardConfig(**settings))
    assert factor == pytest.approx(4, rel=0.1)
    scaled = (factor * margins / 4)[~ties]
    hits = (scaled > 0) == won[~ties]
    confidence = torch.sigmoid(scaled.abs())
    assert expected_calibration_error(confidence, hits.double(), 10) < 0.03


def measured(margins: torch.Tensor, labels: torch.Tensor, **options: Any) -> dict[str, Any]:
    """What the report says of pairs that have a prompt each."""
    count = len(margins)
    rest = torch.arange(count), torch.full((count,), -1), [], torch.zeros(count, 6).double()
    return measure(margins, margins, labels.double(), *rest, **options)


def test_the_calibration_is_that_of_the_labels_as_they_were_given() -> None:
    """Also where some of them are wrong, or several judges differ about a pair."""
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(6000, generator=generator, dtype=torch.float64)
    won = torch.rand(6000, 5, generator=generator) < margins.sigmoid()[:, None]
    flipped = won[:, 0] ^ (torch.rand(6000, generator=generator) < 0.2)
    error = "expected_calibration_error"
    assert measured(margins, flipped)[error] > 0.08
    assert measured(margins, flipped, flip_rate=0.2)[error] < 0.02
    assert measured(margins, won.double().mean(1))[error] < 0.02


def test_the_accuracy_of_a_person_lies_in_its_interval() -> None:
    """Both count prompts, of which one may have most of the pairs."""
    margins, labels = torch.ones(60).double(), torch.ones(60).double()
    labels[51:] = 0
    prompts = torch.tensor([0] * 51 + list(range(1, 10)))
    users, nothing = torch.zeros(60).long(), torch.zeros(60, 6).double()
    (row,) = measure(margins, margins, labels, prompts, users, ["ann"], nothing)["users"].values()
    assert row["low"] < row["accuracy"] < row["high"]
    assert [row["accuracy"], row["by_pairs"]] == pytest.approx([0.1, 0.85])


def test_the_card_of_a_reward_with_users_tells_the_mean_user(tmp_path: Path) -> None:
    data = [
        row
        for number in range(6)
        for row in rows(12, number % 2 == 0, f"user {number}", 12 * number)
    ]
    held_out = [row for number in range(2) for row in rows(12, number == 0, f"user {number}", 500)]
    args = config(tmp_path / "pal", head="pal", seed=1)
    folder = RewardTrainer("shapes-clip", args, data, held_out).train()
    report, facts = report_of(folder), json.loads((folder / "reward.json").read_text())
    judged = read_judgements(held_out)
    scorer = load_scorer(str(folder), device="cpu")
    images = [[judged.open(int(i)) for i in side] for side in (judged.first, judged.second)]
    prompts = [judged.prompts[int(i)] for i in judged.prompt]
    first, second = (scorer(side, prompts) for side in images)
    right = ((first > second) == (torch.from_numpy(judged.label) > 0.5)).double()
    assert report["mean_user"]["by_pairs"] == pytest.approx(float(right.mean()))
    assert report["reward"]["accuracy"] > report["mean_user"]["accuracy"] + 0.3
    text = (folder / "README.md").read_text()
    assert "| the mean user | 50.0%" in text and "The mean user is not better than" in text
    assert "WARNING" not in text
    nameless = [{k: v for k, v in row.items() if k != "user_id"} for row in held_out]
    args = config(tmp_path / "nameless", head="pal", pal_form="b", max_steps=1)
    text = (RewardTrainer("shapes-clip", args, data, nameless).train() / "README.md").read_text()
    assert "- WARNING: 24 of 24 judgements of the evaluation name no person" in text
    # Scores on the declared scale have mean 0 and deviation 1, roughly.
    mean, spread = facts["affine"]
    scores = (scorer([p for side in images for p in side], prompts * 2) - mean) / spread
    assert abs(float(scores.mean())) < 0.5


def test_users_of_a_reward_are_users_of_an_adapter(tmp_path: Path) -> None:
    """A user that is fitted to pairs has the weights that embed the same pairs."""
    data = [
        row for number in range(4) for row in rows(12, number % 2 == 0, f"u{number}", 12 * number)
    ]
    folder = RewardTrainer("shapes-clip", config(tmp_path / "pal", head="pal"), data).train()
    new = rows(4, likes_bright=False, first=900)
    embedder = load_user_embedder(f"reward:{folder}")
    pairs = [ExamplePair(row["prompt"], row["chosen"], row["rejected"]) for row in new]
    turned = [ExamplePair(row["prompt"], row["rejected"], row["chosen"]) for row in new]
    weights = embed_users(embedder, [pairs, turned])
    assert weights.shape == (2, 1, 2) and torch.allclose(weights.sum(-1), torch.ones(2, 1))
    add_user(folder, "zoe", new)
    reward: Any = load_scorer(str(folder), device="cpu", user="zoe")
    torch.testing.assert_close(reward.weights, weights[0, 0], atol=1e-3, rtol=0)
    assert (weights[0, 0] - weights[1, 0]).abs().max() > 0.2
    plain = RewardTrainer("shapes-clip", config(tmp_path / "r"), rows(40)).train()
    with pytest.raises(ConfigError, match="is a reward without users"):
        load_user_embedder(f"reward:{plain}")


def test_towers_that_only_get_worse_end_as_their_base(tmp_path: Path) -> None:
    base, data = load_scorer("shapes-clip", device="cpu"), []
    for row in rows(40):  # as the base judges them
        images = [row["chosen"], row["rejected"]]
        first, second = base(images, [row["prompt"]] * 2).tolist()
        data.append(
            row
            | dict(zip(("chosen", "rejected"), images[:: 1 if first > second else -1], strict=True))
        )
    # What is learned on the training prompts is wrong on the others.
    train = split(read_judgements(data), 0.2, 0.25, 0)["train"]
    taught = {train.prompts[int(number)] for number in train.prompt}
    for row in data:
        if row["prompt"] in taught:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "learning_rate": 1e-2}
    args = config(tmp_path / "bad", towers="full", per_device_train_batch_size=8, **settings)
    RewardTrainer("shapes-clip", args, data).train()
    report = report_of(tmp_path / "bad")
    facts = json.loads((tmp_path / "bad" / "reward.json").read_text())
    assert facts["chosen"]["step"] == 0
    assert report["reward"]["accuracy"] == report["base"]["accuracy"] == 1
    assert "not better than its base" in (tmp_path / "bad" / "README.md").read_text()


def test_accuracy_by_category_and_blind_spots(tmp_path: Path) -> None:
    data = [row | {"category": "odd" if i % 2 else "even"} for i, row in enumerate(rows(80))]
    folder = RewardTrainer("shapes-clip", config(tmp_path / "r"), data).train()
    report = report_of(folder)
    assert set(report["categories"]) == {"odd", "even"} and report["blind_spots"] == []
    assert "## Categories" in (folder / "README.md").read_text()
    # A reward that is wrong about one of two categories.
    count = 40
    margins, labels = torch.ones(count).double(), torch.ones(count).double()
    margins[::2] = -1
    names = ["bad", "good"] * (count // 2)
    found = measure(
        margins, margins, labels, torch.arange(count), torch.full((count,), -1), [],
        torch.zeros(count, 6).double(), names,
    )  # fmt: skip
    assert found["blind_spots"] == ["bad"]
    facts = json.loads((folder / "reward.json").read_text())
    assert "Blind spots, whose interval lies below the accuracy above: bad." in card(facts, found)


def test_pairs_of_the_embedded_world_differ_in_an_attribute() -> None:
    scene = Scene("large", "blue", "star", "center", "white")
    wrong = {
        "color": dataclasses.replace(scene, color="red"),
        "shape": dataclasses.replace(scene, shape="circle"),
        "several": dataclasses.replace(scene, color="red", shape="circle"),
    }
    prompt = scene.prompt
    data = [
        {"prompt": prompt, "chosen": render(scene), "rejected": render(other)}
        for other in wrong.values()
    ]
    data.append({"prompt": prompt, "chosen": render(scene, style="lit"), "rejected": render(scene)})
    categories = pair_categories(read_judgements(data))
    assert categories == [*wrong, "style"]
    assert pair_categories(read_judgements(rows(3))) == ["", "", ""]


def test_a_base_without_embeddings_of_prompts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("aesthetic-v2", "hpsv3"):
        for head in ("bradley_terry", "pal"):
            with pytest.raises(ConfigError, match=f"{name} has no embeddings that a {head} head"):
                RewardTrainer(name, config(tmp_path / "r", head=head), rows(40, user="ann"))


def test_a_broken_embedding_is_not_kept(tmp_path: Path) -> None:
    scorer: Any = load_scorer("shapes-clip", device="cpu")
    judged, embedding = read_judgements(rows(12)), scorer.embed
    scorer.embed = lambda images: embedding(images) * torch.nan
    with pytest.raises(UserError, match="is not finite"):
        embed(scorer, judged, tmp_path)
    scorer.embed = embedding
    assert bool(embed(scorer, judged, tmp_path).image.isfinite().all())


def test_another_tokenizer_is_another_base(tmp_path: Path) -> None:
    folder = RewardTrainer("shapes-clip", config(tmp_path / "r"), rows(40)).train()
    scorer: Any = load_scorer("shapes-clip", device="cpu")
    before = scorer.fingerprint()
    scorer([picture(9, 9, 64)], ["a red star"])  # a call sets truncation and padding
    scorer._fingerprint = None
    backend = json.loads(scorer.clip.tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    words = [word for word in vocabulary if word.startswith(("red", "blue"))][:2]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    other: Any = load_scorer("shapes-clip", device="cpu")
    tokenizer = type(scorer.clip.tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    other.clip.tokenizer._tokenizer = tokenizer
    assert other.fingerprint() != before == scorer.fingerprint()
    # Folders of the time before name the weights alone.
    from diffalign.rewards.scorers.trained import _earlier_fingerprint

    facts = json.loads((folder / "reward.json").read_text())
    facts["base"]["fingerprint"] = _earlier_fingerprint(scorer)
    (folder / "reward.json").write_text(json.dumps(facts))
    load_scorer(str(folder), device="cpu")


def test_pairs_with_two_prompts_and_weights_of_likes() -> None:
    images = [picture(v, v, 64) for v in (200, 40)]
    row = {"prompt": "a", "chosen": images[0], "rejected": images[1]}
    with pytest.raises(UserError, match="row 0 has a prompt for each of its images"):
        read_judgements([row | {"chosen_prompt": "a cat", "rejected_prompt": "a dog"}])
    liked = [
        {"prompt": "a", "image": images[0], "label": True, "weight": 5.0},
        {"prompt": "a", "image": images[1], "label": False, "weight": 0.5},
    ]
    assert read_judgements(liked).weight.tolist() == [2.5]


def test_a_new_user_has_the_columns_of_the_reward(tmp_path: Path) -> None:
    renamed = [
        {"text": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "user_id": user}
        for number, user in enumerate(("ann", "bob"))
        for row in rows(20, number == 0, None, 100 * number)
    ]
    columns = {"prompt": "text", "chosen": "good", "rejected": "bad"}
    args = config(tmp_path / "pal", head="pal", pal_form="b", max_steps=20)
    folder = RewardTrainer("shapes-clip", args, renamed, columns=columns).train()
    new = [{key: row[key] for key in ("text", "good", "bad")} for row in renamed[:4]]
    add_user(folder, "zoe", new)
    plain = rows(4, first=700)
    add_user(folder, "eve", plain, columns={"prompt": "prompt", "chosen": "chosen"})
    mixed = [*new[:2], *(row | {"user_id": "carl"} for row in new[2:])]
    with pytest.raises(UserError, match="are of 2 people, and none of them is 'dan'"):
        add_user(folder, "dan", mixed)
    users = json.loads((folder / "reward.json").read_text())["head"]["users"]
    assert users == ["ann", "bob", "zoe", "eve"]
    assert np.isfinite(load_scorer(str(folder), user="zoe")([renamed[0]["good"]], ["a"])).all()


def test_every_user_of_a_reward_has_a_scale_and_the_folder_keeps_its_files(tmp_path: Path) -> None:
    from diffalign.rewards.panel import Panel

    data = [
        row for number in range(4) for row in rows(12, number % 2 == 0, f"u{number}", 12 * number)
    ]
    folder = RewardTrainer("shapes-clip", config(tmp_path / "pal", head="pal"), data).train()
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    add_user(folder, "zoe", rows(4, likes_bright=False, first=900))
    assert (folder / "mine" / "notes.txt").read_text() == "mine"
    judged = read_judgements(data)
    images = [judged.open(int(i)) for side in (judged.first, judged.second) for i in side]
    prompts = [judged.prompts[int(i)] for i in judged.prompt] * 2
    for user in (None, "u0", "u1", "zoe", "worst"):
        scorer: Any = load_scorer(str(folder), device="cpu", user=user)
        mean, spread = scorer.spec.affine
        scores = (scorer(images, prompts) - mean) / spread
        margins = scores[: len(judged.first)] - scores[len(judged.first) :]
        assert abs(float(scores.mean())) < 1.0, user
        assert 0.5 < float((margins.square().mean() / 2).sqrt()) < 2.0, user
    mixture: Any = load_scorer(str(folder), device="cpu", user={"u0": 1.0, "u1": 1.0})
    assert mixture.spec.affine is None
    entries = [
        {"name": name, "scorer": str(folder), "args": {"user": user}}
        for name, user in (("one", "u0"), ("both", {"u0": 1, "u1": 1}))
    ]
    panel = Panel.from_config({"rewards": entries[:1], "combine": {"method": "weighted_sum"}})
    assert panel.train_names
    with pytest.raises(UserError, match="both declares none; give each a normalize"):
        Panel.from_config({"rewards": entries, "combine": {"method": "weighted_sum"}})


def test_numbers_of_users_are_spelled_alike_and_strangers_are_named(tmp_path: Path) -> None:
    data = [
        row | {"user_id": float(1 + number)}
        for number in range(3)
        for row in rows(12, number % 2 == 0, None, 12 * number)
    ]
    held_out = [
        row | {"user_id": 1 + number} for number in range(2) for row in rows(8, True, None, 500)
    ]
    trainer = RewardTrainer("shapes-clip", config(tmp_path / "a", head="pal"), data, held_out)
    assert trainer.judgements.users == ["1", "2", "3"]
    folder = trainer.train()
    assert set(report_of(folder)["users"]) == {"1", "2"}
    load_scorer(str(folder), device="cpu", user=2)
    strange = [row | {"user_id": "eve" if i < 8 else "2"} for i, row in enumerate(held_out)]
    trainer = RewardTrainer("shapes-clip", config(tmp_path / "b", head="pal"), data, strange)
    assert "8 judgements of the evaluation are of people who did not train (eve)" in str(
        trainer.judgements.notes
    )
    with pytest.raises(ConfigError, match=r"none of its people \(eve\) is in the training data"):
        RewardTrainer("shapes-clip", config(tmp_path / "c", head="pal"), data, strange[:8])


def test_rows_of_weight_0_do_not_count(tmp_path: Path) -> None:
    data = [row | {"weight": float(number % 3 > 0)} for number, row in enumerate(rows(30))]
    assert len(read_judgements(data)) == 20
    ties = [
        {
            "prompt": row["prompt"],
            "jpg_0": row["chosen"],
            "jpg_1": row["rejected"],
            "label_0": 0.5,
        }
        for row in rows(4)
    ]
    judged = read_judgements([*ties, ties[0] | {"label_0": 1.0, "prompt": "p"}])
    assert judged.label.tolist().count(0.5) == 4
    lists = [
        {
            "prompt": f"p {number}",
            "images": [row["chosen"], row["rejected"]],
            "scores": [1.0, float(number == 3)],
            "weight": float(number > 1),
        }
        for number, row in enumerate(rows(4))
    ]
    judged = read_judgements(lists)
    assert len(judged) == 1 and judged.opinions.weight.tolist() == [1.0] * 4


def test_rows_that_are_left_out_are_told() -> None:
    data = [
        {"prompt": r["prompt"], "jpg_0": r["chosen"], "jpg_1": r["rejected"], "label_0": label}
        for r, label in zip(rows(22), [None, *[1.0] * 21], strict=True)
    ]
    data[-1]["prompt"] = None
    one, other = read_judgements(data).notes
    assert one.startswith("WARNING: 1 broken rows left out (row 21: ")
    assert other == "WARNING: 1 rows without a label left out"


def test_every_prompt_has_one_weight_whatever_its_opinions_weigh() -> None:
    opinions = Opinions(
        *(np.array(column) for column in ([0, 1, 2], [0, 0, 1], [-1] * 3, [1.0, 0.0, 1.0])),
        source=np.arange(3), weight=np.array([6.0, 2.0, 5.0]),
    )  # fmt: skip
    features = Features(torch.ones(3, 2), torch.ones(2, 2), torch.zeros(3, 6))
    items = make_items(opinions, features, lambda image, text: image[:, 0], True)
    assert items.weight.tolist() == [0.75, 0.25, 1.0]


def test_settings_without_an_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps: has no effect on a linear head"):
        RewardConfig(max_steps=5)
    with pytest.raises(ConfigError, match="learning_rate: has no effect on a linear head"):
        RewardConfig(learning_rate=5.0)
    assert RewardConfig(max_steps=5, hidden=8).max_steps == 5
    with pytest.raises(ConfigError, match="like_threshold: dataset .* has no ratings"):
        RewardTrainer("shapes-clip", config(tmp_path / "x"), rows(40), like_threshold=3)
