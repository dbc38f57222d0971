"""``diffalign doctor``: do the scorers on this machine give the numbers they should?

There are three kinds of checks: *shapes-clip* on drawn images against stored values,
every neural scorer on its tiny random checkpoint against the numbers that the published
code gave on it, and published weights, where they are on this machine, against the few
numbers that their authors made public.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UserError
from ...runtime.protocols import DeviceLike

REFERENCE = Path(__file__).parent / "reference.json"

# Public numbers: files as the authors' repositories have them, the prompt, the values,
# and how far they may be off. The authors' GPU ran ImageReward in float32 and HPSv2
# under float16 autocast, on JPEG and WebP decoders of their time.
PUBLIC: dict[str, dict[str, Any]] = {
    "imagereward": {
        "files": ["1.webp", "2.webp", "3.webp", "4.webp"],
        "prompt": "a painting of an ocean with clouds and birds, day time, low depth field effect",
        "values": [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492],
        "tolerance": 0.02,
        "source": "ImageReward's README, assets/images",
    },
    "hpsv2.1": {
        "files": ["demo_image.jpg"],
        "prompt": "cat with horn",
        "values": [0.288],
        "tolerance": 0.005,
        "source": "HPSv2's issue 30, assets/demo_image.jpg; environment unknown",
    },
}


@dataclass
class Finding:
    """One line of the report."""

    scorer: str
    check: str
    ok: bool | None
    """None where there was nothing to compare with."""
    detail: str


def examine(
    scorers: str | None = None,
    *,
    models: Sequence[str] = (),
    tokenizers: Sequence[str] = (),
    assets: Path | None = None,
    device: DeviceLike = None,
) -> Iterator[Finding]:
    """Check scorers against known numbers, one finding after another.

    Args:
        scorers (`str`, *optional*): names with commas between. Defaults to all.
        models, tokenizers (`Sequence[str]`, *optional*): NAME=PATH of published
            weights, and of tokenizers that lie elsewhere.
        assets (`Path`, *optional*): folder with the authors' example images.
        device (*optional*): as for `load_scorer`.

    Raises:
        UserError: unknown scorer names or malformed NAME=PATH.
    """
    from .. import registry

    names = [name.strip() for name in scorers.split(",")] if scorers else None
    keys = [registry.get_spec(name).key for name in names] if names else None
    weights, folders = _pairs(models, "--model"), _pairs(tokenizers, "--tokenizer")
    stored = json.loads(REFERENCE.read_text("utf-8"))
    for key, expected in stored.items():
        if keys is None or key in keys:
            yield _compare_stored(key, expected, device)
    for key in registry._BUILT_IN:
        if (keys is None or key in keys) and (
            key in weights or (_is_cached(key) and key not in ("shapes", "shapes-clip"))
        ):
            yield from _published(key, weights.get(key), folders.get(key), assets, device)
    missing = [
        key for key in (keys or registry._BUILT_IN) if key not in stored and key not in weights
    ]
    for key in missing:
        yield Finding(
            key,
            "stored values",
            None,
            "none: it has no fixed numbers or needs its own server, detector or weights",
        )


def _pairs(values: Sequence[str], field: str) -> dict[str, str]:
    from .. import registry

    paths = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"{field}: expected NAME=PATH, got {text!r}")
        paths[registry.get_spec(name).key] = path
    return paths


def _compare_stored(key: str, expected: Mapping[str, Any], device: DeviceLike) -> Finding:
    """Compare the scorer on the stored images and prompts."""
    check = f"against {expected['source']}"
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # Some of the prompts are longer than the scorers read, on purpose.
            warnings.simplefilter("ignore", UserWarning)
            scores = stored_scores(key, expected, Path(folder), device)
    except Exception as error:  # a report goes on where a scorer breaks
        return Finding(
            key, check, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
    differences = [abs(a - b) for a, b in zip(scores, expected["values"], strict=True)]
    largest = math.nan if any(math.isnan(d) for d in differences) else max(differences)
    detail = (
        f"{len(differences)} values, largest difference {largest:.1e}, "
        f"allowed {expected['tolerance']:.0e}"
    )
    return Finding(key, check, largest <= expected["tolerance"], detail)


def stored_scores(
    key: str, expected: Mapping[str, Any], folder: Path, device: DeviceLike = None
) -> list[float]:
    """Score the images and prompts that `expected` names.

    It uses the embedded weights or the tiny checkpoint.

    Args:
        key (`str`): of the scorer.
        expected (mapping): entry of reference.json, with `pairs` and maybe `options`.
        folder (`Path`): where the tiny checkpoint is written.
        device (*optional*): as for `load_scorer`.
    """
    from ..registry import load_scorer
    from . import reference

    drawn = key.startswith("shapes")
    images = reference.drawn_images(reference.SCENES) if drawn else reference.sample_images()
    prompts = reference.SCENES if drawn else reference.PROMPTS
    scorer = load_scorer(
        key,
        device=device,
        **({} if drawn else reference.arguments(key, folder)),
        **expected.get("options", {}),
    )
    return scorer(
        [images[i] for i, _ in expected["pairs"]], [prompts[j] for _, j in expected["pairs"]]
    ).tolist()


def _is_cached(key: str) -> bool:
    """Return whether the published weights lie in the Hub's cache.

    Nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    from .. import registry

    spec = registry.get_spec(key)
    if spec.weights is None or spec.weights.startswith("https://"):
        return False
    path = try_to_load_from_cache(
        spec.weights, spec.filename or "model.safetensors", revision=spec.revision
    )
    return isinstance(path, str)


