"""What nvcc makes of csrc/cuda: registers, spills, shared memory, occupancy and tensor core code.

`python -m tools.cuda_report` compiles every kernel for every architecture from
the source tree and prints one line each; it needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tools import tables

__all__ = [
    "DEVICES",
    "Row",
    "count_instructions",
    "disassembler",
    "main",
    "parse_ptxas",
    "report",
    "resident",
    "table",
]

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
FILES = ("decode.cu", "rows.cu", "sm90/row_bf16.cu", "sm90/row_f16.cu")


@dataclass(frozen=True)
class Device:
    """A device record: what plans and occupancy depend on. Sizes in bytes, from CUDA's manual."""

    name: str
    cc: int
    sm_count: int
    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int


DEVICES = {
    "80": Device("A100", 80, 108, 163 << 10, 164 << 10, 2048),
    "86": Device("RTX 3090", 86, 82, 99 << 10, 100 << 10, 1536),
    "89": Device("RTX 4090", 89, 128, 99 << 10, 100 << 10, 1536),
    "90a": Device("H100", 90, 132, 227 << 10, 228 << 10, 2048),
    "100a": Device("B200", 100, 148, 227 << 10, 228 << 10, 2048),
    "120a": Device("RTX 5090", 120, 170, 99 << 10, 100 << 10, 1536),
}

# Prints "kernel threads shared_bytes" for each kernel on the device of its arguments; the shared
# memory of decode depends on the layer, for which 4096 x 4096 at rank 256 stands.
_SIZES = r"""
#include <cstdio>
#include <cstdlib>
#include "config.h"
#include "sm90/row_config.h"
using namespace mk;
using namespace mk::cuda;
int main(int, char** argv) {
  int facts[4];
  for (int i = 0; i < 4; ++i) facts[i] = std::atoi(argv[i + 1]);
  const Device device{facts[0], facts[1], facts[2], facts[3]};
  const auto print_rows = [](const char* op, int large, const RowsShape& shape) {
    std::printf("rows_kernel<%s,%d> %d %d\n", op, large, shape.threads(), shape.shared_bytes());
  };
  const struct { const char* op; DType dtype; Precision precision; } ops[] = {
      {"Bf16", DType::bf16, Precision::ieee}, {"F16", DType::f16, Precision::ieee},
      {"Tf32", DType::f32, Precision::tf32}, {"Ieee", DType::f32, Precision::ieee}};
  for (const auto& op : ops) {
    for (int64_t tiles : {1, 4}) {
      Layer l{};
      l.M = 16 * tiles, l.N = l.K = l.stride_xm = l.stride_vr = l.stride_ym = 4096;
      l.R = l.rank = l.stride_un = 256;
      const Plan p = plan(&l, 1, op.dtype, op.precision, device, Strategy::decode);
      const int shared = static_cast<int>(p.shared_bytes);
      std::printf("decode_kernel<%s,%d> %d %d\n", op.op, int(tiles), p.threads, shared);
    }
    print_rows(op.op, 0, kSmallRows);
    print_rows(op.op, 1, kLargeRows);
  }
  for (const char* op : {"bf16", "f16"})
    for (int width : {64, 128, 192, 256})
      for (int groups : {1, 2})
        std::printf("row_kernel<%s,%d,%d> %d %d\n", op, width, groups, 128 * (groups + 1),
                    sm90::make_tile(width, groups).smem_bytes);
}
"""


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    threads: int
    shared_bytes: int
    blocks_per_sm: int
    mma: int | None  # mma.sync in the machine code; None where there was no disassembler
    wgmma: int | None
    waits: int | None  # for the kernel in front, in the machine code
    early: int | None  # accesses to memory in front of the first of these

    @property
    def faults(self) -> list[str]:
        """What must not ship."""
        found = []
        if self.spill_bytes or self.stack_bytes:
            found.append(f"spills {self.spill_bytes} B, stack {self.stack_bytes} B")
        if not self.blocks_per_sm:
            found.append("no block fits on an SM")
        if self.kernel.startswith("row_kernel"):
            if self.wgmma == 0:
                found.append("no HGMMA")
        elif self.mma == 0 and "Ieee" not in self.kernel:
            found.append("no HMMA")
        if self.kernel.startswith("decode_kernel") and DEVICES[self.arch].cc >= 90:
            if self.waits == 0:
                found.append("no wait for the kernel in front")
            if self.early:
                found.append(f"{self.early} accesses before the wait for the kernel in front")
        return found


