"""Read a trainer's arguments in the forms that people pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..config.section import build_section
from ..errors import ConfigError
from .callbacks import TrainerCallback

S = TypeVar("S")


def read_argument(value: Any, section: type[S], name: str) -> S | None:
    """Return a section of the settings, which may be given as a mapping.

    Args:
        value: The section, a mapping with its fields, or None.
        section (`type`): Class of the section.
        name (`str`): How messages name the argument.

    Raises:
        ConfigError: It is something else, or a field cannot be used.
    """
    if value is None or isinstance(value, section):
        return value
    if isinstance(value, Mapping):
        return build_section(section, dict(value), name)
    raise ConfigError(name, f"expected {section.__name__}, got {type(value).__name__}")


def check_optimizers(value: Any) -> tuple[Any, Any]:
    """Return the functions that build the optimizer and its schedule.

    Args:
        value: A pair of functions or None, or None.

    Raises:
        ConfigError: It is no pair, or holds an object instead of a function.
    """
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ConfigError(
            "optimizers", f"expected (make_optimizer, make_schedule), got {type(value).__name__}"
        )
    for part, example in zip(
        value,
        (
            "lambda parameters: torch.optim.SGD(parameters, lr=1e-3)",
            "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100)",
        ),
        strict=True,
    ):
        is_object = not isinstance(part, type) and hasattr(part, "state_dict")
        if part is not None and (not callable(part) or is_object):
            raise ConfigError(
                "optimizers",
                f"expected functions, got an object {type(part).__name__}: the parameters that "
                f"train exist only when the trainer has built them; pass {example}",
            )
    return value[0], value[1]


def read_callbacks(value: Any) -> list[TrainerCallback]:
    """Return the callbacks, which may be given one by one, or as classes.

    Args:
        value: Callbacks, one callback, or None.

    Raises:
        ConfigError: One is no callback.
    """
    if value is None:
        return []
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    callbacks = [item() if isinstance(item, type) else item for item in items]
    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise ConfigError(
                "callbacks",
                f"expected diffalign.TrainerCallback, got {type(callback).__name__} (callbacks of "
                "transformers have other hooks)",
            )
    return callbacks
