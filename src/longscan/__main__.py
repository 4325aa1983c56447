"""`python -m longscan`: the command `longscan`."""

import sys

from longscan.cli import main

if __name__ == "__main__":
    sys.exit(main())
