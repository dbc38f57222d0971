"""What `data build` works with: its options, the models that draw, and the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.hashing import text_hash
from ..runtime.seeds import image_seed

SELECTIONS = ("best_worst", "best_vs_rest", "all", "unanimous")
FORMATS = ("both", "pairs", "ranked")


@dataclass
class BuildOptions:
    """Options of `diffalign.annotation.build.build`, named as those of `data build`."""

    prompts: str
    output_dir: Path
    max_prompts: int | None = None
    models: Sequence[str] = ("shapes",)
    lora: Sequence[str] = ()
    scorers: str | None = None
    rewards_config: Path | None = None
    scorer_args: str | None = None
    num_images: int = 4
    format: str = "both"
    pair_selection: str = "best_worst"
    min_margin: float = 0.0
    best: int | None = None
    combine: str | None = None
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    placement: str = "exclusive"
    cache: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Generator:
    """A model that draws.

    Attributes:
        name (`str`): Name of its folder and column, of letters, digits, dot, dash and
            underscore.
        model (`str`): Hub id, folder or `shapes`.
        lora (`str`, *optional*): LoRA on the model.
        fingerprint (`str`): Digest of the weights.
    """

    name: str
    model: str
    lora: str | None
    fingerprint: str

    @property
    def described(self) -> str:
        """The model and its LoRA, in words."""
        return self.model if self.lora is None else f"{self.model} with the LoRA {self.lora}"


class Drawn:
    """One image to draw: its prompt, model, seed and file.

    Args:
        group (`int`): Index of the prompt.
        prompt (`str`): The prompt.
        model (`str`): Name of the generator.
        number (`int`): Number of the image among those of the prompt and model.
        options (`BuildOptions`): Gives the folder and the seed.
    """

    def __init__(
        self, group: int, prompt: str, model: str, number: int, options: BuildOptions
    ) -> None:
        self.group, self.prompt, self.model, self.number = group, prompt, model, number
        digest = text_hash(prompt)
        self.seed = image_seed(options.seed, prompt, number)
        # The name is a digest, because a prompt can hold any characters.
        self.path: Path = (
            options.output_dir / "images" / model / digest[:2] / f"{digest[:20]}-{number:03d}.png"
        )