def _published(
    key: str, model: str | None, tokenizer: str | None, assets: Path | None, device: DeviceLike
) -> Iterator[Finding]:
    """Check published weights.

    They load, their scores lie where they usually do, and they reproduce the public
    numbers.
    """
    from ...runtime.hashing import content_hash
    from ..registry import load_scorer
    from . import reference

    try:
        scorer = load_scorer(key, model=model, tokenizer=tokenizer, device=device)
    except Exception as error:  # also what a library raises on a broken file
        yield Finding(
            key,
            "published weights",
            False,
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        )
        return
    spec = scorer.spec
    if spec.sha256 is not None and model is not None and Path(model).is_file():
        same = content_hash(Path(model)) == spec.sha256
        yield Finding(
            key,
            "SHA-256",
            same,
            "the published file"
            if same
            else f"not the published file, whose digest is {spec.sha256}",
        )
    images = reference.drawn_images(reference.SCENES)
    scores = scorer(images, reference.SCENES)
    span = f"{float(scores.min()):.3f} to {float(scores.max()):.3f}"
    usual = (
        f"; usual are {spec.range[0]:g} to {spec.range[1]:g} on generated images"
        if spec.range
        else ""
    )
    yield Finding(key, "drawn images", bool(scores.isfinite().all()), f"scores from {span}{usual}")
    public = PUBLIC.get(key)
    if public is None:
        return
    files = [_find(assets, name) for name in public["files"]] if assets else [None]
    if any(file is None for file in files):
        yield Finding(
            key,
            "public numbers",
            None,
            f"not compared: give --assets with {', '.join(public['files'])} ({public['source']})",
        )
        return
    values = scorer([str(file) for file in files], [public["prompt"]] * len(files)).tolist()
    largest = max(abs(a - b) for a, b in zip(values, public["values"], strict=True))
    listed = ", ".join(f"{value:.4f}" for value in values)
    yield Finding(
        key,
        f"public numbers ({public['source']})",
        largest <= public["tolerance"],
        f"{listed}; largest difference {largest:.4f}, allowed {public['tolerance']}",
    )


def _find(folder: Path, name: str) -> Path | None:
    if not folder.is_dir():
        raise ConfigError("--assets", f"there is no folder {str(folder)!r}")
    return next(iter(sorted(folder.rglob(name))), None)
