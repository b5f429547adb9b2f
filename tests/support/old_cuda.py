"""Syntax of the CUDA host sources against the runtime headers of CUDA 12.0 to 12.4.

    python tests/support/old_cuda.py

No nvcc of those versions can be installed from here, but their headers can: this downloads the
wheels of PyPI into a temporary folder and lets the host compiler read the files that call the
runtime. Device code is not tried. Exit status 1 where a file does not compile.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
VERSIONS = ("12.0", "12.1", "12.2", "12.3", "12.4")
# The compiler's package has crt/, which the runtime's headers include.
PACKAGES = {"nvidia-cuda-runtime-cu12": "cuda_runtime", "nvidia-cuda-nvcc-cu12": "cuda_nvcc"}
FILES = ("launch.cu", "sm90/row_launch.cu")


def headers(version: str, folder: Path) -> list[Path]:
    """Include folders of one version, downloaded."""
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
        command += ["--disable-pip-version-check", "-d", str(folder), f"{package}=={version}.*"]
        subprocess.run(command, check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/include/" in name]
            archive.extractall(folder, names)
    return [folder / "nvidia" / name / "include" for name in PACKAGES.values()]


def main() -> int:
    """Check every version, and say which files compile."""
    failed = 0
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            includes = headers(version, Path(folder))
            for file in FILES:
                command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-DMK_CUDA_SM90"]
                command += ["-Wall", "-Wextra", "-Werror"]
                for include in includes:
                    command += ["-isystem", str(include)]
                done = subprocess.run([*command, str(CUDA / file)], check=False)
                failed += done.returncode != 0
                print(f"CUDA {version}: {file}: {'ok' if done.returncode == 0 else 'FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
