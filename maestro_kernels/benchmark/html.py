"""Another name of `measure.report`, kept for one release."""

from maestro_kernels.measure.report import (
    Cell,
    Html,
    cards,
    details,
    figure,
    grid,
    page,
    prose,
    section,
    table,
    verdict,
    warning,
    when,
)

__all__ = [
    "Cell",
    "Html",
    "cards",
    "details",
    "figure",
    "grid",
    "page",
    "prose",
    "section",
    "table",
    "verdict",
    "warning",
    "when",
]
