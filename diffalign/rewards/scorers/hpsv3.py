"""HPSv3: Ma et al. 2025, arXiv 2508.03789, a preference model on Qwen2-VL-7B.

The prompt stands in a long question, which ends with a token of its own. The model's
last hidden state at that token goes through three linear layers to a mean and the
logarithm of a deviation. The score is the mean, with higher numbers for better images.

Own code on transformers. The authors' package pins a version of 2024 and imports
training libraries. Three things that it does are kept, since the weights were trained
with them: positions are plain numbers, without Qwen2-VL's axes for images; the rotary
frequencies are rounded to bfloat16; images have about 448 x 448 pixels whatever their
size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import ConfigError, UserError, one_line
from ...runtime.hashing import content_hash
from .. import checkpoints
from ..base import Item, Scorer
from ..checkpoints import ConfigLike
from ..spec import ScorerSpec

_BASE = "Qwen/Qwen2-VL-7B-Instruct"
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
_CELL = 28  # pixels per side of what becomes one token
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and "
    "Text Alignment and give a overall score to estimate the human preference. "
    "Please provide a rating from 0 to 10, with 0 being the worst and 10 being the "
    "best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following "
    "sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological "
    "or logical errors, such as abnormal body structures or nonsensical "
    "environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image "
    "should be clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, "
    "lighting, and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, "
    "including the color scheme, composition, atmosphere, depth of field, and the "
    "overall creative appeal. The scene should convey a sense of harmony and "
    "balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, "
    "such as political, violent, or adult material. If such content is present, "
    "the image quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image "
    "(e.g., person, animal, object) align with the textual description. The "
    "subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or "
    "stylistic style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and "
    "surrounding elements in the image logically fit the scenario described in the "
    "prompt. The environment should support and enhance the subject without "
    "contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the "
    "prompt (e.g., colors, clothing, accessories, expressions, actions) are "
    "faithfully represented in the image. Minor deviations may be acceptable, but "
    "critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of "
    "the prompt are captured in the image. The generated content should not "
    "introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
RATING = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"


def image_size(width: int, height: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Return the size to which an image is resized.

    Sides are multiples of 28, and their product is near `pixels`.

    Args:
        width, height (`int`): Of the image.
        pixels (`int`, defaults to 200704): Pixels to come near to.

    Returns:
        `tuple[int, int]`: Width and height.

    Raises:
        ValueError: The image is more than 200 times as long as wide.

    Example:
        >>> image_size(1024, 768)
        (504, 364)
    """
    if max(width, height) > 200 * min(width, height):
        raise ValueError("an image may be at most 200 times as long as wide")
    sides = [max(_CELL, round(side / _CELL) * _CELL) for side in (width, height)]
    area = sides[0] * sides[1]
    if area > pixels:
        factor = math.sqrt(width * height / pixels)
        sides = [math.floor(side / factor / _CELL) * _CELL for side in (width, height)]
    elif area < pixels:
        factor = math.sqrt(pixels / (width * height))
        sides = [math.ceil(side * factor / _CELL) * _CELL for side in (width, height)]
    return max(_CELL, sides[0]), max(_CELL, sides[1])


def reward_head(width: int, hidden: int = 1024, last: int = 16) -> nn.Sequential:
    """Build the layers behind the special token.

    Args:
        width (`int`): Size of the hidden state.
        hidden, last (`int`): Sizes of the layers between.

    Returns:
        `nn.Sequential`: To mean and logarithm of the deviation.
    """
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(hidden, last),
        nn.ReLU(),
        nn.Linear(last, 2),
    )


