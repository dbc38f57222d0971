"""A panel: several scorers, a column for each, and the rule that combines them.

Only scorers of role `train` are combined. Those of role `eval` are reported.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..config.section import build_section, suggestion
from ..errors import ConfigError, UserError
from ..runtime.devices import read_device
from ..runtime.protocols import DeviceLike
from . import ensemble
from .agreement import LARGEST_COMPARED, agreement, group_members, stacks
from .base import Scorer, ScoreResult
from .cache import ScoreCache
from .images import ImageInput, Images, read_images
from .panel_config import ADDITIVE, PLACEMENTS, CombineConfig, RewardEntry, parse_rewards
from .registry import find_class, load_scorer, options_of
from .spec import ScorerSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CombineConfig", "Combined", "Panel", "PanelResult", "RewardEntry", "parse_rewards"]

_CONFIG_KEYS = ("rewards", "combine", "placement", "cache", "device")


@dataclass
class PanelResult:
    """The scores of all scorers of a panel.

    Attributes:
        columns (`dict[str, Tensor]`): name -> float32 scores (n,) as the scorer gave
            them, NaN = missing, in the order of the panel.
        errors (`dict`): name -> {index: sentence} of the missing ones.
        cached (`dict[str, int]`): name -> how many came from the cache.

    Example:
        ```python
        result = Panel("jpeg_compressibility").score([Image.new("RGB", (8, 8))])
        assert result.columns["jpeg_compressibility"].shape == (1,)
        ```
    """

    columns: dict[str, Tensor]
    errors: dict[str, dict[int, str]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)


@dataclass
class Combined:
    """What `Panel.combine` returns.

    Attributes:
        values (`Tensor`): float32 (n,), higher is better whatever the scorers'
            directions. NaN for an image without a score.
        agreement (`dict`): plain values, None where undefined. `names` are the columns.
            `kendalls_w` is the concordance of the combined scorers, averaged over
            groups. `kendalls_w_per_group` lists it in the order in which groups first
            appear. `pairwise` holds, for every two of `names` (eval scorers too), the
            share of image pairs that they order alike. `left_out` counts the groups
            that are too large to be compared.
    """

    values: Tensor
    agreement: dict[str, Any]


Column: TypeAlias = "Tensor | np.ndarray | Sequence[float]"
"""The scores of one scorer, one per image."""


@dataclass
class _Slot:
    """A scorer, loaded at most once, however many entries use it."""

    path: str
    entries: list[RewardEntry]
    spec: ScorerSpec
    device: torch.device
    cache: ScoreCache | str | Path | None = None
    scorer: Scorer | None = None
    loaded_by_caller: bool = False


class Panel:
    """Several scorers and the rule that combines them.

    Args:
        entries: whatever `parse_rewards` takes.
        combine (`CombineConfig`, mapping or method name, *optional*): defaults to
            `winrate`.
        placement (`str`, *optional*, defaults to "resident"): ``resident``: all are
            loaded and stay on the device. ``offload``: they wait on the CPU and are
            moved for a call. ``exclusive``: a call loads one, scores everything it was
            given, frees it and loads the next, so that five large scorers need the
            memory of the largest.
        device (`str` or `torch.device`, *optional*): for entries without their own.
        cache (`ScoreCache` or path, *optional*): for entries without their own.
        trust_remote_code (`bool`, *optional*, defaults to False): allow scorers of
            ``./file.py:Class``, which runs that file.

    Attributes:
        names_rule (`bool`): whether `combine` was given.

    Raises:
        ConfigError: see `parse_rewards`. Also options that a scorer does not have, and
            scales that the method needs and nobody declares.

    Example:
        ```python
        panel = Panel({"jpeg_compressibility": 1.0})
        images = [Image.new("RGB", (8, 8)), Image.effect_noise((8, 8), 50)]
        result = panel.score(images, ["a dot", "a dot"])
        combined = panel.combine(result.columns, groups=["a dot", "a dot"])
        assert combined.values.tolist() == [1.0, 0.0]
        ```
    """

    def __init__(
        self,
        entries: object,
        combine: CombineConfig | Mapping[str, Any] | str | None = None,
        *,
        placement: str = "resident",
        device: DeviceLike = None,
        cache: ScoreCache | str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if placement not in PLACEMENTS:
            problem = (
                f"expected {', '.join(PLACEMENTS)}, got "
                f"{placement!r}{suggestion(str(placement), PLACEMENTS)}"
            )
            raise ConfigError("placement", problem)
        self.placement, self.trust_remote_code = placement, trust_remote_code
        # Copies: entries may be the user's own objects.
        self.entries = [
            copy.copy(entry)
            for entry in parse_rewards(entries, trust_remote_code=trust_remote_code)
        ]
        self.combine_config = _combine_config(combine)
        self.names_rule = combine is not None
        self._caches: dict[str, ScoreCache] = {}
        self._slots = self._make_slots(device, cache)
        self.specs = {entry.name: slot.spec for slot in self._slots for entry in slot.entries}
        self._affine = self._scales()
        self._check_combination()
        self._warn_of_shared_backbones()
        if placement != "exclusive":
            for slot in self._slots:
                slot.scorer = slot.scorer or self._load(slot)

    @classmethod
    def from_config(
        cls, value: object, *, device: DeviceLike = None, trust_remote_code: bool = False
    ) -> Panel:
        """Build a panel from the keys of a run file, or from a bare rewards value.

        Args:
            value: ``{"rewards": ..., "combine": ..., "placement": ..., "cache": ...,
                "device": ...}``, or whatever `parse_rewards` takes.
            device (*optional*): defaults to that of `value`.
            trust_remote_code (`bool`, *optional*, defaults to False): as for `Panel`.

        Raises:
            ConfigError: unknown keys, and everything the constructor raises.
        """
        if not isinstance(value, Mapping) or not value.keys() & set(_CONFIG_KEYS):
            return cls(value, device=device, trust_remote_code=trust_remote_code)
        for key in value:
            if key not in _CONFIG_KEYS:
                hint = suggestion(str(key), _CONFIG_KEYS)
                raise ConfigError(
                    str(key), f"unknown key{hint}; a panel takes {', '.join(_CONFIG_KEYS)}"
                )
        if value.get("rewards") is None:
            raise ConfigError(
                "rewards", "names no scorer; write for example rewards: [imagereward, pickscore]"
            )
        return cls(
            value["rewards"],
            value.get("combine"),
            placement=value.get("placement") or "resident",
            device=device if device is not None else value.get("device"),
            cache=value.get("cache"),
            trust_remote_code=trust_remote_code,
        )

    # Names

    @property
    def names(self) -> list[str]:
        """The columns, in order."""
        return [entry.name for entry in self.entries]

    @property
    def train_names(self) -> list[str]:
        """The columns that are combined."""
        return [entry.name for entry in self.entries if entry.role == "train"]

    # Scoring

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        on_error: str | None = None,
    ) -> PanelResult:
        """Score images with every scorer.

        Arguments and errors as `Scorer.score`. `on_error` None takes each entry's own.
        """
        sources = [(image.place, image.source) for image in read_images(images)]
        results: dict[str, ScoreResult] = {}
        for slot in self._slots:
            with self._held(slot) as scorer:
                for policy in dict.fromkeys(on_error or entry.on_error for entry in slot.entries):
                    # Fresh inputs: what one scorer decoded shall not wait in memory for
                    # the others.
                    result = scorer.score(
                        [ImageInput(*source) for source in sources],
                        prompts,
                        metadata,
                        on_error=policy,
                    )
                    users = [
                        entry.name
                        for entry in slot.entries
                        if (on_error or entry.on_error) == policy
                    ]
                    results.update(dict.fromkeys(users, result))
        return PanelResult(
            {name: results[name].values for name in self.names},
            {name: results[name].errors for name in self.names},
            {name: results[name].cached for name in self.names},
        )

    @contextmanager
    def using(self, name: str) -> Iterator[Scorer]:
        """Lend the scorer of one column, loaded and on its device while the block runs.

        This serves work that goes scorer by scorer.

        Raises:
            UserError: the panel has no such column.

        Example:
            ```python
            for name in panel.names:
                with panel.using(name) as scorer:
                    columns[name] = scorer(images, prompts)
            ```
        """
        slot = next(
            (slot for slot in self._slots if name in [entry.name for entry in slot.entries]), None
        )
        if slot is None:
            raise UserError(
                f"{name!r}: the panel has no such scorer{suggestion(name, self.names)}; "
                f"it has {', '.join(self.names)}"
            )
        with self._held(slot) as scorer:
            yield scorer

    def check_differentiable(self) -> None:
        """Refuse a panel that `score_tensor` cannot score with.

        Raises:
            ConfigError: A scorer of role `train` has no gradient, the rule compares
                images with each other, or scorers wait on the CPU or are freed between
                calls.
        """
        names = self.combined_entries()[0]
        for name in names:
            if not self.specs[name].differentiable:
                raise ConfigError(
                    "rewards",
                    f"{name} ({self.specs[name].key}) gives no gradient; give it the role eval, "
                    "or take a differentiable scorer (diffalign scorers lists them)",
                )
        if len(names) > 1 and self.combine_config.compares_images:
            rule = self.combine_config.method
            raise ConfigError(
                "combine.method",
                f"{f'centred {rule}' if self.combine_config.center else rule} compares images and "
                f"has no gradient; take one of {', '.join(ADDITIVE)} without center",
            )
        if self.placement != "resident":
            raise ConfigError(
                "placement",
                f"{self.placement} frees a scorer before its gradient is computed; set resident",
            )

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Combine the scores of role `train`, with a gradient.

        The score of a single scorer is the reward itself, unless the rule adds scores.

        Args:
            pixels (`Tensor`): (n, 3, H, W) in [0, 1].
            prompts (`Sequence[str]`, *optional*): n prompts.

        Returns:
            `Tensor`: (n,), higher is better.

        Raises:
            ConfigError: See `check_differentiable`.
        """
        self.check_differentiable()
        names, weights = self.combined_entries()
        columns = []
        for name in names:
            sign = 1.0 if self.specs[name].higher_is_better else -1.0
            with self.using(name) as scorer:
                columns.append(sign * scorer.score_tensor(pixels, prompts).to(pixels.device))
        if self.combine_config.method not in ADDITIVE:
            return columns[0]
        return self._combined(torch.stack(columns, dim=-1)[None], names, weights)[0]

    def _combined(
        self, scores: Tensor, names: Sequence[str], weights: Sequence[float] | None
    ) -> Tensor:
        """Combine scores (m, n, scorers) as the panel is configured to, (m, n)."""
        config = self.combine_config
        return ensemble.combine(
            scores,
            config.method,
            weights=weights,
            affine=[self._affine[name] for name in names],
            names=names,
            k=config.k,
            ddof=config.ddof,
            center=config.center,
        )

    def close(self) -> None:
        """Free the scorers that the panel loaded."""
        for slot in self._slots:
            if slot.scorer is not None and not slot.loaded_by_caller:
                slot.scorer.close()
                slot.scorer = None

    @contextmanager
    def _held(self, slot: _Slot) -> Iterator[Scorer]:
        scorer = slot.scorer or self._load(slot)
        if self.placement == "resident":
            slot.scorer = scorer
        elif scorer.device != slot.device:
            scorer.to(slot.device)
        try:
            yield scorer
        finally:
            if self.placement == "exclusive" and not slot.loaded_by_caller:
                scorer.close()
            elif self.placement != "resident":
                scorer.offload()

    def _load(self, slot: _Slot) -> Scorer:
        entry = slot.entries[0]
        options = dict(entry.args)
        if entry.batch_size is not None:
            options["batch_size"] = entry.batch_size
        if slot.cache is not None:
            options["cache"] = self._cache(slot.cache)
        # A scorer that can fail by itself, as a remote one.
        if "on_error" in options_of(self._class_of(entry)):
            options["on_error"] = entry.on_error
        device = "cpu" if self.placement == "offload" else slot.device
        try:
            return load_scorer(
                entry.scorer,
                entry.model,
                entry.config,
                entry.tokenizer,
                device,
                entry.dtype,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except ConfigError as error:
            raise error.within(
                f"{slot.path}.args" if error.field in entry.args else slot.path
            ) from error

    # Combining

    def combine(self, columns: Mapping[str, Column], groups: Sequence[Hashable]) -> Combined:
        """Combine the columns of role `train` into one number per image.

        Args:
            columns (`dict`): name -> scores (n,), e.g. `PanelResult.columns`. Columns
                of role `eval` may be missing.
            groups (list): n group ids. The images of one id are compared with each
                other. Groups may differ in size.

        Returns:
            `Combined`: the numbers, and how far the scorers agree.

        Raises:
            UserError: columns missing or of another length, no scorer of role `train`,
                missing scores under ``missing: fail``, or a group too large for a
                method that compares all images with all.
        """
        names, weights = self.combined_entries()
        present = [name for name in self.names if name in columns or name in names]
        scores = self.signed(columns, present, len(groups))
        train = scores[:, [present.index(name) for name in names]]
        members = group_members(groups)
        config = self.combine_config
        largest = max(map(len, members))
        if config.method in ("winrate", "calibrated", "majority") and largest > LARGEST_COMPARED:
            raise UserError(
                f"combine.method: {config.method} compares all images of a group with all, "
                f"and one has {largest}, more than "
                f"{LARGEST_COMPARED}; use zscore, or smaller groups"
            )
        usable = ensemble.apply_missing(train[None], config.missing, names)[0]
        values = torch.full((len(groups),), float("nan"), dtype=torch.float64)
        for _, index in stacks(members, len(names)):
            values[index] = self._combined(usable[index], names, weights)
        return Combined(values.float(), agreement(scores, present, train, members))

    def agreed_pairs(
        self, columns: Mapping[str, Column], groups: Sequence[Hashable]
    ) -> list[tuple[int, int]]:
        """List the pairs of images on which enough scorers agree.

        `combine.min_agree` scorers of role `train` must agree by `combine.margins`. By
        default all of them must, by any difference. Arguments as `combine`.

        Returns:
            pairs (better, worse) of image indices within groups, sorted.
        """
        names, _ = self.combined_entries()
        scores = self.signed(columns, names, len(groups))
        margins = self.combine_config.margins_of(names)
        pairs: list[tuple[int, int]] = []
        for _, index in stacks(group_members(groups), len(names)):
            agreed = ensemble.unanimous(scores[index], margins, self.combine_config.min_agree)
            group, better, worse = agreed.nonzero(as_tuple=True)
            pairs += zip(index[group, better].tolist(), index[group, worse].tolist(), strict=True)
        return sorted(pairs)

    def combined_entries(self) -> tuple[list[str], list[float]]:
        """Return the columns that are combined, and their weights.

        Raises:
            UserError: All scorers have the role `eval`.
        """
        train = [entry for entry in self.entries if entry.role == "train"]
        if not train:
            raise UserError(
                "rewards: all scorers have the role eval, so nothing can be combined; "
                "give one the role train"
            )
        return [entry.name for entry in train], [entry.weight for entry in train]

    def signed(self, columns: Mapping[str, Column], names: Sequence[str], count: int) -> Tensor:
        """Stack columns to float64 (count, n), negated where lower is better."""
        if count == 0:
            raise UserError("groups: is empty; give one group id per image")
        table = []
        for name in names:
            if name not in columns:
                raise UserError(
                    f"columns: {name} is missing; there are {', '.join(map(str, columns))}"
                )
            column = torch.as_tensor(columns[name], dtype=torch.float64).cpu()
            if column.shape != (count,):
                raise UserError(
                    f"columns: {name} has shape {tuple(column.shape)}, expected one score for "
                    f"each of {count} group ids"
                )
            table.append(column if self.specs[name].higher_is_better else -column)
        return torch.stack(table, -1)

    # Making

    def _class_of(self, entry: RewardEntry) -> type[Scorer]:
        return find_class(entry.scorer, trust_remote_code=self.trust_remote_code)[0]

    def _make_slots(self, device: DeviceLike, cache: ScoreCache | str | Path | None) -> list[_Slot]:
        slots: dict[str, _Slot] = {}
        for i, entry in enumerate(self.entries):
            path = f"rewards[{i}]"
            if isinstance(entry.scorer, Scorer):
                slot = _Slot(
                    path,
                    [],
                    entry.scorer.spec,
                    entry.scorer.device,
                    scorer=entry.scorer,
                    loaded_by_caller=True,
                )
                slots.setdefault(f"given {id(entry.scorer)}", slot).entries.append(entry)
                continue
            scorer_class, fixed = find_class(entry.scorer, trust_remote_code=self.trust_remote_code)
            accepted = options_of(scorer_class)
            for name in entry.args:
                if name not in accepted:
                    raise ConfigError(
                        f"{path}.args.{name}",
                        f"{entry.scorer} has no such option{suggestion(name, accepted)}",
                    )
            on_error = entry.on_error if "on_error" in accepted else None
            cache_of_entry = entry.cache if entry.cache is not None else cache
            try:
                where = read_device(entry.device if entry.device is not None else device)
            except ConfigError as error:
                raise error.within(path) if entry.device is not None else error from None
            name = entry.scorer if ":" in entry.scorer else scorer_class.spec.key
            facts = [
                name,
                fixed,
                entry.model,
                entry.config,
                entry.tokenizer,
                entry.args,
                where,
                entry.dtype,
                entry.batch_size,
                on_error,
            ]
            key = json.dumps(
                [*facts, getattr(cache_of_entry, "path", cache_of_entry)],
                sort_keys=True,
                default=str,
            )
            slots.setdefault(
                key, _Slot(path, [], scorer_class.spec_for(entry.args), where, cache_of_entry)
            ).entries.append(entry)
        return list(slots.values())

    def _cache(self, cache: ScoreCache | str | Path) -> ScoreCache:
        """Return one cache object per file."""
        if isinstance(cache, ScoreCache):
            return cache
        return self._caches.setdefault(str(cache), ScoreCache(cache))

    def _scales(self) -> dict[str, tuple[float, float] | None]:
        """Return name -> (mean, std) of the signed scores.

        A mirrored score has a mirrored mean.
        """
        scales = {}
        for i, entry in enumerate(self.entries):
            spec = self.specs[entry.name]
            try:
                affine = entry.affine(spec)
            except ConfigError as error:
                raise error.within(f"rewards[{i}]") from None
            scales[entry.name] = (
                affine if affine is None or spec.higher_is_better else (-affine[0], affine[1])
            )
        return scales

    def _check_combination(self) -> None:
        """Try the rule on zeros, to find a mistake in it before an hour of scoring."""
        names = self.train_names
        if names:
            self.combine(dict.fromkeys(names, torch.zeros(2)), [0, 0])
        if names and (
            self.combine_config.margins is not None or self.combine_config.min_agree is not None
        ):
            self.agreed_pairs(dict.fromkeys(names, torch.zeros(2)), [0, 0])

    def _warn_of_shared_backbones(self) -> None:
        by_role: dict[str, dict[str, str]] = {"train": {}, "eval": {}}
        for entry in self.entries:
            backbone = self.specs[entry.name].backbone
            if backbone is not None:
                by_role[entry.role].setdefault(backbone, entry.name)
        for backbone, name in by_role["eval"].items():
            if backbone in by_role["train"]:
                warnings.warn(
                    f"rewards: {name} (eval) and {by_role['train'][backbone]} (train) both "
                    f"start from {backbone}, so {name} shares the "
                    "mistakes that training exploits; evaluate with another family too",
                    stacklevel=4,
                )


def _combine_config(combine: CombineConfig | Mapping[str, Any] | str | None) -> CombineConfig:
    if isinstance(combine, CombineConfig):
        return combine
    values = (
        {"method": combine}
        if isinstance(combine, str)
        else combine
        if combine is None
        else dict(combine)
    )
    return build_section(CombineConfig, values or {}, "combine")
