"""The `maestro-kernels` command as the documentation's shell blocks run it."""

import sys

import small_rings

from maestro_kernels.cli import main

__all__ = ["small_rings"]

if __name__ == "__main__":
    sys.exit(main())
