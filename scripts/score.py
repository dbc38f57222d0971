"""The target of ``torchrun --nproc_per_node 2 scripts/score.py --images ...``: the same program as ``diffalign score``."""

import sys

from diffalign.cli.entry import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
