"""How many forms prepack chooses, measures and keeps."""

import pytest
import torch
from layer_support import plainly, siblings
from packing_support import check, make
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels.backends import onednn, packed
from maestro_kernels.measure import timing


def test_forms_are_chosen_per_bucket_of_rows(monkeypatch):
    measured = []
    monkeypatch.setattr(
        packed, "fastest", lambda key, calls, wait: measured.append(key) or "unpacked"
    )
    layer = mk.prepack(make(40, 24))
    with torch.no_grad():
        for rows in range(1, 70):
            layer(torch.randn(rows, 40))
        layer(torch.randn(5000, 40))
        layer(torch.randn(9000, 40))
    assert list(layer.packed.choices) == [1, 2, 4, 8, 16, 32, 64, 128, 4096]
    assert len(measured) == 9
    assert layer.packed.choice(3) == "unpacked"
    assert layer.packed.choice(200) is None


@pytest.mark.skipif(onednn.unsupported(torch.float32) is not None, reason="no oneDNN")
@pytest.mark.parametrize(("form", "copies"), [("two oneDNN linears", 2), ("merged dense", 1)])
def test_one_reordered_copy_serves_every_number_of_rows(form, copies, monkeypatch):
    made, original = [], onednn.reorder
    monkeypatch.setattr(onednn, "reorder", lambda w, rows: made.append(w) or original(w, rows))
    layer = mk.prepack(make(40, 24), form=form)
    for rows in (1, 2, 3, 17, 64, 300):
        check(layer, torch.randn(rows, 40))
    assert len(made) == copies


def test_only_the_winner_is_packed_where_the_answer_is_known(monkeypatch):
    monkeypatch.setattr(packed, "fastest", lambda key, calls, wait: "unpacked")
    monkeypatch.setattr(packed, "make_form", lambda *_: pytest.fail("packed"))
    check(mk.prepack(make(40, 24)), torch.randn(4, 40))


def test_measurements_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(packed, "_MAX_REMEMBERED", 3)
    monkeypatch.setattr(packed, "_fastest", {})
    monkeypatch.setattr(timing, "interleave", lambda calls, **_: {"a": timing.Stats.of([1.0], 1)})
    for key in range(8):
        assert packed.fastest(key, {"a": lambda: None}) == "a"
    assert len(packed._fastest) <= 3


@pytest.mark.parametrize("build", [lambda: mk.prepack(make(40, 24)), lambda: siblings(None)])
def test_another_number_of_threads_is_chosen_for_anew(build, monkeypatch):
    asked = []

    def fastest(key, calls, wait):
        asked.append(torch.get_num_threads())
        return min(calls)

    monkeypatch.setattr(packed, "fastest", fastest)
    module, threads, x = build(), torch.get_num_threads(), torch.randn(4, 40)
    layers = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    try:
        with torch.no_grad():
            for n in (threads, threads + 1, threads + 1):
                torch.set_num_threads(n)
                for layer in layers:
                    assert_close(layer(x), plainly(layer, x, 16), atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)
    before, after = asked.count(threads), asked.count(threads + 1)
    assert before == after > 0
