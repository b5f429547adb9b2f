"""Shared by the pytest-benchmark suites: the accuracy gate that comes before every timing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maestro_kernels.measure.accuracy import checked
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Provider, Unavailable, make_case_inputs


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_*.py here, and nowhere else."""
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def time_provider(benchmark, device: str) -> Callable[[Case, Provider], None]:
    """Gate a provider on the inputs that are then timed; published ratios come from elsewhere."""

    def run(case: Case, provider: Provider) -> None:
        torch.compiler.reset()
        inputs = make_case_inputs(case, device)
        benchmark.group = case.id
        benchmark.extra_info.update(case=case.id, provider=provider.name, device=device)
        with torch.set_grad_enabled(case.mode == "training"):
            try:
                call, problem = checked(case, provider, inputs)
            except Unavailable as reason:
                pytest.skip(str(reason))
            if problem is not None:
                # A baseline that is less accurate than two matmuls is a finding, not our defect.
                (pytest.fail if provider.family == "ours" else pytest.xfail)(problem)

            def timed() -> None:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()

            benchmark(timed)

    return run
