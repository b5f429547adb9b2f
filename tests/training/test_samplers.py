"""Which ranks the samplers write, and what writing them does not do."""

import copy
import json
import pickle
import re
from collections import Counter

import pytest
import torch
from torch import nn
from training_support import fade, full_ranks, linear_model, lod, mixed

import maestro_kernels as mk
from maestro_kernels import training

SAMPLERS = [
    training.SinglePairSampler,
    training.IndependentSampler,
    training.FixedSampler,
    training.FullSampler,
]


def pairs_of(steps, full):
    """The (layer, rank) pairs of single-pair steps; a pair at full rank shows as None."""
    found = []
    for ranks in steps:
        lower = [(name, rank) for name, rank in ranks.items() if rank != full[name]]
        assert len(lower) <= 1
        found.append(lower[0] if lower else None)
    return found


def test_single_pair_draws_every_pair_once_per_cycle():
    model = mixed()
    full = full_ranks(model)
    total = sum(full.values())
    sampler = training.SinglePairSampler(model, seed=3)
    expected = Counter((name, b) for name, R in full.items() for b in range(1, R))
    expected[None] = len(full)
    cycles = []
    for _ in range(3):
        pairs = pairs_of([sampler.step() for _ in range(total)], full)
        assert Counter(pairs) == expected
        cycles.append(pairs)
    assert cycles[0] != cycles[1] != cycles[2]


def test_independent_is_uniform_over_each_layers_ranks():
    model = mk.convert(
        nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6)), rank=None, allow_larger=True
    )
    sampler = training.IndependentSampler(model, seed=1)
    draws = [tuple(sampler.step().values()) for _ in range(3200)]
    counts = Counter(draws)
    assert len(counts) == 16
    # 200 expected of each pair; 5 standard deviations of a binomial are 68.
    assert all(132 <= count <= 268 for count in counts.values())


