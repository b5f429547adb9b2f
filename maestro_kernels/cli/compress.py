"""`maestro-kernels compress`: factorise a model's linear layers to a budget and save it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from maestro_kernels.cli import options
from maestro_kernels.cli.output import about, say
from maestro_kernels.measure.wording import count

# FLOP per second of a decomposition in float64 and of a model on two cores without AVX-512: good
# enough to say how long, and rather too long.
_SVD_RATE, _MODEL_RATE = 1e10, 6e10


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "compress",
        help="factorise a transformer's linear layers to a budget and save it",
        description=(
            "Factorise every linear layer that gets smaller by it, keep the rest, and write the "
            "model as safetensors and JSON. Nothing is fetched from a network."
        ),
        epilog=(
            "example: maestro-kernels compress minilm --budget 0.5 --init data "
            "--data sentences.txt --out small"
        ),
    )
    command.add_argument("model", help="a Hugging Face folder, or minilm for the bundled encoder")
    command.add_argument(
        "--budget",
        type=float,
        required=True,
        metavar="FRACTION",
        help="fraction of each linear layer's weights to keep, 0 < FRACTION <= 1",
    )
    command.add_argument(
        "--init",
        choices=("svd", "data"),
        default="svd",
        help="svd: the weights alone; data: weighted by what the layers see (needs --data)",
    )
    command.add_argument(
        "--data",
        type=options.text_file,
        metavar="FILE",
        help="calibration text, one sentence per line",
    )
    command.add_argument(
        "--out",
        type=options.new_folder,
        required=True,
        metavar="DIR",
        help="folder to write, new or replaced",
    )
    command.add_argument("--group", action="store_true", help="run q/k/v and gate/up grouped")
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, factorise, save, print the summary."""
    from maestro_kernels.benchmark import encoder as library
    from maestro_kernels.nn import group, save_pretrained, summary
    from maestro_kernels.nn.serialization import check_destination

    texts = _read(args.data, args.init)
    if not 0 < args.budget <= 1:
        raise ValueError(f"compress: --budget: expected 0 < FRACTION <= 1, got {args.budget}")
    check_destination(args.out, hub=True)
    say("compress", f"reading {args.model}")
    encoder = library.load_encoder(args.model)
    layers = [m for m in encoder.model.modules() if isinstance(m, torch.nn.Linear)]
    say(
        "compress",
        f"factorising {count(len(layers), 'linear layer')}, {about(_seconds(layers, len(texts)))}",
    )
    model = library.factorised(encoder, args.budget, args.init, texts)
    if args.group:
        group(model)
    folder = save_pretrained(model, args.out)
    report = summary(model)
    if args.json:
        record = {"folder": str(folder), "budget": args.budget, "init": args.init}
        print(json.dumps({**record, **report.to_dict()}))
    else:
        print(report)
        print(f"\nsaved    {folder}")
    return 0


def _seconds(layers: list[torch.nn.Linear], texts: int) -> float:
    """About how long factorising takes: one SVD a layer, and the model run on the texts twice."""
    sizes = [layer.weight.shape for layer in layers]
    svd = sum(20 * N * K * min(N, K) for N, K in sizes)
    data = sum(2 * N * K for N, K in sizes) * 40 * 2 * texts
    return svd / _SVD_RATE + data / _MODEL_RATE


def _read(path: Path | None, init: str) -> list[str]:
    if init != "data":
        return []
    if path is None:
        raise ValueError("compress: --data: expected a text file for --init data, got none")
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"compress: --data: expected UTF-8 text in {str(path)!r}, got other bytes"
        ) from None
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"compress: --data: expected sentences in {str(path)!r}, got none")
    return texts
