"""How many variants of each kernel the ranks 0..256 make, by Triton's own count.

Run as a script (TRITON_INTERPRET unset) this file calls the real launchers and prints which cache
keys Triton asked to compile. The keys come from Triton: its binder specialises the arguments of the
launch, and its `jit_cache_hook` is called with the key of every variant it does not have yet; the
hook says "do not compile", which also means no launch. The only thing stood in for is the driver,
because Triton asks it for the target: it answers sm_90.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from triton_support import needs_triton, run_compiled

pytestmark = needs_triton
R, N, K, M = 256, 320, 192, 64
WIDTHS = (16, 32, 64, 128, 256)  # of H in the row kernel


def _ask_triton(series: dict[str, Callable[[], object]]) -> dict[str, object]:
    """Cache keys (kernel -> keys) and forms that each series makes; forms of the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tools import triton_report

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    keys: dict[str, set[str]] = {}
    forms: set[str] = set()

    def hook(*, key, fn, compile, **_):
        keys.setdefault(fn.name.rsplit(".")[-1], set()).add(key)
        what = (compile[part] for part in ("signature", "constants", "configs"))
        options = json.loads(compile["specialization_data"])["options"]
        forms.add(_form(fn.jit_function, *what, options))
        return True

    driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = hook
    found: dict[str, object] = {"keys": {}, "forms": {}}
    for name, launches in series.items():
        keys.clear()
        forms.clear()
        launches()
        found["keys"][name] = {kernel: sorted(seen) for kernel, seen in keys.items()}
        found["forms"][name] = sorted(forms)
    found["ahead"] = []
    for arch, _, spec in triton_report._cases():
        if arch == "sm_90":
            source = triton_report._source(spec)
            what = (source.signature, source.constants, [source.attrs])
            found["ahead"].append(_form(spec.kernel, *what, spec.options))
    return found


def _form(kernel, signature, constants, attributes, options) -> str:
    """All that decides what is compiled, as text by which two sources of it can be compared."""
    names = kernel.arg_names
    fixed = {(names[path[0]], *path[1:]): value for path, value in constants.items()}
    aligned = {(names[path[0]], *path[1:]) for path, found in attributes[0].items() if found}
    chosen = {name: options.get(name) for name in ("num_warps", "num_stages", "maxnreg")}
    parts = (signature.items(), fixed.items(), aligned, chosen.items())
    text = " | ".join([names[0], *(", ".join(sorted(map(str, part))) for part in parts)])
    return text.replace(" ", "")  # Triton may write bf16[64,64] or bf16[64, 64]


def _launches() -> dict[str, Callable[[object], object]]:
    """Name -> a launch at a rank."""
    import torch

    from maestro_kernels.backends.triton import activation_grad, expand, row, two_phase, wgrad
    from maestro_kernels.backends.triton.launch import empty_h

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16)

    x, dy, v, u, bias = zeros(M, K), zeros(M, N), zeros(R, K), zeros(N, R), zeros(N)
    odd_x, odd_v = zeros(M, K + 3), zeros(R, K + 3)  # rows that TMA cannot read

    def grouped(rank):
        both = torch.stack([rank, rank]) if isinstance(rank, torch.Tensor) else (rank, R - rank)
        layers = [v, v], [u, u[:64]], [bias, None]
        return two_phase.two_phase_grouped([x], *layers, both, [None, None], save_h=False)

    def weight_gradients(count, needs_u=True):
        def launch(rank):
            if isinstance(rank, torch.Tensor):
                ranks, width = torch.stack([rank] * count), R
            else:
                ranks, width = [rank] * count, rank
            h = empty_h(x, width)
            return wgrad.weight_grads(
                [dy] * count, [h] * count, [h] * count, [x], [R] * count, ranks,
                needs_u=needs_u, needs_v=True, needs_bias=[needs_u] + [False] * (count - 1),
            )  # fmt: skip

        return launch

    def before_gelu(rank):
        h = empty_h(x, R if isinstance(rank, torch.Tensor) else rank)
        return activation_grad.activation_grad(dy, h, u, bias, None, rank, "gelu")

    return {
        "two-phase": lambda r: two_phase.two_phase(x, v, u, bias, r, "gelu", save_h=True),
        "two-phase dx": lambda r: two_phase.two_phase_dx(dy, u, v, r),
        "grouped": grouped,
        "weight gradient": weight_gradients(1),
        "weight gradient, frozen u": weight_gradients(1, needs_u=False),
        "grouped weight gradient": weight_gradients(3),
        "activation gradient": before_gelu,
        "expand": lambda r: expand.expand(x, v, u, bias, r, "gelu"),
        "row": lambda r: row.row(x, v, u, bias, r, "gelu", save_h=True),
        "row pointers": lambda r: row.row(odd_x, odd_v, u, bias, r, "gelu", save_h=True),
        "row dx": lambda r: row.row_dx(dy, u, v, r),
    }


