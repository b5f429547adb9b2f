"""`python -m maestro_kernels` is the `maestro-kernels` command."""

import sys

from maestro_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
