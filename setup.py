"""Build hook: CMake builds the native library where there is a C++ compiler.

MK_CMAKE_ARGS adds CMake options, e.g. "-DMK_CUDA=OFF" or "-DMK_CUDA_GENCODE=90a". MK_NATIVE=0
builds the pure-Python package, MK_NATIVE=1 makes a failed native build an error, that of the CUDA
kernels included. Otherwise the package holds what could be built, and _build.json in it says why
the rest is missing. Everything declarative is in pyproject.toml.
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
LIBRARY, RECORD = "_native.so", "_build.json"
OLDEST_CMAKE = (3, 24)  # as in CMakeLists.txt
# Where CMake keeps what compilers said that it tried: until 3.25, and since.
LOGS = ("CMakeFiles/CMakeError.log", "CMakeFiles/CMakeConfigureLog.yaml")
# What a compiler, linker or ninja says when it fails; lines that only name -Werror do not match.
ERROR = re.compile(r"\b(error|fatal)\b\s*:|undefined (reference|symbol)|No space left", re.I)


class BuildError(Exception):
    """Why something could not be built, in one line."""


def search_path() -> str:
    """PATH, then the scripts of this Python: an environment that is not activated counts too."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def find_cmake() -> str:
    """The first cmake on the path that is new enough."""
    found = []
    for folder in search_path().split(os.pathsep):
        program = shutil.which("cmake", path=folder) if folder else None
        if program is None:
            continue
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"(\d+)\.(\d+)\S*", done.stdout)
        if version and tuple(int(part) for part in version.groups()) >= OLDEST_CMAKE:
            return program
        found.append(version.group() if version else f"broken: {last_line(done.stderr)}")
    wanted = ".".join(str(part) for part in OLDEST_CMAKE)
    raise BuildError(
        f"cmake {wanted} or later is needed, "
        + (f"found {found[0]}" if found else "none was found")
    )


def find_torch() -> Path:
    """Folder of the installed torch, found without importing it.

    pip's isolated builds hide the packages of the Python that runs them, which is the one that the
    package is installed for. Only headers and the names of libraries are taken from torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for name in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(name)) / "torch"
        if (folder / "include" / "torch").is_dir():
            return folder
    raise BuildError(
        "torch is not installed for the Python that built it "
        "(install torch first, then this package with --no-build-isolation)"
    )


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def first_error(output: str) -> str:
    """The line of a failed build that says what was wrong, without the folders of this machine."""
    lines = output.splitlines()
    # What a compiler said comes before what CMake makes of it; CMake quotes those that it tries.
    compilers = (line for line in lines if not line.startswith("CMake Error"))
    said = next((line for line in compilers if ERROR.search(line)), None)
    said = said or cmake_error(lines) or last_line(output)
    for folder in (HERE, HERE.resolve()):
        said = said.replace(f"{folder}{os.sep}", "")
    return said.strip()[:500]


def cmake_error(lines: list[str]) -> str | None:
    """CMake's first error: its text stands below it, indented, and ends at a line that is not."""
    first = next((i for i, line in enumerate(lines) if line.startswith("CMake Error")), None)
    if first is None:
        return None
    text = itertools.takewhile(lambda line: not line or line[0] == " ", lines[first + 1 :])
    return " ".join(line.strip() for line in text if line.strip()) or lines[first]


def call(step: str, command: list[str]) -> None:
    """Run a command and pass on what it prints; BuildError with the first error when it fails."""
    # Messages are searched for their English words.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise BuildError(f"{step}: {command[0]}: {error.strerror}") from None
    output = []
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode(errors="replace")
        output.append(line)
        sys.stdout.write(line)
    if process.wait() != 0:
        raise BuildError(f"{step}: {first_error(''.join(output))}")


def forget_configuration(build: Path) -> None:
    """Drop what CMake remembers of options and compilers, but not the object files."""
    for name in ("CMakeCache.txt", *LOGS):
        (build / name).unlink(missing_ok=True)
    for folder in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(folder)


def nvcc_refused(build: Path) -> str | None:
    """What nvcc said to CMake, which only reports that something else is wrong then."""
    for log in (build / name for name in LOGS):
        said = re.search(r"nvcc (fatal|error)\s*:.*", log.read_text()) if log.exists() else None
        if said:
            return f"configuring failed: {said.group()}"
    return None


