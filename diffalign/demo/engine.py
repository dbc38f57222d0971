"""Draw what the demo shows, with every request checked.

Pipelines are loaded once and their LoRAs are switched. One picture is drawn at a time.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..backbones.lora import adapter_state, denoiser, load_lora
from ..errors import ConfigError, UserError
from ..evaluation.models import ModelSpec
from ..generation.guidance import NegativeGuidance, load_negative
from ..generation.pipelines import default_settings, load_for_scoring
from ..generation.sampling import generate
from ..generation.users import User, Users, load_users
from ..runtime.missing import Missing
from ..runtime.protocols import DeviceLike
from .jobs import Job


@dataclass(frozen=True)
class Limits:
    """The largest values that a visitor may ask for."""

    prompt_chars: int = 400
    """Longest prompt, in characters."""
    steps: int = 100
    """Most sampler steps."""
    guidance: float = 20.0
    """Largest guidance scale."""
    lora_scale: float = 2.0
    """Largest strength of a LoRA."""
    particles: int = 8
    """Most particles of a steered population."""
    lmbda: float = 100.0
    """Strongest tilt of steering."""
    side: int = 1024
    """Largest height and width, in pixels."""
    seed: int = 2**31 - 1
    """Largest seed."""
    queue: int = 64
    """Longest queue of waiting requests."""


@dataclass(frozen=True)
class Request:
    """A request for an image, checked by `Engine.read`.

    Attributes:
        prompt (`str`): The prompt.
        seed (`int`): The seed.
        settings (`dict[str, Any]`): Arguments of the pipeline's call.
    """

    prompt: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Draw with several models from the same noise.

    Args:
        models (`Sequence[ModelSpec]`): The models, the base first.
        scorers (`Sequence`, *optional*, defaults to `()`): Names of scorers or loaded
            scorers, whose scores stand under the images.
        limits (`Limits`, *optional*): Limits of requests.
        device (`str` or `torch.device`, *optional*): Where the models run. None takes
            the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Precision of the models. None is bfloat16 on
            a GPU, else float32.
        user_adapter (`str`, *optional*): Folder of a PPD run on the base, with which
            visitors see images for their own taste.

    Attributes:
        users (`Users`, *optional*): The users of that adapter.

    Raises:
        UserError: A model, LoRA, adapter or scorer is not there or does not fit.
    """

    def __init__(
        self,
        models: Sequence[ModelSpec],
        scorers: Sequence[Any] = (),
        *,
        limits: Limits | None = None,
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
        user_adapter: str | None = None,
    ) -> None:
        from ..rewards.registry import load_scorer

        self.limits = limits or Limits()
        self.models = {model.name: model for model in models}
        self._fingerprints: dict[str, str] = {}
        self._pipes: dict[Any, Any] = {}
        self._original_adapters: dict[int, dict[str, dict[str, float]]] = {}
        """id of a pipeline -> the adapters that it came with, and their weights."""
        self._lock = threading.Lock()
        for i, model in enumerate(models):
            key = model.model if isinstance(model.model, str) else id(model.model)
            if key not in self._pipes:
                pipe = (
                    load_for_scoring(model.model, device=device, dtype=dtype)
                    if isinstance(model.model, str)
                    else model.model
                )
                pipe.set_progress_bar_config(disable=True)
                self._pipes[key] = pipe
                self._original_adapters[id(pipe)] = adapter_state(pipe)
            if model.lora is not None:
                load_lora(self._pipes[key], model.lora, f"model_{i}", model.name)
        self._adapters = {
            model.name: f"model_{i}" for i, model in enumerate(models) if model.lora is not None
        }
        self._negative = {
            m.name: load_negative(self.pipe(m.name), m.negative)
            for m in models
            if m.negative is not None
        }
        self._users_of = {
            m.name: load_users(self.pipe(m.name), m.user_adapter)
            for m in models
            if m.user_adapter is not None
        }
        self.users: Users | None = None
        if user_adapter is not None:
            self.users = load_users(self.pipe(self.names[0]), user_adapter)
        loaded = [load_scorer(s, device=device) if isinstance(s, str) else s for s in scorers]
        self.scorers = {scorer.name: scorer for scorer in loaded}
        for scorer in loaded:
            if "metadata" in scorer.spec.requires:
                raise ConfigError(
                    "--scorers",
                    f"{scorer.name} needs metadata for every prompt, which a visitor does not type",
                )

    @property
    def names(self) -> list[str]:
        """Names of the models, the base first."""
        return list(self.models)

    def pipe(self, name: str) -> Any:
        """Return the pipeline of a model.

        Args:
            name (`str`): Name of the model.

        Raises:
            UserError: There is no such model.
        """
        if name not in self.models:
            raise UserError(
                f"model: there is no {str(name)[:60]!r}; there are {', '.join(self.models)}"
            )
        model = self.models[name].model
        return self._pipes[model if isinstance(model, str) else id(model)]

    def fingerprint(self, name: str) -> str:
        """Return the hash of what decides a model's images, as in a comparison.

        Args:
            name (`str`): Name of the model.
        """
        if name not in self._fingerprints:
            self._fingerprints[name] = self.models[name].fingerprint()
        return self._fingerprints[name]

    def defaults(self, name: str) -> dict[str, Any]:
        """Return steps, guidance and side that the model's pipeline takes by itself.

        Args:
            name (`str`): Name of the model.

        Returns:
            `dict` with `num_inference_steps`, `guidance_scale` and `side`.
        """
        pipe, known = self.pipe(name), default_settings(self.models[name].model)
        parameters = inspect.signature(type(pipe).__call__).parameters
        settings = {
            key: known.get(key, getattr(parameters.get(key), "default", None))
            for key in ("num_inference_steps", "guidance_scale")
        }
        side = int(getattr(denoiser(pipe).config, "sample_size", 64)) * int(
            getattr(pipe, "vae_scale_factor", 8)
        )
        return {
            "num_inference_steps": settings["num_inference_steps"] or 30,
            "guidance_scale": settings["guidance_scale"] or 1.0,
            "side": side,
        }

    def read(
        self, prompt: object, seed: object, steps: object, guidance: object, side: object = None
    ) -> Request:
        """Check what a visitor sent.

        Args:
            prompt: The prompt, which must be text.
            seed: A whole number.
            steps: A whole number of sampler steps.
            guidance: A number.
            side (*optional*): Height and width in pixels. None takes the pipeline's
                own.

        Returns:
            `Request`.

        Raises:
            UserError: A value is out of the limits.
        """
        limits = self.limits
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("prompt: write what the image should show")
        if len(prompt) > limits.prompt_chars:
            raise UserError(
                f"prompt: {len(prompt)} characters are too many; at most {limits.prompt_chars}"
            )
        settings: dict[str, Any] = {
            "num_inference_steps": int(bounded("steps", steps, 1, limits.steps, whole=True)),
            "guidance_scale": bounded("guidance", guidance, 0, limits.guidance),
        }
        if side is not None:
            pixels = int(bounded("size", side, 64, limits.side, whole=True))
            if pixels % 64:
                raise UserError(f"size: expected a multiple of 64, got {pixels}")
            settings |= {"height": pixels, "width": pixels}
        return Request(
            " ".join(prompt.split()),
            int(bounded("seed", seed, 0, limits.seed, whole=True)),
            settings,
        )

    def draw(
        self,
        name: str,
        request: Request,
        job: Job | None = None,
        *,
        lora_scale: float | None = None,
        user: User = None,
    ) -> Image.Image:
        """Draw one image.

        The same seed gives the same initial and step noise under every model.

        Args:
            name (`str`): Name of the model.
            request (`Request`): From `read`.
            job (`Job`, *optional*): Gets `("step", (done, of))`, and may cancel.
            lora_scale (`float`, *optional*): LoRA strength in place of the model's own.
            user (*optional*): User to draw for, as `learn_user` returns it.

        Returns:
            `PIL.Image.Image`.

        Raises:
            UserError: The model is steered, or gives no image for this seed.
        """
        pipe, model = self.pipe(name), self.models[name]
        if model.steer is not None:
            raise UserError(f"model: {name} is steered; use the tab for steering")
        with self._lock, ExitStack() as stack:
            self._switch(
                pipe,
                name,
                model.lora_scale
                if lora_scale is None
                else bounded("LoRA scale", lora_scale, 0, self.limits.lora_scale),
            )
            if name in self._negative:
                stack.enter_context(
                    NegativeGuidance(
                        pipe, negative=self._negative[name], alpha=model.alpha, beta=model.beta
                    )
                )
            if name in self._users_of:
                stack.enter_context(self._users_of[name].apply(model.user))
            if user is not None and self.users is not None:
                stack.enter_context(self.users.apply(user))
            settings = dict(request.settings)
            if model.guidance_scale is not None:  # the model's own goes before the visitor's
                settings["guidance_scale"] = model.guidance_scale
            more = _step_callback(pipe, job, settings["num_inference_steps"])
            image = generate(
                pipe, [request.prompt], [request.seed], progress=False, **settings, **more
            )[0]
        if isinstance(image, Missing):
            raise UserError(
                f"model {name}: no image for seed {request.seed}: {image.reason}; try another seed"
            )
        return image

    def learn_user(self, pairs: Sequence[tuple[str, Image.Image, Image.Image]]) -> User:
        """Describe a visitor by the pairs that they judged.

        Args:
            pairs (`Sequence`): Prompt, chosen image and rejected image of each.

        Returns:
            A mixture of the known users, or an embedding, for `draw`.

        Raises:
            UserError: There is no user adapter, or no pair.
        """
        if self.users is None:
            raise UserError("--user_adapter: the demo was started without one")
        name = self.names[0]
        with self._lock:
            self._switch(self.pipe(name), name, 1.0)
            return self.users.from_pairs(pairs)

    def _switch(self, pipe: Any, name: str, scale: float) -> None:
        """Activate the model's LoRA, and the adapters that the pipeline came with."""
        if not any(self.pipe(other) is pipe for other in self._adapters):
            return
        adapters: dict[str, Any] = {
            adapter: dict(weights) for adapter, weights in self._original_adapters[id(pipe)].items()
        }
        if name in self._adapters:
            adapters[self._adapters[name]] = scale
        if adapters:
            pipe.enable_lora()
            pipe.set_adapters(list(adapters), list(adapters.values()))
        else:
            pipe.disable_lora()

    @property
    def lower_is_better(self) -> set[str]:
        """Names of the scorers whose lowest score is the best."""
        return {name for name, s in self.scorers.items() if not s.spec.higher_is_better}

    def score(self, images: Sequence[Image.Image], prompt: str) -> dict[str, list[float | None]]:
        """Score images with every scorer.

        Args:
            images (`Sequence[PIL.Image.Image]`): B images.
            prompt (`str`): Their prompt.

        Returns:
            `dict[str, list[float | None]]`: Scorer -> B scores, None where one is
            missing.
        """
        with self._lock:
            scores = {
                name: s.score(list(images), [prompt] * len(images), on_error="nan").values.tolist()
                for name, s in self.scorers.items()
            }
        return {
            name: [None if math.isnan(value) else value for value in values]
            for name, values in scores.items()
        }

    def steer(
        self,
        name: str,
        request: Request,
        *,
        scorer: str,
        num_particles: object,
        lmbda: object,
        job: Job,
    ) -> tuple[Any, Image.Image]:
        """Steer a population of particles, and draw the plain image of the same seed.

        Args:
            name (`str`): Name of the model.
            request (`Request`): From `read`.
            scorer (`str`): Name of the scorer that steers.
            num_particles: A whole number of particles.
            lmbda: Tilt, a number.
            job (`Job`): Gets every scored step as `("scored", StepTrace)`.

        Returns:
            (steering result, plain image).

        Raises:
            UserError: A number is out of the limits, there is no such scorer, it has no
                score for the prompt, or there is no image for this seed.
        """
        from ..steering.fk_steering import FKSteering

        if name in self._users_of:
            raise UserError(f"model: {name} draws for a user, and is not steered here")
        pipe, particles = (
            self.pipe(name),
            int(bounded("particles", num_particles, 2, self.limits.particles, whole=True)),
        )
        tilt = bounded("lambda", lmbda, 0, self.limits.lmbda)
        if scorer not in self.scorers:
            raise UserError(
                f"scorer: there is no {str(scorer)[:60]!r}; there are {', '.join(self.scorers)}"
            )
        plain = self.draw(name, request, job=job)
        if self.score([plain], request.prompt)[scorer][0] is None:
            raise UserError(
                f"prompt: {scorer} has no score for it; choose another scorer, or a prompt that "
                "it knows"
            )
        with self._lock, torch.inference_mode():
            self._switch(pipe, name, self.models[name].lora_scale)
            steering = FKSteering(
                pipe, self.scorers[scorer], num_particles=particles, lmbda=tilt, kernel="auto"
            )
            result = steering(
                request.prompt,
                seed=request.seed,
                on_step=lambda step: job.report("scored", step),
                **request.settings,
            )
        if isinstance(result.best[0], Missing):
            raise UserError(
                f"model {name}: no image for seed {request.seed}: {result.best[0].reason}; try "
                "another seed"
            )
        return result, plain


def bounded(name: str, value: object, low: float, high: float, whole: bool = False) -> float:
    """Return a number if it is within limits.

    Args:
        name (`str`): What the message calls it.
        value: The number.
        low (`float`): Smallest value.
        high (`float`): Largest value.
        whole (`bool`, *optional*, defaults to `False`): Accept whole numbers only.

    Raises:
        UserError: It is no such number.
    """
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
        and (not whole or value == int(value))
    ):
        return value
    kind = "a whole number" if whole else "a number"
    raise UserError(f"{name}: expected {kind} from {low:g} to {high:g}, got {str(value)[:40]}")


def _step_callback(pipe: Any, job: Job | None, steps: int) -> Mapping[str, Any]:
    if (
        job is None
        or "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters
    ):
        return {}

    def callback(_: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        job.report("step", (step + 1, steps))
        return arguments

    return {"callback_on_step_end": callback}


def enlarged(image: Image.Image, side: int = 320) -> Image.Image:
    """Enlarge a small image by a whole factor, so that its pixels can be seen.

    Args:
        image (`PIL.Image.Image`): The image.
        side (`int`, *optional*, defaults to `320`): Largest side that it may reach.
    """
    factor = max(1, side // max(image.size))
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        if factor > 1
        else image
    )
