"""Turn examples of the dataset into batches.

Every random number of a row comes from the row's own generator. It depends on the seed,
the row and the epoch, and not on the batch or the process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.conditions import split_rows, stack_rows
from ..data.cache import TensorCache
from ..errors import ConfigError
from ..likelihood import RectifiedFlow, group_noise, sample_times
from ..runtime.seeds import row_generator
from .batch import Batch
from .config import TrainingConfig
from .group_reader import Example, prompt_key
from .online.rollout import grid_for_size


def _padded(values: Tensor, k: int) -> Tensor:
    """Repeat the last image of (g, n, ...) until there are k.

    The added images have no score, so the loss leaves them out.
    """
    missing = k - values.shape[1]
    return (
        values
        if missing == 0
        else torch.cat([values, values[:, -1:].expand(-1, missing, *values.shape[2:])], dim=1)
    )


class BatchBuilder:
    """Builds batches from examples: encodes images and prompts, draws noise and times.

    Args:
        backbone (`Backbone`): Encodes what is not cached.
        args (`TrainingConfig`): Settings of the run.
        device (`torch.device`): Device of the tensors.
        prompts (`TensorCache`, *optional*): Cache of encoded prompts.
        latents (`TensorCache`, *optional*): Gets the latents of a stream's images.
    """

    def __init__(
        self,
        backbone: Backbone,
        args: TrainingConfig,
        device: torch.device,
        prompts: TensorCache | None,
        latents: TensorCache | None = None,
    ) -> None:
        self.backbone, self.args, self.device, self.prompts = backbone, args, device, prompts
        self.latents = latents
        self._empty: dict[str, Tensor] | None = None
        sampling = args.timestep_sampling
        flow = backbone.schedule.prediction_type == "flow_matching"
        self.sampling = ("logit_normal" if flow else "uniform") if sampling == "auto" else sampling

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Build the batch of some examples.

        Args:
            examples (`Sequence[Example]`): One example per group.

        Returns:
            `Batch`: Lists shorter than the longest one are padded.
        """
        args = self.args
        counts = [len(e.prompts) for e in examples]
        k = max(counts)
        draws = [
            row_generator(args.seed, e.row_id, self.draw_epoch(e.epoch), "noise") for e in examples
        ]
        # [timestep, prompt dropout] per row. Always both, so that switching dropout on
        # does not move the timesteps.
        uniforms = torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in draws])
        mean, std = self._latents(examples)
        shape = mean.shape[1:]
        times = self.times(uniforms[:, 0], shape)
        # A row's draws depend on its own length, not on the longest list of its batch.
        noise = torch.cat(
            [
                _padded(
                    group_noise(shape, n, [g], shared=args.shared_noise, offset=args.noise_offset),
                    k,
                )
                for n, g in zip(counts, draws, strict=True)
            ]
        )
        posterior = torch.cat(
            [torch.randn((n, *shape), generator=g) for n, g in zip(counts, draws, strict=True)]
        )
        x0 = mean + std * posterior.to(self.device)
        if min(counts) < k:
            x0 = torch.cat([_padded(part[None], k)[0] for part in x0.split(counts)])
        dropped = uniforms[:, 1] < args.proportion_empty_prompts
        prompts = [
            "" if drop else prompt
            for e, drop in zip(examples, dropped, strict=True)
            for prompt in (*e.prompts, *(e.prompts[-1:] * (k - len(e.prompts))))
        ]
        condition = self.encode(prompts)
        geometries = [e.geometry for e in examples for _ in range(k)]
        condition |= {
            name: t.to(self.device)
            for name, t in self.backbone.geometry_condition(geometries).items()
        }
        controls = [e.control for e in examples if e.control is not None]
        if controls:
            condition["control"] = torch.cat(controls).to(self.device)
        scores = None
        if examples[0].scores is not None:
            padded = [(*(e.scores or ()), *[math.nan] * (k - len(e.prompts))) for e in examples]
            scores = torch.tensor(padded, dtype=torch.float32, device=self.device)
        return Batch(
            x0=x0.unflatten(0, (-1, k)),
            noise=noise.to(self.device),
            times=times,
            condition=condition,
            weights=torch.tensor(
                [e.weight for e in examples], dtype=torch.float32, device=self.device
            ),
            row_ids=[e.row_id for e in examples],
            scores=scores,
            prompts=[e.prompts[0] for e in examples],
            users=[e.user for e in examples],
            epochs=[self.draw_epoch(e.epoch) for e in examples],
            seed=args.seed,
        )

    def times(self, uniforms: Tensor, shape: Sequence[int]) -> Tensor:
        """Map uniform numbers to times, as the settings of the run say.

        Args:
            uniforms (`Tensor`): (n,) in [0, 1).
            shape (`Sequence[int]`): (C, h, w) of the latents. Some families shift
                by it.

        Returns:
            `Tensor`: (n,), see `sample_times`.
        """
        args, backbone = self.args, self.backbone
        height, width = (side * backbone.vae_scale for side in shape[-2:])
        window = args.min_timestep / 1000, args.max_timestep / 1000
        if self.sampling == "grid":
            steps = args.grid_steps or backbone.num_inference_steps
            grid = grid_for_size(backbone, (height, width), steps, 0.0).times
            shares = backbone.schedule.fraction(grid)
            grid = grid[(shares >= window[0]) & (shares <= window[1])]
            if not len(grid):
                raise ConfigError(
                    "train.min_timestep",
                    f"none of the sampler's {steps} timesteps lies from {args.min_timestep} to "
                    f"{args.max_timestep}; widen the window or raise train.grid_steps",
                )
            return grid[(uniforms * len(grid)).long().clamp(max=len(grid) - 1)]
        shift = None
        if isinstance(backbone.schedule, RectifiedFlow):
            if args.timestep_shift == "pipeline":
                shift = backbone.timestep_shift(height, width)
            else:
                shift = 1.0 if args.timestep_shift == "none" else float(args.timestep_shift)
        return sample_times(
            backbone.schedule,
            uniforms,
            self.sampling,
            args.logit_mean,
            args.logit_std,
            shift=shift,
            window=window,
        )

    def draw_epoch(self, epoch: int) -> int:
        """Return the epoch whose noise and timestep are used in `epoch`.

        It is the epoch itself. With `precompute_ref_errors` it is one of the first
        `ref_error_draws` epochs, in turn.
        """
        return epoch % self.args.ref_error_draws if self.args.precompute_ref_errors else epoch

    def unconditional(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition of the empty prompt, with the sizes of `condition`.

        Args:
            condition (`dict[str, Tensor]`): n rows each.

        Returns:
            `dict[str, Tensor]`: n rows each.
        """
        if self._empty is None:
            self._empty = self.encode([""])
        rows = len(next(iter(condition.values())))
        return {
            **condition,
            **{name: value.expand(rows, *value.shape[1:]) for name, value in self._empty.items()},
        }

    def with_every_prompt(self, batch: Batch) -> Batch:
        """Undo prompt dropout, for drawing images that are scored by their prompts.

        Args:
            batch (`Batch`): g prompts, with one condition each.
        """
        if not self.args.proportion_empty_prompts:
            return batch
        return replace(batch, condition=batch.condition | self.encode(batch.prompts))

    def _latents(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        # Prompts without images have a shape, and nothing to encode.
        if examples[0].pixels is None and examples[0].mean is None:
            height, width = examples[0].geometry.target_size
            zeros = torch.zeros(
                (len(examples), *self.backbone.latent_shape(height, width)), device=self.device
            )
            return zeros, zeros
        for e in examples:
            # A worker may have read it before its latents were cached. The cached ones
            # are taken, because a last bit depends on the images encoded with it.
            if self.latents is not None and e.cache_key is not None and e.cache_key in self.latents:
                entry = self.latents[e.cache_key]
                e.mean, e.std = entry["mean"], entry["std"]
        fresh = [(e, e.pixels) for e in examples if e.mean is None and e.pixels is not None]
        if fresh:
            mean, std = self.backbone.encode_images(torch.cat([pixels for _, pixels in fresh]))
            counts = [len(pixels) for _, pixels in fresh]
            for (e, _), m, s in zip(fresh, mean.split(counts), std.split(counts), strict=True):
                e.mean, e.std = m, s
                self._keep(e)
        mean = torch.cat([e.mean.to(self.device) for e in examples if e.mean is not None])
        std = torch.cat([e.std.to(self.device) for e in examples if e.std is not None])
        return mean, std

    def _keep(self, example: Example) -> None:
        """Cache the latents of a streamed group."""
        if self.latents is None or example.cache_key is None:
            return
        assert example.mean is not None and example.std is not None
        g = example.geometry
        geometry = torch.tensor([*g.original_size, *g.crop_top_left, *g.target_size])
        entry = {"mean": example.mean, "std": example.std, "geometry": geometry}
        self.latents.add(example.cache_key, entry)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts, each distinct one once.

        Args:
            prompts (`Sequence[str]`): n prompts.

        Returns:
            `dict[str, Tensor]`: The condition of the network, n rows each.
        """
        distinct = list(dict.fromkeys(prompts))
        if self.prompts is not None:
            self._add_prompts(self.prompts, distinct)
            entries = [self.prompts[prompt_key(p)] for p in distinct]
            encoded = stack_rows(entries, self.backbone.ragged)
        else:
            encoded = self._encoded(distinct)
        index = torch.tensor([distinct.index(p) for p in prompts], device=self.device)
        return {name: values.to(self.device)[index] for name, values in encoded.items()}

    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        # Where a rollout asks for the empty prompt, autocast is on. It would round the
        # parts of an encoder that are kept in float32.
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.encode_prompts(prompts)

    def _add_prompts(self, cache: TensorCache, prompts: Sequence[str]) -> None:
        """Encode and cache the prompts of a stream that are not cached yet."""
        missing = [prompt for prompt in prompts if prompt_key(prompt) not in cache]
        if missing:
            rows = split_rows(self._encoded(missing), self.backbone.ragged)
            for prompt, row in zip(missing, rows, strict=True):
                cache.add(prompt_key(prompt), row)
