"""`python -m optaxclip`, the same as the command `optaxclip`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
