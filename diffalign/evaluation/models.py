"""Describe and open a model that draws images.

It is a pipeline as it is, with a LoRA at some scale, under negative guidance, or
steered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..backbones.loading import ModelSource
from ..backbones.lora import adapter_state, denoiser
from ..config.ranges import finite
from ..config.section import suggestion
from ..config.yaml_text import read_yaml_text, shown
from ..errors import ConfigError, UserError
from ..generation.guidance import NegativeGuidance, load_negative
from ..generation.pipelines import default_settings, load_for_scoring, with_lora
from ..generation.sampling import generate
from ..generation.users import load_users
from ..runtime.hashing import (
    content_hash,
    module_hash,
    path_hash,
    place_hash,
    scheduler_facts,
    text_hash,
    value_hash,
)
from ..runtime.seeds import image_seed
from ..runtime.weight_files import could_be_hub_id
from ..shapes.models import embedded_name

if TYPE_CHECKING:
    import torch

    from ..runtime.missing import MaybeImage
    from ..runtime.protocols import DeviceLike, Pipeline
    from ..steering.fk_steering import FKSteering

ModelLike: TypeAlias = "str | Path | Mapping[str, Any] | ModelSpec | FKSteering | Pipeline"
"""What describes a model, see `parse_model`."""

Draw: TypeAlias = "Callable[..., list[MaybeImage]]"
"""(prompts, seeds, **arguments of the pipeline's call) -> one image each."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to draw with, described by where it comes from.

    Attributes:
        name (`str`): Letters, digits, dot, dash, underscore and @.
        model (`str` or pipeline): Hub id, folder, ``shapes``, or a loaded pipeline.
        lora (`str`, *optional*): Folder, file or Hub id of a LoRA on the model.
        lora_scale (`float`, defaults to 1): Strength of the LoRA.
        negative (`str`, *optional*): Negative model of Diffusion-NPO or Self-NPO, a
            LoRA or a pipeline folder.
        alpha (`float`, defaults to 1): See `NegativeGuidance`.
        beta (`float`, defaults to 1): See `NegativeGuidance`.
        steer (`dict` or `FKSteering`, *optional*): Arguments of `FKSteering` with its
            ``scorer``, or an `FKSteering`. The best particle of every population is the
            image.
        guidance_scale (`float`, *optional*): Guidance of this model alone. Defaults to
            that of the call.
        user_adapter (`str`, *optional*): Folder of a PPD run on the model.
        user (`str` or `dict`, *optional*): User to draw for: a name, or user -> weight.
            None draws without a user.
    """

    name: str
    model: Any = None
    lora: str | None = None
    lora_scale: float = 1.0
    negative: str | None = None
    alpha: float = 1.0
    beta: float = 1.0
    steer: Mapping[str, Any] | FKSteering | None = None
    guidance_scale: float | None = None
    user_adapter: str | None = None
    user: str | Mapping[str, float] | None = None

    @property
    def described(self) -> str:
        """One line that says what the model is."""
        parts = [self.model if isinstance(self.model, str) else type(self.model).__name__]
        if self.lora is not None:
            scale = f" at scale {self.lora_scale:g}" if self.lora_scale != 1 else ""
            parts.append(f"LoRA {self.lora}{scale}")
        if self.negative is not None:
            strength = f"alpha {self.alpha:g}, beta {self.beta:g}"
            parts.append(f"negative model {self.negative} ({strength})")
        if self.user_adapter is not None:
            parts.append(f"user {self.user or 'none'} of {self.user_adapter}")
        if self.steer is not None:
            if isinstance(self.steer, Mapping):
                options = ", ".join(f"{name} {value}" for name, value in self.steer.items())
            else:
                options = f"num_particles {self.steer.num_particles}"
            parts.append(f"steered ({options}), best particle")
        if self.guidance_scale is not None:
            parts.append(f"guidance {self.guidance_scale:g}")
        return ", ".join(parts)

    def fingerprint(self) -> str:
        """Hash the weights and everything else that decides an image.

        Raises:
            ConfigError: The model or LoRA is not there.
        """
        if isinstance(self.model, str):
            source = ModelSource(self.model)
            text = source.fingerprint(*source.component_names())
        else:
            text = f"{_pipeline_hash(self.model)}{adapter_state(self.model) or ''}"
        for part in (self.lora, self.negative):
            place = None if part is None else Path(part).expanduser()
            if place is not None and (place / "model_index.json").is_file():
                text += f"-{path_hash(place)}"
            elif place is not None and place.exists():
                text += f"-{content_hash(place)}"
            else:
                text += f"-{part}"
        steer: object = self.steer
        if isinstance(self.steer, Mapping):
            arguments = self.steer.get("scorer_args") or {}
            files = [place_hash(v) for v in (self.steer.get("scorer"), *arguments.values())]
            text += "".join(f"-{content}" for content in files if content)
        elif self.steer is not None:
            steer = self.steer.fingerprint()
        text += repr((self.lora_scale, self.alpha, self.beta, steer))
        if isinstance(self.model, str) and embedded_name(self.model) is None:
            defaults = default_settings(self.model)
            text += f"-{defaults}" if defaults else ""
        if self.guidance_scale is not None:
            text += f"-guidance {self.guidance_scale}"
        if self.user_adapter is not None:
            text += f"-{content_hash(Path(self.user_adapter))}-user {self.user}"
        return text_hash(text)[:16]


def _pipeline_hash(pipe: Any) -> str:
    """Hash the networks of a loaded pipeline and the settings of its scheduler."""
    from torch.nn import Module

    components = getattr(pipe, "components", None) or {"denoiser": denoiser(pipe)}
    parts = []
    for name, part in sorted(components.items()):
        if isinstance(part, Module):
            parts.append(f"{name} {module_hash(part)}")
        elif name == "scheduler":
            parts.append(value_hash(scheduler_facts(part)))
    return text_hash(*parts)


def parse_model(
    value: ModelLike, field: str, *, base: ModelSpec | None = None, taken: Sequence[str] = ()
) -> ModelSpec:
    """Read what describes a model.

    Args:
        value: One of
            - a text ``[NAME=]SOURCE[@SCALE]``, where SOURCE is a pipeline or a LoRA on
              the base's model,
            - a mapping of the fields of `ModelSpec`, also as YAML text,
            - a pipeline,
            - an `FKSteering`.
        field (`str`): Name of the option, for error messages.
        base (`ModelSpec`, *optional*): Its `model` is the default.
        taken (`Sequence[str]`, *optional*): Names that other models have.

    Returns:
        `ModelSpec`, with a name that is not taken.

    Raises:
        ConfigError: It is none of these, or something in it is not there.
    """
    values = _values(value, field, base)
    known = [f.name for f in dataclasses.fields(ModelSpec)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{field}.{key}",
                f"unknown key{suggestion(str(key), known)}; a model takes {', '.join(known)}",
            )
    values.setdefault("model", base.model if base is not None else None)
    if values["model"] is None:
        raise ConfigError(field, f"names no model: {value!r}")
    for key in ("lora_scale", "alpha", "beta"):
        number = values.get(key, 1.0)
        if not finite.holds(number):
            raise ConfigError(f"{field}.{key}", f"expected a number, got {shown(number)}")
        values[key] = float(number)
    guidance = values.get("guidance_scale")
    if guidance is not None:
        if not finite.holds(guidance):
            raise ConfigError(
                f"{field}.guidance_scale", f"expected a number, got {shown(guidance)}"
            )
        values["guidance_scale"] = float(guidance)
    user = values.get("user")
    if isinstance(user, Mapping):
        values["user"] = {str(name): weight for name, weight in user.items()}
    elif user is not None:  # YAML reads a number as one
        values["user"] = str(user)
    _check_files(values, field)
    name = str(values.get("name") or _name(values, base))
    if not re.fullmatch(r"[A-Za-z0-9._@-]+", name) or name.startswith("."):
        raise ConfigError(
            f"{field}.name", f"expected letters, digits, '.', '-', '_' and '@', got {name!r}"
        )
    if name in taken:
        if values.get("name"):
            raise ConfigError(
                f"{field}.name",
                f"there are two models called {name!r}; give one another name, NAME=...",
            )
        name = next(n for i in range(2, 1000) if (n := f"{name}-{i}") not in taken)
    return ModelSpec(**{**values, "name": name})


def _values(value: ModelLike, field: str, base: ModelSpec | None) -> dict[str, Any]:
    """Read the fields of a `ModelSpec`, as far as they are stated."""
    from ..steering.fk_steering import FKSteering

    if isinstance(value, ModelSpec):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, FKSteering):
        return {"model": value.pipe, "steer": value}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = read_yaml_text(value, field)
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, (str, Path)):
        if not hasattr(value, "components"):
            raise ConfigError(
                field,
                f"expected a model, a LoRA, a mapping or a pipeline, got {type(value).__name__}",
            )
        return {"model": value}
    return _read_text(str(value), field, base)


def _read_text(text: str, field: str, base: ModelSpec | None) -> dict[str, Any]:
    """Read ``[NAME=]SOURCE[@SCALE]``. The name of an existing file is never split."""
    fields: dict[str, Any] = {}
    named = re.match(r"([A-Za-z0-9._-]+)=(.+)", text)
    if named and not Path(text).exists():
        fields["name"], text = named.groups()
    scaled = re.match(r"(.+)@([-+.\deE]+)$", text)
    if scaled and not Path(text).exists():
        try:
            text, fields["lora_scale"] = scaled.group(1), float(scaled.group(2))
        except ValueError:
            raise ConfigError(
                field, f"expected a number behind '@', got {shown(scaled.group(2))}"
            ) from None
    place = Path(text).expanduser()
    is_lora = place.suffix == ".safetensors" or (
        place.is_dir()
        and not (place / "model_index.json").is_file()
        and any(place.glob("*.safetensors"))
    )
    if base is not None and (is_lora or "lora_scale" in fields):
        return {**fields, "lora": str(place) if place.exists() else text}
    return {**fields, "model": str(place) if place.is_dir() else text}


def _check_files(values: Mapping[str, Any], field: str) -> None:
    """Check that the model, the LoRA and the negative model are there.

    Raises:
        ConfigError: One is not, or the steering names no scorer.
    """
    if isinstance(values["model"], str):
        try:
            ModelSource(values["model"])
        except ConfigError as error:
            raise ConfigError(field, error.problem) from None
    for key in ("lora", "negative"):
        source = values.get(key)
        if source is None:
            continue
        place = Path(str(source)).expanduser()
        is_local = place.is_absolute() or place.exists() or not could_be_hub_id(str(source))
        has_weights = place.is_file() or (place.is_dir() and any(place.rglob("*.safetensors")))
        if is_local and not has_weights:
            raise ConfigError(field, f"there is no file or folder with safetensors {str(source)!r}")
    adapter = values.get("user_adapter")
    if adapter is not None and not (Path(str(adapter)) / "user_adapter.json").is_file():
        raise ConfigError(f"{field}.user_adapter", f"there is no PPD run in {str(adapter)!r}")
    if values.get("user") is not None and adapter is None:
        raise ConfigError(f"{field}.user", "name the folder of a PPD run as user_adapter")
    steer = values.get("steer")
    if isinstance(steer, Mapping) and not steer.get("scorer"):
        raise ConfigError(
            f"{field}.steer",
            "names no scorer; write for example steer: {scorer: pickscore, lmbda: 10}",
        )
    if isinstance(steer, Mapping) and isinstance(steer["scorer"], str):
        from ..rewards.registry import find_class

        try:
            find_class(steer["scorer"])
        except ConfigError as error:
            raise ConfigError(f"{field}.steer.scorer", error.problem) from None


def _name(values: Mapping[str, Any], base: ModelSpec | None) -> str:
    """Choose a name for a model that was given none."""
    if base is None:
        return "base"
    source = values.get("lora") or values.get("negative")
    if source is None and isinstance(values.get("user"), str):
        source = values["user"]
    if source is None:
        source = "steered" if values.get("steer") is not None else values["model"]
    if not isinstance(source, (str, Path)):
        return "tuned"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name).strip("-.") or "tuned"
    is_scaled = values.get("lora") and values["lora_scale"] != 1
    return f"{slug}@{values['lora_scale']:g}" if is_scaled else slug


@contextmanager
def opened(
    spec: ModelSpec,
    *,
    device: DeviceLike = None,
    dtype: torch.dtype | None = None,
    field: str = "model",
) -> Iterator[Draw]:
    """Load a model and give the function that draws with it.

    Args:
        spec (`ModelSpec`): The model. A pipeline in it is left as it was.
        device (*optional*): Where a model given by name runs. Defaults to the GPU if
            there is one.
        dtype (*optional*): Number type of a model given by name. Defaults to bfloat16
            on a GPU.
        field (`str`, defaults to ``model``): Name of the option, for error messages.

    Yields:
        A function that draws one image per prompt and seed. The noise of an image
        depends on nothing else.

    Raises:
        UserError: Weights do not fit together.
    """
    loaded = isinstance(spec.model, str)
    pipe = load_for_scoring(spec.model, dtype=dtype, device=device) if loaded else spec.model
    defaults = default_settings(spec.model) if loaded else {}
    with ExitStack() as stack:
        if spec.lora is not None:
            stack.enter_context(with_lora(pipe, spec.lora, spec.lora_scale, field))
        if spec.negative is not None:
            negative = load_negative(pipe, spec.negative)
            stack.enter_context(
                NegativeGuidance(pipe, negative=negative, alpha=spec.alpha, beta=spec.beta)
            )
        if spec.user_adapter is not None:
            users = load_users(pipe, spec.user_adapter)
            stack.callback(users.adapter.detach)
            stack.enter_context(users.apply(spec.user))
        if spec.steer is None:

            def draw(
                prompts: Sequence[str], seeds: Sequence[int], **settings: Any
            ) -> list[MaybeImage]:
                return generate(
                    pipe,
                    prompts,
                    seeds,
                    batch_size=len(prompts),
                    progress=False,
                    **{**defaults, **settings},
                )

            yield draw
            return
        steering = _steering(pipe, spec.steer, field)

        def steered(
            prompts: Sequence[str], seeds: Sequence[int], **settings: Any
        ) -> list[MaybeImage]:
            return draw_steered(steering, prompts, seeds, **{**defaults, **settings})

        yield steered


def _steering(pipe: Pipeline, steer: Mapping[str, Any] | FKSteering, field: str) -> FKSteering:
    """Make an `FKSteering` from its arguments; one that is made already is returned.

    Raises:
        UserError: An argument is unknown or missing.
    """
    from ..rewards.registry import load_scorer
    from ..steering.fk_steering import FKSteering

    if not isinstance(steer, Mapping):
        return steer
    # With a deterministic sampler, copies of a particle would stay equal.
    options = {"kernel": "auto", **steer}
    scorer = options.pop("scorer")
    if isinstance(scorer, str):
        scorer = load_scorer(scorer, **(options.pop("scorer_args", None) or {}))
    try:
        return FKSteering(pipe, scorer, **options)
    except TypeError as error:
        raise UserError(f"{field}.steer: {str(error).split('() ')[-1]}") from None


def draw_steered(
    steering: FKSteering, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[Any]:
    """Draw a population for every prompt and seed, and return its best particle.

    Args:
        steering (`FKSteering`): The sampler.
        prompts: One per image.
        seeds: One per image. Particle 0 starts from the noise of the plain image of
            that seed.
        settings: Arguments of the pipeline's call.

    Returns:
        One image per prompt.
    """
    import warnings

    import torch

    def generator(seed: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    steering.pipe.set_progress_bar_config(disable=True)
    noise: list[torch.Generator] = []
    for seed in seeds:
        noise.append(generator(seed))
        for particle in range(1, steering.num_particles):
            noise.append(generator(image_seed(seed, "particle", particle)))
    resampling = [generator(image_seed(seed, "resampling", 0)) for seed in seeds]
    with warnings.catch_warnings():
        # Collapsed populations give a warning. A comparison shows what becomes of them.
        warnings.simplefilter("ignore", UserWarning)
        result = steering(list(prompts), generator=noise, resample_generator=resampling, **settings)
    return list(result.best)
