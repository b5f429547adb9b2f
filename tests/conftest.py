"""Session-wide settings; see triton_support.py for why the interpreter is the default."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# What the user tuned must not decide what is tested.
os.environ["MAESTRO_KERNELS_TABLE"] = "off"
# Nor must what this machine finds faster today: tests of measuring switch it on.
os.environ["MAESTRO_KERNELS_TUNE"] = "table"
# A process that a test starts, from any folder, tests this checkout whether it is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *map(
            str, (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent / "support")
        ),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)

import pytest
import torch

from maestro_kernels import dispatch
from maestro_kernels.backends import native


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """The package as it is where no C++ compiler built its library."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.setattr(dispatch, "_plans", {})
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


# Files and folders of more than a few seconds each: `make test-fast` leaves them out.
SLOW = (
    "backends/native/test_native.py",
    "backends/test_beyond_rank.py",
    "backends/test_onednn.py",
    "backends/triton",
    "bench/test_gpu_checks.py",
    "bench/test_gpu_run.py",
    "bench/test_sentence_encoder.py",
    "benchmark/test_page_browser.py",
    "benchmark/test_report.py",
    "benchmark/test_run.py",
    "bench/test_scripts.py",
    "cli/test_bench.py",
    "cli/test_train.py",
    "cli/test_tune.py",
    "compression",
    "csrc",
    "docs/test_docs.py",
    "nn/test_adapters.py",
    "nn/test_foreign.py",
    "nn/test_saved_file.py",
    "nn/test_serialization_crash.py",
    "nn/test_threads.py",
    "ops/test_export.py",
    "search/test_layer_profile.py",
    "test_import.py",
    "test_machines.py",
    "test_packaging.py",
    "tools",
    "training/test_extraction.py",
    "training/test_rewrapping.py",
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here).as_posix()
        if any(path == slow or path.startswith(f"{slow}/") for slow in SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
