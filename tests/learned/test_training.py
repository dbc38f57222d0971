"""Rewards trained on judgements: better than their base, exact at the start, the same
again, differentiable, with users, and one sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import config, report_of, rows
from PIL import Image
from safetensors.torch import load_file
from tiny import picture

from diffalign import load_scorer
from diffalign.cli.entry import run
from diffalign.errors import ConfigError, UserError
from diffalign.reward_training import RewardConfig, RewardTrainer, add_user
from diffalign.reward_training.fit_head import PENALTIES
from diffalign.reward_training.fit_pal import taste_logits
from diffalign.reward_training.judgements import agreement_note, read_judgements, split
from diffalign.reward_training.pair_tensors import Pairs
from diffalign.rewards.learned.heads import RewardHead


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "bright"
    cache = str(folder.parent / "cache")
    trainer = RewardTrainer("shapes-clip", config(folder, members=3, cache=cache), rows(40))
    return trainer.train()


def test_a_trained_reward_is_a_scorer(trained: Path) -> None:
    scorer = load_scorer(str(trained), device="cpu")
    images = [picture(210, 1, 64), picture(50, 2, 64)]
    prompt = ["a small red circle"] * 2
    bright, dark = scorer(images, prompt).tolist()
    assert bright > dark
    facts = json.loads((trained / "reward.json").read_text())
    report = json.loads((trained / "report.json").read_text())
    assert scorer.spec.key == "trained:bright" and scorer.spec.backbone == "shapes-clip"
    assert report["reward"]["accuracy"] == 1.0 > report["base"]["accuracy"]
    assert facts["data"]["pairs"] == 40 and facts["chosen"]["l2"] in PENALTIES
    text = (trained / "README.md").read_text()
    assert "brightness" in text and (trained / "calibration.png").is_file()
    low = load_scorer(str(trained), device="cpu", combine="min")(images, prompt)
    assert (low <= scorer(images, prompt) + 1e-6).all()
    cautious = load_scorer(str(trained), device="cpu", combine="mean_minus_std")(images, prompt)
    assert (cautious <= scorer(images, prompt) + 1e-6).all()


def test_gradients_reach_the_pixels(trained: Path) -> None:
    scorer = load_scorer(str(trained), device="cpu")
    array = np.asarray(picture(120, 3, 64), dtype=np.float32) / 255
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].requires_grad_()
    value = scorer.score_tensor(pixels, ["a small red circle"])
    value.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
    plain = scorer([picture(120, 3, 64)], ["a small red circle"])
    assert float(value.detach()) == pytest.approx(float(plain), abs=2e-3)


def test_a_new_head_is_its_base() -> None:
    head = RewardHead(5, members=2)
    base, image, text = torch.randn(3), torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(head(base, image, text), base[:, None].expand(-1, 2))


def test_training_again_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    """With embeddings from the cache, and without a cache."""
    for name, cache in (("cached", str(trained.parent / "cache")), ("fresh", None)):
        args = config(tmp_path / name, members=3, cache=cache)
        RewardTrainer("shapes-clip", args, rows(40)).train()
        one, other = (load_file(f / "head.safetensors") for f in (trained, tmp_path / name))
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_hidden_layers_and_noisy_labels(tmp_path: Path) -> None:
    data = rows(40)
    for row in data[::8]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    args = config(tmp_path / "mlp", hidden=16, flip_rate=0.125, max_steps=80, learning_rate=1e-2)
    report = json.loads(
        (RewardTrainer("shapes-clip", args, data).train() / "report.json").read_text()
    )
    assert report["reward"]["accuracy"] >= report["base"]["accuracy"]


def test_members_have_no_arbitrary_level(tmp_path: Path) -> None:
    """Losses of pairs see differences alone, so a member's level means nothing."""
    args = config(tmp_path / "mlp", hidden=16, members=3, max_steps=60, learning_rate=1e-2)
    data = rows(40)
    trainer = RewardTrainer("shapes-clip", args, data)
    part = trainer.parts["train"]
    folder = trainer.train()
    scorer = load_scorer(str(folder), device="cpu")
    places = [(int(i), int(p)) for i, p in zip(part.first, part.prompt, strict=True)]
    places += [(int(i), int(p)) for i, p in zip(part.second, part.prompt, strict=True)]
    images = [trainer.judgements.open(i) for i, _ in places]
    prompts = [trainer.judgements.prompts[p] for _, p in places]
    levels = scorer.member_scores(images, prompts).mean(0)  # type: ignore[attr-defined]
    assert float((levels - levels.mean()).abs().max()) < 0.1 * float(levels.abs().max() + 1)


