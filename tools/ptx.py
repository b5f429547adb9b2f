"""What PTX shows of a kernel: its instructions, whether releases are safe, and early accesses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["count_instructions", "early_accesses", "unguarded_releases"]

_COUNTED = {
    "mma_sync": r"\bmma\.sync",
    "cp_async": r"\bcp\.async\.c[ag]",
    "tma_load": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "tma_store": r"\bcp\.async\.bulk\.tensor\.\dd\.global",
    "releases": r"\b(?:atom|red|st)\.[\w.:]*\b(?:release|acq_rel)\b",
}
_WGMMA = re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\S+\s+\{[^}]*\},\s*(\{|%)")


def count_instructions(ptx: str) -> dict[str, int]:
    """Occurrences of matrix and copy instructions; wgmma by where its A operand lies."""
    operands = _WGMMA.findall(ptx)
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _COUNTED.items()}
    return counts | {"wgmma_reg": operands.count("{"), "wgmma_smem": operands.count("%")}


# A barrier before every release. A releasing atomic orders the global stores of the thread that
# executes it and, through a barrier, those of its whole block. So on every path from a global store
# to a releasing atomic all threads of the block must meet: a forward data-flow problem.
_STORED, _COPYING = 1, 2  # a global store not yet behind a barrier; a bulk store not yet complete


@dataclass
class _Instruction:
    opcode: str
    operands: str
    predicate: str | None
    scope: tuple[int, ...]
    line: int
    next: list[int] = field(default_factory=list)


def unguarded_releases(ptx: str) -> list[str]:
    """Releasing atomics that a global store can reach without a barrier of the whole block between.

    Counted as global stores: `st` outside shared, local and parameter memory, floating-point `red`
    and `atom`, bulk (TMA) stores until a wait for their completion, and any call. A barrier counts
    if it is unpredicated and takes every thread. Returns one "line N: instruction" per offence.

    Raises:
        ValueError: the PTX holds no function, or a branch to a label that is not there.
    """
    ptx = _without_comments(ptx)
    offences: list[str] = []
    for start, end in _functions(ptx):
        header = ptx[ptx.rfind("}", 0, start) + 1 : start]
        threads = re.search(r"\.reqntid\s+(\d+)", header)
        block = int(threads.group(1)) if threads else None
        instructions = _parse(ptx[start:end], 1 + ptx.count("\n", 0, start))
        offences += _offences(instructions, block)
    return offences


def early_accesses(ptx: str) -> list[str]:
    """Accesses to global memory that can come before griddepcontrol.wait.

    Until that wait the kernel in front may still write, whatever it writes: only prefetches are
    harmless. Counted are loads, stores, atomics and copies outside shared, local, constant and
    parameter memory, and calls. One "line N: instruction" each; all of them without a wait.

    Raises:
        ValueError: as unguarded_releases.
    """
    ptx = _without_comments(ptx)
    found: list[str] = []
    for start, end in _functions(ptx):
        instructions = _parse(ptx[start:end], 1 + ptx.count("\n", 0, start))
        seen: set[int] = set()
        work = [0] if instructions else []
        while work:
            i = work.pop()
            waits = instructions[i].opcode == "griddepcontrol.wait"
            if i in seen or (waits and instructions[i].predicate is None):
                continue
            seen.add(i)
            work += instructions[i].next
        reached = (instructions[i] for i in sorted(seen))
        found += [f"line {i.line}: {i.opcode} {i.operands}" for i in reached if _is_global(i)]
    return found


def _is_global(instruction: _Instruction) -> bool:
    kind, *qualifiers = instruction.opcode.split(".")
    if kind == "cp":  # a copy that asks for something; waiting for one touches nothing
        return "global" in qualifiers or "ca" in qualifiers or "cg" in qualifiers
    elsewhere = {"shared", "local", "const", "param"} & {q.split("::")[0] for q in qualifiers}
    return kind == "call" or (kind in ("ld", "ldu", "st", "atom", "red") and not elsewhere)


def _without_comments(ptx: str) -> str:
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    return re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M)  # end without a semicolon


def _functions(ptx: str) -> Iterator[tuple[int, int]]:
    """Start and end of the body of every function."""
    bodies = list(re.finditer(r"\.(?:entry|func)\b[^;{]*\{", ptx))
    if not bodies:
        raise ValueError("unguarded_releases: ptx: expected a function with a body, got none")
    for found in bodies:
        depth, at = 1, found.end()
        while depth:
            brace = re.compile(r"[{}]").search(ptx, at)
            if brace is None:
                raise ValueError("unguarded_releases: ptx: expected balanced braces")
            depth += 1 if brace.group() == "{" else -1
            at = brace.end()
        yield found.end(), at - 1


def _parse(body: str, line: int) -> list[_Instruction]:
    """Instructions with their successors; labels are local to the braces they stand in."""
    instructions: list[_Instruction] = []
    labels: dict[tuple[tuple[int, ...], str], int] = {}
    tables: dict[str, list[str]] = {}
    scope: tuple[int, ...] = ()
    scopes = at = 0
    token = re.compile(
        r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$%\w]+):(?!:)|(?P<text>[^;]+);)"
    )
    while found := token.match(body, at):
        where = line + body.count("\n", 0, found.end())
        at = found.end()
        if found["open"]:
            scopes += 1
            scope = (*scope, scopes)
        elif found["close"]:
            scope = scope[:-1]
        elif found["label"]:
            labels[scope, found["label"]] = len(instructions)
        elif found["text"].startswith(".branchtargets"):
            name = next(key[1] for key, i in labels.items() if i == len(instructions))
            tables[name] = re.split(r"[\s,]+", found["text"].strip())[1:]
        elif not found["text"].startswith("."):  # .reg, .shared, .pragma ... do nothing
            predicate, opcode, operands = re.fullmatch(
                r"(?:@(!?[%\w]+)\s+)?(\S+)\s*(.*)", found["text"].strip(), re.S
            ).groups()
            instructions.append(_Instruction(opcode, operands, predicate, scope, where))
    if body[at:].strip():
        raise ValueError(f"unguarded_releases: ptx: cannot read {body[at:].strip()[:60]!r}")
    for i, instruction in enumerate(instructions):
        _connect(instruction, i, len(instructions), labels, tables)
    return instructions


def _connect(instruction, i, count, labels, tables) -> None:
    kind = instruction.opcode.split(".")[0]
    falls_through = kind not in ("bra", "brx", "ret", "exit", "trap") or instruction.predicate
    targets: list[str] = []
    if kind == "bra":
        targets = [instruction.operands.strip()]
    elif kind == "brx":
        targets = tables[instruction.operands.split(",")[-1].strip()]
    for target in targets:
        scope = instruction.scope
        while (scope, target) not in labels:
            if not scope:
                raise ValueError(f"unguarded_releases: ptx: expected a label {target}")
            scope = scope[:-1]
        instruction.next.append(labels[scope, target])
    if falls_through:
        instruction.next.append(i + 1)
    instruction.next = [n for n in instruction.next if n < count]


def _offences(instructions: list[_Instruction], block: int | None) -> list[str]:
    before = [-1] * len(instructions)  # -1: not reached
    if instructions:
        before[0] = 0
    work = [0] if instructions else []
    while work:
        i = work.pop()
        after = _after(instructions[i], before[i], block)
        for n in instructions[i].next:
            merged = after if before[n] < 0 else before[n] | after
            if merged != before[n]:
                before[n] = merged
                work.append(n)
    return [
        f"line {instruction.line}: {instruction.opcode} {instruction.operands}"
        for instruction, state in zip(instructions, before, strict=True)
        if state > 0 and _releases(instruction.opcode)
    ]


def _releases(opcode: str) -> bool:
    kind, *qualifiers = opcode.split(".")
    ordered = "release" in qualifiers or "acq_rel" in qualifiers
    # mbarriers and the cluster barrier order memory inside one block or cluster, not for the grid
    return ordered and kind in ("atom", "red", "st", "multimem")


def _after(instruction: _Instruction, state: int, block: int | None) -> int:
    """What may be outstanding after an instruction, given what may be before it."""
    kind, *qualifiers = instruction.opcode.split(".")
    if kind == "call":
        return state | _STORED | _COPYING
    if kind == "st" and not {"shared", "local", "param"} & {q.split("::")[0] for q in qualifiers}:
        return state | _STORED
    if kind in ("red", "atom") and "shared" not in qualifiers and _is_float(qualifiers):
        return state | _STORED
    if kind == "cp" and "bulk" in qualifiers:
        if "wait_group" in qualifiers:
            complete = "read" not in qualifiers and instruction.operands.strip() == "0"
            done = complete and instruction.predicate is None
            return (state & ~_COPYING) | _STORED if done and state & _COPYING else state
        to_global = "global" in qualifiers and qualifiers.index("global") < _first_shared(
            qualifiers
        )
        return state | _COPYING if to_global else state
    if _is_full_barrier(instruction, block):
        return state & ~_STORED
    return state


def _is_float(qualifiers: list[str]) -> bool:
    return any(re.fullmatch(r"b?f\d+(x\d)?", q) for q in qualifiers)


def _first_shared(qualifiers: list[str]) -> int:
    return next((i for i, q in enumerate(qualifiers) if q.startswith("shared")), len(qualifiers))


def _is_full_barrier(instruction: _Instruction, block: int | None) -> bool:
    if instruction.predicate is not None:
        return False
    opcode = instruction.opcode
    if opcode.startswith("barrier.cluster.wait"):
        return True
    if not re.fullmatch(r"(bar|barrier)(\.cta)?\.sync(\.aligned)?", opcode):
        return False
    counts = [part.strip() for part in instruction.operands.split(",")][1:]
    return not counts or (block is not None and counts == [str(block)])
