"""Wrong calls: layers."""

from messages import Row

ROWS: list[Row] = []
