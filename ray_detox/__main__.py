"""`python -m ray_detox` is `ray-detox`."""

import sys

from ray_detox.cli import main

if __name__ == "__main__":
    sys.exit(main())
