"""Samplers, penalties, `shrink` and `rewrap` in two processes, against one process.

All cases run in the same two processes (gloo on the CPU); each is reported as a test of its own.
"""

import json
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from training_support import fade, lod

import maestro_kernels as mk
from maestro_kernels import training

WORLD = 2
KEEP = {"a": 3, "b.0": 5, "b.2": 4}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 12)
        self.b = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5, bias=False))
        self.norm = nn.LayerNorm(12)

    def embed(self, x):
        return self.norm(self.a(x)).relu()

    def forward(self, x):
        return self.b(self.embed(x))


def net():
    torch.manual_seed(0)
    return mk.convert(Net().double(), rank=None, allow_larger=True)


def sharded(model):
    for part in (model.a, model.b):
        fully_shard(part)
    return fully_shard(model)


def listed(model):
    """Two modules in one communication group, and a second method that gathers parameters."""
    fully_shard([model.a, model.norm])
    fully_shard(model)
    register_fsdp_forward_method(model, "embed")
    return model


def unused_too(model):
    return DDP(model, find_unused_parameters=True)


WRAPPERS = {"ddp": DDP, "fsdp": sharded, "fsdp-listed": listed}


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        yield x, torch.randn(8, 5, generator=generator, dtype=torch.float64)


def train(model, optimizer, steps, seed, lam=0.0, sampler=None):
    """Steps on the whole batch, or on this process's half of it."""
    parallel = isinstance(model, DDP | FSDPModule)
    for x, y in batches(steps, seed):
        if parallel:
            x, y = x.chunk(WORLD)[dist.get_rank()], y.chunk(WORLD)[dist.get_rank()]
        if sampler is not None:
            sampler.step()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if lam:
            (lam * training.hierarchical_group_lasso(model)).backward()
        optimizer.step()
    if sampler is not None:
        sampler.reset()


def fade_all(model):
    """As `fade`, for factors that may be spread over the processes."""
    for name, layer in lod(model).items():
        alive = torch.where(torch.arange(layer.max_rank) < KEEP[name], 1.0, 1e-9).double()
        for p, scale in ((layer.u, alive), (layer.v, alive[:, None])):
            if isinstance(p, DTensor):
                scale = distribute_tensor(scale, p.device_mesh, [Replicate()])
            with torch.no_grad():
                p.mul_(scale)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(model):
    return {
        name.removeprefix("module."): full(p.detach()).clone()
        for name, p in model.named_parameters()
    }


def assert_equal_models(got, expected):
    got, expected = values(got), values(expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


def assert_same_on_all(values):
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, values)
    assert all(other == gathered[0] for other in gathered)


def samplers_agree(kind):
    model = DDP(net())
    # Everything a sampler must not look at differs between the processes.
    torch.manual_seed(dist.get_rank())
    sampler = getattr(training, kind)(model, seed=3)
    steps = []
    for i in range(60):
        if dist.get_rank():
            torch.rand(3)
            mk.ranks(model.module)
        if i == 30:
            assert_same_on_all(sampler.state_dict())
        steps.append(sampler.step())
    assert_same_on_all(steps)
    assert kind in ("FullSampler", "FixedSampler") or len({str(s) for s in steps}) > 20


def trajectory(wrap, kind):
    """Train, shrink, train: as in one process that sees the whole batch."""
    alone = net()
    optimizer = OPTIMIZERS[kind](alone.parameters())
    train(alone, optimizer, 3, 0)
    fade_all(alone)
    expected = training.shrink(alone, optimizer)
    train(alone, optimizer, 4, 1, 1e-3, training.SinglePairSampler(alone, seed=5))

    bare = net()
    together = WRAPPERS[wrap](bare)
    optimizer = OPTIMIZERS[kind](together.parameters())
    groups = [id(group) for group in optimizer.param_groups]
    sampler = training.SinglePairSampler(together, seed=5)
    train(together, optimizer, 3, 0)
    fade_all(bare)
    together, report = training.rewrap(together, optimizer, WRAPPERS[wrap])
    assert report == expected
    assert {name: new for name, (_, new) in report.items()} == KEEP
    assert [id(group) for group in optimizer.param_groups] == groups
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in together.parameters()}
    for p, state in optimizer.state.items():
        for value in state.values():
            assert not value.dim() or isinstance(value, DTensor) == isinstance(p, DTensor)
    # The sampler from before goes on: modules stayed the same objects.
    train(together, optimizer, 4, 1, 1e-3, sampler)
    assert_equal_models(together, alone)
    if wrap != "ddp":
        local = sum(p.to_local().numel() for p in together.parameters())
        whole = sum(p.numel() for p in alone.parameters())
        assert local < 0.7 * whole
    training.rewrap(together, optimizer, WRAPPERS[wrap])


