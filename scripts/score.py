"""Run `diffalign score` under a launcher.

torchrun --nproc_per_node 2 scripts/score.py --images ...
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
