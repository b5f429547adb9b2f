"""One provider per row on one layer: `pytest bench/`, tracked over time by pytest-benchmark."""

from __future__ import annotations

import pytest

from maestro_kernels.benchmark.cases import MODELS
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Provider

CASES = [
    MODELS["MiniLM-L6 up"].case(1, 96, R=192),
    MODELS["MiniLM-L6 up"].case(64, 96, R=192),
    MODELS["Llama-2-7B o"].case(1, 256),
    MODELS["Llama-2-7B o"].case(16, 127, R=256),
    MODELS["MiniLM-L6 up"].case(64, 96, R=192, mode="training"),
]
ROWS = [
    pytest.param(case, provider, id=f"{case.id}-{provider.name}")
    for case in CASES
    for provider in default_providers(case)
]


@pytest.mark.benchmark(max_time=0.25, min_rounds=3)
@pytest.mark.parametrize(("case", "provider"), ROWS)
def test_lod_linear(time_provider, case: Case, provider: Provider):
    time_provider(case, provider)
