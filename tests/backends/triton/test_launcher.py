"""A launch that is made again is the one that Triton would make, for less; nothing is launched.

Run as a script (TRITON_INTERPRET unset) this file calls the launchers with what bench/host_cost.py
puts in the place of a GPU, and prints what reached the last step before the driver.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import pytest
from triton_support import needs_triton, run_compiled

pytestmark = needs_triton


def _what_is_launched() -> dict[str, object]:
    import weakref

    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from bench import host_cost
    from maestro_kernels.backends.triton import launch, launcher, row, two_phase
    from maestro_kernels.testing import make_inputs

    host_cost.without_a_gpu()
    by_triton, streams = [], iter(range(100, 1000))
    original = JITFunction.run

    def run(self, *args, **kwargs):
        by_triton.append(self)
        return original(self, *args, **kwargs)

    JITFunction.run = run
    launcher.current_stream = lambda index: next(streams)
    names: dict[int, str] = {}
    kept = []  # so that no address is met twice

    def plain(value):
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        if isinstance(value, torch.Tensor):
            # The outputs are new each time; of them their size counts.
            name = names.get(value.data_ptr(), f"new {value.numel()}")
            return [name, str(value.dtype), list(value.stride())]
        if type(value).__name__ == "TensorDescriptor":
            return {k: str(plain(v)) for k, v in vars(value).items()}
        return value if isinstance(value, int | str | bool | None) else str(value)

    def last():
        """(variant, stream, whether Triton made it, arguments) of the last launch."""
        *_, flat = host_cost.Variant.launched
        if isinstance(flat[-1], tuple):  # Triton 3.9: the kernel's arguments in one
            flat = (*flat[:-1], *flat[-1])
        at = next(i for i, a in enumerate(flat) if isinstance(a, host_cost.Variant))
        kernel = flat[at].src.fn
        values = flat[-len(kernel.arg_names) :]
        made = bool(by_triton)
        by_triton.clear()
        return [id(flat[at]), flat[at - 1], made, [plain(v) for v in values]]

    def inputs(seed):
        made = make_inputs(16, 64, 64, 32, dtype=torch.bfloat16, seed=seed)
        names.update({t.data_ptr(): name for t, name in zip(made, "xuvb", strict=True)})
        kept.append(made)
        return made

    def shifted(t):
        """The same values one element further in memory: not on 16 bytes."""
        held = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        return held.copy_(t)

    cases = {
        "row": lambda x, u, v, b: row.row(x, v, u, b, 24, "gelu", save_h=False),
        "row, H": lambda x, u, v, b: row.row(x, v, u, b, 24, None, save_h=True),
        "row dx": lambda x, u, v, b: row.row_dx(x, u, v, 24),
        "row, pointers": lambda x, u, v, b: row.row(shifted(x), v, u, None, 24, None, save_h=False),
        "two_phase": lambda x, u, v, b: two_phase.two_phase(x, v, u, b, 24, None, save_h=False),
        "two_phase, H": lambda x, u, v, b: two_phase.two_phase(
            x, v, u, None, 24, None, save_h=True
        ),
        "two_phase dx": lambda x, u, v, b: two_phase.two_phase_dx(x, u, v, 24),
        "group": lambda x, u, v, b: two_phase.two_phase_grouped(
            [x], [v, v], [u, u[:16]], [b, None], (24, 8), [None, "relu"], save_h=False
        ),
        "tensor rank": lambda x, u, v, b: two_phase.two_phase(
            x, v, u, b, torch.tensor(7, dtype=torch.int32), None, save_h=True
        ),
    }
    found: dict[str, object] = {"calls": {}, "twice": {}}
    for name, case in cases.items():
        case(*inputs(0))
        first = last()
        case(*inputs(1))
        again = last()
        row._launches.clear(), two_phase._launches.clear()
        case(*inputs(1))
        found["twice"][name] = [first, again, last()]

    # What serves a call of the public function.
    x, u, v, b = inputs(2)
    for name, module in (("row", row), ("two_phase", two_phase)):
        serve, run_first = module.again, cases[name]
        row._launches.clear(), two_phase._launches.clear()
        how = (24, "gelu" if name == "row" else None)
        served = {"nothing ran": serve(x, u, v, b, *how)}
        run_first(x, u, v, b)
        others = {
            "alike": (x.clone(), u.clone(), v.clone(), b.clone()),
            "three dimensions": (x.view(2, 8, 64), u, v, b),
            "rows apart": (torch.empty(16, 128, dtype=x.dtype)[:, :64], u, v, b),
            "x off 16 bytes": (shifted(x), u, v, b),
            "v off 16 bytes": (x, u, shifted(v), b),
            "another type of u": (x, u.float(), v, b),
            "another type of the bias": (x, u, v, b.float()),
            "no bias": (x, u, v, None),
            "a bias with gaps": (x, u, v, torch.empty(128, dtype=x.dtype)[::2]),
        }
        served |= {what: serve(*tensors, *how) for what, tensors in others.items()}
        served["another rank"] = serve(x, u, v, b, 23, how[1])
        served["another activation"] = serve(x, u, v, b, 24, "silu")
        found[f"served by {name}"] = {
            what: y if y is None else list(y.shape) for what, y in served.items()
        }
        torch.set_float32_matmul_precision("high")
        found[f"served by {name}"]["tf32 for 16 bits"] = list(serve(x, u, v, b, *how).shape)
        torch.set_float32_matmul_precision("highest")

    case = cases["row"]
    case(x, u, v, b), last()
    watched = []
    triton.knobs.runtime.launch_enter_hook.add(watched.append)
    case(x, u, v, b)
    found["watched"] = last()[2]
    triton.knobs.runtime.launch_enter_hook.remove(watched.append)
    chain, triton.knobs.runtime.launch_enter_hook = triton.knobs.runtime.launch_enter_hook, print
    case(x, u, v, b)
    found["watched by no chain"] = last()[2]
    triton.knobs.runtime.launch_enter_hook = chain
    case(x, u, v, b)
    found["watched no more"] = last()[2]

    row._launches.clear()
    runner = host_cost.Variant.__getitem__
    changes = {
        "order": lambda self, grid: lambda *a, stream: self.run(stream, *grid, *a),
        "nothing": None,
    }
    for name, change in changes.items():
        host_cost.Variant.__getitem__ = change
        launcher._runs_as_expected.cache_clear()
        case(x, u, v, b), last(), case(x, u, v, b)
        found[f"another interface: {name}"] = last()[2]
        row._launches.clear()
    host_cost.Variant.__getitem__ = runner
    launcher._runs_as_expected.cache_clear()

    held = [t.clone() for t in inputs(3)]
    case(*held)
    dead = [weakref.ref(t) for t in held]
    del held
    host_cost.Variant.launched.clear()
    found["kept alive"] = [ref() is not None for ref in dead]

    freed = x.clone()
    freed.untyped_storage().resize_(0)
    found["freed"] = []
    for name, module in (("row", row), ("two_phase", two_phase)):
        for launch_it in (cases[name], lambda *t, serve=module.again: serve(*t, 24, None)):
            try:
                launch_it(freed, u, v, b)
            except RuntimeError as error:
                found["freed"].append(str(error))

    JITFunction.run = original
    # Meta tensors from here on.
    host_cost.on_meta_tensors()
    with torch.no_grad():
        for kind, kernel in host_cost.KERNELS.items():
            ours = host_cost.planned_call(kind)
            if kernel:
                one = host_cost.launch_by_triton(kernel, ours)
            sides = (ours, host_cost.two_linear(), one)
            found["calls"][": ".join(kind)] = [host_cost.calls(run) for run in sides]
        entered = []
        torch.cuda.device = lambda device: entered.append(str(device)) or nullcontext()
        host_cost.planned_call(("triton", "row"))()
        launch._current_device = lambda: None if entered else 1
        host_cost.planned_call(("triton", "row"))()
        found["elsewhere"] = entered
    return found


@pytest.fixture(scope="module")
def found():
    return run_compiled(__file__)


CASES = (
    "row", "row, H", "row dx", "row, pointers", "two_phase", "two_phase, H", "two_phase dx",
    "group", "tensor rank",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_second_launch_is_what_triton_would_make_of_the_same_tensors(found, case):
    first, again, anew = found["twice"][case]
    assert (first[2], again[2], anew[2]) == (True, False, True)  # made by Triton
    assert again[0] == first[0] == anew[0]  # the variant
    assert again[1] >= 100  # the stream that is current now
    assert again[3] == anew[3]


SERVED = {
    "nothing ran": None,
    "alike": [16, 64],
    "three dimensions": [2, 8, 64],
    "rows apart": None,
    "x off 16 bytes": None,
    "v off 16 bytes": None,
    "another type of u": None,
    "another type of the bias": None,
    "no bias": None,
    "a bias with gaps": None,
    "another rank": None,
    "another activation": None,
    "tf32 for 16 bits": [16, 64],
}


@pytest.mark.parametrize("kernel", ["row", "two_phase"])
def test_only_what_lies_like_a_call_that_ran_is_served_without_being_validated(found, kernel):
    assert found[f"served by {kernel}"] == SERVED


def test_a_profiler_sees_every_launch(found):
    assert found["watched"]
    assert found["watched by no chain"]
    assert not found["watched no more"]


def test_a_triton_that_launches_otherwise_is_left_to_launch(found):
    assert found["another interface: order"]
    assert found["another interface: nothing"]


def test_no_tensor_is_kept_alive(found):
    assert found["kept alive"] == [False] * 4


def test_a_freed_storage_reaches_no_kernel(found):
    assert (
        found["freed"]
        == ["a launch of Triton: expected tensors with a storage, got a freed one"] * 4
    )


def test_the_device_of_x_is_made_the_current_one(found):
    assert found["elsewhere"] == ["meta"]


@pytest.mark.parametrize("kind", ["triton: two_phase", "triton: row", "native: decode"])
def test_a_planned_call_costs_the_host_two_linear_and_a_launch(found, kind):
    """In Python and C calls; bench/host_cost.py has the times."""
    ours, two, by_triton = found["calls"][kind]
    assert two == 2
    assert ours <= two + by_triton


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["row", "two_phase"])
def test_later_calls_compute_on_their_own_tensors_and_streams(strategy):
    import torch

    from maestro_kernels.backends.triton import quick, row, two_phase
    from maestro_kernels.testing import make_inputs

    module = row if strategy == "row" else two_phase
    again, graph, side = quick(strategy), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for seed in range(4):
        x, u, v, b = make_inputs(64, 256, 256, 64, dtype=torch.bfloat16, device="cuda", seed=seed)
        if seed == 0:
            getattr(module, strategy)(x, v, u, b, 48, "gelu", save_h=False)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            y = again(x, u, v, b, 48, "gelu")
        with torch.cuda.graph(graph):
            captured = again(x, u, v, b, 48, "gelu")
        graph.replay()
        torch.cuda.synchronize()
        module._launches.clear()  # the next is Triton's
        expected, _ = getattr(module, strategy)(x, v, u, b, 48, "gelu", save_h=False)
        assert torch.equal(y, expected)
        assert torch.equal(captured, expected)


if __name__ == "__main__":
    json.dump(_what_is_launched(), sys.stdout)
