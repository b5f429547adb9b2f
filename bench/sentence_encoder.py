"""The main job: `make bench`. Factorise a real sentence encoder, measure it, write a report.

python -m bench.sentence_encoder --out out [--budgets 0.9 0.8 0.7 0.5] [--quick]

Every part is guarded: the report comes out whatever fails and names it; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import encoder_forms as forms
from bench import encoder_page as page
from bench import encoder_results as results
from bench.encoder_results import DEPLOYED, Form
from bench.stages import Stages
from examples import encoder_texts as judging
from examples.published import origin, stamp
from maestro_kernels import load_pretrained, summary
from maestro_kernels.backends import native
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.benchmark import report, rows
from maestro_kernels.benchmark import run as kernels
from maestro_kernels.benchmark.cases import suite
from maestro_kernels.benchmark.summary import verdict as kernel_verdict
from maestro_kernels.cli import main as command_line
from maestro_kernels.measure import report as html

# What each part takes on two cores, in seconds.
PLAN = {
    "factorise the encoder": 15,
    "search ranks by measured loss": 40,
    "compare embeddings": 90,
    "time whole models": 100,
    "save, reload, compare": 20,
    "kernels on their own": 75,
    "write the report": 5,
}
SECONDS_QUICK = 1.0
# Sentences of the large batch that is timed, and of those that embeddings are made of.
LARGE = 64
TELL_EVERY = 10.0
DTYPES = (torch.float32, torch.bfloat16)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; --quick makes everything small."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sentence_encoder", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--calibration", type=int, default=512, help="sentences")
    parser.add_argument("--measured", type=int, default=64, help="of these, to measure losses on")
    parser.add_argument("--passes", type=int, default=80, help="of the refinement, per budget")
    parser.add_argument("--held-out", type=int, default=256, help="sentences")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing per batch size")
    parser.add_argument("--quick", action="store_true", help="one budget, few sentences, no suite")
    args = parser.parse_args(argv)
    if args.quick:
        args.budgets, args.calibration, args.measured, args.held_out = [0.8], 64, 16, 64
        args.seconds = SECONDS_QUICK
    wrong = [b for b in args.budgets if not 0 < b <= 1]
    if wrong:
        parser.error(f"--budgets: expected fractions in (0, 1], got {wrong[0]}")
    if not 0 < args.measured < args.calibration:
        parser.error(
            f"--measured: expected 1 to {args.calibration - 1} of the calibration sentences, "
            f"got {args.measured}"
        )
    return args


class Job:
    """The parts of the job and what they leave for each other."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.forms: list[Form] = []
        self.notes: list[str] = []
        self.models: dict[int, torch.nn.Module] = {}
        self.told = time.monotonic()
        self.stamp = stamp()
        args.out.mkdir(parents=True, exist_ok=True)
        isa = "no-library" if native.load_error() else native.isa(torch.bfloat16)
        self.file = results.file_name(self.stamp, isa)
        calibration, self.held_out = judging.split(
            judging.sentences(), args.calibration, args.held_out
        )
        self.encoder = library.load_encoder(library.BUNDLED)
        # Ordered by hash, the first ones are a sample of all lengths.
        self.measured = calibration[: args.measured]
        self.calibration = judging.by_length(self.encoder, calibration)
        ordered = judging.by_length(self.encoder, self.held_out)
        # Each batch is like the one that is timed, so that layers choose their forms once.
        count = -(-len(ordered) // LARGE)
        self.held_out = [text for k in range(count) for text in ordered[k::count]]
        large = [ordered[k * len(ordered) // LARGE] for k in range(LARGE)]
        self.batches = {1: [ordered[len(ordered) // 2]], LARGE: large}
        text = "\n".join(self.calibration) + "\n"
        (args.out / "calibration.txt").write_text(text, encoding="utf-8")
        text = "\n".join(self.held_out) + "\n"
        (args.out / "held-out.txt").write_text(text, encoding="utf-8")

    def bfloat16(self) -> bool:
        """Whether forms in bfloat16 are worth measuring here."""
        self.slowdown = forms.bfloat16_slowdown(self.encoder, self.calibration)
        if self.slowdown > forms.TOO_SLOW:
            self.notes.append(
                f"bfloat16 is left out: a pass takes {self.slowdown:.0f} times as long as in "
                "float32 on this CPU, which only emulates it."
            )
        return self.slowdown <= forms.TOO_SLOW

    def baseline(self) -> bool:
        """The original's embeddings, and the dtypes worth comparing."""
        self.original = self.embed(self.encoder.model)
        self.dtypes = DTYPES if self.bfloat16() else DTYPES[:1]
        return True

    def factors(self, _: object) -> dict[str, torch.nn.Module]:
        """The encoder in factors of full rank, by initialisation."""
        return {i: forms.full_rank(self.encoder, self.calibration, i) for i in ("data", "svd")}

    def search(self, _: object) -> forms.Search:
        """Ranks for every budget."""
        dtype = forms.search_dtype(self.slowdown)
        # Without fast bfloat16 a pass takes longer, and the search is to take a minute at most.
        count = len(self.measured) // (1 if dtype == torch.bfloat16 else 2)
        known = set(self.measured)
        found = forms.search_ranks(
            self.encoder,
            [text for text in self.calibration if text not in known],
            self.measured[:count],
            self.args.budgets,
            dtype=dtype,
            passes=self.args.passes,
            progress=self.tell,
        )
        self.notes.append(str(found))
        return found

    def embed(self, model: torch.nn.Module) -> torch.Tensor:
        """Unit vectors of the held-out sentences."""
        return self.encoder.embed(self.held_out, model, LARGE)

    def tell(self, text: str, done: int, total: int) -> None:
        """Progress of the search, now and then."""
        if time.monotonic() - self.told > TELL_EVERY:
            self.told = time.monotonic()
            self.show(f"search: {text} ({done} of {total})")

    def add(
        self, model: torch.nn.Module, ranks: str, budget: float, init: str, dtype: str, run: str
    ) -> None:
        """Compare a model's embeddings with the original's and keep both."""
        self.show(f"embeddings: {ranks} {budget:.0%} {init} {dtype}")
        close = judging.fidelity(self.embed(model), self.original)
        sizes = summary(self.encoder.model if ranks == "dense" else model)
        form = Form(
            ranks, budget, init, dtype, run, close.cosine, close.worst, close.spearman,
            sizes.weights, sizes.dense_weights, sizes.parameters, sizes.macs,
        )  # fmt: skip
        self.models[len(self.forms)] = model
        self.forms.append(form)

    def dense(self, _: object) -> bool:
        """torch's own forms."""
        for dtype in self.dtypes:
            model = forms.in_dtype(self.encoder.model, dtype)
            self.add(model, "dense", 1.0, "", _name(dtype), "nn.Linear")
        quantized, why = forms.int8(self.encoder.model)
        if quantized is None:
            self.notes.append(f"Dense int8 is left out: {why}.")
        else:
            self.add(quantized, "dense", 1.0, "", "int8", f"dynamic, {why}")
        return True

    def uniform(self, full: dict[str, torch.nn.Module]) -> bool:
        """Ours at one share for every layer."""
        for budget in self.args.budgets:
            for init, one in full.items():
                small = forms.at_ranks(self.encoder, one, forms.uniform_ranks(one, budget))
                self.factorised(small, "uniform", budget, init)
        return True

    def searched(self, full: dict[str, torch.nn.Module], found: forms.Search) -> bool:
        """Ours at the ranks of the search."""
        for budget, allocation in found.allocations.items():
            small = forms.at_ranks(self.encoder, full["data"], allocation)
            self.factorised(small, "searched", budget, "data")
        return True

    def factorised(self, small: torch.nn.Module, ranks: str, budget: float, init: str) -> None:
        """One factorised model in every dtype, and for searched ranks as two matmuls."""
        for dtype in self.dtypes if init == "data" else DTYPES[:1]:
            model = forms.in_dtype(small, dtype)
            self.add(forms.deployed(model), ranks, budget, init, _name(dtype), DEPLOYED)
            if ranks == "searched":
                self.models[len(self.forms)] = forms.plain_pairs(model)
                self.forms.append(replace(self.forms[-1], run="two matmuls"))

    def latency(self, _: object) -> bool:
        """All forms in turns, at each batch size."""
        timed = {str(i): m for i, m in self.models.items() if self.forms[i].init != "svd"}
        found: dict[int, dict[str, tuple[float, float, float]]] = {int(i): {} for i in timed}
        for batch in results.BATCHES:
            tokens = self.encoder.tokens(self.batches[int(batch.removeprefix("batch "))])
            shape = "x".join(map(str, tokens["input_ids"].shape))
            self.show(f"timing {len(timed)} models at {batch}, {shape} tokens")
            with forms.quietly():
                stats = judging.latencies(timed, tokens, self.args.seconds)
            for i, s in stats.items():
                found[int(i)][batch] = (s.p20 * 1e3, s.p50 * 1e3, s.p80 * 1e3)
        for i, latency in found.items():
            self.forms[i] = replace(self.forms[i], latency=latency)
        return True

    def save_and_reload(self) -> str:
        """Save with `maestro-kernels compress`, reload into a fresh model, compare embeddings."""
        budget, folder = max(self.args.budgets), self.args.out / "compressed"
        command = ["compress", library.BUNDLED, "--budget", str(budget), "--init", "data"]
        command += ["--data", str(self.args.out / "calibration.txt"), "--require", "0"]
        command += ["--held-out", str(self.args.out / "held-out.txt")]
        command += ["--out", str(folder), "--group"]
        self.console.print("$ maestro-kernels " + shlex.join(command))
        with contextlib.redirect_stdout(io.StringIO()) as summary_of_layers:
            if command_line(command) != 0:
                raise RuntimeError("the compress command failed")
        self.console.print(summary_of_layers.getvalue().splitlines()[-1])
        first, second = (
            self.embed(load_pretrained(folder, library.load_encoder(library.BUNDLED).model))
            for _ in range(2)
        )
        small = library.factorised(self.encoder, budget, "data", self.calibration)
        made = self.embed(small)
        difference = max(float((first - made).abs().max()), float((first - second).abs().max()))
        if difference > 1e-5:
            raise RuntimeError(f"the reloaded model's embeddings differ by {difference:.1e}")
        exact = "bit for bit" if difference == 0 else f"to {difference:.0e}"
        return f"Saved at {budget:.0%}, reloaded into a fresh model: same embeddings {exact}."

    def kernels(self) -> list[rows.Row]:
        """The quick suite of the kernel benchmark."""
        options = kernels.Options(
            "cpu", 1.5, compiled=True, command="python -m bench.sentence_encoder"
        )
        found = list(
            kernels.run(
                suite("quick"), options, on_case=lambda case: self.show(f"kernels: {case.source}")
            )
        )
        path = self.args.out / f"{self.file}.jsonl"
        path.unlink(missing_ok=True)
        rows.append(path, found)
        return found

    def save_rows(self) -> Path:
        """The forms, with the machine and what the search took."""
        path = self.args.out / f"{self.file}-encoder.jsonl"
        results.save(path, self.forms, {**self.stamp, "notes": self.notes})
        return path

    def show(self, text: str) -> None:
        """One line that says what happens now."""
        self.console.print(text, style="dim")


def run(job: Job, stages: Stages) -> int:
    """All parts in order, then the report of those that worked; the exit status."""
    args, console = job.args, job.console
    base = stages.run("embed the original", job.baseline)
    full = stages.run("factorise the encoder", job.factors, base)
    found = stages.run("search ranks by measured loss", job.search, full)
    dense = stages.run("compare embeddings: dense", job.dense, base)
    parts = [
        stages.run("compare embeddings: uniform ranks", job.uniform, full),
        stages.run("compare embeddings: searched ranks", job.searched, full, found),
    ]
    stages.run("time whole models", job.latency, dense or next(filter(None, parts), None))
    job.models.clear()
    saved = stages.run("save, reload, compare", job.save_and_reload)
    measured = None if args.quick else stages.run("kernels on their own", job.kernels)
    path = stages.run("write the rows", job.save_rows) if job.forms else None
    answer = results.verdict(job.forms) if job.forms else []
    notes = [*job.notes, *([saved] if saved else [])]
    counts = (len(job.calibration), len(job.held_out))
    written = stages.run(
        "write the report", lambda: write_report(job, answer, notes, counts, measured, stages)
    )
    if job.forms:
        print_table(job.forms, console)
    say = console.print
    say("\n".join(["", "Verdict", *(f"- {line}" for line in [*answer, *notes])]))
    if measured:
        say("\n".join(["", "Kernels", *(f"- {line}" for line in kernel_verdict(measured))]))
    if stages.failed:
        say("\n".join(["", "Failed", *(f"- {line}" for line in stages.failed)]))
    say(f"\nrows     {path}\nreport   {written}")
    return int(bool(stages.failed))


def write_report(
    job: Job,
    answer: Sequence[str],
    notes: Sequence[str],
    counts: tuple[int, int],
    measured: list[rows.Row] | None,
    stages: Stages,
) -> Path:
    """One page with whatever was found and whatever failed."""
    sections = [html.warning(line) for line in stages.failed]
    sections += page.sections(job.forms, answer, notes, counts)
    if measured:
        sections += [html.section("The kernels on their own"), *report.sections(measured)]
    path: Path = job.args.out / "report.html"
    title = "A sentence encoder at low rank"
    path.write_text(html.page(title, sections, subtitle=origin(job.stamp)), encoding="utf-8")
    return path


def print_table(found: Sequence[Form], console: Console) -> None:
    """The table of all forms."""
    headers, body = results.table(found)
    table = Table(title="The encoder in all its forms", title_justify="left")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < 3 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print(table)


def announce(args: argparse.Namespace, show: Callable[[str], None]) -> None:
    """What will happen and about how long it takes."""
    plan = {k: v for k, v in PLAN.items() if not (args.quick and k.startswith("kernels"))}
    minutes = sum(plan.values()) / 60
    long = "about a minute" if args.quick else f"about {minutes:.0f} minutes"
    show(f"{', '.join(plan)}: {long} on 2 cores, report in {args.out / 'report.html'}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> int:
    """Run the job; 0 when every part came to its end, 1 when one failed."""
    args = parse(argv)
    console = Console(
        width=None if sys.stdout.isatty() else 180, highlight=False, soft_wrap=True, markup=False
    )
    announce(args, console.print)
    job = Job(args, console)
    return run(job, Stages(args.out / "failures.log", console.print))


if __name__ == "__main__":
    sys.exit(main())
