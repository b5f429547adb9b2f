"""Build hook: CMake builds the native library where there is a C++ compiler.

MK_CMAKE_ARGS adds CMake options, e.g. "-DMK_CUDA=OFF" or "-DMK_CUDA_GENCODE=90a". MK_NATIVE=0
builds the pure-Python package, MK_NATIVE=1 makes a failed native build an error. Everything
declarative is in pyproject.toml.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def torch_root() -> str | None:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def missing() -> str | None:
    """Why no native library can be built here, or None."""
    if os.environ.get("MK_NATIVE") == "0":
        return "MK_NATIVE=0"
    if shutil.which("cmake") is None:
        return "cmake was not found"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found"
    if torch_root() is None:
        return "torch is not installed in this environment (build with --no-build-isolation)"
    return None


class CMakeBuild(build_ext):
    """One library without a Python ABI tag: it holds no Python symbol."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path inside the package."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, install next to the Python files."""
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        out.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = str(os.cpu_count() or 1)
        options = shlex.split(os.environ.get("MK_CMAKE_ARGS", ""))
        options += [f"-DTORCH_ROOT={torch_root()}", f"-DCMAKE_INSTALL_PREFIX={out}"]
        commands = [
            ["cmake", "-S", str(HERE), "-B", str(build), *generator, *options],
            ["cmake", "--build", str(build), "--parallel", jobs, "--target", "install"],
        ]
        try:
            for command in commands:
                subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            if os.environ.get("MK_NATIVE") == "1":
                raise
            # A machine that cannot build still gets the package; `maestro-kernels info` says so.
            print(f"maestro_kernels: no native library: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was really built: the library may be missing."""
        return [name for name in super().get_outputs() if Path(name).exists()]


class Wheel(bdist_wheel):
    """py3-none-<platform>: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return ("py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any")


reason = missing()
if reason is not None:
    print(f"maestro_kernels: pure Python, no native library: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("maestro_kernels._native", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
