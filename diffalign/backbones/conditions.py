"""Conditions of a network as dictionaries of tensors, also of prompts of many lengths.

Most families encode every prompt into as many tokens. Others, called ragged here, give
each prompt the tokens that it has. A batch of these is padded with zeros to its longest
row, and `MASK` says which tokens are real. Caches keep the rows without padding, so a
batch never depends on what else was encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MASK = "prompt_mask"
"""Which tokens of the ragged conditions are real, (n, tokens) bool."""


def padded(tensor: Tensor, length: int) -> Tensor:
    """Pad (n, tokens, ...) with zeros to a number of tokens.

    Args:
        tensor (`Tensor`): (n, tokens, ...).
        length (`int`): at least the tokens there are.
    """
    missing = length - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)


def stack_ragged(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows of different lengths and stack them.

    Args:
        rows (sequence of `Tensor`): n of them, (tokens, ...) each.

    Returns:
        `tuple[Tensor, Tensor]`: (n, longest, ...), and which tokens are real, (n,
        longest) bool.
    """
    longest = max(len(row) for row in rows)
    values = torch.cat([padded(row[None], longest) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=values.device)
    return values, torch.arange(longest, device=values.device) < lengths[:, None]


def split_rows(
    condition: Mapping[str, Tensor], ragged: Sequence[str] = ()
) -> list[dict[str, Tensor]]:
    """Take the rows of a condition apart, without their padding.

    Args:
        condition (`Mapping[str, Tensor]`): n rows each.
        ragged (sequence of `str`, *optional*): names whose rows `MASK` cuts.

    Returns:
        `list[dict[str, Tensor]]`: n of them, without `MASK`.
    """
    names = [name for name in condition if name != MASK]
    rows = []
    for i in range(len(condition[names[0]])):
        row = {name: condition[name][i] for name in names}
        for name in ragged:
            row[name] = row[name][condition[MASK][i]]
        rows.append(row)
    return rows


def stack_rows(
    rows: Sequence[Mapping[str, Tensor]], ragged: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Undo `split_rows`, padding to the longest of these rows.

    Args:
        rows (sequence of `Mapping[str, Tensor]`): n of them.
        ragged (sequence of `str`, *optional*): names whose rows have lengths of their
            own.

    Returns:
        `dict[str, Tensor]`: n rows each, with `MASK` where some are ragged.
    """
    condition: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in ragged:
            condition[name], condition[MASK] = stack_ragged(values)
        else:
            condition[name] = torch.stack(values)
    return condition


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the rows of two conditions into one, padding the shorter prompts.

    Args:
        first, second (`Mapping[str, Tensor]`): n and m rows each, of the same names.

    Returns:
        `dict[str, Tensor]`: n + m rows each.
    """
    both = {}
    for name in second:
        parts = first[name], second[name]
        if MASK in second and parts[0].ndim > 1:
            longest = max(part.shape[1] for part in parts)
            parts = padded(parts[0], longest), padded(parts[1], longest)
        both[name] = torch.cat(parts)
    return both


def cast(condition: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the numbers of a condition. Masks and token ids stay as they are.

    Args:
        condition (`Mapping[str, Tensor]`): n rows each.
        dtype (`torch.dtype`): of the numbers.
    """
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in condition.items()
    }
