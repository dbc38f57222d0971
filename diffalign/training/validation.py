"""Validation while training: images of the current weights beside those of the start.

Both use the same prompts and seeds, and are scored as in `diffalign compare`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch.nn import Module

from ..backbones import Backbone
from ..evaluation.diversity import Diversity
from ..evaluation.guidance_curves import REPORTING, best_index
from ..evaluation.statistics import Array, nanmean, win_rate
from ..generation.grids import comparison_grid
from ..generation.sampling import drawn_file, generate, is_drawn, save_drawn
from ..runtime.distributed import sharded_modules
from ..runtime.files import write_atomically
from ..runtime.hashing import text_hash, value_hash
from ..runtime.missing import MaybeImage, Missing, check_any, left_out, present
from .guardian import FILE as GUARDIAN_FILE
from .guardian import Guardian, Look, Verdict, standardised
from .sections import ValidationConfig
from .shared_work import SharedBatches
from .tracking import MetricLog
from .validation_checks import validation_prompts

if TYPE_CHECKING:
    from ..rewards.panel import Panel
    from .online.reward_function import RewardFunction

BEST = "best"
SETTINGS = "settings.txt"
"""Beside the images of the starting weights: the identity of their prompts and
sampler."""
GRID_PROMPTS = 12
BATCH, BATCH_PIXELS = 8, 2 * 1024 * 1024
"""Images per forward pass at most, and their pixels."""


def _mean(values: Array) -> float:
    """Average all values that are not NaN."""
    return float(nanmean(values.reshape(1, -1))[0])


@dataclass
class Validated:
    """Result of one validation.

    Attributes:
        grid (`PIL.Image.Image`): Images before and after training.
        path (`Path`): File of the grid, `samples/step-<n>.png`.
        metrics (`dict[str, float]`): Metrics to log.
        value (`float`, defaults to `nan`): Mean score by `keep_best`, higher is better.
            NaN without `keep_best`.
        verdict (`Verdict`, *optional*): Whether the reward is hacked, if a guardian
            watches.
    """

    grid: Image.Image
    path: Path
    metrics: dict[str, float]
    value: float = math.nan
    verdict: Verdict | None = None


class Validation:
    """Validates one run. All processes draw and score, and the main process judges.

    Images of the starting weights are drawn once, before the first step, into
    `samples/base` (`samples/base@g3` at a guidance of 3 of several). No second model is
    needed later, and a resumed run reads them back. The best weights are in `best/`,
    with their step and score in `validation.json`.

    Args:
        config (`ValidationConfig`): Settings of the validation.
        output_dir (`Path`): Folder of the run.
        accelerator (`Accelerator`): Processes of the run.
        backbone (`Backbone`): The model.
        network: The network, which draws the images.
        averaged_weights (`Callable`): Returns the context in which the network has the
            weights that `save_model` writes.
        save_model (`Callable`): Writes the weights into a folder.
        side (`int`, *optional*): Side of the images in pixels. None is the pipeline's
            default.
        reward (`RewardFunction`, *optional*): What trains the model. A guardian then
            compares it with the scorers that do not train.
        training_names (`set[str]`, *optional*): Names of the scorers that train.
        validations (`int`, *optional*, defaults to `10`): How many the run will have.

    Attributes:
        guardian (`Guardian`, *optional*): Watches the reward.
        verdict (`Verdict`): Of the last validation, the same on all processes.
        validated_at (`int`): Step of that validation.
        restored (`bool`): Whether it was before the run was resumed.

    Raises:
        UserError: A scorer cannot be loaded.
    """

    def __init__(
        self,
        config: ValidationConfig,
        output_dir: Path,
        accelerator: Accelerator,
        backbone: Backbone,
        network: Module,
        averaged_weights: Callable[[], AbstractContextManager[None]],
        save_model: Callable[[str], None],
        side: int | None = None,
        reward: RewardFunction | None = None,
        training_names: set[str] | frozenset[str] = frozenset(),
        validations: int = 10,
    ) -> None:
        self.side, self.reward, self.validations = side, reward, validations
        self.config, self.output_dir, self.accelerator = config, output_dir, accelerator
        self.backbone, self.network = backbone, network
        self.averaged_weights, self.save_model = averaged_weights, save_model
        self.folder, self.main = output_dir / "samples", accelerator.is_main_process
        self.distinct = validation_prompts(self.config)
        count, seed = self.config.num_validation_images, self.config.validation_seed
        self.prompts = [p for p in self.distinct for _ in range(count)]
        self.seeds = [seed + i for _ in self.distinct for i in range(count)]
        self.scales: list[float | None] = [*config.guidance_scales] or [None]
        self.panel: Panel | None = None
        pixels = (side or backbone.default_resolution) ** 2
        self.batch_size = max(1, min(BATCH, BATCH_PIXELS // pixels))
        self.shares = SharedBatches(accelerator, len(self.prompts), self.batch_size)
        if self.config.scorers:
            from ..rewards.panel import Panel

            self.panel = Panel.from_config(self.config.scorers, device=accelerator.device)
        self.guards = config.guard or [n for n in config.scorers if n not in training_names]
        watches = reward is not None and bool(self.guards) and config.on_hacking != "off"
        self.guardian, self.verdict = Guardian() if watches else None, Verdict()
        self.base_scores: list[dict[str, Array]] = []
        self.base_columns = np.empty((0, 0))
        self.validated_at, self.restored, self.redrawn = -1, False, False
        self.keep_best = config.keep_best
        if self.guardian is not None:
            self.keep_best = self.keep_best or self.guards[0]

    def hacked_steps(self) -> list[int]:
        """List the validated steps at which the reward was being hacked."""
        return [] if self.guardian is None else self.guardian.hacked_steps()

    def restore(self, step: int) -> None:
        """Read what the guardian saw up to the resumed step, and drop later weights.

        Args:
            step (`int`): Optimizer step of the checkpoint.
        """
        if self.main:
            self._retire_best(step)
        if self.guardian is not None and self.redrawn:
            self.validated_at, self.restored = step, True
        elif self.guardian is not None:
            prompts = self.distinct[REPORTING] if len(self.scales) > 1 else self.distinct
            shape = (len(prompts), self.config.num_validation_images)
            if not self.guardian.read(self.folder / GUARDIAN_FILE, step, self.guards, shape):
                self.accelerator.print(
                    "validation: guards, prompts or images are others than before, so the "
                    "guardian begins anew"
                )
            self.verdict = self.guardian.verdict_at(step)
            self.validated_at, self.restored = step, True

    def due(self, step: int, last: bool) -> bool:
        """Return whether to validate after a step.

        Args:
            step (`int`): The optimizer step.
            last (`bool`): Whether it is the last one.
        """
        return last or step % self.config.validation_steps == 0

    def start(self, fresh: bool) -> None:
        """Draw the images of the starting weights, which the network must still have.

        Args:
            fresh (`bool`): Whether the run is new. Files of an earlier run are then
                removed.
        """
        folders = [self.base_folder(scale) for scale in self.scales]
        if self.main and fresh:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            for name in (BEST, f".{BEST}.new", f".{BEST}.old"):
                shutil.rmtree(self.output_dir / name, ignore_errors=True)
            (self.folder / GUARDIAN_FILE).unlink(missing_ok=True)
        elif self.main:
            self._recover()
        with self._cached_parts_leave():
            self._draw_base(folders)
        self.redrawn = self._shared(self.redrawn)
        self._score_base()

    @contextmanager
    def _cached_parts_leave(self) -> Iterator[None]:
        """Take parts out of memory again that training has in its caches."""
        names = {*self.backbone.source.component_names()} - {self.backbone.network_name}
        absent = [name for name in names if not self.backbone.is_loaded(name)]
        yield
        self.backbone.release(*absent)

    def _draw_base(self, folders: list[Path]) -> None:
        for folder, scale in zip(folders, self.scales, strict=True):
            files = [folder / f"{i:04d}.png" for i in range(len(self.prompts))]
            if self.main and not self._is_drawn_alike(folder, scale):
                shutil.rmtree(folder)
                self.redrawn = True
                self.accelerator.print(
                    f"validation: prompts or sampler are others than before, so {folder} is drawn "
                    "anew"
                )
            if self._shared(all(is_drawn(file) for file in files)):
                continue
            images = self.shares.gather(self._draw("validation (base)", scale))
            if self.main:
                check_any(images, "before training")
                folder.mkdir(parents=True, exist_ok=True)
                for file, image in zip(files, images, strict=True):
                    save_drawn(image, file)
                write_atomically(folder / SETTINGS, self._drawing_key(scale).encode())

    def _drawing_key(self, scale: float | None) -> str:
        """Return the identity of what is drawn at one guidance scale."""
        sampler = self.backbone.prompt_settings | self.config.pipe_kwargs()
        return value_hash([self.prompts, self.seeds, self.side, scale, sampler])

    def _is_drawn_alike(self, folder: Path, scale: float | None) -> bool:
        """Whether a folder may be read back. Those of earlier versions have no key."""
        file = folder / SETTINGS
        return not file.is_file() or file.read_text("utf-8") == self._drawing_key(scale)

    def _score_base(self) -> None:
        """Score the images of the starting weights.

        It happens before the first step, so that a reward that cannot score these
        prompts fails then.
        """
        if self.panel is None:
            return
        images = [
            self.shares.scatter(self.base_images[number] if self.main else [])
            for number in range(len(self.scales))
        ]
        self.base_scores = [self._scores(each) for each in images]
        if self.guardian is not None:
            best = self._shared(self._best_scale(self.base_scores) if self.main else 0)
            self.base_columns = self._reward_columns(images[best])
            self._note_silent_rewards()

    def _note_silent_rewards(self) -> None:
        """Say which rewards the guardian cannot watch."""
        if not self.main:
            return
        assert self.reward is not None
        columns = self.base_columns[:, : self.reward.deciding]
        for name, column in zip(self.reward.names(columns.shape[1]), columns.T, strict=False):
            if np.isnan(column).all():
                self.accelerator.print(
                    f"validation: the reward {name} scores none of the validation prompts, so the "
                    "guardian cannot watch it; add prompts that it scores"
                )

    def _shared(self, value: Any) -> Any:
        """Return the main process's value on all processes."""
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def base_folder(self, scale: float | None) -> Path:
        """Name the folder with images of the starting weights at one guidance scale."""
        return self.folder / ("base" if scale is None else f"base@g{scale:g}")

    def run(self, step: int, log: MetricLog) -> None:
        """Draw, score and log. With `keep_best`, save the weights if they are the best.

        All processes must call this.

        Args:
            step (`int`): The optimizer step.
            log (`MetricLog`): Receives images and metrics.
        """
        # Averaged weights are those that `save_model` writes.
        with self._cached_parts_leave(), self.averaged_weights():
            mine = [self._draw("validation", scale) for scale in self.scales]
        scores = [self._scores(images) for images in mine] if self.panel is not None else []
        best = self._shared(self._best_scale(scores) if self.main else 0)
        columns = self._reward_columns(mine[best]) if self.guardian is not None else None
        drawn = [self.shares.gather(images) for images in mine]
        result = self.validate(step, drawn, scores, columns) if self.main else None
        if result is not None:
            log.images("validation", result.grid, step)
        verdict = Verdict() if result is None or result.verdict is None else result.verdict
        better = (
            result is not None
            and self.keep_best is not None
            and not verdict.hacked
            and result.value > self._best()
        )
        shared = self._shared([result.metrics if result is not None else {}, better, verdict])
        self.verdict, self.validated_at, self.restored = shared[2], step, False
        if shared[1]:
            self._keep(step, result)
        if shared[0]:
            # Written last, so that a reader of the log finds the weights on the disk.
            log.write(shared[0], step)

    def validate(
        self,
        step: int,
        drawn: list[list[MaybeImage]],
        scores: list[dict[str, Array]],
        columns: Array | None = None,
    ) -> Validated:
        """Judge images of the current weights. The main process calls this.

        Args:
            step (`int`): The optimizer step.
            drawn (`list[list]`): Images at each guidance scale.
            scores (`list[dict]`): Their scores by scorer, (prompts, images). Empty
                without scorers.
            columns (`Array`, *optional*): Scores of the images at the best scale by
                what trains, (images, scorers). None without a guardian.

        Returns:
            `Validated`: The grid and the metrics.
        """
        best, base_best = self._best_scale(scores), self._best_scale(self.base_scores)
        tuned, base = drawn[best], self.base_images[base_best]
        missing = left_out(tuned, len(tuned), f"step {step}")
        if missing:
            self.accelerator.print(missing)
        count = self.config.num_validation_images
        rows = [
            (prompt, base[i * count : (i + 1) * count], tuned[i * count : (i + 1) * count])
            for i, prompt in enumerate(self.distinct[:GRID_PROMPTS])
        ]
        result = Validated(
            comparison_grid(rows, right=f"step {step}"), self.folder / f"step-{step}.png", {}
        )
        # Not `save_image`, whose temporary file also matches step-*.
        temporary = result.path.with_name(f"{result.path.name}.tmp")
        result.grid.save(temporary, "png")
        os.replace(temporary, result.path)
        if self.panel is None:
            return result
        several = len(self.scales) > 1
        reported = REPORTING if several else slice(None)
        for name in scores[best]:
            sign = 1.0 if self.panel.specs[name].higher_is_better else -1.0
            values, base_values = scores[best][name], self.base_scores[base_best][name]
            values, base_values = values[reported], base_values[reported]
            rate, mean = win_rate(base_values, values), _mean(values)
            result.metrics |= {
                f"validation/{name}": sign * mean,
                f"validation/{name}/base": sign * _mean(base_values),
                f"validation/{name}/win_rate": rate.rate,
                f"validation/{name}/win_rate_low": rate.low,
                f"validation/{name}/win_rate_high": rate.high,
            }
            if several:
                result.metrics |= {
                    f"validation/{name}/guidance_{scale:g}": sign * _mean(at_scale[name])
                    for scale, at_scale in zip(self.config.guidance_scales, scores, strict=True)
                }
            if name == self.keep_best:
                # If images or scores are missing, the mean is that of the others alone.
                # NaN is never better.
                unscored = np.isnan(values).sum() > np.isnan(base_values).sum()
                incomplete = unscored or len(present(tuned)) < len(present(base))
                result.value = float("nan") if incomplete else mean
        if columns is not None:
            result.verdict = self._judge(step, columns, scores[best], base_best, reported)
            result.metrics |= result.verdict.metrics
        if several:
            result.metrics |= {
                "validation/guidance": self.config.guidance_scales[best],
                "validation/guidance/base": self.config.guidance_scales[base_best],
            }
        if count > 1:
            result.metrics |= {
                "validation/diversity": self._diversity(tuned),
                "validation/diversity/base": self._diversity(base),
            }
        return result

    def _judge(
        self,
        step: int,
        columns: Array,
        scores: dict[str, Array],
        base_best: int,
        reported: slice,
    ) -> Verdict:
        """Let the guardian compare this validation with the earlier ones."""
        assert self.guardian is not None
        base_columns = self.base_columns
        if not self.guardian.looks:
            base = self.base_scores[base_best]
            self.guardian.look(self._look(0, base_columns, base_columns, base, reported))
        verdict = self.guardian.look(self._look(step, columns, base_columns, scores, reported))
        self.guardian.write(self.folder / GUARDIAN_FILE)
        return verdict

    def _reward_columns(self, images: list[MaybeImage]) -> Array:
        """Score this process's images by what trains.

        Returns:
            (images, scorers) of all processes, on the main one.
        """
        assert self.reward is not None
        prompts = [self.prompts[index] for index in self.shares.mine()]
        rows = list(self.reward(images, prompts).numpy()) if images else []
        return np.array(self.shares.gather(rows))

    def _look(
        self,
        step: int,
        columns: Array,
        base_columns: Array,
        scores: dict[str, Array],
        reported: slice,
    ) -> Look:
        assert self.reward is not None
        count, shape = self.reward.deciding, (-1, self.config.num_validation_images)
        columns, base_columns = columns[:, :count], base_columns[:, :count]
        weights = self.reward.weights(columns.shape[1])
        combined = standardised(columns, base_columns, weights).reshape(shape)[reported]
        names = self.reward.names(columns.shape[1])[: columns.shape[1]]
        members = {
            name: column.reshape(shape)[reported]
            for name, column in zip(names, columns.T, strict=True)
        }
        held_out = {name: scores[name][reported] for name in self.guards}
        members = members if len(members) > 1 else {}
        return Look(step, combined, held_out, members, self.validations)

    def _best_scale(self, scores: list[dict[str, Array]]) -> int:
        """Choose the best guidance scale by the first scorer, 0 without scores."""
        return best_index([each[self.config.scorers[0]] for each in scores]) if scores else 0

    @cached_property
    def base_images(self) -> list[list[MaybeImage]]:
        """Images of the starting weights at each guidance scale."""
        return [
            [
                file if isinstance(file, Missing) else Image.open(file).convert("RGB")
                for file in (drawn_file(folder / f"{i:04d}.png") for i in range(len(self.prompts)))
            ]
            for folder in map(self.base_folder, self.scales)
        ]

    def _scores(self, images: list[MaybeImage]) -> dict[str, Array]:
        """Score this process's images.

        Returns:
            By scorer (prompts, images) of all processes, on the main one. Higher is
            better.
        """
        assert self.panel is not None
        prompts = [self.prompts[index] for index in self.shares.mine()]
        names = list(self.panel.names)
        rows: list[Any] = []
        if images:
            columns = self.panel.score(images, prompts, on_error="nan").columns
            rows = list(zip(*(np.asarray(columns[name]) for name in names), strict=True))
        table = np.array(self.shares.gather(rows), dtype=np.float64)
        if not self.main:
            return {}
        shape = (-1, self.config.num_validation_images)
        signs = [1.0 if self.panel.specs[name].higher_is_better else -1.0 for name in names]
        return {
            name: sign * column.reshape(shape)
            for name, sign, column in zip(names, signs, table.T, strict=True)
        }

    def _diversity(self, images: list[MaybeImage]) -> float:
        count, distance = self.config.num_validation_images, Diversity()
        distances = []
        for start in range(0, len(images), count):
            group = images[start : start + count]
            drawn = [image for image in group if not isinstance(image, Missing)]
            if len(drawn) > 1:
                distances.append(distance(drawn))
        return float(np.mean(distances)) if distances else float("nan")

    def _draw(self, description: str, scale: float | None = None) -> list[MaybeImage]:
        """Draw this process's images. All processes must call this."""
        guidance = {} if scale is None else {"guidance_scale": scale}
        size = {} if self.side is None else {"height": self.side, "width": self.side}
        indices = self.shares.mine()
        # A network that is spread over the processes runs on all of them.
        idle = self.shares.idle() if sharded_modules(self.network) else []
        network = self.network
        training = network.training
        network.eval()
        pipe = self.backbone.pipeline(network=network)
        try:
            # Under mixed precision the components differ in dtype.
            with self.accelerator.autocast():
                images = generate(
                    pipe,
                    [self.prompts[index] for index in idle + indices],
                    [self.seeds[index] for index in idle + indices],
                    batch_size=self.batch_size,
                    description=description,
                    progress=self.main,
                    **self.backbone.prompt_settings | size | self.config.pipe_kwargs() | guidance,
                )
                return images[len(idle) :]
        finally:
            network.train(training)

    # The best weights

    def _best(self) -> float:
        """Return the value of the weights in `best/`, by the same scorer and images."""
        file = self.output_dir / BEST / "validation.json"
        facts = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        mine = {"scorer": self.keep_best, "images": self._images_key()}
        if not facts or any(facts.get(name, value) != value for name, value in mine.items()):
            return -math.inf
        return facts["value"]

    def _images_key(self) -> str:
        return text_hash("".join(map(self._drawing_key, self.scales)))

    def _retire_best(self, step: int) -> None:
        """Move aside the best weights of a later step than the run goes on from."""
        best = self.best_step()
        if best is None or best <= step:
            return
        retired = self.output_dir / f"abandoned-{BEST}"
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(self.output_dir / BEST, retired)
        self.accelerator.print(
            f"{BEST}/ is of step {best}, later than this run goes on from; it is now {retired.name}"
        )

    def _recover(self) -> None:
        """Restore the best weights if a run was killed between their two renames."""
        output = self.output_dir
        folder, fresh, old = output / BEST, output / f".{BEST}.new", output / f".{BEST}.old"
        if not folder.is_dir():
            for candidate in (fresh, old):
                if (candidate / "validation.json").is_file():
                    os.rename(candidate, folder)
                    break
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)

    def best_step(self) -> int | None:
        """Return the step of the weights in `best/`, None without them."""
        file = self.output_dir / BEST / "validation.json"
        return json.loads(file.read_text("utf-8"))["step"] if file.is_file() else None

    def shared_best_step(self) -> int | None:
        """Return `best_step` of the main process, on all of them."""
        return self._shared(self.best_step() if self.main else None)

    def restore_best(self) -> None:
        """Make the weights in `best/` the result of the run."""
        if self.main and self.best_step() is not None:
            for part in (self.output_dir / BEST).iterdir():
                if part.is_dir():
                    shutil.copytree(part, self.output_dir / part.name, dirs_exist_ok=True)
                elif part.name != "validation.json":
                    shutil.copy2(part, self.output_dir / part.name)
        self.accelerator.wait_for_everyone()

    def _keep(self, step: int, result: Validated | None) -> None:
        """Replace `best/` by the current weights.

        A killed run leaves the old weights or the new ones, and no mixture of both.
        """
        folder, fresh = self.output_dir / BEST, self.output_dir / f".{BEST}.new"
        if self.main:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(fresh))
        if result is None:
            return
        facts = {
            "scorer": self.keep_best,
            "images": self._images_key(),
            "value": result.value,
            "step": step,
            **result.metrics,
        }
        write_atomically(fresh / "validation.json", (json.dumps(facts, indent=2) + "\n").encode())
        old = self.output_dir / f".{BEST}.old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.is_dir():
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
