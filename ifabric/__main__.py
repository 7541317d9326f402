"""`python -m ifabric`: the same as `ifabric`."""

import sys

from ifabric.cli import main

if __name__ == "__main__":
    sys.exit(main())
