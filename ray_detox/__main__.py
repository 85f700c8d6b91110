"""`python -m ray_detox` is `ray-detox`."""

import sys

if __name__ == "__main__":
    # A cluster's image may bring another Python than the machine that a run is submitted from.
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = sys.version.split()[0]
        print(
            f"ray-detox: needs Python 3.11 to 3.13; {sys.executable} is {version}.", file=sys.stderr
        )
        sys.exit(2)
    from ray_detox.cli.main import main

    sys.exit(main())
