"""Captioners say what is in an image, for DCPO (arXiv 2502.06023, section 3.2).

A captioner is any callable `(images, prompts) -> captions`. It gets RGB images and the
prompts that they were drawn for, and returns one caption each. An empty caption means
that it found none: the pair is then left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import ConfigError, UserError, one_line
from ..runtime.hashing import place_hash
from ..runtime.protocols import DeviceLike, DtypeLike
from ..runtime.weight_files import check_component, load_transformers, loading_errors

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature

# The captioner sees the prompt too, as the paper's Q(x | c) does.
INSTRUCTION = (
    "This image was generated for the prompt '{prompt}'. Describe in one sentence what the "
    "image really shows: the objects, their attributes, counts and positions. Answer with the "
    "description alone."
)


@runtime_checkable
class Captioner(Protocol):
    """The interface of a captioner. Plain functions have it too."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[str]: ...


class ShapesCaptioner:
    """Describe a shapes image by a sentence of the grammar, read from its pixels.

    An attribute that cannot be read, such as a colour between two, is taken from the
    prompt. An image without an object gets no caption.
    """

    name = "shapes"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """Return one caption per image.

        Args:
            images (`Sequence[PIL.Image.Image]`): B images.
            prompts (`Sequence[str]`): B prompts.

        Raises:
            UserError: A prompt is not of the shapes world.
        """
        from dataclasses import fields

        from ..shapes.prompts import Scene, parse_prompt
        from ..shapes.verifier import verify

        captions = []
        for image, prompt in zip(images, prompts, strict=True):
            try:
                described = parse_prompt(prompt)
            except ValueError as error:
                raise UserError(
                    f"--captioner: shapes reads images of the shapes world only; {error}"
                ) from error
            verified = verify(image)
            read = {field.name: getattr(verified, field.name) for field in fields(Scene)}
            known = {name: value or getattr(described, name) for name, value in read.items()}
            captions.append(Scene(**known).prompt if read["position"] else "")
        return captions


class TransformersCaptioner:
    """Describe images with any image-to-text model of transformers.

    BLIP and GIT caption the image alone. Chat models (LLaVA, Qwen-VL, ...) get an
    instruction.

    Args:
        model (`str`): Hub id or folder.
        instruction (`str`, *optional*): The instruction for chat models. `{prompt}`
            stands for the prompt.
        max_new_tokens (`int`, *optional*, defaults to `77`): Longest caption, in
            tokens.
        device (`str` or `torch.device`, *optional*): Where the model runs. None takes a
            GPU if there is one.
        dtype (`str` or `torch.dtype`, *optional*): Precision of the model. None is
            bfloat16 on a GPU, else float32.

    Raises:
        UserError: The model cannot be read or is no image-to-text model.
    """

    def __init__(
        self,
        model: str,
        *,
        instruction: str = INSTRUCTION,
        max_new_tokens: int = 77,
        device: DeviceLike = None,
        dtype: DtypeLike = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name, self.instruction, self.max_new_tokens = model, instruction, max_new_tokens
        self.processor = load_part(AutoProcessor, model, "--captioner")
        device, dtype = _placement(device, dtype)
        self.model = (
            load_part(AutoModelForImageTextToText, model, "--captioner", dtype=dtype)
            .to(device)
            .eval()
        )
        self.asks = bool(getattr(self.processor, "chat_template", None))

    def fingerprint(self) -> str:
        """Return what decides the captions: instruction and the model's files."""
        return f"{self.instruction}|{self.max_new_tokens}|{place_hash(self.name)}"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """Return one caption per image, decoded greedily in one batch.

        Args:
            images (`Sequence[PIL.Image.Image]`): B images.
            prompts (`Sequence[str]`): B prompts.
        """
        import torch

        inputs = (
            self._questions(images, prompts)
            if self.asks
            else self.processor(images=list(images), return_tensors="pt")
        )
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        with torch.no_grad():
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
        if self.asks:  # a chat model returns the question too
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)
        ]

    def _questions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> BatchFeature:
        texts = []
        for prompt in prompts:
            # str.format would fail at braces in a prompt.
            question = self.instruction.replace("{prompt}", prompt)
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            ]
            texts.append(
                self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # answers start right after the questions
        return self.processor(
            images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
        )


def make_captioner(name: str, *, trust_remote_code: bool = False, **options: Any) -> Captioner:
    """Make the captioner that a name stands for.

    Args:
        name (`str`): `shapes`, a callable (or a class of one) as
            `package.module:object` or `./file.py:object`, or an image-to-text model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Allow
            `./file.py:object`, which runs that file.
        **options: Options of `TransformersCaptioner`.

    Returns:
        `Captioner`.

    Raises:
        UserError: There is no such thing, or it is not allowed.
    """
    if name == "shapes":
        return ShapesCaptioner()
    if ":" in name:
        return load_callable(name, "--captioner", trust_remote_code)
    return TransformersCaptioner(name, **options)


def load_callable(name: str, field: str, trust: bool) -> Any:
    """Load the object that `module:object` or `./file.py:object` names.

    A class is called without arguments.

    Args:
        name (`str`): The name.
        field (`str`): The option that messages name.
        trust (`bool`): Whether a file may be run.

    Raises:
        ConfigError: A file would be run without the user's trust.
        UserError: There is no such thing, or it cannot be called.
    """
    import importlib
    import importlib.util

    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            if not trust:
                raise ConfigError(
                    field,
                    f"{name!r} would run the code in {place}; read it, then pass "
                    "--trust_remote_code",
                )
            if not Path(place).is_file():
                raise UserError(f"{field}: there is no file {place!r}")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        loaded = getattr(module, attribute)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{field}: cannot load {name!r} ({type(error).__name__}: {error}); name "
            "module:object, ./file.py:object or a model"
        ) from error
    loaded = loaded() if isinstance(loaded, type) else loaded
    if not callable(loaded):
        raise UserError(f"{field}: {name!r} is not callable")
    return loaded


def _placement(device: DeviceLike, dtype: DtypeLike) -> tuple[torch.device, torch.dtype]:
    from ..runtime.devices import read_device, read_dtype

    place = read_device(device)
    return place, read_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))


def load_part(cls: Any, model: str, field: str, **options: Any) -> Any:
    """Load a configuration, processor or tokenizer, or a network with its weights.

    Args:
        cls (`type`): A class of transformers.
        model (`str`): Folder or Hub id.
        field (`str`): The option that messages name.
        **options: Options of `from_pretrained`.

    Raises:
        ConfigError: It is not there, damaged, incomplete, or of another kind.
    """
    try:
        if "Model" in cls.__name__:
            if Path(model).is_dir():
                check_component(Path(model), field)
            return load_transformers(cls, model, field, repr(model), **options)
        return cls.from_pretrained(model, **options)
    except UserError:
        raise
    except loading_errors() as error:
        raise ConfigError(field, f"cannot load {model!r} ({one_line(error)})") from error
