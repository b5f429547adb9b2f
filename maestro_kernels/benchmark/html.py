"""Another name of `measure.report`, kept for one release."""

from maestro_kernels.measure.report import *  # noqa: F403 (all of it)
