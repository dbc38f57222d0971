"""Choose the steps at which particles are scored, and their temperatures."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError

DEFAULT_FRACTIONS = (0.2, 0.35, 0.5, 0.65, 0.8)


def check_schedule(steps: Sequence[int | float] | None) -> None:
    """Check `resample_steps`, before the number of steps of the run is known.

    Args:
        steps (sequence, *optional*): see `schedule`.

    Raises:
        ConfigError: it holds something else than indices >= 0 and fractions in [0, 1).
    """
    if steps is None:
        return
    if isinstance(steps, (str, bytes, int, float)):
        raise ConfigError(
            "resample_steps", f"expected a sequence such as (0.2, 0.5) or (10, 20), got {steps!r}"
        )
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, (int, float)):
            raise ConfigError("resample_steps", f"expected indices or fractions, got {step!r}")
        if isinstance(step, float) and not 0 <= step < 1:
            raise ConfigError(
                "resample_steps",
                f"a fraction of the run lies in [0, 1), got {step!r}; indices are ints",
            )
        if step < 0:
            raise ConfigError(
                "resample_steps", f"an index is >= 0, counted from the noise, got {step}"
            )


def schedule(steps: Sequence[int | float] | None, num_steps: int) -> list[int]:
    """Compute the scored steps of a run.

    Args:
        steps (sequence, *optional*): indices (`int`, 0 is the first step, at pure
            noise) or fractions of the run (`float` in [0, 1)). None takes five from 20
            to 80 %.
        num_steps (`int`): of the run.

    Returns:
        `list[int]`: indices, sorted, each once.

    Raises:
        ConfigError: an index outside the run, or a fraction outside [0, 1).
    """
    check_schedule(steps)
    chosen = DEFAULT_FRACTIONS if steps is None else steps
    indices = [
        min(int(s * num_steps + 1e-9), num_steps - 1) if isinstance(s, float) else int(s)
        for s in chosen
    ]
    outside = [s for s in indices if s >= num_steps]
    if outside:
        raise ConfigError(
            "resample_steps",
            f"{outside[0]} lies outside the run of {num_steps} steps (0 to {num_steps - 1})",
        )
    return sorted(set(indices))


def check_temperatures(
    potential: str, temperatures: Sequence[float] | None, scored: int
) -> list[float] | None:
    """Check the temperatures of ``tempered``, or choose them.

    Args:
        potential (`str`): one of `POTENTIALS`.
        temperatures (sequence of `float`, *optional*): None rises evenly to 1.
        scored (`int`): scored steps.

    Returns:
        `list[float]` or `None`: one per scored step. None for other potentials.

    Raises:
        ConfigError: another number than that of the scored steps.
    """
    if potential != "tempered":
        return None
    if temperatures is None:
        return [(j + 1) / scored for j in range(scored)]
    if len(temperatures) != scored:
        raise ConfigError(
            "temperatures", f"expected one per scored step ({scored}), got {len(temperatures)}"
        )
    return list(temperatures)
