"""The guardian: verdicts on made-up scores, and runs that stop, warn or go back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import assert_same_tensors, brightness, lora_config, make_trainer

from diffalign import TrainerCallback, ValidationConfig, load_scorer, register_scorer
from diffalign.errors import ConfigError
from diffalign.rewards.panel import Panel
from diffalign.training.guardian import Guardian, Look, disagreement, standardised
from diffalign.training.validation_checks import scorers_that_train

PROMPTS, IMAGES = 30, 2


def scores(mean: float, seed: int, noise: float = 0.1) -> np.ndarray:
    """Prompts differ by 1, the change of a step by `noise`."""
    prompts = np.random.default_rng(0).normal(size=(PROMPTS, 1))
    return prompts + mean + noise * np.random.default_rng(seed).normal(size=(PROMPTS, IMAGES))


def look(step: int, reward: float, held_out: float) -> Look:
    return Look(step, scores(reward, step + 100), {"judge": scores(held_out, step)})


def verdicts(*steps: tuple[float, float]) -> list[bool]:
    guardian = Guardian()
    return [guardian.look(look(n, *step)).hacked for n, step in enumerate(steps)]


def test_a_held_out_scorer_that_falls_while_the_reward_rises() -> None:
    assert verdicts((0, 0), (1, 0.5), (2, 0.8), (3, 0.6)) == [False, False, False, True]
    # A fall within the noise is none.
    assert verdicts((0, 0), (1, 0.5), (2, 0.49)) == [False] * 3
    assert verdicts((0, 0), (1, -0.5)) == [False, True]
    # The reward is below its peak, but above that of a better validation.
    assert verdicts((0, 0.5), (2, 0.8), (1, 0.2)) == [False, False, True]


def test_no_verdict_where_both_rise_or_both_fall() -> None:
    assert verdicts((0, 0), (1, 0.2), (2, 0.4), (3, 0.6)) == [False] * 4
    assert verdicts((0, 0), (1, 0.5), (0.5, 0.2)) == [False] * 3


@pytest.mark.parametrize(("validations", "guards"), [(5, 1), (10, 3), (40, 2)])
def test_few_healthy_runs_are_stopped(validations: int, guards: int) -> None:
    """The reward rises, the guards stay where they are, and only the images change."""
    stopped = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        prompts = generator.normal(size=(24, 1))
        guardian = Guardian()
        for step in range(validations + 1):
            reward, *held_out = prompts + 0.5 * generator.normal(size=(guards + 1, 24, 2))
            named = {str(number): values for number, values in enumerate(held_out)}
            seen = Look(step, reward + 0.05 * step, named, validations=validations)
            if guardian.look(seen).hacked:
                stopped += 1
                break
    assert stopped <= 8  # 5 % are meant, and these are 100 runs


def test_the_sentence_names_step_and_scorer() -> None:
    guardian = Guardian()
    guardian.look(look(0, 0, 0))
    guardian.look(look(10, 1, 0.5))
    verdict = guardian.look(look(20, 2, 0.1))
    assert verdict.best_step == 10
    assert verdict.sentence.startswith("step 20: the reward has risen by 0.981 of its spread")
    assert "since step 10, and judge has fallen by 0.4" in verdict.sentence
    assert verdict.metrics["guardian/hacked"] == 1.0
    assert verdict.metrics["guardian/judge"] == pytest.approx(-0.4, abs=0.1)


def test_missing_scores_are_left_out() -> None:
    guardian = Guardian()
    first = look(0, 0, 0)
    first.held_out["judge"][:5] = np.nan
    guardian.look(first)
    assert guardian.look(look(1, 1, -0.5)).hacked
    empty = Look(2, scores(2, 0), {"judge": np.full((PROMPTS, IMAGES), np.nan)})
    assert not guardian.look(empty).hacked


def test_looks_survive_a_file(tmp_path: Path) -> None:
    guardian = Guardian()
    for step, reward, held_out in ((0, 0, 0), (5, 1, 0.5), (10, 2, 0.1), (15, 3, 0.6)):
        seen = look(step, reward, held_out)
        seen.held_out["judge"][0, 0] = np.nan
        guardian.look(seen)
    assert guardian.hacked_steps() == [10]
    guardian.write(tmp_path / "guardian.json")
    again = Guardian()
    again.read(tmp_path / "guardian.json", 10)
    assert [past.step for past in again.looks] == [0, 5, 10]
    np.testing.assert_array_equal(
        again.looks[1].held_out["judge"], guardian.looks[1].held_out["judge"]
    )
    assert again.verdict_at(10).hacked and not again.verdict_at(5).hacked
    assert again.verdict_at(10) == guardian.verdict_at(10)
    # A step that is validated again replaces its look, and forgets later ones.
    guardian.look(look(10, 2, 0.7))
    assert [past.step for past in guardian.looks] == [0, 5, 10]


def test_disagreement_and_scale() -> None:
    before = {"a": np.zeros((4, 2)), "b": np.zeros((4, 2))}
    after = {"a": np.ones((4, 2)), "b": np.array([[1, 1], [-1, -1], [0, 0], [1, 1]])}
    assert disagreement(before, after) == 0.25
    assert np.isnan(disagreement({"a": before["a"]}, {"a": after["a"]}))
    base = np.array([[0.0, 0.0], [2.0, 200.0]])
    combined = standardised(base, base, [1.0, 1.0])
    np.testing.assert_allclose(combined, [0.0, 2.0])
    np.testing.assert_allclose(standardised(base, base, [1.0, 0.0]), [0.0, 2.0])
    # A missing score leaves its weight to the others.
    holed = np.array([[np.nan, 0.0], [np.nan, 200.0], [np.nan, np.nan]])
    np.testing.assert_allclose(standardised(holed, holed, [1.0, 1.0]), [0.0, 2.0, np.nan])


# Runs ---------------------------------------------------------------------------------

HELD_OUT = [0.0, 1.0, 2.0, 3.0, 0.5, 3.5, 4.0]
"""What the held-out scorer says at every step: it falls at the fourth."""
STATE: dict[str, Any] = {"step": 0, "folder": None, "held_out": HELD_OUT}


def level(image: Any) -> int:
    """The step of the weights that drew an image."""
    base = Path(STATE["folder"]) / "samples" / "base"
    known = {np.asarray(Image.open(file).convert("RGB")).tobytes() for file in base.glob("*.png")}
    return 0 if np.asarray(image).tobytes() in known else STATE["step"]


@register_scorer("guardian-held-out", requires=("image",))
def held_out(images: list[Any]) -> list[float]:
    return [STATE["held_out"][level(image)] + 0.01 * (i % 2) for i, image in enumerate(images)]


@register_scorer("guardian-reward", requires=("image",))
def reward(images: list[Any]) -> list[float]:
    return [float(level(image)) + 0.5 * (i % 2) for i, image in enumerate(images)]


class Steps(TrainerCallback):
    """Tells the scorers the step, and notes learning rates and weights."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STATE["step"] = state.global_step
        self.rates.append(kwargs["trainer"].optimizer.param_groups[0]["lr"])


