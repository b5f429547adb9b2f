"""One provider per row on a group of layers that read one input, grouped and ungrouped."""

from __future__ import annotations

import pytest

from maestro_kernels.benchmark.cases import MODELS
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Provider

CASES = [
    MODELS["MiniLM-L6 q/k/v"].case(1, (64, 64, 128)),
    MODELS["Llama-3-8B q/k/v"].case(1, 128, dtype="bfloat16"),
    MODELS["MiniLM-L6 q/k/v"].case(64, (64, 64, 128), mode="training"),
]
ROWS = [
    pytest.param(case, provider, id=f"{case.id}-{provider.name}")
    for case in CASES
    for provider in default_providers(case)
]


@pytest.mark.benchmark(max_time=0.25, min_rounds=3)
@pytest.mark.parametrize(("case", "provider"), ROWS)
def test_lod_linear_grouped(time_provider, case: Case, provider: Provider):
    time_provider(case, provider)
