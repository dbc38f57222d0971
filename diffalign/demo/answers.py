"""Store the answers of visitors, each on disk before the next question."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..runtime.files import check_output_dir, write_atomically
from ..runtime.hashing import bytes_hash
from ..runtime.text_files import BadLine, journal

ANNOTATOR_CHARS = 40
_PICTURE = re.compile(r"images/[0-9a-f]{24}\.png")


def read_annotator(text: object) -> str:
    """Turn a visitor's name into at most 40 harmless characters.

    Args:
        text: The name. Empty means anonymous.
    """
    return re.sub(r"[^\w .@-]", "", str(text or ""))[:ANNOTATOR_CHARS].strip()


class AnswerStore:
    """Lines of JSON in a folder, and the pictures that they name in `images/`.

    A line is on disk before the visitor sees the next picture.

    Args:
        folder (`Path`): The folder. It is created with the first line.

    Attributes:
        file_name (`str`): Name of the file of lines.
        choices (`tuple[str, ...]`): What a visitor may answer.
        votes (`list[dict[str, Any]]`): All lines.
        left_out (`list[BadLine]`): Lines of the file that are no votes, and why.

    Raises:
        UserError: The folder holds something else.
    """

    file_name: str
    choices: tuple[str, ...]
    siblings: tuple[str, ...] = ()
    """Files of other stores that may lie in the same folder."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_file() for name in self.siblings):
            check_output_dir(folder, self.file_name, "--votes_dir")
        self._open(folder, self.file_name)

    def _open(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / name
        self._lock = threading.Lock()
        self.votes: list[dict[str, Any]] = []
        self.left_out: list[BadLine] = []
        self._known: set[str] = set()
        entries, self.left_out = journal(self.file) if self.file.is_file() else ([], [])
        for number, entry in entries:
            reason = self._fault(entry)
            if reason is None:
                self.votes.append(entry)
            else:
                self.left_out.append(BadLine(number, reason))
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                self._known.add(entry["id"])
        if self.left_out:
            first = "; ".join(map(str, sorted(self.left_out, key=lambda line: line.number)[:3]))
            print(
                f"{self.file}: {len(self.votes)} votes; {len(self.left_out)} lines left out "
                f"({first})",
                flush=True,
            )

    def _fault(self, entry: Any) -> str | None:
        """Return why an entry of the file is no line of this store, or None."""
        raise NotImplementedError

    def _common_fault(
        self, entry: object, texts: Sequence[str], pictures: Sequence[str] = ()
    ) -> str | None:
        if not isinstance(entry, dict):
            return "no vote"
        for name in ("id", *texts):
            if not isinstance(entry.get(name), str) or not entry[name]:
                return f"has no {name}"
        if entry["id"] in self._known:
            return f"the vote {entry['id'][:40]!r} stands twice"
        for name in pictures:
            if not isinstance(entry.get(name), str) or not _PICTURE.fullmatch(entry[name]):
                return (
                    f"{name} is {str(entry.get(name))[:60]!r}, which is no picture of this folder"
                )
        entry.setdefault("annotator", "")
        return None if isinstance(entry["annotator"], str) else "annotator is no text"

    def remarks(self) -> str:
        """Return a remark on the lines that are left out, empty if there are none."""
        return f" {len(self.left_out)} lines of the file are left out." if self.left_out else ""

    def add(self, shown: Any, choice: str, annotator: object) -> bool:
        """Write a visitor's answer to the disk.

        Args:
            shown: What was shown. It has an `id`.
            choice (`str`): One of `choices`.
            annotator: The name that the visitor gave.

        Returns:
            `bool`: False if there is an answer to this already.

        Raises:
            UserError: There is no such choice.
        """
        if choice not in self.choices:
            expected = ", ".join(self.choices)
            raise UserError(f"vote: expected {expected}, got {str(choice)[:40]!r}")
        with self._lock:
            if shown.id in self._known:
                return False
            vote = self._record(shown, choice, read_annotator(annotator))
            self.folder.mkdir(parents=True, exist_ok=True)
            line = json.dumps(vote, ensure_ascii=False)
            torn = self.file.is_file() and self.file.stat().st_size > 0 and not self._ends_well()
            with self.file.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.votes.append(vote)
            self._known.add(shown.id)
        return True

    def _ends_well(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _record(self, shown: Any, choice: str, annotator: str) -> dict[str, Any]:
        """Return the line about what was shown, and store its pictures."""
        raise NotImplementedError

    def _keep(self, image: Image.Image) -> str:
        """Store an image under a digest of its content, and return its name.

        It is there before the vote that names it.
        """
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"images/{bytes_hash(buffer.getvalue())[:24]}.png"
        if not (self.folder / name).is_file():
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, buffer.getvalue())
        return name

    def picture(self, name: str) -> Image.Image | None:
        """Return a stored picture, or None when it is gone or was changed.

        Args:
            name (`str`): Its name in a line.
        """
        content = self._picture(name)
        return None if content is None else Image.open(io.BytesIO(content)).convert("RGB")

    def _picture(self, name: str) -> bytes | None:
        """Return a picture's file, or None when it is gone or was changed."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return None
        return content if bytes_hash(content).startswith(Path(name).stem) else None


class Pending:
    """What each visitor sees and has not answered yet.

    It stays on the server, so that no browser learns more than it shows.

    Args:
        most (`int`, *optional*, defaults to `1000`): Visitors to remember.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self._shown: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, visitor: str, shown: Any) -> None:
        """Remember what a visitor sees now.

        Args:
            visitor (`str`): Who sees it.
            shown: It has an `id`. None forgets what was shown before.
        """
        with self._lock:
            self._shown.pop(visitor, None)
            if shown is not None:
                self._shown[visitor] = shown
            while len(self._shown) > self.most:  # forget visitors who left
                self._shown.pop(next(iter(self._shown)))

    def take(self, visitor: str, id: object) -> Any:
        """Return what a visitor answers, once.

        Args:
            visitor (`str`): Who answers.
            id: Of what the visitor saw when they answered.

        Returns:
            What `put` got, or None if the answer is to something else, as after a key
            that was pressed twice.
        """
        with self._lock:
            shown = self._shown.get(visitor)
            return self._shown.pop(visitor) if shown is not None and shown.id == id else None

    def __contains__(self, visitor: str) -> bool:
        with self._lock:
            return visitor in self._shown
