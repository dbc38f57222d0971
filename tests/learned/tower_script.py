"""Trains towers under torchrun: `tower_script.py <folder> <batch>`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from judged import train_towers

train_towers(Path(sys.argv[1]), "full", per_device_train_batch_size=int(sys.argv[2]))
