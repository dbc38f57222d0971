"""Let people judge: write out a round's images and wait until their votes are there.

The folder of a round, such as ``feedback/round-0003/``, holds

- ``manifest.json``, the groups of images of one prompt, with an id for every image,
- ``images/`` and ``index.html``, a page to look at them,
- the trajectories of the images, so that training can go on from them at any time.

Votes are any ``votes*.json``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file in
that folder, with a row per comparison. A row has ``image_a``, ``image_b`` and
``preference``, which is ``a``, ``b``, ``tie`` or a number from 1 for a to -1 for b. Or
it has ``chosen`` and ``rejected``. ``annotator`` is optional. Several votes on a pair
are averaged. Pairs without a vote count as ties.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...runtime.files import save_image, save_tensors, write_atomically
from ...runtime.missing import Missing
from ...runtime.templates import render
from ...runtime.text_files import journal, read_json, read_table
from ..batch import Batch
from ..loop import RunPaused
from .rollout import Trajectories
from .source import batch_from, flat_tensors, read_tensors

MANIFEST = "manifest.json"
_WORDS = {"a": 1.0, "b": -1.0, "tie": 0.0, "left": 1.0, "right": -1.0}


class VotesNeeded(RunPaused):
    """Raised when training cannot go on before people have voted."""


@dataclasses.dataclass
class Votes:
    """The votes of a round.

    Attributes:
        preference (`dict`): (image id, image id) -> mean of the votes, 1 for the first
            image, -1 for the second. Both orders of a pair are in it.
        count (`int`): Number of votes that were read.
        annotators (`int`): Number of people, as far as they are named.
        conflicts (`int`): Number of pairs on which votes differ.
        left_out (`int`, defaults to 0): Number of votes that are damaged, or not on two
            images of one prompt of this round.
        reasons (`tuple[str, ...]`): Why, for the first three of them.
    """

    preference: dict[tuple[str, str], float]
    count: int
    annotators: int
    conflicts: int
    left_out: int = 0
    reasons: tuple[str, ...] = ()

    def summary(self) -> str:
        """Say in one line what was read and what was left out."""
        who = f" of {self.annotators} annotators" if self.annotators else ""
        conflict = (
            f"; on {self.conflicts} pairs they differ and are averaged" if self.conflicts else ""
        )
        left_out = (
            f"; {self.left_out} votes left out ({'; '.join(self.reasons)})" if self.left_out else ""
        )
        return f"{self.count} votes{who} on {len(self.preference) // 2} pairs{conflict}{left_out}"


def round_folder(output_dir: Path, number: int) -> Path:
    """Name the folder of a round's images and votes."""
    return output_dir / "feedback" / f"round-{number:04d}"


def group_ids(batch: Batch, index: int, rank: int) -> list[str]:
    """Make an id for every group of a batch, unique in a round.

    Args:
        batch (`Batch`): The groups.
        index (`int`): Number of the batch in the round.
        rank (`int`): Number of the process that drew it.
    """
    return [f"p{rank}-{index}-{i}-row{row}" for i, row in enumerate(batch.row_ids)]


