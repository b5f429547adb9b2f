"""What the main job's search gives away for its speed: the same budgets searched at length.

    python -m bench.search_cost [--rows bench/results/search-cost.jsonl]

Both searches choose ranks of the sentence encoder by measured loss; all models take prefixes of the
same data-aware factors and are judged on the same held-out sentences. Finished pieces are rows; a
second call goes on where the first ended. `make publish` puts the table into docs/guide/search.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import encoder_forms as forms
from examples import encoder_texts as judging
from examples.published import stamp
from maestro_kernels import search
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.measure import records

BUDGETS = (0.9, 0.8, 0.7, 0.5)
NAMES = ("uniform", "the job's, not refined", "the job's", "at length")


def found(
    name: str, encoder: library.Encoder, texts: list[str], dtype: torch.dtype
) -> Iterator[tuple[float, forms.Ranks, float]]:
    """(budget, ranks, seconds for all budgets) of one search."""
    start = time.perf_counter()
    if name == "uniform":
        full = forms.full_rank(encoder, [], "svd")
        ranks: dict[float, forms.Ranks] = {b: forms.uniform_ranks(full, b) for b in BUDGETS}
    elif name == "at length":
        # 256 sentences, four ranks per layer, errors of the hidden states, nothing refined.
        batches = list(encoder.batches(judging.by_length(encoder, texts[:256])))
        model = forms.in_dtype(encoder.model, dtype)
        sens = search.sensitivity(model, batches, method="loss", points=4)
        ranks = {b: dict(search.allocate(model, search.Params(b), sens)) for b in BUDGETS}
    else:
        passes = 0 if "not refined" in name else 80
        done = forms.search_ranks(
            encoder, texts[64:], texts[:64], BUDGETS, dtype=dtype, passes=passes
        )
        ranks = {b: dict(a) for b, a in done.allocations.items()}
        print(done)
    seconds = time.perf_counter() - start
    for budget in BUDGETS:
        yield budget, ranks[budget], seconds


def main() -> int:
    """Search and judge whatever the rows lack."""
    parser = argparse.ArgumentParser(description="the job's search against one at length")
    parser.add_argument("--rows", type=Path, default=Path("bench/results/search-cost.jsonl"))
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES)
    args = parser.parse_args()
    have = {row["search"] for row in records.load(args.rows)} if args.rows.is_file() else set()
    calibration, held_out = judging.split(judging.sentences(), 512, 384)
    encoder = library.load_encoder(library.BUNDLED)
    held_out = judging.by_length(encoder, held_out)
    dtype = forms.search_dtype(forms.bfloat16_slowdown(encoder, calibration))
    full = forms.full_rank(encoder, judging.by_length(encoder, calibration), "data")
    original = encoder.embed(held_out)
    made = stamp()
    for name in args.only:
        if name in have:
            continue
        rows = []
        for budget, ranks, seconds in found(name, encoder, calibration, dtype):
            small = forms.in_dtype(forms.at_ranks(encoder, full, ranks), dtype)
            close = judging.fidelity(encoder.embed(held_out, small), original)
            rows.append(
                {
                    "search": name, "budget": budget, "seconds": seconds, "cosine": close.cosine,
                    "spearman": close.spearman, "dtype": str(dtype), "ranks": ranks, **made,
                }
            )  # fmt: skip
            print(f"{name}, {budget:.0%}: cosine {close.cosine:.4f}, {seconds:.0f} s", flush=True)
        records.append(args.rows, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
