"""The `maestro-kernels` command: parse, call the library, print. One module per sub-command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import maestro_kernels
from maestro_kernels.cli import bench, compress, info, profile, train, tune


def parser() -> argparse.ArgumentParser:
    """Build the command line; every sub-command has --json and --help with an example."""
    top = argparse.ArgumentParser(
        prog="maestro-kernels",
        description="Fused low-rank linear layers: what runs here, how fast, and how small.",
    )
    top.add_argument("--version", action="version", version=maestro_kernels.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, bench, profile, compress, train, tune):
        module.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 and one line on stderr for wrong input."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        print(f"maestro-kernels {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
