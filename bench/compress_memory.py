"""Peak memory of `maestro-kernels compress` on a model with random weights in bfloat16.

    python -m bench.compress_memory [--model gpt2-xl] [--folder DIR] [-- more options of compress]

Makes the model from its configuration in a process of its own, runs the command in another, and
prints the most memory that it held (resident, files that it maps included) beside the model's size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CONFIGS = {
    # The sizes of Llama 3.2 1B.
    "llama-1b": "LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, "
    "num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256, "
    "tie_word_embeddings=True)",
    "gpt2-xl": "GPT2Config(n_embd=1600, n_layer=48, n_head=25)",
    "tiny": "LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, "
    "num_attention_heads=4, vocab_size=99)",
}
_MAKE = """
import sys, torch, transformers
config = eval("transformers." + sys.argv[1])
torch.set_default_dtype(torch.bfloat16)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config)
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""


def main(argv: list[str] | None = None) -> int:
    """Make, compress, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=_CONFIGS, default="llama-1b")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("options", nargs="*", help="of compress; default: --params 0.6")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense, small = Path(folder) / "dense", Path(folder) / "small"
        make = [sys.executable, "-c", _MAKE, _CONFIGS[args.model], str(dense)]
        subprocess.run(make, check=True, capture_output=True)
        command = [sys.executable, "-m", "maestro_kernels", "compress", str(dense)]
        command += [*(args.options or ["--params", "0.6"]), "--out", str(small)]
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            lines = process.stdout.read().splitlines()
        # Of this process alone; what made the model is not in it.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            return 1
        size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
        print(f"{args.model}: {next(line for line in lines if 'are left' in line)}")
        print(
            f"peak {used.ru_maxrss * 1024 / 1e9:.2f} GB for a model of {size / 1e9:.2f} GB "
            f"({used.ru_maxrss * 1024 / size:.2f} times) in {time.monotonic() - begin:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
