"""Another name of `measure.plots`, kept for one release."""

from maestro_kernels.measure.plots import *  # noqa: F403 (all of it)
