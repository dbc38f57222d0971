"""Latents as the tokens of a transformer.

diffalign keeps latents unpacked, (n, C, h, w). Packing is a permutation, so errors,
log-probabilities and noise streams are the same on either side of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def packed(latents: Tensor, patch: int = 2) -> Tensor:
    """Turn (n, C, h, w) into tokens, (n, h w / patch^2, C patch^2).

    The channels of a token are ordered by latent channel, row and column.
    """
    return pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Undo `packed`.

    Args:
        tokens (`Tensor`): (n, h w / patch^2, C patch^2).
        height, width (`int`): h and w, of the latents.
        patch (`int`, *optional*, defaults to `2`): latent pixels along a token's side.
    """
    grid = tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    return pixel_shuffle(grid, patch)


def position_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of every token, (rows * columns, 3).

    Args:
        rows, columns (`int`): tokens along the sides.
        like (`Tensor`): gives device and dtype.
    """
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1).to(like)
