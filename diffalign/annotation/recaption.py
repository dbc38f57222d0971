"""Write pairs with two captions, for DCPO (Saeidi et al. 2025, arXiv 2502.06023).

This is `diffalign data recaption`, with the strategies of section 3.2:

* `c`: chosen_prompt = Q(x_w | c), rejected_prompt = Q(x_l | c)
* `p`: chosen_prompt = c, rejected_prompt = perturb(c)
* `h`: chosen_prompt = Q(x_w | c), rejected_prompt = perturb(Q(x_l | c)) or
  perturb(Q(x_w | c))

Q is a captioner that sees the image and the prompt c. The prompt stays in the column
`prompt`. Every text is stored as soon as it is there. So an interrupted command goes
on, and another strategy in the same folder reuses the captions.
"""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UserError
from ..runtime import text_files
from ..runtime.files import check_output_dir
from ..runtime.hashing import text_hash, value_hash

if TYPE_CHECKING:
    from ..data.dataset import PreferenceDataset
    from ..data.sources import SourceLike

STRATEGIES = ("c", "p", "h")
TEXTS = "texts.jsonl"


def read_pairs(
    source: PreferenceDataset | SourceLike,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
) -> PreferenceDataset:
    """Read a source as pairs. A ranked list becomes its best against its worst image.

    Args:
        source: A `PreferenceDataset`, or what `load_preferences` reads.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset that has
            several.
        columns (`dict[str, str]`, *optional*): Canonical column name -> column of the
            dataset.

    Returns:
        `PreferenceDataset` of kind `pair`.

    Raises:
        UserError: It holds other data, or two captions per pair already.
    """
    from ..data.dataset import PreferenceDataset
    from ..data.load import load_preferences

    dataset = (
        source
        if isinstance(source, PreferenceDataset)
        else load_preferences(source, split=split, columns=columns, verbose=False)
    )
    if dataset.kind not in ("pair", "ranked"):
        raise UserError(
            f"source: {dataset.report.source} holds {dataset.kind} data; recaptioning needs "
            "pairs or ranked lists"
        )
    if dataset.has_two_prompts:
        raise UserError(
            f"source: {dataset.report.source} has two captions per pair already; recaption the "
            "data it was made from"
        )
    return dataset.as_kind("pair")