def guarded(folder: Path, on_hacking: str = "stop", **options: Any) -> Any:
    STATE.update(step=0, folder=folder, held_out=options.pop("held_out_scores", HELD_OUT))
    validation = ValidationConfig(
        validation_prompts=[f"a {color} circle" for color in ("red", "blue", "green", "gray")],
        scorers=["guardian-held-out", "guardian-reward"],
        num_validation_images=2,
        validation_steps=1,
        num_inference_steps=2,
        on_hacking=on_hacking,
    )
    steps = Steps()
    values = {"learning_rate": 5e-2, "save_steps": 2, "max_steps": 6, **options}
    given = {"scorers": ["guardian-reward"], "validation": validation, "callbacks": [steps]}
    trainer = make_trainer(
        folder, "sd", "diffusion_nft", peft_config=lora_config(), save_total_limit=None,
        options=given, **values,
    )  # fmt: skip
    return trainer, steps


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def logged(folder: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for line in (folder / "logs/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


def test_a_run_that_hacks_its_reward_ends_with_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = guarded(tmp_path)
    result = trainer.train()
    assert result.global_step == result.hacked_at == 4 and result.interrupted_by is None
    text = capsys.readouterr().out
    assert "step 4: the reward has risen by" in text and "since step 3" in text
    assert "the best weights are those of step 3, and the run ends with them" in text
    assert json.loads((tmp_path / "best" / "validation.json").read_text())["step"] == 3
    assert_same_tensors(weights(tmp_path), weights(tmp_path / "best"))
    assert not (tmp_path / "validation.json").exists()
    rows = logged(tmp_path)
    assert [rows[step]["guardian/hacked"] for step in (1, 2, 3, 4)] == [0, 0, 0, 1]
    assert rows[4]["guardian/guardian-held-out"] == pytest.approx(-2.5)
    # The last step can be resumed by someone who wants to go on.
    going_on, _ = guarded(tmp_path, resume_from_checkpoint="latest")
    STATE["held_out"] = [*HELD_OUT[:5], 9.0, 9.5]
    assert going_on.train().global_step == 6


def test_a_healthy_run_is_not_stopped(tmp_path: Path) -> None:
    trainer, _ = guarded(tmp_path, held_out_scores=[0.0, 1.0, 2.0, 2.0, 2.5, 2.5, 3.0])
    result = trainer.train()
    assert result.global_step == 6 and result.hacked_at is None
    rows = logged(tmp_path)
    assert all(rows[step]["guardian/hacked"] == 0 for step in range(1, 7))


def test_warn_goes_on_and_off_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded(tmp_path / "warn", "warn")[0].train()
    text = capsys.readouterr().out
    assert text.count("WARNING: step 4: the reward has risen") == 1 and "step 3" in text
    assert not np.isnan(logged(tmp_path / "warn")[6]["guardian/reward"])
    guarded(tmp_path / "off", "off")[0].train()
    assert "hacked" not in capsys.readouterr().out
    assert "guardian/reward" not in logged(tmp_path / "off")[6]
    assert_same_tensors(weights(tmp_path / "warn"), weights(tmp_path / "off"))


def test_rollback_goes_back_at_half_the_learning_rate_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, steps = guarded(tmp_path / "a", "rollback", save_steps=1)
    best: list[dict[str, torch.Tensor]] = []

    def go_back(folder: Path, factor: float, run: Any = trainer.go_back) -> None:
        run(folder, factor)
        state = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
        best.append({n: w for n, w in state.items() if "lora_" in n})

    trainer.go_back = go_back
    result = trainer.train()
    assert result.global_step == 6 and result.hacked_at is None
    assert "going back to step 3, at 0.5 times the learning rate" in capsys.readouterr().out
    assert steps.rates == [5e-2] * 4 + [2.5e-2] * 2
    (loaded,) = best
    stored = {t.shape: t for t in weights(tmp_path / "a" / "checkpoint-3").values()}
    assert all(
        any(torch.equal(w, t) for t in weights(tmp_path / "a" / "checkpoint-3").values())
        for w in loaded.values()
        if w.shape in stored
    )
    for stop in (4, 5):  # the moment of the rollback, and after it
        again, rates = guarded(
            tmp_path / f"b{stop}", "rollback", save_steps=1,
            resume_from_checkpoint="latest",
        )  # fmt: skip
        for name in ("best", "samples", f"checkpoint-{stop}"):
            shutil.copytree(tmp_path / "a" / name, tmp_path / f"b{stop}" / name)
        # Only what was seen and kept up to that step.
        if stop == 4:
            restore_best(tmp_path / f"b{stop}", tmp_path / "a" / "checkpoint-3")
        again.train()
        assert rates.rates == [2.5e-2] * (6 - stop)
        assert_same_tensors(weights(tmp_path / f"b{stop}"), weights(tmp_path / "a"))


def restore_best(folder: Path, checkpoint: Path) -> None:
    """Put the weights of a step into `best/`, as they were when the run was stopped."""
    shutil.copy(
        checkpoint / "pytorch_lora_weights.safetensors",
        folder / "best" / "pytorch_lora_weights.safetensors",
    )
    facts = json.loads((folder / "best" / "validation.json").read_text())
    facts |= {"step": 3, "value": HELD_OUT[3]}
    (folder / "best" / "validation.json").write_text(json.dumps(facts))


def test_after_two_rollbacks_a_run_stops(tmp_path: Path) -> None:
    trainer, steps = guarded(
        tmp_path, "rollback", held_out_scores=[0.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    result = trainer.train()
    assert result.hacked_at == 4
    assert steps.rates == [5e-2, 5e-2, 2.5e-2, 1.25e-2]


def test_names_of_the_scorers_that_train() -> None:
    panel = Panel(["shapes", {"scorer": "jpeg_compressibility", "role": "eval"}])
    named = Panel([{"name": "learned", "scorer": "Shapes_CLIP"}])
    for scorers, names in (
        ("shapes", {"shapes"}),
        (["shapes", brightness], {"shapes"}),
        (brightness, set()),
        (None, set()),
        (["no-such-scorer"], set()),
        (panel, {"shapes"}),
        (named, {"shapes-clip"}),
        (load_scorer("shapes"), {"shapes"}),
        ({"rewards": {"shapes": 0.5, "shapes-clip": 1.0}}, {"shapes", "shapes-clip"}),
        ({"rewards": "shapes_clip, Shapes"}, {"shapes", "shapes-clip"}),
        ({"rewards": [{"scorer": "shapes", "role": "eval"}, "shapes-clip"]}, {"shapes-clip"}),
        ([{"scorer": "shapes-clip", "name": "mine", "model": "x"}], set()),
        ([{"scorer": "shapes-clip", "name": "learned"}], {"shapes-clip"}),
        ([{"scorer": "remote", "args": {"url": "u", "scorer": "shapes"}}], {"shapes"}),
        ([{"scorer": "remote", "args": {"url": "u", "scorer": "pickscore"}}], set()),
        ([{"scorer": "remote", "args": {"url": "u", "scorer": "of-the-server"}}], set()),
    ):
        assert scorers_that_train(["shapes", "shapes-clip"], scorers) == names
    # Other spellings of the validation's own.
    assert scorers_that_train(["pick_score", "HPSv2.1"], ["pickscore"]) == {"pick_score"}


def test_a_run_that_is_hacked_from_the_start_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first validation is below the start, so no weights are the best ones."""
    trainer, _ = guarded(tmp_path, held_out_scores=[3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert trainer.train().hacked_at == 1
    assert "no validation was better than the start" in capsys.readouterr().out
    assert not (tmp_path / "best").exists() and (tmp_path / "config.yaml").is_file()


def test_a_hacked_validation_is_never_the_best_one(tmp_path: Path) -> None:
    """Even by a scorer that is at its maximum there."""
    trainer, _ = guarded(tmp_path)
    trainer.validation_config.keep_best = "guardian-reward"
    assert trainer.train().hacked_at == 4
    assert json.loads((tmp_path / "best" / "validation.json").read_text())["step"] == 3


def test_a_rollback_takes_everything_back_that_follows_the_policy(tmp_path: Path) -> None:
    trainer, _ = guarded(tmp_path, "rollback", max_decay=0.9, decay_rate=0.9, max_steps=4)
    run = trainer.go_back

    def go_back(folder: Path, factor: float) -> None:
        run(folder, factor)
        for name, parameter in trainer.old.parameters.items():
            assert torch.equal(trainer.old.weights[name], parameter.detach())

    trainer.go_back = go_back
    trainer.train()


def test_rounds_after_a_rollback_end_with_their_images(tmp_path: Path) -> None:
    """The old policy moves between rounds and never within one."""
    trainer, _ = guarded(
        tmp_path, "rollback", held_out_scores=[0.0, 1.0, 2.0, 0.5, 3.0, 4.0],
        steps_per_round=2, max_steps=5, max_decay=0.5, decay_rate=0.25,
    )  # fmt: skip
    events: list[str] = []
    begin, back = trainer.begin_round, trainer.go_back
    trainer.begin_round = lambda number: (events.append("round"), begin(number))
    trainer.go_back = lambda *args: (events.append("back"), back(*args))
    trainer.setup()
    blend = trainer.old.blend
    trainer.old.blend = lambda: (events.append("blend"), blend())
    trainer.train()
    # Back after the third step, the first of a round.
    assert events == ["round", "blend", "round", "back", "round", "blend"]


def test_other_guards_on_resume_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded(tmp_path, "warn", max_steps=2)[0].train()
    again, _ = guarded(tmp_path, "warn", max_steps=3, resume_from_checkpoint="latest")
    again.validation_config.num_validation_images = 1
    shutil.rmtree(tmp_path / "samples" / "base")
    again.train()
    assert "the guardian begins anew" in capsys.readouterr().out


def test_bad_input_and_notes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guard: expected some of scorers \(a\), got 'b'"):
        ValidationConfig(validation_prompts=["x"], scorers=["a"], guard=["b"])
    with pytest.raises(ConfigError, match="on_hacking: expected one of stop, warn, rollback, off"):
        ValidationConfig(validation_prompts=["x"], on_hacking="halt")
    validation = ValidationConfig(
        validation_prompts=["x"],
        scorers=["guardian-reward", "guardian-held-out"],
        guard=["guardian-reward"],
    )
    judged = {"scorers": ["guardian-reward"]}
    with pytest.raises(ConfigError, match="validation.guard: guardian-reward also trains the"):
        make_trainer(
            tmp_path, "sd", "grpo", peft_config=lora_config(),
            options={**judged, "validation": validation},
        )  # fmt: skip
    bare = make_trainer(tmp_path, "sd", "grpo", peft_config=lora_config(), options=judged)
    assert any(note.startswith("no guard against reward hacking") for note in bare.notes)
    offline = make_trainer(tmp_path, "sd", peft_config=lora_config())
    assert not any("guards" in note for note in offline.notes)
