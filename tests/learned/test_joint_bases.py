"""Heads over ImageReward's BLIP, which embeds an image together with its prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import config, report_of, rows
from tiny import picture

from diffalign import load_scorer
from diffalign.errors import ConfigError
from diffalign.reward_training import RewardTrainer
from diffalign.reward_training.features import embed
from diffalign.reward_training.judgements import read_judgements
from diffalign.rewards.scorers import imagereward
from diffalign.rewards.testing.reference import arguments


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny ImageReward that is found by its file alone, as the published one is."""
    given = arguments("imagereward", tmp_path)
    for section, name in (("vision", "_VISION"), ("text", "_TEXT")):
        values = {**getattr(imagereward, name), **given["config"][section]}
        monkeypatch.setattr(imagereward, name, values)
    vocabulary = Path(given["tokenizer"]) / "vocab.txt"
    shutil.copy(vocabulary, Path(given["model"]).parent / "vocab.txt")
    entries = len(vocabulary.read_text().splitlines())
    monkeypatch.setattr(imagereward, "_BERT_ENTRIES", entries)
    return str(given["model"])


def test_a_reward_over_blip(weights: str, tmp_path: Path) -> None:
    args = config(tmp_path / "mine", members=2, cache=str(tmp_path / "cache"))
    trainer = RewardTrainer("imagereward", args, rows(40), model_path=weights)
    folder = trainer.train()
    report = report_of(folder)
    assert report["reward"]["accuracy"] > 0.9 >= report["base"]["accuracy"]
    scorer = load_scorer(str(folder), device="cpu")
    assert scorer.spec.key == "trained:mine"
    data = trainer.judgements
    shown = [data.open(int(index)) for index in data.first[:6]]
    said = [data.prompts[number] for number in data.prompt[:6]]
    scores = scorer(shown, said)
    members = scorer.member_scores(shown, said)  # type: ignore[attr-defined]
    assert members.shape == (6, 2)
    torch.testing.assert_close(members.mean(1).float(), scores, rtol=1e-5, atol=1e-5)

    # What the head was fitted to are the embeddings that the scorer has.
    features = embed(trainer.base, data, tmp_path / "cache")
    image, text = features.of(*(torch.from_numpy(rows[:6]) for rows in (data.first, data.prompt)))
    base = trainer._score(image, text).float()
    by_hand = scorer.temperature * scorer.head(base, image.float(), text.float()).mean(1)  # type: ignore[attr-defined]
    torch.testing.assert_close(by_hand, scores, rtol=1e-5, atol=1e-5)

    pixels = torch.from_numpy(np.asarray(picture(120, 3, 64), dtype=np.float32) / 255)
    pixels = pixels.permute(2, 0, 1)[None].requires_grad_()
    scorer.score_tensor(pixels, said[:1]).sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0


def test_embeddings_are_of_an_image_with_its_prompt(weights: str, tmp_path: Path) -> None:
    """Also from the cache, and of an image that two prompts have."""
    data = rows(12)
    data[1]["chosen"] = data[0]["chosen"]
    scorer: Any = load_scorer("imagereward", model=weights, device="cpu")
    judgements = read_judgements(data)
    features = embed(scorer, judgements, tmp_path / "cache")
    again = embed(scorer, judgements, tmp_path / "cache")
    plain = embed(scorer, judgements, None)
    for other in (again, plain):
        torch.testing.assert_close(other.image, features.image)
        torch.testing.assert_close(other.nuisances, features.nuisances)
    assert len(features.image) == 24 and len(judgements.images) == 23
    shared = int(judgements.first[0])
    assert shared in judgements.first[judgements.prompt == judgements.prompt[1]]
    one, other = (
        features.of(torch.tensor([shared]), torch.tensor([number]))[0]
        for number in judgements.prompt[:2]
    )
    assert not torch.allclose(one, other)
    score = scorer([judgements.open(shared)], [judgements.prompts[judgements.prompt[1]]])
    torch.testing.assert_close(scorer.joint_score(other.float()), score, rtol=1e-4, atol=1e-4)


def test_quantiles(weights: str, tmp_path: Path) -> None:
    data = []
    for i in range(40):
        for value, stars in ((200 - i, 5.0), (120, 3.0), (40 + i, 1.0)):
            data.append({"prompt": f"prompt {i}", "image": picture(value, i, 64), "rating": stars})
    args = config(tmp_path / "stars", loss="quantiles")
    folder = RewardTrainer("imagereward", args, data, model_path=weights).train()
    scorer: Any = load_scorer(str(folder), device="cpu")
    result = scorer.score([picture(150, 1, 64)] * 2, ["prompt 1", "a cat"], quantiles=[0.1, 0.9])
    assert result.quantiles.shape == (2, 2)
    assert (result.quantiles[:, 0] <= result.quantiles[:, 1]).all()


def test_pal_needs_embeddings_of_both(weights: str, tmp_path: Path) -> None:
    args = config(tmp_path / "pal", head="pal")
    data = rows(20, True, "ann") + rows(20, False, "bob", 20)
    with pytest.raises(ConfigError, match="imagereward has no embeddings that a pal head can read"):
        RewardTrainer("imagereward", args, data, model_path=weights)
