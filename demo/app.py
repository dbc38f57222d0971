"""Run `diffalign demo` as a script, for Spaces.

python demo/app.py --tuned runs/mine
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