def run_cmake(build: Path, out: Path, options: list[str]) -> str | None:
    """Build the library into `out`; None, or why it has no CUDA kernels."""
    forget_configuration(build)
    cmake, ninja = find_cmake(), shutil.which("ninja", path=search_path())
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    defines = [*options, f"-DTORCH_ROOT={find_torch()}", f"-DCMAKE_INSTALL_PREFIX={out}"]
    try:
        call("configuring failed", [cmake, "-S", str(HERE), "-B", str(build), *generator, *defines])
    except BuildError as error:
        raise BuildError(nvcc_refused(build) or str(error)) from None
    jobs = str(os.cpu_count() or 1)
    install = ["--build", str(build), "--parallel", jobs, "--target", "install"]
    call("compiling failed", [cmake, *install])
    return (build / "no_cuda.txt").read_text() or None


def build_library(build: Path, out: Path) -> dict[str, str | None]:
    """Build what can be built; {part: None, or why it is missing}, by part "native" and "cuda"."""
    if os.environ.get("MK_NATIVE") == "0":
        return {"native": "it was built with MK_NATIVE=0", "cuda": "it was built with MK_NATIVE=0"}
    options = shlex.split(os.environ.get("MK_CMAKE_ARGS", ""))
    strict = os.environ.get("MK_NATIVE") == "1"
    try:
        try:
            return {"native": None, "cuda": run_cmake(build, out, options)}
        except BuildError as error:
            if strict:
                raise
            # Whether CUDA was to blame shows in a build without it.
            if "-DMK_CUDA=OFF" in options or not (build / "CMakeCache.txt").exists():
                raise
            print(f"maestro_kernels: once more without CUDA kernels: {error}", file=sys.stderr)
            run_cmake(build, out, [*options, "-DMK_CUDA=OFF"])
            return {"native": None, "cuda": str(error)}
    except BuildError as error:
        if strict:
            raise SystemExit(f"maestro_kernels: no native library: {error}") from None
        return {"native": str(error), "cuda": str(error)}


class CMakeBuild(build_ext):
    """One library without a Python ABI tag: it holds no Python symbol."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path inside the package."""
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Build next to the Python files, and write down what is missing."""
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        out.mkdir(parents=True, exist_ok=True)
        # What an earlier build left must not stand in for one that fails.
        (out / LIBRARY).unlink(missing_ok=True)
        record = build_library(build, out)
        (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if record["native"] is not None:
            print(f"maestro_kernels: no native library: {record['native']}", file=sys.stderr)
        elif record["cuda"] is not None:
            print(f"maestro_kernels: no CUDA kernels: {record['cuda']}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """The same two files where the sources are (build_ext --inplace, editable installs)."""
        for ext in self.extensions:
            package = self.get_finalized_command("build_py").get_package_dir(ext.name.split(".")[0])
            (Path(package) / LIBRARY).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        for ext in self.extensions:
            package = self.get_finalized_command("build_py").get_package_dir(ext.name.split(".")[0])
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).with_name(RECORD)
            shutil.copyfile(built, Path(package) / RECORD)

    def get_outputs(self) -> list[str]:
        """What was really built: the library may be missing."""
        names = super().get_outputs()
        names += [str(Path(name).with_name(RECORD)) for name in names]
        return [name for name in names if Path(name).exists()]


class Wheel(bdist_wheel):
    """py3-none-<platform> for every Python 3, or py3-none-any where no library could be built."""

    def holds_library(self) -> bool:
        """Whether the build made one."""
        return Path(
            self.get_finalized_command("build").build_lib, "maestro_kernels", LIBRARY
        ).exists()

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return ("py3", "none", super().get_tag()[2] if self.holds_library() else "any")

    def write_wheelfile(self, *arguments: str, **options: str) -> None:
        """Say Root-Is-Purelib of what was built, not of what was tried."""
        self.root_is_pure = not self.holds_library()
        super().write_wheelfile(*arguments, **options)


# Optional: setuptools then takes a library that is not there for what it is.
setup(
    ext_modules=[Extension("maestro_kernels._native", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
