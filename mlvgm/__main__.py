"""``python -m mlvgm``: the same as the console script."""

import sys

from mlvgm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
