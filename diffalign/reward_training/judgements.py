"""Preference judgements as arrays: image pairs, labels and judges."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data import PreferenceDataset, load_preferences
from ..data.groups import Group
from ..data.load_report import LoadReport
from ..errors import ConfigError, UserError
from ..rewards.learned.losses import flip_rate_of
from .opinions import Opinions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FEWEST_PROMPTS = 10
SIDE_WARNING = 0.6
FEWEST_REPEATS = 20


@dataclass
class Judgements:
    """n pairs of images, and how they were judged.

    Attributes:
        prompts (`list[str]`): The distinct prompts.
        images (`list[str]`): Hash of each distinct image.
        open (`Callable`): Opens an image by its index.
        first (`np.ndarray`): Image of each pair, (n,).
        second (`np.ndarray`): The other one, (n,).
        prompt (`np.ndarray`): Index of the prompt, (n,).
        label (`np.ndarray`): Share of judges who prefer the first image, (n,).
        user (`np.ndarray`): Index of the judge, -1 for nobody in particular, (n,).
        weight (`np.ndarray`): How much each pair counts, (n,).
        opinions (`Opinions`): What was said of single images and lists.
        users (`list[str]`): Names of the judges.
        notes (`list[str]`): What is remarkable about them.
        categories (`dict[int, str]`): Category of each prompt, by its index. Empty if
            the data have none.
    """

    prompts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    open: Callable[[int], Image.Image] = lambda index: Image.new("RGB", (1, 1))
    first: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    second: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    prompt: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    label: Floats = field(default_factory=lambda: np.empty(0))
    user: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    weight: Floats = field(default_factory=lambda: np.empty(0))
    users: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    opinions: Opinions = field(default_factory=Opinions)
    categories: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.weight) != len(self.label):
            self.weight = np.ones(len(self.label))

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, rows: npt.NDArray[Any]) -> Judgements:
        """Return some of the pairs, with the same images, prompts and users."""
        names = ("first", "second", "prompt", "label", "user", "weight")
        taken = {name: getattr(self, name)[rows] for name in names}
        return Judgements(
            self.prompts,
            self.images,
            self.open,
            users=self.users,
            notes=self.notes,
            categories=self.categories,
            **taken,
        )

    def without_ties(self) -> Judgements:
        """Return the pairs that were not judged equal."""
        return self.rows(np.flatnonzero(self.label != 0.5))

    def of_prompts(self, wanted: npt.NDArray[np.bool_]) -> Judgements:
        """Return the pairs and opinions of some prompts, (prompts,) bool."""
        part = self.rows(np.flatnonzero(wanted[self.prompt]))
        part.opinions = self.opinions.rows(wanted[self.opinions.prompt])
        return part

    def drawn_prompts(self, share: float, seed: int) -> Judgements:
        """Return the pairs and opinions of a random share of the prompts.

        Args:
            share (`float`): Above 0 and up to 1. At least one prompt is drawn.
            seed (`int`): Seed of the draw.

        Raises:
            UserError: None of their pairs is decided.
        """
        prompts = np.union1d(self.prompt, self.opinions.prompt)
        count = max(1, round(share * len(prompts)))
        drawn = np.random.default_rng(seed).permutation(prompts)[:count]
        wanted = np.zeros(len(self.prompts), dtype=bool)
        wanted[drawn] = True
        part = self.of_prompts(wanted)
        if not len(part) or bool((part.label == 0.5).all()):
            raise UserError(
                f"train.subsample: the {count} prompts that {share:g} of the training prompts are "
                "have no decided pair; raise it, or leave it out"
            )
        return part

    def fingerprint(self) -> str:
        """Hash of prompts, images, labels and users."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.images, self.users]).encode())
        for name in ("first", "second", "prompt", "label", "user", "weight"):
            digest.update(getattr(self, name).tobytes())
        if len(self.opinions):
            for values in vars(self.opinions).values():
                digest.update(np.asarray(values).tobytes())
        return digest.hexdigest()


