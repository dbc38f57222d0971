"""Run `diffalign compare` under a launcher.

torchrun --nproc_per_node 2 scripts/compare.py --tuned ...
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