def training_makes_it_smaller(wrap):
    """Maestro's penalty drives components to zero, with nobody's help, as in one process."""

    def fit(model, wrap_fn):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        maestro = training.Maestro(model, optimizer, lam=0.03, shrink_every=0, seed=2)
        found = []
        for epoch in range(4):
            for x, y in maestro.epoch(batches(6, epoch)):
                if wrap_fn is not None:
                    x, y = x.chunk(WORLD)[dist.get_rank()], y.chunk(WORLD)[dist.get_rank()]
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            if wrap_fn is None:
                training.shrink(model, optimizer, threshold=0.2)
            else:
                model, _ = training.rewrap(model, optimizer, wrap_fn, threshold=0.2)
            found.append([layer.max_rank for layer in lod(model).values()])
        maestro.close()
        return model, found

    alone, expected = fit(net(), None)
    together, found = fit(WRAPPERS[wrap](net()), WRAPPERS[wrap])
    assert found == expected
    assert all(last < first for first, last in zip((7, 12, 5), found[-1], strict=True)), found
    assert len({tuple(ranks) for ranks in found}) > 2, found
    assert_equal_models(together, alone)


def penalties_of_shards(name):
    alone, together = net(), sharded(net())
    if name == "funnel":
        pairs = [
            training.funnel(m, {k: 2 * v for k, v in training.funnel_start(m).items()})
            for m in (alone, together)
        ]
    else:
        pairs = [getattr(training, name)(m) for m in (alone, together)]
    torch.testing.assert_close(pairs[1], pairs[0])
    for value in pairs:
        value.backward()
    for (key, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(full(q.grad), p.grad)


def shrink_refuses(wrap):
    model = WRAPPERS[wrap](net())
    name = "DistributedDataParallel" if wrap == "ddp" else "FSDPModule"
    with pytest.raises(ValueError, match=rf"shrink: model: .*got {name} at .*training\.rewrap"):
        training.shrink(model)
    if wrap == "fsdp":
        with pytest.raises(ValueError, match=r"load_shrunken: model: .*got FSDPModule"):
            training.load_shrunken(model, net().state_dict())


def errors_leave_the_model_wrapped(wrap):
    model = WRAPPERS[wrap](net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, 2, 0)
    before = values(model)
    with pytest.raises(ValueError, match="rewrap: threshold: expected one that leaves a component"):
        training.rewrap(model, optimizer, WRAPPERS[wrap], threshold=1e9)
    assert values(model).keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in values(model).items())
    other = net()
    second = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    train(other, second, 2, 0)
    train(model, optimizer, 2, 1)
    train(other, second, 2, 1)
    assert_equal_models(model, other)
    with pytest.raises(TypeError, match=r"rewrap: wrap_fn: expected a function, got int"):
        training.rewrap(model, optimizer, 3)


def different_factors_raise_or_agree():
    """What one process alone finds out, all of them act on."""
    model = DDP(net())
    if dist.get_rank() == 1:
        fade(model.module.a, 3)
    model, report = training.rewrap(model, None, DDP)
    assert report["a"] == (7, 3)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.a.v[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite factors, got NaN or infinity in layer"):
        training.rewrap(model, None, DDP)


def frozen_factors_are_synchronised_later():
    alone = net()
    optimizer = torch.optim.SGD(alone.parameters(), 0.05)
    freezer = training.SequentialFreezing(alone)
    model = unused_too(net())
    parallel = torch.optim.SGD(model.parameters(), 0.05)
    parallel_freezer = training.SequentialFreezing(model)
    for epoch in range(4):
        assert freezer.epoch(epoch) == parallel_freezer.epoch(epoch)
        train(alone, optimizer, 2, epoch)
        train(model, parallel, 2, epoch)
        if epoch in (0, 1):
            model, _ = training.rewrap(model, parallel, unused_too)
        frozen = "vu"[epoch % 2]
        for layer in lod(model).values():
            assert not getattr(layer, frozen).requires_grad
    assert_equal_models(model, alone)
    with pytest.raises(ValueError, match=r"SequentialFreezing: model: .*find_unused_parameters"):
        training.SequentialFreezing(DDP(net()))


def layers_become_dense(wrap):
    model = WRAPPERS[wrap](net())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, 2, 0)
    x = next(iter(batches(1)))[0]
    expected = model(x).detach()
    model, report = training.rewrap(model, optimizer, WRAPPERS[wrap], dense=True)
    assert {new for _, new in report.values()} == {"dense"}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    torch.testing.assert_close(model(x).detach(), expected)
    train(model, optimizer, 2, 1)