def renamed(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a published checkpoint into the weights of network and head.

    Names are those of transformers 4.45, or of a later export.

    Args:
        state (`dict[str, Tensor]`): The tensors of the file.

    Returns:
        `tuple[dict, dict]`: Of `Qwen2VLModel` as transformers names them now, and of
        the head.
    """
    network: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor
        elif name.startswith("lm_head."):
            continue
        elif name.startswith(("model.visual.", "model.language_model.")):
            network[name.removeprefix("model.")] = tensor
        elif name.startswith("model."):
            network["language_model." + name.removeprefix("model.")] = tensor
        else:
            network[name] = tensor
    return network, head


class HPSv3(Scorer):
    """Preference score of a prompt and an image, unbounded, about -5 to 15.

    The checkpoint holds all weights. Of Qwen2-VL only the configuration, the tokenizer
    and the processor are needed.

    Args:
        model (path or `str`, *optional*): `HPSv3.safetensors`, or a folder or Hub id
            that holds it. Defaults to the published one.
        tokenizer (path or `str`, *optional*): Folder or Hub id with configuration,
            tokenizer and processor of the base model. Defaults to the model's own
            folder if it has a `config.json`, else Qwen2-VL-7B-Instruct.
        config (mapping or path, *optional*): Sizes of the head, `{"hidden": 1024,
            "last": 16}`, and `pixels`.
        rounded_positions (`bool`, defaults to `True`): Round positions to bfloat16, as
            the authors' code does.
        **options: Options of every `Scorer`. bfloat16 is the precision of the authors.

    Raises:
        ConfigError: The weights are not found, or do not fit.
    """

    spec = ScorerSpec(
        key="hpsv3",
        aliases=("hps_v3",),
        summary="preference score of a Qwen2-VL-7B reward model, about -5 to 15",
        licence="MIT code, Apache-2.0 weights",
        weights="MizzenAI/HPSv3",
        filename="HPSv3.safetensors",
        requires=("image", "prompt"),
        range=(-5.0, 15.0),
        parameters=8_300_000_000,
        backbone=_BASE,
        preprocess="qwen2-vl-448",
        text="template",
        citation="Ma et al. 2025, arXiv 2508.03789",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        config: ConfigLike = None,
        tokenizer: str | Path | None = None,
        *,
        rounded_positions: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        import transformers

        self.rounded_positions = rounded_positions

        values = {"hidden": 1024, "last": 16, "pixels": PIXELS} | (
            checkpoints.read_config(config) or {}
        )
        self.pixels = int(values["pixels"])
        self.source = checkpoints.find_weights(model, self.spec)
        beside = self.source.parent if (self.source.parent / "config.json").is_file() else _BASE
        base = str(tokenizer or beside)
        try:
            settings = transformers.AutoConfig.from_pretrained(base)
            self.processor: Any = transformers.AutoProcessor.from_pretrained(base)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(
                "tokenizer", f"{base!r} holds no Qwen2-VL configuration ({reason})"
            ) from None
        words = self.processor.tokenizer
        words.padding_side = "right"
        words.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.token = words.convert_tokens_to_ids(REWARD_TOKEN)
        weights, head = renamed(checkpoints.read_state(self.source))
        self.network, self.head = self._build(settings, weights, head, values)
        for module in self.modules():
            module.to(self.device)

    def _build(
        self, settings: Any, weights: dict[str, Tensor], head: dict[str, Tensor], values: Any
    ) -> tuple[Any, nn.Sequential]:
        from transformers import Qwen2VLModel

        embedding = weights.get("language_model.embed_tokens.weight")
        if embedding is None or "0.weight" not in head:
            raise ConfigError(
                "model",
                f"{self.source} is no checkpoint of HPSv3: it has no "
                f"{'head' if embedding is not None else 'embeddings'}",
            )
        if self.token >= len(embedding):
            raise ConfigError(
                "tokenizer",
                f"has {self.token} words, the weights know {len(embedding)}; give that of {_BASE}",
            )
        settings.text_config.vocab_size = len(embedding)
        network = Qwen2VLModel._from_config(settings, dtype=self.dtype)
        rows = reward_head(settings.text_config.hidden_size, values["hidden"], values["last"])
        try:
            network.load_state_dict(weights)
            rows.load_state_dict(head)
        except RuntimeError as error:
            reason = one_line(error)
            raise ConfigError("model", f"{self.source} does not fit {_BASE} ({reason})") from None
        if self.rounded_positions:
            round_frequencies(network)
        return network.requires_grad_(False).eval(), rows.requires_grad_(False).float().eval()

    def modules(self) -> Iterable[nn.Module]:
        return [self.network, self.head]

    def identity(self) -> dict[str, Any]:
        return {
            "weights": content_hash(self.source),
            "pixels": self.pixels,
            "rounded": self.rounded_positions,
        }

    def prepare_item(self, item: Item) -> Image.Image:
        """Resize an image as the authors do: bicubic, by PIL."""
        image = item.image.convert("RGB")
        return image.resize(image_size(*image.size, self.pixels), Image.Resampling.BICUBIC)

    def score_batch(self, items: list[Item]) -> list[float]:
        return [float(self.moments(item.prepared, item.prompt)[0]) for item in items]

    @torch.no_grad()
    def moments(self, image: Image.Image, prompt: str) -> Tensor:
        """Compute mean and logarithm of the deviation of one image's score.

        Args:
            image (`PIL.Image.Image`): Resized, see `prepare_item`.
            prompt (`str`): The prompt.

        Returns:
            `Tensor`: (2,), float32.

        Raises:
            UserError: The prompt spells a token of the model.
        """
        for token in (REWARD_TOKEN, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
            if token in prompt:
                raise UserError(
                    f"hpsv3: a prompt holds {token}, a special token of the model; remove it"
                )
        question = INSTRUCTION.replace("{text_prompt}", prompt) + RATING
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(images=[image], text=[text], return_tensors="pt").to(self.device)
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, 1, -1)
        hidden = self.network(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"].to(self.dtype),
            image_grid_thw=inputs["image_grid_thw"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[0]
        place = (ids[0] == self.token).nonzero()[:, 0]
        return self.head(hidden[place[-1]].float()).cpu()


class BrainFloatRotary(nn.Module):
    """Positions of image patches, computed in bfloat16 as the authors' code does.

    Args:
        rotary: The module of transformers, which computes them in float32.
    """

    inv_freq: Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.clone(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (patches, head size), float32.

        Args:
            x (`Tensor`): Not used.
            position_ids (`Tensor`): Row and column of each patch, (patches, 2).
        """
        brain = torch.bfloat16
        angles = position_ids[..., None].to(brain) * self.inv_freq.to(position_ids.device, brain)
        both = torch.cat([angles[:, 0], angles[:, 1]], dim=-1)
        both = torch.cat([both, both], dim=-1)
        return both.cos().float(), both.sin().float()


def round_frequencies(network: Any) -> None:
    """Compute positions as the authors' code does, whose model is in bfloat16.

    Args:
        network: A `Qwen2VLModel`. Changed in place.
    """
    frequencies = network.language_model.rotary_emb.inv_freq
    frequencies.copy_(frequencies.to(torch.bfloat16).to(frequencies.dtype))
    network.visual.rotary_pos_emb = BrainFloatRotary(network.visual.rotary_pos_emb)
