"""Inputs and factors that are no plain tensors get the errors of a call, packed or not."""

import pytest
import torch
from layer_support import plainly, siblings
from packing_support import FORMS, make, needs_library
from torch.testing import assert_close

import maestro_kernels as mk


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of the inputs made here
@pytest.mark.parametrize("build", [
    *(pytest.param(lambda form=f.values[0]: mk.prepack(make(40, 24), form=form), marks=f.marks)
      for f in FORMS),
    pytest.param(lambda: siblings()["q_proj"], marks=needs_library),
    lambda: siblings(None)["q_proj"],
    lambda: siblings(prepacked=False)["q_proj"],
])  # fmt: skip
def test_odd_inputs_get_the_errors_of_a_call(build):
    layer = build()
    x = torch.randn(4, 40)
    freed = torch.randn(4, 40)
    freed.untyped_storage().resize_(0)
    odd = {
        "none": None,
        "list": [1.0] * 40,
        "sparse": x.to_sparse(),
        "sparse rows": x.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.randn(2, 40), torch.randn(3, 40)]),
        "jagged": torch.nested.nested_tensor(
            [torch.randn(2, 40), torch.randn(3, 40)], layout=torch.jagged
        ),
        "freed": freed,
    }
    with torch.no_grad():
        for _ in range(2):
            for name, value in odd.items():
                with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
                    layer(value)
                assert "lod_linear" in str(caught.value), name
                assert ": x: expected " in str(caught.value), name
            assert_close(layer(x), plainly(layer, x, 16))


@pytest.mark.parametrize("build", [
    lambda: mk.prepack(make(40, 24)), lambda: siblings(None)["q_proj"], lambda: make(40, 24),
])  # fmt: skip
def test_freed_factors_get_the_errors_of_a_call(build):
    layer, x = build(), torch.randn(4, 40)
    with torch.no_grad():
        layer(x)
        layer.v.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"lod_linear: v: expected "):
            layer(x)
