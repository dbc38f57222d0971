"""Find scorers by name: built in, registered, of plug-ins, and classes by path.

A name is looked up as registry key or alias (case and ``-``/``_`` do not matter), then
as entry point of the group ``diffalign.scorers``, then as ``package.module:Class``,
then - only when the user trusts it - as ``./file.py:Class``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..config.yaml_text import expand_home
from ..errors import ConfigError, UserError, one_line
from ..runtime.hashing import bytes_hash, text_hash, value_hash
from ..runtime.protocols import DeviceLike, DtypeLike
from ..runtime.weight_files import loading_errors
from .base import Item, Scorer
from .checkpoints import ConfigLike
from .scoring import BatchScores
from .spec import ScorerSpec

if TYPE_CHECKING:
    from PIL import Image

ENTRY_POINTS = "diffalign.scorers"
_LOADING = threading.RLock()  # a scorer may load another

# key -> where it is written. A file is imported when its scorer is first asked for.
_BUILT_IN = {
    "imagereward": "scorers.imagereward:ImageReward",
    "pickscore": "scorers.clip:PickScore",
    "hpsv2.0": "scorers.clip:HPSv20",
    "hpsv2.1": "scorers.clip:HPSv21",
    "clip-l14": "scorers.clip:ClipL14",
    "clip-h14": "scorers.clip:ClipH14",
    "open_clip": "scorers.clip:OpenClipScore",
    "aesthetic-v1": "scorers.aesthetic:AestheticV1",
    "aesthetic-v2": "scorers.aesthetic:AestheticV2",
    "mps": "scorers.mps:MPS",
    "hpsv3": "scorers.hpsv3:HPSv3",
    "vqascore": "scorers.vqascore:VQAScore",
    "ocr": "scorers.ocr:OCRScore",
    "jpeg_compressibility": "scorers.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "scorers.jpeg:JpegIncompressibility",
    "geneval": "scorers.geneval:GenEval",
    "vlm_judge": "scorers.vlm_judge:VLMJudge",
    "remote": "scorers.remote:RemoteScorer",
    "shapes": "scorers.shapes:ShapesScorer",
    "shapes-clip": "scorers.clip:ShapesClip",
}
_AMBIGUOUS = {
    "hpsv2": ("hpsv2.0", "hpsv2.1"),
    "hps": ("hpsv2.0", "hpsv2.1"),
    "clip": ("clip-l14", "clip-h14", "open_clip:NAME"),
    "clip_score": ("clip-l14", "clip-h14", "open_clip:NAME"),
    "aesthetic": ("aesthetic-v1", "aesthetic-v2"),
    "jpeg": ("jpeg_compressibility", "jpeg_incompressibility"),
}
_ALIASES = {
    "image_reward": "imagereward",
    "pick_score": "pickscore",
    "pickscore_v1": "pickscore",
    "imagereward_v1.0": "imagereward",
    "hps_v3": "hpsv3",
    "vqa_score": "vqascore",
}
_registered: dict[str, type[Scorer]] = {}

T = TypeVar("T")
Target = TypeVar("Target", bound=Callable[..., Any])


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def register_scorer(
    name: str, *, override: bool = False, aliases: Sequence[str] = (), **spec_fields: Any
) -> Callable[[Target], Target]:
    """Add a scorer to the registry: a decorator.

    On a subclass of `Scorer` it registers the class, whose `spec` is made from
    `spec_fields` unless it has one. On a plain function ``(images, prompts, metadata)
    -> list of floats``, with any leading part of these arguments, or on any other class
    whose instances are called so, it registers a scorer around it. The images are PIL
    images. None or NaN marks a missing score.

    Args:
        name (`str`): the key.
        override (`bool`, *optional*, defaults to False): replace a scorer of that name.
        aliases (list of `str`, *optional*): further names.
        **spec_fields: fields of `ScorerSpec`, e.g. ``requires=("image",)``,
            ``higher_is_better``, ``range``.

    Raises:
        ConfigError: the name is taken.

    Example:
        ```python
        from PIL import Image

        from diffalign import load_scorer, register_scorer


        @register_scorer("brightness", requires=("image",))
        def brightness(images):
            return [sum(image.convert("L").histogram()[128:]) for image in images]


        white = Image.new("RGB", (2, 2), "white")
        assert load_scorer("brightness")([white]).item() == 4
        ```
    """
    names = [name, *aliases]
    for each in names:
        if not override and (_fold(each) in _table() or _fold(each) in _AMBIGUOUS):
            raise ConfigError(
                "name",
                f"a scorer called {each!r} exists; choose another name or pass override=True",
            )

    def register(target: Target) -> Target:
        scorer_class = _as_scorer_class(target, name, tuple(aliases), spec_fields)
        for each in names:
            _registered[_fold(each)] = scorer_class
        return target

    return register


def list_scorers() -> list[str]:
    """List the canonical names of all scorers: built in, registered, and of plug-ins.

    Plug-ins are not imported for it.

    Example:
        ```python
        from diffalign import list_scorers

        assert "pickscore" in list_scorers()
        ```
    """
    names = {*_BUILT_IN, *(cls.spec.key for cls in _registered.values()), *_plug_ins()}
    return sorted(names)


def get_spec(name: str, *, trust_remote_code: bool = False) -> ScorerSpec:
    """Return the card of a scorer, without loading weights.

    Args:
        name (`str`): as for `load_scorer`.
        trust_remote_code (`bool`, *optional*, defaults to False): as for `load_scorer`.

    Raises:
        ConfigError: as `load_scorer`.

    Example:
        ```python
        assert get_spec("pickscore").differentiable
        ```
    """
    return find_class(name, trust_remote_code=trust_remote_code)[0].spec


def load_scorer(
    name: str,
    model: str | Path | None = None,
    config: ConfigLike = None,
    tokenizer: str | Path | None = None,
    device: DeviceLike = None,
    dtype: DtypeLike = None,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> Scorer:
    """Load a scorer.

    Args:
        name (`str`): one of `list_scorers()`, an alias, ``open_clip:ViT-B-32``,
            ``package.module:Class``, ``./file.py:Class``, or a folder that `diffalign
            reward train` wrote.
        model (path or `str`, *optional*): weights: a file or folder in the published
            format, or a Hub id. Defaults to the published ones.
        config (*optional*): overrides the architecture, as the scorer's own
            documentation says.
        tokenizer (path, *optional*): folder or file of the tokenizer. Defaults to the
            model's own.
        device (`str`, *optional*, defaults to "auto"): ``auto``, ``cpu``, ``cuda``,
            ``cuda:1``.
        dtype (`torch.dtype` or its name, *optional*, defaults to float32): of the
            towers.
        trust_remote_code (`bool`, *optional*, defaults to False): allow
            ``./file.py:Class``, which runs that file.
        **options: of the scorer, and `batch_size`, `cache` (a file in which scores are
            kept).

    Returns:
        `Scorer`: ready to score.

    Raises:
        ConfigError: unknown or ambiguous name, unknown option, weights that are not
            there.
        UserError: weights that do not fit or are unsafe to load.

    Example:
        ```python
        from PIL import Image

        from diffalign import load_scorer

        scorer = load_scorer("jpeg_compressibility", device="cpu")
        assert scorer([Image.new("RGB", (64, 64))]).shape == (1,)
        ```
    """
    scorer_class, fixed = find_class(name, trust_remote_code=trust_remote_code)
    files = {"model": model, "config": config, "tokenizer": tokenizer}
    accepted = options_of(scorer_class)
    for field, value in {**files, **options}.items():
        if value is not None and field not in accepted:
            kinds = ", ".join(sorted(accepted - {"device", "dtype"}))
            raise ConfigError(
                field, f"{scorer_class.spec.key} has no option of that name; it takes {kinds}"
            )
    values = {
        field: value for field, value in {**files, **fixed, **options}.items() if value is not None
    }
    # Building without memory swaps a method of every torch module for all threads: two
    # at once would find each other's weights missing.
    with _LOADING:
        try:
            return scorer_class(device=device, dtype=dtype, **values)
        except (UserError, torch.OutOfMemoryError):
            raise
        except loading_errors() as error:
            if not scorer_class.__module__.startswith(f"{__package__}."):
                raise  # the user's own code, whose traceback helps
            field = "config" if config is not None else "model"
            raise ConfigError(
                field,
                f"{scorer_class.spec.key} cannot be built from these files "
                f"({one_line(error)}); compare them with the published ones",
            ) from error


def find_class(
    name: str, *, trust_remote_code: bool = False
) -> tuple[type[Scorer], dict[str, Any]]:
    """Find the class behind a name, and the options that the name itself holds.

    ``open_clip:ViT-B-32`` for one names a class and an architecture. Arguments and
    errors as `get_spec`.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError("scorer", f"expected a name, got {name!r}")
    name = expand_home(name)
    folded = _fold(name)
    table = _table()
    if folded in _AMBIGUOUS and folded not in _registered:
        versions = ", ".join(_AMBIGUOUS[folded])
        raise ConfigError(
            "scorer",
            f"{name!r} stands for several scorers whose numbers cannot be compared; "
            f"name one of {versions}",
        )
    if folded in table:
        return _resolve(table[folded]), {}
    for short, point in _plug_ins().items():
        if _fold(short) == folded:
            return _load_plug_in(point), {}
    if folded.startswith("open_clip:"):
        return _resolve(_BUILT_IN["open_clip"]), {"architecture": name.strip()[len("open_clip:") :]}
    if (Path(name.strip()) / "reward.json").is_file():
        class_of: Any = _resolve("scorers.trained:class_of")
        return class_of(name.strip()), {"folder": name.strip()}
    if ":" in name:
        return _from_path(name, trust_remote_code), {}
    known = list_scorers()
    own = "one of your own is ./FILE.py:NAME"
    close = difflib.get_close_matches(folded, [_fold(key) for key in known], n=3, cutoff=0.5)
    matches = [key for fold in close for key in known if _fold(key) == fold]
    hint = f"did you mean {' or '.join(matches)}? " if matches else ""
    raise ConfigError(
        "scorer", f"unknown scorer {name!r}; {hint}there are {', '.join(known)}; {own}"
    )


