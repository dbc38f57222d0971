"""Writes diffalign/rewards/testing/reference.json, what `diffalign doctor` compares
with, from ../fixtures and from the scorers themselves.

    python tests/rewards/originals/collect.py

Numbers come from the published code where a fixture has them; clip-l14, clip-h14,
open_clip and shapes-clip have no published code of their own to run here, so theirs are
what this package computed when the file was written.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
FIXTURES = ROOT / "tests" / "rewards" / "fixtures"

# Every image, and prompts that no tokenizer disagrees about.
PAIRS = [[0, 0], [1, 1], [2, 2], [3, 4], [5, 5], [6, 6], [7, 9], [8, 15]]
# ImageReward's code resizes images in their own mode; this package resizes what they
# show. These have transparency or a palette.
OTHER_MODES = {"imagereward": (5, 6)}
SCENES = [[i, j] for i in range(4) for j in (i, (i + 1) % 4)]

PUBLISHED: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "imagereward": ("imagereward", "rewards_fp32", 5e-5, {}),
    "pickscore": ("pickscore", "scores", 2e-4, {}),
    "hpsv2.0": ("hpsv2_legacy", "scores", 5e-6, {"antialias": False}),
    "hpsv2.1": ("hpsv2_antialias", "scores", 5e-6, {}),
    "mps": ("mps", "scores_threshold_0.3", 2e-4, {}),
}
OWN = {
    "clip-l14": 5e-6,
    "clip-h14": 5e-6,
    "open_clip": 5e-6,
    "aesthetic-v1": 2e-5,
    "aesthetic-v2": 2e-5,
    "shapes-clip": 2e-5,
    "shapes": 1e-6,
}


def main() -> None:
    from diffalign import __version__
    from diffalign.rewards.testing import doctor

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for key, (file, field, tolerance, options) in PUBLISHED.items():
        numbers = json.loads((FIXTURES / f"{file}.json").read_text())
        source = (
            f"{numbers['source']['repository']} at {numbers['source']['commit'][:7]} on tiny "
            "random weights"
        )
        pairs = [[i, j] for i, j in PAIRS if i not in OTHER_MODES.get(key, ())]
        values = [numbers[field][i][j] for i, j in pairs]
        found[key] = {
            "source": source,
            "pairs": pairs,
            "values": values,
            "tolerance": tolerance,
            "options": options,
        }
    for key, tolerance in OWN.items():
        drawn = key.startswith("shapes")
        weights = {"shapes": "drawn images", "shapes-clip": "its embedded weights"}.get(
            key, "tiny random weights"
        )
        expected = {
            "source": f"diffalign {__version__} on {weights}",
            "pairs": SCENES if drawn else PAIRS,
            "options": {},
        }
        with tempfile.TemporaryDirectory() as folder:
            found[key] = {
                **expected,
                "values": doctor.stored_scores(key, expected, Path(folder)),
                "tolerance": tolerance,
            }
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    doctor.REFERENCE.write_text("{\n" + rows + "\n}\n")
    print(f"wrote {doctor.REFERENCE.name}: {', '.join(found)}")


if __name__ == "__main__":
    main()
