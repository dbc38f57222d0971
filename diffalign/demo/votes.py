"""Votes that survive whatever happens next: a line of JSON on disk before the visitor sees the next pair."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.statistics import WinRate, clustered_bootstrap
from ..exceptions import UserError
from ..folders import check_output_dir, replacing, write_atomically

VOTES = "votes.jsonl"
CHOICES = ("left", "right", "tie")
ANNOTATOR_CHARS = 40


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, sides shuffled.

    Attributes:
        id: unguessable.
        prompt: of both.
        images: left and right.
        sides: what is left and right, never shown before the vote: model names, or image ids of a round.
        facts: kept with the vote (seed, settings).
    """

    id: str
    prompt: str
    images: tuple[Image.Image, Image.Image]
    sides: tuple[str, str]
    facts: Mapping[str, Any]


def read_annotator(text: Any) -> str:
    """A name of at most 40 harmless characters; empty means anonymous."""
    return re.sub(r"[^\w .@-]", "", str(text or ""))[:ANNOTATOR_CHARS].strip()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The votes of a file; a line torn by a crash is left out."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class VoteStore:
    """``votes.jsonl`` and ``images/`` in a folder.

    Args:
        folder: created with the first vote; one that holds something else is refused.

    Raises:
        UserError: see above.
    """

    def __init__(self, folder: Path) -> None:
        check_output_dir(folder, VOTES)
        self._open(folder, VOTES)

    def _open(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / name
        self._lock = threading.Lock()
        self.votes = read_lines(self.file)
        self._known = {vote["id"] for vote in self.votes if "id" in vote}

    def add(self, pair: Pair, choice: str, annotator: Any) -> bool:
        """Writes a vote durably; False if this pair has one already.

        Raises:
            UserError: a choice that is none.
        """
        if choice not in CHOICES:
            raise UserError(f"vote: expected {', '.join(CHOICES)}, got {str(choice)[:40]!r}")
        with self._lock:
            if pair.id in self._known:
                return False
            vote = self._record(pair, choice, read_annotator(annotator))
            self.folder.mkdir(parents=True, exist_ok=True)
            line = json.dumps(vote, ensure_ascii=False)
            torn = self.file.is_file() and self.file.stat().st_size > 0 and not self._ends_well()
            with self.file.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.votes.append(vote)
            self._known.add(pair.id)
        return True

    def _ends_well(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _record(self, pair: Pair, choice: str, annotator: str) -> dict[str, Any]:
        names = [self._keep(image) for image in pair.images]
        return {
            "id": pair.id,
            "time": round(time.time(), 3),
            "annotator": annotator,
            "prompt": pair.prompt,
            "left": pair.sides[0],
            "right": pair.sides[1],
            "vote": choice,
            "left_image": names[0],
            "right_image": names[1],
            **pair.facts,
        }

    def _keep(self, image: Image.Image) -> str:
        """An image under the name of its content, there before the vote that speaks of it."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{hashlib.sha256(buffer.getvalue()).hexdigest()[:24]}.png"
        if not (self.folder / name).is_file():
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, buffer.getvalue())
        return name

    def rate(self, base: str, tuned: str) -> tuple[int, WinRate]:
        """(votes on this pair of models, win-rate of `tuned`); the interval counts prompts, not votes."""
        points: dict[str, list[float]] = {}
        with self._lock:
            votes = [vote for vote in self.votes if {vote.get("left"), vote.get("right")} == {base, tuned}]
        for vote in votes:
            won = vote.get(vote["vote"]) if vote["vote"] != "tie" else None
            points.setdefault(vote["prompt"], []).append(0.5 if won is None else float(won == tuned))
        every = np.array([p for own in points.values() for p in own])
        if not len(every):
            return 0, WinRate(*[math.nan] * 6)
        low, high = clustered_bootstrap(np.array([[np.mean(own)] for own in points.values()]), samples=2000)
        shares = [float((every == value).mean()) for value in (1.0, 0.5, 0.0)]
        return len(every), WinRate(float(every.mean()), low, high, *shares)

    def export(self, path: Path) -> int:
        """Writes the decided votes as preference pairs that `diffalign train` reads; returns how many.

        Raises:
            UserError: there is none.
        """
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        with self._lock:
            decided = [vote for vote in self.votes if vote["vote"] in ("left", "right")]
        if not decided:
            raise UserError("votes: nobody has preferred an image yet; ties teach nothing")
        rows: dict[str, list[Any]] = {
            "prompt": [],
            "chosen": [],
            "rejected": [],
            "annotator": [],
            "chosen_model": [],
            "rejected_model": [],
        }
        for vote in decided:
            won, lost = ("left", "right") if vote["vote"] == "left" else ("right", "left")
            rows["prompt"].append(vote["prompt"])
            for column, side in (("chosen", won), ("rejected", lost)):
                rows[column].append({"bytes": (self.folder / vote[f"{side}_image"]).read_bytes(), "path": None})
                rows[f"{column}_model"].append(vote[side])
            rows["annotator"].append(vote["annotator"])
        texts = {name: Value("string") for name in ("prompt", "annotator", "chosen_model", "rejected_model")}
        features = Features({**texts, "chosen": ImageFeature(), "rejected": ImageFeature()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Dataset.from_dict(rows, features=features).to_parquet(temporary)
        return len(decided)


class RoundVotes(VoteStore):
    """Votes on the images of a round that a run with ``train.feedback: people`` waits for, beside its manifest.

    Args:
        folder: ``<output_dir>/feedback/round-NNNN``.

    Raises:
        UserError: no round.
    """

    def __init__(self, folder: Path) -> None:
        from ..training.feedback import MANIFEST

        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"--feedback: {str(folder)!r} holds no round of images; start the run with diffalign feedback collect"
            )
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        self.groups: Sequence[Mapping[str, Any]] = manifest["groups"]
        self._open(folder, "votes-demo.jsonl")

    def _record(self, pair: Pair, choice: str, annotator: str) -> dict[str, Any]:
        """As `training.feedback.read_votes` reads it."""
        said = {"left": "a", "right": "b", "tie": "tie"}[choice]
        facts = {"id": pair.id, "time": round(time.time(), 3), "annotator": annotator}
        return {**facts, "image_a": pair.sides[0], "image_b": pair.sides[1], "preference": said, "prompt": pair.prompt}

    def next(self, annotator: Any, rng: random.Random) -> Pair | None:
        """A pair that this annotator has not judged, of those with the fewest votes; None when there is none left."""
        who = read_annotator(annotator)
        with self._lock:
            votes = [(frozenset((v["image_a"], v["image_b"])), v["annotator"]) for v in self.votes]
        mine = {pair for pair, name in votes if name == who}
        count: dict[frozenset[str], int] = {}
        for pair, _ in votes:
            count[pair] = count.get(pair, 0) + 1
        open_pairs = [
            (group, a, b)
            for group in self.groups
            for i, a in enumerate(group["images"])
            for b in group["images"][i + 1 :]
            if frozenset((a["id"], b["id"])) not in mine
        ]
        if not open_pairs:
            return None
        fewest = min(count.get(frozenset((a["id"], b["id"])), 0) for _, a, b in open_pairs)
        group, *sides = rng.choice([p for p in open_pairs if count.get(frozenset((p[1]["id"], p[2]["id"])), 0) == fewest])
        rng.shuffle(sides)
        images = tuple(Image.open(self.folder / side["file"]).convert("RGB") for side in sides)
        return Pair(f"{rng.getrandbits(64):016x}", group["prompt"], images, (sides[0]["id"], sides[1]["id"]), {})  # type: ignore[arg-type]