def recaption(
    source: PreferenceDataset | SourceLike,
    output_dir: str | Path,
    strategy: str,
    *,
    captioner: Callable[..., Sequence[str]] | None = None,
    perturber: Callable[[Sequence[str]], Sequence[str]] | None = None,
    perturb: str = "rejected",
    names: tuple[str, str] | None = None,
    batch_size: int = 8,
    max_empty_fraction: float = 0.05,
) -> str:
    """Write pairs with a caption per image to `OUTPUT_DIR/data`.

    The files are canonical parquet with `prompt`, `chosen_prompt` and
    `rejected_prompt`.

    Args:
        source: A `PreferenceDataset`, or what `load_preferences` reads: pairs, or
            ranked lists (best against worst).
        output_dir (`str` or `Path`): The folder. Texts are stored in its `texts.jsonl`.
        strategy (`str`): `c`, `p` or `h`.
        captioner (`Captioner`, *optional*): (images, prompts) -> captions, for `c` and
            `h`.
        perturber (`Perturber`, *optional*): texts -> texts, for `p` and `h`.
        perturb (`str`, *optional*, defaults to `"rejected"`): Whose caption `h`
            perturbs, `rejected` or `chosen`.
        names (`tuple[str, str]`, *optional*): Names of captioner and perturber with
            their settings, under which texts are stored. None takes the objects' own
            names.
        batch_size (`int`, *optional*, defaults to `8`): Images or texts at once.
        max_empty_fraction (`float`, *optional*, defaults to `0.05`): Largest share of
            the pairs that may be left out without a caption.

    Returns:
        `str`: A summary to print.

    Raises:
        ConfigError: The strategy is unknown, or lacks its captioner or perturber.
        UserError: The source does not fit, or a captioner or perturber returns nothing
            or the wrong number of texts.

    Example:
        >>> from PIL import Image
        >>> from diffalign.annotation.perturbers import RulePerturber
        >>> from diffalign.data import load_preferences
        >>> row = {"prompt": "a red car", "chosen": Image.new("RGB", (8, 8), "red")}
        >>> row["rejected"] = Image.new("RGB", (8, 8), "blue")
        >>> pairs = load_preferences([row], verbose=False)
        >>> summary = recaption(pairs, "dcpo", "p", perturber=RulePerturber("weak"))
        >>> load_preferences("dcpo/data", verbose=False)[0].prompts
        ('a red car', 'a brown car')
    """
    if strategy not in STRATEGIES:
        raise ConfigError("strategy", f"expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy != "p" and captioner is None:
        raise ConfigError("captioner", f"strategy {strategy} needs one")
    if strategy != "c" and perturber is None:
        raise ConfigError("perturber", f"strategy {strategy} needs one")
    folder = Path(output_dir)
    check_output_dir(folder, TEXTS)
    dataset = read_pairs(source)
    folder.mkdir(parents=True, exist_ok=True)
    texts = TextStore(folder / TEXTS)
    captioner_name, perturber_name = names or (_name(captioner), _name(perturber))
    places = {"c": (0, 1), "p": (), "h": (1,) if perturb == "rejected" else ()}[strategy]
    captions: dict[tuple[int, int], str] = {}
    broken: dict[int, str] = {}
    if strategy != "p":
        assert captioner is not None
        captions, broken = _captions(
            dataset, sorted({0, *places}), captioner, captioner_name, texts, batch_size
        )
    pairs: list[tuple[str, str]] = []
    for i, group in enumerate(dataset.as_kind("prompt")):  # reads no images
        base = group.prompts[0]
        first = base if strategy == "p" else captions.get((i, 0), "")
        second = captions.get((i, 1), "" if i in broken else first)
        pairs.append((first, second))
    if strategy != "c":
        assert perturber is not None
        changed = _perturbed(
            [second for _, second in pairs], perturber, perturber_name, texts, batch_size
        )
        pairs = [(first, changed.get(second, "")) for first, second in pairs]
    return _write(dataset, pairs, broken, folder, strategy, max_empty_fraction)


def _name(tool: object) -> str:
    """Name a captioner or perturber so that another one has another name.

    An object without a method `fingerprint` counts by its name alone.
    """
    if tool is None:
        return ""
    name = str(
        getattr(tool, "name", None) or getattr(tool, "__qualname__", type(tool).__qualname__)
    )
    is_known = inspect.isfunction(tool) or callable(getattr(tool, "fingerprint", None))
    return f"{name}|{value_hash(tool)}" if is_known else name


class TextStore:
    """Store texts by key in a file with one JSON object per line.

    A torn last line is left out.

    Args:
        path (`Path`): The file. It is created if it is not there.

    Attributes:
        texts (`dict[str, str]`): Key -> text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        entries = text_files.journal(path)[0] if path.is_file() else []
        for _, entry in entries:
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("key"), str)
                and isinstance(entry.get("text"), str)
            ):
                self.texts[entry["key"]] = entry["text"]
        path.touch()
        # A line that a killed run left torn must not swallow the next one.
        with path.open("rb") as file:
            file.seek(-min(1, path.stat().st_size), os.SEEK_END)
            self._torn = file.read() not in (b"", b"\n")

    @staticmethod
    def key(*parts: str) -> str:
        """Return a key for what a text was made from.

        Args:
            *parts (`str`): Everything that decides the text.
        """
        return text_hash("\0".join(parts))[:32]

    def add(self, keys: Sequence[str], texts: Sequence[str]) -> None:
        """Store texts. They are on the disk when this returns.

        Args:
            keys (`Sequence[str]`): N keys.
            texts (`Sequence[str]`): N texts.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn)
            self._torn = False
            for key, text in zip(keys, texts, strict=True):
                self.texts[key] = text
                file.write(json.dumps({"key": key, "text": text}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _captions(
    dataset: PreferenceDataset,
    sides: Sequence[int],
    captioner: Callable[..., Sequence[str]],
    name: str,
    texts: TextStore,
    batch_size: int,
) -> tuple[dict[tuple[int, int], str], dict[int, str]]:
    """Caption the images of all pairs. Equal images of one prompt get one caption.

    Returns:
        (group, image) -> caption, and group -> why an image of it cannot be read.
    """
    keys: dict[tuple[int, int], str] = {}
    first: dict[str, tuple[int, int]] = {}
    broken: dict[int, str] = {}
    for i in range(len(dataset)):
        group = dataset[i]
        for side, digest in enumerate(group.image_hashes()):
            if side in sides:
                keys[i, side] = TextStore.key("caption", name, digest, group.prompts[0])
                first.setdefault(keys[i, side], (i, side))
    for batch in _batches(list(first), texts, batch_size, "captioning"):
        good, images = [], []
        for key in batch:
            try:
                images.append(dataset[first[key][0]].open_image(first[key][1]))
                good.append(key)
            except UserError:
                pass
        prompts = [dataset[first[key][0]].prompts[0] for key in good]
        captions: dict[str, str] = {}
        if good:
            answers = _checked(captioner(images, prompts), len(good), "captioner", name)
            captions = dict(zip(good, answers, strict=True))
        texts.add(batch, [captions.get(key, "") for key in batch])
    caption_of = {place: texts.texts[key] for place, key in keys.items()}
    for (i, side), caption in caption_of.items():
        if not caption:  # perhaps because the image cannot be read
            try:
                dataset[i].open_image(side)
            except UserError as error:
                broken[i] = str(error)
    return caption_of, broken


def _perturbed(
    captions: Sequence[str],
    perturber: Callable[[Sequence[str]], Sequence[str]],
    name: str,
    texts: TextStore,
    batch_size: int,
) -> dict[str, str]:
    """Return text -> its perturbation, empty where nothing was changed."""
    keys = {TextStore.key("perturb", name, text): text for text in captions if text}
    for batch in _batches(list(keys), texts, batch_size, "perturbing"):
        answers = perturber([keys[key] for key in batch])
        texts.add(batch, _checked(answers, len(batch), "perturber", name))
    return {
        text: "" if texts.texts[key] == text else texts.texts[key] for key, text in keys.items()
    }


def _batches(keys: Sequence[str], texts: TextStore, size: int, label: str) -> Iterator[list[str]]:
    """Yield the batches in which a text is missing.

    The batches are the same in every run, because a model's last bit, or its sample,
    may depend on the batch.
    """
    from ..runtime.progress import progress_bar

    batches = [list(keys[i : i + size]) for i in range(0, len(keys), size)]
    todo = [batch for batch in batches if not texts.texts.keys() >= set(batch)]
    with progress_bar(total=sum(map(len, todo)), desc=label, unit="text", disable=not todo) as bar:
        for batch in todo:
            yield batch
            bar.update(len(batch))


def _checked(answers: object, count: int, role: str, name: str) -> list[str]:
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != count:
        number = (
            "nothing"
            if answers is None
            else f"{len(answers)} texts"
            if hasattr(answers, "__len__")
            else repr(answers)
        )
        raise UserError(
            f"--{role}: {name} returned {number} for {count} inputs; expected a list of one "
            "text each"
        )
    for text in answers:
        if text is not None and not isinstance(text, str):
            raise UserError(f"--{role}: {name} returned {text!r}; expected texts")
    return [" ".join((text or "").split()) for text in answers]


def _write(
    dataset: PreferenceDataset,
    pairs: Sequence[tuple[str, str]],
    broken: dict[int, str],
    folder: Path,
    strategy: str,
    max_empty_fraction: float,
) -> str:
    from ..data.inspect import canonical_row, write_canonical

    complete = [i for i, captions in enumerate(pairs) if all(captions)]
    empty = len(pairs) - len(complete)
    if empty > max_empty_fraction * len(pairs):
        groups = ", ".join(
            str(dataset[i].row_id) for i, captions in enumerate(pairs) if not all(captions)
        )[:60]
        pictures = (
            f"; {len(broken)} have an image that cannot be read, e.g. {next(iter(broken.values()))}"
            if broken
            else ""
        )
        raise UserError(
            f"{empty} of {len(pairs)} pairs got no caption, or no changed one (rows {groups} "
            f"...){pictures}; use another captioner or perturber, or raise --max_empty_fraction"
        )
    total: Counter[str] = Counter(caption for i in complete for caption in set(pairs[i]))

    def rows() -> Iterator[dict[str, Any]]:
        for i in complete:
            group = dataset[i]
            row = canonical_row(group, dataset)
            yield {**row, "chosen_prompt": pairs[i][0], "rejected_prompt": pairs[i][1]}

    write_canonical(rows(), folder / "data", replace=True)
    same = sum(pairs[i][0] == pairs[i][1] for i in complete)
    lines = [
        f"{len(complete)} of {len(pairs)} pairs recaptioned (strategy {strategy}), {len(total)} "
        "different captions"
    ]
    lines += [f"{empty} left out without a caption"] * (empty > 0)
    if broken:
        lines.append(
            f"{len(broken)} of these have an image that cannot be read, e.g. "
            f"{next(iter(broken.values()))}"
        )
    lines += [f"{same} have equal captions on both sides (they train as in Diffusion-DPO)"] * (
        same > 0
    )
    return "\n".join([*lines, f"wrote {folder / 'data'}"])