def write_round(
    folder: Path,
    batches: Sequence[Batch],
    trajectories: Sequence[Trajectories],
    rank: int,
    world: int,
    wait: Callable[[], object],
) -> None:
    """Write the images, trajectories and manifest of a round.

    The manifest comes last, so a folder that has one is complete. Missing images, and
    prompts with fewer than two images, are not in it. All processes must call this.

    Args:
        folder (`Path`): Folder of the round.
        batches (`Sequence[Batch]`): The groups that this process drew.
        trajectories (`Sequence[Trajectories]`): What was drawn for each batch.
        rank (`int`): Number of this process.
        world (`int`): Number of processes.
        wait: Function that waits for all processes, such as
            `accelerator.wait_for_everyone`.

    Raises:
        UserError: No prompt has two images. It is raised on all processes.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, (batch, drawn) in enumerate(zip(batches, trajectories, strict=True)):
        for name, prompt, images in zip(
            group_ids(batch, index, rank), batch.prompts, drawn.images, strict=True
        ):
            entries = []
            for i, image in enumerate(images):
                if isinstance(image, Missing):
                    continue
                save_image(image, folder / "images" / f"{name}-{i}.png")
                entries.append({"id": f"{name}-{i}", "file": f"images/{name}-{i}.png"})
            if len(entries) > 1:
                groups.append({"id": name, "prompt": prompt, "images": entries})
        whole = dataclasses.replace(
            batch, extra={"states": drawn.states, "log_probs": drawn.log_probs}
        )
        tensors |= {f"{index}.{name}": value for name, value in flat_tensors(whole).items()}
        plain.append(
            {
                "row_ids": batch.row_ids,
                "prompts": batch.prompts,
                "epochs": batch.epochs,
                "seed": batch.seed,
            }
        )
    facts = {"rounds": json.dumps({"batches": plain})}
    save_tensors(tensors, folder / f"rollout-{rank}.safetensors", metadata=facts)
    write_atomically(folder / f".groups-{rank}.json", json.dumps(groups).encode())
    wait()
    everyone = [
        g for r in range(world) for g in json.loads((folder / f".groups-{r}.json").read_text())
    ]
    wait()  # until all have read what the first process removes
    if not everyone:
        raise UserError(
            "this round has no prompt with two images that can be used, so there is nothing to "
            "vote on; use float32 or bfloat16 weights, or give more images_per_prompt"
        )
    if rank == 0:
        write_atomically(folder / "index.html", _page(everyone).encode())
        write_atomically(
            folder / MANIFEST,
            (json.dumps({"groups": everyone}, indent=1, ensure_ascii=False) + "\n").encode(),
        )
        for r in range(world):
            (folder / f".groups-{r}.json").unlink()
    wait()


def read_round(folder: Path, rank: int, device: torch.device) -> list[Batch]:
    """Read the batches of one process.

    Args:
        folder (`Path`): Folder of the round.
        rank (`int`): Number of the process.
        device: Where the tensors go.

    Returns:
        The batches, with states and recorded log-probabilities in `extra`.

    Raises:
        UserError: The file of this process is missing.
    """
    path = folder / f"rollout-{rank}.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder}: {path.name} is missing; resume with as many processes as before, "
            "or put it back"
        )
    tensors, facts = read_tensors(path)
    return [batch_from(tensors, f"{i}.", plain, device) for i, plain in enumerate(facts["batches"])]


def find_votes(folder: Path) -> list[Path]:
    """List the vote files of a round, in the order of their names."""
    return sorted(
        p
        for p in folder.glob("votes*")
        if p.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".parquet") and p.is_file()
    )


def shared_votes(folder: Path, is_main: bool) -> Votes | None:
    """Read the votes on the first process and give them to all.

    Votes may be written at this moment, so every process reading for itself could see
    others.

    Args:
        folder (`Path`): Folder of the round.
        is_main (`bool`): Whether this is the first process.

    Returns:
        The votes, or None if there are none yet.

    Raises:
        UserError: See `read_votes`. It is raised on all processes.
    """
    from accelerate.utils import broadcast_object_list

    votes_and_error: list[Any] = [None, None]
    if is_main:
        try:
            votes_and_error[0] = read_votes(folder) if find_votes(folder) else None
        except UserError as error:
            votes_and_error[1] = str(error)
    broadcast_object_list(votes_and_error)
    votes, error_text = votes_and_error
    if error_text is not None:
        raise UserError(error_text)
    return votes


def _is_group(group: Any) -> bool:
    """Whether a value of a manifest has the form of a group."""
    if not isinstance(group, dict) or not isinstance(group.get("images"), list):
        return False
    images = all(
        isinstance(i, dict) and isinstance(i.get("id"), str) and isinstance(i.get("file"), str)
        for i in group["images"]
    )
    return images and isinstance(group.get("id"), str) and isinstance(group.get("prompt"), str)


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Read the groups of a round, each with its id, prompt and images.

    Raises:
        UserError: The manifest is missing or damaged.
    """
    path = folder / MANIFEST
    groups = read_json(path, dict).get("groups")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise UserError(
            f"{path}: is damaged (it has no groups of images); put it back, or draw the round again"
        )
    return groups


def read_votes(folder: Path) -> Votes:
    """Read all votes of a round.

    A vote that is damaged, or not on two images of one prompt of this round, is left
    out and counted.

    Args:
        folder (`Path`): Folder of the round.

    Returns:
        `Votes`, with the mean of the votes on every pair.

    Raises:
        UserError: A file cannot be read at all, or no vote can be used.
    """
    place = {
        image["id"]: group["id"] for group in read_manifest(folder) for image in group["images"]
    }
    values: dict[tuple[str, str], list[float]] = {}
    people: set[str] = set()
    faults: list[str] = []
    for path in find_votes(folder):
        for where, row in _rows(path, faults):
            try:
                first, second, value = _placed(*_vote(row, where), place, where)
            except UserError as error:
                faults.append(str(error))
                continue
            values.setdefault((first, second), []).append(value)
            people |= {str(row["annotator"])} if row.get("annotator") not in (None, "") else set()
    if not values:
        reasons = f" that can be used ({'; '.join(faults[:3])})" if faults else ""
        raise UserError(f"{folder}: its vote files hold no vote{reasons}")
    means = {pair: sum(each) / len(each) for pair, each in values.items()}
    both = means | {(b, a): -value for (a, b), value in means.items()}
    conflicts = sum(len(set(each)) > 1 for each in values.values())
    return Votes(
        both, sum(map(len, values.values())), len(people), conflicts, len(faults), tuple(faults[:3])
    )