def _name(mangled: str) -> str | None:
    """decode_kernel<Bf16,1> for _ZN2mk4cuda13decode_kernelINS0_4Bf16ELi1EEEvNS0_6ParamsE."""
    two_phase = re.search(r"(decode|rows)_kernelINS0_\d+([A-Z]\w*?)EL[ib](\d)E", mangled)
    if two_phase:
        return "{}_kernel<{},{}>".format(*two_phase.groups())
    row = re.search(r"row_kernelILb([01])ELi(\d+)ELi(\d)E", mangled)
    if row:
        return f"row_kernel<{'bf16' if row[1] == '1' else 'f16'},{row[2]},{row[3]}>"
    return None


def parse_ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """{kernel: (registers, spill bytes, stack bytes)} of what `ptxas -v` prints.

    Raises:
        ValueError: the log holds no kernel of this package.
    """
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = {}
    for mangled, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        name = _name(mangled)
        if name is not None:
            found[name] = (int(registers), max(int(stores), int(loads)), int(stack))
    if not found:
        raise ValueError(f"parse_ptxas: log: expected a kernel of csrc/cuda, got {log[-500:]!r}")
    return found


def resident(device: Device, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that one SM holds.

    min over threads, registers (64 Ki, given to warps in pieces of 256) and shared memory (1 KiB of
    which is CUDA's own in each block).
    """
    if shared_bytes > device.shared_per_block:
        return 0
    warps = -(-threads // 32)
    by_registers = (1 << 16) // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = device.shared_per_sm // (shared_bytes + 1024)
    return min(device.threads_per_sm // threads, by_registers, by_shared)


def disassembler() -> str | None:
    """Path of cuobjdump: the toolkit's, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        candidate = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        found = str(candidate) if candidate.exists() else None
    return found


def count_instructions(sass: str) -> tuple[int, int, int, int]:
    """(HMMA, HGMMA, waits for the kernel in front, accesses to memory before the first of these).

    The wait is ACQBULK; a prefetch (CCTL) is no access.
    """
    first, *others = re.split(r"\bACQBULK\b", sass)
    early = re.findall(r"\b(?:LDG|STG|ATOMG|REDG?|LDGSTS|LD|ST|ATOM)\b", first)
    mma, wgmma = (len(re.findall(rf"\b{name}", sass)) for name in ("HMMA", "HGMMA"))
    return mma, wgmma, len(others), len(early)


def _instructions(cubin: Path) -> dict[str, tuple[int, int, int, int]]:
    """{kernel: count_instructions of it}, empty without a disassembler."""
    tool = disassembler()
    if tool is None:
        return {}
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    counts = {}
    for part in sass.stdout.split("Function : ")[1:]:
        name = _name(part.split(None, 1)[0])
        if name is not None:
            counts[name] = count_instructions(part)
    return counts


def _sizes(folder: Path, device: Device) -> dict[str, tuple[int, int]]:
    """{kernel: (threads, shared bytes)} as csrc/cuda plans them for the device."""
    program = folder / "sizes"
    if not program.exists():
        source = folder / "sizes.cpp"
        source.write_text(_SIZES)
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
        command = [compiler, "-std=c++17", f"-I{SOURCE}", str(source), str(SOURCE / "plan.cpp")]
        subprocess.run([*command, "-o", str(program)], check=True)
    arguments = [device.cc, device.sm_count, device.shared_per_block, device.shared_per_sm]
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=True
    )
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: (int(threads), int(shared)) for name, threads, shared in lines}


