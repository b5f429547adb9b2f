"""The tables of the documentation that come from benchmark rows: `make publish`.

    python -m bench.publish [OUT] [--check] [--root .]

A block names the row file it is made from:

    <!-- encoder:begin, from bench/results/x-2-threads-encoder.jsonl, written by make publish -->
    ...
    <!-- encoder:end -->

With OUT, what a run of `make bench` left there is copied to bench/results, and the blocks of its
kinds are made from it from then on. "from -" stands for no rows yet: such a block stays as it is.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import encoder_results
from examples.published import origin
from maestro_kernels.benchmark.rows import Row, latest_run, load
from maestro_kernels.benchmark.summary import device_line, outcomes, verdict
from maestro_kernels.measure import records, report
from maestro_kernels.measure.cases import joined
from maestro_kernels.measure.wording import duration, times

__all__ = ["main", "markdown_table", "published"]

_BLOCK = re.compile(
    r"<!-- (?P<kind>[a-z-]+):begin, from (?P<rows>\S+), written by make publish -->\n"
    r"(?P<body>.*?)<!-- (?P=kind):end -->",
    re.DOTALL,
)
_RESULTS = "bench/results"


def _kernels(path: Path) -> str:
    return markdown_table(latest_run(load(path)))


def markdown_table(rows: Sequence[Row], *, cache: str = "cold") -> str:
    """One line per case in one cache state, the machine named, the verdict below.

    Args:
        rows: rows of one run.
        cache: "cold" (weights come from further away than the private caches) or "warm".

    Raises:
        ValueError: nothing to publish: no such rows, rows of a dirty work tree, or rows in which
            a result of ours was wrong.
    """
    chosen = [row for row in rows if row.cache == cache and row.launch == "eager"]
    found = outcomes(chosen)
    if not found:
        raise ValueError(f"markdown_table: rows: expected {cache} rows of ours, got none")
    first = found[0].ours
    if first.versions.get("dirty"):
        raise ValueError(
            "markdown_table: rows: expected a clean work tree, got rows measured with "
            "uncommitted changes"
        )
    wrong = [r for r in chosen if r.family == "ours" and r.gate in ("failed", "error")]
    if wrong:
        raise ValueError(
            f"markdown_table: rows: expected every result of ours to be right, got "
            f"{wrong[0].provider}: {wrong[0].reason}"
        )
    headers = (
        *("layer", "M", "rank", "dtype", "dense", "two matmuls", "fastest other path"),
        *("ours, as is", "ours", "ours vs fastest other", "low rank vs dense"),
    )
    body = []
    for o in found:
        row = o.ours
        mode = "" if row.mode == "forward" else f", {row.mode}"
        name = o.best.provider.split(", ")[-1] if o.best else ""
        other = f"{duration(o.best.p50_us)} ({name})" if o.best else ""
        cells = (
            *(row.source, str(row.M), joined(row.rank), row.dtype + mode),
            duration(o.dense.p50_us if o.dense else None),
            duration(o.two.p50_us if o.two else None),
            *(other, duration(o.plain.p50_us), duration(row.p50_us)),
            *(times(o.ratio(o.best)), times(o.pays)),
        )
        body.append(cells)
    commit = str(first.versions.get("commit") or "unknown")[:10]
    lines = [
        *report.markdown_table(headers, body, numeric=(1, 2, *range(4, len(headers)))),
        "",
        f"{device_line(first)}, {cache} caches, medians of interleaved samples, commit {commit}, "
        f"{first.run[:10]}. “Fastest other path” is the fastest way to run the same factors that "
        f"is not ours; packed means oneDNN weights reordered before the clock starts. “Ours” is "
        f"after `mk.prepack` for inference on a CPU, “as is” a plain call. Repeat with "
        f"`{first.command}`.",
        "",
        *(f"- {sentence}" for sentence in verdict(chosen)),
    ]
    return "\n".join(lines)


def _encoder(path: Path) -> str:
    return encoder_results.markdown(*encoder_results.load(path))


def _encoder_short(path: Path) -> str:
    return encoder_results.markdown(*encoder_results.load(path), short=True)


def _search_cost(path: Path) -> str:
    """Cosine per search and budget, written by bench/search_cost.py."""
    rows = records.load(path)
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    headers = ("ranks", "seconds for all budgets", *(f"{b:.0%}" for b in budgets))
    body = []
    for name in dict.fromkeys(row["search"] for row in rows):
        here = {row["budget"]: row for row in rows if row["search"] == name}
        cells = [f"{here[b]['cosine']:.4f}" if b in here else "" for b in budgets]
        seconds = next(iter(here.values()))["seconds"]
        body.append((name, f"{seconds:.0f}", *cells))
    lines = report.markdown_table(headers, body, numeric=range(1, len(headers)))
    made = dict.fromkeys(origin(row) for row in rows)
    return "\n".join([*lines, "", f"Mean cosine on 384 held-out sentences. {'; '.join(made)}."])


# Kind of block -> what makes it, and how its rows' file is named in OUT.
KINDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "benchmark": (_kernels, "*-thread*[!r].jsonl"),
    "encoder": (_encoder, "*-thread*-encoder.jsonl"),
    "encoder-short": (_encoder_short, "*-thread*-encoder.jsonl"),
    "search-cost": (_search_cost, "search-cost.jsonl"),
}


def published(text: str, root: Path, chosen: dict[str, str] | None = None) -> str:
    """A document with its blocks made anew.

    Args:
        text: of the document.
        root: what row files are relative to.
        chosen: row file by kind, instead of the one that a block names.

    Raises:
        ValueError: a block of an unknown kind or without its file, or rows not for publishing.
    """

    def block(match: re.Match[str]) -> str:
        kind, rows = match["kind"], (chosen or {}).get(match["kind"], match["rows"])
        if kind not in KINDS:
            raise ValueError(f"published: text: expected blocks of {sorted(KINDS)}, got {kind!r}")
        if rows == "-":
            return match[0]
        if not (root / rows).is_file():
            raise ValueError(f"published: {kind}: expected the rows {rows}, got no such file")
        begin = f"<!-- {kind}:begin, from {rows}, written by make publish -->"
        return f"{begin}\n{KINDS[kind][0](root / rows)}\n<!-- {kind}:end -->"

    return _BLOCK.sub(block, text)


def documents(root: Path) -> list[Path]:
    """README and pages that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def _collected(out: Path, root: Path) -> dict[str, str]:
    """Copy a run's rows to their place; file by kind."""
    chosen = {}
    for kind, (make, pattern) in KINDS.items():
        files = sorted(out.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"publish: OUT: expected one {pattern}, got {len(files)} in {out}")
        for file in files:
            # Refuses rows of a dirty tree before anything is written.
            make(file)
            chosen[kind] = f"{_RESULTS}/{file.name}"
    if not chosen:
        raise ValueError(f"publish: OUT: expected rows of make bench, got none in {out}")
    for name in set(chosen.values()):
        shutil.copyfile(out / Path(name).name, root / name)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check all blocks; 1 when one differs, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish")
    parser.add_argument("out", type=Path, nargs="?", help="folder that make bench wrote")
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    parser.add_argument("--root", type=Path, default=Path(), help="of the repository")
    args = parser.parse_args(argv)
    if args.check and args.out:
        parser.error("--check: expected no OUT, whose rows would be copied")
    differing = []
    try:
        chosen = _collected(args.out, args.root) if args.out else None
        for page in documents(args.root):
            old = page.read_text(encoding="utf-8")
            new = published(old, args.root, chosen)
            if old != new:
                differing.append(page)
                if not args.check:
                    page.write_text(new, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for page in differing:
        print(f"{page}: {'differs from its rows' if args.check else 'written'}", file=sys.stderr)
    return int(args.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
