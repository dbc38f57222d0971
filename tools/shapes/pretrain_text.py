"""Make the embedded text model.

Run ``python -m tools.shapes.pretrain_text --output_dir OUT``.

It is a small `transformers.BertForMaskedLM`, trained as a masked diffusion language
model (MDLM, Sahoo et al. 2024, arXiv 2406.07524, eq. 10: cross-entropy of the masked
tokens, weighted by 1/t at mask rate t) on the 600 training captions of the shapes
world. It is the default of text steering, and takes about a minute and a half on two
CPU cores. The command measures what it samples and writes model, tokenizer,
``accuracy.json`` and the card.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.errors import ConfigError
from diffalign.runtime.files import write_atomically
from diffalign.shapes.prompts import held_out_prompts, parse_prompt, train_prompts
from diffalign.shapes.tokenizer import MAX_LENGTH, build_tokenizer
from tools.shapes.options import read_options

EVAL_STEPS = (4, 8, 16, 32)
"""Sampler steps at which the samples are measured."""


@dataclass
class TextPretrainConfig:
    """Settings of this command, whose defaults made the shipped weights.

    The defaults made the shipped weights.

    Raises:
        ConfigError: a value out of range.
    """

    seed: int = 0
    """Seed of initialisation, batches and masks."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 128
    """Captions per step."""
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule of AdamW."""
    hidden_size: int = 64
    """Width of the transformer."""
    layers: int = 3
    """Layers of the transformer."""
    eval_samples: int = 2000
    """Captions sampled per number of steps to measure."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, lowest = getattr(self, field.name), 0 if field.name == "seed" else 1
            if field.name == "hidden_size" and value % 16:
                raise ConfigError("--hidden_size", f"expected a multiple of 16, got {value}")
            if value < lowest if field.type == "int" else value <= 0:
                raise ConfigError(
                    f"--{field.name}",
                    f"expected {field.type} "
                    f"{'>= ' + str(lowest) if field.type == 'int' else '> 0'}, got {value}",
                )


def build_model(vocabulary: int, config: TextPretrainConfig) -> Any:
    """Build the network, with one more entry than the tokenizer has: the mask.

    Args:
        vocabulary (`int`): entries of the tokenizer.
        config (`TextPretrainConfig`): width and layers.
    """
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary + 1,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden_size // 16,
            intermediate_size=2 * config.hidden_size,
            max_position_embeddings=MAX_LENGTH,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,
        )
    )


def masked_loss(logits: Tensor, tokens: Tensor, masked: Tensor, rate: Tensor) -> Tensor:
    """Compute the ELBO of masked diffusion per token.

    It is the sum over masked positions of -log p(x0 | x_t) / t, divided by the length
    (Sahoo et al. 2024, arXiv 2406.07524, eq. 10).

    Args:
        logits (`Tensor`): (n, length, vocabulary + 1). The last entry is the mask,
            which is never predicted.
        tokens (`Tensor`): the clean text, (n, length).
        masked (`Tensor`): which tokens were hidden, (n, length).
        rate (`Tensor`): the mask rate t in (0, 1], (n,).

    Returns:
        `Tensor`: a scalar.
    """
    log_probs = logits[..., :-1].float().log_softmax(-1)
    nll = -log_probs.gather(-1, tokens[..., None])[..., 0]
    return ((nll * masked).sum(1) / rate / tokens.shape[1]).mean()


