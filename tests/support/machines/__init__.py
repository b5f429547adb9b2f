"""This package run as machines that this one is not: what each is made of, and one visit to it.

A machine is one value per trait. The three instruction-set switches know nothing of each other, and
none complains about a value it does not know, so every visit first asserts that its caps are in
force (visit.py). A cap above what this CPU has is no machine of its own: `beyond` says why.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

__all__ = [
    "THIS",
    "TRAITS",
    "Outcome",
    "beyond",
    "full",
    "pairwise",
    "tiny_model",
    "title",
    "visit",
]

# Seconds for one visit, which takes about ten: a hang ends, a busy machine does not fail it.
TIMEOUT = 900
ROOT = Path(__file__).resolve().parents[3]
PLAIN = "as it is"
NONE = "none"

# The first value of each leaves this machine alone.
PROCESSOR = {
    "oneDNN": (PLAIN, "AVX2", "AVX512_CORE", "AVX512_CORE_BF16"),
    "ATen": (PLAIN, "avx2", "default"),
    "library": (PLAIN, "portable", "avx2", "avx512", "avx512_bf16", NONE),
    "cores": (PLAIN, "1"),
}
SURROUNDINGS = {
    "Triton": (PLAIN, NONE),
    "compiler": (PLAIN, NONE),
    "matplotlib": (PLAIN, NONE),
    "HOME": (PLAIN, "unset", "read-only"),
    "LC_ALL": (PLAIN, "C"),
    "terminal": (NONE, "yes"),
    "installed": (PLAIN, "no"),
}
TRAITS = {**PROCESSOR, **SURROUNDINGS}
# Of what `bench` and `profile` time: one per machine, all where none is named.
DTYPES = ("float32", "bfloat16", "float16")
Machine = dict[str, str]
THIS: Machine = {trait: values[0] for trait, values in TRAITS.items()}

# What a CPU needs for a cap to mean something, as /proc/cpuinfo calls it.
NEEDS = {
    "avx2": "avx2",
    "avx512": "avx512dq",
    "avx512_core": "avx512dq",
    "avx512_bf16": "avx512_bf16",
    "avx512_core_bf16": "avx512_bf16",
}


@dataclass(frozen=True)
class Outcome:
    """One visit: what each step ended with ("ok" or what was wrong), and all that was printed."""

    steps: dict[str, str]
    printed: str = field(repr=False)

    @property
    def problem(self) -> str:
        """What went wrong, "" when nothing did."""
        wrong = [f"{name}: {said}" for name, said in self.steps.items() if said != "ok"]
        if "Traceback (most recent call last)" in self.printed:
            wrong.append("printed a traceback")
        return "; ".join(wrong)


def flags() -> set[str]:
    """Instruction sets of this CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def beyond(machine: Machine) -> str | None:
    """Why this machine cannot pass for that one, or None where it can."""
    has = flags()
    for trait in PROCESSOR:
        need = NEEDS.get(machine[trait].lower())
        if need and need not in has:
            return f"this CPU has no {need}, so {trait} {machine[trait]} caps nothing"
    if machine["cores"] != PLAIN and not hasattr(os, "sched_setaffinity"):
        return "this system does not keep a process on one core"
    return None


def full() -> list[Machine]:
    """Every processor on plain surroundings, then every surroundings of this processor.

    The dtypes that are timed take turns.
    """
    made = [THIS]
    for part in (PROCESSOR, SURROUNDINGS):
        for values in product(*part.values()):
            machine = {**THIS, **dict(zip(part, values, strict=True))}
            if machine != THIS:
                made.append(machine)
    return [{**machine, "dtype": DTYPES[k % len(DTYPES)]} for k, machine in enumerate(made)]


def pairwise() -> list[Machine]:
    """Few machines in which any two values of different traits meet: always the same ones."""
    values = {**TRAITS, "dtype": DTYPES}
    traits = list(values)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in combinations(traits, 2)
        for x in values[a]
        for y in values[b]
    }
    made: list[Machine] = []
    while missing:
        # The first pair that is missing, then trait by trait the value that meets most of the rest.
        machine: Machine = dict(min(missing, key=sorted))
        for trait in traits:
            if trait not in machine:
                machine[trait] = max(
                    values[trait],
                    key=lambda value: sum(
                        frozenset({(trait, value), met}) in missing for met in machine.items()
                    ),
                )
        made.append({trait: machine[trait] for trait in traits})
        missing -= {frozenset(pair) for pair in combinations(machine.items(), 2)}
    return made


