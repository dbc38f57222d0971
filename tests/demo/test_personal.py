"""A visitor's votes become their taste."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.backbones.lora import denoiser
from diffalign.backbones.user_adapter import UserAdapter
from diffalign.errors import UserError
from diffalign.evaluation.compare import read_models
from diffalign.generation.pipelines import base_pipeline
from diffalign.shapes.prompts import train_prompts

pytest.importorskip("gradio")
from diffalign.demo.engine import Engine
from diffalign.demo.vote_tab import LEAST_PAIRS, Voting
from diffalign.demo.votes import VoteStore


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose users differ, without training."""
    folder = tmp_path_factory.mktemp("users")
    torch.manual_seed(0)
    made = UserAdapter(denoiser(base_pipeline()), dim=8, tokens=2, user_names=["ann", "bob"])
    for layer in made.layers:
        torch.nn.init.normal_(layer.to_v.weight, std=0.5)
    made.save(folder, {"beta": 500.0})
    return folder


def test_four_votes_make_a_taste(adapter: Path, tmp_path: Path) -> None:
    tuned = [{"name": "ann", "user_adapter": str(adapter), "user": "ann"}]
    models = read_models("shapes", tuned)
    engine = Engine(models, user_adapter=str(adapter))
    voting = Voting(engine, VoteStore(tmp_path), train_prompts()[:4], ("base", "ann"))
    for count in range(LEAST_PAIRS):
        with pytest.raises(UserError, match=f"vote on {LEAST_PAIRS - count} more pairs first"):
            voting.personal("visitor")
        pair = voting.new_pair("visitor", "")
        assert pair is not None and voting.vote("visitor", pair.id, "tie", "")
        pair = voting.new_pair("visitor", "")
        assert pair is not None and voting.vote("visitor", pair.id, "left", "")
    prompt, plain, own, like = voting.personal("visitor")
    assert prompt in train_prompts() and "From 4 votes: most like one of 2 known users" in like
    assert not np.array_equal(np.asarray(plain), np.asarray(own))
    with pytest.raises(UserError, match="vote on 4 more"):
        voting.personal("somebody else")


def test_models_with_a_user_and_without_an_adapter(adapter: Path) -> None:
    models = read_models(
        "shapes",
        [{"name": name, "user_adapter": str(adapter), "user": name} for name in ("ann", "bob")],
    )
    engine = Engine(models)
    request = engine.read(train_prompts()[0], 3, 2, 2.0)
    images = [np.asarray(engine.draw(name, request)) for name in ("base", "ann", "bob")]
    assert not np.array_equal(images[1], images[2]) and not np.array_equal(images[0], images[1])
    assert np.array_equal(np.asarray(engine.draw("base", request)), images[0])
    with pytest.raises(UserError, match="--user_adapter: the demo was started without one"):
        engine.learn_user([("a", Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))])
