"""The card of a scorer: what its number means, where its weights come from, what may be done with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

REQUIREMENTS = ("image", "prompt", "metadata")


@dataclass(frozen=True)
class ScorerSpec:
    """What is known of a scorer without loading it.

    Attributes:
        key: canonical name in the registry.
        summary: one line: what the number is.
        licence: of the weights.
        version: of the definition; changes whenever the same image would get another number, and with it every cached value.
        aliases: other names under which it is found.
        weights: Hub repository of the published weights.
        filename: the file inside it; None where the repository is a folder of the usual transformers files.
        revision: commit of the weights; None where it could not be pinned.
        sha256: of the file, checked on loading the published weights; None where it is not known.
        requires: what a call must give, a subset of `image`, `prompt` and `metadata`.
        range: values usually seen. Orientation, not a bound and not a normalisation.
        higher_is_better: the direction; scorers of this package are all True.
        affine: declared (mean, standard deviation) for `normalize`; None where none is published.
        differentiable: `score_tensor` works.
        parameters: number of weights.
        backbone: the pre-trained network it starts from: two scorers with one backbone share their mistakes.
        preprocess: how the image reaches the network.
        text: how the prompt reaches the network.
        dependencies: packages beyond the core.
        citation: paper or source.
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
                f"requires: {', '.join(sorted(unknown))} is unknown; a scorer requires some of {', '.join(REQUIREMENTS)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
