"""The built wheel is whole: it runs from an empty folder with everything it reads at run time."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy, so that the build leaves nothing in the work tree.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "maestro_kernels", source / "maestro_kernels", ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_is_pure_python_without_a_compiler(wheel):
    assert wheel.name.endswith("py3-none-any.whl")


def test_wheel_holds_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.json", "py.typed")
        for path in (ROOT / "maestro_kernels").rglob(pattern)
        if "__pycache__" not in path.parts
    }
    assert "maestro_kernels/py.typed" in packed
    assert wanted - packed == set()


def test_installed_wheel_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path / "site")
    code = (
        "import torch, maestro_kernels as mk; print(mk.__file__);"
        "print(tuple(mk.lod_linear(torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8)).shape))"
    )

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where, shape = run("-c", code).split("\n")[:2]
    assert where.startswith(str(tmp_path))
    assert shape == "(2, 6)"
    info = json.loads(run("-m", "maestro_kernels", "info", "--json"))
    backends = info["devices"][0]["backends"]
    assert backends["matmul"] is None
    assert backends["reference"] is None
    assert "compiled library" in backends["native"]
    assert "CUDA" in backends["triton"] or "not installed" in backends["triton"]
