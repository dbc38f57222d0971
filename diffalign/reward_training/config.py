"""The `reward:` section of a reward's run file.

It imports no torch: the command line makes its help from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from ..config.ranges import Count, Range, Seed, count
from ..config.section import config_section
from ..errors import ConfigError

_Share = Annotated[float, Range(0.0, 0.5, below=True, words="a share from 0 to below 0.5")]
_Part = Annotated[float, Range(0.0, 0.5, words="a share from 0 to 0.5")]
_Weight = Annotated[float, Range(0.0, 1e6)]


@config_section
class RewardConfig:
    """How a reward is trained, on cached embeddings of a CLIP scorer.

    Example:
        ```python
        from diffalign.reward_training import RewardConfig

        config = RewardConfig(output_dir="rewards/mine", members=4)
        assert config.head == "bradley_terry"
        ```
    """

    output_dir: str = "rewards/mine"
    """Folder of the reward, which `load_scorer` reads."""
    overwrite_output_dir: bool = False
    """Replace the reward in the folder."""
    head: Literal["bradley_terry", "pal"] = "bradley_terry"
    """bradley_terry is one reward for everybody. pal has users with tastes of their own
    (arXiv 2406.08469)."""
    hidden: Annotated[int, count(0, 65_536, "0 or more")] = 0
    """Width of a hidden layer. 0 is linear, which suits less than about 5,000 pairs."""
    members: Annotated[int, count(1, 64)] = 1
    """Heads of an ensemble, each fitted to other draws of the prompts."""
    prototypes: Annotated[int, count(1, 64)] = 2
    """PAL's number of tastes."""
    user_hidden: Annotated[int, count(0, 65_536, "0 or more")] = 0
    """Width of PAL's networks. 0 is linear, which suits less than about 5,000 pairs."""
    flip_rate: _Share = 0.0
    """Share of labels that are wrong. The likelihood is corrected for it."""
    smoothing: _Share = 0.0
    """Label smoothing."""
    margin: _Weight = 0.0
    """Lead that a winner must have."""
    nuisance: _Weight = 0.0
    """Weight of the penalty on the correlation with brightness, contrast, saturation,
    sharpness, file size and resolution. The correlations are reported always."""
    l2: Annotated[float, Range(0.0, 1e6)] | None = None
    """Pull of a head's weights to 0. null chooses the best of 1e-4 to 1e-1 (of 0.1
    to 3 for PAL) by the validation pairs."""
    steps: Count = 400
    """Steps of PAL, and of heads with a hidden layer."""
    learning_rate: Annotated[float, Range(0.0, 1.0, above=True)] | None = None
    """Of these steps. null is 1e-3 with a hidden layer, and 1e-2 for a linear PAL."""
    val: _Part = 0.1
    """Share of prompts that choose between steps and penalties."""
    test: _Part = 0.1
    """Share of prompts that the report is about."""
    prompt_weights: bool = True
    """Every prompt counts the same, however many pairs it has."""
    seed: Seed = 0
    """Seed of splits, draws of prompts and networks."""
    cache: str | None = None
    """Folder in which embeddings are kept for the next training."""

    def __post_init__(self) -> None:
        noise = [name for name in ("flip_rate", "smoothing", "margin") if getattr(self, name)]
        if len(noise) > 1:
            raise ConfigError(noise[0], f"give either {' or '.join(noise)}, not both")
        others = ("hidden",) if self.head == "pal" else ("prototypes", "user_hidden")
        for name in others:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:  # type: ignore[attr-defined]
                raise ConfigError(name, f"is no setting of a {self.head} head; leave it out")
        if self.head == "pal" and self.members > 1:
            raise ConfigError("members", "a PAL head has one member; set members to 1")
        if self.learning_rate is None:
            is_linear = self.head == "pal" and not self.user_hidden
            self.learning_rate = 1e-2 if is_linear else 1e-3
        if not self.val or not self.test:
            raise ConfigError("val", "expected shares above 0: the report needs prompts of its own")
