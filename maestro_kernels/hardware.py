"""What a device can do and what software runs on it: records that plans, rooflines and rows share.

Nothing is asked of the machine at import, and no record holds a host name or a path.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import threading
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from maestro_kernels.measure import probes


@dataclass(frozen=True)
class Device:
    """One processor as the planner and the roofline see it; None where a figure is not known.

    Attributes:
        kind: "cpu" or "cuda".
        name: product name.
        arch: "sm_90", or a CPU's machine and widest instruction set.
        num_cores: streaming multiprocessors, or the threads torch uses.
        shared_memory: bytes of shared memory one block can use.
        l2_bytes: second-level cache; of all cores together on a CPU.
        l3_bytes: third-level cache.
        bandwidth: bytes/s from memory.
        cache_bandwidth: bytes/s from the last cache a layer's weights fit in.
        peak_flops: (dtype name, FLOP/s) pairs; a tuple so that the record can be a cache key.
        source: where bandwidth and peak_flops come from: "assumed", "measured" or "unknown".
    """

    kind: str
    name: str
    arch: str
    num_cores: int
    shared_memory: int | None = None
    l2_bytes: int | None = None
    l3_bytes: int | None = None
    bandwidth: float | None = None
    cache_bandwidth: float | None = None
    peak_flops: tuple[tuple[str, float], ...] = ()
    source: str = "unknown"

    def peak(self, dtype: torch.dtype | str) -> float | None:
        """FLOP/s for a dtype, or None when it is not known."""
        return dict(self.peak_flops).get(str(dtype).removeprefix("torch."))

    @property
    def last_level_cache(self) -> int:
        """Bytes of the largest cache; 0 when none is known."""
        return max(self.l2_bytes or 0, self.l3_bytes or 0)


# Sustained figures assumed for planning, not measured by us: 800 of 989 TFLOP/s and 3.0 of
# 3.35 TB/s; float32 stands for TF32. A device record made by measured_device replaces them.
H100 = Device(
    kind="cuda",
    name="NVIDIA H100 80GB HBM3",
    arch="sm_90",
    num_cores=132,
    shared_memory=227 * 1024,
    l2_bytes=50 * 1024**2,
    bandwidth=3.0e12,
    peak_flops=(("bfloat16", 800e12), ("float16", 800e12), ("float32", 400e12)),
    source="assumed",
)


def current_device(device: torch.device | str = "cpu") -> Device:
    """Describe a device without timing anything; CPU peaks stay unknown (see measured_device).

    Args:
        device: "cpu", "cuda" or "cuda:<index>".

    Raises:
        ValueError: neither a CPU nor a CUDA device, or a CUDA device that is not here.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"current_device: device: expected one that is here, got {device}")
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    raise ValueError(f"current_device: device: expected 'cpu' or 'cuda', got {str(device)!r}")


def measured_device(device: torch.device | str = "cpu", *dtypes: torch.dtype | str) -> Device:
    """current_device with bandwidths, and the peaks of the dtypes asked for, measured.

    The peak of a dtype is the best library matmul found, the bandwidths the best of reading a
    buffer and of copying one; both are ceilings as a torch user can reach them, not data-sheet
    figures. Each is measured once per process, device and thread count, by a probe of about a
    second or less; a dtype that is not asked for costs nothing.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        dtypes: torch.dtype or names such as "bfloat16".
    """
    names = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    with _probing:
        return _measure(*_key(device), tuple(names))


def known_device(device: torch.device | str, dtype: torch.dtype | str) -> Device:
    """What measured_device found earlier in this process, or else current_device; times nothing.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        dtype: whose peak is wanted.
    """
    if (*_key(device), str(dtype).removeprefix("torch.")) in _peaks:
        return measured_device(device, dtype)
    return current_device(device)


# Probes that run at the same time would measure each other.
_probing = threading.RLock()
_peaks: dict[tuple[str, int, int, str], float] = {}


def _key(device: torch.device | str) -> tuple[str, int, int]:
    """(kind, index, threads): what a measured figure belongs to; -1 where there is one device."""
    device = torch.device(device)
    index = -1
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return device.type, index, torch.get_num_threads()


