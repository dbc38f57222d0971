"""The target of ``torchrun --nproc_per_node 2 scripts/build_dataset.py --prompts ...``: the same program as ``diffalign data build``."""

import sys

from diffalign.cli.entry import main

if __name__ == "__main__":
    main(["data", "build", *sys.argv[1:]])
