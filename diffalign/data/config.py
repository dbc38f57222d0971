"""The `data:` section of a run file.

It imports no torch: the command line makes its help from it.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal, get_args

from diffalign.config.ranges import BatchSize, Count, Range, count, finite
from diffalign.config.section import config_section
from diffalign.config.yaml_text import expand_home, read_yaml_text, shown
from diffalign.errors import ConfigError, UserError

Ties = Literal["drop", "keep"]
VerifyImages = Literal["auto", "header", "full", "none"]
Mismatch = Literal["drop", "letterbox"]
Calibrate = Literal["wins", "sigmoid"]
TIES, VERIFY_IMAGES, MISMATCH = get_args(Ties), get_args(VerifyImages), get_args(Mismatch)
CALIBRATE = get_args(Calibrate)


@config_section
class OnlineConfig:
    """`data.online`: train an offline method on images that the policy draws.

    Scorers judge the images. The dataset gives the prompts.
    """

    every: Count = 10
    """Optimizer steps between two rounds of sampling."""
    k: Annotated[int, count(2, 65_536)] = 8
    """Images per prompt; a pair method takes the best and the worst of them, a ranked
    one all."""
    scorers: list[str] = field(default_factory=list)
    """Names of the scorers that judge, unless the run has a rewards section."""
    num_inference_steps: Annotated[int, count(2, 1000)] = 20
    """Steps of the sampler."""
    guidance_scale: float = 5.0
    """Classifier-free guidance while sampling."""
    eta: Annotated[float, Range(0.0, 10.0)] | None = None
    """Stochasticity of the sampler's steps. 0 is deterministic; the images then differ
    by their initial noise. By default 1 for models that predict noise or v, and 0 for
    flow matching, whose stochastic steps leave noise in the images."""
    rollout_batch_size: BatchSize = 8
    """Images sampled at once."""
    rollout_server: list[str] = field(default_factory=list)
    """Addresses of servers that draw the images: vLLM-Omni, SGLang-diffusion or
    `diffalign serve-model`, with the same model and a disk that both sides see. Empty
    draws here. With a LoRA only."""

    def __post_init__(self) -> None:
        if self.rollout_server and self.eta is not None:
            raise ConfigError("eta", "the server draws by its own rules; leave it out")


@config_section
class DataConfig:
    """Where the preference data come from, and how images get the model's size.

    Example:
        ```python
        from diffalign import DataConfig

        data = DataConfig(
            dataset_name="diffalign-quickstart/dataset",
            resolution=512,
            cache_latents="cache",
        )
        assert data.ties == "drop"
        ```
    """

    dataset_name: str | None = None
    """Hub id, local folder, or a .parquet, .jsonl, .json, .csv, .tsv, .txt or .tar
    file."""
    dataset_config: str | None = None
    """Name of the dataset's configuration (subset) on the Hub."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the Hub dataset; pin it for a run that can be
    repeated."""
    dataset_train_split: str = "train"
    """Split to train on; slices such as train[:1000] work for Hub ids, folders and
    files."""
    dataset_test_split: str | None = None
    """Split for the loss on held-out groups; none by default."""
    dataset_streaming: bool = False
    """Read rows as they come instead of preparing the whole dataset first."""
    train_data_dir: str | None = None
    """Folder with chosen/ and rejected/ (or w/ and l/) or an imagefolder; with
    dataset_name, where its image paths start."""
    allow_remote_images: bool = False
    """Fetch web addresses in image columns: public http and https addresses only, each
    once, kept under ~/.cache/diffalign."""
    allow_outside_paths: bool = False
    """Open image files outside the dataset's folder, named by absolute paths or `..`.
    Set it for a dataset that you trust."""
    columns: dict[str, str] = field(default_factory=dict)
    """Canonical column name -> your column name, e.g. {prompt: text, chosen: winner,
    rejected: loser}."""
    score_columns: list[str] = field(default_factory=list)
    """Columns of scores per image, one per scorer. A ranked row's scores are then its
    win rates over them (RankDPO's phi)."""
    calibrate: Calibrate = "wins"
    """How score_columns become win rates: wins counts won comparisons, sigmoid averages
    the sigmoid of score differences (CaPO, for scores that are logits)."""
    like_threshold: Annotated[float, finite] | None = None
    """Images with a column of ratings (rating, stars): liked from here on, disliked
    below. null reads no ratings."""
    invert_preferences: bool = False
    """Prefer what was rejected: pairs exchanged, scores negated. Any method then trains
    a negative model (Diffusion-NPO)."""
    ties: Ties = "drop"
    """drop removes tied groups (counted and printed); keep gives them weight 0. Ties
    contribute no gradient."""
    verify_images: VerifyImages = "auto"
    """header opens every image once and reads its size, full decodes it, none trusts
    the data. auto is header up to 20,000 rows, and looks at a sample of larger data."""
    max_broken_fraction: Annotated[float, Range(0.0, 1.0, words="a share from 0 to 1")] = 0.05
    """Largest share of unusable rows that is skipped. Above it loading stops and names
    the first of them."""
    online: OnlineConfig | None = None
    """A section: draw pairs or lists with the current policy while training. The
    dataset gives the prompts."""
    resolution: Annotated[int, count(1, 16_384, "a number of pixels above 0")] | None = None
    """Side of the square training images in pixels; none = the model's own."""
    center_crop: bool = True
    """Crop the middle; false crops at a random place, the same one for all images of a
    group."""
    random_flip: bool = False
    """Mirror half of the groups; all images of a group together."""
    aspect_ratio_buckets: str | None = None
    """Sizes to choose from per group, as height,width pairs: "512,512;640,384".
    Replaces resolution."""
    mismatch: Mismatch = "drop"
    """What becomes of a group whose images differ in aspect ratio, under buckets: drop
    it, or letterbox its images."""
    cache_latents: str | None = None
    """Folder for the encoded images; none = encode in every epoch."""
    cache_text_embeddings: str | None = None
    """Folder for the encoded prompts; none = encode in every epoch."""
    num_workers: Annotated[int, count(0, 512, "0 or more")] = 0
    """Processes that read and decode images; 0 = the training process itself."""

    def __post_init__(self) -> None:
        self.cache_latents = expand_home(self.cache_latents)
        self.cache_text_embeddings = expand_home(self.cache_text_embeddings)
        if self.aspect_ratio_buckets is None:
            return
        parse_buckets(self.aspect_ratio_buckets)
        if self.resolution is not None:
            raise ConfigError(
                "aspect_ratio_buckets",
                "give either resolution or aspect_ratio_buckets, not both",
            )


def parse_buckets(text: str, field: str = "aspect_ratio_buckets") -> list[tuple[int, int]]:
    """`"512,512;640,384"` (diffusers' format) as `[(height, width), ...]` in pixels.

    Raises:
        ConfigError: a pair that is not `height,width`, or a size given twice.
    """
    buckets: list[tuple[int, int]] = []
    for pair in text.strip().strip(";").split(";"):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,4})\s*,\s*([1-9][0-9]{0,4})\s*", pair)
        if match is None:
            raise ConfigError(
                field,
                f'expected height,width pairs such as "512,512;640,384", got {shown(pair)} '
                f"in {shown(text)}",
            )
        bucket = (int(match[1]), int(match[2]))
        if bucket in buckets:
            raise ConfigError(field, f"the size {bucket[0]},{bucket[1]} stands twice in {text!r}")
        buckets.append(bucket)
    return buckets


def read_columns(text: str | None) -> dict[str, str] | None:
    """`--columns` of a command, a YAML mapping of canonical names to columns.

    Raises:
        UserError: it is none.
    """
    columns = read_yaml_text(text, "--columns") if text else None
    if columns is None:
        return None
    if not isinstance(columns, dict) or not all(
        isinstance(part, str) for pair in columns.items() for part in pair
    ):
        raise UserError(
            f"--columns: expected a mapping such as '{{prompt: text}}', got {shown(text)}"
        )
    return columns
