"""Run `diffalign data build` under a launcher.

torchrun --nproc_per_node 2 scripts/build_dataset.py --prompts ...
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["data", "build", *sys.argv[1:]])
