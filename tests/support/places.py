"""Where things are: every test finds files from here, wherever it lies itself."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
