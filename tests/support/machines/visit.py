"""What is run on each machine, in one process: see __init__.py. Writes step -> "ok" or the problem.

Nothing of torch or of the package is imported before the machine is in place.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path

PLAIN, NONE = "as it is", "none"
record = json.loads(sys.argv[1])
machine = record["machine"]


class Without:
    """Python's own finder, blind to some modules and distributions, as where they are missing."""

    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        for found in self.finder.find_distributions(context):
            if str(found.metadata["Name"]).replace("-", "_") not in self.hidden:
                yield found

    def __getattr__(self, name):
        return getattr(self.finder, name)


class NoDistribution(Without):
    """Hides that the package is installed, not the package: its modules are still found."""

    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target)


def hide():
    modules = {n.lower() for n in ("Triton", "matplotlib") if machine[n] == NONE}
    finders = []
    for finder in sys.meta_path:
        if getattr(finder, "__name__", "") == "PathFinder":
            finder = Without(finder, modules)
            if machine["installed"] == "no":
                finder = NoDistribution(finder, {"maestro_kernels"})
        elif machine["installed"] == "no" and "editable" in repr(finder):
            continue
        finders.append(finder)
    sys.meta_path[:] = finders
    if machine["HOME"] == "unset":
        # A container's `--user 1234`: no HOME and no account to ask either.
        import pwd

        def no_account(uid):
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        pwd.getpwuid = no_account


hide()

import torch  # noqa: E402

import maestro_kernels as mk  # noqa: E402
from maestro_kernels import hardware  # noqa: E402
from maestro_kernels.backends import native, onednn, packed  # noqa: E402
from maestro_kernels.cli import main  # noqa: E402
from maestro_kernels.testing import assert_accurate, make_inputs  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (bfloat16, float16) linears of oneDNN under each cap, and how it calls the cap.
ONEDNN = {
    "AVX2": ((False, False), "Intel AVX2"),
    "AVX512_CORE": ((True, False), "AVX512BW, AVX512VL, and AVX512DQ extensions"),
    "AVX512_CORE_BF16": ((True, False), "bfloat16 support"),
}


def cap_of_onednn():
    """How oneDNN names the instruction set it uses: it only says so to the process's output."""
    sys.stdout.flush()
    with open("verbose.txt", "w+b") as file:
        keep = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                packed_weight = onednn.reorder(torch.ones(8, 8), 8)
                onednn.linear(torch.ones(8, 8), packed_weight, None)
        finally:
            ctypes_flush()
            os.dup2(keep, 1)
            os.close(keep)
        file.seek(0)
        lines = file.read().decode().splitlines()
    return next((line.partition("isa:")[2] for line in lines if ",isa:" in line), "")


def ctypes_flush():
    import ctypes

    ctypes.CDLL(None).fflush(None)


def caps():
    """The machine is the one that was asked for."""
    cap = machine["oneDNN"]
    if cap != PLAIN:
        takes, words = ONEDNN[cap]
        assert tuple(onednn.unsupported(d) is None for d in DTYPES[1:]) == takes
        found = cap_of_onednn()
        assert found.endswith(words), found
    if machine["ATen"] != PLAIN:
        assert torch.backends.cpu.get_cpu_capability().lower() == machine["ATen"]
    if machine["library"] == NONE:
        assert native.load_error()
    elif machine["library"] != PLAIN:
        isas = [native.isa(dtype) for dtype in DTYPES]
        assert machine["library"] in isas, isas
        assert not any("amx" in isa for isa in isas), isas
    if machine["cores"] == "1":
        assert torch.get_num_threads() == len(os.sched_getaffinity(0)) == 1
    for trait in ("Triton", "matplotlib"):
        if machine[trait] == NONE:
            import importlib.util

            assert importlib.util.find_spec(trait.lower()) is None
    if machine["compiler"] == NONE:
        assert not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang", "nvcc")))
    if machine["HOME"] == "unset":
        with contextlib.suppress(RuntimeError):
            raise AssertionError(Path.home())
    elif machine["HOME"] == "read-only":
        with contextlib.suppress(OSError):
            (Path.home() / ".cache").mkdir()
            raise AssertionError("HOME can be written")
    assert sys.stdout.isatty() == (machine["terminal"] == "yes")
    if machine["installed"] == "no":
        assert hardware.libraries()["maestro_kernels"] == "not installed"


def command(*arguments):
    """One command ends with status 0; returns what it printed."""
    printed = io.StringIO()

    class Both:
        """The real stream, and a copy of what went there."""

        def __init__(self, stream):
            self.stream = stream

        def write(self, text):
            printed.write(text)
            return self.stream.write(text)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    with contextlib.redirect_stdout(Both(sys.stdout)), contextlib.redirect_stderr(Both(sys.stderr)):
        status = main([str(a) for a in arguments])
    assert status == 0, f"status {status}: {printed.getvalue()[-500:]}"
    return printed.getvalue()