def title(machine: Machine) -> str:
    """Its traits that differ from this machine."""
    changed = [f"{k} {v}" for k, v in machine.items() if v != THIS.get(k)]
    return ", ".join(changed) or "this machine"


def tiny_model(folder: Path) -> Path:
    """Write a BERT of one layer with its tokenizer, for the command that compresses one."""
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "rank", "of", "the", "weight"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=len(words),
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def visit(machine: Machine, model: Path, steps: Sequence[str] = ()) -> Outcome:
    """Run the steps of visit.py in one process that takes this machine for `machine`.

    Args:
        machine: a value per trait.
        model: a tiny Hugging Face folder to compress.
        steps: these only; all of them by default.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = _environment(machine, folder)
        command = [sys.executable, str(Path(__file__).with_name("visit.py"))]
        if machine["cores"] != PLAIN:
            core = min(os.sched_getaffinity(0))
            command = ["taskset", "--cpu-list", str(core), *command]
        record = {"machine": machine, "model": str(model), "steps": list(steps)}
        record["dtypes"] = [machine["dtype"]] if "dtype" in machine else DTYPES
        result = folder / "steps.json"
        record["result"] = str(result)
        printed = _run([*command, json.dumps(record)], environment, folder, machine)
        ended = json.loads(result.read_text()) if result.exists() else {"start": printed[-2000:]}
        return Outcome(ended, printed)


def _environment(machine: Machine, folder: Path) -> dict[str, str]:
    """The variables of a process on that machine; what a user may have set is left out."""
    ours = ("MAESTRO_KERNELS_", "MK_", "XDG_", "TRITON_", "ONEDNN_", "ATEN_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env["PYTHONPATH"] = str(_package(machine, folder))
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    for trait, variable in (
        ("oneDNN", "ONEDNN_MAX_CPU_ISA"),
        ("ATen", "ATEN_CPU_CAPABILITY"),
        ("library", "MK_CPU_ISA"),
        ("LC_ALL", "LC_ALL"),
    ):
        if machine[trait] not in (PLAIN, NONE):
            env[variable] = machine[trait]
    if machine["cores"] != PLAIN:
        env.pop("OMP_NUM_THREADS", None)
    if machine["compiler"] == NONE:
        (folder / "bin").mkdir()
        (folder / "bin" / "taskset").symlink_to(shutil.which("taskset") or "/usr/bin/taskset")
        env["PATH"] = str(folder / "bin")
        for variable in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH"):
            env.pop(variable, None)
    home = folder / "home"
    home.mkdir()
    env["HOME"] = str(home)
    if machine["HOME"] == "unset":
        for variable in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
            env.pop(variable, None)
    elif machine["HOME"] == "read-only":
        home.chmod(0o555)
        if os.access(home, os.W_OK):  # root writes everywhere but into a file system that refuses
            env["HOME"] = "/sys"
    return env


def _package(machine: Machine, folder: Path) -> Path:
    """Where the package is found: this checkout, or a copy without the compiled library."""
    if machine["library"] != NONE:
        return ROOT
    leave = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(ROOT / "maestro_kernels", folder / "copy" / "maestro_kernels", ignore=leave)
    return folder / "copy"


def _run(command: list[str], env: dict[str, str], folder: Path, machine: Machine) -> str:
    """Everything the process printed, on a pipe or on a terminal."""
    work = folder / "work"
    work.mkdir()
    if machine["terminal"] == NONE:
        done = subprocess.run(
            command,
            env=env,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
        return done.stdout.decode("utf-8", "replace")
    outer, inner = pty.openpty()
    with subprocess.Popen(
        command, env=env, cwd=work, stdin=inner, stdout=inner, stderr=inner
    ) as process:
        os.close(inner)
        chunks = []
        while True:
            try:
                chunk = os.read(outer, 65536)
            except OSError:  # the last holder of the other end is gone
                break
            if not chunk:
                break
            chunks.append(chunk)
        process.wait(TIMEOUT)
    os.close(outer)
    return b"".join(chunks).decode("utf-8", "replace")
