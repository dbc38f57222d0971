"""Two samplers have one fingerprint if, and only if, they draw the same images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import brightness, family, with_scheduler

from diffalign import FKSteering, load_scorer
from diffalign.evaluation.models import ModelSpec
from diffalign.runtime.hashing import value_hash


def darkness(images: list[Any], prompts: list[str]) -> torch.Tensor:
    return -brightness(images, prompts)


def scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda images, prompts: factor * brightness(images, prompts)


def fingerprint(scorer: Any = brightness, pipe: Any = None, **options: Any) -> str:
    options = {"num_particles": 4, "lmbda": 4.0, "kernel": "ddim"} | options
    pipe = family("sd") if pipe is None else pipe
    steering = FKSteering(pipe, scorer, **options)
    return ModelSpec("steered", pipe, steer=steering).fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 8},
        {"lmbda": 5.0},
        {"potential": "max"},
        {"resample_steps": (1, 2)},
        {"scheme": "residual"},
        {"ess_threshold": 1.0},
        {"kernel": "ancestral"},
        {"eta": 0.5},
        {"kernel": None, "mode": "prune"},
        {"scorer": darkness},
        {"scorer": scaled(2.0)},
        {"scorer": load_scorer("shapes")},
        {"intermediate_reward": darkness},
        {"predict_x0": darkness},
        {"decoder": darkness},
        {"model_batch_size": 2},
        {"decode_batch_size": 2},
        {"reward_batch_size": 2},
        {"prompts_per_call": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_counts(options: dict[str, Any]) -> None:
    assert fingerprint(**options) != fingerprint()
    assert fingerprint(**options) == fingerprint(**options)


def test_the_scheduler_counts() -> None:
    schedulers = (
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", {}),
    )
    hashes = {
        fingerprint(pipe=with_scheduler(family("sd"), name, **options))
        for name, options in schedulers
    }
    assert len(hashes) == 3


def test_values_are_told_apart_by_what_they_are() -> None:
    twice, thrice = scaled(2.0), scaled(3.0)
    assert value_hash(twice) == value_hash(scaled(2.0)) != value_hash(thrice)
    one, two = (lambda: 1), (lambda: 2)
    assert value_hash(one) != value_hash(two)
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1e-6
    assert value_hash(long) == value_hash(long.clone()) != value_hash(other)
    torch.manual_seed(0)
    layer, again = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert value_hash(layer) != value_hash(again)
    again.load_state_dict(layer.state_dict())
    assert value_hash(layer) == value_hash(again)
    assert value_hash({"a": 1, "b": 2}) == value_hash({"b": 2, "a": 1})


def test_a_function_that_holds_itself_is_hashed() -> None:
    def outer() -> Any:
        def inner(depth: int) -> int:
            return 0 if depth == 0 else inner(depth - 1)

        return inner

    assert value_hash(outer()) == value_hash(outer())


def in_process(program: str, hash_seed: int) -> str:
    """What a program prints in a process with another order of sets."""
    folders = [
        str(Path(__file__).parents[2]),
        str(Path(__file__).parent),
        str(Path(__file__).parents[1]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


SETS = """
from diffalign.runtime.hashing import value_hash
def reward(images, prompts):
    return [p in {"a", "b", "c", "d", "e"} for p in prompts]
print(value_hash([reward, {"one", "two", "three"}]))
"""
SAMPLER = """
from families import brightness, family
from diffalign import FKSteering
sampler = FKSteering(family("sd"), brightness, num_particles=4, lmbda=4.0, kernel="ddim")
print(sampler.fingerprint())
"""


@pytest.mark.parametrize("program", [SETS, pytest.param(SAMPLER, marks=pytest.mark.nightly)])
def test_equal_in_processes_that_order_sets_differently(program: str) -> None:
    assert in_process(program, 1) == in_process(program, 2)


def test_code_within_code_counts() -> None:
    def written(text: str) -> Any:
        names: dict[str, Any] = {}
        exec(f"def reward(images, prompts): return {text}", names)  # without a source
        return names["reward"]

    texts = ("[2 * len(p) for p in prompts]", "[3 * len(p) for p in prompts]", "(lambda: 2)()")
    hashes = {value_hash(written(text)) for text in texts}
    assert len(hashes) == 3 and value_hash(written(texts[0])) in hashes
    assert value_hash(torch.nn.Linear) != value_hash(torch.nn.Conv2d)  # classes are values, too
