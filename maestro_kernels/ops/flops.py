"""Formulas for torch's FlopCounterMode, registered when somebody counts.

torch.utils.flop_counter imports Triton where it is installed, which `import maestro_kernels` should
not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from maestro_kernels.imports import when_imported

_COUNTER = "torch.utils.flop_counter"
Formula = TypeVar("Formula", bound=Callable[..., int])


def flop_formula(*ops: Any) -> Callable[[Formula], Formula]:
    """Decorate a function of the shapes of an op's arguments that gives its FLOP.

    Args:
        ops: the ops it holds for, as in torch.ops.
    """

    def register(formula: Formula) -> Formula:
        def now() -> None:
            importlib.import_module(_COUNTER).register_flop_formula(list(ops))(formula)

        when_imported(_COUNTER, now)
        return formula

    return register
