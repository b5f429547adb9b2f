"""Peak memory of `maestro-kernels compress` on a model with random weights in bfloat16.

    python -m bench.compress_memory [--model gpt2-xl] [--folder DIR] [-- more options of compress]

Makes the model from its configuration in a process of its own, runs the command in another, and
prints the most memory that it held (resident, files that it maps included) beside the model's size.
"""

from __future__ import annotations

import argparse
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
# Of this process alone. What wait() tells of a child counts the parent, too, as it was before.
_RUN = """
import sys
from pathlib import Path
from maestro_kernels.cli import main
status = main(sys.argv[1:])
print(*[line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")], end="")
sys.exit(status)
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
        command = [sys.executable, "-c", _RUN, "compress", str(dense)]
        command += [*(args.options or ["--params", "0.6"]), "--out", str(small)]
        begin = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return 1
        lines = done.stdout.splitlines()
        peak = 1024 * int(lines[-1].split()[1])  # kB, as Linux writes it
        size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
        print(f"{args.model}: {next(line for line in lines if 'are left' in line)}")
        print(
            f"peak {peak / 1e9:.2f} GB for a model of {size / 1e9:.2f} GB "
            f"({peak / size:.2f} times) in {time.monotonic() - begin:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