def test_a_penalty_takes_a_nuisance_away(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 30.0):
        args = config(tmp_path / str(weight), nuisance=weight, l2=1e-2)
        folder = RewardTrainer("shapes-clip", args, rows(40)).train()
        report = json.loads((folder / "report.json").read_text())
        found[weight] = report["nuisances"]["reward"]["brightness"]
    assert found[0.0] > 0.9 and abs(found[30.0]) < 0.5 * found[0.0]


def people(users: int, votes: int, first: int = 0) -> list[Any]:
    """Users of two opposite tastes, in turns."""
    data = []
    for number in range(users):
        data += rows(votes, number % 2 == 0, f"user {number}", first + number * votes)
    return data


@pytest.mark.parametrize("form", ["linear", "a", "b"])
def test_users_of_two_tastes(form: str, tmp_path: Path) -> None:
    data = people(6, 12)
    shared = RewardTrainer("shapes-clip", config(tmp_path / "shared", split_seed=1), data).train()
    args = config(tmp_path / "pal", head="pal", pal_form=form, seed=1, split_seed=1)
    pal = RewardTrainer("shapes-clip", args, data).train()
    found = [report_of(folder)["reward"]["accuracy"] for folder in (shared, pal)]
    assert found[1] > found[0] + 0.1 and found[1] > 0.9

    bright, dark = picture(205, 1, 64), picture(55, 2, 64)
    prompts = ["a small red circle number 1"] * 2

    def prefers_bright(user: Any) -> bool:
        first, second = load_scorer(str(pal), device="cpu", user=user)([bright, dark], prompts)
        return bool(first > second)

    assert prefers_bright("user 0") and not prefers_bright("user 1")
    assert prefers_bright({"user 0": 3.0, "user 1": 1.0})
    add_user(pal, "zoe", rows(4, likes_bright=False, first=900))
    assert not prefers_bright("zoe") and prefers_bright("user 0")
    worst = load_scorer(str(pal), device="cpu", user="worst")([bright, dark], prompts)
    each = [
        load_scorer(str(pal), device="cpu", user=f"user {i}")([bright, dark], prompts)
        for i in range(6)
    ]
    assert (worst <= torch.stack(each).min(0).values + 1e-4).all()
    for weight in (float("nan"), float("inf"), "2"):
        with pytest.raises(ConfigError, match="user: expected a number for 'user 0', got"):
            load_scorer(str(pal), device="cpu", user={"user 0": weight})
    with pytest.raises(ConfigError, match="user: expected a name or weights of names"):
        load_scorer(str(pal), device="cpu", user=["user 0"])
    with pytest.raises(ConfigError, match="'bob' is unknown"):
        load_scorer(str(pal), device="cpu", user="bob")
    with pytest.raises(UserError, match="has a user 'zoe' already"):
        add_user(pal, "zoe", rows(2))


def test_users_are_grouped_by_what_they_prefer() -> None:
    """Also where images differ most in a direction that nobody cares for."""
    generator = torch.Generator().manual_seed(0)
    users, votes, dim = 12, 40, 8
    user = torch.arange(users).repeat_interleave(votes)
    sign = torch.where(user % 2 == 0, 1.0, -1.0).double()
    difference = torch.randn(len(user), dim, generator=generator, dtype=torch.float64)
    difference[:, 0] *= 10
    lead = sign * difference[:, 1] + difference[:, 2]
    label = (lead > 0).double()
    nothing = torch.zeros(len(user), dim, dtype=torch.float64)
    pairs = Pairs(
        label=label, weight=torch.ones_like(label), user=user, prompt=user,
        margin=torch.zeros_like(label), first=difference, second=nothing, text=nothing,
        base=nothing, nuisances=nothing,
    )  # fmt: skip
    logits = taste_logits(pairs, users, 2)
    groups = logits.argmax(1)
    assert set(groups[0::2].tolist()) != set(groups[1::2].tolist()) and len(groups.unique()) == 2
    assert len(groups[0::2].unique()) == len(groups[1::2].unique()) == 1
    assert torch.equal(logits[:, 0], -logits[:, 1])
    assert taste_logits(pairs, users, 3).shape == (users, 3)
    assert taste_logits(pairs, users, 1).isfinite().all()
    pairs.user.zero_()
    assert taste_logits(pairs, 1, 2).tolist() == [[0.0, 0.0]]


