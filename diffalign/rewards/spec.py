"""The card of a scorer: what its number means and where its weights come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

REQUIREMENTS = ("image", "prompt", "metadata")


@dataclass(frozen=True)
class ScorerSpec:
    """What is known of a scorer without loading it.

    Attributes:
        key (`str`): canonical name in the registry.
        summary (`str`): one line: what the number is.
        licence (`str`): of the weights.
        version (`str`): of the definition. It changes whenever the same image would get
            another number, and with it every cached value.
        aliases (tuple of `str`): other names under which it is found.
        weights (`str` or None): Hub repository of the published weights.
        filename (`str` or None): the file inside it. None where the repository is a
            folder of the usual transformers files.
        revision (`str` or None): commit of the weights. None where it is not pinned.
        sha256 (`str` or None): of the file, which `diffalign doctor` checks. None where
            it is not known.
        requires (tuple of `str`): what a call must give: some of `image`, `prompt` and
            `metadata`.
        range (pair or None): values usually seen. Orientation, not a bound and not a
            normalisation.
        higher_is_better (`bool`): the direction. Scorers of this package are all True.
        affine (pair or None): declared (mean, standard deviation) for `normalize`. None
            where none is published.
        differentiable (`bool`): `score_tensor` works.
        parameters (`int` or None): number of weights.
        backbone (`str` or None): the pre-trained network it starts from. Two scorers
            with one backbone share their mistakes.
        preprocess (`str`): how the image reaches the network.
        text (`str`): how the prompt reaches the network.
        dependencies (tuple of `str`): packages beyond the core.
        citation (`str`): paper or source.

    Raises:
        ValueError: `requires` names something unknown.

    Example:
        ```python
        spec = ScorerSpec("brightness", "mean pixel", requires=("image",))
        assert spec.as_dict()["licence"] == "unknown"
        ```
    """

    key: str
    summary: str
    licence: str = "unknown"
    version: str = "1"
    aliases: tuple[str, ...] = ()
    weights: str | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None
    requires: tuple[str, ...] = ("image", "prompt")
    range: tuple[float, float] | None = None
    higher_is_better: bool = True
    affine: tuple[float, float] | None = None
    differentiable: bool = False
    parameters: int | None = None
    backbone: str | None = None
    preprocess: str = "none"
    text: str = "none"
    dependencies: tuple[str, ...] = ()
    citation: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.requires) - set(REQUIREMENTS)
        if unknown:
            raise ValueError(
                f"requires: {', '.join(sorted(unknown))} is unknown; "
                f"a scorer requires some of {', '.join(REQUIREMENTS)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)
