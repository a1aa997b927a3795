"""`python -m kosmos_g_diffusers` is `kosmos-g`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
