"""Compile every shipped kernel configuration for sm_80, sm_90, sm_100; judge it. Without a GPU.

    python -m tools.triton_report            # a table; exit status 1 on a fault
    python -m tools.triton_report --json     # the same rows for a program
    python -m tools.triton_report --only "row.*sm_90 bf16"

Protocol: every module named in MODULES exports

    SHIPPED: dict[str, Sequence[Config]]    # "sm_80", "sm_90": configurations a launch may use
    aot_spec(config, dtype, arch) -> Iterable[dict]    # dtype is "bf16", "fp16" or "fp32"

`aot_spec` yields the fields of an AotSpec (below) as a dict, one for every variant of the kernel
that the launcher would compile for the configuration and that differs in code (pointers or
descriptors, tensor rank, IEEE or TF32, ...), and nothing where the configuration does not serve the
dtype or architecture.
Every configuration is compiled in bf16 and fp32; the first of each module and architecture also in
fp16, which differs from bf16 only in the names of its instructions.

`signature` maps every argument of the kernel: "i32", "*bf16" are run-time arguments; "*bf16:16" and
"i32:16" the same, divisible by 16, as Triton specialises them at a launch;
"tensordesc<bf16[128,64]>" is a host descriptor; a tuple holds such entries for a tuple argument;
whatever else is not a string, and everything for a parameter annotated so, is a constexpr.

The table also has what tools/forecast.py predicts at the suite's cases for a recorded H100.

Kernels come out of Triton's cache (TRITON_CACHE_DIR) when they are there, ptxas's log beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 announces another default

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from maestro_kernels.backends.triton import interpreter
from maestro_kernels.backends.triton.launch import table_arch
from tools import tables
from tools.forecast import NEEDED, Forecast, forecast
from tools.ptx import count_instructions, early_accesses, unguarded_releases

__all__ = [
    "ARCHITECTURES",
    "MODULES",
    "SHARED_MEMORY_LIMIT",
    "AotSpec",
    "Row",
    "main",
    "names",
    "report",
]

MODULES = ("two_phase", "row", "expand", "wgrad", "activation_grad")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Bytes of shared memory a block may use. triton.compile does not check it: only a launch fails.
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}


@dataclass(frozen=True)
class AotSpec:
    """One kernel variant to compile."""

    kernel: Any  # the @triton.jit function
    label: str  # what tells the variant from others, e.g. "64x128x64 r128 tma"
    signature: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages
    dot_rows: int = 0  # rows of the smallest product's accumulator tile; 0: the kernel has none
    h_in_registers: bool = False  # H must be a register operand of the second product
    resident: int = 1  # programs that the plan counts on for each multiprocessor
    config: Any = None  # the configuration that it is a variant of


@dataclass(frozen=True)
class Row:
    """What was compiled, what came out, and what is wrong with it."""

    kernel: str
    arch: str
    dtype: str
    label: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma_reg: int  # wgmma whose A operand lies in registers / in shared memory
    wgmma_smem: int
    mma_sync: int
    cp_async: int
    tma_load: int
    tma_store: int
    releases: int
    unguarded: tuple[str, ...]
    early: tuple[str, ...]  # accesses before an overlapping launch has waited for its predecessor
    prefetches: int
    warnings: tuple[str, ...]
    dot_rows: int
    h_in_registers: bool
    resident: int

    @property
    def fitting(self) -> int:
        """Programs that registers and shared memory of a multiprocessor hold."""
        registers = 65536 // (self.warps * -(-self.registers * 32 // 256) * 256)
        # A block's own 1 KiB of shared memory comes on top of what it asks for.
        return min(registers, SHARED_MEMORY_LIMIT[self.arch] // (self.shared_bytes + 1024))

    @property
    def name(self) -> str:
        """Identifies the row, as `names` does."""
        return f"{self.kernel} {self.arch} {self.dtype} {self.label}"

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the configuration must not ship; empty when it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} B")
        if self.shared_bytes > SHARED_MEMORY_LIMIT[self.arch]:
            found.append(f"shared memory over {SHARED_MEMORY_LIMIT[self.arch]} B")
        if self.wants_wgmma and not self.wgmma_reg + self.wgmma_smem:
            found.append("no wgmma")
        if self.h_in_registers and self.wants_wgmma and not self.wgmma_reg:
            found.append("H not in registers")
        if 0 < self.fitting < self.resident:
            found.append(f"{self.fitting} programs fit where the plan counts on {self.resident}")
        found += [f"before the wait for the kernel in front: {where}" for where in self.early]
        found += [f"release without a barrier: {where}" for where in self.unguarded]
        return tuple(found)

    @property
    def wants_wgmma(self) -> bool:
        """16-bit products of 64 rows or more run on the warpgroup unit of sm_90."""
        return self.arch == "sm_90" and self.dtype != "fp32" and self.dot_rows >= 64


@functools.cache
def _cases() -> tuple[tuple[str, str, AotSpec], ...]:
    """(architecture, dtype, variant) of everything that ships, in one fixed order."""
    return tuple(
        (arch, dtype, spec)
        for name in MODULES
        for architecture in ARCHITECTURES
        for arch, dtype, spec in _module_cases(name, architecture)
    )


def _module_cases(name: str, arch: str) -> Iterator[tuple[str, str, AotSpec]]:
    module = importlib.import_module(f"maestro_kernels.backends.triton.{name}")
    for i, config in enumerate(module.SHIPPED[table_arch(arch)]):
        for dtype in ("bf16", "fp32", "fp16") if i == 0 else ("bf16", "fp32"):
            for spec in module.aot_spec(config, dtype, arch):
                yield arch, dtype, AotSpec(**spec, config=config)


def names() -> list[str]:
    """Row.name of everything that ships; compiles nothing, and works beside the interpreter."""
    return list(_by_name())


@functools.cache
def _by_name() -> dict[str, AotSpec]:
    return {
        f"{spec.kernel.fn.__name__} {arch} {dtype} {spec.label}": spec
        for arch, dtype, spec in _cases()
    }


def _source(spec: AotSpec) -> ASTSource:
    differing = set(spec.signature) ^ set(spec.kernel.arg_names)
    if differing:
        raise ValueError(
            f"{spec.kernel.fn.__name__}: signature disagrees about {sorted(differing)}"
        )
    types, constants, attributes = {}, {}, {}

    def declare(value: object, path: tuple[int, ...]) -> object:
        if isinstance(value, tuple):
            return tuple(declare(entry, (*path, i)) for i, entry in enumerate(value))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        kind, _, divisor = value.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return kind

    for i, parameter in enumerate(spec.kernel.params):
        value = spec.signature[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            types[parameter.name] = declare(value, (i,))
    return ASTSource(spec.kernel, types, constants, attributes)


def _compile(spec: AotSpec, arch: str) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of it."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(_source(spec), target=target, options=spec.options)
    cache = get_cache_manager(kernel.hash)
    stored = cache.get_file("ptxas.log")
    if "registers" in log.getvalue():
        cache.put(log.getvalue(), "ptxas.log", binary=False)
    elif stored is not None:
        with open(stored) as file:
            return kernel, file.read()
    else:  # cached by someone who did not keep the log
        with contextlib.redirect_stdout(log), triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            kernel = triton.compile(_source(spec), target=target, options=spec.options)
        cache.put(log.getvalue(), "ptxas.log", binary=False)
    return kernel, log.getvalue()


def _row(index: int) -> Row:
    arch, dtype, spec = _cases()[index]
    triton.knobs.nvidia.dump_ptxas_log = True
    kernel, log = _compile(spec, arch)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"{spec.kernel.fn.__name__} {spec.label}: no register count from ptxas")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    ptx = kernel.asm["ptx"]
    return Row(
        kernel=spec.kernel.fn.__name__,
        arch=arch,
        dtype=dtype,
        label=spec.label,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(registers.group(1)),
        spill_bytes=max(map(int, spills), default=0),
        shared_bytes=kernel.metadata.shared,
        unguarded=tuple(unguarded_releases(ptx)),
        early=tuple(early_accesses(ptx)) if spec.options.get("launch_pdl") else (),
        prefetches=ptx.count("prefetch.global.L2"),
        warnings=tuple(sorted(set(re.findall(r"\bC\d{4}\b", log)))),
        dot_rows=spec.dot_rows,
        h_in_registers=spec.h_in_registers,
        resident=spec.resident,
        **count_instructions(ptx),
    )


def report(jobs: int | None = None, only: str = "") -> list[Row]:
    """Compile what ships in `jobs` processes (default: one per core).

    Args:
        jobs: processes; 1 compiles in this one.
        only: regular expression; rows in whose name it is not found are left out.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
        ValueError: `only` leaves nothing.
    """
    if interpreter.active():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, nothing to compile")
    chosen = [i for i, name in enumerate(names()) if re.search(only, name)]
    if not chosen:
        raise ValueError(f"report: only: expected a match in the names of rows, got {only!r}")
    jobs = jobs or len(os.sched_getaffinity(0))
    if jobs == 1:
        return [_row(i) for i in chosen]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, chosen))


@functools.lru_cache(4096)
def _forecast(row: Row) -> Forecast | None:
    spec = _by_name().get(row.name)
    if spec is None or spec.config is None:
        return None
    form = row.label.removeprefix(str(spec.config))
    return forecast(row.kernel, row.arch, row.dtype, spec.config, form, row.fitting)


def _of_forecast(show: Callable[[Forecast], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = _forecast(row)
        return "-" if found is None else show(found)

    return cell


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: r.kernel,
    "arch": lambda r: r.arch,
    "dtype": lambda r: r.dtype,
    "configuration": lambda r: r.label,
    "warps": lambda r: str(r.warps),
    "stages": lambda r: str(r.stages),
    "regs": lambda r: str(r.registers),
    "spill B": lambda r: str(r.spill_bytes),
    "smem KiB": lambda r: f"{r.shared_bytes / 1024:.0f}",
    "wgmma A reg/smem": lambda r: f"{r.wgmma_reg}/{r.wgmma_smem}",
    "mma.sync": lambda r: str(r.mma_sync),
    "cp.async": lambda r: str(r.cp_async),
    "TMA ld/st": lambda r: f"{r.tma_load}/{r.tma_store}",
    "releases": lambda r: str(r.releases),
    "prefetch": lambda r: str(r.prefetches),
    "per SM": lambda r: str(r.fitting),
    "warps/SM": lambda r: f"{r.fitting * r.warps}/64",
    f"in flight KiB/SM (memory wants {NEEDED / 1024:.0f})": _of_forecast(
        lambda f: " + ".join(f"{b / 1024:.0f}" for b in f.in_flight)
    ),
    "suite": _of_forecast(lambda f: f"{f.taken}, {f.losing} lose" if f.taken else "never"),
    "best case": _of_forecast(lambda f: f.case),
    "predicted us": _of_forecast(lambda f: f"{1e6 * f.seconds:.1f}"),
    "roofline us": _of_forecast(lambda f: f"{1e6 * f.roofline:.1f}"),
    "calls us": _of_forecast(lambda f: f"{1e6 * f.calls:.1f}"),
    "ratio": _of_forecast(lambda f: f"{f.seconds / f.calls:.2f}"),
    "ptxas": lambda r: ",".join(r.warnings) or "-",
    "verdict": lambda r: "; ".join(r.faults) or "ok",
}


def table(rows: Sequence[Row]) -> str:
    """Rows for people: one line each, faults in words at its end."""
    return tables.table(_COLUMNS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a shipped configuration has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="rows, the table and versions as JSON")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("--only", default="", help='regular expression, e.g. "sm_90 bf16.*tma"')
    options = parser.parse_args(arguments)
    rows = report(options.jobs, options.only)
    faulty = [row for row in rows if row.faults]
    if options.json:
        json.dump(
            {
                "triton": triton.__version__,
                "rows": [asdict(row) for row in rows],
                "table": table(rows),
            },
            sys.stdout,
        )
        return 0
    print(f"Triton {triton.__version__}")
    print(table(rows))
    print(f"{len(rows)} configurations compiled, {len(faulty)} with a fault")
    return bool(faulty)


if __name__ == "__main__":
    sys.exit(main())
