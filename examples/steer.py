"""Steer a model towards a reward while it samples, beside best of n at equal cost.

    python examples/steer.py

Yours: another pipeline and another scorer (pickscore, imagereward, a folder of yours).
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from diffalign import FKSteering, load_scorer
from diffalign.shapes import held_out_prompts, weights_dir

PROMPTS = list(held_out_prompts()[:8])
FOLDER = Path("runs/example-steer")
FOLDER.mkdir(parents=True, exist_ok=True)

pipe = DiffusionPipeline.from_pretrained(weights_dir())
pipe.set_progress_bar_config(disable=True)
steering = FKSteering(pipe, load_scorer("shapes-clip"), num_particles=4, lmbda=2.0)
judge = load_scorer("shapes")  # trains and steers nothing, so it can judge

for name, sampler in (("steered", steering), ("best of 4", steering.best_of_n())):
    result = sampler(PROMPTS, seed=0, eta=1.0, num_inference_steps=20)
    print(f"{name}: {judge(result.best, PROMPTS).mean():.3f} by the judge")
    for number, image in enumerate(result.best):
        image.save(FOLDER / f"{name.replace(' ', '-')}-{number}.png")
    if name == "steered":
        result.plot(path=FOLDER / "lineage.png")  # the resampling genealogy
