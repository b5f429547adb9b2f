"""Runs Python files one at a time, each in a fork of a process that has imported the package.

A line on standard input is {"file", "folder", "log", "environment"}; the answer is the exit status,
negative for a signal. Nothing may be computed here before a fork: a child of a process whose OpenMP
threads have started hangs in its first parallel region.
"""

import json
import os
import runpy
import signal
import sys
import traceback
import warnings

import small_rings
import torch

import maestro_kernels
from maestro_kernels import search, training

__all__ = ["maestro_kernels", "search", "small_rings", "torch", "training"]


def child(order):
    """Run the file as a script; never returns."""
    status = 1
    # Its default ends the process: an example that hangs must not hang the tests.
    signal.alarm(1200)
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(order["folder"])
        os.environ.update(order["environment"])
        # What an example warns of is a fault of the example, or of ours.
        warnings.filterwarnings("error", module="maestro_kernels|__main__")
        sys.argv = [order["file"]]
        runpy.run_path(order["file"], run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    """Serve until standard input ends."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


main()
