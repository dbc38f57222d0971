"""Thumbs up and down on single images, as data for Diffusion-KTO."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..runtime.files import replacing
from .answers import AnswerStore
from .votes import LIKES, VOTES

THUMBS = ("up", "down")


@dataclass(frozen=True)
class Shown:
    """An image that waits for a thumb.

    Attributes:
        id (`str`): An id that nobody can guess.
        prompt (`str`): Its prompt.
        image (`PIL.Image.Image`): The image.
        model (`str`): Name of the model that drew it. It is never shown.
        facts (`Mapping[str, Any]`): What is stored with the thumb (seed, settings).
    """

    id: str
    prompt: str
    image: Image.Image
    model: str
    facts: Mapping[str, Any]


class LikeStore(AnswerStore):
    """Store thumbs in a folder, as `likes.jsonl` and `images/`.

    The folder may be that of a `VoteStore`.

    Args:
        folder (`Path`): The folder. It is created with the first thumb.

    Raises:
        UserError: The folder holds something else.
    """

    file_name = LIKES
    choices = THUMBS
    siblings = (VOTES, LIKES)

    def _fault(self, entry: Any) -> str | None:
        reason = self._common_fault(entry, ("prompt", "model"), ("image",))
        if reason is None and not isinstance(entry.get("label"), bool):
            return f"label is {str(entry.get('label'))[:40]!r}, expected true or false"
        return reason

    def _record(self, shown: Shown, choice: str, annotator: str) -> dict[str, Any]:
        return {
            "id": shown.id,
            "time": round(time.time(), 3),
            "annotator": annotator,
            "prompt": shown.prompt,
            "model": shown.model,
            "label": choice == "up",
            "image": self._keep(shown.image),
            **shown.facts,
        }

    def shares(self) -> dict[str, tuple[int, int]]:
        """Count thumbs by model.

        Returns:
            `dict[str, tuple[int, int]]`: Model -> thumbs up, and thumbs.
        """
        counts: dict[str, tuple[int, int]] = {}
        with self._lock:
            for line in self.votes:
                up, total = counts.get(line["model"], (0, 0))
                counts[line["model"]] = up + line["label"], total + 1
        return counts

    def export(self, path: Path) -> int:
        """Write all thumbs as likes and dislikes that `diffalign train` reads.

        Thumbs whose picture is lost or damaged are left out. Their ids are then in
        `lost`.

        Args:
            path (`Path`): The parquet file, with the columns prompt, image, label,
                annotator and model.

        Returns:
            `int`: The number of rows.

        Raises:
            UserError: There is none.
        """
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        with self._lock:
            lines = list(self.votes)
        self.lost: list[str] = []
        rows = []
        for line in lines:
            content = self._picture(line["image"])
            if content is None:
                self.lost.append(line["id"])
                continue
            facts = {name: line[name] for name in ("prompt", "label", "annotator", "model")}
            rows.append(facts | {"image": {"bytes": content, "path": None}})
        if not rows:
            reason = "nobody has given a thumb yet"
            if lines:
                reason = (
                    f"the pictures of all {len(lines)} thumbs are lost or damaged; put "
                    f"{self.folder / 'images'} back"
                )
            raise UserError(f"likes: {reason}")
        texts = {name: Value("string") for name in ("prompt", "annotator", "model")}
        features = Features({**texts, "label": Value("bool"), "image": ImageFeature()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Dataset.from_list(rows, features=features).to_parquet(temporary)
        return len(rows)
