"""Make the embedded pipelines: ``python -m tools.shapes.pretrain --output_dir OUT``.

There are five seeded stages on rendered images. First, an autoencoder is trained. Then
the two denoisers are trained, each jointly with its text encoders, on captions that are
deliberately wrong: a UNet that predicts the noise, and a transformer that predicts the
velocity. The bases thus follow their prompts imperfectly, and there is something to
align. The decoder is trained once more, for sharp edges. Last, both pipelines are
written, and their held-out accuracy is measured over guidance scales for their cards.

Every stage leaves its result in ``OUT/stages`` and is skipped where it is there. With
``--stages`` several processes can work side by side. Together the stages take about 70
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.training_utils import set_seed
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from diffalign.shapes.models import EMBEDDED_MODELS
from diffalign.shapes.tokenizer import build_tokenizer
from tools.shapes import epsilon, flow
from tools.shapes.autoencoder import refine_decoder, train_vae
from tools.shapes.base_card import measure_and_write
from tools.shapes.captioned_images import PretrainConfig, rendered_set
from tools.shapes.training import save_pipeline

TEXT_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
"""Of the flow pipeline."""


class Stages:
    """The stages by name, in the order in which one process runs them.

    Args:
        folder (`Path`): for everything that is written.
        config (`PretrainConfig`): the settings.
    """

    def __init__(self, folder: Path, config: PretrainConfig) -> None:
        self.folder, self.config = folder, config
        self.by_name: dict[str, Callable[[], None]] = {
            "autoencoder": self.autoencoder,
            "epsilon": self.epsilon,
            "flow": self.flow,
            "decoder": self.decoder,
            "assemble": self.assemble,
        }

    def run(self, names: list[str]) -> None:
        """Run the named stages that have no result yet."""
        for name in names:
            if (self._place(name)).is_dir():
                print(f"{name}: {self._place(name)} is there")
                continue
            set_seed(self.config.seed)
            self.by_name[name]()

    def _place(self, name: str) -> Path:
        return self.folder / "stages" / name

    def _save(self, stage: str, **parts: Any) -> None:
        # The folder gets its name last, since its presence says that the stage is done.
        temporary = self._place(f".{stage}.tmp")
        for name, part in parts.items():
            part.save_pretrained(temporary / name)
        temporary.rename(self._place(stage))

    def _load(self, stage: str, name: str, kind: Any) -> Any:
        return kind.from_pretrained(self._place(stage) / name).eval()

    def autoencoder(self) -> None:
        """Train the autoencoder."""
        pixels, _ = rendered_set(self.config, preferred_share=0.5)
        self._save("autoencoder", vae=train_vae(self.config, pixels))

    def epsilon(self) -> None:
        """Train the UNet and its text encoder."""
        vae = self._load("autoencoder", "vae", AutoencoderKL)
        images = rendered_set(self.config, self.config.preferred_share)
        unet, text_encoder, _ = epsilon.train_denoiser(self.config, vae, *images)
        self._save("epsilon", unet=unet, text_encoder=text_encoder)

    def flow(self) -> None:
        """Train the transformer and its text encoders."""
        vae = self._load("autoencoder", "vae", AutoencoderKL)
        images = rendered_set(self.config, self.config.preferred_share)
        transformer, encoders = flow.train_flow(self.config, vae, *images)
        parts = dict(zip(TEXT_ENCODERS, encoders, strict=True))
        self._save("flow", transformer=transformer, **parts)

    def decoder(self) -> None:
        """Train the decoder alone."""
        vae = self._load("autoencoder", "vae", AutoencoderKL)
        pixels, _ = rendered_set(self.config, preferred_share=0.5)
        refine_decoder(self.config, vae, pixels)
        self._save("decoder", vae=vae)

    def assemble(self) -> None:
        """Write both pipelines and their cards."""
        first = epsilon.build_pipeline(
            self._load("decoder", "vae", AutoencoderKL),
            self._load("epsilon", "unet", UNet2DConditionModel),
            self._load("epsilon", "text_encoder", CLIPTextModel),
            build_tokenizer(),
        )
        second = flow.build_pipeline(
            self._load("decoder", "vae", AutoencoderKL),
            self._load("flow", "transformer", SD3Transformer2DModel),
            tuple(self._load("flow", name, kind) for name, kind in TEXT_ENCODERS.items()),
        )
        for pipe, (name, place) in zip((first, second), EMBEDDED_MODELS.items(), strict=True):
            save_pipeline(pipe, self.folder / place)
            measure_and_write(self.folder / place, name, self.config)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", help="run these alone (default: all)")
    parser.add_argument(
        "--measure_only",
        action="store_true",
        help="only measure the pipelines in --output_dir and rewrite their cards",
    )
    for name, value in asdict(PretrainConfig()).items():
        parser.add_argument(
            f"--{name}",
            type=type(value) if not isinstance(value, bool) else lambda text: text == "true",
            default=value,
        )
    options = vars(parser.parse_args(arguments))
    folder, names, measure_only = (
        options.pop("output_dir"),
        options.pop("stages"),
        options.pop("measure_only"),
    )
    config = PretrainConfig(**options)
    if measure_only:
        for name, place in EMBEDDED_MODELS.items():
            measure_and_write(folder / place, name, config)
        return
    stages = Stages(folder, config)
    unknown = sorted(set(names or ()) - set(stages.by_name))
    if unknown:
        parser.error(f"--stages: {unknown[0]!r} is not one of {', '.join(stages.by_name)}")
    settings = folder / "settings.json"
    folder.joinpath("stages").mkdir(parents=True, exist_ok=True)
    if settings.is_file() and json.loads(settings.read_text()) != asdict(config):
        parser.error(f"--output_dir: {str(folder)!r} holds stages of other settings")
    settings.write_text(json.dumps(asdict(config), indent=2) + "\n")
    stages.run(names or list(stages.by_name))


if __name__ == "__main__":
    main()
