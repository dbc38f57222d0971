"""Feynman-Kac steering of diffusers pipelines (Singhal et al. 2025, arXiv 2501.06848).

K particles per prompt are drawn from the pipeline. A few times on the way, the sampler
scores what they will become and multiplies the promising ones. The returned particles
carry weights, under which they are a sample of p(x) exp(lmbda r(x)) / Z.
"""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..generation.micro_batches import Batches, batched, perturbs_attention
from ..generation.sampling import call_arguments
from ..runtime.hashing import scheduler_facts, value_hash
from ..runtime.missing import watched
from ..runtime.protocols import Numbers, Pipeline
from .decoding import LatentDecoder
from .kernels import check_kernel
from .noise_levels import check_reachable, refuse_replaced_noise
from .resampling import Generators
from .result import SteeringResult
from .reward_fn import Rewarder
from .schedule import check_schedule
from .scheduler_hook import steered
from .smc import check_options
from .steered_run import SteeredRun, SteeringOptions
from .step_trace import StepTrace
from .streams import Streams

MODES = ("resample", "prune")
MODELS = ("unet", "transformer", "transformer_2")


class FKSteering:
    """Steers a text-to-image pipeline towards a reward, without training.

    Args:
        pipe: a diffusers pipeline that calls ``pipe.scheduler.step`` once per
            iteration.
        scorer: a `diffalign.rewards.Scorer`, its registry name, or a function
            (images, prompts) -> (n,) numbers. Higher is better.
        num_particles (`int`, *optional*, defaults to `4`): K per prompt. The model does
            K times the work of one image.
        lmbda (`float` or one per prompt, *optional*): the tilt, in units of 1/reward.
            There is no default, as none fits every scorer.
        ess_target (`float`, *optional*): in place of `lmbda`: choose it for each prompt
            such that the effective sample size is this share of K at the first scored
            step at which rewards differ.
        potential (`str`, *optional*, defaults to `"diff"`): ``diff`` (least variance),
            ``max``, ``sum``, ``rt``, ``max_inc`` or ``tempered``. All of them have the
            same target.
        resample_steps (*optional*): steps at which to score, as indices (`int`) or
            fractions of the run (`float`). None takes five from 20 to 80 %. With (),
            only the returned images are weighed.
        scheme (`str`, *optional*, defaults to `"systematic"`): of resampling, see
            `ParticleWeights`.
        ess_threshold (`float`, *optional*, defaults to `0.5`): resample under this
            share of K, see `ParticleWeights`.
        adaptive_tempering (`float`, *optional*): see `ParticleWeights`.
        temperatures (*optional*): see `ParticleWeights`.
        decoder (*optional*): for intermediate images, such as an `AutoencoderTiny`. The
            returned ones come from the pipeline's own.
        intermediate_reward (*optional*): function (x0hat latents (n, ...), prompts) ->
            (n,), in place of decoding and scoring, such as a learned value.
        predict_x0 (*optional*): function (scheduler, model_output, timestep, sample) ->
            x0hat, for schedulers that are not known here.
        kernel (`str`, *optional*): step with this stochastic kernel in place of the
            scheduler, over its time grid: ``ddim`` (any scheduler), ``ancestral`` (the
            same with eta 1) or ``euler_maruyama`` (flow matching). ``auto`` takes
            ``ddim`` where the scheduler is deterministic as it is called.
        eta (`float`, *optional*): of `kernel`. None is 1, and 0.7 for
            ``euler_maruyama``.
        mode (`str`, *optional*, defaults to `"resample"`): ``resample``; or ``prune``
            for deterministic samplers, whose copies stay equal, so that the model runs
            on distinct particles alone.
        model_batch_size (`int`, *optional*): rows per forward pass of the model, where
            guidance counts twice. None is the pipeline's own way.
        decode_batch_size (`int`, *optional*): latents per decode. None is 8 for
            intermediate images, and the pipeline's own way for the returned ones.
        reward_batch_size (`int`, *optional*): images per call of the scorer. None is
            all of them, or the scorer's own batch size.
        prompts_per_call (`int`, *optional*): prompts that share a call of the pipeline.
            None is all of them.
        unscored (`str`, *optional*, defaults to `"error"`): what a prompt without any
            score is: an ``error``, or ``degenerate``, which draws its particles with
            equal weights.

    Raises:
        ConfigError: an option out of range, or options that exclude each other.
        UserError: `pipe` has no scheduler with a step.

    Example:
        ```python
        from diffusers import StableDiffusionPipeline

        from diffalign import FKSteering
        from diffalign.shapes import weights_dir

        pipe = StableDiffusionPipeline.from_pretrained(weights_dir())
        steering = FKSteering(pipe, "shapes", num_particles=2, lmbda=5.0, kernel="ddim")
        result = steering(
            "a large blue star in the center of a white background",
            seed=0,
            num_inference_steps=10,
        )
        image = result.best[0]
        ```
    """

    def __init__(
        self,
        pipe: Pipeline,
        scorer: str | Callable[..., Numbers],
        *,
        num_particles: int = 4,
        lmbda: float | Sequence[float] | Tensor | None = None,
        ess_target: float | None = None,
        potential: str = "diff",
        resample_steps: Sequence[int | float] | None = None,
        scheme: str = "systematic",
        ess_threshold: float | None = 0.5,
        adaptive_tempering: float | None = None,
        temperatures: Sequence[float] | None = None,
        decoder: Any = None,
        intermediate_reward: Callable[[Tensor, list[str]], Numbers] | None = None,
        predict_x0: Callable[[Any, Tensor, Any, Tensor], Tensor] | None = None,
        kernel: str | None = None,
        eta: float | None = None,
        mode: str = "resample",
        model_batch_size: int | None = None,
        decode_batch_size: int | None = None,
        reward_batch_size: int | None = None,
        prompts_per_call: int | None = None,
        unscored: str = "error",
    ) -> None:
        if resample_steps is not None:
            resample_steps = [_plain_number(step) for step in resample_steps]
        self.weighting: dict[str, Any] = {
            "lmbda": lmbda,
            "ess_target": ess_target,
            "potential": potential,
            "scheme": scheme,
            "ess_threshold": ess_threshold,
            "adaptive_tempering": adaptive_tempering,
            "temperatures": temperatures,
        }
        check_options(num_particles=num_particles, unscored=unscored, **self.weighting)
        self.unscored = unscored
        check_schedule(resample_steps)
        if num_particles == 1 and resample_steps:
            raise ConfigError(
                "num_particles",
                "1 particle cannot be resampled; give at least 2, or leave out resample_steps",
            )
        if mode not in MODES:
            raise ConfigError("mode", f"expected one of {', '.join(MODES)}, got {mode!r}")
        if mode == "prune" and kernel is not None:
            raise ConfigError(
                "mode",
                f"prune is for deterministic samplers, kernel={kernel!r} is not one; use "
                "mode='resample'",
            )
        sizes = {
            "model_batch_size": model_batch_size,
            "decode_batch_size": decode_batch_size,
            "reward_batch_size": reward_batch_size,
            "prompts_per_call": prompts_per_call,
        }
        for name, value in sizes.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(name, f"expected int >= 1 or None, got {value!r}")
        if getattr(pipe, "scheduler", None) is None or not hasattr(pipe.scheduler, "step"):
            raise UserError(
                f"pipe: {type(pipe).__name__} has no scheduler with a step; give a diffusers "
                "pipeline"
            )
        self.eta, self.eta_given = check_kernel(kernel, eta), eta is not None
        self.pipe, self.num_particles, self.kernel, self.mode = pipe, num_particles, kernel, mode
        self.resample_steps: Sequence[int | float] | None = (
            () if num_particles == 1 else resample_steps
        )
        self.decoder, self.predict_x0 = decoder, predict_x0
        self.rewarder = Rewarder(scorer, intermediate_reward, reward_batch_size)
        self.model_batch_size, self.decode_batch_size = model_batch_size, decode_batch_size
        self.prompts_per_call = prompts_per_call

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        resample_generator: torch.Generator | Sequence[torch.Generator] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        on_step: Callable[[StepTrace], None] | None = None,
        **pipe_kwargs: Any,
    ) -> SteeringResult:
        """Draw and steer K particles for every prompt.

        Args:
            prompts (`str` or sequence): P of them. The rows of the pipeline are prompt
                after prompt, particle after particle.
            generator (`torch.Generator` or sequence, *optional*): as for the pipeline,
                one or P * K. Where nothing is resampled and the batches are the
                pipeline's own, the images are bit-equal to those of the plain pipeline.
            seed (`int` or sequence, *optional*): in place of `generator`, one per
                prompt. With one number, prompt i takes ``seed + i``. Initial noise,
                step noise of each slot and resampling are separate streams, so that the
                noise of a prompt does not depend on the others. Without a generator and
                a seed, torch's global generator chooses.
            resample_generator (`torch.Generator` or sequence, *optional*): one, or one
                per prompt. None derives it without advancing the noise.
            metadata (*optional*): one mapping per prompt, for scorers that read it.
            on_step (*optional*): called with a `StepTrace` after every scored step. An
                exception in it ends the call.
            pipe_kwargs: for the pipeline's call (`num_inference_steps`,
                `guidance_scale`, `eta`, ...).

        Returns:
            `SteeringResult`: images, weights and lineage of every prompt.

        Raises:
            ConfigError: an argument that does not fit.
            UserError: a deterministic sampler, or a pipeline, scheduler or reward that
                does not fit. The scheduler is afterwards as before.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(seed, Iterable):
            seed = [int(each) for each in seed]  # a range, an array, a tensor
        self._check_call(texts, generator, seed, metadata, pipe_kwargs)
        seeds = _seeds(seed, generator, len(texts))
        size = self.prompts_per_call or len(texts)
        parts = []
        for start in range(0, len(texts), size):
            chosen = range(start, min(start + size, len(texts)))
            parts.append(
                self._call(
                    [texts[i] for i in chosen],
                    Streams.make(
                        _rows(generator, chosen, self.num_particles),
                        None if seeds is None else [seeds[i] for i in chosen],
                        _rows(resample_generator, chosen, 1),
                        self.num_particles,
                        len(chosen),
                    ),
                    None if metadata is None else [metadata[i] for i in chosen],
                    {
                        name: _share(name, value, chosen, len(texts), self.num_particles)
                        for name, value in pipe_kwargs.items()
                    },
                    {
                        **self.weighting,
                        "lmbda": _share("lmbda", self.weighting["lmbda"], chosen, len(texts), 1),
                    },
                    on_step,
                )
            )
        result = SteeringResult.merged(parts)
        result.seed = seeds
        result.warnings = result.find_collapse()
        for sentence in result.warnings:
            warnings.warn(sentence, stacklevel=2)
        return result

    def best_of_n(self) -> FKSteering:
        """Copy the sampler without its intermediate scoring.

        The copy draws K plain samples with terminal weights. With the same seed, it
        starts from the same noise.

        Returns:
            `FKSteering`: on the same pipeline and scorer.
        """
        plain = copy.copy(self)
        plain.resample_steps, plain.mode = (), "resample"
        plain.weighting = {**self.weighting, "temperatures": None}
        return plain

    def fingerprint(self) -> str:
        """Hash everything that decides the images, beside the pipeline's weights.

        Batch sizes are a part, since they change how numbers are rounded.

        Returns:
            `str`: 64 hexadecimal digits. Rewards, decoders and other functions count as
            in `diffalign.runtime.hashing.value_hash`.
        """
        return value_hash(
            {
                **self.weighting,
                "num_particles": self.num_particles,
                "resample_steps": self.resample_steps,
                "scorer": self.rewarder.scorer,
                "intermediate_reward": self.rewarder.intermediate,
                "decoder": self.decoder,
                "predict_x0": self.predict_x0,
                "kernel": self.kernel,
                "eta": self.eta,
                "mode": self.mode,
                "model_batch_size": self.model_batch_size,
                "decode_batch_size": self.decode_batch_size,
                "reward_batch_size": self.rewarder.batch_size,
                "prompts_per_call": self.prompts_per_call,
                "scheduler": scheduler_facts(self.pipe.scheduler),
            }
        )

    def _check_call(
        self,
        texts: list[str],
        generator: Generators,
        seed: int | Sequence[int] | None,
        metadata: Sequence[Mapping[str, Any]] | None,
        pipe_kwargs: Mapping[str, Any],
    ) -> None:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError("prompts", f"expected at least one text, got {texts!r:.80}")
        rows = len(texts) * self.num_particles
        if generator is not None and seed is not None:
            raise ConfigError("seed", "give generator or seed, not both")
        if isinstance(generator, (list, tuple)) and len(generator) != rows:
            raise ConfigError(
                "generator",
                f"expected one, or one per particle ({len(texts)} x {self.num_particles}), got "
                f"{len(generator)}",
            )
        if isinstance(seed, (list, tuple)) and len(seed) != len(texts):
            raise ConfigError(
                "seed", f"expected one, or one per prompt ({len(texts)}), got {len(seed)}"
            )
        if metadata is not None and len(metadata) != len(texts):
            raise ConfigError(
                "metadata", f"expected one per prompt ({len(texts)}), got {len(metadata)}"
            )
        lmbda = self.weighting["lmbda"]
        if lmbda is not None and torch.as_tensor(lmbda).ndim == 1 and len(lmbda) != len(texts):
            raise ConfigError(
                "lmbda", f"expected one, or one per prompt ({len(texts)}), got {len(lmbda)}"
            )
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if pipe_kwargs.get(name) is not None:
                raise ConfigError(
                    name,
                    f"steering draws num_particles={self.num_particles} images per prompt; leave "
                    "it out",
                )
        if pipe_kwargs.get("output_type") == "latent":
            raise ConfigError(
                "output_type",
                "'latent' gives no image to score; use pil, np or pt, and read the latents from "
                "result.latents",
            )
        if "prompt" in pipe_kwargs or "return_dict" in pipe_kwargs:
            name = "prompt" if "prompt" in pipe_kwargs else "return_dict"
            raise ConfigError(
                name,
                "steering sets it itself; give the prompts as the first argument"
                if name == "prompt"
                else "leave it out",
            )
        steps = pipe_kwargs.get("num_inference_steps")
        if isinstance(steps, int) and self.resample_steps:
            outside = [s for s in self.resample_steps if isinstance(s, int) and s >= steps]
            if outside:
                raise ConfigError(
                    "resample_steps",
                    f"{outside[0]} lies outside the run of {steps} steps (0 to {steps - 1})",
                )
        if "step" not in vars(self.pipe.scheduler) and self.resample_steps != ():
            check_reachable(self.pipe)
            if self.kernel is None:
                refuse_replaced_noise(self.pipe.scheduler)

    def _call(
        self,
        texts: list[str],
        streams: Streams,
        metadata: Sequence[Mapping[str, Any]] | None,
        pipe_kwargs: dict[str, Any],
        weighting: dict[str, Any],
        on_step: Callable[[StepTrace], None] | None,
    ) -> SteeringResult:
        """Run one call of the pipeline."""
        started = time.perf_counter()
        groups, k = len(texts), self.num_particles
        models = Batches(
            groups * k,
            self.model_batch_size,
            grouped=k,
            whole=partial(perturbs_attention, self.pipe),
        )
        decodes = Batches(groups * k, self.decode_batch_size)
        decoder = LatentDecoder(
            self.pipe,
            self.decoder,
            self.decode_batch_size or 8,
            pipe_kwargs.get("height"),
            pipe_kwargs.get("width"),
        )
        rewarder = self.rewarder.start(texts, metadata, k)
        options = SteeringOptions(
            self.pipe,
            k,
            self.resample_steps,
            self.predict_x0,
            self.kernel,
            self.eta,
            self.mode,
            self.eta_given,
            self.unscored,
        )
        run = SteeredRun(options, weighting, rewarder, decoder, streams, models, groups, on_step)
        arguments = self._pipeline_arguments(texts, streams, pipe_kwargs)
        with ExitStack() as stack:
            stack.enter_context(steered(self.pipe.scheduler, run.step))
            for name in MODELS:
                if isinstance(getattr(self.pipe, name, None), torch.nn.Module):
                    stack.enter_context(batched(getattr(self.pipe, name), "forward", models))
            vae = getattr(self.pipe, "vae", None)
            if isinstance(vae, torch.nn.Module):
                stack.enter_context(batched(vae, "decode", decodes))
            if hasattr(self.pipe, "_num_timesteps"):
                # A number left over from another call must not be read.
                self.pipe._num_timesteps = None
            finite = stack.enter_context(watched(self.pipe))
            output = self.pipe(**arguments)
        return run.result(output, texts, time.perf_counter() - started, finite)

    def _pipeline_arguments(
        self, texts: list[str], streams: Streams, pipe_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        parameters = inspect.signature(self.pipe.__call__).parameters
        arguments, k = dict(pipe_kwargs), self.num_particles
        embedded = arguments.get("prompt_embeds") is not None
        if embedded or "num_images_per_prompt" not in parameters:
            # Pipelines disagree on whether embeddings are multiplied by
            # num_images_per_prompt, so that is done here.
            arguments = {
                name: _repeat(name, value, len(texts), k) for name, value in arguments.items()
            }
            texts = [text for text in texts for _ in range(k)]
        else:
            arguments["num_images_per_prompt"] = k  # every prompt is encoded once
        if not embedded:
            arguments = call_arguments(self.pipe, texts, arguments)
        if streams.initial is not None and "generator" in parameters:
            arguments["generator"] = streams.initial
        if "return_dict" in parameters:
            arguments["return_dict"] = True
        return arguments


def _plain_number(value: Any) -> int | float:
    """Return a number of numpy or torch as Python's."""
    return value.item() if hasattr(value, "item") else value  # type: ignore[no-any-return]


