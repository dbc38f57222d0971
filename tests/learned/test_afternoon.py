"""docs/guides/votes-to-model.md as it is told there: votes become a reward, the reward
labels new images, a model learns from them, and people are asked again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from diffalign.cli.entry import run
from diffalign.evaluation.compare import read_models
from diffalign.generation.pipelines import base_pipeline
from diffalign.generation.sampling import generate
from diffalign.shapes.prompts import train_prompts
from diffalign.shapes.verifier import score

pytest.importorskip("gradio")
from diffalign.demo.doubt import Doubt
from diffalign.demo.engine import Engine
from diffalign.demo.vote_tab import Voting
from diffalign.demo.votes import Pair, VoteStore

pytestmark = pytest.mark.nightly


def vote(folder: Path, prompts: list[str]) -> None:
    """A person who prefers what the verifier prefers, now and then the other image."""
    rng, store, pipe = random.Random(0), VoteStore(folder), base_pipeline()
    drawn = [
        generate(pipe, prompts, range(start, start + len(prompts)), progress=False, **settings)
        for start, settings in (
            (100, {"num_inference_steps": 8, "guidance_scale": 1.0, "batch_size": 16}),
            (900, {"num_inference_steps": 8, "guidance_scale": 4.0, "batch_size": 16}),
        )
    ]
    for number, prompt in enumerate(prompts):
        sides = [0, 1]
        rng.shuffle(sides)
        images = drawn[sides[0]][number], drawn[sides[1]][number]
        left, right = score(list(images), [prompt] * 2)
        choice = "left" if left > right else "right"
        if rng.random() < 0.1:
            choice = rng.choice(["left", "right", "tie"])
        pair = Pair(str(number), prompt, images, (f"model {sides[0]}", f"model {sides[1]}"), {})
        assert store.add(pair, choice, "ann")


def test_from_votes_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vote(Path("votes"), train_prompts()[:48])
    reward = ["reward", "train", "--model", "shapes-clip", "--data", "votes"]
    reward += ["--train.output_dir", "rewards/ours", "--train.members", "4"]
    assert run([*reward, "--train.flip_rate", "0.1"]) == 0
    report = json.loads(Path("rewards/ours/report.json").read_text())
    assert report["reward"]["pairs"] >= 4

    Path("prompts.txt").write_text("\n".join(train_prompts()[100:108]) + "\n")
    build = ["data", "build", "--models", "shapes", "--prompts", "prompts.txt"]
    build += ["--num_inference_steps", "4", "--scorers", "rewards/ours"]
    assert run([*build, "--output_dir", "data/ours"]) == 0

    config = Path(__file__).parents[2] / "configs" / "diffusion_dpo" / "shapes.yaml"
    train = ["train", "--config", str(config), "--data.dataset_name", "data/ours"]
    train += ["--data.dataset_config", "pairs", "--train.max_steps", "2"]
    train += ["--validation.max_prompts", "2", "--validation.num_inference_steps", "2"]
    train += ["--train.per_device_train_batch_size", "2", "--train.output_dir", "runs/ours"]
    assert run(train) == 0

    compare = ["compare", "--base", "shapes", "--tuned", "runs/ours", "--prompts", "prompts.txt"]
    compare += ["--scorers", "shapes", "--guidance_scales", "1,3", "--num_images", "1"]
    assert run([*compare, "--num_inference_steps", "4", "--output_dir", "comparison"]) == 0

    models = read_models("shapes", [{"name": "ours", "lora": "runs/ours"}])
    doubt = Doubt(Path("rewards/ours"), "cpu")
    again = Voting(Engine(models), VoteStore(Path("votes")), ["a cat"], ("base", "ours"), doubt)
    pair = again.new_pair("visitor", "ann")
    assert pair is not None and again.vote("visitor", pair.id, "left", "ann")
    assert len(again.store.votes) == 49
