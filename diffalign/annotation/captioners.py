"""Captioners: what is in an image, for DCPO's caption strategies (arXiv 2502.06023, section 3.2).

A captioner is any callable ``(images, prompts) -> captions``: RGB images and the prompts they were drawn for, one caption
each. An empty caption means that it could not say; the pair is then left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import ConfigError, UserError
from ..runtime.weight_files import check_component, explained, load_transformers, loading_errors

if TYPE_CHECKING:
    from PIL import Image

# The captioner sees the prompt too: Q(x | c).
INSTRUCTION = (
    "This image was generated for the prompt '{prompt}'. Describe in one sentence what the image really shows: the objects, "
    "their attributes, counts and positions. Answer with the description alone."
)


@runtime_checkable
class Captioner(Protocol):
    """What a captioner must do; plain functions fit."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[str]: ...


class ShapesCaptioner:
    """Reads the attributes of a shapes image from its pixels and writes them as a sentence of the grammar.

    An attribute that cannot be read (a colour between two, a shape that is none) is taken from the prompt; an image without an
    object gets no caption.
    """

    name = "shapes"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """One caption per image.

        Raises:
            UserError: a prompt that is not of the shapes world.
        """
        from dataclasses import fields

        from ..shapes.prompts import Scene, parse_prompt
        from ..shapes.verifier import verify

        captions = []
        for image, prompt in zip(images, prompts, strict=True):
            try:
                asked = parse_prompt(prompt)
            except ValueError as error:
                raise UserError(
                    f"--captioner: shapes reads images of the shapes world only; {error}"
                ) from error
            seen = verify(image)
            read = {field.name: getattr(seen, field.name) for field in fields(Scene)}
            known = {name: value or getattr(asked, name) for name, value in read.items()}
            captions.append(Scene(**known).prompt if read["position"] else "")
        return captions


class TransformersCaptioner:
    """Any image-to-text model of transformers: BLIP and GIT caption the image alone, chat models (LLaVA, Qwen-VL, ...) are asked.

    Args:
        model (`str`): Hub id or folder.
        instruction (`str`): for chat models; ``{prompt}`` stands for the prompt.
        max_new_tokens (`int`): of a caption.
        device, dtype (*optional*): where and how it runs; None for a GPU with bfloat16 if there is one.

    Raises:
        UserError: the model cannot be read or is no image-to-text model.
    """

    def __init__(
        self,
        model: str,
        *,
        instruction: str = INSTRUCTION,
        max_new_tokens: int = 77,
        device: Any = None,
        dtype: Any = None,
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

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """One caption per image, greedy, in one batch."""
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

    def _questions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        texts = []
        for prompt in prompts:
            # Not str.format: a prompt may hold braces.
            asked = self.instruction.replace("{prompt}", prompt)
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
            ]
            texts.append(
                self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # all answers start where the questions end
        return self.processor(
            images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
        )


def make_captioner(name: str, *, trust_remote_code: bool = False, **options: Any) -> Captioner:
    """``shapes``, ``package.module:object`` or ``./file.py:object`` (a callable, or a class of one), or an image-to-text model.

    Args:
        trust_remote_code: allow ``./file.py:object``, which runs that file.
        options: of `TransformersCaptioner`.
    """
    if name == "shapes":
        return ShapesCaptioner()
    if ":" in name:
        return load_callable(name, "--captioner", trust_remote_code)
    return TransformersCaptioner(name, **options)


def load_callable(name: str, field: str, trust: bool) -> Any:
    """The object that ``module:object`` or ``./file.py:object`` names; a class is made without arguments.

    Raises:
        UserError: no such thing, it cannot be called, or a file without the user's trust.
    """
    import importlib
    import importlib.util

    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            if not trust:
                raise ConfigError(
                    field,
                    f"{name!r} would run the code in {place}; read it, then pass --trust_remote_code",
                )
            if not Path(place).is_file():
                raise UserError(f"{field}: there is no file {place!r}")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, attribute)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code does
        raise UserError(
            f"{field}: cannot load {name!r} ({type(error).__name__}: {error}); name module:object, ./file.py:object or a model"
        ) from error
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise UserError(f"{field}: {name!r} is not callable")
    return found


def _placement(device: Any, dtype: Any) -> tuple[Any, Any]:
    from ..runtime.devices import read_device, read_dtype

    place = read_device(device)
    return place, read_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))


def load_part(cls: Any, model: str, field: str, **options: Any) -> Any:
    """A configuration, processor or tokenizer, or a network with its weights.

    Args:
        cls: of transformers.
        model: folder or Hub id.
        field: the option that names it.
        **options: of `from_pretrained`.

    Raises:
        ConfigError: not there, damaged, incomplete, or of another kind.
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
        raise ConfigError(field, f"cannot load {model!r} ({explained(error)[:200]})") from error
