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
from ..rewards.scorers.clip import ClipScorer
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
        joint (`Tensor`, *optional*): Numbers of the images and prompts that a base
            embeds together, ascending, (rows,). `image` has these rows then, and `text`
            no columns.
    """

    image: Tensor
    text: Tensor
    nuisances: Tensor
    joint: Tensor | None = None

    def of(self, image: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a head reads of some images with their prompts.

        Args:
            image (`Tensor`): Indices of images, (n,).
            prompt (`Tensor`): Indices of prompts, (n,).

        Returns:
            `tuple[Tensor, Tensor]`: Rows of `image` and of `text`, (n, d) each.
        """
        if self.joint is not None:
            rows = torch.searchsorted(self.joint, image * len(self.text) + prompt)
            return self.image[rows], self.text[prompt]
        return self.image[image], self.text[prompt]


def check_base(scorer: Any, head: str = "bradley_terry") -> None:
    """Check that a head can read the embeddings of a scorer.

    Args:
        scorer: The base, or its class.
        head (`str`): Kind of the head. pal compares images with prompts, so that they
            need embeddings of their own.

    Raises:
        ConfigError: It cannot.
    """
    kind = scorer if isinstance(scorer, type) else type(scorer)
    is_joint = hasattr(kind, "joint_features")
    if not issubclass(kind, ClipScorer) and not (is_joint and head != "pal"):
        others = "" if head == "pal" else ", imagereward"
        raise ConfigError(
            "model",
            f"{scorer.spec.key} has no embeddings that a {head} head can read; take clip-l14, "
            f"clip-h14, pickscore, hpsv2.1, open_clip:NAME/TAG{others} or shapes-clip",
        )


@torch.no_grad()
def embed(scorer: Any, judgements: Judgements, cache: Path | None) -> Features:
    """Embed all images and prompts, or read their embeddings from the cache.

    Args:
        scorer: A CLIP scorer, or one with `joint_features`.
        judgements (`Judgements`): Images and prompts.
        cache (`Path`, *optional*): Folder of the cache. None keeps nothing.

    Raises:
        UserError: An embedding is not finite, or an image cannot be read.
    """
    if hasattr(scorer, "joint_features"):
        return _embed_jointly(scorer, judgements, cache)
    image_cache, text_cache = _caches(scorer, cache, "images", "texts")
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
            raise UserError(
                f"data: the embedding of the {name} {what[:60]!r} is not finite; leave it out"
            )
    return features


def _embed_jointly(scorer: Any, judgements: Judgements, cache: Path | None) -> Features:
    data, opinions = judgements, judgements.opinions
    pairs = np.unique(
        np.concatenate(
            [
                images * len(data.prompts) + prompts
                for images, prompts in (
                    (data.first, data.prompt),
                    (data.second, data.prompt),
                    (opinions.image, opinions.prompt),
                )
            ]
        )
    )
    images, prompts = np.divmod(pairs, len(data.prompts))
    names = [text_hash(prompt) for prompt in data.prompts]

    def of_pairs(rows: list[int]) -> list[dict[str, Tensor]]:
        shown = scorer.image_rows([data.open(int(images[i])) for i in rows]).to(scorer.device)
        text_features = scorer.text_features([data.prompts[prompts[i]] for i in rows])
        joint = scorer.joint_features(shown.to(scorer.dtype), text_features)
        return [{"joint": row} for row in joint.float().cpu()]

    pair_cache, nuisance_cache = _caches(scorer, cache, "joint", "nuisances")
    joint = _filled(
        pair_cache,
        [f"{data.images[a]}-{names[b]}" for a, b in zip(images, prompts, strict=True)],
        of_pairs,
        "embedding images with their prompts",
    )
    values = _filled(
        nuisance_cache,
        data.images,
        lambda rows: [{"nuisances": nuisances(data.open(i))} for i in rows],
        "nuisances",
    )
    table = torch.stack([row["joint"] for row in joint]).double()
    broken = (~table.isfinite().all(1)).nonzero()
    if len(broken):
        prompt = data.prompts[prompts[int(broken[0])]]
        raise UserError(
            f"data: the embedding of an image of the prompt {prompt[:60]!r} is not finite; leave "
            "it out"
        )
    return Features(
        table,
        table.new_empty(len(data.prompts), 0),
        _standardised(torch.stack([row["nuisances"] for row in values]).double()),
        torch.from_numpy(pairs),
    )


def _caches(scorer: Any, cache: Path | None, *kinds: str) -> list[TensorCache | None]:
    """A cache of each kind. Without a folder none, and no weights are read."""
    if cache is None:
        return [None for _ in kinds]
    precision = str(scorer.dtype).removeprefix("torch.")
    key = f"{base_fingerprint(scorer)[:16]}-{precision}"
    return [TensorCache(cache / f"{kind}-{key}") for kind in kinds]


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
            # What is not finite is an error, which must not come back from the cache.
            finite = all(bool(tensor.isfinite().all()) for tensor in entry.values())
            if cache is not None and finite:
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
