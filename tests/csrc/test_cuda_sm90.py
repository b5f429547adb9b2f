"""The sm_90a row kernel: executed on a model of the machine, and compiled for it.

`host_sm90/row_test.cpp` runs the kernel's own source on the CPU, one fiber for each thread, with
random shapes and schedules; `docs/dev/cuda-sm90.md` says what that proves and what it cannot.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT

KERNEL = ROOT / "csrc" / "cuda" / "sm90"
HOST = ROOT / "tests" / "support" / "host_sm90"
COMPILER = shutil.which("g++") or shutil.which("c++")
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_host(root: Path, program: Path, *flags: str) -> Path:
    folder = root / "tests" / "support" / "host_sm90"
    source = str(folder / "row_test.cpp")
    options = ["-std=c++17", "-O1", f"-I{folder}", *flags]
    options += ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas"]
    command = [COMPILER, *options, source, "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def row_test(tmp_path_factory):
    return compile_host(ROOT, tmp_path_factory.mktemp("sm90") / "row_test")


@needs_compiler
def test_layouts_budgets_refusals_and_choices(row_test):
    done = run(row_test, "layout")
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_every_configuration_computes_y_under_every_schedule(row_test):
    done = run(row_test, "cases", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "104 cases, 0 failed\n"


@needs_compiler
def test_every_fault_of_the_machine_is_noticed(row_test):
    done = run(row_test, "faults")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
def test_the_documented_budgets_are_those_of_the_code(row_test):
    tables = run(row_test, "table").stdout.strip()
    assert tables.count("\n") > 20
    documented = (ROOT / "docs" / "dev" / "cuda-sm90.md").read_text()
    for table in tables.split("\n\n"):
        assert table in documented


# (file, what stands there once, what a defect makes of it); BAD is true in the mutant's own run.
MUTANTS = {
    "producer waits for the wrong parity": (
        "row_program.h",
        "ops.wait_empty(ring.slot, ring.parity ^ 1);\n      ops.expect(ring.slot, expand_bytes",
        "ops.wait_empty(ring.slot, ring.parity ^ !BAD);\n      ops.expect(ring.slot, expand_bytes",
    ),
    "ring of the consumer keeps its parity": (
        "row_program.h",
        "      parity ^= 1;",
        "      parity ^= !BAD;",
    ),
    "first product releases the tile it reads": (
        "row_program.h",
        "if (i_k > 0) ops.release(reading);",
        "if (i_k > 0) ops.release(BAD ? ring.slot : reading);",
    ),
    "last tile of x and v is never released": (
        "row_program.h",
        "  ops.template wait_products<0>();\n  ops.release(reading);",
        "  ops.template wait_products<0>();\n  if (!BAD) ops.release(reading);",
    ),
    "tile of u is released before its products end": (
        "row_program.h",
        "wait_products<1>();\n  ops.release(reading);\n  store_tile",
        "wait_products<1>();\n  ops.release(BAD ? ring.slot : reading);\n  store_tile",
    ),
    "staging is written while it is still sent": (
        "row_program.h",
        "  ops.wait_stores();\n  ops.sync_group();\n  write();",
        "  ops.wait_stores();\n  if (!BAD) ops.sync_group();\n  write();",
    ),
    "staging is sent before all have written it": (
        "row_program.h",
        "  ops.fence_async();\n  ops.sync_group();\n  send();",
        "  ops.fence_async();\n  if (!BAD) ops.sync_group();\n  send();",
    ),
    "u beyond a rank on the device is not cleared": (
        "row_program.h",
        "    ops.mask_u(ring.slot);",
        "    if (!BAD) ops.mask_u(ring.slot);",
    ),
    "u is used before all have cleared it": (
        "row_program.h",
        "    ops.sync_consumers();",
        "    if (!BAD) ops.sync_consumers();",
    ),
    "H is not cleared beyond the rank": (
        "row_kernel.cuh",
        "ptx::pack<BF16>(column < rank ?",
        "ptx::pack<BF16>(BAD || column < rank ?",
    ),
    "rank on the device is not clamped": (
        "row_kernel.cuh",
        "return rank < 0 ? 0 : rank < p.rank ? rank : p.rank;",
        "return BAD ? rank : rank < 0 ? 0 : rank < p.rank ? rank : p.rank;",
    ),
    "slots are released in the own block only": (
        "row_kernel.cuh",
        "if (lane < cluster) ptx::mbarrier_arrive_at",
        "if (lane < (BAD ? 1 : cluster)) ptx::mbarrier_arrive_at",
    ),
    "blocks fetch the same part of v": (
        "row_kernel.cuh",
        "rows = tile.width / cluster, first = block_rank * rows;",
        "rows = tile.width / cluster, first = BAD ? 0 : block_rank * rows;",
    ),
    "last tile comes from the wrong registers": (
        "row_program.h",
        "      ops.move_sums();",
        "      if (!BAD) ops.move_sums();",
    ),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """One program that has every defect, each switched on by its number."""
    root = tmp_path_factory.mktemp("mutants")
    for part in ("csrc/cuda/sm90", "tests/support/host_sm90"):
        shutil.copytree(ROOT / part, root / part)
    for header in ("csrc/layer.h", "csrc/cuda/launch.h"):
        shutil.copy(ROOT / header, root / header)
    for number, (file, good, bad) in enumerate(MUTANTS.values(), 1):
        path = root / "csrc" / "cuda" / "sm90" / file
        text = path.read_text()
        assert text.count(good) == 1, good
        path.write_text(text.replace(good, bad.replace("BAD", f"(sim::mutant == {number})")))
    return compile_host(root, root / "row_test", "-DMK_ONE_INSTANCE")


@needs_compiler
@pytest.mark.parametrize("number", range(len(MUTANTS) + 1), ids=["as it is", *MUTANTS])
def test_a_defect_in_the_kernel_is_noticed(mutants, number):
    done = run(mutants, "mutant", str(number))
    assert done.returncode == (number > 0), done.stderr


def disassemble(cubin: Path) -> str:
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(shipped) if shipped.exists() else None
    if found is None:
        pytest.skip("no nvdisasm: neither a toolkit nor Triton has one")
    command = [found, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ptxas says of each (width, groups), and its machine code."""
    if NVCC is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("cubin") / "row.cubin"
    options = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    options += ["-Xptxas=-v,-warn-spills,-Werror", "-Werror=all-warnings", "-o", str(cubin)]
    command = [NVCC, *options, str(KERNEL / "row_bf16.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr, disassemble(cubin)


KERNEL_NAME = r"row_kernelILb1ELi(\d+)ELi(\d)E"
EVERY_KERNEL = [(width, groups) for width in (64, 128, 192, 256) for groups in (1, 2)]


@pytest.mark.slow
def test_no_kernel_spills_or_waits_for_each_wgmma(compiled):
    log, _ = compiled
    # C7510 and its neighbours say that products in flight are serialized.
    assert "warning" not in log
    assert "C75" not in log
    found = re.findall(
        KERNEL_NAME
        + r".*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        re.S,
    )
    assert sorted((int(w), int(g)) for w, g, *_ in found) == EVERY_KERNEL
    for width, groups, stack, spills, registers in found:
        assert (stack, spills) == ("0", "0"), (width, groups)
        threads = 128 * (int(groups) + 1)
        assert int(registers) * threads <= 65536


@pytest.mark.slow
def test_both_products_and_all_transfers_are_hoppers_own(compiled):
    _, sass = compiled
    sections = re.split(r"^\.text\.\S*" + KERNEL_NAME + r"\S*:", sass, flags=re.M)
    kernels = {(int(w), int(g)): code for w, g, code in zip(*[iter(sections[1:])] * 3, strict=True)}
    assert sorted(kernels) == EVERY_KERNEL
    for (width, groups), code in kernels.items():
        # Both operands of the first product in shared memory, H of the second in registers.
        first = re.findall(rf"HGMMA\.64x{width}x16\.F32\.BF16 R\d+, gdesc", code)
        second = re.findall(r"HGMMA\.64x64x16\.F32\.BF16 R\d+, R\d+, gdesc", code)
        assert len(first) >= 4, (width, groups)
        assert len(second) >= width // 16, (width, groups)
        assert "UTMALDG.2D.MULTICAST" in code, (width, groups)
        assert "UTMASTG.2D" in code, (width, groups)
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", code), "no tile overlaps the next"
        assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
        moves_registers = groups == 2 or width <= 128
        assert ("USETMAXREG" in code) == moves_registers, (width, groups)
