"""Importing the package does nothing but define names."""

import subprocess
import sys
import textwrap


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


def test_doctests():
    import doctest

    from maestro_kernels import functional

    result = doctest.testmod(functional)
    assert result.attempted > 0
    assert result.failed == 0
