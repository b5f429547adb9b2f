"""The main job: `make bench`. Factorise a real sentence encoder, measure it, write a report.

python -m bench.sentence_encoder --out out [--budgets 0.9 0.75 0.5 0.35] [--quick]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from maestro_kernels import hardware, load_pretrained
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.benchmark import html, plots, report, rows
from maestro_kernels.benchmark import run as kernels
from maestro_kernels.benchmark.cases import Case, suite
from maestro_kernels.benchmark.summary import verdict as kernel_verdict
from maestro_kernels.cli import main as command_line

BATCHES = ("batch 1", "batch 64")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sentence_encoder", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.5, 0.35])
    parser.add_argument("--calibration", type=int, default=512, help="sentences")
    parser.add_argument("--held-out", type=int, default=384, help="sentences")
    parser.add_argument("--seconds", type=float, default=8.0, help="per timing")
    parser.add_argument("--quick", action="store_true", help="one budget, few sentences, no suite")
    args = parser.parse_args(argv)
    if args.quick:
        args.budgets, args.calibration, args.held_out, args.seconds = [0.5], 96, 96, 1.0
    return args


def progress():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def sweep(encoder, args, calibration, held_out, advance):
    """One Result per budget and initialisation; latency is measured once per budget."""
    original = encoder.embed(held_out)
    results = []
    for budget in args.budgets:
        for init in ("svd", "data"):
            advance(f"{budget:.0%} of the weights, {init}")
            model = library.factorised(encoder, budget, init, calibration)
            seconds = args.seconds if init == "data" else 0.0
            results.append(
                library.evaluate(encoder, model, budget, init, held_out, original, seconds=seconds)
            )
    return results


def save_and_reload(encoder, args, results, held_out):
    """Save the budget to look at with `maestro-kernels compress`, reload it, compare embeddings."""
    data_aware = [r for r in results if r.init == "data"]
    usable = [r for r in data_aware if r.cosine >= library.USABLE_COSINE]
    chosen = (
        min(usable, key=lambda r: r.budget) if usable else max(data_aware, key=lambda r: r.budget)
    )
    folder = args.out / "compressed"
    command = ["compress", library.BUNDLED, "--budget", str(chosen.budget), "--init", "data"]
    command += ["--data", str(args.out / "calibration.txt"), "--out", str(folder), "--group"]
    print("\n$ maestro-kernels " + shlex.join(command))
    if command_line(command) != 0:
        raise SystemExit("the compress command failed")
    fresh = library.load_encoder(library.BUNDLED).model
    first = encoder.embed(held_out, load_pretrained(folder, fresh))
    second = encoder.embed(
        held_out, load_pretrained(folder, library.load_encoder(library.BUNDLED).model)
    )
    calibration = (args.out / "calibration.txt").read_text(encoding="utf-8").splitlines()
    made = encoder.embed(held_out, library.factorised(encoder, chosen.budget, "data", calibration))
    difference = max(float((first - made).abs().max()), float((first - second).abs().max()))
    if difference > 1e-5:
        raise SystemExit(f"the reloaded model's embeddings differ by {difference:.1e}")
    exact = "bit for bit" if difference == 0 else f"to {difference:.0e}"
    return f"Saved at {chosen.budget:.0%}, reloaded into a fresh model: same embeddings {exact}."


def kernel_suite(args, show) -> list[rows.Row]:
    command = "python -m bench.sentence_encoder"
    options = kernels.Options("cpu", 1.5, compiled=True, command=command)
    cases: list[Case] = suite("quick")
    return list(kernels.run(cases, options, on_case=lambda case: show(f"kernels: {case.source}")))


def ms(result, batch, name):
    low, median, high = result.latency[batch][name]
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def fidelity_table(results):
    first = results[0]
    dense = [
        "dense", "", "1.000", "1.000", "1.000", f"{first.dense_linear_weights / 1e6:.2f}",
        f"{first.dense_parameters / 1e6:.2f}", f"{first.dense_macs / 1e6:.2f}",
    ]  # fmt: skip
    body = [
        [
            f"{r.budget:.0%}", r.init, f"{r.cosine:.3f}", f"{r.worst:.3f}", f"{r.spearman:.3f}",
            f"{r.linear_weights / 1e6:.2f}", f"{r.parameters / 1e6:.2f}", f"{r.macs / 1e6:.2f}",
        ]
        for r in results
    ]  # fmt: skip
    headers = (
        "budget", "init", "cosine", "worst cosine", "Spearman", "linear weights, M",
        "whole model, M", "MACs per token, M",
    )  # fmt: skip
    return headers, [dense, *body]


def latency_table(results):
    timed = [r for r in results if r.latency]
    headers = ("budget", "batch", "dense, ms", "two matmuls, ms", "ours, ms", "prepacked, ms",
               "dense / prepacked", "two matmuls / prepacked")  # fmt: skip
    body = []
    for r in timed:
        for batch in BATCHES:
            body.append(
                [
                    f"{r.budget:.0%}",
                    batch.removeprefix("batch "),
                    ms(r, batch, "dense"),
                    ms(r, batch, "two matmuls"),
                    ms(r, batch, "ours"),
                    ms(r, batch, library.DEPLOYED),
                    f"{r.ratio(batch, library.DEPLOYED, 'dense'):.2f}×",
                    f"{r.ratio(batch, library.DEPLOYED, 'two matmuls'):.2f}×",
                ]
            )
    return headers, body


def encoder_sections(results, lines, saved, counts):
    def series(pick):
        return {
            f"{init} init": [
                plots.Point(r.budget * 100, pick(r))
                for r in sorted(results, key=lambda r: r.budget)
                if r.init == init
            ]
            for init in ("data", "svd")
        }

    def line(title, pick, label):
        drawing = plots.line_plot(
            series(pick), title=title, xlabel="weights kept, %", ylabel=label, log=False
        )
        return html.figure(drawing)

    timed = sorted((r for r in results if r.latency), key=lambda r: r.budget)

    def speed(batch):
        names = (library.DEPLOYED, "ours", "two matmuls", "dense")
        found = {
            name: [
                plots.Point(r.budget * 100, r.latency[batch][name][1], *r.latency[batch][name][::2])
                for r in timed
            ]
            for name in names
        }
        return html.figure(
            plots.line_plot(
                found,
                title=f"Latency, {batch}",
                xlabel="weights kept, %",
                ylabel="milliseconds",
                log=False,
            )
        )

    fidelity_headers, fidelity_rows = fidelity_table(results)
    latency_headers, latency_rows = latency_table(results)
    return [
        html.verdict([*lines, saved]),
        html.section(
            "How close the embeddings stay",
            html.grid(
                line("Cosine to the original", lambda r: r.cosine, "mean cosine, held-out"),
                line("Similarities keep their order", lambda r: r.spearman, "Spearman"),
            ),
            html.table(fidelity_headers, fidelity_rows, numeric=range(2, 8)),
            lead=(
                f"all-MiniLM-L6-v2, {counts[1]} held-out sentences of Python's documentation; "
                f"{counts[0]} others calibrate the data-aware initialisation. No fine-tuning."
            ),
        ),
        html.section(
            "How fast it is",
            html.grid(*(speed(batch) for batch in BATCHES)),
            html.table(latency_headers, latency_rows, numeric=range(2, 8)),
            lead="Interleaved runs of whole forward passes; median, and 20th to 80th percentile. "
            "Ratios above 1 mean that ours is faster. Dense layers are nn.Linear as they are.",
        ),
    ]


def print_tables(results):
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for title, (headers, body) in (
        ("Fidelity on held-out text, and size", fidelity_table(results)),
        ("Latency of the whole model", latency_table(results)),
    ):
        table = Table(title=title, title_justify="left")
        for i, header in enumerate(headers):
            table.add_column(header, justify="left" if i < 2 else "right")
        for row in body:
            table.add_row(*row)
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    calibration, held_out = library.split(library.sentences(), args.calibration, args.held_out)
    (args.out / "calibration.txt").write_text("\n".join(calibration) + "\n", encoding="utf-8")
    encoder = library.load_encoder(library.BUNDLED)
    device = hardware.current_device()
    with progress() as bar:
        steps = 2 * len(args.budgets)
        task = bar.add_task("starting", total=steps)

        def advance(text):
            bar.update(task, description=text, advance=1)

        results = sweep(encoder, args, calibration, held_out, advance)
        bar.update(task, description="sentence encoder done", completed=steps)
    stamp = {"device": device.name, "threads": torch.get_num_threads(),
             "versions": hardware.versions()}  # fmt: skip
    lines = [r.to_json(**stamp) for r in results]
    (args.out / "encoder.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    saved = save_and_reload(encoder, args, results, held_out)
    measured: list[rows.Row] = []
    if not args.quick:
        with progress() as bar:
            task = bar.add_task("kernels", total=None)
            measured = kernel_suite(args, lambda text: bar.update(task, description=text))
        (args.out / "rows.jsonl").unlink(missing_ok=True)
        rows.append(args.out / "rows.jsonl", measured)
    answer = library.verdict(results)
    sections = encoder_sections(results, answer, saved, (len(calibration), len(held_out)))
    if measured:
        sections += [html.section("The kernels on their own"), *report.sections(measured)]
    page = args.out / "report.html"
    subtitle = f"{device.name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title = "A sentence encoder at low rank"
    page.write_text(html.page(title, sections, subtitle=subtitle), encoding="utf-8")
    print()
    print_tables(results)
    print("\n".join(["", "Verdict", *(f"- {line}" for line in [*answer, saved])]))
    if measured:
        print("\n".join(["", "Kernels", *(f"- {line}" for line in kernel_verdict(measured))]))
    print(f"\nmodel    {args.out / 'compressed'}\nrows     {args.out / 'encoder.jsonl'}")
    print(f"report   {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
