"""Calls for the kernels of csrc/cuda: run by tests/support/host_cuda/runner.cpp, judged here."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from places import ROOT, SUPPORT
from torch import Tensor

from maestro_kernels.testing import accuracy_error, make_inputs

SOURCE = ROOT / "csrc" / "cuda"
HOST = SUPPORT / "host_cuda"
# The order of the enums in csrc/layer.h and csrc/cuda/launch.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
FUNCTIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
COMPILER = shutil.which("g++")


def compile_runner(folder: Path, sanitizer: str) -> subprocess.Popen[bytes]:
    """Start the compiler; the program is folder/sanitizer."""
    command = [COMPILER, "-std=c++17", "-O1", "-g1", "-DMK_HOST_DEVICE", "-Wall", "-Wextra"]
    command += ["-Wshadow", "-Werror", "-Wno-unknown-pragmas", "-fno-omit-frame-pointer"]
    command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{SOURCE}", f"-I{HOST}"]
    sources = [str(HOST / "runner.cpp"), str(SOURCE / "plan.cpp")]
    return subprocess.Popen([*command, *sources, "-o", str(folder / sanitizer)])


@dataclass(frozen=True)
class Layer:
    """One layer; `device_rank` is what the memory of the device holds, which nobody has checked."""

    M: int
    N: int
    K: int
    R: int
    rank: int
    device_rank: int | None = None
    bias: bool = True
    activation: str | None = None
    save_h: bool = False
    pad: int = 0  # elements between the rows of x, v and y
    pad_u: int = 0  # of u
    infinite: bool = (
        False  # x[0, 0]; then rank 1, so that the first row of y is infinite and not NaN
    )

    @property
    def active(self) -> int:
        """The rank that counts."""
        return self.rank if self.device_rank is None else min(max(self.device_rank, 0), self.R)

    @property
    def bound(self) -> int:
        """Columns of the H that the caller gets."""
        return self.rank if self.device_rank is None else self.R


@dataclass(frozen=True)
class Call:
    """A launch: layers and the device it is planned for."""

    layers: tuple[Layer, ...]
    dtype: torch.dtype = torch.bfloat16
    ieee: bool = False
    only: int = 0  # 1 decode, 2 rows
    sm_count: int = 3
    shared_per_block: int = 99 * 1024
    shared_per_sm: int = 100 * 1024
    streams: int = 1
    sum_by_all: int = -1  # who adds up the splits of H in decode: 0 the last, 1 all, -1 as planned
    shift: int = 0  # elements by which every tensor misses its alignment
    seed: int = field(default=0)


def _tf32(t: Tensor) -> Tensor:
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _padded(t: Tensor, pad: int) -> tuple[bytes, int]:
    """(rows with NaN between them and none behind the last, their stride)."""
    rows = torch.full((t.shape[0], t.shape[1] + pad), float("nan"), dtype=t.dtype)
    rows[:, : t.shape[1]] = t
    flat = rows.flatten()[: rows.numel() - pad] if rows.numel() else rows.flatten()
    return flat.view(torch.uint8).numpy().tobytes(), rows.shape[1]


def _inputs(call: Call, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    layer = call.layers[i]
    x, u, v, bias = make_inputs(
        layer.M,
        layer.N,
        layer.K,
        layer.R,
        dtype=call.dtype,
        bias=layer.bias,
        seed=call.seed + 7 * i,
    )
    if layer.infinite:
        x[0, 0] = float("inf")
    # What the factors hold beyond r never matters.
    v[layer.active :] = float("nan")
    u[:, layer.active :] = float("nan")
    return x, u, v, bias


def _pack_layer(call: Call, i: int) -> bytes:
    layer = call.layers[i]
    x, u, v, bias = _inputs(call, i)
    packed = [_padded(x, layer.pad), _padded(u, layer.pad_u), _padded(v, layer.pad)]
    (_, stride_x), (_, stride_u), (_, stride_v) = packed
    numbers = [layer.M, layer.N, layer.K, layer.R, layer.bound, stride_x, stride_u, stride_v]
    numbers += [layer.N + layer.pad, layer.bound + layer.pad, ACTIVATIONS.index(layer.activation)]
    numbers += [layer.device_rank or 0, layer.device_rank is not None, layer.save_h]
    numbers += [call.shift * x.element_size()]
    data = b"".join(struct.pack("<q", int(number)) for number in numbers)
    tail = b"" if bias is None else bias.view(torch.uint8).numpy().tobytes()
    for block in (*(block for block, _ in packed), tail):
        data += struct.pack("<q", len(block)) + block
    return data


def pack(calls: list[Call]) -> bytes:
    """What runner.cpp reads."""
    data = struct.pack("<q", len(calls))
    for call in calls:
        numbers = [DTYPES.index(call.dtype), call.ieee, call.only, call.sm_count]
        numbers += [call.shared_per_block, call.shared_per_sm, call.streams]
        numbers += [call.sum_by_all, len(call.layers)]
        data += b"".join(struct.pack("<q", int(number)) for number in numbers)
        data += b"".join(_pack_layer(call, i) for i in range(len(call.layers)))
    return data


class Outputs:
    """What runner.cpp wrote, read in order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, rows: int, columns: int, stride: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """(matrix, whether what lies between its rows is still poison)."""
        count = (rows - 1) * stride + columns if rows and columns else 0
        size = count * dtype.itemsize
        raw = bytearray(self.data[self.at : self.at + size])
        assert len(raw) == size, "the runner wrote too little"
        self.at += size
        if not count:
            return torch.zeros(rows, columns, dtype=dtype), True
        raw += b"\xff" * ((stride - columns) * dtype.itemsize)
        whole = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(rows, stride)
        rest = whole[:, columns:].contiguous().view(torch.uint8)
        return whole[:, :columns].clone(), bool((rest == 255).all())


