"""Run `diffalign train` under a launcher.

accelerate launch scripts/train.py --config configs/...
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
