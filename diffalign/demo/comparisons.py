"""Keep every comparison that was drawn, so that a link can show it again."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..generation.grids import comparison_grid
from ..runtime.decoding import UnreadableImage, decode
from ..runtime.files import check_output_dir, make_folder, save_image, write_atomically
from ..runtime.hashing import bytes_hash
from ..runtime.text_files import read_json

MOST = 500
"""Comparisons that are kept. The oldest one makes room for a new one."""

MARKER = "gallery.json"
"""File by which the folder is known."""

_ID = re.compile(r"[0-9a-f]{16}")
_SIDES = ("left", "right")
_THUMBNAIL = 192


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison shows.

    Attributes:
        prompt (`str`): The prompt.
        seed (`int`): The seed of both images.
        steps (`int`): Sampler steps.
        guidance (`float`): Guidance scale.
        side (`int`): Height and width in pixels.
        left (`str`): Name of the left model.
        right (`str`): Name of the right model.
        lora_scale (`float`): Strength of LoRAs.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    side: int
    left: str
    right: str
    lora_scale: float

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits: the same settings have the same link."""
        return bytes_hash(json.dumps(asdict(self), sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Comparison:
    """A comparison that was drawn.

    Attributes:
        settings (`Settings`): What was asked for.
        scores (`Mapping[str, Sequence[float | None]]`): Scorer -> score of the left and
            of the right image.
        time (`float`): When it was drawn, in seconds since 1970.
    """

    settings: Settings
    scores: Mapping[str, Sequence[float | None]]
    time: float


class ComparisonStore:
    """A folder with a JSON file and three pictures for every comparison.

    Args:
        folder (`Path`): The folder. It is created with the first comparison.
        most (`int`, *optional*, defaults to `MOST`): Comparisons to keep.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        check_output_dir(folder, MARKER, "--gallery_dir")
        self.folder, self.most = folder, most
        self._lock = threading.Lock()

    def add(
        self,
        settings: Settings,
        images: Sequence[Image.Image],
        scores: Mapping[str, Sequence[float | None]],
    ) -> str:
        """Store a comparison. One with the same settings is replaced.

        Args:
            settings (`Settings`): What was asked for.
            images (`Sequence[PIL.Image.Image]`): The left and the right image.
            scores (`Mapping[str, Sequence[float | None]]`): Scorer -> two scores.

        Returns:
            `str`: Its id, for links.
        """
        left, right = images
        grid = comparison_grid(
            [(settings.prompt, [left], [right])],
            left=settings.left,
            right=settings.right,
            cell=_THUMBNAIL,
        )
        record = {
            "settings": asdict(settings),
            "scores": {name: list(values) for name, values in scores.items()},
            "time": round(time.time(), 3),
        }
        with self._lock:
            make_folder(self.folder, "--gallery_dir")
            write_atomically(self.folder / MARKER, b'{"format": 1}\n')
            for side, image in zip((*_SIDES, "both"), (left, right, grid), strict=True):
                save_image(image, self._picture(settings.id, side))
            # The record comes last, so a comparison that is listed has its pictures.
            text = json.dumps(record, ensure_ascii=False)
            write_atomically(self._record(settings.id), text.encode())
            self._make_room()
        return settings.id

    def newest(self, count: int) -> list[tuple[str, Comparison]]:
        """Return the ids and records of the newest comparisons, the newest first.

        Args:
            count (`int`): How many at most.
        """
        newest = sorted(self._records(), key=_changed, reverse=True)[:count]
        ids = [path.stem.partition("-")[2] for path in newest]
        return [(id, record) for id in ids if (record := self.get(id)) is not None]

    def get(self, id: str) -> Comparison | None:
        """Return a comparison, or None when there is none or its record is damaged.

        Args:
            id (`str`): Its id.
        """
        if not _ID.fullmatch(id):
            return None
        try:
            record = read_json(self._record(id), dict)
            settings = Settings(**record["settings"])
            for field in fields(Settings):
                if type(getattr(settings, field.name)).__name__ != field.type:
                    return None
            return Comparison(settings, dict(record["scores"]), float(record["time"]))
        except (UserError, TypeError, KeyError, ValueError):
            return None

    def images(self, id: str) -> tuple[Image.Image, Image.Image] | None:
        """Return the left and the right image, or None when they are gone.

        Args:
            id (`str`): Id of the comparison.
        """
        left, right = (self._read_picture(id, side) for side in _SIDES)
        return None if left is None or right is None else (left, right)

    def thumbnail(self, id: str) -> Image.Image | None:
        """Return the picture of both images with their prompt, or None.

        Args:
            id (`str`): Id of the comparison.
        """
        return self._read_picture(id, "both")

    def _read_picture(self, id: str, side: str) -> Image.Image | None:
        try:
            return decode(self._picture(id, side))
        except UnreadableImage:
            return None

    def _record(self, id: str) -> Path:
        return self.folder / f"comparison-{id}.json"

    def _picture(self, id: str, side: str) -> Path:
        return self.folder / f"comparison-{id}-{side}.png"

    def _records(self) -> list[Path]:
        return list(self.folder.glob("comparison-*.json")) if self.folder.is_dir() else []

    def _make_room(self) -> None:
        for path in sorted(self._records(), key=_changed)[: -self.most]:
            path.unlink(missing_ok=True)
            for picture in self.folder.glob(f"{path.stem}-*.png"):
                picture.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0
