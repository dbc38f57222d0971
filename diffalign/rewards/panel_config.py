"""`rewards:` and `combine:` of a run file.

They list the scorers, their weights, and the rule that combines their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from ..config.ranges import Count, OneOf, not_negative
from ..config.section import build_section, coerce, config_section, suggestion
from ..errors import ConfigError
from .base import Scorer
from .ensemble import METHODS, MISSING
from .registry import find_class
from .spec import ScorerSpec

PLACEMENTS = ("resident", "offload", "exclusive")
ADDITIVE = ("weighted_sum", "mean", "min", "mean_minus_std")
"""Methods that score an image without the others of its prompt."""


_Weight = Annotated[float, replace(not_negative, words="a finite number of at least 0")]


@config_section
class RewardEntry:
    """One entry of `rewards:`."""

    name: str = ""
    """Name of its column; by default the scorer's."""
    scorer: Any = None
    """Name as `load_scorer` takes it, e.g. `pickscore`; in Python also a loaded
    `Scorer`. None takes `name`."""
    weight: _Weight = 1.0
    """Weight in the combination, at least 0."""
    normalize: Any = None
    """Scale for methods that add scores. `declared` is the scorer's own (an error where
    it declares none), `none` adds raw scores, `{kind: affine, mean: ..., std: ...}` is
    yours. None takes the declared one where there is one."""
    model: Any = None
    """Weights: file, folder or Hub id. None takes the published ones."""
    config: Any = None
    """Overrides of the architecture, a mapping or a JSON file."""
    tokenizer: Any = None
    """Folder or file of the tokenizer. None takes the model's."""
    args: dict[str, Any] = field(default_factory=dict)
    """The scorer's own options, e.g. `{antialias: false}`."""
    device: Any = None
    """Where it runs, e.g. `cuda:1`. None takes the panel's."""
    dtype: Any = None
    """Precision of its towers, e.g. `bfloat16`. None is float32, the reference."""
    batch_size: Count | None = None
    """Images per forward pass. None takes the scorer's default."""
    cache: Any = None
    """File in which its scores are kept. None takes the panel's."""
    on_error: Annotated[str, OneOf(("raise", "nan"), "raise or nan")] = "raise"
    """`raise` stops at an image that cannot be scored, `nan` makes it a missing
    score."""
    role: Literal["train", "eval"] = "train"
    """`train` takes part in the combination; `eval` is computed and reported, and never
    combined."""

    def __post_init__(self) -> None:
        self.scorer = self.name if self.scorer is None else self.scorer
        if isinstance(self.scorer, Scorer):
            loading = [
                f
                for f in ("model", "config", "tokenizer", "args", "device", "dtype", "cache")
                if getattr(self, f)
            ]
            if loading:
                raise ConfigError(
                    loading[0], "has no effect on a scorer that is loaded; give it to load_scorer"
                )
            self.name = self.name or self.scorer.name
        elif not isinstance(self.scorer, str) or not self.scorer.strip():
            raise ConfigError("scorer", f"expected a name such as pickscore, got {self.scorer!r}")
        self.name = self.name or str(self.scorer)
        misplaced = sorted(_LOADING & self.args.keys())
        if misplaced:
            raise ConfigError(
                f"args.{misplaced[0]}",
                f"is not an option of the scorer's own; write {misplaced[0]}: beside args:",
            )
        _affine_of(self.normalize)

    def affine(self, spec: ScorerSpec) -> tuple[float, float] | None:
        """Return (mean, standard deviation) that put the scores on the common scale.

        None where nothing is declared.

        Raises:
            ConfigError: `normalize: declared` for a scorer that declares none.
        """
        if self.normalize == "declared" and spec.affine is None:
            raise ConfigError(
                "normalize",
                f"{spec.key} declares no scale; write {{kind: affine, mean: ..., std: "
                f"...}}, or none to add raw scores",
            )
        return spec.affine if self.normalize in (None, "declared") else _affine_of(self.normalize)


# Fields that every scorer has. `scorer`, for one, may be an option too: the one that a
# remote server shall use.
_LOADING = {"model", "config", "tokenizer", "device", "dtype", "batch_size", "cache", "on_error"}


def _affine_of(normalize: object) -> tuple[float, float] | None:
    if normalize in (None, "declared"):
        return None
    if normalize == "none":
        return (0.0, 1.0)
    known = ("kind", "mean", "std")
    if not isinstance(normalize, Mapping):
        raise ConfigError(
            "normalize",
            f"expected none, declared or {{kind: affine, mean: ..., std: ...}}, got {normalize!r}",
        )
    for key in normalize:
        if key not in known:
            raise ConfigError(
                f"normalize.{key}",
                f"unknown key{suggestion(str(key), known)}; normalize takes {', '.join(known)}",
            )
    if normalize.get("kind") != "affine":
        raise ConfigError("normalize.kind", f"expected affine, got {normalize.get('kind')!r}")
    values = [coerce(normalize.get(key), float, f"normalize.{key}") for key in ("mean", "std")]
    if values[1] <= 0:
        raise ConfigError("normalize.std", f"expected a finite number above 0, got {values[1]!r}")
    return values[0], values[1]


