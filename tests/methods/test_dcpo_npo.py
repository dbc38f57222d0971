"""DCPO and Diffusion-NPO: Diffusion-DPO with two captions, and turned round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import captioned_rows, first_batch, make_trainer, pair_rows, ranked_rows

from diffalign import DCPOConfig, load_preferences
from diffalign.errors import ConfigError, UserError
from diffalign.methods.dcpo import dcpo_loss
from diffalign.methods.diffusion_dpo import diffusion_dpo_loss


def test_dcpo_golden_values() -> None:
    policy, reference = (
        torch.tensor([row], dtype=torch.float64) for row in ([0.100, 0.102], [0.1005, 0.1010])
    )
    assert float(dcpo_loss(policy, reference, beta=500)) == pytest.approx(0.523123264138, abs=1e-9)
    assert float(dcpo_loss(policy, reference, beta=5000)) == pytest.approx(0.023245464372, abs=1e-9)


@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl", "sd3"])
def test_each_image_is_conditioned_on_its_own_caption(tmp_path: Path, family: str) -> None:
    both = first_batch(
        make_trainer(tmp_path / "a", family, "dcpo", per_device_train_batch_size=2)
    ).condition
    control = first_batch(
        make_trainer(
            tmp_path / "b", family, "dcpo", per_device_train_batch_size=2, captions="chosen"
        )
    ).condition
    plain = first_batch(
        make_trainer(tmp_path / "c", family, "diffusion_dpo", per_device_train_batch_size=2)
    ).condition
    name = next(key for key in both if "embeds" in key or "hidden" in key)
    for key in both:  # text of every encoder: chosen rows equal, rejected rows their own
        if key.endswith(("embeds", "hidden_states", "projections")):
            torch.testing.assert_close(
                both[key][::2], control[key][::2], rtol=1e-4, atol=1e-5
            )  # encoded among other prompts
    assert not torch.equal(both[name][1::2], control[name][1::2])
    assert torch.equal(control[name], plain[name])


def test_equal_captions_are_diffusion_dpo(tmp_path: Path) -> None:
    rows = [
        {**row, "chosen_prompt": row["prompt"], "rejected_prompt": row["prompt"]}
        for row in pair_rows()
    ]
    dual = make_trainer(tmp_path / "a", method="dcpo", rows=rows, per_device_train_batch_size=4)
    plain = make_trainer(tmp_path / "b", per_device_train_batch_size=4)
    dual.train()
    plain.train()
    first, second = (trainer.errors(first_batch(trainer))[0] for trainer in (dual, plain))
    assert torch.equal(first, second)


def test_dcpo_needs_two_captions(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"one caption per pair .* DCPO needs chosen_prompt and rejected_prompt"
    ):
        make_trainer(tmp_path, method="dcpo", rows=pair_rows())
    with pytest.raises(ConfigError, match="captions: expected one of both, chosen"):
        DCPOConfig(captions="rejected")


def test_inverted_preferences() -> None:
    pairs = load_preferences(captioned_rows(2), verbose=False)
    turned = pairs.with_inverted_preferences()
    assert turned[0].prompts == pairs[0].prompts[::-1]
    assert turned[0].image_hashes() == pairs[0].image_hashes()[::-1]
    assert turned.fingerprint != pairs.fingerprint == turned.with_inverted_preferences().fingerprint
    lists = load_preferences(ranked_rows(2), verbose=False)
    assert lists.with_inverted_preferences()[0].scores == (0.0, 0.5, 1.0)
    assert (
        lists.with_inverted_preferences().as_kind("single")[0].image_hashes()
        == lists[0].image_hashes()[2:]
    )
    assert (
        lists.as_kind("pair").with_inverted_preferences()[0].image_hashes()
        == lists.as_kind("pair")[0].image_hashes()[::-1]
    )
    scores = [{**row, "scores": [21.0, 20.0, 19.0]} for row in ranked_rows(1)]
    assert load_preferences(scores, verbose=False).with_inverted_preferences()[0].scores == (
        -21.0,
        -20.0,
        -19.0,
    )
    with pytest.raises(UserError, match="hold no preference to invert"):
        load_preferences([{"prompt": "x"}], verbose=False).with_inverted_preferences()


def test_npo_is_dpo_with_exchanged_pairs(tmp_path: Path) -> None:
    exchanged = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows()
    ]
    npo = make_trainer(tmp_path / "a", method="diffusion_npo", per_device_train_batch_size=4)
    dpo = make_trainer(tmp_path / "b", rows=exchanged, per_device_train_batch_size=4)
    flag = make_trainer(
        tmp_path / "c", data={"invert_preferences": True}, per_device_train_batch_size=4
    )
    back = make_trainer(
        tmp_path / "d",
        method="diffusion_npo",
        data={"invert_preferences": True},
        per_device_train_batch_size=4,
    )
    found = [trainer.errors(first_batch(trainer))[0] for trainer in (npo, dpo, flag, back)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    plain = make_trainer(tmp_path / "e", per_device_train_batch_size=4)
    assert torch.equal(found[3], plain.errors(first_batch(plain))[0])
    policy, reference = torch.rand(5, 2), torch.rand(5, 2)
    z = diffusion_dpo_loss(policy, reference, beta=3.0) - diffusion_dpo_loss(
        policy.flip(1), reference.flip(1), beta=3.0
    )
    delta = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    torch.testing.assert_close(z, 1.5 * delta, rtol=1e-4, atol=1e-6)


def test_a_negative_model_prefers_what_was_rejected(tmp_path: Path) -> None:
    npo = make_trainer(
        tmp_path / "run",
        method="diffusion_npo",
        max_steps=16,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        precompute_ref_errors=True,
        ref_error_draws=1,
    )
    npo.train()
    metrics = npo.evaluate(pair_rows())
    assert metrics["eval/rewards/accuracies"] > 0.5
