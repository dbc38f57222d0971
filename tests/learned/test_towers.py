"""Rewards whose towers are trained: better than their base, the same after a stop and
with two processes, read back as scorers, for every kind of tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import torchrun
from judged import config, report_of, rows, train_towers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import picture

from diffalign import TrainerCallback, load_scorer
from diffalign.cli.entry import run
from diffalign.errors import ConfigError, UserError
from diffalign.reward_training import RewardTrainer, average_rewards
from diffalign.reward_training.judgements import read_judgements
from diffalign.reward_training.pair_groups import MOST_IMAGES, PairData, make_groups
from diffalign.reward_training.pair_tensors import make_labels
from diffalign.reward_training.tower_network import TowerNetwork
from diffalign.rewards.learned.losses import anchor_loss
from diffalign.rewards.learned.tower_weights import trained_state
from diffalign.rewards.testing.reference import arguments
from diffalign.training.trained_weights import REWARD_RUN

SCRIPT = Path(__file__).with_name("tower_script.py")
PROMPTS = ["a small red circle"] * 2


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / request.param
    train_towers(folder, request.param)
    return folder


def test_trained_towers_are_a_scorer(trained: Path) -> None:
    scorer: Any = load_scorer(str(trained), device="cpu")
    images = [picture(210, 1, 64), picture(50, 2, 64)]
    bright, dark = scorer(images, PROMPTS).tolist()
    assert bright > dark
    report = report_of(trained)
    assert report["reward"]["accuracy"] == 1.0 > report["base"]["accuracy"]
    assert set(report["nuisances"]["reward"]) >= {"brightness"}
    facts = json.loads((trained / "reward.json").read_text())
    assert facts["towers"]["kind"] == trained.name and facts["chosen"]["step"] in (6, 12)
    pixels = torch.from_numpy(np.asarray(images[0], dtype=np.float32) / 255).permute(2, 0, 1)
    pixels = pixels[None].requires_grad_()
    value = scorer.score_tensor(pixels, PROMPTS[:1])
    value.sum().backward()
    assert float(pixels.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(value.detach()) == pytest.approx(bright, abs=2e-3)
    half = load_scorer(str(trained), device="cpu", dtype="bfloat16")(images, PROMPTS)
    assert float(half[0]) == pytest.approx(bright, abs=0.3)
    assert not any("lora" in name for tower in scorer.towers() for name, _ in tower.named_modules())


def test_the_base_is_unchanged_and_its_weights_are_checked(trained: Path, tmp_path: Path) -> None:
    base = load_scorer("shapes-clip", device="cpu")([picture(210, 1, 64)], PROMPTS[:1])
    mine = load_scorer(str(trained), device="cpu")([picture(210, 1, 64)], PROMPTS[:1])
    assert not torch.allclose(base, mine)
    again = load_scorer("shapes-clip", device="cpu")([picture(210, 1, 64)], PROMPTS[:1])
    assert torch.equal(base, again)
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("reward.json", "head.safetensors"):
        (copied / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(UserError, match="towers.safetensors"):
        load_scorer(str(copied))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_to_the_same_weights(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        train_towers(folder, trained.name, [StopAt(10)])
    assert (folder / "checkpoint-8").is_dir() and not (folder / "reward.json").exists()
    with pytest.raises(UserError, match="holds another run"):
        train_towers(folder, trained.name)
    train_towers(folder, trained.name, resume_from_checkpoint="latest")
    for name in ("towers.safetensors", "head.safetensors"):
        one, other = load_file(trained / name), load_file(folder / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [
        [json.loads(line) for line in (each / "logs" / "metrics.jsonl").read_text().splitlines()]
        for each in (trained, folder)
    ]
    assert lines[0] == lines[1] and any("eval/accuracy" in entry for entry in lines[0])
    assert report_of(trained) == report_of(folder)
    assert not (folder / REWARD_RUN).exists()


def test_a_training_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    with pytest.raises(KeyboardInterrupt):
        train_towers(folder, "lora", [StopAt(2)])
    assert (folder / "logs" / "metrics.jsonl").is_file()
    assert not list(folder.glob("checkpoint-*"))
    with pytest.raises(KeyboardInterrupt):
        train_towers(folder, "lora", [StopAt(1)], resume_from_checkpoint="latest")
    (folder / REWARD_RUN).unlink()  # without it these could be anybody's logs
    with pytest.raises(UserError, match="is not a run of diffalign"):
        train_towers(folder, "lora")


class StopAfterLook(TrainerCallback):
    """Stops as a killed process does, when the evaluation of a step is done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_the_best_step_survives_a_stop_after_its_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_steps": 4, "eval_steps": 4, "max_steps": 8}
    settings["learning_rate"] = 0.03  # the first look is the best one
    train_towers(tmp_path / "whole", "full", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_towers(tmp_path / "stopped", "full", [StopAfterLook()], **settings)
    settings["resume_from_checkpoint"] = "latest"
    train_towers(tmp_path / "stopped", "full", **settings)
    facts = [
        json.loads((tmp_path / each / "reward.json").read_text())["chosen"]
        for each in ("whole", "stopped")
    ]
    assert facts[0] == facts[1]
    with pytest.raises(UserError, match="belongs to another run"):
        train_towers(tmp_path / "stopped", "full", split_seed=3, **settings)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    train_towers(tmp_path / "one", "full")
    done = torchrun(SCRIPT, tmp_path / "two", 4, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / each / "towers.safetensors") for each in ("one", "two"))
    for key in one:
        # A key's bias changes no softmax. Adam enlarges the rounding of its gradient.
        if not key.endswith("k_proj.bias"):
            assert torch.allclose(one[key], other[key], atol=1e-5), key
    losses = [report_of(tmp_path / each)["likelihood"] for each in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_groups_hold_every_pair_once() -> None:
    data: list[Any] = []
    for i in range(12):
        images = [picture(40 + 9 * j, 100 * i + j, 64) for j in range(5)]
        data.append({"prompt": f"prompt {i}", "images": images, "scores": [1.0, 2, 3, 4, 5]})
    many = [picture(10 + j, 9000 + j, 64) for j in range(20)]
    for j in range(0, 20, 2):
        data.append({"prompt": "prompt 0", "images": many[j : j + 2], "scores": [1.0, 2.0]})
    part = read_judgements(data)
    groups = make_groups(part)
    assert sorted(row for group in groups for *_, row in group.pairs) == list(range(len(part)))
    for group in groups:
        assert len(group.images) <= MOST_IMAGES
        for a, b, row in group.pairs:
            assert (group.images[a], group.images[b]) == (part.first[row], part.second[row])
            assert part.prompt[row] == group.prompt

    scorer = load_scorer("shapes-clip", device="cpu")
    source = PairData(part, make_labels(part, True), scorer)
    everything = source.collate([source[0, i] for i in range(len(source))])
    by_prompt: dict[str, float] = {}
    for prompt, weight in zip(everything.prompts, everything.weights.tolist(), strict=True):
        by_prompt[prompt] = by_prompt.get(prompt, 0) + weight
    assert np.ptp(list(by_prompt.values())) < 1e-5  # every prompt counts the same
    network = TowerNetwork(scorer)
    batch = source.placed(everything, torch.device("cpu"))
    with torch.no_grad():
        scores, _ = network(batch.pixels, batch.prompts, batch.owner)
    images = [part.open(i) for group in groups for i in group.images]
    prompts = [part.prompts[group.prompt] for group in groups for _ in group.images]
    assert torch.allclose(scores, scorer(images, prompts), atol=1e-5)


@pytest.mark.parametrize("name", ["imagereward", "hpsv2.1", "clip-l14", "pickscore"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_kind_of_tower_gets_gradients(tmp_path: Path, name: str, lora: bool) -> None:
    scorer: Any = load_scorer(name, device="cpu", **arguments(name, tmp_path))
    part = read_judgements(rows(12))
    source = PairData(part, make_labels(part, True), scorer)
    adapter = LoraConfig(r=2, init_lora_weights="gaussian") if lora else None
    network = TowerNetwork(scorer, adapter)
    batch = source.placed(source.collate([source[0, i] for i in range(3)]), torch.device("cpu"))
    network.freeze_unused(batch)
    assert len(trained_state(network.towers)) > 2
    network.train()
    scores, _ = network(batch.pixels, batch.prompts, batch.owner)
    torch.nn.functional.softplus(scores[batch.second] - scores[batch.first]).sum().backward()
    moved = [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]
    assert len(moved) == sum(p.requires_grad for p in network.parameters())
    assert sum(float(grad.abs().sum() > 0) for grad in moved) > len(moved) / 3


def test_mistakes(tmp_path: Path) -> None:
    for values, words in (
        ({"towers": "full", "cache": "x"}, "cache: applies to frozen towers alone"),
        ({"towers": "lora", "head": "pal"}, "pal is a head on frozen towers"),
        ({"towers": "lora", "nuisance": 1.0}, "nuisance"),
        ({"save_steps": 5}, "save_steps: 5 is for trained towers"),
        ({"anchor": 0.3}, "anchor: 0.3 is for trained towers"),
        ({"towers": "full", "anchor_data": "x"}, "no effect without anchor"),
        ({"towers": "full", "max_steps": 3, "num_train_epochs": 1.0}, "either max_steps or"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path / "bad", **values)
    with pytest.raises(ConfigError, match="set towers: lora"):
        RewardTrainer("shapes-clip", config(tmp_path), rows(40), peft_config=LoraConfig())
    with pytest.raises(ConfigError, match="no scorer of this package"):
        RewardTrainer("jpeg", config(tmp_path, towers="full"), rows(40))
    args = config(tmp_path / "few", towers="full", anchor=0.3)
    with pytest.raises(UserError, match="two captions"):
        RewardTrainer("shapes-clip", args, rows(40), anchor_dataset=captions(1))
    with pytest.raises(ConfigError, match="contrasts the prompts of a batch"):
        RewardTrainer("shapes-clip", config(tmp_path / "b", towers="full", anchor=0.3), rows(40))
    with pytest.raises(ConfigError, match="callbacks"):
        RewardTrainer("shapes-clip", config(tmp_path / "c"), rows(40), callbacks=[StopAt(1)])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("my notes")
    with pytest.raises(UserError, match="something other than a reward"):
        RewardTrainer("shapes-clip", config(mine, towers="full"), rows(40))
    scorer: Any = load_scorer("shapes-clip", device="cpu")
    TowerNetwork(scorer)
    with pytest.raises(ConfigError, match="were trained; load it again"):
        RewardTrainer(scorer, config(tmp_path / "d", towers="full"), rows(40))
    with pytest.raises(ConfigError, match="lora_bias"):
        TowerNetwork(load_scorer("shapes-clip", device="cpu"), LoraConfig(lora_bias=True))
    args, adapter = config(tmp_path / "lora", towers="lora"), LoraConfig(target_modules=["no"])
    trainer = RewardTrainer("shapes-clip", args, rows(40), peft_config=adapter)
    with pytest.raises(ConfigError, match="target_modules"):
        trainer.train()


def test_the_command_with_two_processes(tmp_path: Path, capfd: Any) -> None:
    import datasets

    datasets.Dataset.from_list(rows(40)).to_parquet(tmp_path / "pairs.parquet")
    command = ["reward", "train", "--model", "shapes-clip", "--data", tmp_path / "pairs.parquet"]
    command += ["--train.output_dir", tmp_path / "reward", "--train.test", "0.25"]
    assert run([str(part) for part in [*command, "--num_processes", "2"]]) == 2
    assert "fitted by one process" in capfd.readouterr().err
    command += ["--train.towers", "lora", "--train.max_steps", "4", "--lora.r", "2"]
    command += ["--train.per_device_train_batch_size", "4", "--num_processes", "2"]
    assert run([str(part) for part in command]) == 0
    printed = capfd.readouterr().out
    assert printed.count("that were not trained on") == 2
    assert load_scorer(str(tmp_path / "reward"), device="cpu").spec.key == "trained:reward"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    for seed in (1, 2):
        train_towers(folder / f"seed-{seed}", "lora", seed=seed)
    return [folder / "seed-1", folder / "seed-2"]


def test_the_average_of_rewards(members: list[Path], tmp_path: Path) -> None:
    folder = average_rewards(members, tmp_path / "average", rows(40), device="cpu")
    facts = json.loads((folder / "reward.json").read_text())
    assert list(facts["average"]["barriers"]) == ["seed-1 - seed-2"]
    assert facts["average"]["warning"] is None and "WARM" in (folder / "README.md").read_text()
    images = [picture(210, 1, 64), picture(50, 2, 64)]
    averaged: Any = load_scorer(str(folder), device="cpu")
    bright, dark = averaged(images, PROMPTS).tolist()
    assert bright > dark and report_of(folder)["reward"]["accuracy"] == 1.0
    # The weights are the mean of the merged weights.
    ends: list[Any] = [load_scorer(str(member), device="cpu") for member in members]
    for mean, one, other in zip(
        averaged.base.clip.module.parameters(),
        ends[0].base.clip.module.parameters(),
        ends[1].base.clip.module.parameters(),
        strict=True,
    ):
        assert torch.allclose(mean, (one + other) / 2, atol=1e-6)
    assert facts["data"]["eval_fingerprint"] is None
    same = average_rewards([members[0]] * 2, tmp_path / "same", rows(40), device="cpu")
    alone, twice = (
        load_scorer(str(each), device="cpu")(images, PROMPTS) for each in (members[0], same)
    )
    barriers = json.loads((same / "reward.json").read_text())["average"]["barriers"]
    assert list(barriers) == ["seed-1 (1) - seed-1 (2)"]
    ratio = alone / twice  # the factor is fitted again
    assert float(ratio[0]) == pytest.approx(float(ratio[1]), rel=1e-4)


def test_averages_that_have_no_sense(members: list[Path], trained: Path, tmp_path: Path) -> None:
    def average(folders: Any, data: Any) -> None:
        average_rewards(folders, tmp_path / "average", data, device="cpu")

    for folders, data, words in (
        (members[:1], rows(40), "folders: expected at least 2 rewards, got 1"),
        (members, rows(39), "are not the judgements"),
    ):
        with pytest.raises(UserError, match=words):
            average(folders, data)
    RewardTrainer("shapes-clip", config(tmp_path / "head"), rows(40)).train()
    with pytest.raises(UserError, match="frozen towers"):
        average([members[0], tmp_path / "head"], rows(40))
    train_towers(tmp_path / "other", "full", split_seed=5)
    with pytest.raises(UserError, match="other data or splits"):
        average([members[0], tmp_path / "other"], rows(40))
    # Far away, in a direction of its own, the members have no line between them.
    far = tmp_path / "far"
    shutil.copytree(trained, far)
    state = load_file(far / "towers.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.ndim == 2 and "lora" not in name:
            state[name] = value[torch.randperm(len(value), generator=generator)]
    if trained.name == "full":
        save_file(state, far / "towers.safetensors")
        with pytest.raises(UserError, match=r"linearly connected|worst member"):
            average([trained, far], rows(40))
        assert not (tmp_path / "average").exists()
        average_rewards([trained, far], tmp_path / "forced", rows(40), force=True, device="cpu")
        assert "WARNING" in (tmp_path / "forced" / "README.md").read_text()
    command = ["reward", "average", str(members[0]), "--output_dir", str(tmp_path / "cli")]
    assert run([*command, "--data", "nowhere"]) == 2


def captions(count: int) -> list[Any]:
    return [
        {"image": picture(100 + i, 300 + i, 64), "prompt": f"caption {i % 9}"} for i in range(count)
    ]


def test_an_anchor_of_captioned_images(tmp_path: Path) -> None:
    """It is another loss, and a resumed run reads the same captions."""
    values: dict[str, Any] = {"max_steps": 6, "eval_steps": 3, "save_steps": 2, "towers": "full"}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 3e-4}
    anchored: dict[str, Any] = {"anchor": 0.5, "anchor_batch_size": 6}

    def trained_by(name: str, callbacks: Any = (), **more: Any) -> dict[str, torch.Tensor]:
        args, given = config(tmp_path / name, **values, **more), captions(20)
        given_captions = given if more.get("anchor_batch_size") else None
        RewardTrainer(
            "shapes-clip", args, rows(40), callbacks=callbacks, anchor_dataset=given_captions
        ).train()
        return load_file(tmp_path / name / "towers.safetensors")

    whole = trained_by("whole", **anchored)
    log = (tmp_path / "whole" / "logs" / "metrics.jsonl").read_text()
    assert "train/anchor" in log
    with pytest.raises(KeyboardInterrupt):
        trained_by("resumed", [StopAt(5)], **anchored)
    resumed = trained_by("resumed", resume_from_checkpoint="latest", **anchored)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    winners = trained_by("winners", anchor=0.5)
    plain = trained_by("plain")
    for other in (winners, plain):
        assert any(not torch.equal(whole[key], other[key]) for key in whole)


def test_the_anchor_is_clips_loss() -> None:
    texts = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    images = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    logits, own = 7 * images @ texts.T, torch.arange(5)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(logits, own) + entropy(logits.T, own)) / 2
    assert anchor_loss(texts, images, 7.0).mean() == pytest.approx(float(expected))
    same = torch.eye(5, dtype=torch.bool)
    assert torch.equal(anchor_loss(texts, images, 7.0, same), anchor_loss(texts, images, 7.0))
    same[0, 1] = same[1, 0] = True  # one caption twice: no negatives of each other
    fewer = anchor_loss(texts, images, 7.0, same)
    assert (fewer[:2] < anchor_loss(texts, images, 7.0)[:2]).all()
    assert torch.allclose(fewer[2:], anchor_loss(texts, images, 7.0)[2:])
