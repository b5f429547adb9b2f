"""Wrong calls: command line."""

from messages import Row

ROWS: list[Row] = []
