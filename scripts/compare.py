"""The target of ``torchrun --nproc_per_node 2 scripts/compare.py --tuned ...``: the same program as ``diffalign compare``."""

import sys

from diffalign.cli.entry import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
