"""Which card trains which model: `diffalign estimate` for the usual ways.

    python benchmarks/cards.py [--output benchmarks/cards.md]

Networks have the released shapes: SD1.5 at 512 px, SDXL and Flux.1 at 1024 px. A step
of Diffusion-DPO holds one pair, in bf16, from caches of latents and prompts. LoRAs have
rank 16. The smallest card is the first of 8, 12, 16, 24, 32, 48, 80 and 141 GiB that
holds the estimate and what CUDA takes beside the tensors. `benchmarks/memory.py`
compares estimates with what a CPU really takes. No GPU was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from full_size import SIZES, step_estimate
from tqdm import tqdm

from diffalign.training.estimate import CONTEXT, GIB

CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
BF16 = {"mixed_precision": "bf16"}
SAVING = {**BF16, "gradient_checkpointing": True}
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "LoRA": (True, BF16),
    "LoRA, `precompute_ref_errors`": (True, {**BF16, "precompute_ref_errors": True}),
    "LoRA, `gradient_checkpointing`": (True, SAVING),
    "LoRA, `gradient_checkpointing`, `layerwise_casting`": (
        True, {**SAVING, "layerwise_casting": True},
    ),
    "LoRA, `gradient_checkpointing`, `quantization: nf4`": (
        True, {**SAVING, "quantization": "nf4"},
    ),
    "all weights, `gradient_checkpointing`": (False, SAVING),
    "all weights, `gradient_checkpointing`, `adamw_8bit`, `offload_reference`": (
        False, {**SAVING, "optim": "adamw_8bit", "offload_reference": True},
    ),
}  # fmt: skip
TITLES = {"sd15": "SD1.5, 512 px", "sdxl": "SDXL, 1024 px", "flux": "Flux.1, 1024 px"}


def cell(size: float) -> str:
    """GiB, and the smallest card."""
    card = next((f"{card} GiB" for card in CARDS if size + CONTEXT <= card), "none")
    return f"{size:.1f} | {card}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    assert __doc__ is not None
    lines = ["# Which card trains which model", "", *__doc__.split("\n\n", 1)[1].split("\n")]
    heads = [f"{TITLES[model]}: GiB | card" for model in SIZES]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (2 * len(heads) + 1) + "|"]
    for way, (lora, settings) in tqdm(WAYS.items()):
        cells = [
            cell(step_estimate(model, None, side, lora, **settings).peak / GIB)
            for model, side in SIZES.items()
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
