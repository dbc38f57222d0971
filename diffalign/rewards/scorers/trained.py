"""A reward of one's own, in a folder that `diffalign reward train` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UserError, one_line
from ...runtime.files import write_atomically
from ...runtime.hashing import content_hash, text_hash
from ...runtime.protocols import DeviceLike, DtypeLike
from ...runtime.weight_files import loading_errors
from ..base import Scorer
from ..images import Images, read_images
from ..learned.heads import (
    QUANTILES,
    FactorHead,
    LinearPalHead,
    PalHead,
    RewardHead,
    UserHead,
)
from ..learned.tower_weights import TOWERS, load_towers
from ..model_scorer import ModelScorer
from ..scoring import ScoreResult
from ..spec import ScorerSpec

FILE, WEIGHTS, COVARIANCE = "reward.json", "head.safetensors", "covariance.safetensors"
COMBINE = ("mean", "min", "mean_minus_std")
FORMAT = 1
_TOGETHER = 32
EVERYBODY = "worst"
"""The value of `user` for the lowest score among the users of the training data."""


class TrainedReward(ModelScorer):
    """A learned reward: a head over a CLIP scorer or ImageReward, or trained towers.

    Args:
        folder (path): What `diffalign reward train` wrote.
        user (`str` or mapping, *optional*): Of a reward with users (PAL): a user, user
            -> weight, or ``worst`` for the lowest score among the users of the training
            data. None is their mean.
        combine (`str`, *optional*): Of an ensemble: ``mean`` (default), ``min`` or
            ``mean_minus_std``.
        quantile (`float`, *optional*): Of a reward of quantiles: the score is this
            quantile, in 0.05 to 0.95, instead of their mean. A low one is careful.
        **options: as for `Scorer`.

    Raises:
        ConfigError: an unknown user or rule, or the base differs from the one that the
            head was trained on.
        UserError: the folder is damaged.
    """

    spec = ScorerSpec(
        key="trained",
        summary="a reward of one's own, in a folder that `diffalign reward train` wrote",
        licence="of its base and data",
        differentiable=True,
        preprocess="of its base",
        text="of its base",
        citation="this package, diffalign.reward_training",
    )

    def __init__(
        self,
        folder: str | Path,
        *,
        user: str | Mapping[str, float] | None = None,
        combine: str | None = None,
        quantile: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        from safetensors.torch import load_file

        from ..registry import load_scorer

        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        base = self.facts["base"]
        loaded: Any = load_scorer(
            base["scorer"], model=base.get("model"), device=self.device, dtype=self.dtype
        )
        self.base, self.preprocess = loaded, loaded.preprocess
        before, now = base["fingerprint"], base_fingerprint(loaded)
        if before != now and before != _earlier_fingerprint(loaded):
            raise ConfigError(
                "folder",
                f"{self.folder} was trained on {base['scorer']} with other weights or another "
                f"tokenizer (its fingerprint is {before[:12]}, here it is {now[:12]}); put "
                "these back",
            )
        if "towers" in self.facts:
            load_towers(loaded, self.folder, self.facts["towers"])
        head = self.facts["head"]
        self.users: list[str] = head.get("users", [])
        try:
            self.head = build_head(head)
            self.head.load_state_dict(load_file(self.folder / WEIGHTS))
        except loading_errors() as error:
            reason = one_line(error)
            raise UserError(f"{self.folder / WEIGHTS} is damaged ({reason})") from error
        wide = torch.promote_types(self.dtype, torch.float32)
        self.head.requires_grad_(False).eval().to(self.device, wide)
        self.temperature = float(self.facts.get("temperature", 1.0))
        self.user, self.combine = user, self._rule(combine)
        self.quantile = None if quantile is None else self._levels([quantile])[0]
        if quantile is not None and combine is not None:
            raise ConfigError("quantile", "give either quantile or combine, not both")
        if user is not None and not self.users:
            raise ConfigError("user", f"{self.folder} is a reward without users; leave it out")
        self.weights = None if user == EVERYBODY else self._weights(user)
        chosen = {"user": user, "combine": combine, "quantile": quantile}
        self.spec = spec_of(self.folder, self.facts, chosen)  # type: ignore[misc]

    def _rule(self, combine: str | None) -> str:
        if combine is not None and combine not in COMBINE:
            raise ConfigError("combine", f"expected {', '.join(COMBINE)}, got {combine!r}")
        if combine not in (None, "mean") and self.facts["head"].get("members", 1) < 2:
            raise ConfigError("combine", f"{self.folder} has one member, so nothing to combine")
        return combine or "mean"

    def _levels(self, levels: Sequence[float]) -> list[float]:
        """Check that a reward has quantiles, and their levels."""
        if not self.facts["head"].get("quantiles"):
            raise ConfigError(
                "quantile", f"{self.folder} has no quantiles; train it with train.loss: quantiles"
            )
        for level in levels:
            if isinstance(level, bool) or not QUANTILES[0] <= level <= QUANTILES[-1]:
                raise ConfigError(
                    "quantile", f"expected {QUANTILES[0]} to {QUANTILES[-1]}, got {level!r}"
                )
        return [float(level) for level in levels]

    def _weights(self, user: str | Mapping[str, float] | None) -> Tensor | None:
        """Weights of the prototypes, (K,)."""
        if not isinstance(self.head, UserHead):
            return None
        shares = self.head.logits.softmax(1)
        if user is None:
            return torch.tensor(self.facts["head"]["population"], dtype=shares.dtype).to(shares)
        if isinstance(user, int) and not isinstance(user, bool):  # YAML reads 2 as a number
            user = str(user)
        if not isinstance(user, (str, Mapping)):
            raise ConfigError("user", f"expected a name or weights of names, got {user!r}")
        mixture = {user: 1.0} if isinstance(user, str) else {str(n): s for n, s in user.items()}
        for name, share in mixture.items():
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not is_number or not math.isfinite(share):
                raise ConfigError("user", f"expected a number for {name!r}, got {share!r}")
        unknown = [name for name in mixture if name not in self.users]
        total = sum(mixture.values())
        if unknown or min(mixture.values(), default=0) < 0 or total <= 0:
            listed = ", ".join(self.users[:8])
            raise ConfigError(
                "user",
                f"{unknown[0]!r} is unknown; there are {listed}"
                if unknown
                else "expected weights of at least 0, not all of them 0",
            )
        rows = [shares[self.users.index(name)] * share for name, share in mixture.items()]
        return torch.stack(rows).sum(0) / total

    def to(self, device: DeviceLike = None, dtype: DtypeLike = None) -> Scorer:
        """Move the networks of base and head. Arguments and errors as `Scorer.to`."""
        super().to(device, dtype)
        self.base.device, self.base.dtype = self.device, self.dtype
        if self.weights is not None:
            self.weights = self.weights.to(next(self.head.parameters()))
        return self

    def towers(self) -> Iterable[nn.Module]:
        return self.base.towers()

    def heads(self) -> Iterable[nn.Module]:
        return [*self.base.heads(), self.head]

    def identity(self) -> dict[str, Any]:
        names = [WEIGHTS, TOWERS] if "towers" in self.facts else [WEIGHTS]
        return {
            "folder": [content_hash(self.folder / name) for name in names],
            "facts": {k: v for k, v in self.facts.items() if k != "data"},
            "user": self.user,
            "combine": self.combine,
            **({} if self.quantile is None else {"quantile": self.quantile}),
        }

    def text_features(self, prompts: list[str]) -> tuple[Tensor, ...]:
        return self.base.text_features(prompts)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.base.image_features(pixels)

    def similarity(self, image: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        if isinstance(self.head, FactorHead):
            base = self.base.similarity(image, text)
            return self.temperature * self.head(base.to(self.head.log_factor.dtype))
        wide = torch.promote_types(image.dtype, torch.float32)
        base, image_features, text_features = (part.to(wide) for part in self._read(image, text))
        if self.quantile is not None:
            assert isinstance(self.head, RewardHead)
            return (
                self.temperature
                * self.head.quantiles(base, image_features, text_features, [self.quantile])[:, 0]
            )
        values = self.members(image_features, text_features, base)
        if values.shape[1] == 1 or self.combine == "mean":
            combined = values.mean(1)
        elif self.combine == "min":
            combined = values.min(1).values
        else:
            combined = values.mean(1) - values.std(1, correction=0)
        return self.temperature * combined

    def _read(self, image: Tensor, text: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the base, and the embeddings that the head reads."""
        if not hasattr(self.base, "joint_features"):
            return self.base.similarity(image, text), image, text[0]
        joint = self.base.joint_features(image, text)
        return self.base.joint_score(joint), joint, joint[:, :0]

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
        quantiles: Sequence[float] | None = None,
    ) -> ScoreResult:
        """Score images, with quantiles on request.

        Args:
            images, prompts, metadata, batch_size, on_error: as for `Scorer.score`.
            quantiles (list of `float`, *optional*): levels in 0.05 to 0.95. The
                result's `quantiles` has their values, (n, levels). The images must be
                readable.

        Raises:
            ConfigError: this reward has no quantiles.
        """
        options: Any = {"batch_size": batch_size, "on_error": on_error}
        if quantiles is None:
            return super().score(images, prompts, metadata, **options)
        levels, inputs = self._levels(quantiles), read_images(images)
        result = super().score(inputs, prompts, metadata, **options)
        assert isinstance(self.head, RewardHead)
        with torch.no_grad():
            texts = list(prompts or [""] * len(inputs))
            values = self.head.quantiles(*self._features(inputs, texts), levels)
        result.quantiles = self.temperature * values.cpu()
        return result

    def _features(self, images: Images, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the base, and embeddings of images and prompts."""
        kind = next(self.head.parameters()).dtype
        text = self.prompt_features(prompts, len(prompts))
        images = self.image_rows(images)
        if not hasattr(self.base, "joint_features"):
            parts = [self._read(images.to(self.device), text)]
        else:  # through the towers, some at a time
            rows = images.split(_TOGETHER), zip(*(t.split(_TOGETHER) for t in text), strict=True)
            parts = [
                self._read(image.to(self.device, self.dtype), text_features)
                for image, text_features in zip(*rows, strict=True)
            ]
        base, image_features, text_features = (
            torch.cat(column).to(kind) for column in zip(*parts, strict=True)
        )
        return base, image_features, text_features

    @torch.no_grad()
    def member_scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Score images by every member of an ensemble.

        Args:
            images: n images in any form that `Scorer.score` takes.
            prompts (list of `str`): one per image.

        Returns:
            `Tensor`: (n, members), on the CPU.

        Raises:
            UserError: the reward has trained towers and thus no members.
        """
        if isinstance(self.head, FactorHead):
            raise UserError(f"{self.folder} has no members; only heads on frozen towers have some")
        base, image, text = self._features(images, list(prompts))
        return self.temperature * self.members(image, text, base).cpu()

    @torch.no_grad()
    def directions(self, images: Images, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the weights of a linear head do to the scores of images.

        Args:
            images: n images in any form that `Scorer.score` takes.
            prompts (list of `str`): one per image.

        Returns:
            `tuple[Tensor, Tensor]`: the scores without the temperature (n,), and their
            gradients by the weights (n, weights), see `RewardHead.directions`. Both are
            on the CPU, in float64.

        Raises:
            UserError: the reward has no linear head.
        """
        if not isinstance(self.head, RewardHead) or self.facts["head"].get("hidden"):
            raise UserError(f"{self.folder} has no linear head")
        base, image, text = self._features(images, list(prompts))
        scores = self.head(base, image, text).mean(1)
        return scores.cpu().double(), self.head.directions(base, image, text).cpu().double()

    def covariance(self) -> Tensor | None:
        """Return how uncertain the weights of a linear head are after its training.

        Returns:
            `Tensor`: (weights, weights), in float64. None if the folder has none: for
            other heads and losses, and for folders of earlier versions.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors.torch import load_file

        file = self.folder / COVARIANCE
        if not file.is_file():
            return None
        try:
            return load_file(file)["covariance"].double()
        except loading_errors() as error:
            raise UserError(f"{file} is damaged ({one_line(error)}); delete it") from error

    @torch.no_grad()
    def user_scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Score images as each user of the training data would.

        Args:
            images: n images in any form that `Scorer.score` takes.
            prompts (list of `str`): one per image.

        Returns:
            `Tensor`: (n, users), on the CPU.

        Raises:
            UserError: the reward has no users.
        """
        if not isinstance(self.head, UserHead):
            raise UserError(f"{self.folder} is a reward without users")
        _, image, text = self._features(images, list(prompts))
        return self.temperature * self._by_user(self.head, image, text).cpu()

    def _by_user(self, head: UserHead, image: Tensor, text: Tensor) -> Tensor:
        # Users of the training alone: later ones change no score of others.
        shares = head.logits.softmax(1)[: self.facts["head"]["trained_users"]]
        columns = [head.score(image, text, row.expand(len(image), -1)) for row in shares]
        return torch.stack(columns, 1)

    def members(self, image: Tensor, text: Tensor, base: Tensor) -> Tensor:
        """Return the scores by every member, (n, members)."""
        if isinstance(self.head, RewardHead):
            return self.head(base.to(image.dtype), image, text)
        assert isinstance(self.head, UserHead)
        if self.weights is not None:
            return self.head.score(image, text, self.weights.expand(len(image), -1))[:, None]
        return self._by_user(self.head, image, text).min(1).values[:, None]


def check_name(name: str, field: str) -> None:
    """Check that a base is one of the scorers of this package.

    A folder from elsewhere must not name code to run.

    Raises:
        ConfigError: It is something else.
    """
    from ..registry import is_built_in

    if not is_built_in(name):
        raise ConfigError(
            field,
            f"{name!r} is no scorer of this package; take clip-l14, clip-h14, pickscore, hpsv2.1, "
            "open_clip:NAME/TAG, imagereward or shapes-clip",
        )


def affine_of(facts: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the scale of a folder's reward, (mean, standard deviation).

    Each user of a PAL reward has a scale of their own. None for mixtures of users, for
    quantiles and for rules that lower the level, whose scale was not measured.
    """
    user, rule = options.get("user"), options.get("combine")
    if options.get("quantile") is not None or rule not in (None, "mean"):
        return None
    if isinstance(user, Mapping) and len(user) == 1:
        user = next(iter(user))
    if user is None:
        scale = facts.get("affine")
    else:
        scales = facts.get("affine_of_users", {})
        scale = None if isinstance(user, Mapping) else scales.get(str(user))
    return None if scale is None else (float(scale[0]), float(scale[1]))


def spec_of(
    folder: Path, facts: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> ScorerSpec:
    """Return the card of a folder's reward, with the scale that its options give."""
    from ..registry import get_spec

    plain = TrainedReward.spec
    return replace(
        plain,
        key=f"trained:{folder.name}",
        summary=facts.get("summary", plain.summary),
        backbone=facts["base"].get("backbone"),
        differentiable=get_spec(facts["base"]["scorer"]).differentiable,
        affine=affine_of(facts, options or {}),
    )


def class_of(folder: str | Path) -> type[TrainedReward]:
    """Return the scorer class of a folder, with its card.

    Raises:
        UserError: The folder holds no reward that can be read.
    """
    place = Path(folder)

    class OfFolder(TrainedReward):
        spec = spec_of(place, read_facts(place))

        @classmethod
        def spec_for(cls, options: Mapping[str, Any]) -> ScorerSpec:
            return spec_of(place, read_facts(place), options)

    return OfFolder


def build_head(facts: Mapping[str, Any]) -> RewardHead | UserHead | FactorHead:
    """Build the head that a folder describes, without its weights."""
    if facts["kind"] == "factor":
        return FactorHead()
    if facts["kind"] == "pal":
        sizes = facts["dim"], len(facts["users"]), facts["prototypes"]
        form = facts.get("form", "b")
        if form == "linear":
            return LinearPalHead(*sizes)
        return PalHead(*sizes, facts["hidden"], form)
    kinds = bool(facts.get("quantiles")), bool(facts.get("joint"))
    return RewardHead(facts["dim"], facts["members"], facts["hidden"], *kinds)


def base_fingerprint(scorer: Any) -> str:
    """Hash what decides the embeddings of a base."""
    facts = {"version": scorer.spec.version, "text": scorer.spec.text, **scorer.identity()}
    return text_hash(json.dumps(facts, sort_keys=True, default=str))


def _earlier_fingerprint(scorer: Any) -> str:
    """The hash of an earlier version, which did not look at the tokenizer."""
    facts = {name: value for name, value in scorer.identity().items() if name != "tokenizer"}
    return text_hash(json.dumps(facts, sort_keys=True, default=str))


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `reward.json` of a folder, which makes it a reward."""
    write_atomically(folder / FILE, (json.dumps(facts, indent=2) + "\n").encode())


def read_facts(folder: Path) -> dict[str, Any]:
    """Read `reward.json` of a folder.

    Raises:
        UserError: It is missing, damaged or of a later version.
    """
    try:
        facts = json.loads((folder / FILE).read_text("utf-8"))
        if not isinstance(facts, dict) or not {"format", "base", "head"} <= set(facts):
            raise ValueError("facts are missing")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no reward that can be read ({' '.join(str(error).split())[:100]}); "
            "name a folder that `diffalign reward train` wrote"
        ) from error
    if facts["format"] != FORMAT:
        raise UserError(f"{folder} is of format {facts['format']}; update diffalign")
    check_name(str(facts["base"].get("scorer")), str(folder / FILE))
    return facts