def _compile(nvcc: str, folder: Path, file: str, arch: str) -> tuple[str, Path]:
    """(what ptxas said, the cubin)."""
    cubin = folder / f"{file.replace('/', '_')}.{arch}.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "-cubin", "-o", str(cubin)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(SOURCE / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {file} for sm_{arch}: {done.stderr.strip()[-2000:]}")
    return done.stderr + done.stdout, cubin


def report(
    archs: Sequence[str] | None = None, files: Sequence[str] | None = None, jobs: int | None = None
) -> list[Row]:
    """Compile the kernels.

    Args:
        archs: keys of DEVICES; all that this nvcc knows by default.
        files: below csrc/cuda; FILES by default, those of sm90 for 90a only.
        jobs: compilers at a time, one per core by default.

    Raises:
        FileNotFoundError: there is no nvcc, or no source tree beside the package.
        RuntimeError: a file does not compile; with the compiler's words.
        ValueError: an architecture that is not in DEVICES.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise FileNotFoundError("report: nvcc was not found")
    if not SOURCE.exists():
        raise FileNotFoundError("report: expected csrc/cuda beside the package (a source checkout)")
    if archs is None:
        known = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout.split()
        archs = [arch for arch in DEVICES if f"sm_{arch.rstrip('a')}" in known]
    unknown = [arch for arch in archs if arch not in DEVICES]
    if unknown:
        raise ValueError(f"report: archs: expected some of {', '.join(DEVICES)}, got {unknown}")
    wanted = [
        (file, arch)
        for arch in archs
        for file in (FILES if files is None else files)
        if (SOURCE / file).exists() and (arch == "90a" or not file.startswith("sm90/"))
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
            built = list(pool.map(lambda job: _compile(nvcc, folder, *job), wanted))
        for (_, arch), (log, cubin) in zip(wanted, built, strict=True):
            rows += _rows(folder, log, cubin, arch)
    return rows


def _rows(folder: Path, log: str, cubin: Path, arch: str) -> list[Row]:
    sizes, counts = _sizes(folder, DEVICES[arch]), _instructions(cubin)
    rows = []
    for kernel, (registers, spill, stack) in sorted(parse_ptxas(log).items()):
        threads, shared = sizes[kernel]
        counted = counts.get(kernel, (None,) * 4)
        blocks = resident(DEVICES[arch], threads, registers, shared) if threads else 0
        rows.append(Row(kernel, arch, registers, spill, stack, threads, shared, blocks, *counted))
    return rows


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: r.kernel,
    "arch": lambda r: f"sm_{r.arch}",
    "regs": lambda r: str(r.registers),
    "spill B": lambda r: str(r.spill_bytes),
    "threads": lambda r: str(r.threads),
    "smem KiB": lambda r: f"{r.shared_bytes / 1024:.1f}",
    "blocks/SM": lambda r: str(r.blocks_per_sm),
    "mma.sync": lambda r: "?" if r.mma is None else str(r.mma),
    "wgmma": lambda r: "?" if r.wgmma is None else str(r.wgmma),
    "waits": lambda r: "?" if r.waits is None else str(r.waits),
    "verdict": lambda r: "; ".join(r.faults) or "ok",
}


def table(rows: Sequence[Row]) -> str:
    """Rows for people: one line each, faults in words at its end."""
    return tables.table(_COLUMNS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_report",
        description=__doc__.split("\n")[0] if __doc__ else None,
        epilog="example: python -m tools.cuda_report --arch 80 90a --json",
    )
    parser.add_argument("--arch", nargs="+", choices=DEVICES, help="default: all that nvcc knows")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one per core)")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    rows = report(options.arch, jobs=options.jobs)
    faulty = [row for row in rows if row.faults]
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
    else:
        print(table(rows))
        print(f"{len(rows)} kernels compiled, {len(faulty)} with a fault")
        if disassembler() is None:
            print("no cuobjdump: tensor core code was not looked for")
    return bool(faulty)


if __name__ == "__main__":
    sys.exit(main())