_trusts_files = False


def trust_files() -> None:
    """Allow scorers of `./FILE.py:NAME` for the rest of this process.

    The commands do it for their option `--trust_remote_code`.
    """
    global _trusts_files
    _trusts_files = True


def is_built_in(name: str) -> bool:
    """Tell whether a name is of a scorer of this package, and runs no other code."""
    folded = _fold(name)
    built_in = {_fold(key) for key in _BUILT_IN} | set(_ALIASES)
    return folded in built_in or folded.startswith("open_clip:")


def _table() -> dict[str, str | type[Scorer]]:
    built_in: dict[str, str | type[Scorer]] = {
        _fold(key): target for key, target in _BUILT_IN.items()
    }
    return built_in | {alias: _BUILT_IN[key] for alias, key in _ALIASES.items()} | _registered


def _resolve(target: str | type[Scorer]) -> type[Scorer]:
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    return target


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _load_plug_in(point: EntryPoint) -> type[Scorer]:
    try:
        target = point.load()
    except Exception as error:  # whatever the plug-in does
        raise ConfigError(
            "scorer",
            f"the plug-in {point.name!r} ({point.value}) cannot be imported: {error}; "
            "update or remove it",
        ) from error
    return _as_scorer_class(target, point.name, (), {})


def _from_path(name: str, trust: bool) -> type[Scorer]:
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError("scorer", f"there is no file {place!r}")
        if not (trust or _trusts_files):
            raise ConfigError(
                "scorer",
                f"{name!r} would run the code in {place}; read it, then pass --trust_remote_code "
                "(in Python trust_remote_code=True)",
            )
        # A file is run once: it may register scorers, and its classes are to stay the
        # same objects.
        content = str(Path(place).resolve()).encode() + b"\0" + Path(place).read_bytes()
        module_name = f"diffalign_scorer_{bytes_hash(content)[:16]}"
        module = sys.modules.get(module_name) or _run_file(place, module_name, name)
    else:
        module = _import(lambda: importlib.import_module(place), name)
    if not hasattr(module, attribute):
        raise ConfigError("scorer", f"{place} has no {attribute!r}")
    return _as_scorer_class(getattr(module, attribute), attribute, (), {})