def test_prompts_and_images_stay_on_one_side() -> None:
    data = rows(30)
    data[1]["prompt"] = data[0]["prompt"].upper() + "  "
    data[5]["chosen"] = data[6]["chosen"]
    judgements = read_judgements(data)
    parts = split(judgements, 0.2, 0.2, seed=3)
    sides = {name: set(part.prompt.tolist()) for name, part in parts.items()}
    assert sum(map(len, sides.values())) == 30
    for pair in ((0, 1), (5, 6)):
        assert any(set(pair) <= side for side in sides.values())


def test_votes_of_the_demo(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(30):
        for name, value in (("b", 200), ("d", 50)):
            picture(value, i, 64).save(tmp_path / "images" / f"{name}{i}.png")
        left, right = ("b", "d") if i % 2 else ("d", "b")
        vote = "tie" if i == 0 else ("left" if left == "b" else "right")
        lines.append(
            {
                "prompt": f"prompt {i}",
                "vote": vote,
                "annotator": "ann",
                "left_image": f"images/{left}{i}.png",
                "right_image": f"images/{right}{i}.png",
            }
        )
    lines += [lines[1] | {"vote": "right"}]  # she changed her mind
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judgements = read_judgements(str(tmp_path))
    assert len(judgements) == 30 and judgements.users == ["ann"]
    assert sorted(set(judgements.label.tolist())) == [0.0, 0.5, 1.0]
    assert (judgements.label == 0.5).sum() == 2
    lines[3]["left_image"] = "../secret.png"
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="is not in the folder"):
        read_judgements(str(tmp_path))


def test_votes_that_differ_are_told() -> None:
    def votes(pairs: int, differing: int) -> dict[Any, list[float]]:
        return {
            ("a cat", 2 * i, 2 * i + 1, user): [1.0 if user == "ann" or i >= differing else 0.0]
            for i in range(pairs)
            for user in ("ann", "bob")
        }

    assert agreement_note(votes(10, 2)) is None
    note = agreement_note(votes(25, 8)) or ""
    assert "25 pairs were judged more than once, and 32% of the votes on them differ" in note
    assert "20% wrong labels" in note  # 2 * 0.2 * 0.8 = 0.32
    assert "no better than chance" in (agreement_note(votes(24, 14)) or "")
    assert "0% of the votes" in (agreement_note(votes(30, 0)) or "")
    tied = {key: [0.5] for key in votes(30, 0)}
    assert agreement_note(tied) is None
    thrice = {("a cat", 2 * i, 2 * i + 1, "ann"): [1.0, 1.0, 0.0] for i in range(20)}
    assert "67% of the votes" in (agreement_note(thrice) or "")