def train(config: TextPretrainConfig, tokenizer: Any) -> Any:
    """Train the network on the training captions.

    Args:
        config (`TextPretrainConfig`): the settings.
        tokenizer (`CLIPTokenizer`): of the shapes world.

    Returns:
        `BertForMaskedLM`: in evaluation mode.
    """
    torch.manual_seed(config.seed)
    ids = torch.tensor(
        tokenizer(train_prompts(), padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    )
    model = build_model(len(tokenizer), config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(config.steps, 2), pct_start=0.1
    )
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(config.steps), desc="masked denoiser", mininterval=5)
    for _ in bar:
        tokens = ids[torch.randint(len(ids), (config.batch_size,), generator=generator)]
        # One rate per stratum: less noise than independent ones (Kingma et al. 2021).
        rate = (
            torch.rand(1, generator=generator) + torch.arange(config.batch_size) / config.batch_size
        ) % 1
        rate = rate.clamp(min=1e-3)
        masked = torch.rand(tokens.shape, generator=generator) < rate[:, None]
        logits = model(torch.where(masked, torch.tensor(len(tokenizer)), tokens)).logits
        loss = masked_loss(logits, tokens, masked, rate)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def is_caption(text: str) -> bool:
    """Tell whether a text is, word for word, a caption of the shapes world."""
    text = " ".join(text.split())
    try:
        return parse_prompt(text).prompt == text
    except ValueError:
        return False


def measure(model: Any, tokenizer: Any, config: TextPretrainConfig) -> dict[str, Any]:
    """Measure sampled texts, at each number of steps in `EVAL_STEPS`.

    Returns:
        `dict`: steps -> share of captions, how many different ones, and the share of
            them that was held out from training.
    """
    from diffalign.steering.text import FKTextSteering

    shares: dict[str, Any] = {}
    held_out = set(held_out_prompts())
    for steps in EVAL_STEPS:
        sampler = FKTextSteering(
            model,
            tokenizer,
            lambda texts: [0.0] * len(texts),
            num_particles=100,
            lmbda=0.0,
            num_steps=steps,
            resample_steps=(),
        )
        groups = max(1, config.eval_samples // 100)
        texts = [text for row in sampler([""] * groups, seed=config.seed).texts for text in row]
        captions = [" ".join(text.split()) for text in texts if is_caption(text)]
        shares[str(steps)] = {
            "captions": len(captions) / len(texts),
            "different": len(set(captions)),
            "held_out": sum(text in held_out for text in captions) / max(1, len(captions)),
        }
    return shares


CARD = """---
license: apache-2.0
library_name: transformers
---

# The text denoiser of the shapes world

A masked diffusion language model over captions of the shapes world: `BertForMaskedLM`, {layers}
layers of width {width}, {millions:.2f} M parameters, trained on the 600 training captions alone by
`python -m tools.shapes.pretrain_text --output_dir OUT` ({steps} steps of {batch}, seed {seed}). The
mask is token {mask}, the first one after the tokenizer's vocabulary.

Measured by the same command on {samples} samples each:

| sampler steps | captions of the world | different ones | of them held out from training |
|---|---|---|---|
{rows}

120 of the 720 captions (16.7 %) were never seen in training. Few steps reveal several words at
once, independently, which breaks sentences: the law of the *sampler* is what steering tilts.

Use: `from diffalign.shapes.text_denoiser import load_text_denoiser`, or
`FKTextSteering(None, None, scorer, ...)`.
"""


def write_card(
    folder: Path, config: TextPretrainConfig, results: dict[str, Any], parameters: int
) -> None:
    """Write ``README.md`` of the weights."""
    rows = [
        f"| {steps} | {100 * row['captions']:.1f} % | {row['different']} of 720 | "
        f"{100 * row['held_out']:.1f} % |"
        for steps, row in results.items()
    ]
    text = CARD.format(
        layers=config.layers,
        width=config.hidden_size,
        millions=parameters / 1e6,
        steps=config.steps,
        batch=config.batch_size,
        seed=config.seed,
        mask=len(build_tokenizer()),
        samples=config.eval_samples,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(text)


def run(folder: Path, config: TextPretrainConfig) -> dict[str, Any]:
    """Train, write and measure.

    Args:
        folder (`Path`): for everything that is written.
        config (`TextPretrainConfig`): the settings.

    Returns:
        `dict`: results of `measure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = train(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = measure(model, tokenizer, config)
    write_atomically(
        folder / "accuracy.json",
        (json.dumps({"settings": asdict(config), "by_steps": results}, indent=2) + "\n").encode(),
    )
    write_card(folder, config, results, sum(p.numel() for p in model.parameters()))
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    folder, config = read_options(TextPretrainConfig, __doc__, arguments)
    run(folder, config)
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
