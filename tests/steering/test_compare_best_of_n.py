"""Steering against best-of-n: paired noise, equal rows, standard errors, judges that
choose nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from families import call_options, family

from diffalign import FKSteering
from diffalign.errors import ConfigError, UserError
from diffalign.evaluation.best_of_n import (
    ArmScores,
    BestOfNComparison,
    Difference,
    compare_best_of_n,
    population_seed,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts:UserWarning")
PROMPTS = [f"a {size} red circle on the left of a gray background" for size in ("small", "large")]
CALL = {"num_inference_steps": 5, "eta": 1.0, "progress": False} | call_options("sd")


def brightness(images, prompts) -> torch.Tensor:
    return torch.tensor([np.asarray(image, dtype=np.float64).mean() for image in images])


def redness(images, prompts) -> torch.Tensor:
    return torch.tensor([np.asarray(image, dtype=np.float64)[..., 0].mean() for image in images])


def steering(**options) -> FKSteering:
    return FKSteering(
        family("sd"),
        brightness,
        **{"num_particles": 4, "lmbda": 4.0, "ess_threshold": 1.0, "resample_steps": (1, 2)}
        | options,
    )


@pytest.mark.nightly
def test_both_sides_share_noise_and_rows() -> None:
    sampler = steering()
    found = compare_best_of_n(sampler, PROMPTS, seeds=3, judges={"red": redness}, **CALL)
    plain, steered = found.arms["best_of_n"], found.arms["steering"]
    assert plain.model_rows == steered.model_rows == 3 * 2 * 4 * 2 * 5
    assert plain.decodes == 0 and steered.decodes == 3 * 2 * 8
    assert plain.scores["reward"].shape == (2, 3, 4) and (plain.roots == 4).all()
    own = sampler.best_of_n()(
        PROMPTS,
        seed=[population_seed(1, i) for i in range(2)],
        **{k: v for k, v in CALL.items() if k != "progress"},
    )
    np.testing.assert_array_equal(plain.scores["reward"][:, 1], own.rewards.numpy())
    # without resampling there is nothing to tell apart
    idle = compare_best_of_n(steering(lmbda=0.0), PROMPTS, seeds=2, **CALL)
    np.testing.assert_array_equal(
        idle.arms["best_of_n"].scores["reward"], idle.arms["steering"].scores["reward"]
    )
    assert idle.difference().value == 0 and idle.difference().standard_error == 0


def test_judges_see_the_image_that_the_reward_chose() -> None:
    scores = {"reward": np.array([[[1.0, 3.0, 2.0]]]), "judge": np.array([[[9.0, 5.0, 7.0]]])}
    arm = ArmScores(scores, np.array([[[0.5, 0.5, 0.0]]]), np.array([[3.0]]), np.array([[2.0]]))
    assert (
        arm.best("judge").tolist() == [[5.0]]
        and arm.mean("judge").tolist() == [[7.0]]
        and arm.weighted("judge").tolist() == [[7.0]]
    )


def test_errors_are_clustered_by_prompt() -> None:
    difference = np.array([[1.0, 1.0], [3.0, 3.0]])
    assert Difference.of(difference) == Difference(
        2.0, pytest.approx(math.sqrt(2.0) / math.sqrt(2))
    )
    single = Difference.of(np.array([[1.0, 3.0]]))  # one prompt: over seeds
    assert single == Difference(2.0, pytest.approx(1.0))
    assert math.isnan(Difference.of(np.array([[1.0]])).standard_error)
    gaps = Difference.of(np.array([[1.0, np.nan], [3.0, 3.0], [np.nan, np.nan]]))
    assert gaps.value == 2.0


def test_table_and_json() -> None:
    found = compare_best_of_n(steering(), PROMPTS, seeds=[4, 9], judges={"red": redness}, **CALL)
    table = found.table()
    for words in (
        "| reward, best particle |",
        "| red, mean of 4 |",
        "initial noises that survive, of 4",
        "model rows",
        "seconds",
    ):
        assert words in table
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["seeds"] == [4, 9] and values["difference"]["red"]["mean"]["standard_error"] >= 0
    assert values["difference"]["reward"]["best"]["value"] == pytest.approx(
        found.difference().value
    )
    steered, plain = (found.arms[name].best("reward").mean() for name in ("steering", "best_of_n"))
    assert found.difference().value == pytest.approx(steered - plain)
    assert found.grid().width > 4 * 96


def test_steering_towards_brightness_raises_the_mean() -> None:
    found = compare_best_of_n(steering(lmbda=20.0), PROMPTS, seeds=4, **CALL)
    gained = found.difference("reward", "mean")
    assert gained.value > 2 * gained.standard_error > 0
    assert found.arms["steering"].roots.mean() < 4


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="needs at least 2 particles"):
        compare_best_of_n(
            FKSteering(family("sd"), brightness, num_particles=1, lmbda=1.0), PROMPTS, **CALL
        )
    with pytest.raises(ConfigError, match="seeds: expected at least one"):
        compare_best_of_n(steering(), PROMPTS, seeds=0, **CALL)
    with pytest.raises(ConfigError, match="seed: both sides need the same noise"):
        compare_best_of_n(steering(), PROMPTS, seed=3, **CALL)
    with pytest.raises(ConfigError, match="judges: 'reward' is the steering reward's own name"):
        compare_best_of_n(steering(), PROMPTS, judges={"reward": redness}, **CALL)
    with pytest.raises(UserError, match="no-such"):
        compare_best_of_n(steering(), PROMPTS, judges=["no-such"], **CALL)
    found = BestOfNComparison(
        [], [], 4, {"steering": ArmScores({"reward": np.zeros((1, 1, 4))}, *[np.zeros((1, 1))] * 3)}
    )
    with pytest.raises(ConfigError, match="metric: expected one of reward"):
        found.difference("speed")
    with pytest.raises(ConfigError, match="of: expected best or mean"):
        found.difference("reward", "worst")
