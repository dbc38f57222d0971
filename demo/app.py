"""The demo as a script, for Spaces and for ``python demo/app.py --tuned runs/mine``: the same program as ``diffalign demo``."""

import sys

from diffalign.cli.entry import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
