"""Another name of `measure.plots`, kept for one release."""

from maestro_kernels.measure.plots import (
    Point,
    Ratio,
    line_plot,
    ratio_plot,
    roofline_plot,
    standalone,
)

__all__ = ["Point", "Ratio", "line_plot", "ratio_plot", "roofline_plot", "standalone"]
