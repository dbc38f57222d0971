"""Run `diffalign steer` under a launcher.

torchrun --nproc_per_node 2 scripts/steer.py --prompts ...
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["steer", *sys.argv[1:]])