def _place(kind: str, index: int) -> torch.device:
    return torch.device(kind, index) if index >= 0 else torch.device(kind)


@functools.cache
def _measure(kind: str, index: int, threads: int, dtypes: tuple[str, ...]) -> Device:
    device = _place(kind, index)
    record = current_device(device)
    bandwidth, cache_bandwidth = _bandwidths(kind, index, threads)
    for name in dtypes:
        key = (kind, index, threads, name)
        if key not in _peaks:
            _peaks[key] = probes.flops(getattr(torch, name), device)
    return replace(
        record,
        bandwidth=bandwidth,
        cache_bandwidth=cache_bandwidth,
        peak_flops=tuple((name, _peaks[kind, index, threads, name]) for name in dtypes),
        source="measured",
    )


@functools.cache
def _bandwidths(kind: str, index: int, threads: int) -> tuple[float, float]:
    """Bytes/s from memory, and from the last cache that a layer's weights fit in."""
    device = _place(kind, index)
    record = current_device(device)
    memory = min(max(2 * record.last_level_cache, 256 << 20), 1 << 30, probes.free_bytes(kind) // 8)
    cache = min(max((record.l2_bytes or 8 << 20) // 2, 2 << 20), 32 << 20)
    return probes.bandwidth(memory, device), probes.bandwidth(cache, device)


@functools.cache
def _cpu(threads: int) -> Device:
    l2, l3 = _cpu_caches()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return Device(
        kind="cpu",
        name=_cpu_name(),
        arch=f"{platform.machine()} {capability}",
        num_cores=threads,
        l2_bytes=l2,
        l3_bytes=l3,
    )


@functools.cache
def _cuda(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    arch = f"sm_{facts.major}{facts.minor}"
    # The class of the card is known by name; its size is asked of the card itself, because the
    # PCIe and NVL editions and MIG slices differ from the recorded one.
    known = H100 if "H100" in facts.name and arch == H100.arch else None
    same = known is not None and facts.multi_processor_count == known.num_cores
    return Device(
        kind="cuda",
        name=facts.name,
        arch=arch,
        num_cores=facts.multi_processor_count,
        shared_memory=getattr(facts, "shared_memory_per_block_optin", None),
        l2_bytes=getattr(facts, "L2_cache_size", None),
        bandwidth=known.bandwidth if known and same else None,
        peak_flops=known.peak_flops if known and same else (),
        source="assumed" if same else "unknown",
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_caches() -> tuple[int | None, int | None]:
    """(L2, L3) bytes of all cores this process may use, each shared cache counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    sizes: dict[tuple[str, str], int] = {}
    for core in os.sched_getaffinity(0):
        for cache in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            size = (cache / "size").read_text().strip()
            if not size[:-1].isdigit():
                continue
            level = (cache / "level").read_text().strip()
            shared = (cache / "shared_cpu_list").read_text().strip()
            sizes[level, shared] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    totals = {
        level: sum(size for key, size in sizes.items() if key[0] == level) for level in ("2", "3")
    }
    return totals["2"] or None, totals["3"] or None


@functools.cache
def versions() -> dict[str, str | bool | None]:
    """Software behind a measurement: package, commit, dirty flag, Python, torch, Triton, driver.

    commit and dirty are None when the package does not run from a git work tree; where a copy of
    one runs, MAESTRO_KERNELS_COMMIT says which, as `git describe --always --abbrev=40 --dirty`.
    """
    commit, dirty = _git_state()
    return {
        **libraries(),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "driver": _driver(),
    }


def libraries() -> dict[str, str | None]:
    """The versions that decide how fast a call is; asks no other process."""
    return {
        "maestro_kernels": _version("maestro-kernels") or "not installed",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    told = os.environ.get("MAESTRO_KERNELS_COMMIT", "")
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if status is None else bool(status)


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    return _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv")


def _output(*command: str) -> str | None:
    """Standard output of a command, or None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def is_here(device: torch.device) -> bool:
    """Whether a device can be measured: meta and fake tensors have none."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
