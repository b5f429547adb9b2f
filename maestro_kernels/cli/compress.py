"""`maestro-kernels compress`: a smaller model from a Hugging Face folder, judged and saved."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestro_kernels.cli import options
from maestro_kernels.cli.output import about, progress, say
from maestro_kernels.measure.wording import count

if TYPE_CHECKING:
    from maestro_kernels.compression import Compression, Plan

# FLOP per second of a decomposition in float64 and of a model on two cores without AVX-512: good
# enough to say how long, and rather too long.
_SVD_RATE, _MODEL_RATE = 1e10, 6e10
_UNITS = {
    None: 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_TEXT = """\
Factorise the linear layers of a saved transformers model to a budget and write a smaller model:
encoders, causal language models, seq2seq, vision and speech models, as their config.json says.
Dtype, head, tokenizer or processor and generation config are kept; nothing is fetched from a
network. The result is read by AutoModelFor....from_pretrained after `import maestro_kernels`.
"""
_EPILOG = """\
--data is a text file, one text a line (seq2seq: source and target with a tab between), a folder of
images (sub-folders named as the model's classes tell what is right), or a folder of .wav files.
A fifth of it is kept to judge the result: by the cosine of embeddings to the dense model's,
perplexity, or how often the most probable answer is still the dense model's. A result that is not
good enough (cosine or agreement below 0.8, more than twice the perplexity; see --require) is
written, said to fail, and the exit status is 1.

A killed run goes on where it was when the same command is given again.

examples:
  maestro-kernels compress minilm --params 0.6 --data sentences.txt --out small
  maestro-kernels compress ./llama --memory 0.7 --data text.txt --recover 500 --out small
"""


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "compress",
        help="make a saved transformers model smaller, judge it and save it",
        description=_TEXT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="a Hugging Face folder, or minilm for the bundled encoder")
    command.add_argument(
        "--out",
        type=options.new_folder,
        required=True,
        metavar="DIR",
        help="folder to write, new or an earlier result",
    )
    _add_budgets(command)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data", type=_readable, metavar="PATH", help="what to calibrate and judge with; see below"
    )
    data.add_argument(
        "--held-out", type=_readable, metavar="PATH", help="judge with this, not a part of --data"
    )
    data.add_argument(
        "--samples",
        type=_whole,
        metavar="N",
        help="use at most N of its inputs; default: 4096 texts, 128 sequences of 512 tokens for a "
        "language model, 1024 images, 64 recordings",
    )
    quality = command.add_argument_group("quality")
    quality.add_argument(
        "--init",
        choices=("svd", "data"),
        help="svd: factors of the weights alone; data: weighted by what the layers see in --data; "
        "default: data where there is --data",
    )
    quality.add_argument(
        "--passes",
        type=_natural,
        metavar="N",
        help="measure the whole model at most N times to choose ranks; default with --data: 16 and "
        "4 a layer, none above 300 million weights",
    )
    quality.add_argument(
        "--recover",
        type=_whole,
        default=0,
        metavar="STEPS",
        help="then train the result to answer as the dense model does on --data",
    )
    quality.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="of the order in which it is trained"
    )
    quality.add_argument(
        "--require",
        type=_fraction,
        metavar="QUALITY",
        help="what passes: the least cosine or agreement, or the dense model's perplexity over the "
        "result's; 0 accepts any",
    )
    command.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="of the files written, such as 5GB"
    )
    command.add_argument("--group", action="store_true", help="run q/k/v and gate/up grouped")
    command.add_argument("--json", action="store_true", help="print all figures as JSON")
    command.set_defaults(run=run)


def _add_budgets(command: Any) -> None:
    budgets = command.add_argument_group(
        "budget, one of", "layers share it by what each of them loses"
    ).add_mutually_exclusive_group(required=True)
    for name, metavar, kind, text in (
        ("--params", "FRACTION", _share, "of the weights of the layers that can be factorised"),
        ("--macs", "FRACTION", _share, "of their multiply-adds for one input"),
        ("--memory", "SIZE", _memory, "bytes of the whole model, 500MB or 1.2GB; or a fraction"),
        ("--speedup", "X", options.positive, "times as fast as now for one input, measured here"),
        ("--latency", "MS", options.positive, "milliseconds for one input, measured here"),
    ):
        budgets.add_argument(name, type=kind, metavar=metavar, help=text)
    text = "of the weights of every single layer: not shared, no search"
    budgets.add_argument("--budget", type=float, metavar="FRACTION", help=text)


def run(args: argparse.Namespace) -> int:
    """Compress, print the figures; 1 when the result is not good enough."""
    from maestro_kernels.compression import Options, check, compress

    budget, memory = _budget(args)
    args.init = args.init or ("svd" if args.data is None else "data")
    asked = Options(
        args.model,
        args.out,
        budget,
        memory,
        args.data,
        args.held_out,
        args.init,
        args.samples,
        args.passes,
        args.recover,
        args.seed,
        args.group,
        args.require,
        args.max_shard_size,
    )
    check(asked)
    say("compress", f"reading {args.model}")
    with progress("compress") as advance:
        done = compress(asked, planned=lambda plan: _say_plan(plan, args), advance=advance)
    if args.json:
        print(json.dumps({"folder": str(done.folder), **done.record}))
    else:
        print(done.summary)
        print("\n" + "\n".join(_verdict(done, args)))
        print(f"\nsaved    {done.folder}")
    return 0 if done.evaluation is None or done.evaluation.passed else 1


def _budget(args: argparse.Namespace) -> tuple[Any, float | None]:
    """The budget, or the fraction of the model's bytes."""
    from maestro_kernels import search

    if args.budget is not None:
        if not 0 < args.budget <= 1:
            raise ValueError(f"compress: --budget: expected 0 < FRACTION <= 1, got {args.budget}")
        return args.budget, None
    if args.memory is not None:
        size, is_fraction = args.memory
        return (None, size) if is_fraction else (search.Memory(size), None)
    for kind in (search.Params, search.MACs, search.Speedup, search.Latency):
        value = getattr(args, kind.__name__.lower())
        if value is not None:
            return kind(value), None
    raise AssertionError("argparse wants one")


def _say_plan(plan: Plan, args: argparse.Namespace) -> None:
    sizes = [(layer.N, layer.K) for layer in plan.layers.values()]
    data, inputs = plan.data, 0
    if data is not None:
        inputs = data.judged + 32 * plan.passes + (data.inputs if args.init == "data" else 0)
        # Of a language model one is as long as four texts.
        inputs *= 4 if data.noun == "sequence" else 1
    text = (
        f"{plan.architecture.name} with {plan.weights / 1e6:.1f} million weights; factorising "
        f"{count(len(sizes), 'layer')}"
    )
    if data is not None:
        text += f" with {count(data.inputs, data.noun)}, judging with {data.judged:,}"
    if plan.passes:
        text += f", choosing ranks by at most {plan.passes} measurements of the model"
    more = ", without the distillation" if args.recover else ""
    say("compress", f"{text}: {about(_seconds(sizes, inputs))}{more}")


def _seconds(sizes: Iterable[tuple[int, int]], inputs: int) -> float:
    """About how long factorising takes: a decomposition a layer, the model run on the inputs."""
    sizes = list(sizes)
    svd = sum(20 * N * K * min(N, K) for N, K in sizes)
    data = sum(2 * N * K for N, K in sizes) * 128 * inputs
    return svd / _SVD_RATE + data / _MODEL_RATE


def _verdict(done: Compression, args: argparse.Namespace) -> list[str]:
    """What came out, in plain words."""
    before, after = (size / 1e6 for size in done.bytes)
    share = done.summary.weights / max(done.summary.dense_weights, 1)
    lines = [
        f"{share:.1%} of the weights of its linear layers are left; the model has {after:.1f} MB, "
        f"{after / before:.1%} of {before:.1f} MB."
    ]
    trained = done.record["recovered"]
    if trained is not None:
        lines.append(
            f"It was distilled for {count(trained['steps'], 'step')}; its best state was that of "
            f"step {trained['best_step']}."
        )
    found = done.evaluation
    if found is None:
        return [*lines, "It was not judged: that takes --data."]
    lines.append(str(found))
    if not found.passed:
        ways = ["a larger budget"]
        ways += [] if args.init == "data" else ["--init data"]
        ways += ["more steps of --recover" if args.recover else "--recover STEPS"]
        lines.append(f"It was saved all the same. What helps: {', '.join(ways)}.")
    return lines


# --- values of options -----------------------------------------------------------------------


def _readable(text: str) -> Path:
    return Path(text) if Path(text).is_dir() else options.text_file(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 < FRACTION <= 1, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= QUALITY <= 1, got {text!r}")
    return value


def _memory(text: str) -> tuple[float, bool]:
    """Bytes, or a fraction of the model's and True."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*((?:[KMG]I?)?B)?\s*", text.upper())
    value = _number(found[1]) if found else 0.0
    if not found or not value > 0 or not (found[2] or value <= 1 or value >= 1000):
        raise argparse.ArgumentTypeError(
            f"expected a size like 500MB or 1.2GB, or 0 < FRACTION <= 1, got {text!r}"
        )
    if found[2] is None and value <= 1:
        return value, True
    return value * _UNITS[found[2]], False


def _size(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(KB|MB|GB|KiB|MiB|GiB)", text):
        raise argparse.ArgumentTypeError(f"expected a size like 500MB or 5GB, got {text!r}")
    return text


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)
