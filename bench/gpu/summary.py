"""summary.txt: what was found, lost and left, in the order in which somebody needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bench.gpu.plan import STAGES
from bench.gpu.state import LOST, Record, State

__all__ = ["left", "text"]

_LINES = 40


def text(state: State, header: Sequence[str], notes: Mapping[str, Sequence[str]]) -> str:
    """The summary.

    Args:
        state: the records.
        header: lines about the call.
        notes: stage -> what became of it in this call.
    """
    lines = [f"commit {state.commit}", *header, "", *_environment(state), ""]
    lines += ["stage         passed failed skipped   lost"]
    for name in STAGES:
        count = Counter(r["outcome"] for r in state.of(name))
        numbers = "".join(f"{count[o]:>7}" for o in ("passed", "failed", "skipped", LOST))
        lines.append(f"{name:<13}{numbers}  {'; '.join(notes.get(name, ()))}".rstrip())
    for title, outcome in (("lost: not run again at this commit", LOST), ("failed", "failed")):
        lines += _listed(title, [r for r in _all(state) if r["outcome"] == outcome])
    lines += _micro(state.of("micro"))
    found = state.folder / "criteria.txt"
    if found.exists():
        lines += ["", found.read_text(encoding="utf-8").rstrip()]
    rest = left(state)
    lines += ["", f"left: {', '.join(rest) if rest else 'nothing'}"]
    return "\n".join(lines) + "\n"


def left(state: State) -> list[str]:
    """Families that a later call has to take up again, and why where that will not help."""
    found = []
    for stage in STAGES.values():
        if stage.name == "environment":
            continue
        why = state.tool(stage.needs) if stage.needs else None
        if why is not None:
            found.append(f"{stage.name} ({stage.needs}: {why})")
        else:
            found += [
                f"{stage.name}/{family}"
                for family in stage.families
                if not state.complete(stage.name, family)
            ]
    return found


def _all(state: State) -> list[Record]:
    return [r for name in STAGES for r in state.of(name)]


def _listed(title: str, found: Sequence[Record]) -> list[str]:
    if not found:
        return []
    lines = ["", f"{title}:"]
    lines += [f"  {r['stage']}/{r['family']}/{r['item']}: {r['note']}" for r in found[:_LINES]]
    rest = len(found) - _LINES
    return [*lines, f"  and {rest} more in records.jsonl"] if rest > 0 else lines


def _environment(state: State) -> list[str]:
    lines = []
    for record in state.of("environment"):
        result = record["result"] or {}
        if record["item"] == "facts":
            device, versions = result["device"], result["versions"]
            lines.append(f"{device['name']}, {device['arch']}, {device['num_cores']} cores")
            wanted = ("python", "torch", "triton", "cuda", "driver")
            lines.append(", ".join(f"{k} {versions[k]}" for k in wanted if versions.get(k)))
        elif record["outcome"] != "complete":
            what = result.get("library") or result.get("path") or record["note"]
            lines.append(f"{record['family']} {record['item']}: {record['outcome']}, {what}")
    return lines


def _micro(found: Sequence[Record]) -> list[str]:
    passed = [r for r in found if r["outcome"] == "passed" and r["result"]]
    if not passed:
        return []
    return ["", "measured on this chip:"] + [
        f"  {r['item']:<28} {r['result']['value']:>10.4g} {r['result']['unit']:<8} "
        f"{r['result']['note']}"
        for r in passed
    ]
