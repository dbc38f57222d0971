"""The target of ``accelerate launch scripts/train.py --config configs/...``: the same program as ``diffalign train``."""

import sys

from diffalign.cli.entry import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
