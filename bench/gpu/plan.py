"""What is run, in which order, and how long each part may take.

What a stage could not do in the seconds that it has in a call is taken up again by a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BUDGET", "CALLS", "KERNELS", "OVERHEAD", "SHARDS", "STAGES", "TOTAL", "Stage"]

# Device time of the whole run, and what a call costs beside its own seconds: a machine is started
# and files are copied. An assumption, from "a minute or more" in the words of who lends machines.
TOTAL, OVERHEAD = 1500, 90
# Seconds of one call, of which three with their overhead fit into TOTAL.
BUDGET = 400

# One process each: the strategies of the kernels as plans print them, ": " left out.
KERNELS = (
    "triton-two_phase",
    "triton-row",
    "triton-expand",
    "native-decode",
    "native-rows",
    "native-row",
)

# Triton compiles in the process that launches, on one core, for seconds a kernel; what is not timed
# is therefore dealt out to several processes of a family, named FAMILY.0, FAMILY.1, ...
SHARDS = 3


@dataclass(frozen=True)
class Stage:
    """One kind of question.

    Attributes:
        name: what people and records call it.
        module: of bench.gpu, with `items(device, stage, family)`.
        families: one process each.
        limit: seconds without a sign of life after which an item counts as hanging; a kernel that
            Triton has compiled is one.
        together: families run at the same time, because nothing is timed.
        needs: a probe of the environment stage that must have found its tool.
        env: what the processes find in their environment beside the common part.
    """

    name: str
    module: str
    families: tuple[str, ...]
    limit: int = 30
    together: bool = False
    needs: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


_CHECKED = (
    *(f"{f}.{i}" for i in range(SHARDS) for f in KERNELS if f.startswith("triton")),
    *(f for f in KERNELS if not f.startswith("triton")),
    "auto",
)
_TABLE = {"MAESTRO_KERNELS_TUNE": "table", "MAESTRO_KERNELS_TABLE": "off"}
# "measured" stands for the table that this run made: runner.py puts its path there.
_MEASURED = {"MAESTRO_KERNELS_TUNE": "table", "MAESTRO_KERNELS_TABLE": "measured"}
_FIRST_USE = {"MAESTRO_KERNELS_TUNE": "first-use", "MAESTRO_KERNELS_TABLE": "unset"}

STAGES = {
    stage.name: stage
    for stage in (
        # What is there. Never taken from an earlier call, whose machine is gone.
        Stage("environment", "environment", ("device", "ncu", "compute-sanitizer"), 240, True),
        Stage("micro", "micro", ("chip", "cublas"), 15),
        Stage("checks", "checks", _CHECKED, 45, True, env=_TABLE),
        Stage("table", "table", KERNELS, 30, env=_TABLE),
        Stage("rows", "rows", ("auto", "compiled"), 60, env=_MEASURED),
        Stage("training", "training", ("auto",), 40, env=_MEASURED),
        Stage("first-use", "rows", ("auto",), 40, env=_FIRST_USE),
        Stage("launches", "launches", ("auto",), 20, env=_MEASURED),
        Stage("ncu", "tools", KERNELS, 60, needs="ncu", env=_TABLE),
        Stage("sanitizer", "tools", KERNELS, 80, True, "compute-sanitizer", _TABLE),
    )
}

# Seconds that each stage may take in a call. Decode, 4096 x 4096 and groups come first within each
# (suite.py); across calls: is it right, what does the chip do, what is fastest, and only then why.
CALLS = {
    1: {"environment": 60, "micro": 50, "checks": 170, "table": 100},
    2: {"environment": 30, "checks": 60, "table": 150, "rows": 100, "first-use": 30},
    3: {
        **{"environment": 30, "checks": 30, "rows": 90, "training": 50},
        **{"launches": 20, "ncu": 80, "sanitizer": 80},
    },
}
