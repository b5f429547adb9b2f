import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels.arguments import renamed


@renamed(old="new")
def doubled(x, new=0):
    return 2 * (x + new)


def test_an_old_name_works_and_warns_where_it_is_used():
    with pytest.warns(DeprecationWarning, match="doubled: old is called new now") as caught:
        assert doubled(1, old=2) == 6
    assert caught[0].filename == __file__
    assert doubled(1, new=2) == 6
    with pytest.raises(TypeError, match="doubled: old: expected new alone"):
        doubled(1, old=2, new=2)


# Not as a keyword, which a search for old names would replace.
OLD = {"data": [torch.randn(64, 16)]}


def layer():
    return mk.convert(nn.Sequential(nn.Linear(16, 16)), rank=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mk.prepack(module=layer()),
        lambda: mk.unpack(module=layer()),
        lambda: mk.refresh(module=layer()),
        lambda: mk.set_ranks(layer(), new={"0": 2}),
        lambda: mk.convert(nn.Sequential(nn.Linear(16, 16)), 4, init="data", **OLD),
    ],
)
def test_names_of_the_last_release_still_work(call):
    with pytest.warns(DeprecationWarning, match="is called"):
        assert isinstance(call(), nn.Module)