class _Collector:
    """Numbers prompts, images and users, and collects pairs."""

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.images: dict[str, int] = {}
        self.openers: list[Callable[[], Image.Image]] = []
        self.users: dict[str, int] = {}
        self.pairs: list[tuple[int, int, int, float, int, float]] = []
        self.opinion_rows: list[tuple[int, int, int, float, int, float]] = []

    def image(self, key: str, opener: Callable[[], Image.Image]) -> int:
        if key not in self.images:
            self.images[key] = len(self.images)
            self.openers.append(opener)
        return self.images[key]

    def add(
        self,
        prompt: str,
        first: int,
        second: int,
        label: float,
        user: str | None,
        weight: float = 1.0,
    ) -> None:
        """Add a pair. Rows of weight 0 do not count."""
        if first == second or not weight:  # an image is as good as itself
            return
        self.pairs.append((first, second, *self._who(prompt, user, label), weight))

    def _who(self, prompt: str, user: str | None, value: float) -> tuple[int, float, int]:
        number = self.prompts.setdefault(prompt, len(self.prompts))
        judge = -1 if user is None else self.users.setdefault(user, len(self.users))
        return number, value, judge

    def say(self, group: Group, place: int, image: int, value: float, row: int) -> None:
        """Add an opinion on one image of a group."""
        weight = group.weight if group.tie_weight is None else group.tie_weight
        if weight:
            number, _, judge = self._who(group.prompts[place], group.user, value)
            self.opinion_rows.append((image, number, judge, value, row, weight))

    def result(self, notes: list[str], are_thumbs: bool = False) -> Judgements:
        columns = list(zip(*self.opinion_rows, strict=True)) or [()] * 6
        opinions = Opinions(
            np.array(columns[0], np.int64),
            np.array(columns[1], np.int64),
            np.array(columns[2], np.int64),
            np.array(columns[3], np.float64),
            np.array(columns[4], np.int64),
            np.array(columns[5], np.float64),
            are_thumbs,
        )
        columns = list(zip(*self.pairs, strict=True)) or [()] * 6
        first, second, prompt, label, user, weight = columns
        openers = self.openers
        return Judgements(
            list(self.prompts),
            list(self.images),
            lambda index: openers[index](),
            np.array(first, np.int64),
            np.array(second, np.int64),
            np.array(prompt, np.int64),
            np.array(label, np.float64),
            np.array(user, np.int64),
            np.array(weight, np.float64),
            list(self.users),
            notes,
            opinions,
        )


def read_judgements(source: Any, ratings: bool = True, **options: Any) -> Judgements:
    """Read judgements of images.

    Args:
        source: A folder of the demo's votes (with `votes.jsonl`), anything that
            `load_preferences` reads (pairs, ranked lists, likes and dislikes), or
            `Judgements`, which are only checked.
        ratings (`bool`, *optional*, defaults to True): Read ratings as they are. False
            reads likes and dislikes, by `like_threshold`.
        **options: Of `load_preferences`.

    Returns:
        `Judgements`: Every pair of images of one prompt that are not judged equal, and
        the ties of votes.

    Raises:
        UserError: Nothing can be compared.
        ConfigError: `like_threshold` or `columns` have no meaning for the source.
    """
    if isinstance(source, Judgements):
        return _checked(source, None, False)
    if isinstance(source, (str, Path)) and (Path(source) / "votes.jsonl").is_file():
        for name, is_given in (
            ("like_threshold", not ratings),
            ("columns", options.get("columns")),
        ):
            if is_given:
                raise ConfigError(name, "a folder of the demo's votes takes none; leave it out")
        return read_votes(Path(source))
    data = source
    if not isinstance(source, PreferenceDataset):
        data = load_preferences(source, ties="keep", verbose=False, **options)
    if not ratings and data.layout.name != "rated":
        raise ConfigError(
            "like_threshold", f"dataset {data.report.source} has no ratings; leave it out"
        )
    collector, are_thumbs = _Collector(), False
    likes: dict[tuple[str, str | None], list[tuple[int, float, float]]] = {}
    for index in range(len(data)):
        group = data[index]
        hashes = group.image_hashes()

        def opener(place: int, index: int = index) -> Callable[[], Image.Image]:
            return lambda: data[index].open_image(place)

        images = [collector.image(key, opener(i)) for i, key in enumerate(hashes)]
        if len(set(group.prompts)) > 1:
            raise UserError(
                f"dataset {data.report.source}: row {index} has a prompt for each of its images, "
                "and a reward compares images of one prompt; name the column of that prompt in "
                "data.columns"
            )
        if data.kind == "pair":
            tie = group.tie_weight is not None
            weight = group.weight if group.tie_weight is None else group.tie_weight
            label = 0.5 if tie else 1.0
            collector.add(group.prompts[0], images[0], images[1], label, group.user, weight)
        elif data.kind == "ranked":
            scores = group.scores or ()
            for place, (image, score) in enumerate(zip(images, scores, strict=True)):
                collector.say(group, place, image, score, index)
            for a, b in combinations(range(len(images)), 2):
                if scores[a] != scores[b]:
                    better = float(scores[a] > scores[b])
                    pair = images[a], images[b], better
                    collector.add(group.prompts[0], *pair, group.user, group.weight)
        elif data.kind == "labelled":
            liked = float((group.scores or (0.0,))[0] > 0)
            are_thumbs = group.rating is None or not ratings
            value = liked if group.rating is None or are_thumbs else group.rating
            collector.say(group, 0, images[0], value, index)
            opinion = images[0], value, group.weight
            likes.setdefault((group.prompts[0], group.user), []).append(opinion)
        else:
            raise UserError(
                f"dataset {data.report.source}: {data.kind} data hold no judgements; give pairs, "
                "ranked lists, likes and dislikes or a folder of votes"
            )
    for (prompt, user), judged in likes.items():
        for (a, first, one), (b, second, other) in combinations(judged, 2):
            if first != second:
                collector.add(prompt, a, b, float(first > second), user, one * other)
    result = collector.result(_left_out(data.report), are_thumbs)
    for group_prompt, category in data.categories_of_prompts().items():
        if group_prompt in collector.prompts:
            result.categories[collector.prompts[group_prompt]] = category
    return _checked(result, getattr(data, "report", None), bool(likes))