def wrappers_that_hide_parameters_are_refused():
    def hide(model):
        del model.a._parameters["u"]
        return model

    with pytest.raises(NotImplementedError, match=r"rewrap: wrap_fn: .*got one that took 'u'"):
        training.rewrap(net(), None, hide)
    with pytest.raises(TypeError, match=r"wrap_fn: expected it to return the wrapped .* NoneType"):
        training.rewrap(net(), None, lambda model: None)
    inner = net()
    inner.b = DDP(inner.b)
    with pytest.raises(
        NotImplementedError, match=r"rewrap: model: .*DistributedDataParallel at 'b"
    ):
        training.rewrap(inner, None, DDP)


def other_shards_are_refused():
    """Tensor parallelism, alone and beside fully_shard; nothing changes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = net()
    model.a.bias = nn.Parameter(distribute_tensor(model.a.bias.detach(), mesh, [Shard(0)]))
    for beside in (False, True):
        if beside:
            fully_shard(model.b)
        before = list(model.parameters())
        with pytest.raises(NotImplementedError, match=r"fully_shard alone, got a DTensor at 'a\.b"):
            training.rewrap(model, None, fully_shard)
        assert all(p is q for p, q in zip(before, model.parameters(), strict=True))


CASES = {
    **{f"samplers-{k}": (samplers_agree, k) for k in ("SinglePairSampler", "IndependentSampler")},
    **{f"samplers-{k}": (samplers_agree, k) for k in ("FixedSampler", "FullSampler")},
    **{f"{w}-{o}": (trajectory, w, o) for w in WRAPPERS for o in ("sgd", "adamw")},
    # torch's Adafactor does not take FSDP2's parameters.
    "ddp-adafactor": (trajectory, "ddp", "adafactor"),
    **{
        f"penalty-{name}": (penalties_of_shards, name)
        for name in ("hierarchical_group_lasso", "group_lasso", "funnel")
    },
    **{f"refuses-{w}": (shrink_refuses, w) for w in ("ddp", "fsdp")},
    **{f"errors-{w}": (errors_leave_the_model_wrapped, w) for w in ("ddp", "fsdp")},
    "different-factors": (different_factors_raise_or_agree,),
    **{f"training-{w}": (training_makes_it_smaller, w) for w in ("ddp", "fsdp")},
    "freezing": (frozen_factors_are_synchronised_later,),
    **{f"dense-{w}": (layers_become_dense, w) for w in ("ddp", "fsdp")},
    "wrap-fn": (wrappers_that_hide_parameters_are_refused,),
    "other-shards": (other_shards_are_refused,),
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD
    )
    outcomes = {}
    for name, (function, *args) in CASES.items():
        try:
            function(*args)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        with open(os.path.join(folder, f"{rank}.json"), "w") as file:
            json.dump(outcomes, file)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two_processes"))
    context = mp.spawn(worker, (folder,), nprocs=WORLD, join=False)
    # A case that fails in one process alone leaves the other waiting.
    end = time.monotonic() + 240
    while not context.join(timeout=1) and time.monotonic() < end:
        pass
    for process in context.processes:
        if process.is_alive():
            process.kill()
    found = []
    for rank in range(WORLD):
        with open(os.path.join(folder, f"{rank}.json")) as file:
            found.append(json.load(file))
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, outcomes):
    for rank, results in enumerate(outcomes):
        assert results.get(case, "did not run: an earlier case hangs") == "", f"process {rank}"
