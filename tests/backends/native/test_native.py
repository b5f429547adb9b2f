"""The native backend: CPU kernels through the public op, on every instruction set found here."""

import os
import shutil
import subprocess
import sys

import native_sweep
import pytest
import torch
import torch.nn.functional as F
from places import SUPPORT

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.backends import native
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.call import Call
from maestro_kernels.cli import main
from maestro_kernels.testing import assert_accurate, make_inputs, rounding_errors

needs_library = pytest.mark.skipif(
    native.load_error() is not None, reason=f"no native library: {native.load_error()}"
)
DTYPES = native_sweep.DTYPES


SETS = ("portable", "neon", "avx2", "avx512", "avx512_bf16", "amx", "amx_fp16")
# What a dtype runs on under a cap, where that is another name.
ON_TILES = {
    "amx": ("avx512", "amx_bf16", "avx512"),
    "amx_fp16": ("avx512", "amx_bf16", "amx_fp16"),
    "avx512_bf16": ("avx512", "avx512_bf16", "avx512"),
}


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", [*SETS, ""])
def test_every_instruction_set_meets_the_tolerance(isa, threads):
    if isa and isa not in native.available_isas():
        pytest.skip(f"{isa} is not in this build or not on this machine")
    environment = {**os.environ, "MK_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "native_sweep.py"), str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used = tuple(done.stdout.split("\n")[0].split()[1:])
    assert used == ON_TILES.get(isa, (isa,) * 3 if isa else tuple(map(native.isa, DTYPES)))


@needs_library
@pytest.mark.parametrize("name", ["avx9000", "AVX2", "another machine's"])
def test_a_cap_that_is_not_to_be_had_is_an_error_and_not_ignored(name):
    if name == "another machine's":
        name = next(isa for isa in SETS if isa not in native.available_isas())
    expected = (
        f"MK_CPU_ISA: expected one of {', '.join(native.available_isas())} "
        f"(what this build has and this machine runs), got '{name}'"
    )
    calls = (
        "native.load_error()",
        "mk.lod_linear(torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8))",
        "mk.explain(torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8))",
    )
    code = "import torch, maestro_kernels as mk; from maestro_kernels.backends import native\n"
    for call in calls:  # each of them: what failed once is not remembered as absent
        code += f"try:\n  {call}\nexcept ValueError as error:\n  print(error)\n"
    # Whoever loads the library without this package is refused by the op itself.
    code += (
        "torch.ops.load_library(str(native.LIBRARY))\n"
        "x, u, v = torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8)\n"
        "try:\n  torch.ops.maestro_native.linear(x, u, v, None, 4, None, 0)\n"
        "except RuntimeError as error:\n  print(str(error).split('maestro_native: ')[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MK_CPU_ISA": name},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[: len(calls) + 1] == [expected] * (len(calls) + 1)
    command = [sys.executable, "-m", "maestro_kernels", "info"]
    done = subprocess.run(
        command, env={**os.environ, "MK_CPU_ISA": name}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr == f"maestro-kernels info: {expected}\n"


@needs_library
@pytest.mark.parametrize("packed", [False, True])
def test_bodies_run_one_after_the_other_inside_a_parallel_region(packed):
    # torch's pool does not nest: a body that waited for a later one would hang here.
    call = (
        "native.ops().packed_linear(native.pack([u], [v], [32], [None]), x, b)"
        if packed
        else "native.ops().linear(x, u, v, b, 32, None, 0)"
    )
    x, u, v, b = make_inputs(64, 96, 128, 32)
    expected = F.linear(F.linear(x, v), u, b)
    code = (
        "import sys, torch; from maestro_kernels.backends import native;"
        "from maestro_kernels.testing import make_inputs;"
        "torch.set_num_threads(1); native.load_error();"
        "x, u, v, b = make_inputs(64, 96, 128, 32);"
        f"y = {call}; print(float(y.double().sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) == pytest.approx(float(expected.double().sum()), abs=1e-3)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 13, "tensor"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_values_and_gradients(dtype, rank, activation):
    leaves = make_inputs(37, 56, 72, 24, dtype=dtype, requires_grad=True)
    r = {"tensor": 13, None: 24}.get(rank, rank)
    if rank == "tensor":
        rank = torch.tensor(13, dtype=torch.int32)
    y = mk.lod_linear(*leaves, rank=rank, activation=activation, backend="native")
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = lod_linear_ref(*exact_leaves, rank=r, activation=activation)
    pair = native_sweep.plain(*leaves, r, activation)
    dy = torch.randn(37, 56).to(dtype)
    rounding = rounding_errors(*leaves[:3], rank=r, activation=activation, bias=leaves[3], dy=dy)
    assert_accurate("y", y, pair, exact, rounding["y"])
    grads = (
        torch.autograd.grad(y, leaves, dy),
        torch.autograd.grad(pair, leaves, dy),
        torch.autograd.grad(exact, exact_leaves, dy.double()),
    )
    for name, got, by_torch, ref in zip(("dx", "du", "dv", "dbias"), *grads, strict=True):
        assert_accurate(name, got, by_torch, ref, rounding[name])


@needs_library
def test_leading_dimensions_strides_and_views_of_x():
    x, u, v, b = make_inputs((3, 5, 4), 24, 40, 16)
    plain = F.linear(F.linear(x, v), u, b)
    exact = lod_linear_ref(x.double(), u.double(), v.double(), b.double())
    wide = torch.randn(3, 5, 4, 48)
    wide[..., 4:44] = x
    forms = {
        "view": wide[..., 4:44],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns": x.movedim(-1, 0).contiguous().movedim(0, -1),
        "expanded": x[:1].expand(3, 5, 4, 40),
    }
    for name, form in forms.items():
        y = mk.lod_linear(form, u, v, b, backend="native")
        first = name == "expanded"
        assert y.shape == (3, 5, 4, 24)
        assert_accurate(
            name,
            y[:1] if first else y,
            plain[:1] if first else plain,
            exact[:1] if first else exact,
        )


@needs_library
def test_row_views_of_factors_are_read_in_place():
    x, u, v, b = make_inputs(9, 24, 40, 16)
    tall_u, tall_v = torch.full((24, 50), 7.0), torch.full((16, 60), 7.0)
    tall_u[:, 3:19], tall_v[:, 5:45] = u, v
    got = mk.lod_linear(x, tall_u[:, 3:19], tall_v[:, 5:45], b, backend="native")
    assert torch.equal(got, mk.lod_linear(x, u, v, b, backend="native"))


@needs_library
def test_what_it_cannot_read_is_refused_with_a_reason():
    x, u, v, _ = make_inputs(4, 8, 16, 4)
    with pytest.raises(NotImplementedError, match=r"'native': .*u with last stride 1, not 8"):
        mk.lod_linear(x, u.T.contiguous().T, v, backend="native")
    with pytest.raises(NotImplementedError, match=r"'native': .*float64"):
        mk.lod_linear(x.double(), u.double(), v.double(), backend="native")


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        lambda a: (a[0].double(), *a[1:]),
        lambda a: (a[0], a[1].bfloat16(), *a[2:]),
        lambda a: (a[0], a[1], a[2][:, :-1], a[3]),
        lambda a: (a[0], a[1], a[2][:-1], a[3]),
        lambda a: (a[0], a[1][:, 0], *a[2:]),
        lambda a: (*a[:3], a[3][:-1]),
        lambda a: (*a[:3], a[3].double()),
    ],
)
def test_the_library_refuses_what_does_not_fit(change):
    arguments = change(make_inputs(4, 8, 16, 4))
    with pytest.raises(RuntimeError, match="maestro_native"):
        native.ops().linear(*arguments, 4, None, 0)


@needs_library
@pytest.mark.parametrize(
    ("rank", "rank_tensor", "activation"),
    [(5, None, 0), (4, None, 9), (-1, torch.tensor([1, 2], dtype=torch.int32), 0)],
)
def test_the_library_refuses_wrong_choices(rank, rank_tensor, activation):
    with pytest.raises(RuntimeError, match="maestro_native"):
        native.ops().linear(*make_inputs(4, 8, 16, 4), rank, rank_tensor, activation)


@needs_library
@pytest.mark.parametrize("value", [-3, 0, 7, 24, 99])
def test_a_tensor_rank_is_read_at_run_time_and_clamped(value):
    x, u, v, b = make_inputs(6, 30, 40, 24)
    rank = torch.tensor(value, dtype=torch.int32)
    y = mk.lod_linear(x, u, v, b, rank=rank, backend="native")
    r = min(max(value, 0), 24)
    assert torch.equal(y, mk.lod_linear(x, u, v, b, rank=r, backend="native") if r else y)
    exact = lod_linear_ref(x.double(), u.double(), v.double(), b.double(), rank=r)
    assert_accurate("y", y, F.linear(F.linear(x, v[:r]), u[:, :r], b), exact)


@needs_library
def test_auto_takes_small_calls_and_says_so():
    x, u, v, b = make_inputs(4, 8, 8, 4)
    plan = mk.explain(x, u, v, b).plan
    assert (plan.backend, plan.strategy) == ("native", "fused")
    assert "smaller than the cost of two library calls" in plan.reason
    assert torch.equal(mk.lod_linear(x, u, v, b), mk.lod_linear(x, u, v, b, backend="native"))


@needs_library
@pytest.mark.parametrize("dtype", native_sweep.DTYPES)
def test_auto_takes_few_rows_of_large_layers_and_says_so(dtype):
    few = 1 if dtype == torch.float32 else 4
    for M in (1, few, few + 1):
        x, u, v, b = make_inputs(M, 300, 400, 40, dtype=dtype)
        plan = mk.explain(x, u, v, b).plan
        group = mk.explain(x, [u, u], [v, v]).plan
        if few >= M and native.isa(dtype) != "portable":
            assert (plan.backend, group.backend) == ("native", "native")
            assert "so few rows" in plan.reason
        else:
            assert (plan.backend, group.backend) == ("matmul", "matmul")


def test_the_portable_kernels_are_no_reason_to_leave_the_library_matmuls(monkeypatch):
    monkeypatch.setattr(native, "isa", lambda dtype: "portable")
    assert native.few_rows(torch.bfloat16) == 0


@needs_library
def test_a_remembered_plan_still_validates_every_call():
    x, u, v, b = make_inputs(4, 8, 8, 4)
    mk.lod_linear(x, u, v, b, rank=1)
    assert dispatch.quick_plan(x, u, v, b, 1, None, None, False) is not None
    with pytest.raises(TypeError, match="rank: expected"):
        mk.lod_linear(x, u, v, b, rank=True)
    with pytest.raises(ValueError, match=r"lod_linear: v: expected shape \(R, 8\)"):
        mk.lod_linear(x, u, v[:, :7], b, rank=1)
    with pytest.raises(ValueError, match=r"lod_linear: bias: expected shape"):
        mk.lod_linear(x, u, v, b[:3], rank=1)
    with pytest.raises(TypeError, match=r"lod_linear: u: expected torch.float32"):
        mk.lod_linear(x, u.double(), v, b, rank=1)
    column_u = u.T.contiguous().T
    exact = lod_linear_ref(x.double(), u.double(), v.double(), b.double(), rank=1)
    y = mk.lod_linear(x, column_u, v, b, rank=1)
    assert_accurate("column-major u", y, F.linear(F.linear(x, v[:1]), u[:, :1], b), exact)


@needs_library
def test_gradients_of_remembered_small_calls():
    leaves = make_inputs(4, 8, 8, 4, requires_grad=True)
    for _ in range(2):
        y = mk.lod_linear(*leaves, rank=3)
        grads = torch.autograd.grad(y.square().sum(), leaves)
    pair = F.linear(F.linear(leaves[0], leaves[2][:3]), leaves[1][:, :3], leaves[3])
    by_torch = torch.autograd.grad(pair.square().sum(), leaves)
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(lod_linear_ref(*doubled, rank=3).square().sum(), doubled)
    for name, got, plain, ref in zip("xuvb", grads, by_torch, exact, strict=True):
        assert_accurate(f"d{name}", got, plain, ref)
    with torch.no_grad():
        assert not mk.lod_linear(*leaves, rank=3).requires_grad


@needs_library
def test_the_compiled_op_follows_a_tensor_rank_without_recompiling():
    torch._dynamo.reset()  # what other tests compiled of the same functions would count
    layer = mk.LoDLinear(16, 24, max_rank=8)
    layer.backend = "native"
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (8, 3, 1):
            layer.rank = rank
            assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_a_library_that_does_not_load_gives_the_loaders_words(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    native._load.cache_clear()
    try:
        reason = native.load_error()
        assert "does not load" in reason
        assert str(tmp_path) not in reason
        x, u, v, b = make_inputs(5, 9, 11, 3)
        with pytest.raises(NotImplementedError, match="does not load"):
            mk.lod_linear(x, u, v, b, backend="native")
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "missing.so")
        native._load.cache_clear()
        assert "no compiled library: nothing has built it yet" in native.load_error()
        assert native.cuda_error() == native.load_error()
        record = tmp_path / "_build.json"
        record.write_text('{"native": "no compiler", "cuda": "no nvcc"}')
        native._load.cache_clear()
        assert native.load_error() == "this installation has no compiled library: no compiler"
        for damaged in ("", "[]", '{"native": 3}'):
            record.write_text(damaged)
            native._load.cache_clear()
            assert "nothing has built it yet" in native.load_error()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_the_loader_misses_is_named(tmp_path, monkeypatch, capsys):
    # As with a torch that lacks a function of the stable ABI.
    source, library = tmp_path / "other.cpp", tmp_path / "_native.so"
    text = 'extern "C" void torch_of_tomorrow(); extern "C" void call() { torch_of_tomorrow(); }'
    source.write_text(text)
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    monkeypatch.setattr(native, "LIBRARY", library)
    native._load.cache_clear()
    try:
        assert "undefined symbol: torch_of_tomorrow" in native.load_error()
        assert native.cuda_error() == native.load_error()
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        assert f"compiled library: {native.load_error()}" in text
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


@needs_library
def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    native._load.cache_clear()
    try:
        assert "build it again" in native.load_error()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("rank", [1, 6, 11])
def test_two_library_products_of_a_prefix_in_one_op(dtype, lead, rank):
    x, u, v, bias = make_inputs(lead, 33, 40, 12, dtype=dtype)
    u[:, rank:] = float("nan")
    v[rank:] = float("nan")
    op = native.raw("library_products")
    for b in (bias, None):
        expected = F.linear(F.linear(x, v[:rank]), u[:, :rank], b)
        for given in (x, x.mT.contiguous().mT if x.dim() == 2 else x):
            native_sweep.spoil((*lead, 33), dtype=dtype)
            if given.stride(-1) != 1:
                with pytest.raises(RuntimeError, match="x: expected rows of stride 1"):
                    op(given, u, v, b, rank)
                continue
            torch.testing.assert_close(op(given, u, v, b, rank), expected, rtol=0, atol=0)
    # Where library matmuls serve a call below R without gradients, it is what runs.
    plan = dispatch.plan_afresh(
        Call("lod_linear", (x,), (u,), (v,), (bias,), (rank,), (None,)), "matmul"
    )
    assert plan.products is not None
