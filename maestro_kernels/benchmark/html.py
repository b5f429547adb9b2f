"""Another name of `measure.report`, kept for one release."""

from maestro_kernels.measure.report import *  # noqa: F403 (all of it)
from maestro_kernels.measure.wording import when as when