def _placed(
    first: str, second: str, value: float, place: Mapping[str, str], where: str
) -> tuple[str, str, float]:
    """Check a vote and put its images in the order of their names.

    Args:
        first (`str`): Id of an image.
        second (`str`): Id of another image.
        value (`float`): Preference for the first over the second, from -1 to 1.
        place: Image id -> group id.
        where (`str`): Place of the vote, for error messages.

    Raises:
        UserError: The images are not two of one prompt of this round.
    """
    for image in (first, second):
        if image not in place:
            raise UserError(
                f"{where}: there is no image {image[:60]!r} in this round (its ids are in "
                f"{MANIFEST}); were the votes given for other images?"
            )
    if place[first] != place[second] or first == second:
        raise UserError(f"{where}: {first!r} and {second!r} are not two images of one prompt")
    return (second, first, -value) if first > second else (first, second, value)


def preference_matrix(votes: Votes, batch: Batch, index: int, rank: int, k: int) -> Tensor:
    """Look up the mean votes on the images of a batch.

    Args:
        votes (`Votes`): Votes of the round.
        batch (`Batch`): g groups.
        index (`int`): Number of the batch in the round.
        rank (`int`): Number of the process that drew it.
        k (`int`): Number of images per group.

    Returns:
        (g, k, k), 1 where the first image is preferred, -1 where the second is, and 0
        where nobody voted.
    """
    matrix = torch.zeros(len(batch), k, k)
    for g, name in enumerate(group_ids(batch, index, rank)):
        for i in range(k):
            for j in range(k):
                matrix[g, i, j] = votes.preference.get((f"{name}-{i}", f"{name}-{j}"), 0.0)
    return matrix


def _rows(path: Path, faults: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of a file of votes.

    Args:
        path (`Path`): The file.
        faults (`list[str]`): A sentence is added to it for every line that is no vote.

    Returns:
        (place for error messages, row) of every vote.

    Raises:
        UserError: The file cannot be read as a whole.
    """
    import pyarrow.parquet

    suffix = path.suffix.lower()
    content: Any = None
    try:
        if suffix == ".parquet":
            values = [
                (f"row {i}", row)
                for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
            ]
        elif suffix in (".csv", ".tsv"):
            values = [(f"line {row.line}", row.cells) for row in read_table(path).rows]
        elif suffix == ".jsonl":
            entries, left_out = journal(path)
            faults += [f"{path.name}, {line}" for line in left_out]
            values = [(f"line {number}", value) for number, value in entries]
        else:
            content = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as votes ({' '.join(str(error).split())[:150]})"
        ) from error
    if suffix == ".json":
        content = content.get("votes") if isinstance(content, dict) else content
        if not isinstance(content, list):
            raise UserError(
                f"{path}: expected a list of votes, each with image_a, image_b and preference"
            )
        values = [(f"vote {i}", value) for i, value in enumerate(content, start=1)]
    rows = []
    for place, value in values:
        if isinstance(value, dict):
            rows.append((f"{path.name}, {place}", value))
        else:
            faults.append(
                f"{path.name}, {place}: expected image_a, image_b and preference, "
                f"got {str(value)[:40]}"
            )
    return rows


def _vote(row: Mapping[str, Any], where: str) -> tuple[str, str, float]:
    """Read one vote.

    Returns:
        (id of an image, id of another, preference for the first from -1 to 1).

    Raises:
        UserError: The row is no vote.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return str(row["chosen"]), str(row["rejected"]), 1.0
    if "image_a" not in row or "image_b" not in row or "preference" not in row:
        raise UserError(
            f"{where}: expected image_a, image_b and preference (or chosen and rejected), "
            f"got {', '.join(map(str, row))}"
        )
    preference = row["preference"]
    value = preference
    if isinstance(preference, str):
        word = preference.strip().lower()
        try:
            value = _WORDS[word] if word in _WORDS else float(word)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise UserError(
            f"{where}: preference is {preference!r}; expected a, b, tie or a number from -1 to 1"
        )
    return str(row["image_a"]), str(row["image_b"]), float(value)


def _page(groups: Sequence[Mapping[str, Any]]) -> str:
    """Fill in the page that shows every group's images with their ids."""
    return render("training/online/templates/round.html", groups=groups)
