"""Compare a tuned model with its base, each at its own best guidance.

    diffalign quickstart                    makes the LoRA that is compared here
    python examples/compare_models.py

Yours: another base, other LoRAs or folders, your prompts, and a scorer that trained
none of them. Best scales are chosen on every other prompt and reported on the rest.
"""

from __future__ import annotations

from diffalign import compare_guidance

curves = compare_guidance(
    base="shapes",
    tuned={"name": "tuned", "lora": "diffalign-quickstart/lora"},
    prompts="shapes",
    scorers="shapes",
    guidance_scales=[1, 3, 5],
    max_prompts=12,
    num_images=2,
    num_inference_steps=20,
    output_dir="runs/example-compare",
)
rate = curves.win_rate("tuned")
print(f"best guidance: base {curves.best('base'):g}, tuned {curves.best('tuned'):g}")
print(f"the tuned model wins {rate.rate:.0%} (95 % interval {rate.low:.0%} to {rate.high:.0%})")
print("pictures, tables and a page: runs/example-compare")