@config_section
class CombineConfig:
    """`combine:` of a run file: how the scores of an image become one number."""

    method: Annotated[str, OneOf(METHODS)] = "winrate"
    """`winrate` (RankDPO's mean share of images beaten, free of scales), `zscore`,
    `majority`, `minmax`; or, on declared scales, `weighted_sum`, `mean`, `min`,
    `mean_minus_std`."""
    scope: Literal["prompt"] = "prompt"
    """What is compared with each other: the images of one prompt."""
    missing: Annotated[str, OneOf(MISSING)] = "renormalise"
    """An image that some scorers could not score: `renormalise` leaves it to the
    others, `drop` leaves it out, `fail` stops."""
    margins: Any = None
    """Least difference that counts as a preference in `Panel.agreed_pairs`: scorer name
    -> margin, or one number per scorer."""
    min_agree: Count | None = None
    """How many scorers must prefer one image in `Panel.agreed_pairs`. None asks all."""
    k: _Weight = 1.0
    """Standard deviations that `mean_minus_std` takes off."""
    ddof: Annotated[int, OneOf((0, 1))] = 0
    """0 divides variances by n, 1 by n - 1."""
    center: bool = False
    """Of `min` and `mean_minus_std`: move all scorers to one level per prompt first, so
    that only differences between its images count."""

    @property
    def compares_images(self) -> bool:
        """Whether the combined score of an image depends on the others of its
        prompt."""
        return self.center or self.method not in ADDITIVE

    def margins_of(self, names: Sequence[str]) -> list[float] | None:
        """Return one margin per scorer, in order.

        Raises:
            ConfigError: a name that is no scorer, another number of margins, or a
                margin that is no number of at least 0.
        """
        margins = self.margins
        if margins is None:
            return None
        if isinstance(margins, Mapping):
            for name in margins:
                if name not in names:
                    raise ConfigError(
                        f"combine.margins.{name}",
                        f"no such scorer{suggestion(str(name), names)}; "
                        f"there are {', '.join(names)}",
                    )
            margins = [margins.get(name, 0.0) for name in names]
        values = coerce(margins, list[float], "combine.margins")
        if len(values) != len(names) or min(values, default=0.0) < 0:
            raise ConfigError(
                "combine.margins",
                f"expected {len(names)} numbers of at least 0 ({', '.join(names)}), got "
                f"{self.margins!r}",
            )
        return values


def parse_rewards(
    value: object, *, path: str = "rewards", trust_remote_code: bool = False
) -> list[RewardEntry]:
    """Read every accepted form of `rewards:` into entries.

    Args:
        value: ``"imagereward, pickscore"``, a list of names, ``{pickscore: 0.7,
            hpsv2.1: 0.3}`` (names with weights), or a list of mappings with the fields
            of `RewardEntry`. In Python a list may also hold `RewardEntry` and loaded
            `Scorer` objects.
        path (`str`, *optional*, defaults to "rewards"): how messages name it.
        trust_remote_code (`bool`, *optional*, defaults to False): allow scorers of
            ``./file.py:Class``.

    Raises:
        ConfigError: with the path in front: unknown keys and scorers, wrong types and
            ranges, two entries of one name, no entry.
    """
    entries: list[RewardEntry] = []
    for where, entry in _entries(value, path):
        entries.append(entry)
        if [e.name for e in entries].count(entry.name) > 1:
            raise ConfigError(
                f"{where}.name", f"two entries are called {entry.name!r}; give each its own name"
            )
        if isinstance(entry.scorer, str):
            try:
                find_class(entry.scorer, trust_remote_code=trust_remote_code)
            except ConfigError as error:
                raise error.within(where) from None
    if not entries:
        raise ConfigError(path, "names no scorer; write for example [imagereward, pickscore]")
    if all(entry.weight == 0 for entry in entries if entry.role == "train") and any(
        e.role == "train" for e in entries
    ):
        raise ConfigError(
            path,
            "the weights of all scorers of role train are 0; give at least one a weight above 0",
        )
    return entries


def _entries(value: object, path: str) -> list[tuple[str, RewardEntry]]:
    """Return (path, entry) of each.

    Everything about one entry is checked, nothing between entries.
    """
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, (RewardEntry, Scorer)):
        value = [value]
    if isinstance(value, Mapping):
        if "scorer" in value:
            raise ConfigError(path, "is one entry; write it as a list, with - in front")
        return [
            (f"{path}.{name}", _entry(name, {"weight": weight}, f"{path}.{name}"))
            for name, weight in value.items()
        ]
    if not isinstance(value, Sequence):
        raise ConfigError(
            path,
            f"expected names, a mapping of names to weights or a list of entries, got {value!r}",
        )
    return [(f"{path}[{i}]", _entry(item, {}, f"{path}[{i}]")) for i, item in enumerate(value)]


def _entry(item: object, more: dict[str, Any], path: str) -> RewardEntry:
    if isinstance(item, RewardEntry):
        return item
    if isinstance(item, (str, Scorer)):
        if (
            "weight" in more
            and isinstance(more["weight"], (Mapping, Sequence))
            and not isinstance(more["weight"], str)
        ):
            raise ConfigError(
                path,
                f"expected a weight, got {more['weight']!r}; "
                "for more than weights write a list of entries",
            )
        item = {"scorer": item, **more}
    if not isinstance(item, Mapping):
        raise ConfigError(path, f"expected a scorer's name or an entry with keys, got {item!r}")
    # A key without a value, as `args:` alone, is a default.
    return build_section(
        RewardEntry, {key: value for key, value in item.items() if value is not None}, path
    )
