"""Who shares counters with whom, and that nothing of ours stays in a pool of torch's."""

from __future__ import annotations

import itertools
import sys
import threading
import types
import weakref

import pytest
import torch

import maestro_kernels as mk
from maestro_kernels.backends import driver, workspace
from maestro_kernels.testing import make_inputs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def disjoint(*tensors):
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


class TestCounters:
    def test_a_stream_keeps_its_own_and_grows(self):
        held = workspace.Counters(CPU)
        a, b = held.of(1, 0, 100), held.of(2, 0, 100)
        assert disjoint(a, b)
        assert held.of(1, 0, 50).data_ptr() == a.data_ptr()
        grown = held.of(1, 0, a.numel() + 1)
        assert grown.numel() > a.numel()
        assert not grown.any()
        # A graph's or a running launch's; nobody gets it again.
        assert disjoint(a, b, grown)
        assert held.of(1, 0, 100).data_ptr() == grown.data_ptr()

    def test_one_block_serves_a_capture_on_a_stream_and_no_other(self):
        held = workspace.Counters(CPU)
        first = held.of(1, 7, 100)
        assert held.of(1, 7, 90).data_ptr() == first.data_ptr()
        others = [held.of(1, 0, 100), held.of(1, 8, 100), held.of(2, 7, 100), held.of(2, 0, 100)]
        wider = held.of(1, 7, 5000)
        assert disjoint(first, wider, *others)
        assert not any(t.any() for t in (first, wider, *others))
        assert all(t.data_ptr() % 128 == first.data_ptr() % 128 for t in (wider, *others))

    def test_two_hundred_projections_of_a_graph_take_no_more_than_one(self):
        """A reserve that a large model uses up is what this replaced."""
        held = workspace.Counters(CPU)
        assert len({held.of(1, 7, 2048).data_ptr() for _ in range(224)}) == 1

    def test_larger_than_what_is_asked_of_the_driver_at_a_time(self):
        held = workspace.Counters(CPU)
        small = held.of(1, 7, 64)
        large = held.of(1, 8, workspace._CHUNK + 1)
        assert large.numel() > workspace._CHUNK
        assert disjoint(small, large)
        assert not large.any()

    def test_threads_get_one_block_for_one_stream_and_own_ones_for_their_own(self):
        held = workspace.Counters(CPU)
        taken, gate = {}, threading.Barrier(8)

        def ask(k):
            gate.wait()
            taken[k] = held.of(k % 4, 0, 500)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(taken[k].data_ptr() == taken[k + 4].data_ptr() for k in range(4))
        assert disjoint(*(taken[k] for k in range(4)))


class Pool:
    """CUDA as the module sees it, on the CPU: a stream, a capture, torch's pool being filled.

    As torch's check_memory_pool does, `leaks` names what was allocated from torch meanwhile and
    still lives.
    """

    def __init__(self, monkeypatch):
        self.stream, self.capture, self.warming, self.memory = 5, 0, False, True
        self.taken = []
        manager = types.SimpleNamespace(tree_manager=self)
        trees = types.SimpleNamespace(
            local=None, get_obj=lambda local, name: {"tree_manager_containers": {0: manager}}[name]
        )
        monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(workspace, "current_stream", lambda index: self.cuda_stream)
        monkeypatch.setattr(workspace, "_is_capturing", lambda: bool(self.capture))
        zeros, empty = torch.zeros, torch.empty
        monkeypatch.setattr(torch, "zeros", lambda *a, **k: self._take(zeros, *a, **k))
        monkeypatch.setattr(torch, "empty", lambda *a, **k: self._take(empty, *a, **k))
        monkeypatch.setattr(driver, "capture_id", lambda stream: self.capture)
        monkeypatch.setattr(
            driver, "zeroed",
            lambda device, n: zeros(n, dtype=torch.int32) if self.memory else None,
        )  # fmt: skip
        for name in ("_counters", "_fallback", "_scratch"):
            monkeypatch.setattr(workspace, name, {})

    @property
    def cuda_stream(self):
        return self.stream

    @property
    def in_warmup(self):
        return self.warming

    def synchronize(self):
        pass

    def _take(self, allocate, *sizes, device=None, **options):
        found = allocate(*sizes, **options)
        if self.warming or self.capture:
            self.taken.append(weakref.ref(found))
        return found

    def leaks(self):
        return [t() for t in self.taken if t() is not None]