def test_fixed_and_full():
    model = mixed()
    full = full_ranks(model)
    assert training.FullSampler(model).step() == full
    assert training.FixedSampler(model, 0.3).step() == {
        name: max(1, 3 * R // 10) for name, R in full.items()
    }
    assert training.FixedSampler(model, 0.01).step() == dict.fromkeys(full, 1)
    assert [layer.rank for layer in lod(model).values()] == [1] * len(full)
    mk.set_ranks(model, full)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_step_writes_the_ranks_it_returns_and_reset_undoes_them(kind):
    model = mixed()
    full, sampler = full_ranks(model), kind(model)
    for _ in range(5):
        ranks = sampler.step()
        for name, layer in lod(model).items():
            assert (layer.rank, int(layer.active_rank)) == (ranks[name], ranks[name])
    sampler.reset()
    assert {name: layer.rank for name, layer in lod(model).items()} == full


@pytest.mark.parametrize("kind", SAMPLERS[:2])
def test_draws_depend_on_the_seed_and_on_nothing_else(kind):
    def draws(seed, disturb):
        sampler = kind(mixed(), seed=seed)
        steps = []
        for _ in range(40):
            if disturb:
                torch.rand(7)
                torch.manual_seed(5)
            steps.append(sampler.step())
        return steps

    assert draws(0, disturb=False) == draws(0, disturb=True)
    assert draws(0, disturb=False) != draws(1, disturb=False)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("done", [0, 7, 41, 100])
def test_resumes_from_plain_data(kind, done):
    sampler = kind(mixed(), seed=2)
    for _ in range(done):
        sampler.step()
    state = json.loads(json.dumps(sampler.state_dict()))
    ranks = {name: layer.rank for name, layer in lod(sampler._model).items()}
    expected = [sampler.step() for _ in range(60)]
    model = mixed()
    resumed = kind(model, seed=9)
    resumed.step()
    resumed.load_state_dict(state)
    assert {name: layer.rank for name, layer in lod(model).items()} == ranks
    assert [resumed.step() for _ in range(60)] == expected


def test_state_dict_is_a_snapshot():
    sampler = training.SinglePairSampler(mixed())
    sampler.step()
    state = sampler.state_dict()
    kept = copy.deepcopy(state)
    for _ in range(100):
        sampler.step()
    assert state == kept


def test_follows_layers_as_they_shrink_without_starting_the_cycle_again():
    model = mixed()
    before = full_ranks(model)
    sampler = training.SinglePairSampler(model)
    first = pairs_of([sampler.step() for _ in range(10)], before)
    fade(model[4], 9)
    training.shrink(model)
    after = full_ranks(model)
    assert (before["4"], after["4"]) == (20, 9)
    twin = training.SinglePairSampler(linear_model())
    assert twin._cycle == 0
    seen = Counter(first)
    cycle = sampler._cycle
    while True:
        ranks = sampler.step()
        if sampler._cycle != cycle:
            break
        assert all(ranks[name] <= after[name] for name in after)
        seen.update(pairs_of([ranks], after))
    # Nothing twice, and of what is still there nothing missed. Rank 9 of layer 4 is full rank now.
    pairs = [(name, b) for name, R in after.items() for b in range(1, R)]
    assert all(seen[pair] == 1 for pair in pairs)
    assert sum(count for pair, count in seen.items() if pair is not None) == len(
        set(pairs) | {p for p in first if p is not None}
    )


def test_a_resumed_sampler_knows_ranks_that_were_masked_not_cut():
    model = mixed()
    fade(model[4], 19)
    sampler = training.SinglePairSampler(model)
    training.shrink(model)
    assert model[4].max_rank == 20
    state = sampler.state_dict()
    assert state["full_ranks"]["4"] == 19
    fresh = mixed()
    resumed = training.SinglePairSampler(fresh)
    resumed.load_state_dict(state)
    resumed.reset()
    assert fresh[4].rank == 19
    for _ in range(200):
        assert resumed.step()["4"] <= 19


def test_a_layer_that_became_dense_drops_out():
    model = linear_model()
    sampler = training.SinglePairSampler(model)
    sampler.step()
    mk.set_ranks(model, {"0": "dense"})
    assert all(set(sampler.step()) == {"2"} for _ in range(40))


def test_compiled_and_copied_models():
    model = linear_model(torch.float32)
    expected = [training.SinglePairSampler(model).step()]
    assert [training.SinglePairSampler(torch.compile(model, backend="eager")).step()] == expected
    sampler = pickle.loads(pickle.dumps(training.SinglePairSampler(model)))
    assert [sampler.step()] == expected


def test_sampling_compiles_nothing_again():
    torch._dynamo.reset()
    model, x = linear_model(torch.float32), torch.randn(3, 12)
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    sampler = training.IndependentSampler(compiled)
    with torch.no_grad():
        for _ in range(6):
            sampler.step()
            torch.testing.assert_close(compiled(x), model(x))
    assert len(compiles) == 1


def test_sampling_copies_no_factor():
    model = linear_model()
    sampler = training.SinglePairSampler(model)
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    buffers = [layer.active_rank.data_ptr() for layer in lod(model).values()]
    for _ in range(20):
        sampler.step()
    assert before == {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    assert buffers == [layer.active_rank.data_ptr() for layer in lod(model).values()]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_model_without_lod_layers(kind):
    message = re.escape(
        f"{kind.__name__}: model: expected at least one LoD layer (convert makes them), "
        "got Sequential without one"
    )
    with pytest.raises(ValueError, match=message):
        kind(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        kind(3)


def test_wrong_arguments():
    model = linear_model()
    with pytest.raises(TypeError, match="SinglePairSampler: seed: expected an int >= 0, got str"):
        training.SinglePairSampler(model, seed="1")
    for fraction, error in (
        (0, ValueError),
        (1.5, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="FixedSampler: fraction: expected a number, 0 < fraction"):
            training.FixedSampler(model, fraction)
    state = training.SinglePairSampler(model).state_dict()
    with pytest.raises(ValueError, match="expected kind 'FullSampler', got 'Single"):
        training.FullSampler(model).load_state_dict(state)
    with pytest.raises(ValueError, match="full_ranks: expected the layers 4, 6, got 7"):
        training.SinglePairSampler(mixed()[4:7]).load_state_dict({**state, "full_ranks": {"7": 3}})
    with pytest.raises(ValueError, match="got no 'seed'"):
        training.SinglePairSampler(model).load_state_dict({"kind": "SinglePairSampler"})
    bad = {**state, "ranks": {"0": 99, "2": 1}}
    with pytest.raises(ValueError, match=r"ranks\['0'\]: expected an int"):
        training.SinglePairSampler(model).load_state_dict(bad)