def _left_out(report: LoadReport) -> list[str]:
    """Say which rows and columns were not read."""
    notes = []
    if report.broken_count:
        broken = f"{report.broken_count} broken rows left out ({report.first_broken()})"
        notes.append(f"WARNING: {broken}")
    if report.unlabelled:
        notes.append(f"WARNING: {report.unlabelled} rows without a label left out")
    return notes + [text for text in (report.unused_columns(),) if text]


def read_votes(folder: Path) -> Judgements:
    """Read the votes of the demo, ties included.

    Repeated votes of one person on two images become one pair, whose label is their
    mean.

    Args:
        folder (`Path`): With `votes.jsonl` and `images/`.

    Raises:
        UserError: The file is damaged, or nothing can be compared.
    """
    from ..runtime.text_files import journal

    collector = _Collector()
    votes: dict[tuple[str, int, int, str | None], list[float]] = {}
    sides: Counter[str] = Counter()
    lines, torn = journal(folder / "votes.jsonl")
    seen: set[str] = set()
    missing = 0
    for number, row in lines:
        if isinstance(row, dict) and str(row.get("id", number)) in seen:
            continue
        try:
            seen.add(str(row.get("id", number)))
            names = [str(row["left_image"]), str(row["right_image"])]
            prompt, choice = str(row["prompt"]), str(row["vote"])
            label = {"left": 1.0, "right": 0.0, "tie": 0.5}[choice]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'votes.jsonl'}, line {number}: no vote ({error})") from None
        sides[choice] += 1
        files = [_inside(folder, name) for name in names]
        if not all(file.is_file() for file in files):
            missing += 1
            continue
        keys = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        images = [
            collector.image(key, functools.partial(_opened, file))
            for key, file in zip(keys, files, strict=True)
        ]
        if images[0] > images[1]:
            images, label = images[::-1], 1 - label
        annotator = row.get("annotator") or None
        votes.setdefault((prompt, images[0], images[1], annotator), []).append(label)
    agreement = agreement_note(votes)
    for (prompt, first, second, user), labels in votes.items():
        mean = sum(labels) / len(labels)
        collector.add(prompt, first, second, mean, user, float(len(labels)))
    decided = sides["left"] + sides["right"]
    share = max(sides["left"], sides["right"]) / decided if decided else 0.0
    notes = [f"WARNING: {len(torn)} torn lines of votes.jsonl left out"] if torn else []
    if missing:
        notes.append(f"WARNING: {missing} votes left out, whose images are gone")
    notes += [agreement] if agreement else []
    if decided >= 20 and share > SIDE_WARNING:
        side = "left" if sides["left"] > sides["right"] else "right"
        notes.append(f"WARNING: {share:.0%} of the decided votes are for the {side} image")
    return _checked(collector.result(notes), None, False)


def agreement_note(votes: Mapping[tuple[str, int, int, str | None], list[float]]) -> str | None:
    """Describe how often repeated votes differ, which limits the accuracy of a reward.

    Args:
        votes (`Mapping`): Prompt, both images and judge -> labels, 1/2 for a tie.

    Returns:
        `str`, *optional*: None with fewer than `FEWEST_REPEATS` repeated pairs.
    """
    by_pair: dict[tuple[str, int, int], list[float]] = {}
    for (prompt, first, second, _), labels in votes.items():
        decided = [label for label in labels if label != 0.5]
        by_pair.setdefault((prompt, first, second), []).extend(decided)
    shares = []
    for labels in by_pair.values():
        if len(labels) > 1:
            # The share of pairs of votes that differ, whatever the number of votes.
            wins, count = sum(labels), len(labels)
            shares.append(2 * wins * (count - wins) / (count * (count - 1)))
    if len(shares) < FEWEST_REPEATS:
        return None
    share = sum(shares) / len(shares)
    times = f"{len(shares)} pairs were judged more than once"
    text = f"{times}, and {share:.0%} of the votes on them differ"
    if share >= 0.5:
        return f"WARNING: {text}, no better than chance"
    return f"{text}; {flip_rate_of(share):.0%} wrong labels would explain it (train.flip_rate)"


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: the image cannot be read ({error})") from error


