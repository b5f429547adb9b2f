"""Wrong calls: files."""

from messages import Row

ROWS: list[Row] = []
