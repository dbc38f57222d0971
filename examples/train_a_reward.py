"""Train a reward on judgements, look at what it can do, and label new images with it.

    diffalign quickstart                    makes the judged images that are used here
    python examples/train_a_reward.py

Yours: another `BASE` (clip-h14, pickscore, ...) and other `JUDGED` (pairs, lists,
likes, or the folder of the demo's votes).
"""

from __future__ import annotations

import json

from diffalign import RewardConfig, RewardTrainer, load_scorer
from diffalign.rewards.testing.reference import SCENES, drawn_images

BASE = "shapes-clip"
JUDGED = "diffalign-quickstart/dataset"
REWARD = "rewards/example"

trainer = RewardTrainer(
    BASE,
    RewardConfig(
        output_dir=REWARD,
        overwrite_output_dir=True,
        members=4,  # an ensemble, whose members disagree where they know little
        flip_rate=0.1,  # share of labels that are wrong
        val=0.2,
        test=0.2,
    ),
    JUDGED,
)
folder = trainer.train()
report = json.loads((folder / "report.json").read_text())
for name in ("base", "reward"):
    print(
        f"{name}: {report[name]['accuracy']:.0%} of held-out pairs, its card is {folder}/README.md"
    )

scorer = load_scorer(REWARD, combine="mean_minus_std")  # careful: doubt costs
for scene, score in zip(SCENES, scorer(drawn_images(SCENES), SCENES).tolist(), strict=True):
    print(f"{score:+.2f}  {scene}")
# The folder is a scorer everywhere: diffalign data build --scorers rewards/example ...