def _inside(folder: Path, name: str) -> Path:
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise UserError(f"{folder / 'votes.jsonl'}: the image {name!r} is not in the folder")
    return file


def _checked(judgements: Judgements, report: Any, are_likes: bool) -> Judgements:
    source = "the data" if report is None else f"dataset {report.source}"
    if not len(judgements):
        reason = (
            "no prompt has a liked and a disliked image"
            if are_likes
            else "there are no two images of one prompt that were judged"
        )
        raise UserError(f"{source}: nothing can be compared, {reason}")
    if bool((judgements.label == 0.5).all()):
        raise UserError(f"{source}: all {len(judgements)} pairs are ties, so nothing is preferred")
    return judgements


def split(judgements: Judgements, val: float, test: float, seed: int) -> dict[str, Judgements]:
    """Split by prompts, so that no prompt and no image is on two sides.

    Args:
        judgements (`Judgements`): All pairs.
        val (`float`): Share of prompts that choose.
        test (`float`): Share of prompts that the report is about. 0 gives no `test`.
        seed (`int`): Salt of the split.

    Returns:
        `dict`: `train`, `val` and `test`.

    Raises:
        UserError: There are too few prompts.
    """
    groups = connected(judgements)
    count = len(set(groups[judgements.prompt].tolist()))
    if count < FEWEST_PROMPTS:
        raise UserError(
            f"data: {count} prompts with images of their own are too few to learn from and to "
            f"report on; give judgements on at least {FEWEST_PROMPTS}"
        )

    def place(group: int) -> float:
        names = sorted(prompt_key(judgements.prompts[i]) for i in np.flatnonzero(groups == group))
        return int(hashlib.sha256(f"{seed}:{names[0]}".encode()).hexdigest()[:12], 16) / 16**12

    # Prompts with ties alone say nothing about a reward, so they are trained on.
    decided = set(groups[judgements.prompt[judgements.label != 0.5]].tolist())
    order = sorted(decided, key=place)
    ends = max(1, round(test * count)) if test else 0, max(1, round(val * count))
    sides: dict[int, str] = dict.fromkeys(groups.tolist(), "train")
    sides |= dict.fromkeys(order[: ends[0]], "test")
    sides |= dict.fromkeys(order[ends[0] : ends[0] + ends[1]], "val")
    side = np.array([sides[int(group)] for group in groups])
    names = ("train", "val", "test") if test else ("train", "val")
    parts = {name: judgements.of_prompts(side == name) for name in names}
    for name, part in parts.items():
        if not len(part) or bool((part.label == 0.5).all()):
            raise UserError(
                f"data: the {name} prompts have no decided pair; give more judgements, or another "
                "train.split_seed"
            )
    return parts


def read_options(reading: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `read_judgements`.

    Args:
        reading (`dict[str, Any]`): `columns` and `like_threshold`, None for the
            defaults.
    """
    threshold, columns = reading["like_threshold"], reading["columns"]
    options: dict[str, Any] = {"columns": columns} if columns else {}
    liked_from = 0.0 if threshold is None else threshold
    return options | {"ratings": threshold is None, "like_threshold": liked_from}


def check_held_out(held: Judgements, data: Judgements) -> None:
    """Check that judgements are of other prompts and images than those of a training.

    Raises:
        UserError: They are not.
    """
    known = {prompt_key(prompt) for prompt in data.prompts}
    both = [prompt for prompt in held.prompts if prompt_key(prompt) in known]
    if both:
        raise UserError(
            f"eval_dataset: {len(both)} of its prompts are also trained on, such as "
            f"{min(both)!r}; give other prompts"
        )
    shared = set(held.images) & set(data.images)
    if shared:
        raise UserError(f"eval_dataset: {len(shared)} of its images are also trained on")


def prompt_key(prompt: str) -> str:
    """Return a prompt without case and extra spaces, by which prompts are compared."""
    return " ".join(prompt.casefold().split())


def connected(judgements: Judgements) -> Ints:
    """Return the group of each prompt: of equal prompts, and of shared images."""
    parent = list(range(len(judgements.prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_key: dict[object, int] = {}
    links = [(prompt_key(prompt), i) for i, prompt in enumerate(judgements.prompts)]
    pairs = zip(judgements.first, judgements.second, judgements.prompt, strict=True)
    image_links = [(int(image), int(p)) for a, b, p in pairs for image in (a, b)]
    opinions = judgements.opinions
    image_links += list(zip(opinions.image.tolist(), opinions.prompt.tolist(), strict=True))
    for key, number in [*links, *image_links]:
        other = by_key.setdefault(key, number)
        parent[root(number)] = root(other)
    return np.array([root(i) for i in range(len(parent))], np.int64)
