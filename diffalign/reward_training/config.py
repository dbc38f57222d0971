"""The `train:` section of a reward's run file.

It imports no torch: the command line makes its help from it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from ..config.ranges import Positive, Range, Seed, count
from ..config.section import config_section, default_of
from ..config.yaml_text import shown
from ..errors import ConfigError
from ..training.loop_config import LoopConfig

_Share = Annotated[float, Range(0.0, 0.5, below=True, words="a share from 0 to below 0.5")]
_Sample = Annotated[float, Range(0.0, 1.0, above=True, words="a share above 0 and up to 1")]
_Part = Annotated[float, Range(0.0, 0.5, words="a share from 0 to 0.5")]
_Weight = Annotated[float, Range(0.0, 1e6)]
_HEAD_SETTINGS = ("output_dir", "overwrite_output_dir", "seed", "max_steps", "learning_rate")
"""Settings of the loop that a head on frozen towers has, too."""
_TOWER_SETTINGS = ("anchor", "anchor_data", "anchor_batch_size")
_FROZEN_SETTINGS = ("hidden", "loss", "members", "nuisance", "l2", "cache", "label_strength")
"""Settings that trained towers do not have."""


@config_section
class RewardConfig(LoopConfig):
    """How a reward is trained.

    With frozen towers, a head is fitted to cached embeddings of the base. The
    towers can be trained, too: by the loop of the diffusion trainers, with its
    settings.

    Example:
        ```python
        from diffalign.reward_training import RewardConfig

        config = RewardConfig(output_dir="rewards/mine", members=4)
        assert config.head == "bradley_terry"
        ```
    """

    output_dir: str = "rewards/mine"
    """Folder of the reward, which `load_scorer` reads."""
    towers: Literal["frozen", "lora", "full"] = "frozen"
    """frozen: a head alone, on cached embeddings, in seconds to minutes on a CPU. lora
    (see the section `lora`) and full train the towers as well."""
    head: Literal["bradley_terry", "pal"] = "bradley_terry"
    """bradley_terry is one reward for everybody. pal has users with tastes of their own
    (arXiv 2406.08469), see `pal_form`."""
    loss: Literal["pairs", "plackett_luce", "thumbs", "ratings", "quantiles"] = "pairs"
    """Of a bradley_terry head on frozen towers. pairs: every two images of a prompt.
    plackett_luce: whole lists. thumbs: likes and dislikes one by one, with a bias per
    user. ratings: stars by cumulative logits. quantiles: the distribution of ratings
    (QRM, arXiv 2409.10164), see `load_scorer(folder, quantile=0.1)`."""
    hidden: Annotated[int, count(0, 65_536, "0 or more")] = 0
    """Width of a hidden layer. 0 is linear, which suits less than about 5,000 pairs."""
    members: Annotated[int, count(1, 64)] = 1
    """Heads of an ensemble, each fitted to other draws of the prompts."""
    prototypes: Annotated[int, count(1, 64)] = 2
    """PAL's number of tastes."""
    pal_form: Literal["linear", "a", "b"] = "linear"
    """linear: a linear reward for everybody, to which a person's taste in images is
    added, whatever the prompt; it is fitted in seconds, needs the fewest votes, and is
    one reward where people do not differ. b: a person's ideal point depends on the
    prompt, and the score is a cosine (PAL-B). a: it is the same for all prompts, and
    the score is the distance from it alone (PAL-A)."""
    user_hidden: Annotated[int, count(0, 65_536, "0 or more")] = 0
    """Width of the networks of PAL-A and PAL-B. 0 is linear, which suits less than
    about 5,000 pairs."""
    flip_rate: _Share = 0.0
    """Share of labels that are wrong. The likelihood is corrected for it."""
    smoothing: _Share = 0.0
    """Label smoothing."""
    margin: _Weight = 0.0
    """Lead that a winner must have."""
    label_strength: bool = False
    """Judge the training labels by an ensemble that has not seen their prompts (arXiv
    2401.06080). Labels of which it is sure get a margin, those that it believes least
    are flipped where it is sure of the opposite (at most a tenth), and the others
    become soft ones. For a bradley_terry head on frozen towers."""
    ties: Literal["half", "drop", "rao_kupper"] = "half"
    """Pairs that were judged equal. half: half a vote for each image. drop: left out.
    rao_kupper: ties have a probability of their own, whose size is learned (Rao and
    Kupper 1967); for a bradley_terry head on frozen towers. As many votes for one
    image as for the other are a tie, too."""
    anchor: _Weight = 0.0
    """Trained towers of CLIP: weight of the contrastive loss beside the preferences, so
    that a few of them do not spoil the towers. Its negatives are the other captions of
    the process's batch."""
    anchor_data: str | None = None
    """Captioned images for `anchor` (columns image and prompt). null takes the prompts
    and their preferred images."""
    anchor_batch_size: Annotated[int, count(2, 65_536)] = 64
    """Captioned images per process and forward pass."""
    nuisance: _Weight = 0.0
    """Weight of the penalty on the correlation with brightness, contrast, saturation,
    sharpness, file size and resolution. The correlations are reported always."""
    l2: Annotated[float, Range(0.0, 1e6)] | None = None
    """Pull of a head's weights to 0. null chooses the best of 1e-4 to 10: a linear head
    of at most 5,000 pairs by cross-validation over the training prompts, others by the
    validation pairs. PAL-A and PAL-B take the better of 0.3 and 1 by the validation
    pairs. The linear form has another pull for tastes, which is chosen by
    cross-validation, too."""
    learning_rate: Positive[float] | None = None  # type: ignore[assignment]
    """null is 1e-3 for a head with a hidden layer, 1e-2 for PAL without one, 1e-4 for a
    LoRA of the towers, and 3e-6 for full towers, as in PickScore's code."""
    val: _Part = 0.1
    """Share of prompts that choose between steps and penalties."""
    test: _Part = 0.1
    """Share of prompts that the report is about."""
    split_seed: Seed = 0
    """Seed of the split. Rewards of other seeds are then measured on equal prompts."""
    subsample: _Sample = 1.0
    """Share of the training prompts that this reward sees, drawn by `seed`. Rewards of
    different halves are wrong about different images, so the average of their weights
    (`diffalign reward average`) or scores is worth more than that of rewards which
    learned the same wrong labels. The heads of `members` have draws of their own."""
    prompt_weights: bool = True
    """Every prompt counts the same, however many pairs it has."""
    cache: str | None = None
    """Folder in which embeddings are kept for the next training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_labels()
        others = ("hidden", "loss", "label_strength")
        for name in others if self.head == "pal" else ("prototypes", "pal_form", "user_hidden"):
            if self._is_set(name):
                raise ConfigError(name, f"is no setting of a {self.head} head; leave it out")
        if self.head == "pal" and self.members > 1:
            raise ConfigError("members", "a PAL head has one member; set members to 1")
        self._check_towers()
        if self.learning_rate is None:
            self.learning_rate = self._usual_rate()
        uses = {"val": "they choose penalty and step", "test": "the report is about them"}
        for name, use in uses.items():
            if not getattr(self, name):
                raise ConfigError(name, f"expected a share of the prompts above 0, got 0; {use}")

    def _check_labels(self) -> None:
        names = ("flip_rate", "smoothing", "margin", "label_strength")
        noise = {name: name for name in names if getattr(self, name)}  # field -> as shown
        if self.ties == "rao_kupper":
            noise["ties"] = "ties: rao_kupper"
            if self.head == "pal" or self.towers != "frozen":
                raise ConfigError(
                    "ties",
                    "rao_kupper is for a bradley_terry head on frozen towers; use half or drop",
                )
        if len(noise) > 1:
            either = " or ".join(noise.values())
            raise ConfigError(next(iter(noise)), f"give either {either}, not both")
        of_pairs = [*noise, *(["ties"] if self.ties == "drop" else [])]
        if self.loss != "pairs" and of_pairs:
            raise ConfigError(of_pairs[0], f"is for pairs, and loss is {self.loss}; leave it out")

    def _is_set(self, name: str) -> bool:
        fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(self)}
        return bool(getattr(self, name) != default_of(fields[name]))

    def _check_towers(self) -> None:
        if self.towers == "frozen":
            loop = [field.name for field in dataclasses.fields(LoopConfig)]
            for name in (*loop, *_TOWER_SETTINGS):
                if name not in _HEAD_SETTINGS and self._is_set(name):
                    raise ConfigError(
                        name,
                        f"{shown(getattr(self, name))} is for trained towers, and towers is "
                        "frozen; set towers: lora or full, or leave it out",
                    )
            is_linear_pal = self.head == "pal" and self.pal_form == "linear"
            if is_linear_pal and self.user_hidden:
                raise ConfigError("user_hidden", "is for pal_form a and b; leave it out")
            if is_linear_pal or (self.head == "bradley_terry" and not self.hidden):
                remedy = "pal_form: b" if is_linear_pal else "hidden"
                usual = {"max_steps": (None,), "learning_rate": (None, self._usual_rate())}
                for name, values in usual.items():
                    if getattr(self, name) not in values:
                        raise ConfigError(
                            name,
                            "has no effect on a linear head, which L-BFGS fits to convergence; "
                            f"leave it out, or set {remedy}",
                        )
            return
        if self.head == "pal":
            raise ConfigError("towers", "pal is a head on frozen towers; set towers: frozen")
        for name in ("anchor_data", "anchor_batch_size"):
            if self._is_set(name) and not self.anchor:
                raise ConfigError(name, "has no effect without anchor; set anchor: 0.3")
        for name in _FROZEN_SETTINGS:
            if self._is_set(name):
                raise ConfigError(
                    name, "applies to frozen towers alone; leave it out, or set towers: frozen"
                )

    def check_processes(self) -> None:
        """Refuse several processes for a head, which is fitted by one.

        Raises:
            ConfigError: The towers are frozen.
        """
        if self.towers == "frozen":
            raise ConfigError(
                "--num_processes", "a head on frozen towers is fitted by one process; leave it out"
            )

    def _usual_rate(self) -> float:
        if self.towers != "frozen":
            return 1e-4 if self.towers == "lora" else 3e-6
        return 1e-2 if self.head == "pal" and not self.user_hidden else 1e-3