def _judge_layer(call: Call, i: int, outputs: Outputs) -> str | None:
    layer, r = call.layers[i], call.layers[i].active
    x, u, v, bias = _inputs(call, i)
    y, y_untouched = outputs.take(layer.M, layer.N, layer.N + layer.pad, call.dtype)
    columns = layer.bound if layer.save_h else 0
    h, h_untouched = outputs.take(layer.M, columns, layer.bound + layer.pad, call.dtype)
    if not (y_untouched and h_untouched):
        return "wrote between the rows of y or H"
    v, u, act = v[:r], u[:, :r], FUNCTIONS[layer.activation]
    h64 = x.double() @ v.double().T
    z64 = h64 @ u.double().T + (0 if bias is None else bias.double())
    tf32 = _tf32 if call.dtype == torch.float32 and not call.ieee else lambda t: t
    torch_h = tf32(x) @ tf32(v).T
    torch_y = act(F.linear(tf32(torch_h), tf32(u), bias))
    y64 = act(z64)
    if layer.infinite:
        if not torch.equal(y[0].double(), y64[0]):
            return "what the tensor holds beyond the rank met an infinite x"
        y, torch_y, y64 = y[1:], torch_y[1:], y64[1:]
    problem = accuracy_error(y, torch_y, y64)
    if problem is None and layer.save_h:
        problem = accuracy_error(h[:, :r], torch_h, h64)
        if problem is None and bool((h[:, r:] != 0).any()):
            problem = "H is not zero beyond the rank"
    return problem


def judge(calls: list[Call], data: bytes) -> list[str]:
    """Everything that is wrong with the outputs."""
    outputs, problems = Outputs(data), []
    for call in calls:
        for i in range(len(call.layers)):
            problem = _judge_layer(call, i, outputs)
            if problem is not None:
                problems.append(f"{call}: layer {i}: {problem}")
    if outputs.at != len(data):
        problems.append("the runner wrote too much")
    return problems


def run(
    program: Path, calls: list[Call], folder: Path, *options: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """(the finished program, what is wrong with its outputs; [] too if it failed)."""
    (folder / "calls").write_bytes(pack(calls))
    done = subprocess.run(
        [str(program), str(folder / "calls"), str(folder / "outputs"), *options],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    problems = judge(calls, (folder / "outputs").read_bytes()) if done.returncode == 0 else []
    return done, problems
