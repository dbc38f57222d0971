"""The target of ``torchrun --nproc_per_node 2 scripts/score.py --images ...``: the same program as ``diffalign score``."""

import argparse
import os
import sys

from diffalign.exceptions import UserError
from diffalign.rewards import score_command


def main() -> int:
    parser = argparse.ArgumentParser(description="Score images with reward models.", allow_abbrev=False)
    score_command.add_arguments(parser)
    try:
        return score_command.run(parser.parse_args())
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"diffalign: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
