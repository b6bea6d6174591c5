"""``python -m ringattn.launch``: the command ``ringattn``."""

import sys

from ringattn.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
