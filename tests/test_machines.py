"""The package on machines that this one is not: any two of their traits meet in one of these.

`python tests/support/machines TABLE` runs the full product.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import machines
import pytest

SUBSET = machines.pairwise()


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """Machine -> its visit under way: each is a process, and two cores serve two."""
    model = machines.tiny_model(tmp_path_factory.mktemp("model"))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield [
            None if machines.beyond(machine) else pool.submit(machines.visit, machine, model)
            for machine in SUBSET
        ]


@pytest.mark.parametrize("k", range(len(SUBSET)), ids=[machines.title(m) for m in SUBSET])
def test_the_package_works_on(k, visits):
    why_not = machines.beyond(SUBSET[k])
    if why_not is not None:
        pytest.skip(why_not)
    outcome = visits[k].result()
    assert not outcome.problem, outcome.printed[-8000:]


def test_any_two_values_of_different_traits_meet():
    for a, b in combinations(machines.TRAITS, 2):
        met = {(machine[a], machine[b]) for machine in SUBSET}
        assert met == {(x, y) for x in machines.TRAITS[a] for y in machines.TRAITS[b]}


def test_a_cap_above_this_cpu_is_no_other_machine(monkeypatch):
    monkeypatch.setattr(machines, "flags", lambda: {"avx2"})
    machine = {**machines.THIS, "oneDNN": "AVX512_CORE_BF16"}
    assert machines.beyond(machine) == (
        "this CPU has no avx512_bf16, so oneDNN AVX512_CORE_BF16 caps nothing"
    )
    assert machines.beyond({**machines.THIS, "ATen": "avx2", "library": "portable"}) is None


@pytest.mark.parametrize(
    ("trait", "value", "more"),
    [("oneDNN", "AVX2", "avx512dq"), ("ATen", "default", "avx2"), ("library", "portable", "avx2")],
)
def test_a_cap_without_effect_is_found_out(trait, value, more, tmp_path, monkeypatch):
    """A switch that changes nothing fails the visit: here the variables are not passed on."""
    if more not in machines.flags():
        pytest.skip(f"this CPU has no {more}, so {trait} {value} is what it is")
    environment = machines._environment

    def without(machine, folder):
        caps = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MK_CPU_ISA")
        return {k: v for k, v in environment(machine, folder).items() if k not in caps}

    monkeypatch.setattr(machines, "_environment", without)
    outcome = machines.visit({**machines.THIS, trait: value}, tmp_path, steps=["caps"])
    assert "AssertionError" in outcome.problem