def info():
    text = command("info")
    assert "auto runs on" in text
    assert ("native     available" in text) == (native.load_error() is None)
    json.loads(command("info", "--json"))


def explain():
    for dtype in DTYPES:
        x, u, v, bias = make_inputs(4, 48, 64, 16, dtype=dtype)
        explanation = mk.explain(x, u, v, bias, rank=8)
        assert "at best   not known" in str(explanation)
        # A probe of the peak takes a second, so those of the dtypes that are timed anyway.
        if str(dtype).removeprefix("torch.") not in record["dtypes"]:
            continue
        assert explanation.seconds > 0
        assert "at best" in str(explanation)
        assert "measured peaks" in str(explanation)


def bench():
    arguments = ["bench", "--suite", "quick", "--shape", "4,48,64,16,8", "--seconds", "0.01"]
    for name in record["dtypes"]:
        arguments += ["--dtype", name]
    # Without a compiler the compiled baselines end at once and must cost nothing else.
    if machine["compiler"] != NONE:
        arguments.append("--no-compile")
    text = command(*arguments, "--out", "bench")
    assert "command line" in text, "no table"
    assert "Against two plain matmuls" in text, "no verdict"
    rows = [json.loads(line) for line in Path("bench/rows.jsonl").read_text().splitlines()]
    for name in record["dtypes"]:
        passed = {r["provider"] for r in rows if r["dtype"] == name and r["gate"] == "passed"}
        assert {"dense", "two matmuls", "ours", "ours, prepacked"} <= passed, passed
        assert all(r["roofline"] for r in rows if r["gate"] == "passed")
    wrong = [(r["provider"], r["reason"]) for r in rows if r["gate"] in ("failed", "error")]
    assert not [w for w in wrong if "compiled" not in w[0]], wrong


def profile():
    for name in record["dtypes"]:
        out = f"profile-{name}"
        text = command(
            "profile", "48,64", "--rows", 4, "--ranks", "8,16", "--dtype", name,
            "--seconds", "0.005", "--out", out,
        )  # fmt: skip
        assert "48" in text, "no table"
        assert json.loads(Path(out, "profile.json").read_text())["points"]


def compress():
    text = command("compress", record["model"], "--budget", "0.5", "--out", "small")
    assert "saved" in text
    import transformers

    fresh = transformers.AutoModel.from_pretrained(record["model"], local_files_only=True)
    model = mk.load_pretrained("small", fresh)
    assert mk.ranks(model)
    with torch.no_grad():
        y = model(input_ids=torch.arange(8)[None])[0]
    assert torch.isfinite(y).all()


def prepacked():
    for dtype in DTYPES:
        for activation in (None, "gelu"):
            x, u, v, bias = make_inputs(5, 48, 64, 16, dtype=dtype)
            exact = mk.lod_linear(
                *(t.double() for t in (x, u, v, bias)), rank=8, activation=activation,
                backend="reference",
            )  # fmt: skip
            same = mk.lod_linear(x, u, v, bias, rank=8, activation=activation, backend="matmul")
            for form in (None, *packed.FORMS):
                layer = mk.LoDLinear.from_factors(u, v, bias, activation=activation)
                layer.rank = 8
                mk.prepack(layer.eval().requires_grad_(False), form=form)
                with torch.no_grad():
                    y = layer(x)
                if form in (None, "merged dense"):
                    w = (u[:, :8].double() @ v[:8].double()).to(dtype)
                    dense = torch.nn.functional.linear(x, w, bias)
                    act = torch.nn.functional.gelu if activation else torch.nn.Identity()
                    error = (act(dense).double() - exact).abs().max().item()
                    spread = (same.double() - exact).abs().max().item()
                    assert (y.double() - exact).abs().max().item() <= 2 * max(error, spread), form
                else:
                    assert_accurate(f"{form}, {dtype}", y, same, exact)


steps = {}
for step in (caps, info, explain, bench, profile, compress, prepacked):
    if record["steps"] and step.__name__ not in record["steps"]:
        continue
    print(f"== {step.__name__}", flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            step()
    except BaseException as error:
        said = "".join(traceback.format_exception_only(error)).strip()
        where = traceback.extract_tb(error.__traceback__)[-1]
        steps[step.__name__] = f"{said} ({Path(where.filename).name}:{where.lineno})"
    else:
        steps[step.__name__] = "ok"
Path(record["result"]).write_text(json.dumps(steps))
