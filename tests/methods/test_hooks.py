"""A method overrides only the hooks of the trainer, and declares what it sets."""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib import import_module

import pytest

from diffalign.methods import METHODS, trainer_class
from diffalign.training.trainer import Trainer

HOOKS = {
    "validate",
    "read_dataset",
    "build_network",
    "build_trained_weights",
    "predictor",
    "build_reference",
    "build_source",
    "prepare",
    "micro_batches",
    "passes_per_batch",
    "passes_per_group",
    "drawing_weights",
    "compute_loss",
    "on_optimizer_step",
    "evaluation_metrics",
    "averaged_weights",
    "training_reward",
}
# What a method says about itself.
FACTS = {
    "method",
    "_name",
    "_tag_names",
    "_paper",
    "_not_public",
    "config_class",
    "data_kind",
    "reference_free",
    "inverted",
    "can_be_online",
    "takes_scorers",
    "start_message",
}


def families(cls: type) -> list[type]:
    """A trainer and its bases up to `Trainer`, which is left out."""
    return [base for base in cls.__mro__ if issubclass(base, Trainer) and base is not Trainer]


@pytest.mark.parametrize("name", METHODS)
def test_only_hooks_are_overridden(name: str) -> None:
    chain = [*families(trainer_class(name)), Trainer]
    for position, cls in enumerate(chain[:-1]):
        above = {member for base in chain[position + 1 :] for member in vars(base)}
        names = {n for n in vars(cls) if not (n.startswith("__") and n.endswith("__"))}
        # A method's own base may offer hooks of its own, but no private ones.
        own_base = {m for base in chain[position + 1 : -1] for m in vars(base)} - set(vars(Trainer))
        overridden = (names & above) - FACTS
        assert overridden <= HOOKS | {n for n in own_base if not n.startswith("_")}, cls


@pytest.mark.parametrize("name", METHODS)
def test_every_attribute_is_declared(name: str) -> None:
    chain = [*families(trainer_class(name)), Trainer]
    declared = {n for cls in chain for n in (*vars(cls), *inspect.get_annotations(cls))}
    for cls in chain:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                assert node.attr in declared, f"{cls.__name__}.{node.attr}"


def test_no_helper_takes_the_trainer() -> None:
    """Only the hooks of the user's callbacks get it."""
    for module in ("loop", "periodic", "evaluate", "build", "export", "run_record", "validation"):
        source = inspect.getsource(import_module(f"diffalign.training.{module}"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.arg):
                assert node.arg != "trainer", module
                if node.annotation is not None:
                    assert "Trainer" not in ast.unparse(node.annotation).replace(
                        "TrainerState", ""
                    ).replace("TrainerControl", ""), module
