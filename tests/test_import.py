"""Importing the package does nothing but define names."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_triton_gpu_or_plotting():
    run(
        """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                heavy = ("triton", "transformers", "matplotlib", "scipy", "rich", "safetensors")
                if name.split(".")[0] in heavy:
                    raise ImportError(f"{name} is not for import time")

        import torch
        before = set(sys.modules)
        sys.meta_path.insert(0, Refuse())
        import maestro_kernels as mk
        assert not torch.cuda.is_initialized()
        assert not {m.split(".")[0] for m in set(sys.modules) - before} & {"triton", "transformers"}
        x, u, v = torch.randn(4, 8), torch.randn(6, 3), torch.randn(3, 8)
        y = mk.lod_linear(x, u, v, rank=2)
        torch.testing.assert_close(y, x @ v[:2].T @ u[:, :2].T)
        try:
            mk.lod_linear(x, u, v, backend="triton")
        except NotImplementedError as error:
            assert "triton" in str(error), error
        else:
            raise AssertionError("triton served without triton")
        """
    )


def test_search_and_training_come_when_they_are_asked_for():
    run(
        """
        import sys

        import torch
        import maestro_kernels as mk

        later = ("maestro_kernels.search", "maestro_kernels.training", "torch.utils.flop_counter")
        assert not set(later) & set(sys.modules)
        assert {"search", "training"} <= set(dir(mk))
        assert mk.search.allocate
        assert mk.training.Maestro
        assert not hasattr(mk, "serving")
        """
    )


@pytest.mark.parametrize("first", ["maestro_kernels", "torch.utils.flop_counter"])
def test_flop_are_counted_whichever_is_imported_first(first):
    run(
        f"""
        import torch
        import {first}
        import maestro_kernels as mk
        from torch.utils.flop_counter import FlopCounterMode

        x, u, v = torch.randn(4, 8), torch.randn(6, 3), torch.randn(3, 8)
        with FlopCounterMode(display=False) as counter:
            mk.lod_linear(x, u, v)
            mk.lod_linear_grouped(x, [u, u], [v, v])
        assert counter.get_total_flops() == 3 * 2 * 4 * 3 * (8 + 6), counter.get_total_flops()
        """
    )


def test_when_imported_calls_once_now_or_later(tmp_path):
    (tmp_path / "comes_later.py").write_text("value = 1\n")
    run(
        f"""
        import sys
        from maestro_kernels.imports import when_imported

        calls = []
        when_imported("sys", lambda: calls.append("now"))
        assert calls == ["now"]
        for k in range(2):
            when_imported("comes_later", lambda k=k: calls.append(k))
        try:
            import comes_later
        except ImportError:
            pass
        sys.path.append({str(tmp_path)!r})
        import comes_later
        assert comes_later.value == 1
        assert sorted(calls[1:]) == [0, 1]
        import importlib
        importlib.reload(comes_later)
        assert len(calls) == 3
        assert not [f for f in sys.meta_path if "imports" in type(f).__module__
                    and getattr(f, "name", "") == "comes_later"]
        """
    )


def test_a_process_of_a_test_imports_what_is_tested(tmp_path):
    import maestro_kernels as mk

    code = "import maestro_kernels; print(maestro_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == mk.__file__


def test_public_names_exist():
    import maestro_kernels as mk

    missing = [name for name in mk.__all__ if not hasattr(mk, name)]
    assert missing == []


def imports_of(tree, modules):
    """Modules of ours that a module imports when it runs, in functions too."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (named & modules) or {node.module}
        found |= imports_of(node, modules)
    return found & modules


@pytest.fixture(scope="module")
def imports():
    """Module of ours -> the others that it imports."""
    import maestro_kernels

    root = Path(maestro_kernels.__file__).parent
    files = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: imports_of(tree, set(files)) - {name} for name, tree in trees.items()}


def test_no_module_imports_itself_through_others(imports):
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names them


def test_no_folder_imports_one_that_is_built_on_it(imports):
    floors = ("measure", "ops", "nn", "search", "training", "benchmark", "cli")
    upwards = []
    for name, others in imports.items():
        for other in others:
            folders = [(*module.split("."), "")[1] for module in (name, other)]
            below, above = (floors.index(f) if f in floors else -1 for f in folders)
            if 0 <= below < above:
                upwards.append((name, other))
    assert upwards == []


@pytest.mark.parametrize("package", ["", ".nn", ".search", ".training", ".measure"])
def test_no_submodule_hides_behind_a_function_of_its_name(package):
    module = importlib.import_module(f"maestro_kernels{package}")
    submodules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    hidden = {n for n in submodules if not inspect.ismodule(getattr(module, n, module))}
    assert hidden == set()


def test_doctests():
    import doctest

    from maestro_kernels import functional

    result = doctest.testmod(functional)
    assert result.attempted > 0
    assert result.failed == 0