@pytest.fixture
def pool(monkeypatch):
    return Pool(monkeypatch)


@pytest.mark.parametrize("memory", [True, False], ids=["driver", "no driver"])
@pytest.mark.parametrize("state", ["warming", "capture"])
def test_nothing_stays_in_a_pool_that_is_being_filled(pool, state, memory):
    pool.memory = memory
    setattr(pool, state, 3)
    for _ in range(3):
        assert not workspace.counters(GPU, 300).any()
        workspace.scratch(GPU)
    assert pool.leaks() == []
    setattr(pool, state, 0)
    eager = workspace.counters(GPU, 300)
    assert eager.data_ptr() == workspace.counters(GPU, 200).data_ptr()
    assert workspace.scratch(GPU) is workspace.scratch(GPU)


def test_the_emulated_check_sees_what_stays(pool):
    """The instrument: a tensor kept from torch's pool is a leak."""
    pool.warming = True
    kept = torch.zeros(4)
    assert pool.leaks()[0] is kept


def test_a_graph_shares_nothing_with_what_runs_beside_it(pool):
    eager = workspace.counters(GPU, 300)
    pool.capture = 3
    graph = workspace.counters(GPU, 300)
    assert workspace.scratch(GPU) is None
    pool.capture = 4
    other = workspace.counters(GPU, 300)
    pool.stream = 6
    side = workspace.counters(GPU, 300)
    assert disjoint(eager, graph, other, side)
    pool.capture, pool.stream = 3, 5
    assert workspace.counters(GPU, 300).data_ptr() == graph.data_ptr()


def test_a_capture_without_a_name_shares_with_nobody(pool, monkeypatch):
    monkeypatch.setattr(driver, "capture_id", lambda stream: None)
    pool.capture = 3
    taken = [workspace.counters(GPU, 300) for _ in range(3)]
    assert disjoint(*taken)


def test_warm_up_of_torch_compile_is_recognised_in_the_torch_that_is_here():
    """By the names that torch itself uses; a torch that renames them fails here."""
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert isinstance(trees.CUDAGraphTreeManager.in_warmup, property)
    containers = trees.get_obj(trees.local, "tree_manager_containers")
    assert isinstance(containers, dict)
    assert not workspace.fills_a_pool(CPU)
    assert "tree_manager" in trees.TreeManagerContainer(0).__dict__
    assert hasattr(torch._C, "_construct_storage_from_data_pointer")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiled_graphs_leave_the_pool_as_it_should_be(backend, mode, monkeypatch):
    """The first calls that this stream sees are torch's warm-up."""
    from torch._inductor import config

    monkeypatch.setattr(config.triton, "slow_path_cudagraph_asserts", True)
    x, u, v, b = make_inputs(16, 512, 512, 128, dtype=torch.bfloat16, device="cuda")
    plain = mk.lod_linear(x, u, v, b, backend=backend)

    @torch.compile(mode=mode, fullgraph=True)
    def twice(x):
        return mk.lod_linear(mk.lod_linear(x, u, v, b, backend=backend), u, v, b, backend=backend)

    expected = mk.lod_linear(plain, u, v, b, backend=backend)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(twice(x), expected)


@pytest.mark.gpu
def test_zeros_of_the_driver():
    device = torch.device("cuda", torch.cuda.current_device())
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=side):
        found = driver.zeroed(device, 1000)
        names = {driver.capture_id(side.cuda_stream) for _ in range(3)}
    assert len(names) == 1
    assert None not in names
    assert found.device == device
    assert not found.any()
    assert torch.cuda.memory_allocated() == before
    assert driver.capture_id(side.cuda_stream) is None


@pytest.mark.gpu
def test_numbers_of_the_driver_made_under_capture(monkeypatch):
    monkeypatch.setattr(workspace, "_ramps", {})
    device = torch.device("cuda", torch.cuda.current_device())
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=side):
        index, zero = workspace.ramp(device, 100, torch.bfloat16)
    assert torch.cuda.memory_allocated() == before
    assert index.tolist() == list(range(100))
    assert (zero.item(), zero.dtype) == (0, torch.bfloat16)
