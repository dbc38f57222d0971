"""PPD: users in the policy alone, what is trained and saved, drawing for users."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    all_tensors,
    assert_same_tensors,
    build_pipeline,
    first_batch,
    lora_config,
    make_trainer,
    pair_rows,
    picture,
    user_rows,
)

from diffalign import load_users
from diffalign.backbones.user_adapter import CONFIG, WEIGHTS
from diffalign.data import load_preferences
from diffalign.errors import ConfigError, UserError
from diffalign.generation.users import mixture_words, read_mixture, user_weights
from diffalign.methods.ppd import USER, USER_MASK, PPDConfig, PPDTrainer


def ppd(folder: Path, family: str = "sd", **options: Any) -> Any:
    values: dict[str, Any] = {"rows": user_rows(8), "per_device_train_batch_size": 4, "seed": 2}
    values |= {"user_tokens": 2, "user_dim": 8, "user_dropout": 0.0} | options
    return make_trainer(folder, family, "ppd", **values)


def open_values(trainer: Any) -> None:
    """Values that are not zero, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for layer in trainer.adapter.layers:
        torch.nn.init.normal_(layer.to_v.weight, generator=generator)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_it_starts_as_the_network_itself(family: str, tmp_path: Path) -> None:
    trainer = ppd(tmp_path, family)
    batch = trainer.prepare(first_batch(trainer))
    policy, reference = trainer.errors(batch)
    assert torch.equal(policy, reference) and policy.requires_grad
    loss, _ = trainer.compute_loss(batch)
    torch.testing.assert_close(loss.detach(), torch.full((4,), math.log(2)), rtol=0, atol=1e-7)
    assert trainer.adapter.user_names == ["ann", "bob"]


def test_each_row_sees_its_user_and_the_reference_none(tmp_path: Path) -> None:
    trainer = ppd(tmp_path)
    batch = trainer.prepare(first_batch(trainer))
    open_values(trainer)
    names = ["ann", "bob"]
    expected = [names.index(user) for user in batch.users for _ in range(2)]
    assert batch.condition[USER].tolist() == expected
    with torch.no_grad():
        policy, reference = trainer.errors(batch)
        assert not torch.allclose(policy, reference)
        # Without users the policy is the reference.
        batch.condition[USER_MASK].zero_()
        free, _ = trainer.errors(batch)
        torch.testing.assert_close(free, reference)
        # Exchanging the users exchanges what their rows see.
        batch.condition[USER_MASK].fill_(1.0)
        batch.condition[USER] = 1 - batch.condition[USER]
        trainer.adapter.table.copy_(trainer.adapter.table.flip(0))
        again, _ = trainer.errors(batch)
        torch.testing.assert_close(again, policy)


