"""The built wheels are whole: they install into an empty environment and run there."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from places import ROOT

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs cmake and a C++ compiler",
)


FOLDERS = (".ci", "bench", "csrc", "docs", "examples", "maestro_kernels", "tests")
TOP = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py")
TOP += ("requirements-dev.txt", "*.md", ".clang-format", ".gitignore")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "_build.json")


def copy_sources(source):
    """The checkout without what was built in it, for a build that must leave nothing in it."""
    for pattern in TOP:
        for path in ROOT.glob(pattern):
            shutil.copy(path, source / path.name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=IGNORED)
    return source


def call(*command, **environment):
    """The finished process, whose exit status the caller looks at."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "MK_NATIVE": "", **environment},
    )


def pip_wheel(source, out, *options, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", *options]
    done = call(*command, "--disable-pip-version-check", "-w", out, source, **environment)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def build_wheel(tmp_path_factory, **environment):
    source = copy_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    return pip_wheel(source, out, "--no-build-isolation", **environment)


def record_of(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("maestro_kernels/_build.json"))


def install(wheel, folder):
    """Python of a new environment that has the wheel, and sees the libraries of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "-q", str(wheel)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # Folders named in a .pth file come last and bring no .pth files of their own.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).resolve().parents[1]))
    return python


def run(python, *arguments, cwd):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    done = subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = (
    "import torch, maestro_kernels as mk; print(mk.__file__);"
    "print(mk.lod_linear(torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8)).sum().item())"
)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory, MK_NATIVE="0")


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory):
    # nvcc takes minutes and is tested with the kernels.
    return build_wheel(tmp_path_factory, MK_NATIVE="1", MK_CMAKE_ARGS="-DMK_CUDA=OFF")


def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel):
    assert pure_wheel.name.endswith("py3-none-any.whl")
    (metadata,) = (n for n in zipfile.ZipFile(pure_wheel).namelist() if n.endswith("/WHEEL"))
    assert b"Root-Is-Purelib: true" in zipfile.ZipFile(pure_wheel).read(metadata)


def test_wheel_holds_every_module_and_data_file(pure_wheel):
    packed = set(zipfile.ZipFile(pure_wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.json", "py.typed")
        for path in (ROOT / "maestro_kernels").rglob(pattern)
        if "__pycache__" not in path.parts
    }
    assert "maestro_kernels/py.typed" in packed
    assert wanted - {"maestro_kernels/_build.json"} - packed == set()


def test_package_data_names_only_what_exists():
    text = (ROOT / "pyproject.toml").read_text()
    (patterns,) = re.findall(r"^maestro_kernels = \[(.*)\]$", text, re.M)
    for pattern in re.findall(r'"([^"]+)"', patterns):
        assert list((ROOT / "maestro_kernels").glob(pattern)), pattern


def test_installed_pure_wheel_runs_and_says_what_is_missing(pure_wheel, tmp_path):
    python = install(pure_wheel, tmp_path / "env")
    where, total = run(python, "-c", CALL, cwd=tmp_path).split()
    assert where.startswith(str(tmp_path))
    assert float(total) == 2 * 6 * 4 * 8
    info = json.loads(run(python, "-m", "maestro_kernels", "info", "--json", cwd=tmp_path))
    backends = info["devices"][0]["backends"]
    assert backends["matmul"] is None
    assert backends["reference"] is None
    assert "no compiled library: it was built with MK_NATIVE=0" in backends["native"]
    assert "CUDA" in backends["triton"] or "not installed" in backends["triton"]


@needs_compiler
def test_native_wheel_serves_every_python_3_of_this_platform(native_wheel):
    stem = native_wheel.name.removesuffix(".whl")
    assert "-py3-none-" in stem
    assert not stem.endswith("-any")
    names = zipfile.ZipFile(native_wheel).namelist()
    assert "maestro_kernels/_native.so" in names
    assert not any(name.startswith("csrc") for name in names)


@needs_compiler
def test_installed_native_wheel_runs_on_its_own_library(native_wheel, tmp_path):
    python = install(native_wheel, tmp_path / "env")
    where, total = run(python, "-c", CALL, cwd=tmp_path).split()
    assert where.startswith(str(tmp_path))
    assert float(total) == 2 * 6 * 4 * 8
    info = json.loads(run(python, "-m", "maestro_kernels", "info", "--json", cwd=tmp_path))
    assert info["devices"][0]["backends"]["native"] is None
    assert set(info["native_isa"]) == {"float32", "bfloat16", "float16"}


@needs_compiler
def test_the_library_needs_no_python_and_no_cuda(native_wheel, tmp_path):
    zipfile.ZipFile(native_wheel).extract("maestro_kernels/_native.so", tmp_path)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(tmp_path / "maestro_kernels/_native.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    strong = [line.split()[-1] for line in symbols if " U " in line]
    assert not [name for name in strong if name.startswith(("Py", "_Py", "cuda", "cu"))]
    # The C++ part of libtorch is not stable from one version to the next.
    assert not [name for name in strong if "2at" in name or "c10" in name]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    source = copy_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        archive.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def test_the_source_distribution_is_the_checkout(source_distribution, tmp_path):
    def files(folder):
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    shipped = {name for name in files(source_distribution) if ".egg-info" not in name}
    assert {"tests/conftest.py", "tests/support/native_sweep.py", "Makefile"} < shipped
    assert files(copy_sources(tmp_path)) == shipped - {"PKG-INFO", "setup.cfg"}


@needs_compiler
def test_the_source_distribution_builds_the_same_wheel_in_another_folder(
    native_wheel, source_distribution, tmp_path
):
    # Two folders, one library: nothing in it tells where it was built.
    again = pip_wheel(
        source_distribution,
        tmp_path,
        "--no-build-isolation",
        MK_NATIVE="1",
        MK_CMAKE_ARGS="-DMK_CUDA=OFF",
    )
    assert again.name == native_wheel.name
    one, other = (zipfile.ZipFile(path) for path in (native_wheel, again))
    assert set(one.namelist()) == set(other.namelist())
    different = [name for name in one.namelist() if one.read(name) != other.read(name)]
    assert different == []
    library = one.read("maestro_kernels/_native.so")
    for folder in (ROOT, Path(torch.__file__).resolve().parent, Path(tempfile.gettempdir())):
        assert f"{folder}/".encode() not in library
    assert b"csrc/bindings" in library  # so names of files are there, and the check sees them


# What goes wrong while building must leave the package whole, with the true reason in it.


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("source"))


def build_parts(sources, out, **environment):
    """(finished process, the record) of the build command alone: seconds where nothing compiles."""
    command = [sys.executable, sources / "setup.py", "build_ext", "--build-lib", out / "lib"]
    done = subprocess.run(
        [str(part) for part in [*command, "--build-temp", out / "temp"]],
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "MK_NATIVE": "", "MK_CMAKE_ARGS": "", **environment},
    )
    path = out / "lib" / "maestro_kernels" / "_build.json"
    return done, json.loads(path.read_text()) if path.exists() else None


OLD_CMAKE = 'echo "cmake version 3.18.4"'


def failures(folder):
    """What is wrong -> (environment, words of the reason)."""
    bare = script(folder / "bare" / "cmake", OLD_CMAKE)
    compiler = script(folder / "cc" / "c++", 'echo "cc1plus: error: no memory left" >&2; exit 1')
    return {
        "an old cmake": (
            {"PATH": str(bare)},
            "cmake 3.24 or later is needed, found 3.18.4",
        ),
        "no cmake": (
            {"PATH": str(folder)},
            "cmake 3.24 or later is needed, none was found",
        ),
        "a compiler that fails": (
            {"CXX": str(compiler / "c++")},
            "configuring failed: cc1plus: error: no memory left",
        ),
        "no compiler": (
            {"CXX": "/no/such/c++"},
            "configuring failed: .*/no/such/c\\+\\+",
        ),
    }


@needs_compiler
@pytest.mark.parametrize(
    "what", ["an old cmake", "no cmake", "a compiler that fails", "no compiler"]
)
def test_a_build_that_fails_leaves_the_package_and_the_reason(what, sources, tmp_path):
    environment, reason = failures(tmp_path)[what]
    done, record = build_parts(sources, tmp_path / "out", **environment)
    assert done.returncode == 0, done.stderr
    assert re.search(reason, record["native"])
    assert "\n" not in record["native"]
    assert record["native"] in done.stderr
    assert not (tmp_path / "out" / "lib" / "maestro_kernels" / "_native.so").exists()
    strict, _ = build_parts(sources, tmp_path / "strict", MK_NATIVE="1", **environment)
    assert strict.returncode != 0
    assert re.search(reason, strict.stderr)
    assert "Traceback" not in strict.stderr


def test_without_torch_the_reason_says_so(sources, tmp_path):
    # No packages at all but those that build: what `python -m build` gives.
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    # Only setuptools is seen, by a link to it alone.
    seen = tmp_path / "seen"
    seen.mkdir()
    home = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (home / name).exists():
            (seen / name).symlink_to(home / name)
    command = [environment / "bin" / "python", sources / "setup.py", "build_ext"]
    command += ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MK_NATIVE": "", "PYTHONPATH": str(seen)},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "lib" / "maestro_kernels" / "_build.json").read_text())
    if shutil.which("cmake"):
        assert record["native"].startswith("torch is not installed for the Python that built it")


@needs_compiler
def test_a_failed_build_makes_a_pure_wheel_though_an_older_library_lies_there(tmp_path_factory):
    source = copy_sources(tmp_path_factory.mktemp("source"))
    # What an earlier build left where this one puts its files.
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = source / "build" / platform / "maestro_kernels" / "_native.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    wheel = pip_wheel(
        source, tmp_path_factory.mktemp("wheel"), "--no-build-isolation", CXX="/no/such/c++"
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "maestro_kernels/_native.so" not in zipfile.ZipFile(wheel).namelist()
    assert "/no/such/c++" in record_of(wheel)["native"]


def loaded(library):
    """(load_error, cuda_error) of a library, in a process of its own."""
    code = (
        "import sys, pathlib; from maestro_kernels.backends import native;"
        "native.LIBRARY = pathlib.Path(sys.argv[1]);"
        "import json; print(json.dumps([native.load_error(), native.cuda_error()]))"
    )
    done = call(sys.executable, "-c", code, library)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_compiler
def test_an_nvcc_that_fails_costs_only_the_cuda_kernels(sources, tmp_path):
    says = "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_35'\" >&2; exit 1"
    nvcc = script(tmp_path / "bin" / "nvcc", says) / "nvcc"
    quick = "-DCMAKE_BUILD_TYPE=None"  # not optimised: it only has to load
    done, record = build_parts(
        sources, tmp_path, CUDACXX=str(nvcc), MK_CMAKE_ARGS=f"{quick} -DMK_CUDA_GENCODE=35"
    )
    assert done.returncode == 0, done.stderr
    reason = "configuring failed: nvcc fatal   : Unsupported gpu architecture 'compute_35'"
    assert record == {"native": None, "cuda": reason}
    library = tmp_path / "lib" / "maestro_kernels" / "_native.so"
    assert loaded(library) == [None, reason]
    strict, _ = build_parts(
        sources, tmp_path / "strict", CUDACXX=str(nvcc), MK_CMAKE_ARGS=quick, MK_NATIVE="1"
    )
    assert strict.returncode != 0
    assert reason in strict.stderr


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_an_architecture_that_nvcc_does_not_know_costs_only_the_cuda_kernels(sources, tmp_path):
    done, record = build_parts(
        sources, tmp_path, MK_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=None -DMK_CUDA_GENCODE=35"
    )
    assert done.returncode == 0, done.stderr
    assert record["native"] is None
    assert "compute_35" in record["cuda"]
    library = tmp_path / "lib" / "maestro_kernels" / "_native.so"
    assert loaded(library) == [None, record["cuda"]]


@needs_compiler
@pytest.mark.exhaustive
def test_an_isolated_build_uses_the_torch_that_is_installed_or_says_that_none_is(sources, tmp_path):
    wheel = pip_wheel(sources, tmp_path, MK_CMAKE_ARGS="-DMK_CUDA=OFF -DCMAKE_BUILD_TYPE=None")
    assert record_of(wheel)["native"] is None
    assert not wheel.name.endswith("-any.whl")
