"""What `extract` did to get a model, and the places on its path."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from maestro_kernels.search.refine import Refinement

_REPORT = "_maestro_extraction"


@dataclass(frozen=True)
class Step:
    """One place on the path.

    Attributes:
        layer: the layer that gave up rank on the way here, None at the start.
        cost: of the model here, each layer in its cheapest form.
        loss: mean over the batches, measured, or predicted where errors are "additive".
    """

    layer: str | None
    cost: float
    loss: float


@dataclass(frozen=True)
class Extraction:
    """What `extract` did to get a model.

    Attributes:
        unit: of cost and limit: "weights", "MACs", "ms" or "bytes".
        limit: what the budget allows.
        cost: what the model costs; milliseconds are the layers' measured times added up, scaled to
            the measured times of the whole model at both ends of the path.
        loss: mean over the batches, of the model as it is returned.
        full_loss: the same of the model it was cut from.
        ranks: per layer.
        forms: per layer, "factors", "pivoted" or "dense".
        refined: losses measured on the way from the model on the path; None where there was
            nothing to refine.
    """

    unit: str
    limit: float
    cost: float
    loss: float
    full_loss: float
    ranks: dict[str, int] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    refined: Refinement | None = None

    def attached(self, model: nn.Module) -> nn.Module:
        """The model, which tells this when `extraction_report` asks it."""
        setattr(model, _REPORT, self)
        return model


def extraction_report(model: nn.Module) -> Extraction | None:
    """How this model was extracted, or None."""
    report: Extraction | None = vars(model).get(_REPORT)
    return report
