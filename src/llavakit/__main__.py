"""``python -m llavakit`` is ``llava``."""

import sys

from llavakit.cli import main

if __name__ == "__main__":
    sys.exit(main())
