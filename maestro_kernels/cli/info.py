"""`maestro-kernels info`: which backends run here, and why the others do not."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from maestro_kernels import dispatch, hardware
from maestro_kernels.backends import FAMILIES, native
from maestro_kernels.measure.wording import count
from maestro_kernels.problem import LoDProblem


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "info",
        help="which backends are available here, and why the others are not",
        description="Say what this machine is and which backends can serve a call on it.",
        epilog="example: maestro-kernels info --json",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def collect() -> dict[str, Any]:
    """Devices, versions, and backend -> None (available) or the reason it is not, per device."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    records = []
    for device in devices:
        record = hardware.current_device(device)
        probe = LoDProblem(64, 512, 512, 64, 64, torch.float32, device, x_stride=(512, 1))
        records.append(
            {
                "device": str(device),
                "name": record.name,
                "arch": record.arch,
                "cores": record.num_cores,
                "backends": {name: dispatch.unsupported(name, probe) for name in FAMILIES},
                "auto": str(dispatch.select(probe).backend),
                "auto_reason": dispatch.select(probe).reason,
            }
        )
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if native.load_error() is None else ()
    isa = {str(dtype).removeprefix("torch."): native.isa(dtype) for dtype in dtypes}
    library = {
        "error": native.load_error(),
        "instruction_sets": native.available_isas(),
        "cuda_error": native.cuda_error(),
    }
    return {
        "versions": hardware.versions(),
        "native_isa": isa,
        "library": library,
        "devices": records,
    }


def run(args: argparse.Namespace) -> int:
    """Print the record."""
    record = collect()
    if args.json:
        print(json.dumps(record, indent=2))
        return 0
    versions = record["versions"]
    known = ("maestro_kernels", "torch", "triton", "python", "cuda", "driver")
    print("  ".join(f"{name} {versions[name]}" for name in known if versions.get(name)))
    library = record["library"]
    if library["error"] is None:
        why = library["cuda_error"]
        sets = ", ".join(library["instruction_sets"])
        cuda = "with CUDA kernels" if why is None else f"no CUDA kernels: {why}"
        print(f"compiled library: CPU kernels for {sets}; {cuda}")
    else:
        print(f"compiled library: {library['error']}")
    for device in record["devices"]:
        cores = count(device["cores"], "core")
        print(f"\n{device['device']}: {device['name']}, {device['arch']}, {cores}")
        for name, why in device["backends"].items():
            isa = record["native_isa"] if name == "native" and device["device"] == "cpu" else {}
            how = ", ".join(f"{dtype} on {isa[dtype]}" for dtype in isa)
            here = f"available: {how}" if how else "available"
            print(f"  {name:<10} {here if why is None else f'not here: {why}'}")
        print(f"  auto runs on {device['auto']}: {device['auto_reason']}")
    return 0