def _seeds(seed: Any, generator: Generators, prompts: int) -> list[int] | None:
    if generator is not None:
        return None
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    if isinstance(seed, (list, tuple)):
        return [int(s) for s in seed]
    return [int(seed) + i for i in range(prompts)]


def _rows(values: Any, chosen: range, each: int) -> Any:
    """Take the entries of the chosen prompts, `each` per prompt, from a sequence.

    Anything else is returned as it is.
    """
    if isinstance(values, (list, tuple)):
        return list(values)[chosen.start * each : chosen.stop * each]
    return values


def _repeat(name: str, value: Any, prompts: int, k: int) -> Any:
    """Repeat texts and embeddings with one entry per prompt, once per particle.

    Anything else is returned as it is.
    """
    if isinstance(value, list) and "prompt" in name and len(value) == prompts:
        return [text for text in value for _ in range(k)]
    if isinstance(value, Tensor) and name.endswith(("_embeds", "_mask")) and len(value) == prompts:
        return value.repeat_interleave(k, 0)
    return value


def _share(name: str, value: Any, chosen: range, prompts: int, k: int) -> Any:
    """Take the chosen prompts' share of an argument of the pipeline's call.

    Its name and length tell whether it has such entries. Anything else is returned as
    it is.
    """
    if len(chosen) == prompts or not isinstance(value, (list, tuple, Tensor)):
        return value
    per_prompt = (
        ("prompt" in name or "image" in name or name == "lmbda")
        if not isinstance(value, Tensor)
        else True
    )
    if isinstance(value, Tensor) and (
        value.ndim == 0 or not name.endswith(("_embeds", "_mask", "latents", "image", "lmbda"))
    ):
        return value
    if per_prompt and len(value) == prompts:
        return value[chosen.start : chosen.stop]
    if isinstance(value, Tensor) and len(value) == prompts * k:
        return value[chosen.start * k : chosen.stop * k]
    return value


__all__ = ["FKSteering", "SteeringResult"]
