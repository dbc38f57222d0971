"""From rows to micro-batches: the order of the data, its latents and its conditions.

The order is a function of (seed, position), so a run is resumed by its position alone, and the groups of an optimizer step are the
same whether one process, several processes or several accumulated passes consume them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data.cache import TensorCache
from ..likelihood import group_noise, sample_times
from ..runtime.seeds import row_generator
from .batch import Batch
from .config import TrainingConfig
from .group_reader import Example, prompt_key


def _padded(values: Tensor, k: int) -> Tensor:
    """(g, n, ...) with the last image repeated up to k: shorter lists of a batch, whose missing scores leave them out of the loss."""
    missing = k - values.shape[1]
    return (
        values
        if missing == 0
        else torch.cat([values, values[:, -1:].expand(-1, missing, *values.shape[2:])], dim=1)
    )


class BatchBuilder:
    """Examples -> `Batch`: encodes what is not cached and draws everything random from the rows' own generators."""

    def __init__(
        self,
        backbone: Backbone,
        args: TrainingConfig,
        device: torch.device,
        prompts: TensorCache | None,
    ) -> None:
        self.backbone, self.args, self.device, self.prompts = backbone, args, device, prompts
        self._empty: dict[str, Tensor] | None = None
        sampling = args.timestep_sampling
        flow = backbone.process.prediction_type == "flow_matching"
        self.sampling = ("logit_normal" if flow else "uniform") if sampling == "auto" else sampling

    def __call__(self, examples: Sequence[Example]) -> Batch:
        args = self.args
        counts = [len(e.prompts) for e in examples]
        k = max(counts)
        draws = [
            row_generator(args.seed, e.row_id, self.draw_epoch(e.epoch), "noise") for e in examples
        ]
        # [timestep, prompt dropout] per row; always both, so that switching dropout on does not move the timesteps.
        uniforms = torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in draws])
        times = sample_times(
            self.backbone.process, uniforms[:, 0], self.sampling, args.logit_mean, args.logit_std
        )
        mean, std = self._latents(examples)
        shape = mean.shape[1:]
        # What a row draws depends on its own length alone, not on the longest list of its batch.
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
            epochs=[self.draw_epoch(e.epoch) for e in examples],
            seed=args.seed,
        )

    def draw_epoch(self, epoch: int) -> int:
        """Which draw of (noise, timestep) an epoch uses: a new one each time, or one of the precomputed ones in turn."""
        return epoch % self.args.ref_error_draws if self.args.precompute_ref_errors else epoch

    def unconditional(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt's condition, encoded once, for every row of `condition`, with that row's sizes."""
        if self._empty is None:
            self._empty = self.encode([""])
        rows = len(next(iter(condition.values())))
        return {
            **condition,
            **{name: value.expand(rows, *value.shape[1:]) for name, value in self._empty.items()},
        }

    def _latents(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        if (
            examples[0].pixels is None and examples[0].mean is None
        ):  # prompts alone: nothing but a shape
            height, width = examples[0].geometry.target_size
            zeros = torch.zeros(
                (len(examples), *self.backbone.latent_shape(height, width)), device=self.device
            )
            return zeros, zeros
        if examples[0].mean is not None:
            mean = torch.cat([e.mean for e in examples if e.mean is not None])
            std = torch.cat([e.std for e in examples if e.std is not None])
            return mean.to(self.device), std.to(self.device)
        mean, std = self.backbone.encode_images(
            torch.cat([e.pixels for e in examples if e.pixels is not None])
        )
        return mean.to(self.device), std.to(self.device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of all prompts; each distinct prompt is encoded or read once."""
        distinct = list(dict.fromkeys(prompts))
        if self.prompts is not None:
            entries = [self.prompts[prompt_key(p)] for p in distinct]
            encoded = {
                name: torch.stack([e[name] for e in entries]).to(self.device) for name in entries[0]
            }
        else:
            encoded = self.backbone.encode_prompts(distinct)
        index = torch.tensor([distinct.index(p) for p in prompts], device=self.device)
        return {name: values.to(self.device)[index] for name, values in encoded.items()}