def test_only_the_adapter_trains_and_is_saved(tmp_path: Path) -> None:
    model = build_pipeline("sd")
    frozen = all_tensors(model.unet)
    trainer = ppd(tmp_path / "run", model=model, max_steps=3)
    trainer.train()
    now = {n: v for n, v in all_tensors(model.unet).items() if not n.startswith("user_adapter.")}
    assert_same_tensors(now, frozen)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {WEIGHTS, CONFIG, "README.md", "config.yaml"} <= names
    assert "model_index.json" not in names and "unet" not in names
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A user adapter fine-tuned from" in card and "load_users(pipe" in card
    assert "user adapter:" in card


def test_it_learns_two_opposite_tastes(tmp_path: Path) -> None:
    # The attention of a random UNet says little about brightness.
    trainer = ppd(tmp_path, "sd3", max_steps=40, learning_rate=2e-2, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.evaluate(user_rows(8))["eval/rewards/accuracies"] > 0.8
    swapped = [
        row | {"user_id": "bob" if row["user_id"] == "ann" else "ann"} for row in user_rows(8)
    ]
    assert trainer.evaluate(swapped)["eval/rewards/accuracies"] < 0.3


@pytest.mark.parametrize("precompute", [False, True])
def test_it_resumes_bit_equal(precompute: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    options |= {"user_dropout": 0.5, "precompute_ref_errors": precompute}
    whole = ppd(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    checkpoint = tmp_path / "part" / "checkpoint-2"
    assert (checkpoint / WEIGHTS).is_file() and not (checkpoint / "unet").exists()
    again = ppd(tmp_path / "part", resume_from_checkpoint=str(checkpoint), **options)
    again.train()
    assert_same_tensors(again.adapter.state_dict(), whole.adapter.state_dict())


def test_dropout_of_users(tmp_path: Path) -> None:
    trainer = ppd(tmp_path, user_dropout=0.5, per_device_train_batch_size=8)
    batch = first_batch(trainer)
    mask = trainer.prepare(batch).condition[USER_MASK]
    assert 0 < mask.sum() < len(mask) and torch.equal(mask[::2], mask[1::2])
    with torch.no_grad():  # an evaluation
        assert trainer.prepare(batch).condition[USER_MASK].all()


def test_rows_without_a_user(tmp_path: Path) -> None:
    rows = user_rows(4)
    rows[0]["user_id"] = None
    trainer = ppd(tmp_path, rows=rows)
    batch = trainer.prepare(first_batch(trainer))
    place = batch.row_ids.index(0)
    mask = batch.condition[USER_MASK].reshape(-1, 2)
    assert mask[place].tolist() == [0.0, 0.0] and mask.sum() == 6
    # A user of other data is nobody.
    metrics = trainer.evaluate([user_rows(1)[0] | {"user_id": "eve"}])
    assert metrics["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    told = ppd(
        tmp_path / "told",
        options={"eval_dataset": [user_rows(1)[0] | {"user_id": "eve"}]},
    )
    assert any("1 of the evaluation data are not those" in note for note in told.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": pair_rows(4)}, "data.columns: PPD needs to know who judged a pair"),
        ({"rows": user_rows(2)}, "the pairs have 1 users; PPD needs at least two"),
        ({"validation_user": "eve"}, "validation_user: 'eve' is none of the 2 users"),
        ({"reference_decay": 0.9}, "reference_decay: PPD's reference"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        ppd(tmp_path, **options)


def test_a_lora_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora: PPD trains a user adapter"):
        PPDTrainer(
            model=build_pipeline("sd"), args=PPDConfig(output_dir=str(tmp_path)),
            train_dataset=user_rows(4), peft_config=lora_config(),
        )  # fmt: skip


# Drawing for users


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppd") / "run"
    trainer = ppd(folder, "sd3", max_steps=40, learning_rate=2e-2, per_device_train_batch_size=8)
    trainer.train()
    return folder


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    prompt = user_rows(1)[0]["prompt"]
    images = pipe(
        prompt, height=32, width=32, num_inference_steps=4, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    return images[0]


def test_users_mixtures_and_none(run: Path) -> None:
    pipe = build_pipeline("sd3")
    base = draw(pipe)
    users = load_users(pipe, run)
    assert users.names == ["ann", "bob"]
    images = {}
    for user in ("ann", "bob"):
        with users.apply(user):
            images[user] = draw(pipe)
    assert not np.array_equal(images["ann"], images["bob"])
    assert np.array_equal(draw(pipe), base)  # outside of a block nobody is drawn for
    with users.apply("ann", scale=0.0):
        assert np.array_equal(draw(pipe), base)
    with users.apply({"ann": 1.0, "bob": 0.0}):
        assert np.array_equal(draw(pipe), images["ann"])
    with users.apply({"ann": 0.5, "bob": 0.5}):
        middle = draw(pipe)
    assert not np.array_equal(middle, images["ann"])
    with pytest.raises(UserError, match="'eve' is unknown"), users.apply("eve"):
        pass


def test_a_new_user_is_like_those_who_judge_alike(run: Path) -> None:
    users = load_users(build_pipeline("sd3"), run)
    prompt = user_rows(1)[0]["prompt"]
    bright = [(prompt, picture(205, 50 + i), picture(45, 60 + i)) for i in range(4)]
    weights = users.weights_of_pairs(bright)
    assert weights["ann"] > 0.8 and sum(weights.values()) == pytest.approx(1.0)
    dark = [(prompt, rejected, chosen) for prompt, chosen, rejected in bright]
    assert users.weights_of_pairs(dark)["bob"] > 0.8
    assert users.weights_of_pairs(bright) == weights
    with pytest.raises(UserError, match="expected at least one pair, got none"):
        users.weights_of_pairs([])


def test_embeddings_from_pairs(tmp_path: Path, monkeypatch: Any) -> None:
    from diffalign.rewards import users as embedders

    monkeypatch.setattr(embedders, "_registered", {})

    @embedders.register_user_embedder("brightness")
    class Brightness:
        name = "brightness"

        def __call__(self, users: Any) -> torch.Tensor:
            means = [np.asarray(pairs[0].chosen, np.float32).mean() / 128 - 1 for pairs in users]
            rows = [mean * torch.linspace(-1, 1, 8) + torch.arange(8) % 2 for mean in means]
            return torch.stack(rows)[:, None].float()

    trainer = ppd(
        tmp_path / "run", "sd3", user_embeddings="brightness", num_examples=2, max_steps=60,
        learning_rate=2e-2, per_device_train_batch_size=4,
    )  # fmt: skip
    assert len(trainer.train_dataset) == 4 and [len(groups) for groups in trainer.examples] == [
        2,
        2,
    ]
    assert trainer.record.dataset is trainer.train_dataset
    trainer.train()
    assert not trainer.adapter.table.requires_grad
    assert trainer.evaluate(user_rows(8))["eval/rewards/accuracies"] > 0.8
    users = load_users(build_pipeline("sd3"), tmp_path / "run")
    prompt = user_rows(1)[0]["prompt"]
    embedding = users.from_pairs([(prompt, picture(205, 1), picture(45, 2))])
    assert embedding.shape == (1, 8)
    with users.apply(embedding):
        personal = draw(users.pipe)
    assert not np.array_equal(personal, draw(users.pipe))
    with pytest.raises(ConfigError, match="0 users have more than 4 pairs; lower it"):
        ppd(tmp_path / "few", user_embeddings="brightness")


def test_users_as_models_of_a_comparison(run: Path) -> None:
    from diffalign.evaluation.compare import read_models
    from diffalign.evaluation.models import opened

    pipe = build_pipeline("sd3")
    prompt = [user_rows(1)[0]["prompt"]]
    settings = {"num_inference_steps": 2, "height": 32, "width": 32}
    described = [{"user_adapter": str(run), "user": name} for name in ("ann", "bob")]
    models = read_models(pipe, described)
    assert [model.name for model in models] == ["base", "ann", "bob"]
    assert models[1].fingerprint() != models[2].fingerprint()
    assert f"user ann of {run}" in models[1].described
    images = []
    for model in models:
        with opened(model) as draw_with:
            images.append(np.asarray(draw_with(prompt, [1], **settings)[0]))
    assert not np.array_equal(images[1], images[2])
    with opened(models[0]) as draw_with:  # the pipeline is as it was
        assert np.array_equal(np.asarray(draw_with(prompt, [1], **settings)[0]), images[0])
    with pytest.raises(ConfigError, match="user: name the folder of a PPD run"):
        read_models(pipe, [{"user": "ann"}])
    with pytest.raises(ConfigError, match="there is no PPD run in 'nowhere'"):
        read_models(pipe, [{"user_adapter": "nowhere"}])


def test_passes_without_gradients_leave_no_user_behind(tmp_path: Path) -> None:
    trainer = ppd(tmp_path, validation_user="ann", user_scale=0.5)
    trainer.setup()
    before = trainer.adapter._users
    trainer.evaluate(user_rows(8))
    assert trainer.adapter._users is before and before is not None
    trainer.save_model(str(tmp_path / "saved"))
    users = load_users(build_pipeline("sd"), tmp_path / "saved")
    assert users.adapter.scale == 0.5
    with users.apply("ann", scale=0.5):
        assert users.adapter.scale == 0.25
    assert users.adapter.scale == 0.5


def test_averaged_weights_project_the_user_of_a_validation(tmp_path: Path) -> None:
    trainer = ppd(
        tmp_path, validation_user="ann", use_ema=True, ema_decay=0.5, max_steps=3,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()

    def projected() -> torch.Tensor:
        with torch.no_grad(), trainer.adapter.users(trainer.adapter.embedding("ann")[None]):
            return trainer.adapter._users[0].clone()

    live = trainer.adapter._users[0].clone()
    assert torch.equal(live, projected())
    with trainer.averaged_weights():
        mean = trainer.adapter._users[0].clone()
        assert torch.equal(mean, projected()) and not torch.equal(mean, live)
    assert torch.equal(trainer.adapter._users[0], live)


def test_numbers_as_users(run: Path) -> None:
    from diffalign.evaluation.compare import read_models

    model = read_models("shapes", [{"user_adapter": str(run), "user": 4021}])[1]
    assert model.user == "4021"
    users = load_users(build_pipeline("sd3"), run)
    with pytest.raises(UserError, match="expected a name.*got int"), users.apply(3):  # type: ignore[arg-type]
        pass


def test_posterior_of_users() -> None:
    even = user_weights(torch.zeros(4, 3))
    assert even.tolist() == [0.25] * 4
    weights = user_weights(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    ratio = math.exp(sum(math.log((1 + math.exp(z)) / (1 + math.exp(-z))) for z in (1.0, 2.0)))
    assert float(weights[0] / weights[1]) == pytest.approx(ratio, rel=1e-5)
    assert ratio == pytest.approx(math.exp(3.0))


def test_mixtures_on_the_command_line() -> None:
    assert read_mixture("ann") == "ann"
    assert read_mixture("ann=0.3, bob=0.7") == {"ann": 0.3, "bob": 0.7}
    with pytest.raises(UserError, match="--user: expected a name, or name=weight"):
        read_mixture("ann=much")
    assert mixture_words({"ann": 0.25, "bob": 0.75}) == "bob 0.75, ann 0.25"


def test_the_sample_command(run: Path, tmp_path: Path, capsys: Any) -> None:
    from diffalign.cli.entry import run as command
    from diffalign.data import convert

    build_pipeline("sd3").save_pretrained(tmp_path / "model")
    pairs = convert(load_preferences(user_rows(2), verbose=False), tmp_path / "pairs")
    common = [
        "sample", "--model", str(tmp_path / "model"), "--prompt", user_rows(1)[0]["prompt"],
        "--num_images", "1", "--num_inference_steps", "2",
    ]  # fmt: skip
    adapter = ["--user_adapter", str(run)]
    for number, options in enumerate((["--user", "ann=0.5,bob=0.5"], ["--user_pairs", str(pairs)])):
        out = tmp_path / f"out{number}"
        assert command([*common, *adapter, *options, "--output_dir", str(out)]) == 0
        assert Image.open(out / "comparison.png").size[0] > 0
    assert "new user: ann" in capsys.readouterr().out
    for options, words in (
        (["--user", "ann"], "--user: name the folder of a PPD run with --user_adapter"),
        (adapter, "--user: give either --user or --user_pairs"),
        ([*adapter, "--user", "eve"], "'eve' is unknown"),
    ):
        assert command([*common, *options]) == 2
        assert words in capsys.readouterr().err