def _series() -> dict[str, Callable[[], object]]:
    """Name -> launches whose variants are counted together."""
    import torch
    import triton

    @triton.jit
    def specialising_kernel(p_y, rank):
        pass

    any_tensor = torch.zeros(1)
    # Elements of one tensor: three of four do not start on 16 bytes, which must not matter either.
    tensor_ranks = torch.arange(R + 1, dtype=torch.int32).unbind()
    series = {"specialised int": (lambda r: specialising_kernel[(1,)](any_tensor, r), range(R + 1))}
    for name, launch in _launches().items():
        if name == "expand":  # neither a tensor rank nor zero is its call
            series[f"{name} int"] = (launch, range(1, R + 1))
            continue
        series[f"{name} tensor"] = (launch, tensor_ranks)
        if name.startswith("row"):
            for narrower, width in zip((0, *WIDTHS), WIDTHS, strict=False):
                series[f"{name} int {width}"] = (launch, range(narrower + 1, width + 1))
        else:
            series[f"{name} int"] = (launch, range(R + 1))
    return {
        name: lambda launch=launch, ranks=ranks: [launch(rank) for rank in ranks]
        for name, (launch, ranks) in series.items()
    }


@pytest.fixture(scope="module")
def variants():
    return run_compiled(__file__)


def _keys(variants, series):
    (keys,) = variants["keys"][series].values()  # of one kernel, else another launch is tested
    return keys


def test_the_instrument_sees_variants(variants):
    """A kernel with an ordinary int argument makes three: 1, the multiples of 16, the rest."""
    assert len(_keys(variants, "specialised int")) == 3


@pytest.mark.parametrize(
    "kernel",
    [
        "two-phase",
        "two-phase dx",
        "grouped",
        "weight gradient",
        "weight gradient, frozen u",
        "grouped weight gradient",
        "activation gradient",
    ],
)
def test_one_variant_for_all_ranks(variants, kernel):
    by_int, by_tensor = _keys(variants, f"{kernel} int"), _keys(variants, f"{kernel} tensor")
    assert len(by_int) == 1
    assert len(by_tensor) == 1
    assert by_int != by_tensor  # a tensor rank is read by the kernel: the second form


def test_the_expand_kernel_has_one_variant_for_all_ranks(variants):
    assert len(_keys(variants, "expand int")) == 1


@pytest.mark.parametrize("kernel", ["row", "row pointers", "row dx"])
def test_row_kernel_has_one_variant_for_each_width_of_h(variants, kernel):
    by_width = [_keys(variants, f"{kernel} int {width}") for width in WIDTHS]
    assert [len(keys) for keys in by_width] == [1] * len(WIDTHS)
    assert len(_keys(variants, f"{kernel} tensor")) == 1  # its width is that of R


@pytest.mark.parametrize(
    "series",
    [
        "two-phase int",
        "two-phase dx int",
        "weight gradient int",
        "weight gradient, frozen u int",
        "activation gradient int",
        "expand int",
        "row dx tensor",
        *(f"row int {width}" for width in WIDTHS),
    ],
)
def test_what_is_launched_is_what_was_compiled_ahead(variants, series):
    """Same argument types, constants, known divisors, warps and stages as a row of the report."""
    assert variants["forms"][series]
    assert set(variants["forms"][series]) <= set(variants["ahead"])


def test_row_kernel_takes_descriptors_where_rows_are_aligned(variants):
    (aligned,), (odd,) = variants["forms"]["row int 64"], variants["forms"]["row pointers int 64"]
    assert aligned.count("tensordesc") == 3  # x, v, u
    assert "tensordesc" not in odd


if __name__ == "__main__":
    json.dump(_ask_triton(_series()), sys.stdout)
