"""Embeddings of images and prompts by the base, and nuisances of images, cached."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.cache import TensorCache
from ..errors import ConfigError, UserError
from ..rewards.scorers.trained import base_fingerprint
from ..runtime.hashing import text_hash
from ..runtime.progress import track
from .judgements import Judgements

NUISANCES = ("brightness", "contrast", "saturation", "sharpness", "file size", "resolution")
_BATCH = 32


@dataclass
class Features:
    """What a head reads of all images and prompts.

    Attributes:
        image (`Tensor`): Unit embeddings, (images, d).
        text (`Tensor`): Unit embeddings, (prompts, d).
        nuisances (`Tensor`): Standardised, (images, 6).
    """

    image: Tensor
    text: Tensor
    nuisances: Tensor


def check_base(scorer: Any) -> None:
    """Check that a scorer has one embedding per image and per prompt.

    Raises:
        ConfigError: It has none.
    """
    if not hasattr(scorer, "clip"):
        raise ConfigError(
            "model",
            f"{scorer.name} has no CLIP towers; take clip-l14, clip-h14, pickscore, hpsv2.1, "
            "open_clip:NAME/TAG or shapes-clip",
        )


@torch.no_grad()
def embed(scorer: Any, judgements: Judgements, cache: Path | None) -> Features:
    """Embed all images and prompts, or read their embeddings from the cache.

    Args:
        scorer: A CLIP scorer.
        judgements (`Judgements`): Images and prompts.
        cache (`Path`, *optional*): Folder of the cache. None keeps nothing.

    Raises:
        UserError: An embedding is not finite, or an image cannot be read.
    """
    image_cache = text_cache = None
    if cache is not None:  # only then, because it reads all weights
        precision = str(scorer.dtype).removeprefix("torch.")
        key = f"{base_fingerprint(scorer)[:16]}-{precision}"
        image_cache, text_cache = (
            TensorCache(cache / f"{kind}-{key}") for kind in ("images", "texts")
        )
    images = _filled(
        image_cache,
        judgements.images,
        lambda rows: _image_rows(scorer, [judgements.open(i) for i in rows]),
        "embedding images",
    )
    texts = _filled(
        text_cache,
        [text_hash(prompt) for prompt in judgements.prompts],
        lambda rows: [
            {"text": row}
            for row in scorer.text_features([judgements.prompts[i] for i in rows])[0].float().cpu()
        ],
        "embedding prompts",
    )
    features = Features(
        torch.stack([row["image"] for row in images]).double(),
        torch.stack([row["text"] for row in texts]).double(),
        _standardised(torch.stack([row["nuisances"] for row in images]).double()),
    )
    for name, values in (("image", features.image), ("prompt", features.text)):
        broken = (~values.isfinite().all(1)).nonzero()
        if len(broken):
            index = int(broken[0])
            what = judgements.images[index] if name == "image" else judgements.prompts[index]
            raise UserError(f"the embedding of the {name} {what[:60]!r} is not finite")
    return features


def _filled(
    cache: TensorCache | None, keys: list[str], compute: Any, text: str
) -> list[dict[str, Tensor]]:
    known: dict[int, dict[str, Tensor]] = {}
    if cache is not None:
        known = {i: cache[key] for i, key in enumerate(keys) if key in cache}
    missing = [i for i in range(len(keys)) if i not in known]
    starts = range(0, len(missing), _BATCH)
    for start in track(starts, desc=text, unit="batch", disable=len(starts) < 4):
        rows = missing[start : start + _BATCH]
        for i, entry in zip(rows, compute(rows), strict=True):
            known[i] = entry
            if cache is not None:
                cache.add(keys[i], entry)
    if cache is not None:
        cache.flush()
    return [known[i] for i in range(len(keys))]


def _image_rows(scorer: Any, images: list[Image.Image]) -> list[dict[str, Tensor]]:
    rows = scorer.embed(images)
    return [
        {"image": row, "nuisances": nuisances(image)}
        for row, image in zip(rows, images, strict=True)
    ]


def _standardised(values: Tensor) -> Tensor:
    deviation = values.std(0, correction=0)
    scaled = (values - values.mean(0)) / deviation.clamp(min=1e-9)
    scaled[:, deviation < 1e-9] = 0
    return scaled


def pair_nuisances(part: Judgements) -> Tensor:
    """Differences of the nuisances in pairs, (n, 6).

    Args:
        part (`Judgements`): The pairs.
    """
    used = np.unique(np.concatenate([part.first, part.second]))
    rows = [
        nuisances(part.open(int(index)))
        for index in track(used, desc="nuisances", unit="image", leave=False)
    ]
    table = torch.zeros(len(part.images), len(NUISANCES), dtype=torch.float64)
    table[torch.from_numpy(used)] = _standardised(torch.stack(rows).double())
    return table[torch.from_numpy(part.first)] - table[torch.from_numpy(part.second)]


def nuisances(image: Image.Image) -> Tensor:
    """Measure what should not decide about an image.

    Args:
        image (`PIL.Image.Image`): The image.

    Returns:
        `Tensor`: Mean luminance, its standard deviation, mean saturation, log variance
        of the Laplacian, log bytes as JPEG of quality 90, and log pixels, (6,).
    """
    rgb = image.convert("RGB")
    pixels = np.asarray(rgb, dtype=np.float64) / 255
    luminance = pixels @ np.array([0.2126, 0.7152, 0.0722])
    saturation = pixels.max(-1) - pixels.min(-1)
    inner = luminance[1:-1, 1:-1]
    laplacian = (
        luminance[:-2, 1:-1] + luminance[2:, 1:-1] + luminance[1:-1, :-2] + luminance[1:-1, 2:]
    ) - 4 * inner
    buffer = io.BytesIO()
    rgb.save(buffer, "jpeg", quality=90)
    sharpness = np.log(laplacian.var() + 1e-6) if laplacian.size else 0.0
    values = [
        luminance.mean(),
        luminance.std(),
        saturation.mean(),
        sharpness,
        np.log(len(buffer.getvalue())),
        np.log(pixels.shape[0] * pixels.shape[1]),
    ]
    return torch.tensor(values, dtype=torch.float32)
