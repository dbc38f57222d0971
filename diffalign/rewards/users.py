"""Describe users by a few of their pairs, as vectors that a network can read.

PPD (Dang et al. 2025, arXiv 2501.06655) reads hidden states of a vision-language model
that was shown four pairs of a user. Here are that, a cheap difference of CLIP
embeddings, the weights of a PAL reward, and a server's description turned into a text
embedding. Anything else is registered with `register_user_embedder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..config.ranges import suggestion
from ..errors import ConfigError, UserError, one_line
from ..runtime.devices import read_device
from .serving.client import ServerFailure, check_url, png_base64, request_json


@dataclass(frozen=True)
class ExamplePair:
    """A pair of a user.

    Attributes:
        prompt (`str`): The prompt of both images.
        chosen (`PIL.Image.Image`): The preferred image.
        rejected (`PIL.Image.Image`): The other one.
    """

    prompt: str
    chosen: Image.Image
    rejected: Image.Image


class UserEmbedder(Protocol):
    """Turns the pairs of users into embeddings.

    Attributes:
        name (`str`): By which `load_user_embedder` finds it again.
    """

    name: str

    def __call__(self, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
        """Embed users.

        Args:
            users (`Sequence`): n users, each with at least one pair.

        Returns:
            `Tensor`: (n, tokens, dim), float32.
        """
        ...


Make = TypeVar("Make", bound=Callable[[], UserEmbedder])
_registered: dict[str, Callable[[], UserEmbedder]] = {}


def register_user_embedder(name: str) -> Callable[[Make], Make]:
    """Register a class or function that makes an embedder of one's own.

    Args:
        name (`str`): For `train.user_embeddings`.

    Raises:
        ConfigError: The name belongs to a built-in kind.

    Example:
        ```python
        @register_user_embedder("brightness")
        class Brightness:
            name = "brightness"

            def __call__(self, users):
                gray = [pairs[0].chosen.convert("L") for pairs in users]
                values = [image.getpixel((0, 0)) / 255 for image in gray]
                return torch.tensor(values)[:, None, None]


        white, black = (Image.new("RGB", (8, 8), name) for name in ("white", "black"))
        pair = ExamplePair("a cat", white, black)
        assert load_user_embedder("brightness")([[pair]]).tolist() == [[[1.0]]]
        ```
    """
    if name == "table" or name.partition(":")[0] in _KINDS:
        raise ConfigError("user_embeddings", f"{name!r} is built in; choose another name")

    def keep(make: Make) -> Make:
        _registered[name] = make
        return make

    return keep


class ClipDifference:
    """Two tokens: where chosen and rejected images differ, and what chosen ones are.

    The first is the mean of clip(chosen) - clip(rejected) over the pairs, of length 1.
    The second is the mean of clip(chosen), of length 1.

    Args:
        scorer (`str`): A scorer with one embedding per image, such as ``clip-l14``.
    """

    def __init__(self, scorer: str) -> None:
        from .registry import load_scorer

        self.scorer: Any = load_scorer(scorer)
        self.name = f"clip_difference:{scorer}"
        if not hasattr(self.scorer, "embed"):
            raise ConfigError("user_embeddings", f"{scorer} has no embeddings of images")

    def __call__(self, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
        """See `UserEmbedder`: (n, 2, dim)."""
        rows = []
        for pairs in users:
            chosen = self.scorer.embed([pair.chosen for pair in pairs])
            rejected = self.scorer.embed([pair.rejected for pair in pairs])
            tokens = torch.stack([(chosen - rejected).mean(0), chosen.mean(0)])
            rows.append(torch.nn.functional.normalize(tokens, dim=1))
        return torch.stack(rows)


class RewardTaste:
    """One token: the weights of a PAL reward's prototypes that explain the pairs.

    These are the users that `diffalign reward add-user` fits, so that a reward and a
    user adapter agree about what a user is.

    Args:
        folder (`str`): A reward with users (`train.head: pal`).

    Raises:
        ConfigError: The reward has no users.
    """

    def __init__(self, folder: str) -> None:
        from .learned.heads import UserHead
        from .scorers.trained import TrainedReward

        self.reward = TrainedReward(folder, device="cpu")
        self.name = f"reward:{folder}"
        if not isinstance(self.reward.head, UserHead):
            raise ConfigError(
                "user_embeddings", f"{folder} is a reward without users; name one of head: pal"
            )
        self.head = self.reward.head

    def __call__(self, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
        """See `UserEmbedder`: (n, 1, prototypes)."""
        return torch.stack([self.weights(pairs) for pairs in users])[:, None]

    @torch.no_grad()
    def _margins(self, pairs: Sequence[ExamplePair]) -> Callable[[Tensor], Tensor]:
        base: Any = self.reward.base
        (text,) = base.text_features([pair.prompt for pair in pairs])
        chosen, rejected = (
            base.embed(images)
            for images in ([p.chosen for p in pairs], [p.rejected for p in pairs])
        )
        return self.head.margins(chosen, rejected, text.float().cpu(), self.reward.temperature)

    def weights(self, pairs: Sequence[ExamplePair]) -> Tensor:
        """Fit one user, (prototypes,), sums to 1."""
        from .learned.pal import fit_new_user, user_weights

        known = self.head.logits.detach()
        return user_weights(
            fit_new_user(self._margins(pairs), torch.ones(len(pairs)), known)
        ).float()


QUESTION = (
    "Below are image pairs that one person compared. Of each pair they preferred the first "
    "image. Describe in a few sentences what this person likes in images: style, colors, "
    "composition, mood, level of detail. Describe the taste, not the subjects of the prompts."
)


def conversation(
    pairs: Sequence[ExamplePair], image: Callable[[Image.Image], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Build the message that shows a user's pairs to a vision-language model.

    Args:
        pairs (`Sequence[ExamplePair]`): The pairs.
        image (`Callable`): Makes the part of the message that holds an image.

    Returns:
        `list[dict]`: Messages in the form of chat templates.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    for number, pair in enumerate(pairs, 1):
        parts.append(
            {"type": "text", "text": f"\nPair {number}, prompt: {pair.prompt}\npreferred:"}
        )
        parts.append(image(pair.chosen))
        parts.append({"type": "text", "text": "not preferred:"})
        parts.append(image(pair.rejected))
    return [{"role": "user", "content": parts}]


class HiddenStates:
    """One token: the last hidden state of a vision-language model of transformers.

    It is the mean of the last layer over the positions of the generation prompt, behind
    the pairs, as PPD reads its users.

    Args:
        model (`str` or `Path`): Hub id or folder.
        image_size (`int`, *optional*, defaults to `384`): Images are shown at this
            square.

    Raises:
        UserError: The model cannot be loaded.
    """

    def __init__(self, model: str | Path, image_size: int = 384) -> None:
        import transformers

        self.name, self.image_size = f"transformers:{model}", image_size
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(str(model))
            network = transformers.AutoModelForImageTextToText.from_pretrained(str(model))
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise UserError(
                f"user_embeddings: {str(model)!r} cannot be loaded ({reason})"
            ) from error
        self.network: Any = network.requires_grad_(False).eval().to(read_device(None))

    @torch.no_grad()
    def __call__(self, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
        """See `UserEmbedder`: (n, 1, dim)."""
        rows = []
        for pairs in users:
            images: list[Image.Image] = []

            def part(image: Image.Image, images: list[Image.Image] = images) -> dict[str, Any]:
                images.append(image.convert("RGB").resize((self.image_size, self.image_size)))
                return {"type": "image"}

            messages = conversation(pairs, part)
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            bare = self.processor.apply_chat_template(messages, add_generation_prompt=False)
            inputs = self.processor(images=images, text=text, return_tensors="pt")
            output = self.network(**inputs.to(self.network.device), output_hidden_states=True)
            added = self.processor.tokenizer(text[len(bare) :], add_special_tokens=False)
            tail = len(added.input_ids)
            rows.append(output.hidden_states[-1][0, -max(tail, 1) :].float().mean(0).cpu())
        return torch.stack(rows)[:, None]


class TasteServer:
    """One token: a server's words about a user's taste, embedded as text.

    A server with OpenAI's interface describes the taste (`/v1/chat/completions`) and
    embeds the description (`/v1/embeddings`). Temperature 0, fixed seed.

    Args:
        address (`str`): ``URL#MODEL`` or ``URL#MODEL,EMBEDDING_MODEL``.
        timeout (`float`, *optional*, defaults to `120.0`): Seconds of one request.

    Raises:
        ConfigError: No model is named.
    """

    def __init__(self, address: str, timeout: float = 120.0) -> None:
        url, _, models = address.partition("#")
        chat, _, embedding = models.partition(",")
        if not chat:
            raise ConfigError("user_embeddings", f"expected server:URL#MODEL, got server:{address}")
        self.url = check_url(url, "user_embeddings").removesuffix("/v1")
        self.chat, self.embedding, self.timeout = chat, embedding or chat, timeout
        self.name = f"server:{address}"

    def __call__(self, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
        """See `UserEmbedder`: (n, 1, dim).

        Raises:
            UserError: The server does not answer, or not with what was asked.
        """
        return torch.stack([self._embedded(self.describe(pairs)) for pairs in users])[:, None]

    def describe(self, pairs: Sequence[ExamplePair]) -> str:
        """Ask the server to describe a user's taste.

        Args:
            pairs (`Sequence[ExamplePair]`): The user's pairs.
        """

        def part(image: Image.Image) -> dict[str, Any]:
            data = f"data:image/png;base64,{png_base64(image)}"
            return {"type": "image_url", "image_url": {"url": data}}

        payload = {
            "model": self.chat,
            "messages": conversation(pairs, part),
            "temperature": 0,
            "seed": 0,
            "max_tokens": 256,
        }
        reply = self._ask("/v1/chat/completions", payload)
        try:
            return str(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"user_embeddings: {self.url} gave no answer about a user") from None

    def _embedded(self, text: str) -> Tensor:
        reply = self._ask("/v1/embeddings", {"model": self.embedding, "input": text})
        try:
            return torch.tensor(reply["data"][0]["embedding"], dtype=torch.float32)
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"user_embeddings: {self.url} gave no embedding of a text") from None

    def _ask(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        try:
            return request_json(f"{self.url}{path}", payload, timeout=self.timeout)
        except ServerFailure as error:
            raise UserError(f"user_embeddings: {self.url}{path}: {error}") from error


_KINDS: dict[str, Callable[[str], UserEmbedder]] = {
    "clip_difference": ClipDifference,
    "reward": RewardTaste,
    "transformers": HiddenStates,
    "server": TasteServer,
}


def load_user_embedder(name: str) -> UserEmbedder:
    """Make an embedder by its name.

    Args:
        name (`str`): ``clip_difference:SCORER``, ``reward:FOLDER``,
            ``transformers:MODEL``, ``server:URL#MODEL``, or a registered name.

    Raises:
        ConfigError: There is none of this name.
    """
    if name in _registered:
        return _registered[name]()
    kind, _, rest = name.partition(":")
    if kind in _KINDS and rest:
        return _KINDS[kind](rest)
    known = [*_registered, *(f"{kind}:..." for kind in _KINDS)]
    raise ConfigError(
        "user_embeddings",
        f"there is no embedder {name!r}{suggestion(name, known)}; there are table, "
        f"{', '.join(known)}",
    )


def embed_users(embedder: UserEmbedder, users: Sequence[Sequence[ExamplePair]]) -> Tensor:
    """Embed users, and check what came back.

    Args:
        embedder (`UserEmbedder`): The embedder.
        users (`Sequence`): n users, each with at least one pair.

    Returns:
        `Tensor`: (n, tokens, dim), float32.

    Raises:
        UserError: It has another shape, or numbers that are not finite.
    """
    values = torch.as_tensor(embedder(users)).detach().float().cpu()
    if values.ndim != 3 or len(values) != len(users) or 0 in values.shape:
        raise UserError(
            f"user_embeddings: {embedder.name} gave shape {tuple(values.shape)} for {len(users)} "
            "users, expected (users, tokens, dim)"
        )
    if not bool(values.isfinite().all()):
        raise UserError(f"user_embeddings: {embedder.name} gave numbers that are not finite")
    return values