def test_lists_and_likes() -> None:
    images = [picture(v, i, 64) for i, v in enumerate((200, 120, 120, 40))]
    ranked = [{"prompt": "a", "images": images, "rank": [1, 2, 2, 3]}]
    assert len(read_judgements(ranked)) == 5
    liked = [
        {"prompt": "a", "image": images[0], "label": True},
        {"prompt": "a", "image": images[3], "label": False},
        {"prompt": "b", "image": images[1], "label": True},
    ]
    judgements = read_judgements(liked)
    assert len(judgements) == 1 and judgements.label.tolist() == [1.0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: rows(6), "6 prompts with images of their own are too few"),
        (
            lambda: [{"prompt": "a", "image": picture(9, i, 64), "label": True} for i in range(12)],
            "no prompt has a liked and a disliked image",
        ),
        (lambda: [{"prompt": "a", "image": picture(9, 1, 64)}], "hold no judgements"),
        (None, "no judgements"),
    ],
)
def test_data_that_cannot_be_learned_from(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RewardTrainer("shapes-clip", config(tmp_path / "r"), None if data is None else data())
    assert not (tmp_path / "r").exists()


def test_all_ties() -> None:
    images = [picture(100, i, 64) for i in range(2)]
    tie = {"prompt": "a", "image1": images[0], "image2": images[1]}
    with pytest.raises(UserError, match="all 12 pairs are ties|are ties"):
        read_judgements(
            [tie | {"prompt": f"{i}", "votes_image1": 1, "votes_image2": 1} for i in range(12)]
        )


def test_mistakes_of_the_settings(trained: Path, tmp_path: Path) -> None:
    inside = config(tmp_path / "x", cache=str(tmp_path / "x" / "cache"))
    with pytest.raises(ConfigError, match=r"train.cache: .* lies in train.output_dir"):
        RewardTrainer("shapes-clip", inside, rows(40))
    with pytest.raises(UserError, match="is not empty"):
        RewardTrainer("shapes-clip", config(trained), rows(40))
    with pytest.raises(ConfigError, match="has no embeddings that a bradley_terry head can read"):
        RewardTrainer("jpeg_compressibility", config(tmp_path / "a"), rows(40))
    with pytest.raises(UserError, match="pal needs a column user_id"):
        RewardTrainer("shapes-clip", config(tmp_path / "b", head="pal"), rows(40))
    lonely = people(2, 12) + rows(1, True, "eve", 800)
    with pytest.raises(
        UserError, match="fewer than two decided judgements on the training prompts, such as 'eve'"
    ):
        RewardTrainer("shapes-clip", config(tmp_path / "c", head="pal"), lonely)
    with pytest.raises(UserError, match="are also trained on"):
        RewardTrainer("shapes-clip", config(tmp_path / "d"), rows(40), rows(2))
    with pytest.raises(ConfigError, match="either flip_rate or smoothing"):
        RewardConfig(flip_rate=0.1, smoothing=0.1)
    with pytest.raises(ConfigError, match="flip_rate"):
        RewardConfig(flip_rate=0.6)
    with pytest.raises(ConfigError, match="without users"):
        load_scorer(str(trained), user="ann")
    with pytest.raises(UserError, match="without users"):
        add_user(trained, "ann", rows(3))


def test_a_damaged_folder(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    facts = json.loads((copy / "reward.json").read_text())
    (copy / "reward.json").write_text(
        json.dumps(facts | {"base": facts["base"] | {"fingerprint": "x"}})
    )
    with pytest.raises(ConfigError, match="with other weights"):
        load_scorer(str(copy))
    (copy / "reward.json").write_text(json.dumps(facts))
    (copy / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"head\.safetensors"):
        load_scorer(str(copy))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    datasets.Dataset.from_list(rows(40)).to_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "run.yaml").write_text("model: shapes-clip\ntrain: {val: 0.2, test: 0.25}\n")
    command = ["reward", "train", "--config", str(tmp_path / "run.yaml"), "--data"]
    command += [str(tmp_path / "pairs.parquet"), "--train.output_dir", str(tmp_path / "reward")]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "that were not trained on" in printed and "--scorers" in printed
    images = tmp_path / "images"
    images.mkdir()
    picture(200, 1, 64).save(images / "a.png")
    Image.new("RGB", (64, 64)).save(images / "b.png")
    score = ["score", "--images", str(images), "--prompt", "a cat", "--output_dir"]
    assert run([*score, str(tmp_path / "scores"), "--scorers", str(tmp_path / "reward")]) == 0
    assert run([*command, "--train.membres", "2"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_subsample_sees_a_share_of_the_training_prompts(tmp_path: Path) -> None:
    """Other prompts for another seed, and the same ones for validation and test."""
    data = rows(40)
    whole = RewardTrainer("shapes-clip", config(tmp_path / "whole"), data)
    halves = [
        RewardTrainer(
            "shapes-clip", config(tmp_path / f"half {seed}", subsample=0.5, seed=seed), data
        )
        for seed in (0, 1)
    ]
    seen = [set(half.parts["train"].prompt.tolist()) for half in halves]
    everything = set(whole.parts["train"].prompt.tolist())
    assert len(seen[0]) == len(seen[1]) == round(0.5 * len(everything))
    assert seen[0] < everything and seen[1] < everything and seen[0] != seen[1]
    for half in halves:
        for name in ("val", "test"):
            assert half.parts[name].fingerprint() == whole.parts[name].fingerprint()
    again = RewardTrainer("shapes-clip", config(tmp_path / "again", subsample=0.5), data)
    assert again.parts["train"].fingerprint() == halves[0].parts["train"].fingerprint()


def test_a_subsample_without_a_decided_pair_is_refused(tmp_path: Path) -> None:
    judgements = read_judgements(rows(40))
    judgements.label[:] = 0.5
    with pytest.raises(UserError, match="train.subsample: the 20 prompts that 0.5 of the"):
        judgements.drawn_prompts(0.5, seed=0)
    with pytest.raises(ConfigError, match="subsample: expected a share above 0 and up to 1"):
        config(tmp_path / "b", subsample=0.0)