def _run_file(place: str, module_name: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        _import(lambda: spec.loader.exec_module(module), name)  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _import(action: Callable[[], T], name: str) -> T:
    try:
        return action()
    except Exception as error:  # whatever the user's file does
        raise ConfigError(
            "scorer", f"{name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def options_of(scorer_class: type[Scorer]) -> set[str]:
    """Return the names of the arguments that a scorer can be made with."""
    names: set[str] = set()
    for cls in scorer_class.__mro__:
        if "__init__" in cls.__dict__ and cls is not object:
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _as_scorer_class(
    target: object, name: str, aliases: tuple[str, ...], spec_fields: Mapping[str, Any]
) -> type[Scorer]:
    if isinstance(target, type) and issubclass(target, Scorer):
        if "spec" not in vars(target) or spec_fields:
            fields = {"summary": _first_line(target), **spec_fields}
            target.spec = ScorerSpec(key=name, aliases=aliases, **fields)
        return target
    if not callable(target):
        raise ConfigError(
            "scorer",
            f"{name!r} is {type(target).__name__}, expected a Scorer, a class or a function",
        )
    fields = {"summary": _first_line(target), **spec_fields}
    return _wrap(target, ScorerSpec(key=name, aliases=aliases, **fields))


def _first_line(target: object) -> str:
    return (inspect.getdoc(target) or str(getattr(target, "__name__", ""))).split("\n")[0]


def _wrap(target: Callable[..., Any], spec: ScorerSpec) -> type[Scorer]:
    """Make a scorer class around a function, or around a class of callables."""

    class Wrapped(CallableScorer):
        pass

    Wrapped.spec, Wrapped.target = spec, staticmethod(target)
    Wrapped.__name__ = Wrapped.__qualname__ = getattr(target, "__name__", spec.key)
    return Wrapped


def positional_count(parameters: Iterable[inspect.Parameter], most: int) -> int:
    """Count the positional arguments of a function.

    Args:
        parameters (`Iterable[inspect.Parameter]`): of the function.
        most (`int`): the answer for one with ``*args``.
    """
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return most
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return kinds.count(inspect.Parameter.POSITIONAL_ONLY) + kinds.count(either)


class CallableScorer(Scorer):
    """A scorer around a function of images, prompts and metadata, or fewer of them.

    Args:
        arguments (mapping, *optional*): of the class, where `target` is one.
        **options: as for `Scorer`.

    Raises:
        ConfigError: `arguments` do not fit, or the instances cannot be called.
    """

    target: Any

    def __init__(self, *, arguments: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.arguments = dict(arguments or {})
        is_class = isinstance(self.target, type)
        try:
            self.function = self.target(**self.arguments) if is_class else self.target
        except TypeError as error:
            raise ConfigError(
                "arguments", f"{self.name} cannot be made from {self.arguments!r}: {error}"
            ) from error
        if not is_class and self.arguments:
            raise ConfigError(
                "arguments", f"{self.name} is a function and takes none, got {self.arguments!r}"
            )
        if not callable(self.function):
            raise ConfigError(
                "scorer",
                f"{self.name}: instances of the class cannot be called; "
                "write __call__(images, prompts, metadata)",
            )
        parameters = inspect.signature(self.function).parameters.values()
        self.keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.count = positional_count(parameters, 3)

    def identity(self) -> dict[str, Any]:
        try:  # the whole file, for the functions and numbers that the target uses
            source = Path(inspect.getsourcefile(self.target) or "").read_text("utf-8")
        except (OSError, TypeError, UnicodeDecodeError):  # written in an interactive session
            source = getattr(self.target, "__qualname__", repr(self.target))
        source = f"{source}\0{getattr(self.target, '__qualname__', '')}"
        return {
            "source": text_hash(source),
            # Two functions from one factory have one source, and a function that was
            # written again in a notebook has none. Code, closure and object differ.
            "target": value_hash(self.target),
            "arguments": self.arguments,
        }

    def score_batch(self, items: list[Item]) -> BatchScores:
        columns: tuple[list[Image.Image] | list[str] | list[dict[str, Any]], ...] = (
            [i.image for i in items],
            [i.prompt for i in items],
            [i.metadata for i in items],
        )
        named = dict(zip(("images", "prompts", "metadata"), columns, strict=True))
        keywords = {name: named[name] for name in self.keyword_only & named.keys()}
        scores = self.function(*columns[: self.count], **keywords)
        if isinstance(scores, Tensor):
            scores = scores.detach().float().cpu().reshape(-1)
        elif not isinstance(scores, Sequence):
            try:
                scores = list(scores)
            except TypeError:
                raise UserError(
                    f"{self.name}: returned {type(scores).__name__}, expected one number per image"
                ) from None
        return scores
