"""What draws images: a pipeline as it is, with a LoRA at some scale, under negative guidance, or steered."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones.loading import ModelSource
from ..backbones.lora import adapter_state, denoiser
from ..config.ranges import finite
from ..config.section import suggestion
from ..config.yaml_text import read_yaml_text, shown
from ..errors import ConfigError, UserError
from ..generation.guidance import NegativeGuidance, load_negative
from ..generation.pipelines import default_settings, load_for_scoring, with_lora
from ..generation.sampling import generate
from ..runtime.hashing import module_hash
from ..runtime.seeds import image_seed
from ..runtime.weight_files import could_be_hub_id

Draw = Callable[..., list[Any]]
"""(prompts, seeds, **arguments of the pipeline's call) -> one image each."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to draw with, by where it comes from.

    Attributes:
        name: letters, digits, dot, dash, underscore and @.
        model: Hub id, folder, ``shapes``, or a loaded pipeline.
        lora: folder, file or Hub id of a LoRA on it.
        lora_scale: its strength.
        negative: negative model of Diffusion-NPO or Self-NPO, a LoRA or a pipeline folder; `alpha` and `beta` as in `NegativeGuidance`.
        steer: arguments of `FKSteering` with its ``scorer``, or an `FKSteering`: of every population the best particle is the image.
    """

    name: str
    model: Any = None
    lora: str | None = None
    lora_scale: float = 1.0
    negative: str | None = None
    alpha: float = 1.0
    beta: float = 1.0
    steer: Any = None

    @property
    def described(self) -> str:
        """One line for people."""
        parts = [self.model if isinstance(self.model, str) else type(self.model).__name__]
        if self.lora is not None:
            parts.append(
                f"LoRA {self.lora}"
                + (f" at scale {self.lora_scale:g}" if self.lora_scale != 1 else "")
            )
        if self.negative is not None:
            parts.append(
                f"negative model {self.negative} (alpha {self.alpha:g}, beta {self.beta:g})"
            )
        if self.steer is not None:
            options = (
                self.steer
                if isinstance(self.steer, Mapping)
                else {"num_particles": self.steer.num_particles}
            )
            parts.append(
                "steered (" + ", ".join(f"{k} {v}" for k, v in options.items()) + "), best particle"
            )
        return ", ".join(parts)

    def fingerprint(self) -> str:
        """Of the weights and everything else that decides an image.

        Raises:
            ConfigError: the model or LoRA is not there.
        """
        from ..runtime.hashing import content_hash

        if isinstance(self.model, str):
            source = ModelSource(self.model)
            found = source.fingerprint(*source.component_names())
        else:
            found = f"{module_hash(denoiser(self.model))}{adapter_state(self.model) or ''}"
        for part in (self.lora, self.negative):
            found += "-" + (
                content_hash(Path(part)) if part is not None and Path(part).exists() else str(part)
            )
        steer = (
            self.steer
            if isinstance(self.steer, Mapping) or self.steer is None
            else vars(self.steer).get("weighting")
        )
        found += repr((self.lora_scale, self.alpha, self.beta, steer))
        return hashlib.sha256(found.encode()).hexdigest()[:16]


def parse_model(
    value: Any, field: str, *, base: ModelSpec | None = None, taken: Sequence[str] = ()
) -> ModelSpec:
    """Reads ``[NAME=]SOURCE[@SCALE]``, where SOURCE is a pipeline or a LoRA on the base's, a mapping of `ModelSpec`'s fields (also as
    YAML text), a pipeline, or an `FKSteering`.

    Args:
        field: for messages.
        base: whose `model` is taken where none is given.
        taken: names that are given away.

    Raises:
        ConfigError: it is none of these, or something in it is not there.
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


def _values(value: Any, field: str, base: ModelSpec | None) -> dict[str, Any]:
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
    return _read_text(str(value), base)


def _read_text(text: str, base: ModelSpec | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    named = re.match(r"([A-Za-z0-9._-]+)=(.+)", text)
    if named and not Path(text).exists():
        found["name"], text = named.groups()
    scaled = re.match(r"(.+)@([-+.\deE]+)$", text)
    if scaled and not Path(text).exists():
        try:
            text, found["lora_scale"] = scaled.group(1), float(scaled.group(2))
        except ValueError:
            raise ConfigError(
                "tuned", f"expected a number behind '@', got {shown(scaled.group(2))}"
            ) from None
    place = Path(text).expanduser()
    is_lora = place.suffix == ".safetensors" or (
        place.is_dir()
        and not (place / "model_index.json").is_file()
        and any(place.glob("*.safetensors"))
    )
    if base is not None and (is_lora or "lora_scale" in found):
        return {**found, "lora": str(place) if place.exists() else text}
    return {**found, "model": str(place) if place.is_dir() else text}


def _check_files(values: Mapping[str, Any], field: str) -> None:
    if isinstance(values["model"], str):
        try:
            ModelSource(values["model"])
        except ConfigError as error:
            raise ConfigError(field, error.problem) from None
    for key in ("lora", "negative"):
        given = values.get(key)
        if given is None:
            continue
        place = Path(str(given)).expanduser()
        local = place.is_absolute() or place.exists() or not could_be_hub_id(str(given))
        if local and not (
            place.is_file() or (place.is_dir() and any(place.rglob("*.safetensors")))
        ):
            raise ConfigError(field, f"there is no file or folder with safetensors {str(given)!r}")
    steer = values.get("steer")
    if isinstance(steer, Mapping) and not steer.get("scorer"):
        raise ConfigError(
            f"{field}.steer",
            "names no scorer; write for example steer: {scorer: pickscore, lmbda: 10}",
        )


def _name(values: Mapping[str, Any], base: ModelSpec | None) -> str:
    if base is None:
        return "base"
    source = values.get("lora") or values.get("negative")
    if source is None:
        source = "steered" if values.get("steer") is not None else values["model"]
    if not isinstance(source, (str, Path)):
        return "tuned"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name).strip("-.") or "tuned"
    return slug + (
        f"@{values['lora_scale']:g}" if values.get("lora") and values["lora_scale"] != 1 else ""
    )


@contextmanager
def opened(
    spec: ModelSpec, *, device: Any = None, dtype: Any = None, field: str = "model"
) -> Iterator[Draw]:
    """The function that draws with this model, one image per (prompt, seed) whose noise depends on nothing else.

    Raises:
        UserError: weights that do not fit together.
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
        if spec.steer is None:

            def draw(prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Any]:
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

        def steered(prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Any]:
            return draw_steered(steering, prompts, seeds, **{**defaults, **settings})

        yield steered


def _steering(pipe: Any, steer: Any, field: str) -> Any:
    from ..rewards.registry import load_scorer
    from ..steering.fk_steering import FKSteering

    if not isinstance(steer, Mapping):
        return steer
    options = {
        "kernel": "auto",
        **steer,
    }  # a deterministic sampler cannot tell copies of a particle apart
    scorer = options.pop("scorer")
    if isinstance(scorer, str):
        scorer = load_scorer(scorer, **(options.pop("scorer_args", None) or {}))
    try:
        return FKSteering(pipe, scorer, **options)
    except TypeError as error:
        raise UserError(f"{field}.steer: {str(error).split('() ')[-1]}") from None


def draw_steered(
    steering: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[Any]:
    """The best particle of a population for every (prompt, seed). Particle 0 starts from the noise of the plain image of that seed."""
    import warnings

    import torch

    steering.pipe.set_progress_bar_config(disable=True)
    k = steering.num_particles
    own = [seed if j == 0 else image_seed(seed, "particle", j) for seed in seeds for j in range(k)]
    generators = [torch.Generator("cpu").manual_seed(number) for number in own]
    choosing = [
        torch.Generator("cpu").manual_seed(image_seed(seed, "resampling", 0)) for seed in seeds
    ]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of collapsed populations; a comparison judges the outcome
        result = steering(
            list(prompts), generator=generators, resample_generator=choosing, **settings
        )
    return list(result.best)
